"""Evaluation against numpy, client by client, and the summary statistics."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext import core, data
from fedjax_ext.core import ClientOutput, ClientProgram, Part, Predictor
from fedjax_ext.core import parts as parts_lib

# Two clients without examples, one with a single example.
SIZES = (5, 0, 12, 1, 9, 0, 20, 7, 3, 16)
NUM_CLIENTS = len(SIZES)
PARTS = {
  'participating': Part(np.array([2, 0, 1, 4, 6]), 'test'),  # in any order
  'everybody': Part(np.arange(NUM_CLIENTS), 'test'),
  'unparticipating': Part(np.array([3, 5, 7, 8, 9]), 'test'),
  'fitted': Part(np.array([6, 4, 5]), 'train'),
  'nobody': Part(np.array([], np.int64), 'train'),
  'all_empty': Part(np.array([1, 5]), 'test'),
  # Masks that overlap, hold each other, or choose nothing.
  'even': Part(np.arange(NUM_CLIENTS), 'test', np.arange(sum(SIZES)) % 2 == 0),
  'third': Part(np.array([6, 2, 9]), 'test', np.arange(sum(SIZES)) % 3 == 0),
  'sixth': Part(np.arange(5), 'test', np.arange(sum(SIZES)) % 6 == 0),
  'none': Part(np.arange(NUM_CLIENTS), 'test', np.zeros(sum(SIZES), bool)),
}
METRICS = ('square', 'per_token', 'rare')


@functools.cache
def splits():
  """'test' has all rows and 'train' every other one, in shuffled columns."""
  rng = np.random.default_rng(0)
  owner = rng.permutation(np.repeat(np.arange(NUM_CLIENTS), SIZES))
  columns = {
    'x': rng.standard_normal((len(owner), 3)).astype(np.float32),
    'y': rng.standard_normal(len(owner)).astype(np.float32),
    'tokens': rng.integers(0, 6, len(owner)),
    'name': np.array([f'row {i}' for i in range(len(owner))]),
  }
  whole = data.from_assignment(
    columns, owner, client_ids=np.arange(NUM_CLIENTS)
  )
  train = whole.filter(rng.random(whole.num_examples) < 0.5)
  return {'train': train, 'test': whole}


def metrics(w, batch):
  """Per example, per token, and one that only a few examples have."""
  x, y, tokens = (batch.data[name] for name in ('x', 'y', 'tokens'))
  error = x @ w - y
  return {
    'square': (error**2, jnp.ones_like(y)),
    'per_token': (jnp.sin(error), tokens.astype(y.dtype)),
    'rare': (x[:, 0], (y > 1).astype(y.dtype)),
  }


def numpy_metrics(w, examples):
  """{name: (sum, weight)} of one client."""
  x, y = examples['x'].astype(np.float64), examples['y'].astype(np.float64)
  error = x @ np.asarray(w, np.float64) - y
  pairs = {
    'square': (error**2, np.ones(len(y))),
    'per_token': (np.sin(error), examples['tokens']),
    'rare': (x[:, 0], y > 1),
  }
  return {n: ((v * w).sum(), w.sum()) for n, (v, w) in pairs.items()}


def view_of(part, views):
  """What a part's clients have of its split."""
  view = views[part.split]
  return view if part.only is None else view.filter(part.only)


W = np.array([0.5, -1.0, 2.0], np.float32)


def make_evaluator(predictor, parts=PARTS, views=None, **settings):
  views = views or splits()
  layout = core.make_layout(
    **{k: settings.pop(k) for k in ('num_devices', 'lanes') if k in settings}
  )
  return core.make_evaluator(
    predictor,
    data=views,
    parts=parts,
    features=core.place_features(views['test'].features, layout),
    layout=layout,
    **settings,
  )


class Checks(parameterized.TestCase):
  def check_report(self, report, model, parts=PARTS, views=None):
    """Compares with numpy; model: (client, split) -> w [3]."""
    views = views or splits()
    self.assertEqual(list(report), list(parts))
    for name, part in parts.items():
      got, view = report[name], view_of(part, views)
      sizes = view.sizes(part.clients)
      clients = part.clients[sizes > 0]
      self.assertEqual(got.clients.tolist(), clients.tolist())
      self.assertEqual(got.examples.tolist(), sizes[sizes > 0].tolist())
      expected = [
        numpy_metrics(model(c, part.split), view.client(c)) for c in clients
      ]
      for metric in METRICS:
        sums, weights = got.sums[metric], got.weights[metric]
        self.assertIsInstance(sums, np.ndarray)
        np.testing.assert_allclose(
          sums, [e[metric][0] for e in expected], rtol=2e-5, atol=1e-5
        )
        np.testing.assert_array_equal(weights, [e[metric][1] for e in expected])


class PooledTest(Checks):
  """One model for all clients."""

  @parameterized.product(num_devices=(1, 8), batch_size=(7, 256))
  def test_every_client_equals_numpy(self, num_devices, batch_size):
    evaluator = make_evaluator(
      Predictor(metrics), num_devices=num_devices, batch_size=batch_size
    )
    for w in (W, W[::-1].copy()):  # compiled once, for any model
      self.check_report(evaluator(w, None), lambda client, split: w)

  def test_shared_picks_the_model_out_of_the_server_state(self):
    predictor = Predictor(metrics, shared=lambda state: state['params'])
    evaluator = make_evaluator(predictor, num_devices=2, batch_size=32)
    report = evaluator({'params': W, 'step': jnp.int32(3)})
    self.check_report(report, lambda client, split: W)

  def test_evaluate_is_one_call_of_an_evaluator(self):
    layout = core.make_layout(num_devices=1)
    views = splits()
    report = core.evaluate(
      Predictor(metrics),
      W,
      data=views,
      parts=PARTS,
      features=core.place_features(views['test'].features, layout),
      layout=layout,
      batch_size=16,
    )
    self.check_report(report, lambda client, split: W)

  def test_no_parts(self):
    self.assertEqual(make_evaluator(Predictor(metrics), parts={})(W), {})

  def test_only_a_part_without_examples(self):
    parts = {name: PARTS[name] for name in ('nobody', 'all_empty')}
    report = make_evaluator(Predictor(metrics), parts=parts)(W)
    self.check_report(report, lambda client, split: W, parts)
    self.assertEqual(report['nobody'].summary(), {'clients': 0, 'examples': 0})

  def test_padding_does_not_matter_bit_for_bit(self):
    """Row 0 fills up batches; here nobody in the parts owns it."""
    views = splits()
    owner = next(
      c for c in range(NUM_CLIENTS) if 0 in views['test'].client_rows(c)
    )
    parts = {
      'others': Part(np.setdiff1d(np.arange(NUM_CLIENTS), [owner]), 'test')
    }
    reports = []
    for junk in (0.0, 1e30, np.nan):
      columns = dict(
        views['test'].features, x=views['test'].features['x'].copy()
      )
      columns['x'][views['test'].client_rows(owner)] = junk
      changed = {
        'test': data.FederatedData(
          np.arange(NUM_CLIENTS),
          views['test'].offsets,
          views['test'].rows,
          columns,
        )
      }
      evaluator = make_evaluator(
        Predictor(metrics), parts, changed, num_devices=4, batch_size=7
      )
      reports.append(evaluator(W))
    for other in reports[1:]:
      jax.tree.map(np.testing.assert_array_equal, reports[0], other)

  @parameterized.parameters(1, 8)
  def test_not_a_number_stays_with_its_client(self, num_devices):
    def broken(w, batch):
      values = metrics(w, batch)
      square, weight = values['square']
      poison = jnp.where(batch.data['x'][:, 1] == POISON, jnp.nan, 0.0)
      return values | {'square': (square + poison, weight)}

    view = splits()['test']
    poisoned = 6
    row = view.client_rows(poisoned)[4]
    POISON = view.features['x'][row, 1]
    settings = dict(num_devices=num_devices, batch_size=7)
    good = make_evaluator(Predictor(metrics), **settings)(W)['everybody']
    bad = make_evaluator(Predictor(broken), **settings)(W)['everybody']
    nan = np.isnan(bad.sums['square'])
    self.assertEqual(bad.clients[nan].tolist(), [poisoned])
    np.testing.assert_array_equal(
      bad.sums['square'][~nan], good.sums['square'][~nan]
    )
    for name in ('per_token', 'rare'):
      np.testing.assert_array_equal(bad.sums[name], good.sums[name])
    np.testing.assert_array_equal(bad.weights['square'], good.weights['square'])

  @parameterized.parameters(None, lambda shared, client: shared)
  def test_a_value_of_weight_0_may_be_anything(self, params):
    """A mean over no tokens, for instance."""

    def ratio(w, batch):
      tokens = batch.data['tokens'].astype(jnp.float32)
      return {'ratio': (batch.data['y'] / tokens, tokens)}

    predictor = Predictor(ratio, params=params)
    report = make_evaluator(predictor, batch_size=16)(W)['everybody']
    view = splits()['test']
    expected = []
    for client in report.clients:
      own = view.client(client)
      expected.append(own['y'][own['tokens'] > 0].sum())
    self.assertTrue((view.features['tokens'] == 0).any())
    np.testing.assert_allclose(
      report.sums['ratio'], expected, rtol=1e-5, atol=1e-5
    )


class CutTest(parameterized.TestCase):
  """Parts share pieces; no example is in two of them."""

  def examples(self, view, clients):
    return [(c, row) for c in clients for row in view.client_rows(c).tolist()]

  def test_pieces_make_up_their_parts(self):
    views = splits()
    pieces, of_part = parts_lib.cut(views, PARTS)
    inside = []
    for piece in pieces:
      owners = np.repeat(np.arange(NUM_CLIENTS), np.diff(piece.view.offsets))
      inside.append(list(zip(owners, np.asarray(piece.view.rows), strict=True)))
    of_test = [i for i in range(len(pieces)) if i not in of_part['fitted']]
    scored = [x for i in of_test for x in inside[i]]
    self.assertLen(scored, sum(SIZES))
    self.assertLen(set(scored), sum(SIZES))
    for name, part in PARTS.items():
      clients = part.clients.tolist()
      got = [x for i in of_part[name] for x in inside[i] if x[0] in clients]
      expected = self.examples(view_of(part, views), clients)
      self.assertEqual(sorted(got), sorted(expected), name)
    # Multiples of 6, other ones of 2, other ones of 3, and the rest.
    self.assertLen(of_part['everybody'], 4)
    self.assertLen(of_part['even'], 2)
    self.assertLen(of_part['sixth'], 1)
    self.assertLen(of_part['none'], 1)

  def test_a_piece_alone_has_nothing_of_other_clients(self):
    piece = parts_lib.Piece(np.array([2, 5, 8]), splits()['test'])
    alone = piece.alone()
    for client in range(NUM_CLIENTS):
      rows = alone.rows[alone.offsets[client] : alone.offsets[client + 1]]
      expected = splits()['test'].client_rows(client)
      keep = slice(None) if client in (2, 5, 8) else slice(0)
      np.testing.assert_array_equal(rows, expected[keep])

  def test_without_masks_a_split_is_one_piece(self):
    parts = {n: part for n, part in PARTS.items() if part.only is None}
    pieces, _ = parts_lib.cut(splits(), parts)
    self.assertLen(pieces, 2)
    for piece, split in zip(pieces, ('test', 'train'), strict=True):
      self.assertIs(piece.view, splits()[split])


class ErrorTest(parameterized.TestCase):
  @parameterized.parameters(
    (np.ones(3, bool), r'bool \[3\]'), (np.ones(sum(SIZES)), 'float64')
  )
  def test_a_mask_that_does_not_fit(self, only, what):
    parts = {'half': Part(np.arange(2), 'test', only)}
    with self.assertRaisesRegex(
      core.InvalidInput,
      rf"mask bool \[73\] of split 'test' in part 'half', got {what}",
    ):
      make_evaluator(Predictor(metrics), parts)

  @parameterized.parameters(None, lambda shared, client: shared)
  def test_unknown_split(self, params):
    parts = dict(PARTS, other=Part(np.arange(2), 'validation'))
    with self.assertRaisesRegex(
      core.InvalidInput, 'split to be one of train, test, got split=validation'
    ):
      make_evaluator(Predictor(metrics, params=params), parts)

  def test_splits_of_other_populations(self):
    few = data.from_assignment(
      {'x': np.ones(3)}, np.arange(3), client_ids=np.arange(3)
    )
    parts = {
      'few': Part(np.arange(2), 'few'),
      'test': Part(np.arange(9), 'test'),
    }
    with self.assertRaisesRegex(
      core.InvalidInput, "in all splits, got {'few': 3, 'test': 10}"
    ):
      core.parts.cut({'few': few, **splits()}, parts)

  def test_too_many_masks(self):
    mask = np.ones(sum(SIZES), bool)
    parts = {str(i): Part(np.arange(2), 'test', mask) for i in range(64)}
    with self.assertRaisesRegex(core.InvalidInput, 'less than 64 .*, got 64'):
      make_evaluator(Predictor(metrics), parts)

  def test_batch_size(self):
    with self.assertRaisesRegex(core.InvalidInput, 'batch_size >= 1'):
      make_evaluator(Predictor(metrics), batch_size=0)

  @parameterized.parameters(None, lambda shared, client: shared)
  def test_clients_out_of_range(self, params):
    for client in (NUM_CLIENTS, -1):
      parts = {'far': Part(np.array([0, client]), 'test')}
      with self.assertRaisesRegex(core.InvalidInput, r'0\.\.9'):
        make_evaluator(Predictor(metrics, params=params), parts)(W)


def bank():
  """Client c's row is W + c; clients 2 and 6 were written anew."""
  states = core.make_client_states(
    lambda key, number: {'w': W + number, 'seen': number % 2 == 0},
    num_clients=NUM_CLIENTS,
    key=jax.random.key(0),
  )
  rows = {'w': np.stack([W * 3, W * 5]), 'seen': np.array([False, True])}
  return states.scatter(np.array([2, 6]), rows)


def own_model(client, split=None):
  del split
  return {2: W * 3, 6: W * 5}.get(int(client), W + int(client))


def adaptation(phases):
  """Adds shared['rate'] * mean of x of each step's batch to shared['w']."""

  def init(shared, client, key):
    del client, key
    return shared['w'], shared['rate'], jnp.int32(0)

  def step(shared, state, batch):
    del shared
    w, rate, steps = state
    x = jnp.where(batch.mask[:, None], batch.data['x'], 0)
    return w + rate * x.sum(0) / batch.mask.sum(), rate, steps + 1

  def final(shared, client, state):
    del shared, client
    return ClientOutput((), jnp.float32(1), metrics={'n': (state[2], 1.0)})

  program = ClientProgram(init, step, final)
  return core.Adaptation(program, phases, lambda state: state[0])


class PersonalTest(Checks):
  """Clients' own models, through the engine."""

  @parameterized.parameters(
    dict(num_devices=1, lanes=1, batch_size=7),
    dict(num_devices=8, lanes=3, batch_size=4),
  )
  def test_models_in_client_states(self, **settings):
    predictor = Predictor(metrics, params=lambda _, client: client.state['w'])
    evaluator = make_evaluator(predictor, **settings)
    states = bank()
    index = states.index.copy()
    self.check_report(evaluator((), states), own_model)
    np.testing.assert_array_equal(states.index, index)  # reads only

  def test_models_from_the_shared_one(self):
    def params(shared, client):
      personal = jnp.where(client.state['seen'], client.state['w'], shared)
      return personal * (1 + client.number)

    def model(client, split):
      seen = client % 2 == 0 and client != 2
      return (own_model(client) if seen else W) * (1 + client)

    predictor = Predictor(metrics, lambda state: state['params'], params)
    evaluator = make_evaluator(predictor, num_devices=2, lanes=2, batch_size=5)
    self.check_report(evaluator({'params': W}, bank()), model)

  def test_personal_equals_pooled_for_one_shared_model(self):
    pooled = make_evaluator(Predictor(metrics), batch_size=16)
    personal = make_evaluator(
      Predictor(metrics, params=lambda shared, client: shared), batch_size=8
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      pooled(W),
      personal(W),
    )

  def adapted(self, rate):
    """The model of a client after two passes over its train examples."""
    view = splits()['train']

    def model(client, split):
      del split
      x, w = view.client(client)['x'].astype(np.float64), W.astype(np.float64)
      for _ in range(2):
        for start in range(0, len(x), 4):
          w = w + rate * x[start : start + 4].mean(0)
      return w

    return model

  @parameterized.parameters(
    dict(num_devices=1, lanes=1), dict(num_devices=4, lanes=3)
  )
  def test_adaptation(self, **settings):
    """Train examples adapt, the part's are scored; neither is mixed up."""
    phases = (
      core.Phase('train', batch_size=4, shuffle=False),
      core.Phase('train', batch_size=4, shuffle=False),
    )
    predictor = Predictor(metrics, adapt=adaptation(phases))
    evaluator = make_evaluator(predictor, **settings)
    for rate in (0.5, -1.0):
      report = evaluator({'w': W, 'rate': np.float32(rate)})
      self.check_report(report, self.adapted(rate))

  def test_params_know_the_number_of_train_examples(self):
    """Whatever the parts are about, as in training."""

    def count(w, batch):
      return {'n': (jnp.full(batch.mask.shape, w), jnp.ones(batch.mask.shape))}

    predictor = Predictor(count, params=lambda _, client: client.num_examples)
    report = make_evaluator(predictor, batch_size=4)(())
    sizes = splits()['train'].sizes()
    for part in report.values():
      np.testing.assert_array_equal(
        part.sums['n'] / part.weights['n'], sizes[part.clients]
      )

  def test_masked_parts_in_waves_of_streamed_columns(self):
    phases = (core.Phase('train', batch_size=4, shuffle=False),) * 2
    predictor = Predictor(metrics, adapt=adaptation(phases))
    layout = core.make_layout(num_devices=2, lanes=2, wave_clients=3)
    report = core.evaluate(
      predictor,
      {'w': W, 'rate': np.float32(0.5)},
      data=splits(),
      parts=PARTS,
      features=core.place_features(
        splits()['test'].features, layout, memory_gb=0
      ),
      layout=layout,
    )
    self.check_report(report, self.adapted(0.5))

  def test_a_client_adapts_once_for_all_parts(self):
    """Steps of adaptation, counted on the host."""
    steps = []

    def counted(phases):
      one = adaptation(phases)

      def step(shared, state, batch):
        jax.debug.callback(lambda: steps.append(1))
        return one.program.step(shared, state, batch)

      return one._replace(program=one.program._replace(step=step))

    phases = (core.Phase('train', batch_size=4, shuffle=False),)
    predictor = Predictor(metrics, adapt=counted(phases))
    evaluator = make_evaluator(predictor, num_devices=1, lanes=1)
    evaluator({'w': W, 'rate': np.float32(1)})
    jax.effects_barrier()
    sizes = splits()['train'].sizes()
    self.assertLen(steps, int((-(-sizes // 4)).sum()))

  def test_shuffled_adaptation_repeats_itself(self):
    phases = (core.Phase('train', steps=3, batch_size=2),)
    predictor = Predictor(metrics, adapt=adaptation(phases))
    evaluate = lambda seed: make_evaluator(predictor, seed=seed, num_devices=2)
    evaluator, other = evaluate(0), evaluate(1)
    shared = {'w': W, 'rate': np.float32(1)}
    first = evaluator(shared)
    jax.tree.map(np.testing.assert_array_equal, first, evaluator(shared))
    differs = (
      first['everybody'].sums['square']
      != other(shared)['everybody'].sums['square']
    )
    self.assertGreater(differs.sum(), 2)

  def test_not_a_number_stays_with_its_client(self):
    states = bank()
    states = states.scatter(
      np.array([4]),
      {'w': np.full((1, 3), np.nan, np.float32), 'seen': np.array([True])},
    )
    predictor = Predictor(metrics, params=lambda _, client: client.state['w'])
    evaluator = make_evaluator(predictor, num_devices=1, lanes=3, batch_size=7)
    good, bad = evaluator((), bank()), evaluator((), states)
    for name in ('participating', 'everybody'):
      nan = np.isnan(bad[name].sums['square'])
      self.assertEqual(bad[name].clients[nan].tolist(), [4])
      for metric in METRICS:
        np.testing.assert_array_equal(
          bad[name].sums[metric][~nan], good[name].sums[metric][~nan]
        )
        np.testing.assert_array_equal(
          bad[name].weights[metric], good[name].weights[metric]
        )


class SummaryTest(absltest.TestCase):
  def report(self):
    rng = np.random.default_rng(1)
    count = 23
    weights = rng.integers(0, 50, count).astype(np.float32)
    weights[[0, 5]] = 0  # clients without a token
    return core.PartReport(
      np.arange(count) * 2,
      rng.integers(1, 90, count),
      {
        'loss': rng.standard_normal(count).astype(np.float32) * weights,
        'accuracy': np.arange(count, dtype=np.float32),
      },
      {'loss': weights, 'accuracy': np.full(count, 40, np.float32)},
    )

  def test_statistics_against_numpy(self):
    report = self.report()
    got = report.summary()
    self.assertEqual(got['clients'], 23)
    self.assertEqual(got['examples'], report.examples.sum())
    for name in ('loss', 'accuracy'):
      sums, weights = report.sums[name], report.weights[name]
      some = weights > 0
      own = sums[some] / weights[some]
      expected = {
        'pooled': sums.sum() / weights.sum(),
        'mean': own.mean(),
        'weighted_mean': np.average(own, weights=report.examples[some]),
        'variance': np.mean((own - own.mean()) ** 2),
      } | {
        f'p{p}': np.sort(own)[round((len(own) - 1) * p / 100)]
        for p in (5, 25, 50, 75, 95)
      }
      for statistic, value in expected.items():
        self.assertAlmostEqual(got[f'{name}/{statistic}'], value, places=5)
    self.assertNotAlmostEqual(got['loss/pooled'], got['loss/weighted_mean'], 3)
    self.assertLen(got, 2 + 2 * 9)
    for value in got.values():
      self.assertIn(type(value), (int, float))

  def test_pooled_weighs_tokens_and_mean_weighs_clients(self):
    report = core.PartReport(
      np.array([3, 4]),
      np.array([1, 3]),
      {'loss': np.array([10.0, 4.0])},
      {'loss': np.array([10.0, 2.0])},
    )
    got = report.summary()
    self.assertAlmostEqual(got['loss/pooled'], 14 / 12)
    self.assertAlmostEqual(got['loss/mean'], 1.5)
    self.assertAlmostEqual(got['loss/weighted_mean'], (1 + 3 * 2) / 4)
    self.assertAlmostEqual(got['loss/p25'], 1.0)

  def test_equal_weights_make_pooled_and_weighted_mean_one(self):
    report = self.report()
    examples = report.examples.astype(np.float32)
    report = report._replace(
      weights={'accuracy': examples}, sums={'accuracy': report.sums['accuracy']}
    )
    got = report.summary()
    self.assertAlmostEqual(
      got['accuracy/pooled'], got['accuracy/weighted_mean'], places=5
    )

  def test_a_metric_that_nobody_has_is_left_out(self):
    report = self.report()
    report.weights['loss'][:] = 0
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      got = report.summary()
    self.assertFalse([name for name in got if name.startswith('loss')])
    self.assertIn('accuracy/mean', got)

  def test_summarize_report(self):
    report = {'a': self.report(), 'b': self.report()}
    got = core.summarize_report(report)
    for part in report:
      for name, value in report[part].summary().items():
        self.assertEqual(got[f'{part}/{name}'], value)
    self.assertLen(got, 2 * 20)


if __name__ == '__main__':
  absltest.main()
