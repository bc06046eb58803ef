"""Flags of devices, processes and the compilation cache."""

import json
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized

from tests.experiments import runs

# Prints what jax was told; a process of its own, since jax is told once.
PROBE = """
import json, sys
import jax
from absl import flags
from fedjax_ext.core import InvalidInput
from fedjax_ext.training import device_flags
flags.FLAGS(sys.argv)
try:
  layout = device_flags.layout_from_flags(3)
except InvalidInput as error:
  print(json.dumps({'error': str(error)}))
else:
  print(json.dumps({
    'devices': layout.num_devices,
    'cache': jax.config.jax_compilation_cache_dir,
    'enabled': jax.config.jax_enable_compilation_cache,
  }))
"""


def probe(*flags: str, **env: str) -> dict:
  """What PROBE prints with flags and environment."""
  environment = runs.environment(**env)
  if 'JAX_COMPILATION_CACHE_DIR' not in env:
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)
  done = subprocess.run(
    [sys.executable, '-c', PROBE, *flags],
    cwd=runs.ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout) | {'stderr': done.stderr}


class DeviceFlagsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.home = self.enter_context(tempfile.TemporaryDirectory())

  def test_the_cache_is_on_by_default(self):
    got = probe(HOME=self.home)
    cache = pathlib.Path(self.home) / '.cache/fedjax_ext'
    self.assertEqual(got['cache'], str(cache))
    self.assertTrue(cache.is_dir())
    self.assertTrue(got['enabled'])

  def test_the_cache_where_jax_was_told(self):
    theirs, mine = f'{self.home}/theirs', f'{self.home}/mine'
    got = probe(JAX_COMPILATION_CACHE_DIR=theirs)
    self.assertEqual(got['cache'], theirs)
    flag = f'--compilation_cache={mine}'
    got = probe(flag, JAX_COMPILATION_CACHE_DIR=theirs)
    self.assertEqual(got['cache'], mine)

  def test_no_cache(self):
    self.assertFalse(probe('--compilation_cache=')['enabled'])

  def test_a_cache_that_cannot_be_written(self):
    got = probe('--compilation_cache=/proc/none', HOME=self.home)
    self.assertIn('No compilation cache', got['stderr'])
    self.assertIn('devices', got)

  def test_devices(self):
    self.assertEqual(probe('--num_devices=3', HOME=self.home)['devices'], 3)

  @parameterized.parameters(
    (
      ('--num_devices=3', '--num_processes=2'),
      'Expected a multiple of num_processes=2, got num_devices=3.',
    ),
    (('--num_processes=0',), 'num_processes=0'),
    (
      ('--num_processes=2',),
      'Expected --coordinator_address with num_processes=2, got none.',
    ),
    (
      ('--num_processes=2', '--coordinator_address=somewhere'),
      'Expected HOST:PORT, got coordinator_address=somewhere.',
    ),
    (
      (
        '--num_processes=2',
        '--coordinator_address=localhost:1',
        '--process_id=2',
      ),
      'process_id=2',
    ),
  )
  def test_bad_flags(self, flags, message):
    self.assertIn(message, probe('--compilation_cache=', *flags)['error'])


if __name__ == '__main__':
  absltest.main()
