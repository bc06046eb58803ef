"""Tests of launchers.slurm; those with a cluster start a real one."""

import os
import pathlib
import signal
import subprocess
import tempfile
import threading
import time
from unittest import mock

import pytest
from absl.testing import absltest

from launchers import fields, grid, schedule, slurm
from tests.launchers import slurm_cluster

# Like a run: saves its state on SIGTERM, resumes from it.
PROGRAM = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
with (folder / 'starts.txt').open('a') as file:
  print(os.environ['SLURMD_NODENAME'], file=file)
exec(sys.argv[2])
(folder / 'final.json').write_text(json.dumps({'metrics': {'m': 1.0}}))
"""
SAVES = """
def save(*_):
  (folder / 'saved.txt').touch()
  sys.exit(1)
signal.signal(signal.SIGTERM, save)
(folder / 'ready.txt').touch()
while not (folder / 'go.txt').exists():
  time.sleep(0.1)
"""


class SlurmCase(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.root = pathlib.Path(folder).resolve()
    self.runs = self.root / 'runs'

  def cell(self, name, extra='pass'):
    args = ('-S', '-c', PROGRAM, f'runs/{name}', extra)
    return grid.Cell('d', name, 1, (), f'runs/{name}', args)

  def runner(self, **options):
    return slurm.SlurmRunner(
      root=self.root,
      folder=self.root / 'jobs',
      look_seconds=0.5,
      vanished_seconds=5.0,
      **{'jobs': 2, 'hours': 0.2, **options},
    )


class DescribeTest(SlurmCase):
  def test_dry_run_shows_the_array_and_its_commands(self):
    self.enterContext(mock.patch.object(subprocess, 'run'))
    runner = self.runner(
      gpus=1, cores=4, memory_gb=1.5, options={'partition': 'gpu'}
    )
    lines = runner.describe([self.cell(name) for name in 'abc'])
    self.assertLen(lines, 4)
    self.assertEqual(
      lines[0],
      '# sbatch --array=0-2%2 --time=12 --cpus-per-task=4 '
      '--job-name=fedjax_ext --gpus-per-node=1 --mem=1536M --partition=gpu, '
      'each task one of:',
    )
    subprocess.run.assert_not_called()

  def test_without_submitit_or_slurm_one_line_says_so(self):
    with (
      mock.patch.dict('sys.modules', {'submitit': None}),
      self.assertRaisesRegex(fields.TableError, r'fedjax_ext\[slurm\]'),
    ):
      self.runner()
    with (
      mock.patch.dict(os.environ, {'PATH': ''}),
      self.assertRaisesRegex(fields.TableError, '--runner=slurm: .*srun'),
    ):
      self.runner().start([self.cell('a')])


@pytest.mark.slow
@pytest.mark.skipif(
  bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or 'there'
)
class ClusterTest(SlurmCase):
  def setUp(self):
    super().setUp()
    package = pathlib.Path(slurm.__file__).resolve().parents[1]
    folder = self.root / 'slurm'
    folder.mkdir()
    environment = {
      **self.enterContext(slurm_cluster.cluster(folder)),
      'PYTHONPATH': str(package),
    }
    self.enterContext(mock.patch.dict(os.environ, environment))

  def run_cells(self, *cells, retries=0, **options):
    how = schedule.Schedule(
      root=self.root,
      runner=self.runner(**options),
      digest=lambda: 'code',
      retries=retries,
    )
    return schedule.run_cells(cells, how)

  def starts(self, name):
    path = self.runs / name / 'starts.txt'
    return path.read_text().split() if path.exists() else []

  def meanwhile(self, act):
    """Calls `act` beside the test."""
    thread = threading.Thread(target=act)
    thread.start()
    self.addCleanup(thread.join)

  def wait_for(self, *names):
    while not all((self.runs / name).exists() for name in names):
      time.sleep(0.1)

  def let_go(self, *names):
    for name in names:
      (self.runs / name / 'go.txt').touch()

  def test_an_array_runs_on_both_nodes_and_failures_say_why(self):
    pause = 'time.sleep(3)'
    crash = "print('before'); raise ValueError('bad rate')"
    ended = self.run_cells(
      self.cell('a', pause),
      self.cell('b', pause),
      self.cell('c', crash),
      self.cell('d', 'os.kill(os.getpid(), signal.SIGKILL)'),
    )
    self.assertEqual(
      [result.reason for result in ended],
      ['', '', 'exit code 1: ValueError: bad rate', 'exit code -9, empty log'],
    )
    self.assertEqual(ended[0].final.metrics, {'m': 1.0})
    self.assertCountEqual(self.starts('a') + self.starts('b'), ['one', 'two'])
    again = self.run_cells(self.cell('a', pause), self.cell('c', crash))
    self.assertEqual([r.final is None for r in again], [False, True])
    self.assertLen(self.starts('a'), 1)
    self.assertLen(self.starts('c'), 2)

  def test_a_preempted_job_is_requeued_and_resumes(self):
    def preempt():
      self.wait_for('a/ready.txt', 'b/ready.txt')
      subprocess.run(
        [
          *('sbatch', '--partition=high', '--nodes=1', '--output=/dev/null'),
          *('--wrap', 'sleep 3'),
        ],
        check=True,
        capture_output=True,
      )

    def go_on():
      while not list(self.runs.glob('*/saved.txt')):
        time.sleep(0.1)
      self.let_go('a', 'b')

    self.meanwhile(preempt)
    self.meanwhile(go_on)
    cells = [self.cell('a', SAVES), self.cell('b', SAVES)]
    ended = self.run_cells(*cells)
    self.assertEqual([result.reason for result in ended], ['', ''])
    self.assertEqual(sorted(len(self.starts(name)) for name in 'ab'), [1, 2])

  def test_ctrl_c_leaves_the_jobs_and_the_next_call_finds_them(self):
    cells = [self.cell('a', SAVES), self.cell('b', SAVES)]

    def interrupt():
      self.wait_for('a/ready.txt', 'b/ready.txt')
      os.kill(os.getpid(), signal.SIGINT)

    self.meanwhile(interrupt)
    with self.assertRaisesRegex(
      schedule.Interrupted, '0 of 2 cells finished; 2 go on without us'
    ):
      self.run_cells(*cells)

    def go_on():
      time.sleep(1.0)
      self.let_go('a', 'b')

    self.meanwhile(go_on)
    ended = self.run_cells(*cells)
    self.assertEqual([result.reason for result in ended], ['', ''])
    self.assertEqual([len(self.starts(name)) for name in 'ab'], [1, 1])

  def test_a_job_that_someone_cancels_is_tried_again(self):
    def cancel():
      self.wait_for('a/ready.txt')
      subprocess.run(['scancel', '--name=fedjax_ext', '--full'], check=True)
      self.let_go('a')

    self.meanwhile(cancel)
    ended = self.run_cells(self.cell('a', SAVES), retries=1)
    self.assertEqual(ended[0].reason, '')


del SlurmCase

if __name__ == '__main__':
  absltest.main()
