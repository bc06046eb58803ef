"""Runs cells as processes of this machine, each on its cores or its GPU."""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from launchers import fields, grid


@dataclasses.dataclass
class _Process:
  """A cell that runs, or that could not be started."""

  cell: grid.Cell
  slot: int
  process: subprocess.Popen | None
  reason: str = ''

  def poll(self) -> str | None:
    """None while it runs, '' after it ended well, else how it ended."""
    if self.process is None:
      return self.reason
    code = self.process.poll()
    if code is None:
      return None
    if code == 0:
      return ''
    return f'signal {-code}' if code < 0 else f'exit code {code}'

  def stop(self) -> None:
    """Sends SIGTERM, upon which a run saves its state."""
    if self.process is not None:
      self.process.terminate()

  def kill(self) -> None:
    """Sends SIGKILL to the process and its children."""
    if self.process is not None:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self.process.pid, signal.SIGKILL)
      self.process.wait()


class LocalRunner:
  """Processes of this machine."""

  detaches = False
  poll_seconds = 0.05

  def __init__(
    self,
    *,
    root: pathlib.Path,
    jobs: int,
    cores: int = 1,
    gpus: Sequence[str] = (),
    interpreter: str = sys.executable,
    pass_fds: tuple[int, ...] = (),
    wrap: Callable[[grid.Cell], list[str]] | None = None,
  ) -> None:
    """Sets up the places where cells run.

    Args:
      root: the repository root, where the commands run.
      jobs: how many run at a time.
      cores: how many cores each of them has; 0 leaves that to the system.
      gpus: the GPUs as CUDA_VISIBLE_DEVICES names them; job i sees gpus[i].
      interpreter: the Python that runs them.
      pass_fds: file descriptors that the runs inherit.
      wrap: makes another command of a cell, such as one that starts it on
        another machine.

    Raises:
      TableError: fewer GPUs than jobs.
    """
    if gpus and jobs > len(gpus):
      raise fields.TableError(
        f'--jobs: expected at most one job for each of {len(gpus)} GPUs, '
        f'got jobs={jobs}'
      )
    self.capacity = jobs
    self._root = root
    self._cores = cores
    self._gpus = tuple(gpus)
    self._pass_fds = pass_fds
    self._argv = wrap or (lambda cell: [interpreter, *cell.args])
    self._at_work: list[_Process] = []

  def start(self, cells: Sequence[grid.Cell]) -> list[_Process]:
    """Starts cells; one that cannot start is a job that ended badly."""
    return [self._start(cell) for cell in cells]

  def find(self, cell: grid.Cell) -> None:
    """None: what a killed launcher left has been waited for."""

  def describe(self, cells: Sequence[grid.Cell]) -> list[str]:
    """The commands, shell-quoted."""
    return [shlex.join(self._argv(cell)) for cell in cells]

  def _start(self, cell: grid.Cell) -> _Process:
    self._at_work = [job for job in self._at_work if job.poll() is None]
    taken = {job.slot for job in self._at_work}
    slot = min(set(range(self.capacity)) - taken)
    workdir = self._root / cell.workdir
    try:
      with (workdir / 'log.txt').open('ab') as log:
        process = subprocess.Popen(
          self._argv(cell),
          cwd=self._root,
          env=self._environment(slot),
          stdin=subprocess.DEVNULL,
          stdout=log,
          stderr=subprocess.STDOUT,
          preexec_fn=self._pin_to(slot),
          # Ctrl-C at the terminal reaches the runs through us, as SIGTERM.
          start_new_session=True,
          pass_fds=self._pass_fds,
        )
    except OSError as error:
      return _Process(cell, slot, None, f'no start: {error}')
    job = _Process(cell, slot, process)
    self._at_work.append(job)
    return job

  def _environment(self, slot: int) -> Mapping[str, str] | None:
    """This process's environment, with the one GPU of the slot if any."""
    if not self._gpus:
      return None
    return {**os.environ, 'CUDA_VISIBLE_DEVICES': self._gpus[slot]}

  def _pin_to(self, slot: int) -> Callable[[], None] | None:
    """Returns what a child calls to stay on its cores, where that can be."""
    if not self._cores or not hasattr(os, 'sched_setaffinity'):
      return None
    cores = sorted(os.sched_getaffinity(0))
    first = slot * self._cores
    mine = {cores[(first + i) % len(cores)] for i in range(self._cores)}

    def pin() -> None:
      with contextlib.suppress(OSError):
        os.sched_setaffinity(0, mine)

    return pin
