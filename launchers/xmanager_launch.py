r"""Runs a table's missing cells with XManager, in an environment of its own.

Usage:
  python3 -m venv xm && xm/bin/pip install xmanager absl-py
  xm/bin/xmanager launch launchers/xmanager_launch.py -- --paper=NAME \
    --preset=small --python=.venv/bin/python
  python -m launchers.table --paper=NAME --preset=small --only_collect

XManager (https://github.com/google-deepmind/xmanager) and this project want
different versions of protobuf, hence two environments: --python names the
interpreter that has the project's packages. With --vertex_image the cells run
in that container image on Vertex AI instead. Where rows are tuned, the first
call runs the tuning, the next one the table's cells.
"""

import asyncio
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

try:
  from xmanager import xm, xm_local
except ImportError:  # As in the project's own environment.
  xm = xm_local = None

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from launchers import fields, options, reproduce

_PYTHON = flags.DEFINE_string(
  'python', sys.executable, "Interpreter that has the project's packages."
)
_IMAGE = flags.DEFINE_string(
  'vertex_image',
  '',
  'Container image to run on Vertex AI; empty: this machine.',
)
_PARALLEL = flags.DEFINE_integer(
  'parallel', 2, 'How many cells run at a time on this machine.', lower_bound=1
)


def main(argv: Sequence[str]) -> int:
  """Adds one job for each cell that is missing."""
  del argv
  if xm is None:
    print('error: no XManager here: pip install xmanager', file=sys.stderr)
    return 2
  try:
    chosen = [options.from_flags(paper) for paper in options.papers()]
    cells = [c for one in chosen for c in reproduce.missing_cells(one)]
  except fields.TableError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  root = chosen[0].experiments_dir.resolve().parent
  asyncio.run(_launch(cells, root))
  return 0


async def _launch(cells, root: pathlib.Path) -> None:
  """Runs the cells, on this machine --parallel of them at a time."""
  async with xm_local.create_experiment('fedjax_ext') as experiment:
    if _IMAGE.value:
      executor = xm_local.Vertex()
      packaged = xm.container(executor_spec=executor.Spec(), path=_IMAGE.value)
    else:
      executor = xm_local.Local()
      packaged = xm.binary(
        executor_spec=executor.Spec(),
        path=str(pathlib.Path(_PYTHON.value).absolute()),
      )
    [executable] = experiment.package([packaged])
    free = asyncio.Semaphore(_PARALLEL.value if not _IMAGE.value else 10**6)

    async def run(cell) -> None:
      async with free:
        print(cell.label, flush=True)
        job = xm.Job(
          executable,
          executor,
          args=xm.SequentialArgs.from_collection(list(cell.args)),
          env_vars={'PYTHONPATH': str(root)},
        )
        unit = await experiment.add(job)
        await unit.wait_until_complete()

    await asyncio.gather(*(run(cell) for cell in cells))


if __name__ == '__main__':
  app.run(main)
