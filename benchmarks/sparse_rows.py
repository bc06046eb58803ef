"""Rounds of clients that hold a whole table, or only the rows they touch.

  python -m benchmarks.sparse_rows --rows=100000 --features=64

A bag of embeddings predicts another embedding; a client names a few hundred of
the table's rows. Dense and sparse-row rounds take turns on the same cohorts,
and both end with the same model (checked to 1e-5).
"""

import argparse
import json
import statistics
import time


def main() -> None:
  """Prints one line of JSON."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.sparse_rows')
  parser.add_argument('--rows', type=int, default=100_000)
  parser.add_argument('--features', type=int, default=64)
  parser.add_argument('--cohort', type=int, default=50)
  parser.add_argument('--examples', type=int, default=100, help='a client')
  parser.add_argument('--rounds', type=int, default=7)
  given = parser.parse_args()

  from benchmarks.contestants import use_one_device_per_core

  use_one_device_per_core()
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from fedjax_ext import core
  from fedjax_ext.algorithms import fed_avg
  from fedjax_ext.data import from_segments
  from fedjax_ext.losses import Task

  def init(key: jax.Array) -> dict[str, jax.Array]:
    shape = (given.rows, given.features)
    return {'embedding': 0.1 * jax.random.normal(key, shape)}

  def loss(params: dict[str, jax.Array], batch: core.Batch) -> jax.Array:
    rows = params['embedding']
    guess = rows[batch.data['context']].mean(1)
    error = jnp.square(guess - rows[batch.data['target']]).sum(-1)
    return jnp.where(batch.mask, error, 0).sum() / batch.mask.sum()

  clients = 10 * given.cohort
  rng = np.random.default_rng(0)
  size = clients * given.examples
  named = lambda *shape: rng.integers(0, given.rows, shape).astype(np.int32)
  data = from_segments(
    {'context': named(size, 10), 'target': named(size)},
    np.arange(clients) * given.examples,
    np.full(clients, given.examples),
    client_ids=np.arange(clients),
  )
  table = core.SparseTable('embedding', ('context', 'target'), given.rows)
  layout = core.make_layout()
  features = core.place_features(data.features, layout)
  algorithms = {
    name: fed_avg(
      Task(init, loss, lambda params, batch: {}),
      client_optimizer=optax.sgd(0.1),
      server_optimizer=optax.sgd(1.0),
      layout=layout,
      tables=tables,
    )
    for name, tables in (('dense', ()), ('sparse', (table,)))
  }
  states = {
    name: layout.replicate(algorithm.init(jax.random.key(0)))
    for name, algorithm in algorithms.items()
  }
  seconds: dict[str, list[float]] = {name: [] for name in algorithms}
  for round_number in range(1, given.rounds + 3):
    chosen = rng.choice(clients, given.cohort, replace=False)
    for name, algorithm in algorithms.items():
      cohort = core.make_cohort(
        chosen,
        round=round_number,
        seed=0,
        specs=algorithm.plans,
        data={'train': data},
        features=features,
        layout=layout,
      )
      begun = time.perf_counter()
      cohort.prepare('train')
      states[name], _, _ = algorithm.apply(states[name], None, cohort)
      jax.block_until_ready(states[name])
      seconds[name].append(time.perf_counter() - begun)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
    states['dense'].params,
    states['sparse'].params,
  )
  timed = {name: s[2:] for name, s in seconds.items()}
  ratios = [d / s for d, s in zip(timed['dense'], timed['sparse'], strict=True)]
  print(
    json.dumps(
      vars(given)
      | {
        'dense_seconds': round(statistics.median(timed['dense']), 4),
        'sparse_seconds': round(statistics.median(timed['sparse']), 4),
        'dense_over_sparse': round(statistics.median(ratios), 2),
      }
    )
  )


if __name__ == '__main__':
  main()
