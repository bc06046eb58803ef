"""Eight CPU devices for every test, so that sharding is really exercised."""

import os

if 'host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
  )
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
