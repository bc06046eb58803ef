"""Eight CPU devices for every test, so that sharding is really exercised.

Tests compile a lot and compute little: LLVM does not optimise what they compile
themselves, which saves a third of the time for it. Binaries that they start are
compiled as users have them, and so is all with
--xla_backend_optimization_level=3 in XLA_FLAGS. Compiled programs are kept
between tests and runs of the suite, in a folder for temporary files; nothing is
written to the home directory.
"""

import os
import pathlib
import tempfile

FLAGS = ['--xla_force_host_platform_device_count=8']
if 'xla_backend_optimization_level' not in os.environ.get('XLA_FLAGS', ''):
  FLAGS.append('--xla_backend_optimization_level=0')
# Of a flag that is given twice the last counts.
os.environ['XLA_FLAGS'] = ' '.join([*FLAGS, os.environ.get('XLA_FLAGS', '')])
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(pathlib.Path(tempfile.gettempdir()) / f'fedjax_ext_tests_{os.getuid()}'),
)
