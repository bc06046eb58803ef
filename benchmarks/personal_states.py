"""Memory and time of a bank of personal models, one of each client.

  python -m benchmarks.personal_states --clients=100000 --parameters=60000

Every client takes part once, in rounds of --cohort clients and waves of --wave:
the engine reads its row, adds its number to it and writes it back. The rows lie
in a file under --folder (here 24 GB). Afterwards rows of clients drawn at
random are checked. Reports the largest anonymous memory of the process.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from benchmarks.memory import watch


def main() -> None:
  """Prints one line of JSON."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.personal_states')
  parser.add_argument('--clients', type=int, default=100_000)
  parser.add_argument('--parameters', type=int, default=60_000)
  parser.add_argument('--cohort', type=int, default=1_000)
  parser.add_argument('--wave', type=int, default=200)
  parser.add_argument('--folder', default='', help='for the temporary file')
  parser.add_argument('--worker', default='', help=argparse.SUPPRESS)
  given = parser.parse_args()
  if given.worker:
    work(pathlib.Path(given.worker), given)
    return
  with tempfile.TemporaryDirectory(dir=given.folder or None) as folder:
    result = watch(
      [
        *(sys.executable, '-m', 'benchmarks.personal_states'),
        *(f'--worker={folder}', *sys.argv[1:]),
      ],
      stdout=subprocess.DEVNULL,
    )
    files = [p.stat() for p in pathlib.Path(folder).glob('states/*')]
    result['file_gib'] = round(sum(f.st_size for f in files) / 2**30, 2)
    result['disk_gib'] = round(sum(f.st_blocks for f in files) / 2**21, 2)
  print(json.dumps(vars(given) | result))


def work(folder: pathlib.Path, given: argparse.Namespace) -> None:
  """The rounds."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from benchmarks.contestants import use_one_device_per_core
  from fedjax_ext import core
  from fedjax_ext.data import from_segments

  use_one_device_per_core()
  layout = core.make_layout(wave_clients=given.wave)
  program = core.ClientProgram(
    init=lambda shared, client, key: client.state + client.number,
    step=lambda shared, state, batch: state,
    final=lambda shared, client, state: core.ClientOutput(
      state.sum(), jnp.float32(1), state
    ),
  )
  run = core.for_each_client(program, core.total(), layout=layout)
  every = np.arange(given.clients)
  data = from_segments(
    {'x': np.zeros(1, np.float32)}, every * 0, every * 0 + 1, client_ids=every
  )
  features = core.place_features(data.features, layout)
  states = core.make_client_states(
    lambda key, number: jnp.full(given.parameters, 0.5),
    num_clients=given.clients,
    key=jax.random.key(0),
    directory=folder / 'states',
  )
  order = np.random.default_rng(0).permutation(given.clients)
  for round, first in enumerate(range(0, given.clients, given.cohort), 1):
    cohort = core.make_cohort(
      order[first : first + given.cohort],
      round=round,
      seed=0,
      specs={'train': core.PlanSpec()},
      data={'train': data},
      features=features,
      layout=layout,
    )
    _, states = run((), cohort, 'train', states=states)
  some = order[:: max(given.clients // 50, 1)]
  rows = states.gather(some)
  expected = np.broadcast_to(some[:, None] + 0.5, rows.shape)
  np.testing.assert_array_equal(rows, expected.astype(np.float32))
  os.sync()


if __name__ == '__main__':
  main()
