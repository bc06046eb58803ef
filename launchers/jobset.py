r"""Prints a table's missing cells as Kubernetes JobSets.

Usage:
  python -m launchers.jobset --paper=NAME --preset=paper --image=IMAGE \
    --claim=CLAIM --mount=/shared | kubectl apply -f -
  python -m launchers.table --paper=NAME --preset=paper --only_collect

Each cell is a JobSet (https://jobset.sigs.k8s.io) of --hosts pods that join by
`jax.distributed`. The repository lies on a volume that this machine and the
pods see under one path. Where rows are tuned, the first call prints the tuning
runs and, once they are there, the next one prints the table's cells.
"""

import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from launchers import fields, grid, options, reproduce

_PORT = 9876

_IMAGE = flags.DEFINE_string(
  'image', None, "Container image with Python and the project's packages."
)
_HOSTS = flags.DEFINE_integer(
  'hosts', 1, 'Pods of each cell, one process each.', lower_bound=1
)
_CLAIM = flags.DEFINE_string(
  'claim', '', 'Persistent volume claim that holds the repository.'
)
_MOUNT = flags.DEFINE_string(
  'mount', '', 'Where --claim is mounted, here as in the pods.'
)
_RESOURCES = flags.DEFINE_list(
  'resources',
  ['cpu=2', 'memory=8Gi'],
  'What each pod asks for, such as nvidia.com/gpu=1 or google.com/tpu=4.',
)
_NODES = flags.DEFINE_list(
  'node_selector', [], 'Labels of the nodes to use, such as pool=gpu.'
)
_RESTARTS = flags.DEFINE_integer(
  'restarts', 3, 'How many times a cell is restarted, where it resumes.'
)
flags.mark_flag_as_required('image')


def main(argv: Sequence[str]) -> int:
  """Prints the JobSets as one JSON list, which kubectl reads as YAML."""
  del argv
  try:
    items = []
    for paper in options.papers():
      chosen = options.from_flags(paper)
      root = str(chosen.experiments_dir.resolve().parent)
      items += [job_set(c, root) for c in reproduce.missing_cells(chosen)]
  except fields.TableError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(
    json.dumps({'apiVersion': 'v1', 'kind': 'List', 'items': items}, indent=1)
  )
  print(f'{len(items)} cells', file=sys.stderr)
  return 0


def job_set(cell: grid.Cell, root: str) -> dict[str, Any]:
  """Describes one cell.

  Args:
    cell: the cell.
    root: the repository root in the pods.

  Returns:
    A JobSet of --hosts pods; its name is the same for the same command.

  Raises:
    TableError: a flag is no NAME=VALUE.
  """
  name = f'cell-{hashlib.sha256(cell.command().encode()).hexdigest()[:12]}'
  command = f'cd {shlex.quote(root)} && exec {cell.command()}'
  if _HOSTS.value > 1:
    # JobSet's host names: set, job, index of the job, index of the pod.
    command += (
      f' --coordinator_address={name}-host-0-0.{name}:{_PORT}'
      f' --num_processes={_HOSTS.value} --process_id=$JOB_COMPLETION_INDEX'
    )
  resources = _pairs('resources', _RESOURCES.value)
  container = {
    'name': 'cell',
    'image': _IMAGE.value,
    'command': ['bash', '-c', command],
    'resources': {'requests': resources, 'limits': resources},
  }
  pod: dict[str, Any] = {'restartPolicy': 'Never', 'containers': [container]}
  if _NODES.value:
    pod['nodeSelector'] = _pairs('node_selector', _NODES.value)
  if _CLAIM.value:
    volume = {'claimName': _CLAIM.value}
    pod['volumes'] = [{'name': 'shared', 'persistentVolumeClaim': volume}]
    container['volumeMounts'] = [{'name': 'shared', 'mountPath': _MOUNT.value}]
  job = {
    'parallelism': _HOSTS.value,
    'completions': _HOSTS.value,
    'backoffLimit': 0,
    'template': {'spec': pod},
  }
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': {'name': name, 'annotations': {'cell': cell.label}},
    'spec': {
      'failurePolicy': {'maxRestarts': _RESTARTS.value},
      'replicatedJobs': [
        {'name': 'host', 'replicas': 1, 'template': {'spec': job}}
      ],
    },
  }


def _pairs(flag: str, values: Sequence[str]) -> dict[str, str]:
  pairs = dict(value.partition('=')[::2] for value in values)
  if not all(pairs) or not all(pairs.values()):
    raise fields.TableError(
      f'--{flag}: expected NAME=VALUE, got {",".join(values)!r}'
    )
  return pairs


if __name__ == '__main__':
  app.run(main, flags_parser=options.parse_flags)
