"""Moving statistics through local SGD, servers and evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from flax import linen as nn

from fedjax_ext import core, data
from fedjax_ext.algorithms import fed_avg, fed_prox, local_training, scaffold
from fedjax_ext.core.plans import client_batches
from fedjax_ext.losses import classification_task
from fedjax_ext.models import Variables, from_module
from tests.problems import relative_error, x64

SIZES = (5, 0, 9, 2, 13)  # batches of 4: last ones of one example among them
PHASE = core.Phase(epochs=2, batch_size=4)


class Network(nn.Module):
  """Dense, BatchNorm, tanh, dense."""

  @nn.compact
  def __call__(self, x, train=False, mask=None):
    # A bias would have no gradient here but noise.
    x = nn.Dense(5, use_bias=False)(x.reshape(len(x), -1))
    norm = nn.BatchNorm(use_running_average=not train, momentum=0.9)
    x = norm(x, mask=None if mask is None else mask[:, None])
    return nn.Dense(3)(nn.tanh(x))  # relu would be a coin toss for one example


class Setting:
  """A small network with BatchNorm on ragged clients, in float64."""

  def __init__(self):
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(len(SIZES)), SIZES)
    label = rng.integers(0, 3, len(owner)).astype(np.int32)
    image = rng.standard_normal((len(owner), 4, 4, 1))
    self.federated = data.from_assignment(
      {'image': image, 'label': label}, owner, client_ids=np.arange(len(SIZES))
    )
    self.model = from_module(Network(), (4, 4, 1))
    self.task = classification_task(self.model)
    self.gradient = jax.jit(jax.grad(self.loss, has_aux=True))

  def loss(self, params, stats, first, image, label, mu):
    """Mean loss of real rows alone with a proximal term, and new stats."""
    logits, stats = self.model.train(
      Variables(params, stats), image, None, jnp.ones(len(image), bool)
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, first)
    distance = sum(jax.tree.leaves(squares))
    return losses.mean() + mu / 2 * distance, stats

  def init(self):
    double = lambda tree: jax.tree.map(
      lambda x: jnp.asarray(x, jnp.float64), tree
    )
    return double(self.model.init(jax.random.key(0)))

  def cohort(self, algorithm, layout):
    return core.make_cohort(
      np.arange(len(SIZES)),
      round=1,
      seed=3,
      specs=algorithm.plans,
      data={'train': self.federated},
      features=core.place_features(self.federated.features, layout),
      layout=layout,
    )

  def plain_client(self, variables, cohort, client, *, rate=0.1, mu=0.0):
    """Local SGD on the real rows alone, without masks; updated variables."""
    first = variables.params
    for plan in cohort.plans('train'):
      if client not in plan.clients:
        continue
      for rows, count, _ in client_batches(plan, client):
        real = rows[:count]
        image = self.federated.features['image'][real]
        label = self.federated.features['label'][real]

        grads, stats = self.gradient(
          variables.params, variables.stats, first, image, label, mu
        )
        params = jax.tree.map(
          lambda p, g: p - rate * g, variables.params, grads
        )
        variables = Variables(params, stats)
    return variables

  def plain_mean(self, variables, cohort, **settings):
    """Mean of the clients' changes, weighted by examples."""
    total = sum(SIZES)
    after = [
      self.plain_client(variables, cohort, c, **settings)
      for c in range(len(SIZES))
    ]
    return jax.tree.map(
      lambda old, *new: sum(
        n / total * (x - old) for n, x in zip(SIZES, new, strict=True)
      ),
      variables,
      *after,
    )


class BatchNormTest(parameterized.TestCase):
  @parameterized.parameters((1, 1), (2, 3))
  def test_fed_avg_equals_a_plain_loop(self, devices, lanes):
    """The optimizer moves params; statistics become the clients' mean."""
    with x64():
      setting = Setting()
      layout = core.make_layout(num_devices=devices, lanes=lanes)
      algorithm = fed_avg(
        setting.task,
        client_optimizer=optax.sgd(0.1),
        server_optimizer=optax.sgd(0.5, momentum=0.9),
        layout=layout,
        phase=PHASE,
      )
      before = setting.init()
      state = algorithm.init(jax.random.key(0))._replace(params=before)
      cohort = setting.cohort(algorithm, layout)
      state, _, _ = algorithm.apply(state, None, cohort)
      mean = setting.plain_mean(before, cohort)
      expected = Variables(
        jax.tree.map(lambda p, d: p + 0.5 * d, before.params, mean.params),
        jax.tree.map(jnp.add, before.stats, mean.stats),
      )
      self.assertLess(relative_error(state.params, expected), 1e-9)
      moved = relative_error(state.params.stats, before.stats)
      self.assertGreater(moved, 1e-3)

  def test_fed_prox_pulls_params_alone(self):
    with x64():
      setting = Setting()
      layout = core.make_layout(num_devices=1)
      algorithm = fed_prox(
        setting.task,
        proximal_weight=0.7,
        client_optimizer=optax.sgd(0.1),
        server_optimizer=optax.sgd(1.0),
        layout=layout,
        phase=PHASE,
      )
      before = setting.init()
      state = algorithm.init(jax.random.key(0))._replace(params=before)
      cohort = setting.cohort(algorithm, layout)
      state, _, _ = algorithm.apply(state, None, cohort)
      mean = setting.plain_mean(before, cohort, mu=0.7)
      expected = jax.tree.map(jnp.add, before, mean)
      self.assertLess(relative_error(state.params, expected), 1e-9)

  def test_scaffold_controls_params_alone(self):
    """In the first round all control variates are 0: the uniform mean."""
    with x64():
      setting = Setting()
      layout = core.make_layout(num_devices=2)
      algorithm = scaffold(
        setting.task,
        client_learning_rate=0.1,
        num_clients=len(SIZES),
        layout=layout,
        phase=PHASE,
      )
      before = setting.init()
      zeros = jax.tree.map(jnp.zeros_like, before.params)
      state = algorithm.init(jax.random.key(0))._replace(
        params=before, control=zeros
      )
      states = core.make_client_states(
        lambda key, number: zeros,
        num_clients=len(SIZES),
        key=jax.random.key(0),
      )
      cohort = setting.cohort(algorithm, layout)
      state, _, _ = algorithm.apply(state, states, cohort)
      after = [
        setting.plain_client(before, cohort, c) for c in range(len(SIZES))
      ]
      expected = jax.tree.map(lambda *x: sum(x) / len(SIZES), *after)
      self.assertLess(relative_error(state.params, expected), 1e-9)
      self.assertEqual(
        jax.tree.structure(state.control), jax.tree.structure(before.params)
      )

  def test_scaffold_server_rate_does_not_stretch_statistics(self):
    """A server rate of 2 overshoots params; variances stay means."""
    with x64():
      setting = Setting()
      layout = core.make_layout(num_devices=1)
      algorithm = scaffold(
        setting.task,
        client_learning_rate=0.1,
        server_learning_rate=2.0,
        num_clients=len(SIZES),
        layout=layout,
        phase=PHASE,
      )
      before = setting.init()
      zeros = jax.tree.map(jnp.zeros_like, before.params)
      state = algorithm.init(jax.random.key(0))._replace(
        params=before, control=zeros
      )
      states = core.make_client_states(
        lambda key, number: zeros,
        num_clients=len(SIZES),
        key=jax.random.key(0),
      )
      cohort = setting.cohort(algorithm, layout)
      state, _, _ = algorithm.apply(state, states, cohort)
      after = [
        setting.plain_client(before, cohort, c) for c in range(len(SIZES))
      ]
      mean = jax.tree.map(lambda *x: sum(x) / len(SIZES), *after)
      params = jax.tree.map(
        lambda old, new: old + 2 * (new - old), before.params, mean.params
      )
      expected = Variables(params, mean.stats)
      self.assertLess(relative_error(state.params, expected), 1e-9)

  def test_local_training_keeps_statistics_in_the_row(self):
    with x64():
      setting = Setting()
      layout = core.make_layout(num_devices=1)
      algorithm = local_training(
        setting.task,
        client_optimizer=optax.sgd(0.1),
        layout=layout,
        phase=PHASE,
      )
      before = setting.init()
      states = core.make_client_states(
        lambda key, number: {
          'params': jax.tree.map(jnp.zeros_like, before),
          'seen': jnp.bool(False),
        },
        num_clients=len(SIZES),
        key=jax.random.key(0),
      )
      cohort = setting.cohort(algorithm, layout)
      _, states, _ = algorithm.apply(before, states, cohort)
      rows = states.gather(np.array([2]))
      own = jax.tree.map(lambda x: x[0], rows['params'])
      expected = setting.plain_client(before, cohort, 2)
      self.assertLess(relative_error(own, expected), 1e-9)

  def test_evaluation_uses_the_statistics(self):
    """Logits in evaluation depend on moving statistics, not on the batch."""
    with x64():
      setting = Setting()
      variables = setting.init()
      image = jnp.asarray(setting.federated.features['image'][:6])
      whole = setting.model.apply(variables, image)
      alone = jnp.concatenate(
        [setting.model.apply(variables, image[i : i + 1]) for i in range(6)]
      )
      np.testing.assert_allclose(whole, alone, atol=1e-12)
      other = variables._replace(
        stats=jax.tree.map(lambda x: x + 0.5, variables.stats)
      )
      changed = setting.model.apply(other, image)
      self.assertGreater(float(jnp.abs(changed - whole).max()), 1e-3)


if __name__ == '__main__':
  absltest.main()
