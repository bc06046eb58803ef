"""The references of federated training: pooled data, and popularity."""

import jax
import numpy as np
import optax
from absl.testing import absltest

from fedjax_ext import core
from fedjax_ext.algorithms import centralised, popularity
from tests.problems import (
  make_problem,
  plain_loss,
  plain_step,
  real_batches,
  relative_error,
)

ADAM = optax.adam(0.01)


class CentralisedTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    """Clients of 21 and 2 rows, and one that is not finite."""
    super().setUpClass()
    cls.problem = make_problem(sizes=(21, 2, 5), poison=(2,))
    cls.layout = core.make_layout(num_devices=1)
    cls.algorithm = centralised(
      cls.problem.task,
      optimizer=ADAM,
      layout=cls.layout,
      phase=core.Phase(batch_size=9, steps=4),
    )
    cls.start = cls.algorithm.init(jax.random.key(0))

  def rounds(self, clients):
    """Yields each round's cohort, state and metrics."""
    state = self.start
    for round, client in enumerate(clients, 1):
      cohort = self.problem.cohort(
        self.algorithm, [client], self.layout, round=round
      )
      state, _, metrics = self.algorithm.apply(state, None, cohort)
      yield cohort, state, metrics

  def test_rounds_are_one_long_loop(self):
    """Adam goes on from round to round."""
    params = self.start.params
    adam, steps = ADAM.init(params), 0
    for cohort, state, metrics in self.rounds((0, 0, 0)):
      losses, counts = [], []
      for batch in real_batches(self.problem, cohort.plans('train'), 0):
        loss, grads = plain_loss(self.problem.model)(params, *batch)
        params, adam = plain_step(ADAM)(grads, adam, params)
        losses.append(float(loss))
        counts.append(len(batch[1]))
      steps += len(counts)
      self.assertEqual(counts, [9, 9, 3, 9])
      self.assertLess(relative_error(state.params, params), 1e-4)
      self.assertLess(relative_error(state.optimizer_state, adam), 1e-4)
      self.assertAlmostEqual(
        float(metrics['train_loss']),
        np.average(losses, weights=counts),
        places=4,
      )
    self.assertEqual(int(state.optimizer_state[0].count), steps)

  def test_a_step_that_is_not_finite_changes_nothing(self):
    states, dropped = [jax.device_get(self.start)], []
    for _, state, metrics in self.rounds((0, 2, 1)):
      states.append(jax.device_get(state))
      dropped.append(int(metrics['clients_dropped']))
    self.assertEqual(dropped, [0, 1, 0])
    jax.tree.map(np.testing.assert_array_equal, states[1], states[2])
    for before, after in ((states[0], states[1]), (states[2], states[3])):
      for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        self.assertTrue(np.isfinite(b).all())
        self.assertGreater(np.abs(a - b).max(), 0)

  def test_predicts_with_its_model(self):
    predictors = self.algorithm.predictors
    self.assertEqual([*predictors], ['global'])
    self.assertIs(predictors['global'].shared(self.start), self.start.params)


class PopularityTest(absltest.TestCase):
  # Items 0..5 have been labels so often.
  LABELS = np.array([2, 5, 2, 1, 3, 2, 5, 3], np.int16)
  COUNTS = (0, 1, 3, 2, 0, 2)

  def metrics(self, labels, mask, **settings):
    algorithm = popularity(self.LABELS, num_items=5, label='item', **settings)
    state = algorithm.init(jax.random.key(0))
    batch = core.Batch({'item': np.array(labels, np.int16)}, mask, None)
    predictor = algorithm.predictors['global']
    return predictor.metrics(predictor.shared(state), batch)

  def test_counts(self):
    algorithm = popularity(self.LABELS, num_items=5)
    state = algorithm.init(jax.random.key(0))
    self.assertEqual(np.asarray(state).tolist(), [*self.COUNTS])
    # Nothing is trained.
    after, _, metrics = algorithm.apply(state, None, None)
    self.assertIs(after, state)
    self.assertEqual((metrics, algorithm.plans), ({}, {}))

  def test_ranks(self):
    """Of equally popular items, 3 and 5, with ties counted as higher."""
    labels = [2, 3, 5, 1, 4]
    mask = np.array([True, True, True, True, False])
    kind = self.metrics(labels, mask)
    np.testing.assert_array_equal(kind['rank'][0], [0, 1, 1, 3, 4])
    np.testing.assert_array_equal(kind['ties'][0], [0, 1, 1, 0, 0])
    padded = self.metrics(labels, mask, pad_is_candidate=True)
    np.testing.assert_array_equal(padded['ties'][0], [0, 1, 1, 0, 1])
    got = self.metrics(labels, mask, pessimistic_ties=True)
    rank, weight = got['rank']
    self.assertEqual(np.asarray(rank).tolist(), [0, 2, 2, 3, 4])
    by_hand = [
      sum(self.COUNTS[n] >= self.COUNTS[y] for n in range(1, 6) if n != y)
      for y in labels
    ]
    self.assertEqual(by_hand, [0, 2, 2, 3, 4])
    self.assertEqual(np.asarray(weight).tolist(), [1, 1, 1, 1, 0])
    np.testing.assert_allclose(got['mrr'][0], [1, 1 / 3, 1 / 3, 1 / 4, 1 / 5])
    np.testing.assert_array_equal(got['recall_at_1'][0], [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(got['recall_at_5'][0], np.ones(5))


if __name__ == '__main__':
  absltest.main()
