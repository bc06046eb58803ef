"""BDPFL: a step against FedAvg's, and the memory of personal models.

  python -m benchmarks.bdpfl_rounds

The 431,080-parameter network of DBA's MNIST experiments (`lenet`) on made-up
images, batch 64. A round of 4 clients with 320 images each is 20 steps of a
client; BDPFL trains two models and matches heat maps by second derivatives,
'no maps' leaves those out. Methods take turns on the same cohorts, planned
before the clock starts; medians within one process. Then processes of their own
with 10 and with 1,000 clients, a hundred rounds of 10, rows in a file: the
largest anonymous memory of each.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from benchmarks.memory import watch
from benchmarks.turns import bank_of, made_up, take_turns


def main() -> None:
  """Prints one line of JSON."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.bdpfl_rounds')
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--worker', type=int, default=0, help=argparse.SUPPRESS)
  given = parser.parse_args()
  if given.worker:
    work(given.worker)
    return
  result = compare(given.rounds)
  for clients in (10, 1000):
    seen = watch(
      [
        *(sys.executable, '-m', 'benchmarks.bdpfl_rounds'),
        f'--worker={clients}',
      ],
      stdout=subprocess.DEVNULL,
    )
    result[f'{clients} clients'] = seen
  print(json.dumps(result))


def compare(rounds: int) -> dict[str, float]:
  """Medians of rounds, and their ratios to FedAvg's."""
  from benchmarks.contestants import use_one_device_per_core

  use_one_device_per_core()
  layout, cohort_of = made_up(num_clients=4, examples=320, shape=(28, 28))
  medians = take_turns(
    algorithms(layout, batch_size=64),
    cohort_of,
    num_clients=4,
    cohort_size=4,
    rounds=rounds,
  )
  result = {f'{n}_round_seconds': round(s, 4) for n, s in medians.items()}
  for name in ('bdpfl', 'no_maps'):
    ratio = medians[name] / medians['fed_avg']
    result[f'{name} / fed_avg'] = round(ratio, 3)
  return result


def work(num_clients: int) -> None:
  """A hundred rounds of BDPFL with rows in a file."""
  import jax
  import numpy as np

  layout, cohort_of = made_up(
    num_clients=num_clients, examples=8, shape=(28, 28)
  )
  algorithm = algorithms(layout, batch_size=8)['bdpfl']
  with tempfile.TemporaryDirectory() as folder:
    state = algorithm.init(jax.random.key(0))
    bank = bank_of(algorithm, num_clients, pathlib.Path(folder))
    for number in range(100):
      clients = (np.arange(10) + 10 * number) % num_clients
      cohort = cohort_of(algorithm, clients, number + 1)
      state, bank, _ = algorithm.apply(state, bank, cohort)
      jax.block_until_ready(state)


def algorithms(layout, *, batch_size: int):
  """{name: algorithm} of one model."""
  import optax

  from fedjax_ext import core
  from fedjax_ext.algorithms import fed_avg
  from fedjax_ext.algorithms.bdpfl import Options, bdpfl
  from fedjax_ext.losses import classification_task
  from fedjax_ext.losses.task import image_inputs
  from fedjax_ext.models import make_model

  model = make_model('lenet', input_shape=(28, 28), num_classes=10)
  task = classification_task(model)
  common = dict(
    client_optimizer=optax.sgd(0.05),
    layout=layout,
    phase=core.Phase(batch_size=batch_size),
  )
  build = lambda **options: bdpfl(
    task,
    model,
    inputs=image_inputs('image', None),
    options=Options(**options),
    **common,
  )
  return {
    'fed_avg': fed_avg(task, server_optimizer=optax.sgd(1.0), **common),
    'bdpfl': build(),
    'no_maps': build(match='none'),
  }


if __name__ == '__main__':
  main()
