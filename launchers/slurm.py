"""Runs cells as array jobs of Slurm, submitted with submitit.

Jobs go on without a launcher: Ctrl-C leaves them, the same command finds them
again. A preempted job is requeued and resumes in its folder; one that meets
its time limit saves its state and is requeued too. The repository and the
results lie on a disk that all nodes see under one path.
"""

import dataclasses
import functools
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from launchers import fields, grid
from launchers import results as results_lib

_SAVE_SECONDS = 60.0  # What a run may take to save its state.
_LOOK_SECONDS = 5.0  # Between two calls of squeue.
_VANISHED_SECONDS = 30.0  # Until a job that squeue lacks is given up.


class CellTask:
  """What a node runs: one cell's command, with its output in log.txt."""

  def __init__(self, args: Sequence[str], root: str, workdir: str) -> None:
    """Takes the arguments after the interpreter, and where to run."""
    self._made_of = (tuple(args), root, workdir)
    self._process: subprocess.Popen | None = None

  def __getstate__(self) -> dict[str, Any]:
    """Pickles all but the process."""
    return {'_made_of': self._made_of, '_process': None}

  def __call__(self) -> int:
    """Runs the command and returns its exit code."""
    args, root, workdir = self._made_of
    asked = []
    # Slurm asks all processes of a job at once, and kills or requeues the job
    # later. To return before would look as if the cell had failed.
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    with (pathlib.Path(root, workdir) / 'log.txt').open('ab') as log:
      self._process = subprocess.Popen(
        [sys.executable, *args],
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        # It is meant for us (`checkpoint`) and would end the run.
        preexec_fn=functools.partial(
          signal.signal, signal.SIGUSR2, signal.SIG_IGN
        ),
      )
    while (code := self._process.poll()) is None or (code and asked):
      time.sleep(0.2)
    return code

  def checkpoint(self) -> Any:
    """Lets the run save its state before the time limit; called by submitit."""
    import submitit

    if self._process is not None:
      self._process.terminate()
      deadline = time.monotonic() + _SAVE_SECONDS
      while self._process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    return submitit.helpers.DelayedSubmission(CellTask(*self._made_of))


@dataclasses.dataclass
class _SlurmJob:
  """One task of an array."""

  cell: grid.Cell
  number: str
  runner: 'SlurmRunner'
  missing_since: float | None = None

  def poll(self) -> str | None:
    """None while Slurm has it, '' after it ended well, else how it ended."""
    job = self.runner.submitted(self.number)
    if job.paths.result_pickle.exists():
      error = job.exception()
      if error is not None:
        return f'Slurm job {self.number}: {str(error).splitlines()[-1]}'
      code = job.result()
      return f'exit code {code}' if code else ''
    if self.runner.has(self.number):
      self.missing_since = None
      return None
    now = time.monotonic()
    self.missing_since = self.missing_since or now
    # Its report may be on its way through a network disk.
    if now - self.missing_since < self.runner.vanished_seconds:
      return None
    return f'Slurm job {self.number} ended without a report'

  def stop(self) -> None:
    """Cancels the job; Slurm lets it save its state."""
    subprocess.run(['scancel', self.number], check=False)

  def kill(self) -> None:
    """Cancels the job and waits until Slurm has it no more."""
    self.stop()
    while self.runner.has(self.number):
      time.sleep(_LOOK_SECONDS / 5)


class SlurmRunner:
  """Array jobs of a Slurm cluster."""

  capacity = None  # All waiting cells are one array; Slurm queues them.
  detaches = True

  def __init__(
    self,
    *,
    root: pathlib.Path,
    folder: pathlib.Path,
    jobs: int,
    cores: int = 1,
    gpus: int = 0,
    hours: float = 24.0,
    memory_gb: float = 0.0,
    options: Mapping[str, str] | None = None,
    look_seconds: float = _LOOK_SECONDS,
    vanished_seconds: float = _VANISHED_SECONDS,
  ) -> None:
    """Describes the jobs.

    Args:
      root: the repository root, where the commands run.
      folder: where submitit keeps its files, seen by all nodes.
      jobs: how many run at a time.
      cores: cores of each job.
      gpus: GPUs of each job.
      hours: time limit of a job, after which it is requeued and resumes.
      memory_gb: memory of a job in GB; 0 takes the cluster's default.
      options: further options of sbatch by name, such as partition.
      look_seconds: between two calls of squeue.
      vanished_seconds: until a job that squeue lacks is given up.

    Raises:
      TableError: submitit or Slurm is not there.
    """
    try:
      import submitit
    except ImportError as error:
      raise fields.TableError(
        "--runner=slurm needs submitit: pip install 'fedjax_ext[slurm]'"
      ) from error
    self._folder = folder
    self.poll_seconds = min(1.0, look_seconds)
    self.vanished_seconds = vanished_seconds
    self._look_seconds = look_seconds
    self._root = root
    self._listed: set[str] = set()
    self._looked = -1e9
    self._submitit = submitit
    self._parameters: dict[str, Any] = {
      'time': max(1, round(60 * hours)),
      'cpus_per_task': max(1, cores),
      'array_parallelism': jobs,
      'job_name': 'fedjax_ext',
      'setup': [f'cd {shlex.quote(str(root))}'],
    }
    if gpus:
      self._parameters['gpus_per_node'] = gpus
    if memory_gb:
      self._parameters['mem'] = f'{round(1024 * memory_gb)}M'
    if options:
      self._parameters['additional_parameters'] = dict(options)

  def start(self, cells: Sequence[grid.Cell]) -> list[_SlurmJob]:
    """Submits the cells as one array."""
    tasks = [
      CellTask(cell.args, str(self._root), cell.workdir) for cell in cells
    ]
    try:
      executor = self._submitit.SlurmExecutor(self._folder, max_num_timeout=99)
      executor.update_parameters(**self._parameters)
      with executor.batch():
        submitted = [executor.submit(task) for task in tasks]
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
      last = str(error).strip().splitlines()[-1]
      raise fields.TableError(f'--runner=slurm: {last}') from error
    self._looked = -1e9
    jobs = []
    for cell, job in zip(cells, submitted, strict=True):
      record = {'job': job.job_id}
      results_lib.write_json(self._root / cell.workdir / 'slurm.json', record)
      jobs.append(_SlurmJob(cell, job.job_id, self))
    return jobs

  def find(self, cell: grid.Cell) -> _SlurmJob | None:
    """Finds the job of a cell that Slurm still has."""
    record = results_lib.read_json(self._root / cell.workdir / 'slurm.json')
    number = record.get('job') if isinstance(record, dict) else None
    if not number or not self.has(number):
      return None
    if self.submitted(number).paths.result_pickle.exists():
      return None  # It has ended; Slurm is about to forget it.
    return _SlurmJob(cell, number, self)

  def describe(self, cells: Sequence[grid.Cell]) -> list[str]:
    """The options of sbatch, then a command for each task of the array."""
    further = self._parameters.get('additional_parameters', {})
    jobs = self._parameters['array_parallelism']
    shown = {
      k: v
      for k, v in {**self._parameters, **further}.items()
      if k not in ('setup', 'additional_parameters', 'array_parallelism')
    }
    options = ' '.join(f'--{k.replace("_", "-")}={v}' for k, v in shown.items())
    array = f'--array=0-{len(cells) - 1}%{min(jobs, len(cells))}'
    commands = [cell.command(sys.executable) for cell in cells]
    return [f'# sbatch {array} {options}, each task one of:', *commands]

  def submitted(self, number: str) -> Any:
    """Returns submitit's own job of a number."""
    return self._submitit.SlurmJob(self._folder, number)

  def has(self, number: str) -> bool:
    """Whether Slurm has a job, waiting or at work; looked up now and then."""
    if time.monotonic() - self._looked > self._look_seconds:
      self._look()
    return number in self._listed

  def _look(self) -> None:
    """Asks Slurm which jobs of ours it has; silence changes nothing."""
    command = ['squeue', '--me', '--noheader', '--array', '--format=%i %T']
    try:
      listed = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60
      ).stdout
    except FileNotFoundError as error:
      raise fields.TableError('--runner=slurm: squeue is not there') from error
    except subprocess.SubprocessError:
      return
    self._looked = time.monotonic()
    ended = ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL')
    lines = [line.split() for line in listed.splitlines()]
    self._listed = {
      line[0] for line in lines if len(line) > 1 and line[1] not in ended
    }
