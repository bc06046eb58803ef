"""All tables at smoke scale, from nothing, through a kill of everything."""

import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).parents[2]


class SmokeTableTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.results = pathlib.Path(folder)

  def command(self, paper, *flags):
    return [
      *(sys.executable, '-m', 'launchers.table', f'--paper={paper}'),
      *('--preset=smoke', f'--results_dir={self.results}', *flags),
    ]

  def check(self, command):
    done = subprocess.run(
      command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    self.assertEqual(done.returncode, 0, done.stderr[-2000:])

  def check_rows(self, folder, rows):
    text = (self.results / folder / 'smoke' / 'table.md').read_text()
    for row in rows:
      self.assertRegex(text, rf'\| {row}.*\(n = 1\)')
    for name in ('table.csv', 'table.tex', 'plot.png'):
      self.assertTrue((self.results / folder / 'smoke' / name).exists())

  @parameterized.parameters(
    ('retrieval', 'synthetic', ('Batch softmax', 'Global softmax')),
    ('participation_gap', 'reference', ('Natural', r'Semantic \(KL\)')),
    ('bdpfl', 'ablation', ('BDPFL', 'None')),
  )
  @pytest.mark.slow
  def test_further_tables(self, paper, table, rows):
    self.check(self.command(paper, f'--table={table}'))
    self.check_rows(f'{paper}/{table}', rows)

  @pytest.mark.slow
  def test_all_papers_survive_a_kill_of_launcher_and_runs(self):
    command = self.command('all')
    launcher = subprocess.Popen(
      command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    finished = lambda: set(self.results.glob('**/final.json'))
    while len(finished()) < 8 and launcher.poll() is None:
      time.sleep(0.2)
    launcher.kill()
    self.assertEqual(launcher.wait(), -signal.SIGKILL)
    subprocess.run(['pkill', '-KILL', '-f', f'workdir={self.results}/'])
    before = {path: path.stat().st_mtime_ns for path in finished()}
    self.assertGreaterEqual(len(before), 8)
    self.check(command)
    for path, changed in before.items():
      self.assertEqual(path.stat().st_mtime_ns, changed, path)
    for paper, rows in {
      'bdpfl': ('BDPFL', 'Multi-Krum', 'Local'),
      'fed_avg': ('FedAvg', 'SCAFFOLD', 'Local training'),
      'fedloge': ('FedLoGe', 'CReFF'),
      'mixed_fl': ('PARALLEL TRAINING', 'Oracle'),
      'participation_gap': ('Natural',),
      'retrieval': ('Batch softmax', 'Popularity'),
    }.items():
      self.check_rows(paper, rows)


if __name__ == '__main__':
  absltest.main()
