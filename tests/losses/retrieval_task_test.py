"""The retrieval task against numpy loops, and clients with their rows only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from fedjax_ext import core
from fedjax_ext.algorithms import fed_avg
from fedjax_ext.data import from_segments
from fedjax_ext.losses import (
  RetrievalLoss,
  Spreadout,
  item_table,
  retrieval_task,
)
from fedjax_ext.models import dual_encoder
from tests.problems import relative_error

V, T = 11, 3
ENCODER = dual_encoder(
  num_classes=V + 1, input_shape=(T,), embedding_size=4, context_hidden=(4,)
)
CONTEXT = np.array(
  [[1, 2, 0], [3, 0, 0], [0, 0, 0], [4, 5, 6], [7, 7, 8], [1, 2, 3]], np.int16
)
LABEL = np.array([3, 4, 2, 11, 7, 9], np.int16)
REAL = np.array([True, True, True, True, True, False])


def make_params(seed=0):
  """Random parameters of size 1; padding's row too holds something."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(ENCODER.init, jax.random.key(0))
  return jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(x.dtype), shapes
  )


def make_batch(dtype=np.int16):
  data = {'context': CONTEXT.astype(dtype), 'label': LABEL.astype(dtype)}
  data = {name: jnp.asarray(x) for name, x in data.items()}
  return core.Batch(data, jnp.asarray(REAL), None)


def embed(params, ids):
  """A context's embedding, in float64 numpy."""
  rows = [params['items'][i].astype(float) for i in ids if i != 0]
  mean = sum(rows) / len(rows) if rows else np.zeros(4)
  layer = params['context_0']
  return np.maximum(mean @ layer['kernel'] + layer['bias'], 0)


def unit(x):
  norm = np.sqrt((x**2).sum())
  return x / norm if norm > 1e-6 else 0 * x


def plain_scores(params, normalise):
  """Scores [B][V+1] of all items."""
  scale = unit if normalise else lambda x: x
  items = [scale(row.astype(float)) for row in params['items']]
  return [[scale(embed(params, c)) @ i for i in items] for c in CONTEXT]


def plain_metrics(scores, label, pad):
  others = [n for n in range(0 if pad else 1, V + 1) if n != label]
  rank = sum(scores[n] > scores[label] for n in others)
  return {
    'recall_at_1': float(rank < 1),
    'recall_at_5': float(rank < 5),
    'recall_at_10': float(rank < 10),
    'mrr': 1 / (rank + 1),
    'ndcg_at_10': 1 / np.log2(rank + 2) if rank < 10 else 0,
    'rank': rank,
    'ties': sum(scores[n] == scores[label] for n in others),
  }


class TaskTest(parameterized.TestCase):
  @parameterized.product(normalise=(True, False), pad=(False, True))
  def test_metrics(self, normalise, pad):
    params = make_params(2)
    task = retrieval_task(
      ENCODER,
      RetrievalLoss('hinge', normalise=normalise),
      pad_is_candidate=pad,
    )
    got = jax.jit(task.metrics)(params, make_batch())
    scores = plain_scores(params, normalise)
    expected = [
      plain_metrics(s, label, pad)
      for s, label in zip(scores, LABEL, strict=True)
    ]
    self.assertEqual(got.keys(), expected[0].keys())
    # What is asked for makes a difference here.
    other = [
      plain_metrics(s, label, p)['rank']
      for n, p in ((not normalise, pad), (normalise, not pad))
      for s, label in zip(plain_scores(params, n), LABEL, strict=True)
    ]
    ranks = [e['rank'] for e in expected]
    self.assertNotEqual(ranks, other[: len(ranks)])
    self.assertNotEqual(ranks, other[len(ranks) :])
    for name, (values, weights) in got.items():
      np.testing.assert_allclose(
        values, [e[name] for e in expected], rtol=1e-6, err_msg=name
      )
      np.testing.assert_array_equal(weights, [1, 1, 1, 1, 1, 0])

  def test_ties(self):
    """Items like the label come before it, if so asked."""
    params = make_params()
    # Means of up to three are exact, as are all sums.
    params['items'] = 3 * np.round(params['items'])
    params['items'][[5, 8]] = params['items'][3]
    params['context_0']['kernel'] = np.eye(4, dtype=np.float32)
    params['context_0']['bias'] = np.ones(4, np.float32)
    loss = RetrievalLoss('hinge', normalise=False)
    rank = {
      pessimistic: jax.jit(
        retrieval_task(ENCODER, loss, pessimistic_ties=pessimistic).metrics
      )(params, make_batch())['rank'][0]
      for pessimistic in (False, True)
    }
    for b, label in enumerate(LABEL):
      scores = plain_scores(params, False)[b]
      others = [scores[n] for n in range(1, V + 1) if n != label]
      better = sum(s > scores[label] for s in others)
      self.assertEqual(rank[False][b], better)
      as_good = sum(s == scores[label] for s in others)
      self.assertEqual(rank[True][b], better + as_good)
    self.assertGreaterEqual(rank[True][0] - rank[False][0], 2)

  def test_hinge(self):
    params = make_params(1)
    loss = RetrievalLoss('hinge', margin=0.7)
    scores = plain_scores(params, True)
    short = [max(0, 0.7 - scores[b][LABEL[b]]) ** 2 for b in range(5)]
    self.check_loss(loss, params, np.mean(short))

  def test_batch_softmax(self):
    """Between the labels of the real examples only."""
    params = make_params(1)
    loss = RetrievalLoss('batch_softmax', normalise=False)
    scores = np.array(plain_scores(params, False))[:5][:, LABEL[:5]]
    losses = np.log(np.exp(scores).sum(1)) - scores.diagonal()
    for dtype in (np.int16, np.int32):
      self.check_loss(loss, params, losses.mean(), dtype)

  def test_global_softmax_and_table(self):
    """Between all items; the table's regulariser sees the raw table."""
    params = make_params(1)
    loss = RetrievalLoss(
      'global_softmax',
      normalise=False,
      normalise_table=False,
      spreadout=Spreadout(table=0.1),
      l2=0.01,
    )
    scores = np.array(plain_scores(params, False))[:5]
    own = scores[np.arange(5), LABEL[:5]]
    expected = (np.log(np.exp(scores).sum(1)) - own).mean()
    table = params['items'].astype(float)
    pairs = table @ table.T
    np.fill_diagonal(pairs, 0)
    expected += 0.1 * np.linalg.norm(pairs) + 0.01 * (table**2).sum()
    self.check_loss(loss, params, expected)

  def check_loss(self, loss, params, expected, dtype=np.int16):
    got = jax.jit(retrieval_task(ENCODER, loss).loss)(params, make_batch(dtype))
    np.testing.assert_allclose(got, expected, rtol=1e-5)

  def test_begins_as_the_encoder_does(self):
    task = retrieval_task(ENCODER, RetrievalLoss())
    self.assertIs(task.init, ENCODER.init)


# Clients with padding in every context, in none (items 4 to 8: their rows
# begin with a real item), in some; one has no examples.
CLIENTS = (
  [([1, 0, 0], 2), ([1, 2, 0], 9), ([2, 9, 0], 1)],
  [([4, 5, 6], 7), ([5, 6, 4], 8), ([8, 4, 4], 5), ([7, 8, 6], 4)],
  [],
  [([3, 0, 0], 10), ([3, 10, 3], 3)],
)


@functools.cache
def trained(core_name, tables):
  """The model after a round of federated averaging."""
  layout = core.make_layout(num_devices=1)
  sizes = np.array([len(c) for c in CLIENTS])
  examples = [e for c in CLIENTS for e in c]
  dataset = from_segments(
    {
      'context': np.array([c for c, _ in examples], np.int16),
      'label': np.array([y for _, y in examples], np.int16),
    },
    np.cumsum(sizes) - sizes,
    sizes,
    client_ids=np.arange(len(sizes)),
  )
  task = retrieval_task(ENCODER, RetrievalLoss(core_name))
  algorithm = fed_avg(
    task._replace(init=lambda key: jax.tree.map(jnp.asarray, make_params())),
    client_optimizer=optax.sgd(0.1),
    server_optimizer=optax.sgd(1.0),
    layout=layout,
    phase=core.Phase(batch_size=3, epochs=2),
    tables=tables,
  )
  state = algorithm.init(jax.random.key(0))
  cohort = core.make_cohort(
    np.arange(len(sizes)),
    round=1,
    seed=0,
    specs=algorithm.plans,
    data={'train': dataset},
    features=core.place_features(dataset.features, layout),
    layout=layout,
  )
  state, _, _ = algorithm.apply(state, None, cohort)
  return state.params


class SparseRowsTest(parameterized.TestCase):
  @parameterized.parameters('hinge', 'batch_softmax')
  def test_equal_the_whole_table(self, core_name):
    dense = trained(core_name, ())
    sparse = trained(core_name, (item_table(ENCODER),))
    self.assertLess(relative_error(sparse, dense), 1e-6)
    moved = np.abs(dense['items'] - make_params()['items']).max(1)
    # Nobody has item 11, and padding takes no part.
    self.assertEqual((moved[0], moved[11]), (0, 0))
    self.assertGreater((moved > 1e-3).sum(), 6)

  def test_every_client_needs_the_row_of_padding(self):
    """Else the one without padding takes its first item for it."""
    table = item_table(ENCODER)
    self.assertEqual(table.always, (0,))
    dense = trained('hinge', ())
    wrong = trained('hinge', (table._replace(always=()),))
    self.assertGreater(relative_error(wrong, dense), 1e-3)

  def test_table(self):
    table = item_table(ENCODER)
    self.assertEqual(table.path, 'items')
    self.assertEqual(table.features, ('context', 'label'))
    self.assertEqual(table.num_rows, V + 1)


if __name__ == '__main__':
  absltest.main()
