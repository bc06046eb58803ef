"""Runs cells on a TPU VM, one at a time on all of its hosts.

A cell's command starts on every worker through `gcloud`; the workers join by
`--coordinator_address=auto`. The repository and the results lie on a disk that
the workers and this machine see under one path, such as Filestore.
"""

import pathlib
import shlex
from collections.abc import Callable

from launchers import fields, grid


def gcloud_command(
  *, name: str, zone: str, root: pathlib.Path, project: str = ''
) -> Callable[[grid.Cell], list[str]]:
  """Returns what makes the command that starts a cell on all workers.

  Args:
    name: of the TPU VM.
    zone: where it is.
    root: the repository root, the same on the workers.
    project: of Google Cloud; gcloud's own default if empty.

  Raises:
    TableError: the name or the zone is missing.
  """
  if not name or not zone:
    raise fields.TableError(
      '--runner=tpu_vm: expected --tpu_name and --tpu_zone, got '
      f'tpu_name={name!r}, tpu_zone={zone!r}'
    )

  def command(cell: grid.Cell) -> list[str]:
    run = ['python3', *cell.args, '--coordinator_address=auto']
    remote = f'cd {shlex.quote(str(root))} && exec {shlex.join(run)}'
    return [
      *('gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', name),
      f'--zone={zone}',
      *([f'--project={project}'] if project else []),
      '--worker=all',
      f'--command={remote}',
      # A terminal there: the runs end when the connection does.
      *('--', '-tt'),
    ]

  return command
