"""Is the gap of label-based clients one of labels? MNIST by writer, 38 clients.

  python -m tools.balanced_gap --data_dir=DIR

Repeats the row "Label Dirichlet (alpha 1)" of the participation-gap table (one
CPU device, rate 0.01) and takes the gap twice: every example alike, and as the
mean over digits of the gap within a digit, which a shift of labels between
participating and other clients cannot make. 5 minutes.
"""

import argparse
import functools

import jax
import numpy as np
import optax

from experiments.participation_gap.sources import writers
from fedjax_ext import core, data
from fedjax_ext.algorithms import centralised
from fedjax_ext.losses import classification_task
from fedjax_ext.models import make_model
from launchers.claims import t_interval

NUM_CLASSES, CLIENTS, EPOCHS = 10, 38, 10


def gaps(columns: data.Columns, seed: int) -> tuple[float, float]:
  """The gap in points, plain and within digits, of one split and training."""
  dataset = data.pool_clients(
    data.three_way(
      columns,
      partition=functools.partial(
        data.dirichlet_client_partition, alpha=1.0, sizes='natural'
      ),
      num_clients=761,
      participating_clients=CLIENTS,
      stratify_column='hsf',
      seed=seed,
    )
  )
  model = make_model(
    'group_norm_cnn',
    input_shape=(28, 28),
    num_classes=NUM_CLASSES,
    widths=(8, 16),
    groups=4,
  )
  task = classification_task(model)
  layout = core.make_layout(num_devices=1)
  algorithm = centralised(
    task,
    optimizer=optax.adam(0.01, b2=0.99, eps=1e-3),
    layout=layout,
    phase=core.Phase(batch_size=32),
  )
  features = core.place_features(
    {name: dataset.features[name] for name in ('image', 'label')}, layout
  )
  state = algorithm.init(jax.random.key(seed))
  for epoch in range(1, EPOCHS + 1):
    cohort = core.make_cohort(
      dataset.participating,
      round=epoch,
      seed=seed,
      specs=algorithm.plans,
      data=dataset.splits,
      features=features,
      layout=layout,
    )
    state, _, _ = algorithm.apply(state, None, cohort)

  def metrics(params, batch):
    correct, weight = task.metrics(params, batch)['accuracy']
    own = {
      f'digit {y}': (correct, weight * (batch.data['label'] == y))
      for y in range(NUM_CLASSES)
    }
    return {'accuracy': (correct, weight)} | own

  report = core.evaluate(
    core.Predictor(metrics, shared=lambda state: state.params),
    state,
    data=dataset.splits,
    parts=dataset.parts,
    features=features,
    layout=layout,
  )

  def gap(metric: str) -> float:
    means = [
      report[part].sums[metric].sum() / report[part].weights[metric].sum()
      for part in ('validation', 'unparticipating')
    ]
    return 100 * float(means[0] - means[1])

  within = np.mean([gap(f'digit {y}') for y in range(NUM_CLASSES)])
  return gap('accuracy'), float(within)


def main() -> None:
  """Prints both gaps by seed, and their 95 % t-intervals."""
  parser = argparse.ArgumentParser(prog='python -m tools.balanced_gap')
  parser.add_argument('--data_dir', required=True)
  parser.add_argument('--seeds', type=int, default=12)
  given = parser.parse_args()
  columns = writers(data_dir=given.data_dir)
  measured = []
  for seed in range(1, given.seeds + 1):
    measured.append(gaps(columns, seed))
    print(f'seed {seed}: {measured[-1][0]:+.2f}, {measured[-1][1]:+.2f}')
  for name, values in zip(
    ('every example alike', 'within digits'),
    zip(*measured, strict=True),
    strict=True,
  ):
    interval = t_interval(values)
    print(
      f'{name}: {interval.mean:+.2f} '
      f'[{interval.low:+.2f}, {interval.high:+.2f}]'
    )


if __name__ == '__main__':
  main()
