"""The smoke preset of a paper's table runs from grid to table."""

import pathlib
import subprocess
import sys
import tempfile

import pytest
from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).parents[2]


class SmokeTableTest(parameterized.TestCase):
  @parameterized.parameters(
    ('fed_avg', 'table', ('FedAvg', 'SCAFFOLD', 'Local training')),
    ('retrieval', 'synthetic', ('Batch softmax', 'Global softmax')),
    ('mixed_fl', 'table', ('PARALLEL TRAINING', 'Oracle')),
    ('participation_gap', 'reference', ('Natural', r'Semantic \(KL\)')),
  )
  @pytest.mark.slow
  def test_smoke(self, paper, table, rows):
    with tempfile.TemporaryDirectory() as results:
      done = subprocess.run(
        [
          *(sys.executable, '-m', 'launchers.table', f'--paper={paper}'),
          *(f'--table={table}', '--preset=smoke', f'--results_dir={results}'),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
      )
      self.assertEqual(done.returncode, 0, done.stderr[-2000:])
      folder = pathlib.Path(results) / paper
      folder = folder if table == 'table' else folder / table
      text = (folder / 'smoke' / 'table.md').read_text()
      for row in rows:
        self.assertRegex(text, rf'\| {row}.*\(n = 1\)')
      self.assertTrue((folder / 'smoke' / 'table.csv').exists())


if __name__ == '__main__':
  absltest.main()
