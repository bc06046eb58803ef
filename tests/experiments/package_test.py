"""What importing the experiments' package says to jax."""

import json
import subprocess
import sys

from absl.testing import absltest

from tests.experiments import runs

PROBE = """
import json
import experiments
import jax
import jax.numpy as jnp
text = lambda array: jax.jit(lambda x: x + array).lower(0.0).as_text()
print(json.dumps([text(jnp.ones(9)), text(jnp.zeros(9))]))
"""


class PackageTest(absltest.TestCase):
  def test_programs_do_not_hold_the_arrays_that_they_capture(self):
    """Or no two seeds would share a compiled program."""
    done = subprocess.run(
      [sys.executable, '-c', PROBE],
      cwd=runs.ROOT,
      env=runs.environment(),
      capture_output=True,
      text=True,
      check=True,
    )
    ones, zeros = json.loads(done.stdout)
    self.assertIn('add', ones)
    self.assertEqual(ones, zeros)


if __name__ == '__main__':
  absltest.main()
