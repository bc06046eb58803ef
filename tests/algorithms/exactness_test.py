"""A round of every algorithm equals a plain Python loop over its clients.

The loops (tests/problems.py) see real examples only. They take the order of the
examples from the plan, whose content core/plans_test.py checks on its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from fedjax_ext import core
from fedjax_ext.algorithms import (
  fed_avg,
  fed_prox,
  local_training,
  scaffold,
  with_fine_tuning,
)
from fedjax_ext.core.plans import client_batches
from tests.problems import (
  SIZES,
  is_finite,
  make_problem,
  plain_loss,
  plain_step,
  real_batches,
  relative_error,
  tree_add,
  x64,
)

EVERYBODY = tuple(range(len(SIZES)))
POISONED = 8
# Lanes and devices that divide the 19 clients and ones that do not, and waves.
LAYOUTS = {
  '1x1': dict(num_devices=1, lanes=1),
  '1x4': dict(num_devices=1, lanes=4),
  '3x2': dict(num_devices=3, lanes=2),
  '2x1 waves': dict(num_devices=2, lanes=1, wave_clients=4),
  '8x16': dict(num_devices=8, lanes=16),
}
PHASES = {
  'mask': core.Phase(epochs=2, batch_size=4),
  'drop': core.Phase(epochs=2, batch_size=4, remainder='drop'),  # zero steps
  'fill': core.Phase(epochs=2, batch_size=4, remainder='fill'),
  'steps': core.Phase(steps=3, batch_size=4),
  'cap': core.Phase(epochs=1, batch_size=4, max_examples=6),
}
RATE, MU = 0.1, 0.3


class Local(NamedTuple):
  params: object
  steps: int
  loss: float


def local_steps(problem, plans, client, params, optimizer, extra=None) -> Local:
  """Local training of one client, batch after batch.

  extra: params -> gradient added to the loss's.
  """
  state, steps, losses = optimizer.init(params), 0, 0.0
  for image, label in real_batches(problem, plans, client):
    value, grads = plain_loss(problem.model)(params, image, label)
    if extra is not None:
      grads = jax.tree.map(jnp.add, grads, extra(params))
    params, state = plain_step(optimizer)(grads, state, params)
    steps += 1
    losses += float(value) * len(label)
  return Local(params, steps, losses)


def examples(problem, phase, client) -> int:
  size = len(problem.federated.client_rows(client))
  return min(size, phase.max_examples or size)


def mean_delta(before, results, weights):
  """Weighted mean of after - before over the finite results."""
  kept = [(r, w) for r, w in zip(results, weights, strict=True) if is_finite(r)]
  total = sum(w for _, w in kept)
  mean = jax.tree.map(np.zeros_like, before)
  for result, weight in kept:
    mean = tree_add(mean, tree_add(result, before, -1.0), weight / total)
  return mean


class Case:
  """One problem, layout and phase; runs rounds and oracles."""

  def __init__(
    self,
    model,
    layout,
    phase,
    *,
    float64=True,
    clients=EVERYBODY,
    poison=(POISONED,),
  ):
    self.problem = make_problem(model, float64=float64, poison=poison)
    self.layout = core.make_layout(**LAYOUTS[layout])
    self.phase = PHASES[phase]
    self.clients = np.array(clients)

  def cohort(self, algorithm, round=1):
    return self.problem.cohort(
      algorithm, self.clients, self.layout, round=round
    )

  def states(self, algorithm):
    if algorithm.init_client is None:
      return None
    return core.make_client_states(
      algorithm.init_client, num_clients=len(SIZES), key=jax.random.key(9)
    )

  def loop(self, cohort, params, optimizer, extra=None):
    return [
      local_steps(
        self.problem, cohort.plans('train'), c, params, optimizer, extra
      )
      for c in cohort.clients
    ]

  def weights(self):
    return [examples(self.problem, self.phase, c) for c in self.clients]


class Checks(parameterized.TestCase):
  """The comparisons, for float64 and float32."""

  def assert_close(self, got, expected, tolerance):
    error = relative_error(got, expected)
    self.assertLess(error, tolerance)

  def check_fed_avg(
    self,
    case,
    tolerance,
    *,
    client=None,
    server=None,
    weighting='examples',
    rounds=2,
  ):
    client = client or optax.sgd(RATE)
    server = server or optax.sgd(1.0)
    algorithm = fed_avg(
      case.problem.task,
      client_optimizer=client,
      server_optimizer=server,
      layout=case.layout,
      phase=case.phase,
      weighting=weighting,
    )
    state = algorithm.init(jax.random.key(1))
    params, server_state = state.params, server.init(state.params)
    for round in range(1, rounds + 1):
      cohort = case.cohort(algorithm, round)
      state, _, metrics = algorithm.apply(state, None, cohort)
      local = case.loop(cohort, params, client)
      weights = case.weights()
      if weighting == 'uniform':
        weights = [min(w, 1) for w in weights]
      delta = mean_delta(params, [r.params for r in local], weights)
      updates, server_state = server.update(
        jax.tree.map(lambda x: -jnp.asarray(x), delta), server_state, params
      )
      params = optax.apply_updates(params, updates)
      self.assert_close(state.params, params, tolerance)
      dropped = sum(not is_finite(r.params) for r in local)
      self.assertEqual(int(metrics['clients_dropped']), dropped)
      kept = [r for r in local if is_finite(r.params)]
      seen = [
        sum(
          len(label)
          for _, label in real_batches(case.problem, cohort.plans('train'), c)
        )
        for c, r in zip(cohort.clients, local, strict=True)
        if is_finite(r.params)
      ]
      np.testing.assert_allclose(
        metrics['train_loss'],
        sum(r.loss for r in kept) / sum(seen),
        rtol=max(tolerance, 1e-7),
      )
    return dropped

  def check_scaffold(self, case, tolerance, rounds=3, float_rate=0.7):
    algorithm = scaffold(
      case.problem.task,
      client_learning_rate=RATE,
      server_learning_rate=float_rate,
      num_clients=len(SIZES),
      layout=case.layout,
      phase=case.phase,
    )
    state, states = algorithm.init(jax.random.key(1)), case.states(algorithm)
    x = jax.tree.map(np.asarray, state.params)
    c = jax.tree.map(np.zeros_like, x)
    own = {i: c for i in EVERYBODY}
    for round in range(1, rounds + 1):
      case.clients = np.array(EVERYBODY)[round % 2 :: 2]
      case.clients = np.union1d(case.clients, [3, POISONED])
      cohort = case.cohort(algorithm, round)
      state, states, _ = algorithm.apply(state, states, cohort)
      deltas, control_deltas = [], []
      for i in cohort.clients:
        correction = tree_add(c, own[i], -1.0)
        local = local_steps(
          case.problem,
          cohort.plans('train'),
          i,
          jax.tree.map(jnp.asarray, x),
          optax.sgd(RATE),
          lambda _, correction=correction: correction,
        )
        if not is_finite(local.params):
          continue
        deltas.append(tree_add(local.params, x, -1.0))
        new = own[i]
        if local.steps:
          new = tree_add(
            tree_add(own[i], c, -1.0), deltas[-1], -1.0 / (local.steps * RATE)
          )
        control_deltas.append(tree_add(new, own[i], -1.0))
        own[i] = new
      count = len(deltas)
      for d, dc in zip(deltas, control_deltas, strict=True):
        x = tree_add(x, d, float_rate / count)
        c = tree_add(c, dc, 1.0 / len(SIZES))
      self.assert_close(state.params, x, tolerance)
      self.assert_close(state.control, c, tolerance)
    rows = states.gather(np.array(EVERYBODY))
    for i in EVERYBODY:
      self.assert_close(
        jax.tree.map(lambda r, i=i: r[i], rows), own[i], tolerance
      )


class ExactnessTest(Checks):
  @parameterized.product(layout=list(LAYOUTS), phase=list(PHASES))
  def test_fed_avg_softmax(self, layout, phase):
    with x64():
      case = Case('softmax_regression', layout, phase)
      dropped = self.check_fed_avg(case, 1e-9)
      # A cap or a dropped remainder may leave the poisoned example out.
      self.assertIn(
        dropped,
        {'mask': [1], 'fill': [1], 'drop': [0, 1], 'steps': [0, 1], 'cap': [0]}[
          phase
        ],
      )

  @parameterized.parameters(*LAYOUTS)
  def test_fed_avg_mlp(self, layout):
    with x64():
      self.check_fed_avg(Case('mlp', layout, 'mask'), 1e-9)

  @parameterized.parameters('1x1', '3x2')
  def test_fed_avg_cnn(self, layout):
    with x64():
      case = Case('emnist_cnn', layout, 'mask', clients=(1, 3, 5, 8, 9))
      self.check_fed_avg(case, 1e-9, rounds=1)

  @parameterized.named_parameters(
    ('momentum', optax.sgd(0.05, momentum=0.9), optax.sgd(1.0, momentum=0.9)),
    ('fedadam', None, optax.adam(0.1, b2=0.99, eps=1e-3)),
    ('fedyogi', None, optax.yogi(0.1, b2=0.99, eps=1e-3)),
    (
      'fedadagrad',
      None,
      optax.adagrad(0.1, initial_accumulator_value=0.0, eps=1e-3),
    ),
    ('client_adam', optax.adam(0.01), None),
  )
  def test_fed_avg_optimizers(self, client, server):
    with x64():
      case = Case('mlp', '3x2', 'mask')
      self.check_fed_avg(case, 1e-9, client=client, server=server, rounds=3)

  def test_fed_avg_uniform_weights(self):
    with x64():
      self.check_fed_avg(Case('mlp', '1x4', 'mask'), 1e-9, weighting='uniform')

  @parameterized.parameters('1x1', '1x4', '2x1 waves')
  def test_fed_prox(self, layout):
    with x64():
      case = Case('mlp', layout, 'mask')
      client = optax.sgd(RATE, momentum=0.5)
      algorithm = fed_prox(
        case.problem.task,
        proximal_weight=MU,
        client_optimizer=client,
        server_optimizer=optax.sgd(1.0),
        layout=case.layout,
        phase=case.phase,
      )
      state = algorithm.init(jax.random.key(1))
      params = state.params
      for round in (1, 2):
        cohort = case.cohort(algorithm, round)
        state, _, _ = algorithm.apply(state, None, cohort)
        anchor = params
        pull = lambda x, anchor=anchor: jax.tree.map(
          lambda a, b: MU * (a - b), x, anchor
        )
        local = case.loop(cohort, params, client, pull)
        delta = mean_delta(params, [r.params for r in local], case.weights())
        params = tree_add(params, delta)
        self.assert_close(state.params, params, 1e-9)

  @parameterized.product(layout=list(LAYOUTS), phase=['mask', 'drop'])
  def test_scaffold(self, layout, phase):
    with x64():
      case = Case('softmax_regression', layout, phase)
      self.check_scaffold(case, 1e-9)

  def test_scaffold_mlp(self):
    with x64():
      self.check_scaffold(Case('mlp', '3x2', 'mask'), 1e-9)

  @parameterized.product(layout=list(LAYOUTS))
  def test_local_training(self, layout):
    with x64():
      case = Case('mlp', layout, 'mask')
      algorithm = local_training(
        case.problem.task,
        client_optimizer=optax.sgd(RATE),
        layout=case.layout,
        phase=case.phase,
      )
      first = algorithm.init(jax.random.key(1))
      states = case.states(algorithm)
      own = {i: first for i in EVERYBODY}
      for round in (1, 2, 3):
        case.clients = np.union1d(EVERYBODY[round % 2 :: 2], [POISONED])
        cohort = case.cohort(algorithm, round)
        same, states, _ = algorithm.apply(first, states, cohort)
        jax.tree.map(np.testing.assert_array_equal, same, first)
        for i in cohort.clients:
          local = local_steps(
            case.problem, cohort.plans('train'), i, own[i], optax.sgd(RATE)
          )
          if is_finite(local.params):
            own[i] = local.params
      rows = states.gather(np.array(EVERYBODY))
      for i in EVERYBODY:
        model = jax.tree.map(lambda r, i=i: r[i], rows['params'])
        if rows['seen'][i]:
          self.assert_close(model, own[i], 1e-9)
      self.assertFalse(rows['seen'][POISONED])
      self.check_personal_report(case, algorithm, first, states, own)

  def check_personal_report(self, case, algorithm, shared, states, own):
    report = core.evaluate(
      algorithm.predictors['personal'],
      shared,
      states,
      data=case.problem.splits,
      parts={'all': core.Part(np.array([0, 1, 3, 5]), 'train')},
      features=core.place_features(
        case.problem.federated.features, case.layout
      ),
      layout=case.layout,
      batch_size=4,
    )['all']
    self.assertEqual(report.clients.tolist(), [0, 1, 5])  # 3 is empty
    for at, i in enumerate(report.clients):
      self.check_score(case, own[i], i, report, at)

  def check_score(self, case, params, client, report, at):
    own = case.problem.federated.client(client)
    logits = case.problem.model.apply(params, jnp.asarray(own['image']))
    self.assertEqual(
      report.sums['accuracy'][at],
      (np.argmax(logits, 1) == own['label']).sum(),
    )
    loss, _ = plain_loss(case.problem.model)(params, own['image'], own['label'])
    np.testing.assert_allclose(
      report.sums['loss'][at], float(loss) * len(own['label']), rtol=1e-9
    )

  @parameterized.parameters(*LAYOUTS)
  def test_fine_tuning(self, layout):
    """The reported model is the global one after the client's own steps."""
    with x64():
      case = Case('mlp', layout, 'mask', poison=())
      optimizer = optax.sgd(0.05)
      algorithm = with_fine_tuning(
        fed_avg(
          case.problem.task,
          client_optimizer=optax.sgd(RATE),
          server_optimizer=optax.sgd(1.0),
          layout=case.layout,
          phase=case.phase,
        ),
        case.problem.task,
        optimizer=optimizer,
        phase=core.Phase(epochs=2, batch_size=4),
      )
      self.assertEqual(list(algorithm.predictors), ['fine_tuned', 'global'])
      state = algorithm.init(jax.random.key(1))
      clients = np.array([0, 1, 4, 5, 9])
      settings = dict(
        data=case.problem.splits,
        parts={'some': core.Part(clients, 'train')},
        features=core.place_features(
          case.problem.federated.features, case.layout
        ),
        layout=case.layout,
        batch_size=4,
        seed=7,
      )
      report = core.evaluate(
        algorithm.predictors['fine_tuned'], state, **settings
      )['some']
      phases = algorithm.predictors['fine_tuned'].adapt.phases
      cohort = core.make_cohort(
        clients,
        round=0,
        seed=7,
        specs={
          'evaluation': core.PlanSpec(
            (*phases, core.Phase(batch_size=4, shuffle=False))
          )
        },
        data=case.problem.splits,
        features=settings['features'],
        layout=case.layout,
      )
      for at, client in enumerate(clients):
        params = self.tuned(case, cohort, client, state.params, optimizer)
        self.check_score(case, params, client, report, at)

  def tuned(self, case, cohort, client, params, optimizer):
    features = case.problem.federated.features
    state = optimizer.init(params)
    for plan in cohort.plans('evaluation'):
      if client not in plan.clients:
        continue
      for rows, count, info in client_batches(plan, client):
        if info['phase'] == 1:
          continue
        real = rows[:count]
        _, grads = plain_loss(case.problem.model)(
          params, features['image'][real], features['label'][real]
        )
        params, state = plain_step(optimizer)(grads, state, params)
    return params


class Float32Test(Checks):
  """float32: 1e-5 after a round, 1e-4 for the CNN after one local step."""

  @parameterized.product(
    model=['softmax_regression', 'mlp'], layout=list(LAYOUTS)
  )
  def test_fed_avg_float32(self, model, layout):
    case = Case(model, layout, 'mask', float64=False)
    self.check_fed_avg(case, 1e-5, rounds=1)

  @parameterized.parameters('1x1', '3x2')
  def test_cnn_one_step_float32(self, layout):
    case = Case(
      'emnist_cnn',
      layout,
      'mask',
      float64=False,
      clients=(0, 1, 3, 4, 5),
      poison=(),
    )
    case.phase = core.Phase(steps=1, batch_size=20)
    self.check_fed_avg(case, 1e-4, rounds=1)

  @parameterized.parameters('1x1', '3x2')
  def test_scaffold_float32(self, layout):
    self.check_scaffold(
      Case('mlp', layout, 'mask', float64=False), 1e-5, rounds=1
    )


class EmptyRoundTest(absltest.TestCase):
  def test_nobody_counts(self):
    """A cohort of empty clients, and one where all are dropped: no move."""
    for clients in ((3, 7), (POISONED,), ()):
      case = Case('mlp', '3x2', 'mask', float64=False, clients=clients)
      algorithm = fed_avg(
        case.problem.task,
        client_optimizer=optax.sgd(RATE),
        server_optimizer=optax.sgd(1.0),
        layout=case.layout,
        phase=case.phase,
      )
      state = algorithm.init(jax.random.key(1))
      after, _, _ = algorithm.apply(state, None, case.cohort(algorithm))
      jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


if __name__ == '__main__':
  absltest.main()
