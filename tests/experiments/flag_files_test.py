"""Every flag file: its flags exist, and what they name takes its arguments."""

import pathlib
import subprocess
import sys

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(p.parent.name for p in ROOT.glob('experiments/*/run.py'))


class FlagFilesTest(parameterized.TestCase):
  @parameterized.parameters(*EXPERIMENTS)
  def test_flag_files(self, experiment):
    done = subprocess.run(
      [sys.executable, '-m', 'tests.experiments.check_flag_files', experiment],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertRegex(done.stderr, r'[1-9]\d* flag files')
    self.assertEqual(done.stdout, '')

  def test_there_are_experiments(self):
    self.assertContainsSubset(
      ['fed_avg', 'fedloge', 'mixed_fl', 'participation_gap', 'retrieval'],
      EXPERIMENTS,
    )


if __name__ == '__main__':
  absltest.main()
