"""Memory of a run on SQLite files with few and with many clients.

  python -m benchmarks.population_memory --clients=1000,100000

Writes synthetic files in FedJAX's format, trains the same number of rounds from
each with the federated-averaging binary, and prints the largest anonymous
memory (RssAnon of /proc/PID/status, file-backed pages beside it) of each run,
its seconds and the difference between the runs. Every run is evaluated on 100
clients.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

from benchmarks.memory import watch
from fedjax_ext.data import write_sqlite

_EXAMPLES, _PIXELS, _CLASSES = 20, (8, 8), 10


def main() -> None:
  """Prints one line of JSON for each file, and one that compares them."""
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.population_memory'
  )
  parser.add_argument('--clients', default='1000,100000')
  parser.add_argument('--rounds', type=int, default=50)
  parser.add_argument('--folder', default='', help='keep the files here')
  given = parser.parse_args()
  populations = [int(c) for c in given.clients.split(',')]
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(given.folder or temporary)
    folder.mkdir(exist_ok=True)
    results = [measure(folder, c, given.rounds) for c in populations]
  for result in results:
    print(json.dumps(result))
  most = max(r['peak_anon_mib'] for r in results)
  least = min(r['peak_anon_mib'] for r in results)
  print(json.dumps({'difference_mib': round(most - least, 1)}))


def measure(folder: pathlib.Path, clients: int, rounds: int) -> dict:
  """Peak memory and seconds of one run."""
  path = folder / f'clients_{clients}.sqlite'
  if not path.exists():
    write_sqlite(path, synthetic(clients))
  with tempfile.TemporaryDirectory() as workdir:
    result = watch(
      [
        sys.executable,
        '-m',
        'experiments.fed_avg.run',
        f'--workdir={workdir}/run',
        f'--data_source=sqlite:file={path.name},num_classes={_CLASSES}',
        f'--data_dir={folder}',
        '--data_partition=client',
        '--data_test_fraction=0',
        '--model=mlp:hidden=64',
        f'--num_rounds={rounds}',
        '--cohort_size=50',
        '--eval_clients=100',
        f'--eval_every={rounds}',
        f'--checkpoint_every={rounds}',
      ],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
  size = round(path.stat().st_size / 2**20, 1)
  return {'clients': clients, 'file_mib': size} | result


def synthetic(clients: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
  """Clients with 20 uint8 images [8, 8, 1] of 10 classes each."""
  rng = np.random.default_rng(0)
  prototypes = rng.integers(0, 200, (_CLASSES, *_PIXELS, 1))
  for client in range(clients):
    label = rng.integers(0, _CLASSES, _EXAMPLES).astype(np.int32)
    noise = rng.integers(0, 56, (_EXAMPLES, *_PIXELS, 1))
    image = (prototypes[label] + noise).astype(np.uint8)
    yield f'{client:07d}', {'image': image, 'label': label}


if __name__ == '__main__':
  main()
