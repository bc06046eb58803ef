"""Runs cells until all have ended, wherever a runner starts them.

A runner (launchers/runners.py names them) starts commands somewhere and says
how each ended; what is kept, resumed, retried, interrupted and reported is
decided here, alike for all of them.
"""

import contextlib
import dataclasses
import importlib.util
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Protocol

from absl import logging

from launchers import cells as cells_lib
from launchers import fields, grid
from launchers import progress as progress_lib
from launchers import results as results_lib

_WRONG_FLAGS = 'exit code 2'  # Of absl and ours: another try ends alike.


class Job(Protocol):
  """A cell's command that was started somewhere."""

  cell: grid.Cell

  def poll(self) -> str | None:
    """None while it runs, '' after it ended well, else how it ended."""

  def stop(self) -> None:
    """Asks it to save its state and to end; returns at once."""

  def kill(self) -> None:
    """Ends it now; returns when it has ended."""


class Runner(Protocol):
  """Starts cells.

  Attributes:
    capacity: how many it takes at a time; None takes all and queues them.
    detaches: whether its jobs go on without a launcher; Ctrl-C then leaves
      them, and `find` finds them again.
    poll_seconds: how long to wait between two looks at the jobs.
  """

  capacity: int | None
  detaches: bool
  poll_seconds: float

  def start(self, cells: Sequence[grid.Cell]) -> Sequence[Job]:
    """Starts cells whose folders are ready.

    Raises:
      TableError: nothing could be started.
    """

  def find(self, cell: grid.Cell) -> Job | None:
    """Returns the job of a cell that an earlier launcher left at work."""

  def describe(self, cells: Sequence[grid.Cell]) -> list[str]:
    """Lists the commands that would start the cells, for --dry_run."""


class Interrupted(Exception):
  """A signal stopped the runs; `signum` says which."""

  def __init__(
    self, signum: int, finished: int, total: int, *, left: int = 0
  ) -> None:
    """Says how many of the cells had finished, and how many were left."""
    going = f' {left} go on without us;' if left else ''
    super().__init__(
      f'interrupted: {finished} of {total} cells finished;{going} '
      'the same command resumes'
    )
    self.signum = signum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """How cells are run.

  Attributes:
    root: the repository root, where the commands run.
    runner: starts them.
    digest: computes the digest of the code; called again for each cell.
    retries: how many times a cell that failed is started again.
    grace_seconds: how long a run may take to save its state after Ctrl-C.
  """

  root: pathlib.Path
  runner: Runner
  digest: Callable[[], str]
  retries: int = 1
  grace_seconds: float = 30.0


@dataclasses.dataclass
class _Work:
  """The cells of one call: those at work, waiting and done."""

  schedule: Schedule
  waiting: list[grid.Cell]
  running: list[Job]
  codes: dict[grid.Cell, str]
  tries: dict[grid.Cell, int] = dataclasses.field(default_factory=dict)

  def fill(self) -> None:
    """Starts waiting cells as far as the runner takes them."""
    runner = self.schedule.runner
    free = len(self.waiting)
    if runner.capacity is not None:
      free = min(free, runner.capacity - len(self.running))
    if free <= 0:
      return
    batch = self.waiting[:free]
    code = self.schedule.digest()
    for cell in batch:
      cells_lib.prepare(cell, self.schedule.root, code)
      self.codes[cell] = code
      self.tries[cell] = self.tries.get(cell, 0) + 1
    self.running += runner.start(batch)
    del self.waiting[:free]

  def reap(self) -> list[tuple[results_lib.Result, str]]:
    """Takes ended jobs away; returns the results and what to say of them.

    A cell that failed and may be tried again goes back to the waiting ones.
    """
    ended = []
    for job in list(self.running):
      failure = job.poll()
      if failure is None:
        continue
      self.running.remove(job)
      result = cells_lib.ended_result(
        job.cell, self.schedule.root, self.codes[job.cell], failure
      )
      tries = self.tries.get(job.cell, 1)
      again = tries <= self.schedule.retries and failure != _WRONG_FLAGS
      if result.final is None and again:
        logging.warning('%s: %s; once more', job.cell.label, result.reason)
        self.waiting.append(job.cell)
        continue
      tried = f' at try {tries}' if tries > 1 else ''
      how = f'failed: {result.reason}' if result.reason else 'finished'
      ended.append((result, f'{job.cell.label}: {how}{tried}'))
    return ended


def run_cells(
  cells: Sequence[grid.Cell], schedule: Schedule, *, label: str = 'cells'
) -> list[results_lib.Result]:
  """Runs what has to run and returns every cell's result.

  A cell that fails does not stop the others.

  Args:
    cells: the cells; their folders differ.
    schedule: where and how they run.
    label: what the progress display calls them.

  Returns:
    One result for each cell, in their order.

  Raises:
    Interrupted: on SIGINT, SIGTERM or SIGHUP, once every run has ended or, of
      a runner whose jobs go on without us, at once.
    TableError: the runner could start nothing.
  """
  code = schedule.digest()
  kept = [cells_lib.kept_result(cell, schedule.root, code) for cell in cells]
  done = {result.cell: result for result in kept if result is not None}
  waiting = [cell for cell in cells if cell not in done]
  running = _left_at_work(waiting, schedule, code)
  at_work = {job.cell for job in running}
  work = _Work(
    schedule,
    waiting=[cell for cell in waiting if cell not in at_work],
    running=running,
    codes=dict.fromkeys(at_work, code),
  )
  if running:
    logging.info('%s: %d at work since before', label, len(running))
  with (
    caught_signals() as caught,
    progress_lib.progress(len(cells), label, kept=len(done)) as report,
  ):
    try:
      while (work.waiting or work.running) and not caught:
        work.fill()
        ended = work.reap()
        for result, message in ended:
          done[result.cell] = result
          report(message)
        if not ended and not caught:
          time.sleep(schedule.runner.poll_seconds)
    finally:
      if not schedule.runner.detaches:
        _stop(work.running, caught, schedule.grace_seconds)
  if caught:
    left = len(work.running) if schedule.runner.detaches else 0
    raise Interrupted(caught[0], len(done), len(cells), left=left)
  return [done[cell] for cell in cells]


def _left_at_work(
  cells: Sequence[grid.Cell], schedule: Schedule, code: str
) -> list[Job]:
  """Finds what an earlier launcher left; what has changed since is ended."""
  jobs = []
  for cell in cells:
    job = schedule.runner.find(cell)
    if job is None:
      continue
    if cells_lib.same_run(cell, schedule.root / cell.workdir, code):
      jobs.append(job)
    else:
      logging.warning('%s: its code or command changed: ended', cell.label)
      job.kill()
  return jobs


@contextlib.contextmanager
def results_lock(folder: pathlib.Path) -> Iterator[tuple[int, ...]]:
  """Holds a results folder, so that two launchers never share one.

  The runs of this machine inherit the lock. Those that outlive a killed
  launcher are waited for: they finish their cells.

  Args:
    folder: the folder of one preset's results; made where it is missing.

  Yields:
    The file descriptors to hand to the runs.

  Raises:
    TableError: another launcher holds the folder.
    KeyboardInterrupt: a signal came while it waited.
  """
  if importlib.util.find_spec('fcntl') is None:  # Not a POSIX system.
    yield ()
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
    launcher = (folder / '.lock').open('w')
    runs = (folder / '.runs').open('w')
  except OSError as error:
    raise fields.TableError(f'--results_dir: {error}') from error
  with launcher, runs:
    if not _locked(launcher):
      raise fields.TableError(f'{folder}: another launcher is at work there')
    if not _locked(runs):
      logging.warning('waiting for runs that a killed launcher left')
      with caught_signals() as caught:
        while not _locked(runs) and not caught:
          time.sleep(0.2)
      if caught:
        raise KeyboardInterrupt
    yield (runs.fileno(),)


def _locked(file: IO[str]) -> bool:
  """Takes a lock on an open file, if nobody else has it."""
  import fcntl

  with contextlib.suppress(OSError):
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
  return False


def _stop(
  running: Sequence[Job], caught: Sequence[int], grace_seconds: float
) -> None:
  """Ends the runs: stop, then kill after the grace or a second Ctrl-C."""
  for job in running:
    job.stop()
  deadline = time.monotonic() + grace_seconds
  while (
    any(job.poll() is None for job in running)
    and time.monotonic() < deadline
    and len(caught) < 2
  ):
    time.sleep(0.05)
  for job in running:
    if job.poll() is None:
      logging.warning('%s did not stop in time: killed', job.cell.label)
      job.kill()


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
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
