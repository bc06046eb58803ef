"""Tests of launchers.schedule and its local runner, with tiny processes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

from absl.testing import absltest

from launchers import cells as cells_lib
from launchers import fields, grid, local, schedule

# Writes the report of a run; argv[1] is the folder, argv[2] code to run first.
PROGRAM = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
with (folder / 'starts.txt').open('a') as file:
  print('start', file=file)
exec(sys.argv[2])
(folder / 'final.json').write_text(json.dumps({'metrics': {'m': 1.0}}))
"""
SLOW = """
def save(*_):
  (folder / 'saved.txt').write_text('state')
  sys.exit(1)
signal.signal(signal.SIGTERM, save)
(folder / 'ready.txt').touch()
while not (folder / 'saved.txt').exists():
  time.sleep(0.01)
"""
# Two runs wait for each other: one after the other, they would fail.
TOGETHER = """
(folder / 'here').touch()
both = [folder.parent / name / 'here' for name in 'ab']
until = time.time() + 120
while not all(path.exists() for path in both):
  assert time.time() < until, 'the other run has not started'
  time.sleep(0.01)
"""
DEAF = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / 'ready.txt').touch()
time.sleep(60)
"""


class ScheduleTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.root = pathlib.Path(folder)
    self.code = 'one'

  def cell(self, name, extra='pass'):
    args = ('-S', '-c', PROGRAM, f'runs/{name}', extra)
    return grid.Cell('d', name, 1, (), f'runs/{name}', args)

  def run_cells(self, *cells, retries=0, grace_seconds=10.0, **options):
    runner = local.LocalRunner(root=self.root, **{'jobs': 2, **options})
    how = schedule.Schedule(
      root=self.root,
      runner=runner,
      digest=lambda: self.code,
      retries=retries,
      grace_seconds=grace_seconds,
    )
    return schedule.run_cells(cells, how)

  def starts(self, name):
    text = (self.root / 'runs' / name / 'starts.txt').read_text()
    return text.count('start')

  def interrupt_when_ready(self, *names, signals=(signal.SIGINT,)):
    """Sends signals to this process once the named runs are under way."""

    def send():
      paths = [self.root / 'runs' / name / 'ready.txt' for name in names]
      while not all(path.exists() for path in paths):
        time.sleep(0.01)
      for signum in signals:
        os.kill(os.getpid(), signum)
        time.sleep(0.2)

    thread = threading.Thread(target=send)
    thread.start()
    self.addCleanup(thread.join)

  def test_results_come_in_the_order_of_the_cells(self):
    cells = [self.cell('a', 'time.sleep(0.2)'), self.cell('b'), self.cell('c')]
    ended = self.run_cells(*cells)
    self.assertEqual([result.cell for result in ended], cells)
    for result in ended:
      self.assertEqual(result.final.metrics, {'m': 1.0})
      self.assertEqual(result.code, 'one')
    record = json.loads((self.root / 'runs/b/cell.json').read_text())
    self.assertEqual(record, {'command': cells[1].command(), 'code': 'one'})

  def test_a_finished_cell_is_kept(self):
    self.run_cells(self.cell('a'))
    ended = self.run_cells(self.cell('a'))
    self.assertEqual(self.starts('a'), 1)
    self.assertIsNotNone(ended[0].final)

  def test_another_interpreter_is_no_change(self):
    self.run_cells(self.cell('a'))
    self.run_cells(self.cell('a'), interpreter='/no/such/python')
    self.assertEqual(self.starts('a'), 1)

  def test_a_changed_command_or_code_starts_from_nothing(self):
    self.run_cells(self.cell('a'))
    (self.root / 'runs/a/checkpoint').touch()
    self.run_cells(self.cell('a', 'changed = 1'))
    self.assertFalse((self.root / 'runs/a/checkpoint').exists())
    (self.root / 'runs/a/checkpoint').touch()
    self.code = 'two'
    ended = self.run_cells(self.cell('a', 'changed = 1'))
    self.assertFalse((self.root / 'runs/a/checkpoint').exists())
    self.assertEqual(self.starts('a'), 1)
    self.assertEqual(ended[0].code, 'two')

  def test_a_cell_without_a_report_resumes_in_its_folder(self):
    self.run_cells(self.cell('a'))
    (self.root / 'runs/a/final.json').write_text('{"metr')
    (self.root / 'runs/a/checkpoint').touch()
    ended = self.run_cells(self.cell('a'))
    self.assertEqual(self.starts('a'), 2)
    self.assertTrue((self.root / 'runs/a/checkpoint').exists())
    self.assertIsNotNone(ended[0].final)

  def test_a_failed_cell_says_why_and_the_others_go_on(self):
    crash = "print('before'); raise ValueError('bad rate')"
    ended = self.run_cells(
      self.cell('a', crash),
      self.cell('b', 'sys.exit(3)'),
      self.cell('c', 'os._exit(0)'),
      self.cell('d', 'os.kill(os.getpid(), signal.SIGKILL)'),
      self.cell('e'),
    )
    self.assertEqual(
      [result.reason for result in ended],
      [
        'exit code 1: ValueError: bad rate',
        'exit code 3, empty log',
        'exit code 0, but no valid final.json',
        'signal 9, empty log',
        '',
      ],
    )
    self.assertIn('before\n', (self.root / 'runs/a/log.txt').read_text())
    self.assertEqual([r.final is None for r in ended], [True] * 4 + [False])

  def test_the_report_of_a_process_that_failed_is_not_kept(self):
    fail = (
      "(folder / 'final.json').write_text('{\"metrics\": {}}'); sys.exit(1)"
    )
    self.run_cells(self.cell('a', fail))
    ended = self.run_cells(self.cell('a', fail))
    self.assertEqual(self.starts('a'), 2)
    self.assertIsNone(ended[0].final)

  def test_a_process_that_cannot_start_is_a_failed_cell(self):
    ended = self.run_cells(self.cell('a'), interpreter='/no/such/python')
    self.assertStartsWith(ended[0].reason, 'no start: ')

  def test_a_failed_cell_is_tried_again_where_it_stopped(self):
    second = "if not (folder / 'c').exists(): (folder / 'c').touch(); exit(1)"
    ended = self.run_cells(
      self.cell('a', second),
      self.cell('b', 'sys.exit(1)'),
      self.cell('c', 'sys.exit(2)'),
      retries=2,
    )
    self.assertEqual([self.starts(name) for name in 'abc'], [2, 3, 1])
    self.assertEqual([r.final is None for r in ended], [False, True, True])
    self.assertEqual(ended[1].reason, 'exit code 1, empty log')

  def test_each_job_sees_its_own_gpu(self):
    note = (
      "(folder / 'gpu.txt').write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
      + TOGETHER
    )
    self.run_cells(*[self.cell(name, note) for name in 'abc'], gpus=('4', '7'))
    read = [(self.root / f'runs/{n}/gpu.txt').read_text() for n in 'abc']
    self.assertEqual(read[:2], ['4', '7'])
    self.assertIn(read[2], ('4', '7'))
    with self.assertRaisesRegex(fields.TableError, '2 GPUs, got jobs=3'):
      self.run_cells(self.cell('a'), jobs=3, gpus=('4', '7'))

  def test_a_collected_cell_says_on_which_code_it_ran(self):
    self.run_cells(self.cell('a'))
    self.code = 'two'
    collected = cells_lib.collected_result(self.cell('a'), self.root)
    self.assertEqual(collected.final.metrics, {'m': 1.0})
    self.assertEqual(collected.code, 'one')
    for cell, reason in (
      (self.cell('a', 'changed = 1'), 'ran with another command'),
      (self.cell('b'), 'not run'),
    ):
      collected = cells_lib.collected_result(cell, self.root)
      self.assertIsNone(collected.final)
      self.assertEqual(collected.reason, reason)

  def test_jobs_run_at_a_time_on_one_core_each(self):
    note = (
      "(folder / 'cores.txt').write_text(str(sorted(os.sched_getaffinity(0))));"
      "(folder / 'from.txt').write_text(str(time.time()))"
      + TOGETHER
      + "(folder / 'to.txt').write_text(str(time.time()))"
    )
    if not hasattr(os, 'sched_setaffinity'):
      note = note.partition(';')[2]
    self.run_cells(*[self.cell(name, note) for name in 'abc'])
    read = lambda name: [
      (self.root / 'runs' / cell / name).read_text() for cell in 'abc'
    ]
    starts, ends = map(float, read('from.txt')), map(float, read('to.txt'))
    spans = list(zip(starts, ends, strict=True))
    self.assertGreater(spans[2][0], min(spans[0][1], spans[1][1]))
    if hasattr(os, 'sched_setaffinity'):
      cores = sorted(os.sched_getaffinity(0))
      first, second = cores[0], cores[1 % len(cores)]
      self.assertEqual(read('cores.txt')[:2], [f'[{first}]', f'[{second}]'])

  def test_ctrl_c_lets_runs_save_and_the_next_call_resumes(self):
    cells = [self.cell('a'), self.cell('b', SLOW), self.cell('c', SLOW)]
    self.interrupt_when_ready('b', 'c')
    before = signal.getsignal(signal.SIGINT)
    with self.assertRaisesRegex(schedule.Interrupted, '1 of 3 cells') as caught:
      self.run_cells(*cells)
    self.assertEqual(caught.exception.signum, signal.SIGINT)
    self.assertIs(signal.getsignal(signal.SIGINT), before)
    self.assertTrue((self.root / 'runs/b/saved.txt').exists())
    self.assertTrue((self.root / 'runs/c/saved.txt').exists())
    ended = self.run_cells(*cells)
    self.assertNotIn(None, [result.final for result in ended])
    self.assertEqual([self.starts(name) for name in 'abc'], [1, 2, 2])

  def test_a_deaf_run_is_killed_after_the_grace(self):
    self.interrupt_when_ready('a', signals=(signal.SIGTERM,))
    start = time.monotonic()
    with self.assertRaises(schedule.Interrupted):
      self.run_cells(self.cell('a', DEAF), grace_seconds=0.2)
    self.assertLess(time.monotonic() - start, 45)  # It sleeps for 60.

  def test_a_second_ctrl_c_kills_at_once(self):
    self.interrupt_when_ready('a', signals=(signal.SIGINT, signal.SIGINT))
    start = time.monotonic()
    with self.assertRaises(schedule.Interrupted):
      self.run_cells(self.cell('a', DEAF), grace_seconds=50.0)
    self.assertLess(time.monotonic() - start, 45)  # It sleeps for 60.

  def test_two_launchers_never_share_a_folder(self):
    folder = self.root / 'runs'
    with (
      schedule.results_lock(folder),
      self.assertRaisesRegex(fields.TableError, 'another launcher'),
      schedule.results_lock(folder),
    ):
      self.fail('the lock was taken twice')
    with schedule.results_lock(folder) as pass_fds:
      self.assertLen(pass_fds, 1 if sys.platform != 'win32' else 0)

  def test_runs_that_outlive_a_launcher_are_waited_for(self):
    folder = self.root / 'runs'
    with schedule.results_lock(folder) as pass_fds:
      orphan = subprocess.Popen(['sleep', '0.5'], pass_fds=pass_fds)
    self.addCleanup(orphan.wait)
    self.assertIsNone(orphan.poll())
    with schedule.results_lock(folder):
      self.assertEqual(orphan.wait(timeout=1), 0)


if __name__ == '__main__':
  absltest.main()
