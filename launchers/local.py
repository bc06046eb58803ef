"""Runs cells as processes on this machine, a few at a time.

A cell whose final.json stands beside a cell.json with the same command and
code is kept. One that was interrupted is started again in its folder, where
the binary resumes; one whose command or code changed starts from nothing.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from absl import logging

from launchers import fields, grid
from launchers import progress as progress_lib
from launchers import results as results_lib

_POLL_SECONDS = 0.05


class Interrupted(Exception):
  """A signal stopped the runs; `signum` says which."""

  def __init__(self, signum: int, finished: int, total: int) -> None:
    """Says how many of the cells had finished."""
    super().__init__(
      f'interrupted: {finished} of {total} cells finished; '
      'the same command resumes'
    )
    self.signum = signum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
  """Where and how cells run.

  Attributes:
    root: the repository root, where the commands run.
    jobs: how many run at a time, each on one core.
    digest: computes the digest of the code; called again for each cell.
    interpreter: the Python that runs them.
    grace_seconds: how long a run may take to save its state after Ctrl-C.
    pass_fds: file descriptors that the runs inherit.
  """

  root: pathlib.Path
  jobs: int
  digest: Callable[[], str]
  interpreter: str = sys.executable
  grace_seconds: float = 30.0
  pass_fds: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Job:
  """A cell that is running."""

  cell: grid.Cell
  process: subprocess.Popen
  slot: int
  code: str


@contextlib.contextmanager
def results_lock(folder: pathlib.Path) -> Iterator[tuple[int, ...]]:
  """Holds a results folder, so that two launchers never share one.

  The runs inherit the lock: a run that outlives a killed launcher keeps others
  out until it ends.

  Args:
    folder: the folder of one preset's results; made where it is missing.

  Yields:
    The file descriptors to hand to the runs.

  Raises:
    TableError: another launcher holds the folder.
  """
  try:
    import fcntl
  except ImportError:  # Not a POSIX system.
    yield ()
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / '.lock').open('w')
  except OSError as error:
    raise fields.TableError(f'--results_dir: {error}') from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise fields.TableError(
        f'{folder}: another launcher, or a run that it left, is at work there'
      ) from error
    yield (lock.fileno(),)


def kept_result(
  cell: grid.Cell, root: pathlib.Path, code: str
) -> results_lib.Result | None:
  """Returns a cell's finished result, if it is that of this command and code.

  Args:
    cell: the cell.
    root: the repository root, where its command runs.
    code: the present digest of the code.

  Returns:
    The result, or None where the cell has to run.
  """
  workdir = root / cell.workdir
  if not _same_run(cell, workdir, code):
    return None
  final = results_lib.read_final(workdir)
  return final and results_lib.Result(cell, final, code)


def run_cells(
  cells: Sequence[grid.Cell], machine: Machine, *, label: str = 'cells'
) -> list[results_lib.Result]:
  """Runs what has to run and returns every cell's result.

  A cell that fails does not stop the others.

  Args:
    cells: the cells; their folders differ.
    machine: where and how they run.
    label: what the progress display calls them.

  Returns:
    One result for each cell, in their order.

  Raises:
    Interrupted: on SIGINT, SIGTERM or SIGHUP, once every run has ended.
  """
  code = machine.digest()
  kept = [kept_result(cell, machine.root, code) for cell in cells]
  done = {result.cell: result for result in kept if result is not None}
  waiting = [cell for cell in cells if cell not in done]
  running: list[_Job] = []
  with (
    _caught_signals() as caught,
    progress_lib.progress(len(cells), label, kept=len(done)) as report,
  ):
    try:
      while (waiting or running) and not caught:
        ended = _fill(running, waiting, machine) + _reap(running, machine.root)
        for result in ended:
          done[result.cell] = result
          how = f'failed: {result.reason}' if result.reason else 'finished'
          report(f'{result.cell.label}: {how}')
        if not ended:
          time.sleep(_POLL_SECONDS)
    finally:
      _stop(running, caught, machine.grace_seconds)
  if caught:
    raise Interrupted(caught[0], len(done), len(cells))
  return [done[cell] for cell in cells]


def _fill(
  running: list[_Job], waiting: list[grid.Cell], machine: Machine
) -> list[results_lib.Result]:
  """Starts waiting cells in the free slots; returns those that cannot start."""
  failed = []
  while waiting and len(running) < machine.jobs:
    cell = waiting.pop(0)
    slot = min(set(range(machine.jobs)) - {job.slot for job in running})
    try:
      running.append(_start(cell, slot, machine))
    except OSError as error:
      failed.append(results_lib.Result(cell, None, '', f'no start: {error}'))
  return failed


def _reap(running: list[_Job], root: pathlib.Path) -> list[results_lib.Result]:
  """Takes the jobs that have ended out of `running`; returns their results."""
  ended = [job for job in running if job.process.poll() is not None]
  for job in ended:
    running.remove(job)
  return [_finish(job, root) for job in ended]


def _same_run(cell: grid.Cell, workdir: pathlib.Path, code: str) -> bool:
  return results_lib.read_json(workdir / 'cell.json') == _record(cell, code)


def _record(cell: grid.Cell, code: str) -> dict[str, str]:
  """What cell.json holds; the interpreter's path is no part of a cell."""
  return {'command': cell.command(), 'code': code}


def _start(cell: grid.Cell, slot: int, machine: Machine) -> _Job:
  """Prepares a cell's folder and starts its process on the slot's core."""
  code = machine.digest()
  workdir = machine.root / cell.workdir
  if not _same_run(cell, workdir, code):
    with contextlib.suppress(FileNotFoundError):
      shutil.rmtree(workdir)
    results_lib.write_json(workdir / 'cell.json', _record(cell, code))
  # Left here it is no report, or one of a process that failed later on.
  (workdir / 'final.json').unlink(missing_ok=True)
  with (workdir / 'log.txt').open('ab') as log:
    process = subprocess.Popen(
      [machine.interpreter, *cell.args],
      cwd=machine.root,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      preexec_fn=_pin_to(slot),
      # Ctrl-C at the terminal must reach the runs through us, as SIGTERM.
      start_new_session=True,
      pass_fds=machine.pass_fds,
    )
  return _Job(cell, process, slot, code)


def _pin_to(slot: int) -> Callable[[], None] | None:
  """Returns what a child calls to stay on one core, where that can be done."""
  if not hasattr(os, 'sched_setaffinity'):
    return None
  cores = sorted(os.sched_getaffinity(0))
  core = cores[slot % len(cores)]

  def pin() -> None:
    with contextlib.suppress(OSError):
      os.sched_setaffinity(0, {core})

  return pin


def _finish(job: _Job, root: pathlib.Path) -> results_lib.Result:
  """Turns an ended process into a result."""
  workdir = root / job.cell.workdir
  exit_code = job.process.returncode
  if exit_code == 0:
    final = results_lib.read_final(workdir)
    if final is not None:
      return results_lib.Result(job.cell, final, job.code)
    reason = 'exit code 0, but no valid final.json'
  else:
    # A report that a failing process left must not be kept by the next call.
    (workdir / 'final.json').unlink(missing_ok=True)
    ended = (
      f'signal {-exit_code}' if exit_code < 0 else f'exit code {exit_code}'
    )
    last = results_lib.last_log_line(workdir / 'log.txt')
    reason = f'{ended}: {last}' if last else f'{ended}, empty log'
  return results_lib.Result(job.cell, None, job.code, reason)


def _stop(
  running: Sequence[_Job], caught: Sequence[int], grace_seconds: float
) -> None:
  """Ends the runs: SIGTERM, then SIGKILL after the grace or a second Ctrl-C."""
  for job in running:
    job.process.terminate()
  deadline = time.monotonic() + grace_seconds
  while (
    any(job.process.poll() is None for job in running)
    and time.monotonic() < deadline
    and len(caught) < 2
  ):
    time.sleep(_POLL_SECONDS)
  for job in running:
    if job.process.poll() is None:
      logging.warning('%s did not stop in time: killed', job.cell.label)
      with contextlib.suppress(ProcessLookupError):
        os.killpg(job.process.pid, signal.SIGKILL)
      job.process.wait()


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
  """Collects the signals that ask us to stop instead of dying of them."""
  caught: list[int] = []
  before = {}
  for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
    signum = getattr(signal, name, None)
    if signum is None:
      continue
    if name == 'SIGHUP' and signal.getsignal(signum) == signal.SIG_IGN:
      continue  # Started under nohup.
    before[signum] = signal.signal(signum, lambda n, _: caught.append(n))
  try:
    yield caught
  finally:
    for signum, handler in before.items():
      signal.signal(signum, handler)
