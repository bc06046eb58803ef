"""Cost of evaluation by client, against one pass over the same examples.

  python -m benchmarks.evaluation --clients=1000 --model=emnist_cnn

The pass is a plain jitted loop over full batches of the same examples, summed
over all of them. Both are compiled and warm and take turns in one process; the
ratio is the median over pairs. `with gaps` adds the three-way report's gaps and
their bootstrap over clients.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_ext import core, data
from fedjax_ext.core.generalization import THREE_WAY
from fedjax_ext.core.pooled import evaluation_info
from fedjax_ext.losses import classification_task
from fedjax_ext.models import make_model


def make_pass(task, params, columns, rows, batch_size):
  """A function that scores all rows [N] in one pass; {metric: mean}."""
  steps = -(-len(rows) // batch_size)
  padded = jnp.asarray(np.pad(rows, (0, steps * batch_size - len(rows))))
  padded = padded.reshape(steps, batch_size)
  mask = (jnp.arange(steps * batch_size) < len(rows)).reshape(padded.shape)
  arrays = {name: jnp.asarray(x) for name, x in columns.items()}

  @jax.jit
  def run(params, arrays, padded, mask):
    def body(s, sums):
      batch = core.Batch(
        {name: x[padded[s]] for name, x in arrays.items()},
        mask[s],
        evaluation_info(s),
      )
      return {
        name: sums[name] + jnp.where(mask[s], value * weight, 0).sum()
        for name, (value, weight) in task.metrics(params, batch).items()
      }

    zeros = {'accuracy': 0.0, 'loss': 0.0}
    return jax.lax.fori_loop(0, steps, body, zeros)

  return lambda: jax.block_until_ready(run(params, arrays, padded, mask))


def main() -> None:
  """Prints one line of JSON."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.evaluation')
  parser.add_argument('--clients', type=int, default=1000)
  parser.add_argument('--examples', type=int, default=60)
  parser.add_argument('--model', default='emnist_cnn')
  parser.add_argument('--batch_size', type=int, default=128)
  parser.add_argument('--repeats', type=int, default=7)
  given = parser.parse_args()
  columns = data.synthetic_femnist(
    num_clients=given.clients, mean_examples=given.examples
  )
  dataset = data.three_way(columns)
  layout = core.make_layout(num_devices=1)
  shape = columns.features['image'].shape[1:]
  task = classification_task(
    make_model(given.model, input_shape=shape, num_classes=columns.num_classes)
  )
  params = task.init(jax.random.key(0))
  features = core.place_features(dataset.features, layout)
  evaluator = core.make_evaluator(
    core.Predictor(task.metrics, shared=lambda state: state),
    data=dataset.splits,
    parts=dataset.parts,
    features=features,
    layout=layout,
    batch_size=given.batch_size,
  )
  rows = np.concatenate(
    [
      core.examples_of(part, dataset.splits).alone().rows
      for part in dataset.parts.values()
    ]
  )
  plain = make_pass(task, params, dataset.features, rows, given.batch_size)
  whole = lambda: core.gap_metrics(evaluator(params, None))
  calls = {
    'pass': plain,
    'by client': lambda: evaluator(params, None),
    'with gaps': whole,
  }
  measured = {name: [] for name in calls}
  for repeat in range(given.repeats + 1):
    for name, call in calls.items():
      begun = time.perf_counter()
      call()
      if repeat:  # the first ones compile
        measured[name].append(time.perf_counter() - begun)
  ratio = lambda name: statistics.median(
    a / b for a, b in zip(measured[name], measured['pass'], strict=True)
  )
  report = evaluator(params, None)
  total = sum(report[part].sums['accuracy'].sum() for part in THREE_WAY)
  assert np.isclose(total, plain()['accuracy'])  # the same examples
  said = {
    'clients': given.clients,
    'examples': len(rows),
    'model': given.model,
    'pass, seconds': round(statistics.median(measured['pass']), 4),
    'by client / pass': round(ratio('by client'), 3),
    'with gaps / pass': round(ratio('with gaps'), 3),
  }
  print(json.dumps(said))


if __name__ == '__main__':
  main()
