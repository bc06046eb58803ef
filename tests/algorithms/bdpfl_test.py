"""BDPFL equals a plain loop over clients; what depends on what, and what not.

Oracle numbers are B1 and B3 of the BDPFL notes. In the loop each model has its
own gradient of its own loss, with heat maps written out layer by layer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from fedjax_ext import core
from fedjax_ext.algorithms import fed_avg, local_training
from fedjax_ext.algorithms.bdpfl import (
  Options,
  View,
  bdpfl,
  layer_weights,
  teaching_loss,
)
from fedjax_ext.losses import classification_task
from fedjax_ext.losses.task import image_inputs
from fedjax_ext.models import make_model
from tests.problems import (
  make_problem,
  real_batches,
  relative_error,
  tree_add,
  x64,
)

RATE = 0.1
PHASE = core.Phase(epochs=1, batch_size=4)
# 12, 0, 2 and 8 examples.
COHORT = np.array([1, 3, 9, 12])
LAYOUTS = {
  '1x1': dict(num_devices=1, lanes=1),
  '2x2': dict(num_devices=2, lanes=2),
}
SHARED, OWN = jnp.array([[2.0, 0, -1]]), jnp.array([[0.0, 1, 0]])


@functools.cache
def setting():
  """A problem in float64 with a convolutional model of two tapped layers."""
  problem = make_problem(float64=True)
  model = make_model(
    'group_norm_cnn',
    input_shape=(8, 8, 1),
    num_classes=3,
    widths=(3, 4),
    groups=1,
  )
  task = classification_task(model)
  cast = lambda key: jax.tree.map(lambda x: x.astype(float), model.init(key))
  return problem, model._replace(init=cast), task._replace(init=cast)


def build(layout, **options):
  _, model, task = setting()
  return bdpfl(
    task,
    model,
    inputs=image_inputs('image', None),
    client_optimizer=optax.sgd(RATE),
    layout=layout,
    phase=PHASE,
    options=Options(**options),
  )


def run(algorithm, layout, rounds=1, clients=COHORT):
  problem, _, _ = setting()
  key = jax.random.key(0)
  state = algorithm.init(key)
  states = core.make_client_states(
    algorithm.init_client, num_clients=19, key=key
  )
  for round in range(1, rounds + 1):
    cohort = problem.cohort(algorithm, clients, layout, round=round)
    state, states, _ = algorithm.apply(state, states, cohort)
  return state, states


def plain_forward(params, image):
  """(logits, the two relu outputs), with one convolution after another."""
  maps, x = [], image
  for i in range(2):
    x = jax.lax.conv_general_dilated(
      x,
      params[f'Conv_{i}']['kernel'],
      (1, 1),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    norm = params[f'Norm_{i}']['GroupNorm_0']
    mean = x.mean((1, 2, 3), keepdims=True)
    spread = x.var((1, 2, 3), keepdims=True)
    x = (x - mean) / jnp.sqrt(spread + 1e-5) * norm['scale'] + norm['bias']
    x = jnp.maximum(x, 0)
    maps.append(x)
    n, h, w, d = x.shape
    x = x.reshape(n, h // 2, 2, w // 2, 2, d).max((2, 4))
  dense = params['Dense_0']
  return x.reshape(len(x), -1) @ dense['kernel'] + dense['bias'], maps


def plain_heat(params, image, label):
  """Grad-CAM of each example alone: differences of the network's tail."""
  logits, maps = plain_forward(params, image)

  def tail(layer, features):
    x = features
    for i in range(layer, 2):
      if i > layer:
        x = jax.lax.conv_general_dilated(
          x,
          params[f'Conv_{i}']['kernel'],
          (1, 1),
          'SAME',
          dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )
        norm = params[f'Norm_{i}']['GroupNorm_0']
        mean = x.mean((1, 2, 3), keepdims=True)
        spread = x.var((1, 2, 3), keepdims=True)
        x = (x - mean) / jnp.sqrt(spread + 1e-5)
        x = jnp.maximum(x * norm['scale'] + norm['bias'], 0)
      n, h, w, d = x.shape
      x = x.reshape(n, h // 2, 2, w // 2, 2, d).max((2, 4))
    dense = params['Dense_0']
    return x.reshape(len(x), -1) @ dense['kernel'] + dense['bias']

  heats = []
  for layer in range(2):
    score = lambda a, layer=layer: tail(layer, a)[
      jnp.arange(len(label)), label
    ].sum()
    alpha = jax.grad(score)(maps[layer]).mean((1, 2), keepdims=True)
    heats.append(jnp.maximum((alpha * maps[layer]).sum(-1), 0))
  return logits, maps, heats


def plain_loss(params, peer, batch, options, decayed):
  """CE + lambda KL + sum of weighted distances, example by example."""
  image, label = batch
  logits, maps, heats = plain_heat(params, image, label)
  peer_logits, peer_maps, peer_heats = plain_heat(peer, image, label)
  kinds = {
    'heatmap': [(heats, peer_heats)],
    'features': [(maps, peer_maps)],
    'both': [(heats, peer_heats), (maps, peer_maps)],
    'none': [],
  }[options.match]
  tau = options.temperature
  total = 0.0
  for n in range(len(label)):
    p = jax.nn.softmax(logits[n] / tau)
    q = jax.nn.softmax(peer_logits[n] / tau)
    total += -jnp.log(jax.nn.softmax(logits[n])[label[n]])
    total += options.distillation_weight * (q * (jnp.log(q) - jnp.log(p))).sum()
    for mine, theirs in kinds:
      for layer in range(2):
        a, b = mine[layer][n], theirs[layer][n]
        if options.normalised:
          a = a / jnp.sqrt(jnp.maximum((a**2).sum(), 1e-24))
          b = b / jnp.sqrt(jnp.maximum((b**2).sum(), 1e-24))
        depth = options.first_layer + layer
        beta = 1 / (1 + options.decay * depth) if decayed else 1.0
        total += beta * ((a - b) ** 2).sum()
  return total / len(label)


class BdpflTest(parameterized.TestCase):
  def test_layer_weights(self):
    np.testing.assert_allclose(
      layer_weights(4, decay=1), [0.5, 0.333333, 0.25, 0.2], atol=1e-6
    )
    np.testing.assert_allclose(
      layer_weights(4, decay=10),
      [0.090909, 0.047619, 0.032258, 0.024390],
      atol=1e-6,
    )
    self.assertEqual(layer_weights(2, decay=1, first_layer=0), (1, 0.5))

  @parameterized.parameters(
    (1.0, 1.0, 1.152423, 2.464428), (0.5, 2.0, 0.299291, 1.687847)
  )
  def test_teaching_loss(self, weight, temperature, of_shared, of_own):
    options = Options(
      distillation_weight=weight, temperature=temperature, match='none'
    )
    loss = functools.partial(
      teaching_loss,
      labels=jnp.array([0]),
      mask=jnp.array([True]),
      options=options,
      decayed=True,
    )
    shared, own = View(SHARED, ()), View(OWN, ())
    np.testing.assert_allclose(loss(shared, own), of_shared, atol=2e-6)
    np.testing.assert_allclose(loss(own, shared), of_own, atol=2e-6)

  def test_squared_temperature(self):
    """tau^2 times the divergence alone."""
    loss = lambda squared: teaching_loss(
      View(SHARED, ()),
      View(OWN, ()),
      jnp.array([0]),
      jnp.array([True]),
      options=Options(1.0, 2.0, squared, 'none'),
      decayed=True,
    )
    np.testing.assert_allclose(
      loss(True) - loss(False), 3 * 0.258889, atol=5e-6
    )

  @parameterized.parameters(
    dict(layout='1x1'),
    dict(layout='2x2'),
    dict(layout='1x1', decay_on='personal', first_layer=0, decay=3.0),
    dict(layout='1x1', match='both', normalised=False, temperature=2.0),
    dict(layout='1x1', match='features', decay_on='both'),
  )
  def test_equals_a_plain_loop(self, layout, **options):
    with x64():
      problem, _, _ = setting()
      layout = core.make_layout(**LAYOUTS[layout])
      algorithm, chosen = build(layout, **options), Options(**options)
      state, states = run(algorithm, layout, 2)
      start = algorithm.init(jax.random.key(0)).params
      on = chosen.decay_on
      step_of = lambda decayed: jax.jit(
        jax.grad(lambda a, b, batch: plain_loss(a, b, batch, chosen, decayed))
      )
      of_shared = step_of(on in ('communicated', 'both'))
      of_own = step_of(on in ('personal', 'both'))
      sizes = np.diff(problem.federated.offsets)[COHORT]
      # In the first round both models are one; they part in the second.
      server, rows = start, {}
      for round in (1, 2):
        total = jax.tree.map(np.zeros_like, start)
        cohort = problem.cohort(algorithm, COHORT, layout, round=round)
        for client, size in zip(COHORT, sizes, strict=True):
          shared, own = server, rows.get(client, server)
          for batch in real_batches(problem, cohort.plans('train'), client):
            # Both at the models before the step.
            a, b = of_shared(shared, own, batch), of_own(own, shared, batch)
            shared = tree_add(shared, a, -RATE)
            own = tree_add(own, b, -RATE)
          rows[client] = own
          change = tree_add(shared, server, -1)
          total = tree_add(total, change, size / sizes.sum())
        server = tree_add(server, total)
      for client, own in rows.items():
        row = jax.tree.map(lambda x: x[0], states.gather(np.array([client])))
        self.assertTrue(row['seen'])
        self.assertLess(relative_error(row['params'], own), 1e-8)
      self.assertLess(relative_error(state.params, server), 1e-8)
      own = states.gather(COHORT[-1:])['params']
      own = jax.tree.map(lambda x: x[0], own)
      self.assertGreater(relative_error(own, server), 1e-3)

  def test_nothing_to_teach_is_training_apart(self):
    """lambda = 0 and no maps: FedAvg and local training, bit for bit nearly."""
    with x64():
      problem, _, task = setting()
      layout = core.make_layout(**LAYOUTS['1x1'])
      state, states = run(
        build(layout, distillation_weight=0.0, match='none'), layout, 2
      )
      average = fed_avg(
        task,
        client_optimizer=optax.sgd(RATE),
        server_optimizer=optax.sgd(1.0),
        layout=layout,
        phase=PHASE,
      )
      alone = local_training(
        task, client_optimizer=optax.sgd(RATE), layout=layout, phase=PHASE
      )
      wanted = average.init(jax.random.key(0))
      first = alone.init(jax.random.key(0))
      own = core.make_client_states(
        alone.init_client, num_clients=19, key=jax.random.key(0)
      )
      for round in (1, 2):
        cohort = problem.cohort(average, COHORT, layout, round=round)
        wanted, _, _ = average.apply(wanted, None, cohort)
        cohort = problem.cohort(alone, COHORT, layout, round=round)
        first, own, _ = alone.apply(first, own, cohort)
      self.assertLess(relative_error(state.params, wanted.params), 1e-12)
      self.assertLess(
        relative_error(
          states.gather(COHORT)['params'], own.gather(COHORT)['params']
        ),
        1e-12,
      )

  def test_no_decay_is_a_decay_of_zero(self):
    with x64():
      layout = core.make_layout(**LAYOUTS['1x1'])
      a, _ = run(build(layout, decay_on='none', decay=3.0), layout, 2)
      b, _ = run(build(layout, decay_on='both', decay=0.0), layout, 2)
      c, _ = run(build(layout, decay_on='both', decay=3.0), layout, 2)
      self.assertLess(relative_error(a.params, b.params), 1e-12)
      self.assertGreater(relative_error(a.params, c.params), 1e-6)

  def test_a_model_learns_nothing_of_its_peers_loss(self):
    """Slopes by the peer are exactly 0; equal models have only CE."""
    labels, mask = jnp.array([0]), jnp.array([True])
    views = lambda z: View(z, ((z[:, None] * jnp.ones((1, 2, 1)),),))
    loss = lambda own, peer: teaching_loss(
      views(own), views(peer), labels, mask, options=Options(), decayed=True
    )
    slope = jax.grad(loss, argnums=1)(SHARED, OWN)
    np.testing.assert_array_equal(slope, np.zeros_like(slope))
    plain = -jax.nn.log_softmax(SHARED)[0, 0]
    np.testing.assert_allclose(loss(SHARED, SHARED), plain, atol=1e-6)

  def test_others_keep_their_rows(self):
    with x64():
      problem, _, _ = setting()
      layout = core.make_layout(**LAYOUTS['2x2'])
      algorithm = build(layout)
      state, states = run(algorithm, layout)
      before = states.gather(COHORT)
      cohort = problem.cohort(algorithm, np.array([2, 5]), layout, round=2)
      _, states, _ = algorithm.apply(state, states, cohort)
      jax.tree.map(np.testing.assert_array_equal, states.gather(COHORT), before)
      self.assertTrue(states.gather(np.array([2, 5]))['seen'].all())

  def test_bad_options(self):
    for bad, message in (
      ({'temperature': 0.0}, 'temperature'),
      ({'distillation_weight': -1.0}, 'distillation_weight'),
      ({'match': 'x'}, 'match'),
      ({'decay_on': 'x'}, 'decay_on'),
      ({'decay': -1.0}, 'decay'),
      ({'first_layer': 2}, 'first_layer'),
      ({'norm': 'x'}, 'norm'),
      ({'map_class': 'x'}, 'map_class'),
    ):
      with self.assertRaisesRegex(core.InvalidInput, message):
        build(core.make_layout(num_devices=1, lanes=1), **bad)


if __name__ == '__main__':
  absltest.main()
