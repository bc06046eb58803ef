"""Where cells run, as --runner and its flags say."""

import pathlib
from collections.abc import Callable

from absl import flags

from launchers import fields, local, schedule, slurm, tpu_vm

_NAMES = ('local', 'slurm', 'tpu_vm')
# Makes the runner of a root, a folder of its own and descriptors to inherit.
MakeRunner = Callable[
  [pathlib.Path, pathlib.Path, tuple[int, ...]], schedule.Runner
]

_RUNNER = flags.DEFINE_enum(
  'runner',
  'local',
  _NAMES,
  'Where cells run: processes of this machine, array jobs of Slurm, or all '
  'workers of a TPU VM.',
)
_JOBS = flags.DEFINE_integer(
  'jobs',
  None,
  'How many cells run at a time; by default one for each of --gpus, 2 on '
  'other machines, 64 under Slurm.',
  lower_bound=1,
)
_CORES = flags.DEFINE_integer(
  'cores', 1, 'Cores of each cell; 0: whatever the system gives.', lower_bound=0
)
_GPUS = flags.DEFINE_list(
  'gpus',
  [],
  'local: GPUs such as 0,1,2,3; each cell has one of them for itself.',
)
_SLURM_GPUS = flags.DEFINE_integer('slurm_gpus', 0, 'slurm: GPUs of each cell.')
_SLURM_HOURS = flags.DEFINE_float(
  'slurm_hours',
  24.0,
  'slurm: time limit of a job; one that meets it is requeued and resumes.',
)
_SLURM_MEMORY_GB = flags.DEFINE_float(
  'slurm_memory_gb',
  0.0,
  "slurm: memory of each cell; 0: the cluster's default.",
)
_SLURM_OPTIONS = flags.DEFINE_list(
  'slurm_options',
  [],
  'slurm: further options of sbatch, such as partition=gpu,account=me.',
)
_TPU_NAME = flags.DEFINE_string('tpu_name', '', 'tpu_vm: name of the TPU VM.')
_TPU_ZONE = flags.DEFINE_string('tpu_zone', '', 'tpu_vm: zone of the TPU VM.')
_TPU_PROJECT = flags.DEFINE_string(
  'tpu_project', '', "tpu_vm: project; gcloud's default if empty."
)


def from_flags(
  root: pathlib.Path, folder: pathlib.Path, pass_fds: tuple[int, ...]
) -> schedule.Runner:
  """Makes the runner that the flags ask for.

  Args:
    root: the repository root, where the commands run.
    folder: where the runner may keep files of its own.
    pass_fds: file descriptors that processes of this machine inherit.

  Raises:
    TableError: the flags do not go together, or a tool is missing.
  """
  if _RUNNER.value == 'slurm':
    return slurm.SlurmRunner(
      root=root,
      folder=folder,
      jobs=_JOBS.value or 64,
      cores=_CORES.value,
      gpus=_SLURM_GPUS.value,
      hours=_SLURM_HOURS.value,
      memory_gb=_SLURM_MEMORY_GB.value,
      options=_slurm_options(),
    )
  if _RUNNER.value == 'tpu_vm':
    if _JOBS.value not in (None, 1):
      raise fields.TableError(
        f'--jobs: a TPU VM runs one cell at a time, got jobs={_JOBS.value}'
      )
    command = tpu_vm.gcloud_command(
      name=_TPU_NAME.value,
      zone=_TPU_ZONE.value,
      project=_TPU_PROJECT.value,
      root=root,
    )
    return local.LocalRunner(
      root=root, jobs=1, cores=0, pass_fds=pass_fds, wrap=command
    )
  return local.LocalRunner(
    root=root,
    jobs=_JOBS.value or len(_GPUS.value) or 2,
    cores=_CORES.value,
    gpus=_GPUS.value,
    pass_fds=pass_fds,
  )


def _slurm_options() -> dict[str, str]:
  options = {}
  for option in _SLURM_OPTIONS.value:
    name, sign, value = option.partition('=')
    if not name or not sign:
      raise fields.TableError(
        f'--slurm_options: expected NAME=VALUE, got {option!r}'
      )
    options[name] = value
  return options
