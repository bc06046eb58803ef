"""FedLoGe: a round against FedAvg's, its classifier, its bank of heads.

  python -m benchmarks.fedloge_rounds

Made-up images of 32x32x3 in 10 classes; 40 clients of 100 images, 8 a round,
batch 32, two epochs; the GroupNorm CNN of the CIFAR table (128 features). Both
methods take turns on the same cohorts, planned before the clock starts; medians
within one process. Then 1,000 clients of 20 images with heads of their own, 40
a round, until each has taken part twice: what their rows take on disk against
their floats. And the time of SSE-C for 100 classes and 512 features.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

from benchmarks.turns import bank_of, made_up, take_turns


def main() -> None:
  """Prints one line of JSON."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.fedloge_rounds')
  parser.add_argument('--rounds', type=int, default=15)
  given = parser.parse_args()

  from benchmarks.contestants import use_one_device_per_core

  use_one_device_per_core()
  import jax
  import numpy as np

  from fedjax_ext.models.heads import sparse_etf

  result = {}
  begun = time.perf_counter()
  kernel = sparse_etf(num_features=512, num_classes=100)
  result['sparse_etf_100x512_seconds'] = round(time.perf_counter() - begun, 2)
  assert kernel.shape == (512, 100)

  layout, cohort_of = made_up(num_clients=40, examples=100, shape=(32, 32, 3))
  medians = take_turns(
    algorithms(layout, num_clients=40),
    cohort_of,
    num_clients=40,
    cohort_size=8,
    rounds=given.rounds,
  )
  result |= {
    f'{name}_round_seconds': round(s, 4) for name, s in medians.items()
  }
  result['fed_loge / fed_avg'] = round(
    medians['fed_loge'] / medians['fed_avg'], 3
  )

  layout, cohort_of = made_up(num_clients=1000, examples=20, shape=(32, 32, 3))
  algorithm = algorithms(layout, num_clients=1000)['fed_loge']
  with tempfile.TemporaryDirectory() as folder:
    bank = bank_of(algorithm, 1000, pathlib.Path(folder))
    state, times = algorithm.init(jax.random.key(0)), []
    for number in range(1, 51):
      clients = (np.arange(40) + 40 * (number - 1)) % 1000
      cohort = cohort_of(algorithm, clients, number)
      begun = time.perf_counter()
      state, bank, _ = algorithm.apply(state, bank, cohort)
      jax.block_until_ready(state)
      times.append(time.perf_counter() - begun)
    files = [p.stat() for p in pathlib.Path(folder).glob('*')]
    floats = (
      4
      * 1000
      * sum(x[0].size for x in jax.tree.leaves(bank.gather(np.arange(1))))
    )
    used = sum(512 * f.st_blocks for f in files)
    result |= {
      'bank_clients': 1000,
      'bank_bytes': used,
      'bank / floats': round(used / floats, 3),
      'bank_round_seconds': round(statistics.median(times[2:]), 4),
    }
  print(json.dumps(result))


def algorithms(layout, *, num_clients: int):
  """{name: algorithm} of one backbone."""
  import numpy as np
  import optax

  from fedjax_ext import core
  from fedjax_ext.algorithms import fed_avg
  from fedjax_ext.algorithms.fedloge import fed_loge
  from fedjax_ext.losses.headed import headed_task, with_head
  from fedjax_ext.models import MODELS
  from fedjax_ext.models.heads import make_backbone, simplex_etf

  backbone = make_backbone(
    MODELS['group_norm_cnn'],
    input_shape=(32, 32, 3),
    widths=(8, 32, 128),
    groups=4,
    pool='mean',
  )
  task = headed_task(backbone, num_classes=10)
  common = dict(
    client_optimizer=optax.sgd(0.03, momentum=0.5),
    layout=layout,
    phase=core.Phase(epochs=2, batch_size=32),
  )
  rng = np.random.default_rng(0)
  return {
    'fed_avg': fed_avg(
      with_head(task), server_optimizer=optax.sgd(1.0), **common
    ),
    'fed_loge': fed_loge(
      task,
      classifier=simplex_etf(rng, 128, 10).astype(np.float32),
      counts=np.ones((num_clients, 10), np.int64),
      **common,
    ),
  }


if __name__ == '__main__':
  main()
