"""Mixed federated learning: exact quadratics, plain loops, limiting cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from fedjax_ext import core, data
from fedjax_ext.algorithms import MODES, ServerLoss, fed_avg, mixed_fl
from fedjax_ext.losses import (
  RetrievalLoss,
  item_table,
  quadratic_task,
  retrieval_task,
  table_regulariser,
)
from fedjax_ext.models import dual_encoder
from tests.problems import (
  SIZES,
  make_problem,
  plain_loss,
  real_batches,
  relative_error,
  tree_add,
  x64,
)

A = dict(curvatures=(1.0, 1.0), optima=(0.0, 4.0))
B = dict(curvatures=(1.0, 3.0), optima=(0.0, 4.0))
C = A | dict(server_curvature=5.0)
EVERYBODY = np.arange(len(SIZES))


@functools.cache
def compiled(mode, server, rate, x64_enabled, settings):
  """An algorithm without plans: what is compiled does not depend on them."""
  del x64_enabled
  settings = dict(settings)
  weight = settings.pop('central_weight', 1.0)
  loss = quadratic_task(1).loss
  features = None
  if mode == 'oracle':
    features = {'x': -4 * jnp.ones((1, 1)), 'curvature': 2 * jnp.ones(1)}
  return lambda phase, steps: mixed_fl(
    quadratic_task(1),
    mode=mode,
    server=ServerLoss(
      loss, optax.sgd(rate), steps, weight, server, 1, features
    ),
    client_optimizer=optax.sgd(rate),
    server_optimizer=optax.sgd(1.0),
    layout=core.make_layout(num_devices=1),
    phase=phase,
    **settings,
  )


class Quadratics:
  """Rounds of a mode on quadratics, x^0 = 0 unless told otherwise."""

  def __init__(
    self,
    mode,
    problem,
    *,
    steps=5,
    central_steps=None,
    rate=0.1,
    x0=0.0,
    batch_size=1,
    **settings,
  ):
    self.layout = core.make_layout(num_devices=1)
    columns = data.quadratic(**problem)
    dataset = data.make_dataset(columns, test_fraction=0.0)
    chosen = data.SERVER_DATA['client'](dataset)
    self.dataset, server = data.split_off_server(dataset, chosen)
    phase = core.Phase(
      epochs=1 if 'examples' in problem else steps, batch_size=batch_size
    )
    self.algorithm, plans = algorithm_of(
      mode,
      server,
      rate,
      settings,
      phase,
      central_steps or steps,
    )
    width = columns.features['x'].shape[1]
    w = jnp.full(width, x0, jnp.result_type(float))
    state = self.algorithm.init(jax.random.key(0))
    self.state = jax.tree.map(lambda x: jnp.broadcast_to(x, (width,)), state)
    self.state = self.state._replace(params={'w': w})
    self.algorithm = self.algorithm._replace(plans=plans)
    self.features = core.place_features(self.dataset.features, self.layout)
    self.rounds = 0

  def round(self):
    self.rounds += 1
    cohort = core.make_cohort(
      self.dataset.participating,
      round=self.rounds,
      seed=1,
      specs=self.algorithm.plans,
      data=self.dataset.splits,
      features=self.features,
      layout=self.layout,
    )
    self.state, _, self.metrics = self.algorithm.apply(self.state, None, cohort)
    return float(self.state.params['w'][0])

  def values(self, count):
    return [self.round() for _ in range(count)]

  def limit(self, rounds=60):
    return self.values(rounds)[-1]


@functools.cache
def first_of(mode, server, rate, x64_enabled, settings):
  make = compiled(mode, server, rate, x64_enabled, settings)
  return make(core.Phase(batch_size=1), 1)


def algorithm_of(mode, server, rate, settings, phase, steps):
  """A compiled algorithm that several tests share, and this one's plans."""
  key = (mode, server, rate, jax.config.jax_enable_x64)
  key += (tuple(sorted(settings.items())),)
  return first_of(*key), compiled(*key)(phase, steps).plans


class QuadraticTest(parameterized.TestCase):
  """The oracle values of the specification, in float64."""

  @parameterized.named_parameters(
    (
      'O1',
      'parallel_training',
      A,
      {},
      [-1.87026, -1.71721662, -1.72974016],
      -1.72879288,
    ),
    (
      'O1b',
      'parallel_training',
      A,
      dict(central_steps=1),
      [0.01902],
      0.03120539,
    ),
    ('O2', 'one_way', A, {}, [-2.45706, -1.89554808, -2.0238704], -2.0),
    (
      'O2b',
      'two_way',
      A,
      dict(gradients='fresh'),
      [-2.23701, -1.97191313, -2.00332843],
      -2.0,
    ),
    (
      'O2e',
      'two_way',
      A,
      dict(gradients='warm'),
      [-2.23701, -2.67890832, -2.09059348, -1.81774013],
      None,
    ),
    ('O3_PT', 'parallel_training', A, dict(steps=1, x0=0.7), [-0.11], None),
    ('O3_1W', 'one_way', A, dict(steps=1, x0=0.7), [-0.11], None),
    (
      'O3_2W',
      'two_way',
      A,
      dict(steps=1, x0=0.7, gradients='fresh'),
      [-0.11],
      None,
    ),
    ('O4', 'parallel_training', B, {}, [-1.02542], -0.79303038),
    ('O4b', 'one_way', B, {}, [-1.08342], -0.82859415),
    ('O4c', 'two_way', B, dict(gradients='fresh'), [-0.87787], -0.66199881),
    ('O5b', 'parallel_training', C, {}, [], -2.21727395),
    ('O5d', 'one_way', C, dict(steps=2), [], -3.0),
    ('O4f_PT', 'parallel_training', B, dict(steps=1), [], -0.5),
    ('O4f_1W', 'one_way', B, dict(steps=1), [], -0.5),
  )
  def test_rounds(self, mode, problem, settings, expected, limit):
    with x64():
      run = Quadratics(mode, problem, **settings)
      got = run.values(len(expected))
      np.testing.assert_allclose(got, expected, rtol=0, atol=6e-9)
      if limit is not None:
        self.assertAlmostEqual(run.limit(), limit, delta=6e-9)

  def test_stale_two_way_carries_the_gradients(self):
    # O2c, O2d
    expected = [
      (-0.93513, -1.63804, 5.37856),
      (-2.19039945, -3.37734196, 4.65789974),
      (-2.32677415, -4.27500765, 3.5399487),
    ]
    with x64():
      run = Quadratics('two_way', A)
      for x, g_f, g_c in expected:
        got = run.round()
        self.assertAlmostEqual(got, x, delta=6e-9)
        state = run.state
        self.assertAlmostEqual(
          float(state.federated_gradient['w'][0]), g_f, delta=6e-9
        )
        self.assertAlmostEqual(
          float(state.central_gradient['w'][0]), g_c, delta=6e-9
        )
      self.assertAlmostEqual(run.limit(200), -2.0, delta=1e-8)
      self.assertAlmostEqual(
        float(run.state.federated_gradient['w'][0]), -4.0, delta=1e-7
      )
      self.assertAlmostEqual(
        float(run.state.central_gradient['w'][0]), 4.0, delta=1e-7
      )

  @parameterized.named_parameters(
    ('PT_.05', 'parallel_training', 0.05, -0.156184),
    ('PT_.01', 'parallel_training', 0.01, -0.0323),
    ('PT_.001', 'parallel_training', 0.001, -0.003248),
    ('1W_.05', 'one_way', 0.05, -0.165099),
    ('1W_.01', 'one_way', 0.01, -0.032652),
    ('1W_.001', 'one_way', 0.001, -0.003252),
  )
  def test_bias_shrinks_with_the_rate(self, mode, rate, expected):
    # O4d, O4e: x* = -0.5; a round contracts by rho, so the limit is x + step /
    # (1 - rho) of an affine map.
    with x64():
      run = Quadratics(mode, B, rate=rate)
      first, second, third = run.values(3)
      rho = (third - second) / (second - first)
      limit = second + (third - second) / (1 - rho)
    self.assertAlmostEqual(limit + 0.5, expected, delta=6e-7)

  @parameterized.product(
    case=(
      ('one_way', {1: 0.4, 5: -1.45706, 10: -2.907929, 20: -4.270540}),
      (
        'parallel_training',
        {1: 0.4, 5: -0.37826, 10: -0.650345, 20: -0.878422},
      ),
      ('two_way', {1: 0.4, 5: -0.80978, 10: -1.553379, 20: -2.235269}),
    )
  )
  def test_contraction_factors(self, case):
    # O5 to O5c
    mode, factors = case
    settings = dict(gradients='fresh') if mode == 'two_way' else {}
    with x64():
      for steps, expected in factors.items():
        run = Quadratics(mode, C, steps=steps, **settings)
        first, second, third = run.values(3)
        got = (third - second) / (second - first)
        self.assertAlmostEqual(got, expected, delta=6e-7)

  @parameterized.parameters(
    (2.0, 0.0), (0.0, 0.090402), (-4.0, 0.271207), (-8.0, 0.452012)
  )
  def test_similarity_sweep(self, optimum, bias):
    problem = A | dict(server_optimum=optimum)
    best = (4 / 2 + 2 * optimum) / 3
    with x64():
      parallel = Quadratics('parallel_training', problem).limit()
      one_way = Quadratics('one_way', problem).limit()
    self.assertAlmostEqual(abs(parallel - best), bias, delta=6e-7)
    self.assertAlmostEqual(one_way, best, delta=1e-9)

  def test_unequal_work(self):
    problem = A | dict(examples=(10, 30))
    with x64():
      run = Quadratics('one_way', problem, batch_size=10, central_steps=1)
      self.assertAlmostEqual(run.round(), -1.013, delta=6e-9)
      self.assertAlmostEqual(run.limit(), -1.47937203, delta=6e-9)

  def test_noise(self):
    # One noisy central batch a step (PT), or one for all steps (1W).
    tiny = 1e-6
    problem = dict(
      curvatures=(tiny, tiny),
      optima=(0.0, 0.0),
      server_curvature=tiny,
      server_optimum=0.0,
      server_examples=64,
      noise=1.0,
      num_features=20_000,
    )
    for mode, central_steps, expected in (
      ('parallel_training', 8, 0.08),
      ('one_way', 1, 0.64),
      ('one_way', 8, 0.08),  # as many central examples as PT: as much noise
    ):
      run = Quadratics(mode, problem, steps=8, central_steps=central_steps)
      run.round()
      got = float(np.var(np.asarray(run.state.params['w'])))
      self.assertAlmostEqual(got / expected, 1.0, delta=0.05)

  def test_oracle_steps_on_both(self):
    with x64():
      run = Quadratics('oracle', A)
      # K steps on the sum of f_i and f_c for each client, then the mean.
      x = 0.0
      for _ in range(3):
        ends = []
        for optimum in (0.0, 4.0):
          y = x
          for _ in range(5):
            y -= 0.1 * ((y - optimum) + 2 * (y + 4))
          ends.append(y)
        x = np.mean(ends)
        self.assertAlmostEqual(run.round(), x, delta=1e-9)

  def test_single_sources(self):
    with x64():
      self.assertAlmostEqual(Quadratics('fed_only', A).limit(), 2.0, delta=1e-9)
      central = Quadratics('central_only', A)
      self.assertAlmostEqual(central.limit(), -4.0, delta=1e-9)
      self.assertEqual(set(central.algorithm.plans), {'server'})

  def test_weights_scale_the_losses(self):
    with x64():
      run = Quadratics('one_way', A, federated_weight=0.5, central_weight=0.25)
      best = (0.5 * 2 + 0.25 * 2 * -4) / (0.5 + 0.25 * 2)
      self.assertAlmostEqual(run.limit(200), best, delta=1e-8)
      # The logged loss is f_f itself.
      x = float(run.state.params['w'][0])
      losses, y = [], x
      for optimum in (0.0, 4.0):
        y = x
        for _ in range(5):
          losses.append((y - optimum) ** 2 / 2)
          y -= 0.1 * (0.5 * (y - optimum) + 0.25 * 2 * (x + 4))
      run.round()
      self.assertAlmostEqual(
        float(run.metrics['train_loss']), np.mean(losses), delta=1e-6
      )

  def test_debug_is_the_same(self):
    for mode in ('one_way', 'two_way', 'oracle'):
      with x64():
        fast = Quadratics(mode, B).values(3)
        slow = Quadratics(mode, B, debug=True).values(3)
      np.testing.assert_allclose(slow, fast, rtol=1e-12)


def split_problem(float64=True):
  """Ragged image clients; a third of their rows at the server."""
  problem = make_problem('mlp', float64=float64)
  federated = problem.federated
  dataset = data.FederatedDataset(
    'made',
    {'train': federated},
    np.flatnonzero(federated.sizes() > 0),
    {},
    3,
  )
  chosen = np.random.default_rng(5).random(len(federated.rows)) < 0.33
  return problem, *data.split_off_server(dataset, chosen)


class PlainLoopTest(parameterized.TestCase):
  """Three rounds against a loop over clients, in float64."""

  @parameterized.product(
    mode=(
      'parallel_training',
      'one_way',
      'two_way',
      'fed_only',
      'central_only',
    ),
    layout=(
      dict(num_devices=1, lanes=1),
      dict(num_devices=3, lanes=2, wave_clients=5),
    ),
  )
  def test_rounds(self, mode, layout):
    with x64():
      problem, dataset, server = split_problem()
      layout = core.make_layout(**layout)
      phase = core.Phase(epochs=2, batch_size=4)
      algorithm = mixed_fl(
        problem.task,
        mode=mode,
        server=ServerLoss(
          problem.task.loss, optax.sgd(0.05), 3, 0.4, server, 5
        ),
        client_optimizer=optax.sgd(0.1),
        server_optimizer=optax.sgd(0.7),
        layout=layout,
        phase=phase,
        federated_weight=0.6,
      )
      features = core.place_features(dataset.features, layout)
      state = algorithm.init(jax.random.key(0))
      x = jax.tree.map(np.asarray, state.params)
      zeros = jax.tree.map(np.zeros_like, x)
      g_f, g_c = zeros, zeros
      clients = dataset.participating
      for round in (1, 2, 3):
        cohort = core.make_cohort(
          clients,
          round=round,
          seed=2,
          specs=algorithm.plans,
          data=dataset.splits,
          features=features,
          layout=layout,
        )
        batches = lambda plan, client: real_batches(
          problem._replace(federated=dataset.splits['train']),
          cohort.plans(plan),
          client,
        )
        x, g_f, g_c = self.loop(
          mode, problem, dataset, server, batches, x, g_f, g_c
        )
        state, _, _ = algorithm.apply(state, None, cohort)
        self.assertLess(relative_error(state.params, x), 1e-9)
      if mode == 'two_way':
        self.assertLess(relative_error(state.central_gradient, g_c), 1e-9)
        self.assertLess(relative_error(state.federated_gradient, g_f), 1e-9)

  def loop(self, mode, problem, dataset, server, batches, x, g_f, g_c):
    zeros = jax.tree.map(np.zeros_like, x)

    def gradient(params, batch):
      return plain_loss(problem.model)(params, *batch)[1]

    def local(plan, client, weight, rate, extra):
      params, raw, mine = x, zeros, batches(plan, client)
      for batch in mine:
        g = jax.tree.map(lambda v: weight * v, gradient(params, batch))
        raw = tree_add(raw, g, 1 / len(mine))
        params = tree_add(params, tree_add(g, extra), -rate)
      return tree_add(params, x, -1.0), raw

    if mode == 'one_way':
      g_c = zeros
      for batch in batches('server', server):
        g_c = tree_add(g_c, gradient(x, batch), 0.4 / 3)
    send = g_c if mode in ('one_way', 'two_way') else zeros
    d_f, new_f, total = zeros, zeros, 0
    if mode != 'central_only':
      sizes = dataset.splits['train'].sizes()
      total = sizes[dataset.participating].sum()
      for client in dataset.participating:
        delta, raw = local('train', client, 0.6, 0.1, send)
        d_f = tree_add(d_f, delta, sizes[client] / total)
        new_f = tree_add(new_f, raw, sizes[client] / total)
    d_c = zeros
    if mode not in ('one_way', 'fed_only'):
      own = g_f if mode == 'two_way' else zeros
      d_c, new_c = local('server', server, 0.4, 0.05, own)
    beta = (0.5, 0.5) if mode == 'two_way' else (1.0, 1.0)
    x = tree_add(tree_add(x, d_f, 0.7 * beta[0]), d_c, 0.7 * beta[1])
    if mode == 'two_way':
      return x, new_f, new_c
    return x, g_f, g_c

  @parameterized.parameters('parallel_training', 'one_way')
  def test_without_the_server_loss_it_is_fed_avg(self, mode):
    problem, dataset, server = split_problem(float64=False)
    layout = core.make_layout(num_devices=2, lanes=2)
    settings = dict(
      client_optimizer=optax.sgd(0.1, momentum=0.9),
      server_optimizer=optax.adam(0.01),
      layout=layout,
      phase=core.Phase(epochs=2, batch_size=4),
    )
    mixed = mixed_fl(
      problem.task,
      mode=mode,
      server=ServerLoss(problem.task.loss, optax.sgd(0.1), 3, 0.0, server, 5),
      **settings,
    )
    plain = fed_avg(problem.task, **settings)
    results = []
    for algorithm in (mixed, plain):
      state = algorithm.init(jax.random.key(0))
      for round in (1, 2):
        cohort = core.make_cohort(
          dataset.participating,
          round=round,
          seed=2,
          specs=algorithm.plans,
          data=dataset.splits,
          features=core.place_features(dataset.features, layout),
          layout=layout,
        )
        state, _, _ = algorithm.apply(state, None, cohort)
      results.append(state.params)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
      np.testing.assert_array_equal(a, b)

  def test_two_way_with_another_client_optimizer_keeps_raw_gradients(self):
    # With rates 0 nobody moves: gradients are those at the first model.
    with x64():
      run = Quadratics('two_way', A, merge_weights=(0.0, 0.0))
      run.round()
      x, raw = [0.0, 0.0], []
      for i, optimum in enumerate((0.0, 4.0)):
        mine = []
        for _ in range(5):
          mine.append(x[i] - optimum)
          x[i] -= 0.1 * mine[-1]
        raw.append(np.mean(mine))
      self.assertAlmostEqual(
        float(run.state.federated_gradient['w'][0]), np.mean(raw), delta=1e-9
      )

  def test_an_absent_cohort_keeps_the_estimate(self):
    with x64():
      run = Quadratics('two_way', A)
      run.round()
      before = run.state
      run.dataset = run.dataset.__class__(
        run.dataset.name,
        run.dataset.splits,
        np.zeros(0, np.int64),
        run.dataset.parts,
        run.dataset.num_classes,
      )
      run.round()
      np.testing.assert_array_equal(
        run.state.federated_gradient['w'], before.federated_gradient['w']
      )
      self.assertTrue(np.isfinite(run.state.params['w']).all())


class RegulariserTest(parameterized.TestCase):
  """A server loss without data: the spreadout of an item table."""

  def setUp(self):
    super().setUp()
    self.columns = data.synthetic_retrieval(
      num_items=30, num_genres=3, num_clients=8, timeline=9
    )
    self.dataset = data.make_dataset(self.columns)
    self.encoder = dual_encoder(num_classes=31, input_shape=(10,))
    self.layout = core.make_layout(num_devices=1)

  def rounds(self, mode, count=2, loss=None, **settings):
    loss = loss or (
      lambda params, batch: table_regulariser(params['items'], spreadout=0.01)
    )
    settings = dict(phase=core.Phase(steps=1, batch_size=8)) | settings
    algorithm = mixed_fl(
      retrieval_task(self.encoder, RetrievalLoss('hinge')),
      mode=mode,
      server=ServerLoss(loss, optax.sgd(0.5), steps=1),
      client_optimizer=optax.sgd(0.5),
      server_optimizer=optax.sgd(1.0),
      layout=self.layout,
      **settings,
    )
    state = algorithm.init(jax.random.key(0))
    features = core.place_features(self.dataset.features, self.layout)
    for round in range(1, count + 1):
      cohort = core.make_cohort(
        self.dataset.participating,
        round=round,
        seed=2,
        specs=algorithm.plans,
        data=self.dataset.splits,
        features=features,
        layout=self.layout,
      )
      state, _, metrics = algorithm.apply(state, None, cohort)
    self.metrics, self.state = metrics, state
    return state.params

  def test_one_step_is_one_step_in_every_mode(self):
    expected = self.rounds('client_side')
    for mode in ('parallel_training', 'one_way', 'oracle'):
      self.assertLess(relative_error(self.rounds(mode), expected), 1e-5)

  def test_sparse_clients_are_the_same(self):
    phase = core.Phase(epochs=1, batch_size=4)
    dense = self.rounds('parallel_training', phase=phase)
    sparse = self.rounds(
      'parallel_training', phase=phase, tables=(item_table(self.encoder),)
    )
    self.assertLess(relative_error(sparse, dense), 1e-5)
    self.assertIn('central_loss', self.metrics)

  @parameterized.parameters('parallel_training', 'one_way', 'two_way')
  def test_a_server_that_is_not_finite_counts_as_absent(self, mode):
    sound = self.rounds('fed_only', count=1)
    broken = lambda params, batch: jnp.nan * params['items'].sum()
    got = self.rounds(mode, count=1, loss=broken)
    self.assertEqual(int(self.metrics['centre_dropped']), 1)
    # PT and 1W: clients alone; 2W: half of what they do, and no gradient.
    for leaf in jax.tree.leaves(got):
      self.assertTrue(np.isfinite(leaf).all())
    if mode == 'two_way':
      for leaf in jax.tree.leaves(self.state.central_gradient):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
    else:
      self.assertLess(relative_error(got, sound), 1e-6)

  def test_sparse_clients_need_a_mode_without_augmentation(self):
    for mode in ('one_way', 'two_way', 'client_side'):
      with self.assertRaisesRegex(core.InvalidInput, f'for mode={mode}'):
        self.rounds(mode, tables=(item_table(self.encoder),))


class ErrorTest(absltest.TestCase):
  def make(self, **settings):
    task, sgd = quadratic_task(1), optax.sgd(0.1)
    settings = (
      dict(mode='one_way', server=ServerLoss(task.loss, sgd, 1, client=0))
      | settings
    )
    return mixed_fl(
      task,
      client_optimizer=sgd,
      server_optimizer=sgd,
      layout=core.make_layout(num_devices=1),
      **settings,
    )

  def test_messages(self):
    loss = quadratic_task(1).loss
    for settings, message in (
      (dict(mode='three_way'), 'got mode=three_way'),
      (
        dict(server=ServerLoss(loss, optax.sgd(0.1), 0)),
        'steps of the server=0',
      ),
      (dict(gradients='fresh'), 'mode=two_way for gradients=fresh'),
      (dict(gradients='old'), 'got gradients=old'),
      (dict(weighting='equal'), 'got weighting=equal'),
      (dict(mode='client_side'), 'mode=oracle'),
      (dict(mode='oracle'), 'features of the server'),
    ):
      with self.assertRaisesRegex(core.InvalidInput, message):
        self.make(**settings)

  def test_modes_have_names(self):
    self.assertLen(MODES, 7)


if __name__ == '__main__':
  absltest.main()
