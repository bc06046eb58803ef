"""Memory and round time of few and many clients, small and large cohorts.

  python -m benchmarks.population --clients=10000,1000000
  python -m benchmarks.population --clients=100000 --cohorts=100,10000

Each run trains softmax regression with the training loop, checkpoints and an
evaluation of 100 clients included, on a sparse memory-mapped file of uint8
images (60 a client, holes that read as zeros and take no disk), streamed. Every
run is a process of its own; it reports the largest anonymous memory (RssAnon)
and the median seconds of its rounds. Larger cohorts run in waves of --wave.
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile

from benchmarks.memory import watch

_EXAMPLES = 60
_SHAPE = (28, 28, 1)


def main() -> None:
  """Prints a line of JSON for each run, and one that compares them."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.population')
  parser.add_argument('--clients', default='10000,1000000')
  parser.add_argument('--cohorts', default='500')
  parser.add_argument('--wave', type=int, default=0)
  parser.add_argument('--rounds', type=int, default=30)
  parser.add_argument('--workdir', default='', help=argparse.SUPPRESS)
  given = parser.parse_args()
  populations = [int(c) for c in given.clients.split(',')]
  cohorts = [int(c) for c in given.cohorts.split(',')]
  if given.workdir:
    train(pathlib.Path(given.workdir), populations[0], cohorts[0], given)
    return
  results = []
  for clients in populations:
    for cohort in cohorts:
      results.append(measure(clients, cohort, given))
      print(json.dumps(results[-1]), flush=True)
  first, last = results[0], results[-1]
  offsets = 8 * (last['clients'] - first['clients']) / 2**20
  print(
    json.dumps(
      {
        'difference_mib': round(
          last['peak_anon_mib'] - first['peak_anon_mib'], 1
        ),
        'offsets_difference_mib': round(offsets, 1),
        'memory_ratio': round(
          last['peak_anon_mib'] / first['peak_anon_mib'], 3
        ),
        'round_time_ratio': round(
          last['median_round_seconds'] / first['median_round_seconds'], 3
        ),
      }
    )
  )


def measure(clients: int, cohort: int, given: argparse.Namespace) -> dict:
  """Runs one setting in a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    result = watch(
      [
        *(sys.executable, '-m', 'benchmarks.population'),
        f'--clients={clients}',
        f'--cohorts={cohort}',
        f'--wave={given.wave}',
        f'--rounds={given.rounds}',
        f'--workdir={folder}',
      ],
      stderr=subprocess.DEVNULL,
    )
    lines = (pathlib.Path(folder) / 'run/metrics.jsonl').read_text().split('\n')
  seconds = [json.loads(line)['seconds'] for line in lines if line][3:]
  median = round(statistics.median(seconds), 4)
  setting = {'clients': clients, 'cohort': cohort}
  return setting | result | {'median_round_seconds': median}


def train(
  folder: pathlib.Path, clients: int, cohort: int, given: argparse.Namespace
) -> None:
  """The run itself, in its own process."""
  import numpy as np
  import optax

  from benchmarks.contestants import use_one_device_per_core
  from fedjax_ext import core
  from fedjax_ext.algorithms import fed_avg
  from fedjax_ext.data import FederatedDataset, from_segments
  from fedjax_ext.losses import classification_task
  from fedjax_ext.models import make_model
  from fedjax_ext.training.loop import Schedule, Seeds
  from fedjax_ext.training.loop import train as run
  from fedjax_ext.training.manifest import make_manifest

  use_one_device_per_core()
  size = clients * _EXAMPLES

  def holes(name: str, *shape: int) -> np.memmap:
    with (folder / name).open('wb') as file:
      file.truncate(size * math.prod(shape))
    return np.memmap(folder / name, np.uint8, 'r', shape=(size, *shape))

  image, label = holes('image', *_SHAPE), holes('label')
  data = from_segments(
    {'image': image, 'label': label},
    np.arange(clients) * _EXAMPLES,
    np.full(clients, _EXAMPLES),
    client_ids=np.arange(clients),
  )
  layout = core.make_layout(wave_clients=given.wave)
  task = classification_task(
    make_model('softmax_regression', input_shape=_SHAPE, num_classes=10)
  )
  some = np.arange(100)
  everyone = np.arange(clients)
  run(
    fed_avg(
      task,
      client_optimizer=optax.sgd(0.1),
      server_optimizer=optax.sgd(1.0),
      layout=layout,
    ),
    FederatedDataset(
      'holes',
      splits={'train': data},
      participating=everyone,
      parts={'test': core.Part(some, 'train')},
      num_classes=10,
    ),
    sampler=core.uniform_sampler(clients, cohort_size=cohort),
    seeds=Seeds(),
    schedule=Schedule(num_rounds=given.rounds, data_memory_gb=0.0),
    layout=layout,
    workdir=folder / 'run',
    manifest=make_manifest(flags={}, data='', layout=layout.describe()),
  )


if __name__ == '__main__':
  main()
