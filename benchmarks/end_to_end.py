"""A whole run with evaluation, metrics and checkpoints beside its rounds.

  python -m benchmarks.end_to_end --workload=W2 --rounds=100

Trains the workload with the training loop: an evaluation of --examples examples
every 10 rounds, a checkpoint every 10, metrics every round. Prints the seconds
of the whole call, with everything that it compiles and plots, over the sum of
the seconds of its rounds.
"""

import argparse
import json
import pathlib
import tempfile
import time


def main() -> None:
  """Prints one line of JSON."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.end_to_end')
  parser.add_argument('--workload', default='W2')
  parser.add_argument('--rounds', type=int, default=100)
  parser.add_argument('--examples', type=int, default=2_000)
  given = parser.parse_args()

  from benchmarks import workloads
  from benchmarks.contestants import make_model, use_one_device_per_core

  use_one_device_per_core()
  import numpy as np
  import optax

  from fedjax_ext import core
  from fedjax_ext.algorithms import fed_avg
  from fedjax_ext.data import FederatedDataset, from_segments
  from fedjax_ext.losses import classification_task
  from fedjax_ext.training.loop import Schedule, Seeds, train
  from fedjax_ext.training.manifest import make_manifest

  data = workloads.make_data(given.workload)
  workload = data.workload
  federated = from_segments(
    {'image': data.x, 'label': data.y},
    data.starts,
    data.sizes,
    client_ids=np.arange(len(data.sizes)),
  )
  layout = core.make_layout()
  algorithm = fed_avg(
    classification_task(make_model(workload.model)),
    client_optimizer=optax.sgd(0.1),
    server_optimizer=optax.sgd(1.0),
    layout=layout,
    phase=core.Phase(batch_size=workload.batch_size),
  )
  last = int(np.searchsorted(np.cumsum(data.sizes), given.examples))
  everyone = np.arange(len(data.sizes))
  with tempfile.TemporaryDirectory() as folder:
    begun = time.perf_counter()
    result = train(
      algorithm,
      FederatedDataset(
        given.workload,
        splits={'train': federated},
        participating=everyone,
        parts={'test': core.Part(everyone[: last + 1], 'train')},
        num_classes=workload.num_classes,
      ),
      sampler=core.uniform_sampler(everyone, cohort_size=workload.cohort),
      seeds=Seeds(),
      schedule=Schedule(num_rounds=given.rounds),
      layout=layout,
      workdir=pathlib.Path(folder) / 'run',
      manifest=make_manifest(flags={}, data='', layout=layout.describe()),
    )
    whole = time.perf_counter() - begun
  rounds = sum(row['seconds'] for row in result.rows)
  print(
    json.dumps(
      {
        'workload': given.workload,
        'rounds': given.rounds,
        'seconds': round(whole, 2),
        'rounds_seconds': round(rounds, 2),
        'whole_over_rounds': round(whole / rounds, 3),
      }
    )
  )


if __name__ == '__main__':
  main()
