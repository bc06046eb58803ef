"""Rates that fall with the rounds: numbers, and rounds by a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from fedjax_ext import core
from fedjax_ext.algorithms import fed_avg, with_fine_tuning
from fedjax_ext.algorithms.local_sgd import decay_by_round
from tests.problems import (
  make_problem,
  plain_loss,
  real_batches,
  relative_error,
  tree_add,
  x64,
)

COHORT = np.array([0, 3, 5, 8])
PHASE = core.Phase(epochs=2, batch_size=6)


class DecayTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, 0.1),
    (1, 0.1),
    (10, 0.1),
    (11, 0.099),
    (100, 0.0913517),
    (101, 0.0904382),
    (1000, 0.0369730),
  )
  def test_numbers(self, round, rate):
    """0.1 * 0.99^floor(t / 10) with t = round - 1 (B1 of the BDPFL notes)."""
    optimizer = optax.chain(
      optax.sgd(0.1), decay_by_round(factor=0.99, every=10)
    )
    x = jnp.zeros(2)
    update, _ = optimizer.update(
      jnp.ones(2), optimizer.init(x), x, round=jnp.int32(round)
    )
    np.testing.assert_allclose(update, [-rate, -rate], rtol=1e-5)

  @parameterized.parameters(
    dict(num_devices=1, lanes=1), dict(num_devices=3, lanes=2)
  )
  def test_rounds_equal_a_plain_loop(self, **devices):
    with x64():
      problem = make_problem(float64=True)
      layout = core.make_layout(**devices)
      optimizer = optax.chain(
        optax.sgd(0.1), decay_by_round(factor=0.5, every=2)
      )
      algorithm = fed_avg(
        problem.task,
        client_optimizer=optimizer,
        server_optimizer=optax.sgd(1.0),
        layout=layout,
        phase=PHASE,
      )
      state = algorithm.init(jax.random.key(0))
      params = jax.tree.map(np.asarray, state.params)
      sizes = np.diff(problem.federated.offsets)
      for round, rate in ((1, 0.1), (2, 0.1), (3, 0.05), (5, 0.025)):
        cohort = problem.cohort(algorithm, COHORT, layout, round=round)
        state, _, _ = algorithm.apply(state, None, cohort)
        total = jax.tree.map(np.zeros_like, params)
        for client in COHORT:
          own = params
          for batch in real_batches(problem, cohort.plans('train'), client):
            _, slope = plain_loss(problem.model)(own, *batch)
            own = tree_add(own, slope, -rate)
          share = sizes[client] / sizes[COHORT].sum()
          total = tree_add(total, tree_add(own, params, -1), share)
        params = tree_add(params, total)
        self.assertLess(relative_error(state.params, params), 1e-9)

  def test_fine_tuning_before_a_score_knows_no_rounds(self):
    """Its rate is the first one, whatever round it follows."""
    problem = make_problem()
    layout = core.make_layout(num_devices=1, lanes=1)
    results = []
    for extra in (optax.identity(), decay_by_round(factor=0.1)):
      algorithm = with_fine_tuning(
        fed_avg(
          problem.task,
          client_optimizer=optax.sgd(0.1),
          server_optimizer=optax.sgd(1.0),
          layout=layout,
        ),
        problem.task,
        optimizer=optax.chain(optax.sgd(0.5), extra),
      )
      state = algorithm.init(jax.random.key(0))
      report = core.evaluate(
        algorithm.predictors['fine_tuned'],
        state,
        data=problem.splits,
        parts={'train': core.Part(COHORT[[0, 3]], 'train')},
        features=core.place_features(problem.federated.features, layout),
        layout=layout,
      )
      results.append(report['train'].sums['loss'])
    np.testing.assert_array_equal(*results)

  def test_out_of_range(self):
    for factor, every in ((0, 1), (1.5, 1), (0.5, 0)):
      with self.assertRaises(core.InvalidInput):
        decay_by_round(factor=factor, every=every)


if __name__ == '__main__':
  absltest.main()
