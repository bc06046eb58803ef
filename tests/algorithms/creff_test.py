"""CReFF: gradients by class, FedAvg underneath, features that come to agree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest

from fedjax_ext import core
from fedjax_ext.algorithms import fed_avg
from fedjax_ext.algorithms.creff import creff
from fedjax_ext.data import class_counts
from fedjax_ext.losses.federated_features import (
  Retraining,
  class_gradients,
)
from fedjax_ext.losses.headed import headed_task, with_head
from fedjax_ext.models import MODELS
from fedjax_ext.models.heads import apply_head, linear_head, make_backbone
from tests.problems import SIZES, make_problem, relative_error

OPTIMIZER = optax.sgd(0.1)
PHASE = core.Phase(epochs=1, batch_size=4)


class GradientsTest(absltest.TestCase):
  def test_against_autodiff(self):
    head = linear_head(jax.random.key(0), 5, 3)
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(12, 5))), rng.integers(0, 3, 12)
    weights = jnp.asarray(rng.uniform(size=12))
    got = class_gradients(head, x, jnp.asarray(y), weights)
    for c in range(3):

      def loss(kernel, c=c):
        logits = apply_head(head | {'kernel': kernel}, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return (losses * weights * (y == c)).sum()

      np.testing.assert_allclose(
        got[c], jax.grad(loss)(head['kernel']), rtol=1e-4, atol=1e-6
      )


class CreffTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.problem = make_problem()
    backbone = make_backbone(MODELS['mlp'], input_shape=(8, 8, 1), hidden=(6,))
    self.task = headed_task(backbone, num_classes=3)
    view = self.problem.federated
    self.counts = class_counts(
      view.features['label'][view.rows],
      view.owners(),
      num_clients=len(SIZES),
      num_classes=3,
    )
    self.layout = core.make_layout(num_devices=1)

  def build(self, **more):
    return creff(
      self.task,
      counts=self.counts,
      client_optimizer=OPTIMIZER,
      layout=self.layout,
      phase=PHASE,
      retraining=Retraining(features_per_class=8, **more),
    )

  def cohort(self, algorithm, round=1):
    return self.problem.cohort(
      algorithm, np.arange(len(SIZES)), self.layout, round=round
    )

  def test_the_average_is_that_of_fed_avg(self):
    algorithm = self.build()
    plain = fed_avg(
      with_head(self.task),
      client_optimizer=OPTIMIZER,
      server_optimizer=optax.sgd(1.0),
      layout=self.layout,
      phase=PHASE,
    )
    state = algorithm.init(jax.random.key(1))
    expected = state.average
    for round in (1, 2):
      state, _, _ = algorithm.apply(state, None, self.cohort(algorithm, round))
      expected, _, _ = plain.apply(expected, None, self.cohort(plain, round))
      self.assertLess(relative_error(state.params, expected.params), 1e-6)

  def test_wanted_gradients_are_means_over_clients_of_their_means(self):
    """One match step from the server's view equals one by hand."""
    algorithm = self.build(match_steps=1, head_steps=2)
    state = algorithm.init(jax.random.key(1))
    new, _, _ = algorithm.apply(state, None, self.cohort(algorithm))
    view, head = self.problem.federated, state.head
    sums, clients = np.zeros((3, 6, 3)), np.zeros(3)
    for c in range(len(SIZES)):
      data = view.client(c)
      if not len(data['label']):
        continue
      f = self.task.frozen_features(
        state.params['body'],
        core.Batch(data, np.ones(len(data['label']), bool), None),
      )
      labels = jnp.asarray(data['label'])
      g = class_gradients(head, f, labels, jnp.ones(len(labels)))
      n = np.bincount(data['label'], minlength=3)
      sums += np.asarray(g) / np.maximum(n, 1)[:, None, None]
      clients += n > 0
    wanted = jnp.asarray(sums / clients[:, None, None])
    labels = jnp.repeat(jnp.arange(3), 8)

    def mismatch(features):
      got = class_gradients(
        head, features.reshape(-1, 6), labels, jnp.full(24, 1 / 8)
      )
      norms = jnp.linalg.norm(got, axis=1) * jnp.linalg.norm(wanted, axis=1)
      return (1 - (got * wanted).sum(1) / (norms + 1e-6)).sum()

    features = state.features - 0.1 * jax.grad(mismatch)(state.features)
    np.testing.assert_allclose(new.features, features, rtol=1e-4, atol=1e-5)
    self.assertLess(mismatch(features), mismatch(state.features))
    head = new.params['head']
    for _ in range(2):
      loss = lambda head: optax.softmax_cross_entropy_with_integer_labels(
        apply_head(head, new.features.reshape(-1, 6)), labels
      ).mean()
      head = jax.tree.map(lambda h, g: h - 0.01 * g, head, jax.grad(loss)(head))
    self.assertLess(relative_error(new.head, head), 1e-5)

  def test_predictors(self):
    algorithm = self.build()
    state = algorithm.init(jax.random.key(1))
    view = self.problem.federated
    report = core.evaluate(
      algorithm.predictors['global'],
      state,
      data={'train': view},
      parts={'train': core.Part(np.arange(len(SIZES)), 'train')},
      features=core.place_features(view.features, self.layout),
      layout=self.layout,
    )['train']
    self.assertIn('accuracy_average', report.sums)
    self.assertIn('balanced_accuracy', report.sums)


if __name__ == '__main__':
  absltest.main()
