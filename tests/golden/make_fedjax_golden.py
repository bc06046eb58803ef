"""Writes fedjax_fed_avg.npz: parameters after rounds of FedJAX's own fed_avg.

Run it from the repository root; it needs the extra `fedjax` and a CPU:

  pip install -e '.[fedjax]'
  python tests/golden/make_fedjax_golden.py

The stored file was made by Python 3.11, fedjax 0.0.17, jax 0.10.2, optax 0.2.8,
dm-haiku 0.0.17 and numpy 2.4.6, in float32 (FedJAX's default; x64 disabled).

The problem is R=3 rounds on C=7 ragged clients of N=78 examples in all, with
D=6 features and Y=3 classes. Clients run two epochs of SGD(0.1) in stored order
(skip_shuffle=True), FedJAX fills the last batch with further examples, and the
server runs SGD(1.0, momentum=0.9) on the mean of `before - after`, weighted by
client size. Client 1 is empty: FedJAX takes it, with no steps and weight 0.

Keys:
  x [N, D] float32, y [N] int32: the examples, client after client.
  sizes [C] int32: examples of each client.
  cohorts [R, K] int32: client numbers of each round, sorted.
  <model>/init/<name> [...]: parameters before round 1.
  <model>/batch<B>/<name> [R, ...]: parameters after every round, batch size B.
B is 4 or 16, so that clients smaller than a batch occur under both. Models are
  softmax: logits = x w + b, with w [D, Y], b [Y];
  mlp: logits = relu(x w1 + b1) w2 + b2, with w1 [D, 8], b1 [8], w2 [8, Y] and
    b2 [Y];
and the loss is the mean cross-entropy over the B examples of a batch.
"""

import pathlib
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

if not hasattr(jax, 'tree_map'):
  jax.tree_map = jax.tree.map  # FedJAX 0.0.17 still calls it.
import fedjax  # pylint: disable=g-import-not-at-top

Arrays = Mapping[str, np.ndarray]

SIZES = np.array([5, 0, 1, 12, 20, 7, 33], np.int32)
COHORTS = np.array([[0, 1, 3, 6], [2, 4, 5, 6], [0, 2, 3, 5]], np.int32)
SHAPES = {
  'softmax': {'w': (6, 3), 'b': (3,)},
  'mlp': {'w1': (6, 8), 'b1': (8,), 'w2': (8, 3), 'b2': (3,)},
}
BATCH_SIZES = (4, 16)


def make_problem() -> dict[str, np.ndarray]:
  """Draws examples (noisy labels of a linear rule) and initial parameters."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(SIZES.sum(), 6)).astype(np.float32)
  scores = x @ rng.normal(size=(6, 3)) + rng.gumbel(size=(len(x), 3))
  arrays = {'x': x, 'y': scores.argmax(1).astype(np.int32)}
  for model, shapes in SHAPES.items():
    for name, shape in shapes.items():
      value = 0.5 * rng.normal(size=shape)
      arrays[f'{model}/init/{name}'] = value.astype(np.float32)
  return arrays


def loss(params: Arrays, batch: Arrays) -> jax.Array:
  """Mean cross-entropy of either model, a scalar."""
  x = batch['x']
  if 'w1' in params:
    hidden = jax.nn.relu(x @ params['w1'] + params['b1'])
    logits = hidden @ params['w2'] + params['b2']
  else:
    logits = x @ params['w'] + params['b']
  picked = jnp.take_along_axis(logits, batch['y'][:, None], 1)[:, 0]
  return jnp.mean(jax.nn.logsumexp(logits, 1) - picked)


def run_fed_avg(
  data: fedjax.FederatedData, params: Arrays, batch_size: int
) -> dict[str, np.ndarray]:
  """Returns the parameters after every round, each [R, ...]."""
  algorithm = fedjax.algorithms.fed_avg.federated_averaging(
    lambda params, batch, rng: jax.grad(loss)(params, batch),
    fedjax.optimizers.sgd(0.1),
    fedjax.optimizers.sgd(1.0, momentum=0.9),
    fedjax.ShuffleRepeatBatchHParams(
      batch_size=batch_size, num_epochs=2, skip_shuffle=True
    ),
  )
  state = algorithm.init(jax.tree.map(jnp.asarray, params))
  history = []
  for r, cohort in enumerate(COHORTS):
    rngs = jax.random.split(jax.random.PRNGKey(r), len(cohort))  # Not used.
    state, _ = algorithm.apply(
      state,
      [
        (c, data.get_client(c), rng)
        for c, rng in zip(cohort.tolist(), rngs, strict=True)
      ],
    )
    history.append(state.params)
  return {k: np.stack([p[k] for p in history]) for k in params}


def main() -> None:
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_x64', False)
  arrays = make_problem()
  ends = np.cumsum(SIZES)
  data = fedjax.InMemoryFederatedData(
    {
      c: {k: arrays[k][end - n : end] for k in 'xy'}
      for c, (n, end) in enumerate(zip(SIZES, ends, strict=True))
    }
  )
  for model, shapes in SHAPES.items():
    init = {name: arrays[f'{model}/init/{name}'] for name in shapes}
    for batch_size in BATCH_SIZES:
      for name, value in run_fed_avg(data, init, batch_size).items():
        arrays[f'{model}/batch{batch_size}/{name}'] = value
  beside = pathlib.Path(__file__).with_name('fedjax_fed_avg.npz')
  path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else beside
  np.savez_compressed(path, sizes=SIZES, cohorts=COHORTS, **arrays)


if __name__ == '__main__':
  main()
