"""Eight CPU devices for every test, so that sharding is really exercised.

Tests compile a lot and compute little: LLVM does not optimise, which takes a
quarter of the time to compile (--xla_backend_optimization_level=3 in XLA_FLAGS
tests what users run). Compiled programs are kept between tests and runs of the
suite, in a folder for temporary files; nothing is written to the home
directory.
"""

import importlib.metadata
import os
import pathlib
import tempfile

FLAGS = ['--xla_force_host_platform_device_count=8']
if 'xla_backend_optimization_level' not in os.environ.get('XLA_FLAGS', ''):
  FLAGS.append('--xla_backend_optimization_level=0')
  # XLA ends the process at a flag that it does not know.
  if importlib.metadata.version('jaxlib').startswith('0.10.'):
    FLAGS.append('--xla_cpu_use_fusion_emitters=false')
# Of a flag that is given twice the last counts.
os.environ['XLA_FLAGS'] = ' '.join([*FLAGS, os.environ.get('XLA_FLAGS', '')])
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(pathlib.Path(tempfile.gettempdir()) / f'fedjax_ext_tests_{os.getuid()}'),
)
