"""Attacks equal plain loops; triggers and rates against numbers (B9 to B11)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from fedjax_ext import core
from fedjax_ext.algorithms import fed_avg
from fedjax_ext.algorithms.averaging import Attack, Averaging, Sent
from fedjax_ext.algorithms.local_sgd import LocalState
from fedjax_ext.attacks import ATTACKS, TRIGGERS, Scenario, with_attack_success
from fedjax_ext.attacks.backdoors import quiet_parameters, train_poisoned
from fedjax_ext.attacks.scenario import poison
from fedjax_ext.attacks.triggers import blended
from fedjax_ext.core.pooled import evaluation_info
from fedjax_ext.core.programs import Batch
from fedjax_ext.defenses import median
from fedjax_ext.defenses.norm_clipping import clip
from tests.problems import (
  make_problem,
  plain_loss,
  real_batches,
  relative_error,
  tree_add,
  x64,
)

BAD = (4, 8, 14)
COHORT = np.array([0, 1, 2, 3, 10, 12])
PHASE = core.Phase(epochs=2, batch_size=6)
LIES = core.Phase(epochs=3, batch_size=6)
RATE, TARGET, POISONED = 0.1, 2, 2
TRIGGER = TRIGGERS['strips'](length=2, gap=1, rows=2)
LAYOUTS = {
  '1x1': dict(num_devices=1, lanes=1),
  '3x2': dict(num_devices=3, lanes=2),
}


def scenario(problem, **changes):
  made = Scenario(problem.task, optax.sgd(RATE), TRIGGER, TARGET, POISONED)
  return made._replace(**changes)


def make(problem, name, layout, start=1, reducer=None, **settings):
  program = ATTACKS[name](scenario(problem), **settings)
  return fed_avg(
    problem.task,
    client_optimizer=optax.sgd(RATE),
    server_optimizer=optax.sgd(1.0),
    layout=layout,
    phase=PHASE,
    averaging=Averaging(reducer, Attack(program, LIES, BAD, start)),
  )


def plain_sgd(problem, params, batches, after=lambda params, step: params):
  for i, (image, label) in enumerate(batches):
    _, slope = plain_loss(problem.model)(params, image, label)
    params = after(tree_add(params, slope, -RATE), i)
  return params


def plain_poison(batches, place):
  """The first images of each batch, stamped one by one with part `place`."""
  strips = [(0, 0), (0, 3), (2, 0), (2, 3)]
  row, left = strips[place % 4]
  result = []
  for image, label in batches:
    image, label = np.array(image), np.array(label)
    image[:POISONED, row, left : left + 2] = 1
    label[:POISONED] = TARGET
    result.append((image, label))
  return result


def plain_label_flip(batches):
  result = []
  for image, label in batches:
    label = np.array(label)
    head = label[:POISONED]
    head[head == 1] = TARGET
    result.append((image, label))
  return result


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def plain_attack(problem, name, params, batches, place, last):
  """The update of one malicious client, for the settings of SETTINGS."""
  if name == 'label_flip':
    after = plain_sgd(problem, params, plain_label_flip(batches))
    return tree_add(after, params, -1)
  batches = plain_poison(batches, place)
  epoch = len(batches) // 3
  hold = lambda params, step: params
  if name == 'neurotoxin':
    sizes = np.abs(flat(last))
    limit = np.sort(sizes)[round(0.6 * sizes.size) - 1]
    hold = lambda now, step: jax.tree.map(
      lambda x, w, g: np.where(np.abs(g) <= limit, x, w), now, params, last
    )
  if name == 'bapfl':
    hold = lambda now, step: now | {'Dense_1': params['Dense_1']}
  if name == 'projected':

    def hold(now, step):
      if (step + 1) % epoch:
        return now
      delta = tree_add(now, params, -1)
      scale = min(1, 0.05 / np.linalg.norm(flat(delta)))
      return tree_add(params, delta, scale)

  after = plain_sgd(problem, params, batches, hold)
  boost = 4.0 if name == 'constrain_and_scale' else 1.0
  return jax.tree.map(lambda a, b: boost * (a - b), after, params)


SETTINGS = {
  'constrain_and_scale': {'boost': 4.0},
  'neurotoxin': {'keep': 0.6},
  'projected': {'radius': 0.05},
  'label_flip': {'source': 1},
  'bapfl': {'layer': 'Dense_1', 'noise': 0.0},
}


def plain_round(problem, algorithm, params, cohort, name, last):
  """(weighted mean over honest and malicious clients), client by client."""
  updates, weights = [], []
  sizes = np.diff(problem.federated.offsets)
  for client in COHORT:
    if sizes[client]:
      batches = real_batches(problem, cohort.plans('train'), client)
      after = plain_sgd(problem, params, batches)
      updates.append(tree_add(after, params, -1))
      weights.append(sizes[client])
  for place, client in enumerate(BAD):
    plan = 'attack' if name else 'before_attack'
    batches = real_batches(problem, cohort.plans(plan), client)
    if name:
      update = plain_attack(problem, name, params, batches, place, last)
    else:
      update = tree_add(plain_sgd(problem, params, batches), params, -1)
    updates.append(update)
    weights.append(sizes[client])
  share = np.array(weights) / np.sum(weights)
  return jax.tree.map(lambda *x: np.tensordot(share, np.stack(x), 1), *updates)


class AttacksTest(parameterized.TestCase):
  @parameterized.product(
    # Those that make images or triggers of their own have tests of their own.
    name=tuple(
      name for name in ATTACKS if name not in ('hidden_trigger', 'pfedba')
    ),
    layout=tuple(LAYOUTS),
  )
  def test_two_rounds_equal_a_plain_loop(self, name, layout):
    """Neurotoxin's mask is of the last change: all at first, then a part."""
    with x64():
      problem = make_problem(float64=True)
      layout = core.make_layout(**LAYOUTS[layout])
      settings = SETTINGS.get(name, {})
      algorithm = make(problem, name, layout, **settings)
      state = algorithm.init(jax.random.key(0))
      params = jax.tree.map(np.asarray, state.params)
      last = jax.tree.map(np.zeros_like, params)
      for round in (1, 2):
        cohort = problem.cohort(algorithm, COHORT, layout, round=round)
        state, _, metrics = algorithm.apply(state, None, cohort)
        last = plain_round(problem, algorithm, params, cohort, name, last)
        params = tree_add(params, last)
        self.assertLess(relative_error(state.params, params), 1e-9)
        self.assertEqual(metrics['clients'], len(COHORT) + len(BAD))

  def test_honest_before_the_start(self):
    with x64():
      problem = make_problem(float64=True)
      layout = core.make_layout(**LAYOUTS['1x1'])
      algorithm = make(problem, 'backdoor', layout, start=2)
      state = algorithm.init(jax.random.key(0))
      params = jax.tree.map(np.asarray, state.params)
      for round, name in ((1, ''), (2, 'backdoor')):
        cohort = problem.cohort(algorithm, COHORT, layout, round=round)
        # What a round does not run is neither planned nor counted.
        plan = 'attack' if name else 'before_attack'
        self.assertEqual(set(cohort.specs), {'train', plan})
        state, _, _ = algorithm.apply(state, None, cohort)
        step = plain_round(problem, algorithm, params, cohort, name, None)
        params = tree_add(params, step)
        self.assertLess(relative_error(state.params, params), 1e-9)

  def test_a_defence_sees_all_updates(self):
    """The median of honest and malicious updates."""
    with x64():
      problem = make_problem(float64=True)
      layout = core.make_layout(**LAYOUTS['3x2'])
      algorithm = make(problem, 'backdoor', layout, reducer=median())
      state = algorithm.init(jax.random.key(0))
      params = jax.tree.map(np.asarray, state.params)
      cohort = problem.cohort(algorithm, COHORT, layout)
      after, _, _ = algorithm.apply(state, None, cohort)
      updates = []
      for client in (0, 1, 2, 10, 12):  # Client 3 has no examples: weight 0.
        batches = real_batches(problem, cohort.plans('train'), client)
        done = plain_sgd(problem, params, batches)
        updates.append(tree_add(done, params, -1))
      for place, client in enumerate(BAD):
        batches = real_batches(problem, cohort.plans('attack'), client)
        updates.append(
          plain_attack(problem, 'backdoor', params, batches, place, None)
        )
      middle = jax.tree.map(lambda *x: np.median(np.stack(x), 0), *updates)
      wanted = tree_add(params, middle)
      self.assertLess(relative_error(after.params, wanted), 1e-9)

  def test_replacement_replaces(self):
    """w = (1, 2), x = (1.4, 1.8): upload (5, 0); over ten clients that is x."""
    program = train_poisoned(scenario(make_problem()), boost=10.0)
    start, aim = jnp.array([1.0, 2]), jnp.array([1.4, 1.8])
    state = LocalState(aim, (), (), jnp.int32(1), (0.0, 1.0))
    client = core.Client(jnp.int32(0), jnp.int32(5), (), jnp.int32(0))
    update = program.final(Sent(start, ()), client, state).update
    np.testing.assert_allclose(start + update, [5, 0], atol=1e-5)
    np.testing.assert_allclose(start + update / 10, aim, rtol=1e-6)

  def test_noise_moves_the_encoder_but_not_the_classifier(self):
    problem = make_problem()
    layout = core.make_layout(num_devices=1, lanes=1)
    after = []
    for noise in (0.0, 0.5, 0.5):
      algorithm = make(problem, 'bapfl', layout, layer='Dense_1', noise=noise)
      state = algorithm.init(jax.random.key(0))
      before = state.params
      cohort = problem.cohort(algorithm, np.array([3]), layout)
      state, _, _ = algorithm.apply(state, None, cohort)
      after.append(state.params)
      # Client 3 has no examples: the attackers alone move the model.
      jax.tree.map(
        np.testing.assert_array_equal,
        state.params['Dense_1'],
        before['Dense_1'],
      )
    self.assertGreater(relative_error(after[0], after[1]), 1e-4)
    jax.tree.map(np.testing.assert_array_equal, after[1], after[2])

  def test_projection(self):
    near = clip({'a': jnp.array([3.0]), 'b': jnp.array([4.0])}, 2.0)
    np.testing.assert_allclose([*near['a'], *near['b']], [1.2, 1.6], rtol=1e-6)

  def test_quiet_parameters(self):
    last = {'a': jnp.array([0.5, -0.01]), 'b': jnp.array([0.2, -0.9, 0.05])}
    masks = quiet_parameters(last, keep=0.6)
    np.testing.assert_array_equal(masks['a'], [0, 1])
    np.testing.assert_array_equal(masks['b'], [1, 0, 1])
    zeros = jax.tree.map(jnp.zeros_like, last)
    self.assertTrue(flat(quiet_parameters(zeros, keep=0.2)).all())

  def test_success_leaves_out_the_target_class(self):
    """2 of 3 images of other classes: y = (0, 1, 2, 2, 1), target 2."""
    predicted = jnp.array([2, 2, 2, 2, 0])

    def metrics(params, batch):
      hit = batch.data['label'] == predicted
      return {'accuracy': (hit.astype(float), batch.mask.astype(float))}

    predictor = with_attack_success(
      {'global': core.Predictor(metrics)},
      trigger=TRIGGERS['none'](),
      target=2,
    )['global']
    data = {
      'image': jnp.zeros((5, 4, 4)),
      'label': jnp.array([0, 1, 2, 2, 1]),
    }
    batch = Batch(data, jnp.ones(5, bool), evaluation_info(jnp.int32(0)))
    value, weight = predictor.metrics(None, batch)['attack_success']
    np.testing.assert_allclose((value * weight).sum() / weight.sum(), 2 / 3)
    self.assertEqual(float(weight.sum()), 3)


class TriggersTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'length': 6, 'gap': 3, 'rows': 4}, (32, 32, 3), 6, 24),
    ({}, (28, 28, 1), 4, 16),
  )
  def test_strips(self, settings, shape, each, union):
    trigger = TRIGGERS['strips'](**settings)
    black = jnp.zeros((1, *shape))
    parts = [np.asarray(trigger(black, j))[0, ..., 0] for j in range(4)]
    self.assertEqual([p.sum() for p in parts], [each] * 4)
    self.assertEqual(np.sum(parts, 0).max(), 1)
    whole = np.asarray(trigger(black, -1))[0]
    np.testing.assert_array_equal(whole[..., 0], np.sum(parts, 0))
    self.assertEqual(whole[..., 0].sum(), union)
    np.testing.assert_array_equal(whole, np.repeat(whole[..., :1], shape[2], 2))

  def test_strips_where_dba_has_them(self):
    """Rows {0, 4}, columns {0-5, 9-14} for CIFAR."""
    trigger = TRIGGERS['strips'](length=6, gap=3, rows=4)
    whole = np.asarray(trigger(jnp.zeros((1, 32, 32, 3)), -1))[0, ..., 0]
    places = {(r, c + o) for r in (0, 4) for o in (0, 9) for c in range(6)}
    self.assertEqual(set(zip(*np.nonzero(whole), strict=True)), places)

  def test_grid(self):
    whole = np.asarray(TRIGGERS['grid']()(jnp.zeros((1, 8, 8, 1)), -1))
    expected = np.zeros((8, 8))
    expected[4:7, 4:7] = [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    np.testing.assert_array_equal(whole[0, ..., 0], expected)

  def test_blend_and_sinusoid(self):
    got = blended(jnp.array([0.2, 0.8]), jnp.array([1.0, 0]), 0.1)
    np.testing.assert_allclose(got, [0.28, 0.72], rtol=1e-6)
    x = jnp.full((2, 6, 12, 3), 0.5)
    wave = np.asarray(TRIGGERS['sinusoid'](frequency=3)(x, -1))
    expected = 0.5 + 20 / 255 * np.sin(2 * np.pi * 3 * np.arange(12) / 12)
    np.testing.assert_allclose(wave[1, 4, :, 2], expected, atol=1e-6)
    blend = TRIGGERS['blend'](amount=0.2)
    np.testing.assert_array_equal(blend(x, 0), blend(x, -1))
    self.assertLess(float(jnp.abs(blend(x, 0) - x).max()), 0.1 + 1e-6)

  def test_warp_is_smooth_and_keeps_flat_images(self):
    trigger = TRIGGERS['warp']()
    flat_image = jnp.full((1, 16, 16, 1), 0.3)
    np.testing.assert_allclose(trigger(flat_image, -1), flat_image, atol=1e-6)
    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 16)[:, None], (16, 16))
    moved = np.asarray(trigger(ramp[None, ..., None], -1))[0, ..., 0]
    self.assertGreater(np.abs(moved - ramp).max(), 0.005)
    self.assertLess(np.abs(moved - ramp).max(), 0.15)

  def test_poison(self):
    """Pixels of bytes, of floats, with and without colours; the rest stays."""
    problem = make_problem()
    label = jnp.array([0, 1, 2, 0])
    for image in (
      np.full((4, 8, 8), 51, np.uint8),
      np.full((4, 8, 8, 3), 0.2, np.float32),
    ):
      data = {'image': jnp.asarray(image), 'label': label, 'more': label}
      batch = Batch(data, jnp.ones(4, bool), evaluation_info(jnp.int32(0)))
      got = poison(scenario(problem), batch, jnp.int32(1)).data
      np.testing.assert_array_equal(got['label'], [2, 2, 2, 0])
      self.assertEqual(got['image'].shape, image.shape)
      expected = np.full(image.shape, 0.2)
      expected[:2, 0, 3:5] = 1
      np.testing.assert_allclose(got['image'], expected, rtol=1e-6)
      self.assertIs(got['more'], label)

  @parameterized.parameters(('grid', {'size': 9}), ('strips', {'length': 4}))
  def test_triggers_that_do_not_fit(self, name, settings):
    with self.assertRaisesRegex(core.InvalidInput, 'at most 8x8'):
      TRIGGERS[name](**settings)(jnp.zeros((1, 8, 8, 1)), -1)

  @parameterized.parameters(
    ('constrain_and_scale', {'boost': 0.0}, 'boost'),
    ('constrain_and_scale', {'class_weight': 2.0}, 'class_weight'),
    ('neurotoxin', {'keep': 0.0}, 'keep'),
    ('projected', {'radius': 0.0}, 'radius'),
    ('bapfl', {'layer': 'Dense_9'}, 'layer'),
    ('bapfl', {'layer': 'Dense_1', 'noise': -1.0}, 'noise'),
  )
  def test_settings_out_of_range(self, name, settings, message):
    make_program: Callable = functools.partial(
      ATTACKS[name], scenario(make_problem())
    )
    with self.assertRaisesRegex(core.InvalidInput, message):
      make_program(**settings)


if __name__ == '__main__':
  absltest.main()
