"""The smoke preset of a paper's table runs from grid to table."""

import pathlib
import subprocess
import sys
import tempfile

import pytest
from absl.testing import absltest

ROOT = pathlib.Path(__file__).parents[2]


class SmokeTableTest(absltest.TestCase):
  @pytest.mark.slow
  def test_fed_avg(self):
    with tempfile.TemporaryDirectory() as results:
      done = subprocess.run(
        [
          *(sys.executable, '-m', 'launchers.table', '--paper=fed_avg'),
          *('--preset=smoke', f'--results_dir={results}'),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
      )
      self.assertEqual(done.returncode, 0, done.stderr[-2000:])
      folder = pathlib.Path(results) / 'fed_avg' / 'smoke'
      table = (folder / 'table.md').read_text()
      for row in ('FedAvg', 'FedProx (mu=0.1)', 'SCAFFOLD', 'Local training'):
        self.assertRegex(table, rf'\| {row.split(" ")[0]}.*\(n = 1\)')
      self.assertTrue((folder / 'table.csv').exists())


if __name__ == '__main__':
  absltest.main()
