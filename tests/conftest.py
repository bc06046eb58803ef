"""Eight CPU devices for every test, so that sharding is really exercised.

Compiled programs are kept between tests and runs of the suite, in a folder for
temporary files; nothing is written to the home directory.
"""

import os
import pathlib
import tempfile

if 'host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
  )
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# As the binaries do (experiments/__init__.py).
os.environ.setdefault('JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS', 'true')
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(pathlib.Path(tempfile.gettempdir()) / f'fedjax_ext_tests_{os.getuid()}'),
)
