"""FedLoGe and its baselines equal plain loops over clients, head by head.

In the loops every part of a model has an optimizer of its own and a gradient
of its own loss, written apart from each other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from fedjax_ext import core
from fedjax_ext.algorithms.ditto import ditto
from fedjax_ext.algorithms.fed_babu import fed_babu
from fedjax_ext.algorithms.fed_bn import fed_bn, norm_params, with_norms
from fedjax_ext.algorithms.fed_etf import fed_etf
from fedjax_ext.algorithms.fed_per import fed_per
from fedjax_ext.algorithms.fed_rep import fed_rep
from fedjax_ext.algorithms.fed_rod import fed_rod
from fedjax_ext.algorithms.fedloge import (
  PERSONAL,
  fed_loge,
  realign_global,
  realign_local,
)
from fedjax_ext.core.pooled import evaluation_info
from fedjax_ext.data import class_counts, from_client_column
from fedjax_ext.losses.headed import (
  HeadedTask,
  balanced_softmax,
  headed_task,
  mask_absent,
)
from fedjax_ext.models import MODELS
from fedjax_ext.models.heads import (
  apply_head,
  class_norms,
  make_backbone,
  simplex_etf,
)
from tests.problems import (
  SIZES,
  make_problem,
  real_batches,
  relative_error,
  tree_add,
  x64,
)

OPTIMIZER = optax.sgd(0.1, momentum=0.5)
PHASE = core.Phase(epochs=2, batch_size=4)
LAYOUTS = {
  '1x1': dict(num_devices=1, lanes=1),
  '3x2': dict(num_devices=3, lanes=2),
  '2x1 waves': dict(num_devices=2, lanes=1, wave_clients=4),
}


def cross_entropy(logits, label):
  picked = jnp.take_along_axis(logits, label[:, None], 1)[:, 0]
  return jnp.mean(jax.scipy.special.logsumexp(logits, axis=1) - picked)


def train(loss, part, batches):
  """SGD of one part on its own loss(part, batch), from fresh momentum."""
  state = OPTIMIZER.init(part)
  for batch in batches:
    updates, state = OPTIMIZER.update(jax.grad(loss)(part, batch), state, part)
    part = optax.apply_updates(part, updates)
  return part


class Setting:
  """The problem, its backbone, and what plain loops need of them."""

  def __init__(self, model='mlp'):
    double = jax.config.jax_enable_x64
    self.problem = make_problem(float64=double)
    settings = {'mlp': {'hidden': (6,)}, 'group_norm_cnn': {'widths': (4,)}}
    more = {'groups': 2} if model == 'group_norm_cnn' else {}
    self.backbone = make_backbone(
      MODELS[model], input_shape=(8, 8, 1), **settings[model], **more
    )
    task = headed_task(self.backbone, num_classes=3)
    cast = functools.partial(jax.tree.map, lambda x: x.astype(float))
    self.task = task._replace(
      init=lambda key: cast(task.init(key)) if double else task.init(key)
    )
    view = self.problem.federated
    self.counts = class_counts(
      view.features['label'][view.rows],
      view.owners(),
      num_clients=len(SIZES),
      num_classes=3,
    )
    rng = np.random.default_rng(5)
    self.classifier = 0.3 * simplex_etf(rng, self.backbone.num_features, 3)

  def h(self, body, image):
    return self.backbone.model.apply(body, image)


# Each plain client: (setting, shared, row, batches, counts) -> (shared, row).
# Parts that train at once keep their own momentum; all see old parts.


def plain_fed_loge(s, shared, row, batches, mine, head_batches):
  body, psi, phi = shared['body'], shared['head'], row
  states = [OPTIMIZER.init(part) for part in (body, psi, phi)]
  for image, label in batches:
    f = s.h(body, image)
    gradients = (
      jax.grad(
        lambda b, x=image, y=label: cross_entropy(s.h(b, x) @ s.classifier, y)
      )(body),
      jax.grad(lambda p, f=f, y=label: cross_entropy(apply_head(p, f), y))(psi),
      jax.grad(lambda p, f=f, y=label: cross_entropy(apply_head(p, f), y))(phi),
    )
    parts = []
    for i, (part, g) in enumerate(
      zip((body, psi, phi), gradients, strict=True)
    ):
      updates, states[i] = OPTIMIZER.update(g, states[i], part)
      parts.append(optax.apply_updates(part, updates))
    body, psi, phi = parts
  return shared | {'body': body, 'head': psi}, phi


def plain_model_loss(s):
  return lambda m, batch: cross_entropy(
    apply_head(m['head'], s.h(m['body'], batch[0])), batch[1]
  )


def plain_ditto(s, shared, row, batches, mine, head_batches):
  own = row['params'] if row['seen'] else shared
  loss = plain_model_loss(s)

  def near(m, batch):
    pairs = zip(jax.tree.leaves(m), jax.tree.leaves(shared), strict=True)
    return loss(m, batch) + 0.35 * sum(((a - b) ** 2).sum() for a, b in pairs)

  row = {'params': train(near, own, batches), 'seen': True}
  return train(loss, shared, batches), row


def plain_fed_per(s, shared, row, batches, mine, head_batches):
  both = train(
    lambda m, batch: cross_entropy(
      apply_head(m['head'], s.h(m['body'], batch[0])), batch[1]
    ),
    {'body': shared['body'], 'head': row},
    batches,
  )
  return {'body': both['body']}, both['head']


def plain_fed_rep(s, shared, row, batches, mine, head_batches):
  body = shared['body']
  row = train(
    lambda p, batch: cross_entropy(
      apply_head(p, s.h(body, batch[0])), batch[1]
    ),
    row,
    head_batches,
  )
  body = train(
    lambda b, batch: cross_entropy(apply_head(row, s.h(b, batch[0])), batch[1]),
    body,
    batches,
  )
  return {'body': body}, row


def plain_fed_babu(s, shared, row, batches, mine, head_batches):
  body = train(
    lambda b, batch: cross_entropy(
      apply_head(shared['head'], s.h(b, batch[0])), batch[1]
    ),
    shared['body'],
    batches,
  )
  return shared | {'body': body}, row


def plain_fed_rod(s, shared, row, batches, mine, head_batches):
  generic, phi = shared, row
  states = [OPTIMIZER.init(part) for part in (generic, phi)]
  log = jnp.where(mine > 0, jnp.log(jnp.maximum(mine, 1)), -1e30)
  for image, label in batches:
    f = s.h(generic['body'], image)
    z = apply_head(generic['head'], f)
    gradients = (
      jax.grad(
        lambda m, x=image, y=label: cross_entropy(
          apply_head(m['head'], s.h(m['body'], x)) + log, y
        )
      )(generic),
      jax.grad(
        lambda p, f=f, z=z, y=label: cross_entropy(z + apply_head(p, f), y)
      )(phi),
    )
    parts = []
    for i, (part, g) in enumerate(zip((generic, phi), gradients, strict=True)):
      updates, states[i] = OPTIMIZER.update(g, states[i], part)
      parts.append(optax.apply_updates(part, updates))
    generic, phi = parts
  return generic, phi


def plain_fed_etf(s, shared, row, batches, mine, head_batches):
  vectors = simplex_etf(np.random.default_rng(0), 3, 3)
  log = jnp.where(mine > 0, jnp.log(jnp.maximum(mine, 1)), -1e30)

  def loss(m, batch):
    p = apply_head(m['projection'], s.h(m['body'], batch[0]))
    p = p / jnp.sqrt((p**2).sum(-1, keepdims=True) + 1e-12)
    return cross_entropy(m['temperature'] * p @ vectors + log, batch[1])

  return train(loss, shared, batches), row


def plain_fed_bn(s, shared, row, batches, mine, head_batches):
  norms = row['norms'] if row['seen'] else norm_params(shared)
  trained = train(plain_model_loss(s), with_norms(shared, norms), batches)
  row = {'norms': norm_params(trained), 'seen': True}
  return with_norms(trained, norm_params(shared)), row


METHODS = {
  'fed_loge': (fed_loge, plain_fed_loge),
  'ditto': (ditto, plain_ditto),
  'fed_per': (fed_per, plain_fed_per),
  'fed_rep': (fed_rep, plain_fed_rep),
  'fed_babu': (fed_babu, plain_fed_babu),
  'fed_rod': (fed_rod, plain_fed_rod),
  'fed_etf': (fed_etf, plain_fed_etf),
  'fed_bn': (fed_bn, plain_fed_bn),
}


def build(name, setting, layout, **more):
  method = METHODS[name][0]
  if name == 'fed_loge':
    more = {'classifier': setting.classifier} | more
  if name == 'ditto':
    more = {'proximal_weight': 0.7} | more
  return method(
    setting.task,
    counts=setting.counts,
    client_optimizer=OPTIMIZER,
    layout=layout,
    phase=PHASE,
    **more,
  )


def states_of(algorithm):
  if algorithm.init_client is None:
    return None
  return core.make_client_states(
    algorithm.init_client, num_clients=len(SIZES), key=jax.random.key(9)
  )


def row_of(states, client):
  rows = states.gather(np.array([client]))
  return jax.tree.map(lambda x: x[0], rows)


class LoopTest(parameterized.TestCase):
  @parameterized.parameters(
    *(('fed_loge', layout) for layout in LAYOUTS),
    *((name, '3x2') for name in METHODS if name != 'fed_loge'),
  )
  def test_rounds(self, name, layout):
    with x64():
      s = Setting('group_norm_cnn' if name == 'fed_bn' else 'mlp')
      layout = core.make_layout(**LAYOUTS[layout])
      algorithm = build(name, s, layout)
      state, states = algorithm.init(jax.random.key(1)), states_of(algorithm)
      shared = jax.tree.map(np.asarray, state.params)
      rows = {}
      for round in (1, 2):
        clients = np.arange(len(SIZES))[round % 2 :: 2]
        clients = np.union1d(clients, [3, 5])  # one without examples, one of 1
        cohort = s.problem.cohort(algorithm, clients, layout, round=round)
        if states is not None:
          rows = {c: rows.get(c, row_of(states, c)) for c in range(len(SIZES))}
        state, states, _ = algorithm.apply(state, states, cohort)
        total, moved = 0, jax.tree.map(np.zeros_like, shared)
        for c in clients.tolist():
          batches = real_batches(s.problem, cohort.plans('train'), c)
          head_batches = (
            real_batches(s.problem, cohort.plans('head'), c)
            if 'head' in algorithm.plans
            else []
          )
          after, rows[c] = METHODS[name][1](
            s, shared, rows.get(c), batches, s.counts[c], head_batches
          )
          moved = tree_add(moved, tree_add(after, shared, -1.0), SIZES[c])
          total += SIZES[c]
        shared = tree_add(shared, moved, 1 / total)
        self.assertLess(relative_error(state.params, shared), 1e-9)
        if states is None:
          continue
        for c, row in rows.items():
          got = row_of(states, c)
          self.assertLess(relative_error(got, row), 1e-9, f'client {c}')

  def test_clients_who_stay_away_keep_their_heads_bit_for_bit(self):
    s, layout = Setting(), core.make_layout(num_devices=1)
    algorithm = build('fed_loge', s, layout)
    state, states = algorithm.init(jax.random.key(1)), states_of(algorithm)
    before = {c: row_of(states, c) for c in range(len(SIZES))}
    for round, clients in enumerate(([0, 2, 4], [4, 8]), 1):
      cohort = s.problem.cohort(algorithm, clients, layout, round=round)
      state, states, _ = algorithm.apply(state, states, cohort)
    for c in range(len(SIZES)):
      same = all(
        np.array_equal(a, b)
        for a, b in zip(
          jax.tree.leaves(before[c]),
          jax.tree.leaves(row_of(states, c)),
          strict=True,
        )
      )
      self.assertEqual(same, c not in (0, 2, 4, 8))

  def test_properties(self):
    """Any order of clients, any padding; what is fixed stays bit for bit."""
    s, layout = Setting(), core.make_layout(num_devices=1)
    common = dict(
      counts=s.counts,
      classifier=s.classifier,
      client_optimizer=OPTIMIZER,
      layout=layout,
      random_bias=True,
    )
    before = s.classifier.copy()
    results = []
    for clients, batch_size in (([0, 2, 4, 9], 4), ([9, 4, 0, 2], 4)):
      phase = PHASE._replace(batch_size=batch_size)
      algorithm = fed_loge(s.task, phase=phase, **common)
      state, states = algorithm.init(jax.random.key(1)), states_of(algorithm)
      bias = np.asarray(state.params['bias'])
      self.assertGreater(np.abs(bias).max(), 0)
      for round in (1, 2):
        cohort = s.problem.cohort(algorithm, clients, layout, round=round)
        state, states, _ = algorithm.apply(state, states, cohort)
      np.testing.assert_array_equal(state.params['bias'], bias)
      np.testing.assert_array_equal(s.classifier, before)
      results.append((state.params, states.gather(np.array([0, 9]))))
    self.assertLess(relative_error(*results), 1e-6)
    # One batch holds all of a client, padded to twice the longest or not.
    padded = []
    for batch_size in (33, 66):
      phase = PHASE._replace(batch_size=batch_size, shuffle=False)
      algorithm = fed_loge(s.task, phase=phase, **common)
      state, states = algorithm.init(jax.random.key(1)), states_of(algorithm)
      cohort = s.problem.cohort(algorithm, [1, 8, 12], layout)
      state, states, _ = algorithm.apply(state, states, cohort)
      padded.append((state.params, states.gather(np.array([1, 8, 12]))))
    self.assertLess(relative_error(*padded), 1e-5)


class StepTest(absltest.TestCase):
  def test_three_heads_by_hand(self):
    """Oracle T8: linear backbone W = I, x = (1, 2), y = 0, rate 0.1."""
    task = HeadedTask(
      num_features=2,
      num_classes=2,
      init=lambda key: {'w': jnp.eye(2)},
      features=lambda v, batch: (batch.data['image'] @ v['w'].T, ()),
      frozen_features=lambda v, batch: batch.data['image'] @ v['w'].T,
      labels=lambda batch: batch.data['label'],
      metrics=lambda logits, batch: {},
    )
    columns = {
      'image': np.array([[1.0, 2.0]], np.float32),
      'label': np.array([0], np.int32),
    }
    view = from_client_column(columns, np.array([0]))
    layout = core.make_layout(num_devices=1)
    algorithm = fed_loge(
      task,
      classifier=np.array([[0.1, -0.1], [0.0, 0.1]], np.float32),
      counts=np.array([[1, 0]]),
      client_optimizer=optax.sgd(0.1),
      layout=layout,
    )
    state = algorithm.init(jax.random.key(0))
    zero = jnp.zeros(2)
    psi = {'kernel': jnp.zeros((2, 2)), 'bias': zero}
    state = state._replace(params=state.params | {'head': psi})
    states = core.make_client_states(
      algorithm.init_client, num_clients=1, key=jax.random.key(0)
    )
    phi = {'kernel': 0.5 * np.eye(2)[None], 'bias': np.zeros((1, 2))}
    states = states.scatter(np.array([0]), phi)
    cohort = core.make_cohort(
      np.array([0]),
      round=1,
      seed=0,
      specs=algorithm.plans,
      data={'train': view},
      features=core.place_features(columns, layout),
      layout=layout,
    )
    state, states, metrics = algorithm.apply(state, states, cohort)
    # ln 2 of the fixed and of the auxiliary head, 0.974077 of the client's.
    self.assertAlmostEqual(
      float(metrics['train_loss']), 2 * np.log(2) + 0.974077, places=5
    )
    np.testing.assert_allclose(
      state.params['body']['w'], [[1.01, 0.02], [-0.005, 0.99]], atol=1e-6
    )
    np.testing.assert_allclose(
      state.params['head']['kernel'].T, [[0.05, 0.1], [-0.05, -0.1]], atol=1e-6
    )
    np.testing.assert_allclose(
      row_of(states, 0)['kernel'].T,
      [[0.562246, 0.124492], [-0.062246, 0.375508]],
      atol=1e-5,
    )


PSI = {
  'kernel': jnp.array([[3.0, 4], [0, 2], [1, 0]]).T,
  'bias': jnp.array([0.5, -0.5, 0]),
}
PHI = {
  'kernel': jnp.array([[6.0, 8], [0, 0.5], [3, 4]]).T,
  'bias': jnp.array([0.0, 0, 1]),
}
F = jnp.array([[1.0, 2.0]])


class RealignmentTest(parameterized.TestCase):
  def test_global(self):
    """Oracle T9."""
    got = realign_global(PSI, scale=1.7)
    np.testing.assert_allclose(
      got['kernel'].T, [[1.02, 1.36], [0, 1.7], [1.7, 0]], rtol=1e-6
    )
    np.testing.assert_allclose(apply_head(PSI, F), [[11.5, 3.5, 1.0]])
    np.testing.assert_allclose(
      apply_head(got, F), [[4.24, 2.9, 1.7]], rtol=1e-6
    )
    np.testing.assert_allclose(class_norms(got), 1.7, rtol=1e-6)
    again = realign_global(got, scale=1.7)
    np.testing.assert_allclose(again['kernel'], got['kernel'], rtol=1e-6)

  def test_exponent(self):
    same = realign_global(PSI, scale=1.0, exponent=0.0)
    np.testing.assert_array_equal(same['kernel'], PSI['kernel'])
    half = realign_global(PSI, scale=1.0, exponent=0.5)
    np.testing.assert_allclose(
      class_norms(half), np.sqrt(class_norms(PSI)), rtol=1e-6
    )

  def test_local(self):
    """Oracle T10."""
    got = realign_local(PSI, PHI)
    np.testing.assert_allclose(
      got['kernel'].T, [[30, 40], [0, 1], [5, 0]], rtol=1e-6
    )
    np.testing.assert_allclose(
      apply_head(got, F), [[110.5, 1.5, 5.0]], rtol=1e-6
    )

  @parameterized.parameters(
    ('local_plus_transfer', [132.5, 2.5, 17.0]),
    ('transfer_plus_global', [122.0, 5.0, 6.0]),
    ('transfer_only', [110.5, 1.5, 5.0]),
    ('local_plus_global', [33.5, 4.5, 13.0]),
    ('local', [22.0, 1.0, 12.0]),
  )
  def test_modes(self, mode, expected):
    got = PERSONAL[mode]({'head': PSI}, PHI, F)
    np.testing.assert_allclose(got, [expected], rtol=1e-6)


class LossesTest(absltest.TestCase):
  def test_balanced_softmax(self):
    """Oracle T11."""
    z, counts = jnp.array([[1.0, 0]]), jnp.array([90.0, 10.0])
    losses = [
      cross_entropy(balanced_softmax(z, counts), jnp.array([y])) for y in (0, 1)
    ]
    np.testing.assert_allclose(losses, [0.040062, 3.237287], atol=1e-5)
    absent = balanced_softmax(z, jnp.array([0.0, 10.0]))
    self.assertLess(absent[0, 0], -1e29)

  def test_masked_classes_are_never_predicted(self):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(50, 4)) * 1e6)
    got = mask_absent(z, jnp.array([3, 0, 1, 0])).argmax(-1)
    self.assertEqual(set(got.tolist()), {0, 2})


class PredictorsTest(absltest.TestCase):
  def test_metrics_by_hand(self):
    """Heads, masks and class weights against numpy, client by client."""
    s, layout = Setting(), core.make_layout(num_devices=1)
    test_counts = np.array([10, 20, 30])
    s.task = headed_task(s.backbone, num_classes=3, test_counts=test_counts)
    algorithm = build('fed_loge', s, layout, pm_mode='transfer_only')
    state, states = algorithm.init(jax.random.key(1)), states_of(algorithm)
    view = s.problem.federated
    report = core.evaluate(
      algorithm.predictors['personal'],
      state,
      states,
      data={'train': view},
      parts={'train': core.Part(np.arange(len(SIZES)), 'train')},
      features=core.place_features(view.features, layout),
      layout=layout,
    )['train']
    for place, c in enumerate(report.clients.tolist()):
      rows = view.client_rows(c)
      label = view.features['label'][rows]
      f = s.h(state.params['body'], jnp.asarray(view.features['image'][rows]))
      f = f.astype(jnp.float32)
      phi = row_of(states, c)
      for mode, logits in PERSONAL.items():
        ending = '' if mode == 'transfer_only' else f'_{mode}'
        z = np.asarray(logits(state.params, phi, f))
        kept = np.where(s.counts[c] > 0, z, -np.inf)
        for name, scores in (('', z), ('_masked', kept)):
          correct = scores.argmax(1) == label
          got = report.sums[f'accuracy{ending}{name}'][place]
          self.assertAlmostEqual(got, correct.sum(), delta=1e-3)
          weights = 20 / test_counts[label]
          got = report.sums[f'balanced_accuracy{ending}{name}'][place]
          self.assertAlmostEqual(got, (correct * weights).sum(), delta=1e-3)
    names = set(report.sums)
    self.assertContainsSubset(
      {'accuracy_global_realigned', 'accuracy_global_auxiliary_masked'}, names
    )

  def test_global_metrics(self):
    s, layout = Setting(), core.make_layout(num_devices=1)
    algorithm = build('fed_loge', s, layout)
    state = algorithm.init(jax.random.key(1))
    image = jnp.asarray(s.problem.federated.features['image'][:9], jnp.float32)
    label = jnp.asarray(s.problem.federated.features['label'][:9])
    batch = core.Batch(
      {'image': image, 'label': label},
      jnp.ones(9, bool),
      evaluation_info(jnp.int32(0)),
    )
    got = algorithm.predictors['global'].metrics(state.params, batch)
    f = s.h(state.params['body'], image)
    head = state.params['head']
    for ending, logits in (
      ('', apply_head(realign_global(head), f)),
      ('_auxiliary', apply_head(head, f)),
      ('_classifier', f @ s.classifier),
    ):
      np.testing.assert_array_equal(
        got[f'accuracy{ending}'][0], logits.argmax(-1) == label
      )


class BadInputTest(parameterized.TestCase):
  @parameterized.parameters(
    ('fed_loge', {'classifier': np.ones((3, 3))}, r'shape \[6, 3\]'),
    ('fed_loge', {'exponent': 2.0}, 'exponent=2.0'),
    ('fed_loge', {'scale': 0.0}, 'scale=0.0'),
    ('fed_loge', {'pm_mode': 'mine'}, 'pm_mode=mine'),
    ('ditto', {'proximal_weight': -1.0}, 'proximal_weight=-1.0'),
  )
  def test_refused(self, name, setting, message):
    layout = core.make_layout(num_devices=1)
    with self.assertRaisesRegex(core.InvalidInput, message):
      build(name, Setting(), layout, **setting)

  def test_fed_bn_needs_norms(self):
    layout = core.make_layout(num_devices=1)
    with self.assertRaisesRegex(core.InvalidInput, 'normalisation'):
      build('fed_bn', Setting('mlp'), layout)


if __name__ == '__main__':
  absltest.main()
