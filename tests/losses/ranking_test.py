"""Ranks, best items and ranking metrics against plain Python."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.losses import ranking_metrics, ranks, top_items
from fedjax_ext.losses.ranking import compare

R10 = [[0.9, 0.1, 0.5, 0.3], [0.2, 0.8, 0.7, 0.6], [0.4, 0.3, 0.2, 0.1]]
R10_LABELS = [2, 0, 1]


# One compilation costs less than one of each operation.
SETTINGS = ('pad_is_candidate', 'pessimistic_ties', 'chunk_items')
RANKS = jax.jit(ranks, static_argnames=SETTINGS)
SETTINGS = ('pad_is_candidate', 'chunk_items', 'k')
TOP_ITEMS = jax.jit(top_items, static_argnames=SETTINGS)


def matrix_ranks(scores, labels, **settings):
  """`ranks` of scores [B, N]: contexts @ items.T is the matrix itself."""
  scores = np.asarray(scores, np.float32)
  contexts = jnp.eye(len(scores))
  return np.asarray(
    RANKS(contexts, jnp.asarray(scores.T), jnp.asarray(labels), **settings)
  )


def matrix_top(scores, **settings):
  """`top_items` of scores [B, N]."""
  scores = np.asarray(scores, np.float32)
  best, numbers = TOP_ITEMS(
    jnp.eye(len(scores)), jnp.asarray(scores.T), **settings
  )
  return np.asarray(best), np.asarray(numbers)


def place_in_sort(scores, label, *, pad, last):
  """Where the label stands among the candidates, sorted from the best.

  Of equal items it comes first, or `last`.
  """
  items = [n for n in range(len(scores)) if n > 0 or pad or n == label]
  better = lambda n: (-scores[n], (n == label) == last)
  return sorted(items, key=better).index(label)


def random_scores(*, ties, size=(6, 11), seed=0):
  """Scores [B, N] that float32 holds, and labels that are no padding."""
  rng = np.random.default_rng(seed)
  if ties:
    scores = rng.integers(0, 4, size).astype(float)
  else:
    scores = np.tile(np.arange(float(size[1])), (size[0], 1))
    scores = rng.permuted(scores, axis=1)
  return scores, rng.integers(1, size[1], size[0])


class RanksTest(parameterized.TestCase):
  def test_known_values(self):
    """R10."""
    rank = matrix_ranks(R10, R10_LABELS, pad_is_candidate=True)
    self.assertEqual(rank.tolist(), [1, 3, 1])
    self.assertEqual(rank.dtype, np.int32)
    values = ranking_metrics(jnp.asarray(rank), at=(1, 2, 3, 4))
    recall = [float(values[f'recall_at_{k}'].mean()) for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(recall, [0, 2 / 3, 2 / 3, 1], rtol=1e-6)
    self.assertAlmostEqual(float(values['rank'].mean()), 1.6667, places=4)

  @parameterized.product(
    ties=(False, True),
    pad=(False, True),
    pessimistic=(False, True),
  )
  def test_equal_a_sort(self, ties, pad, pessimistic):
    scores, labels = random_scores(ties=ties)
    # Padding is the best of all: whether it takes part shows.
    scores[:, 0] = 20
    got = matrix_ranks(
      scores,
      labels,
      pad_is_candidate=pad,
      pessimistic_ties=pessimistic,
      chunk_items=4,
    )
    expected = [
      place_in_sort(s, label, pad=pad, last=pessimistic)
      for s, label in zip(scores.tolist(), labels.tolist(), strict=True)
    ]
    self.assertEqual(got.tolist(), expected)

  def test_ties(self):
    """Items like the label are behind it, or before it, by choice."""
    scores = [[9.0, 2.0, 2.0, 2.0, 1.0]] * 2
    labels = [2, 4]
    self.assertEqual(matrix_ranks(scores, labels).tolist(), [0, 3])
    pessimistic = matrix_ranks(scores, labels, pessimistic_ties=True)
    self.assertEqual(pessimistic.tolist(), [2, 3])
    padded = matrix_ranks(
      scores, labels, pessimistic_ties=True, pad_is_candidate=True
    )
    self.assertEqual(padded.tolist(), [3, 4])

  def test_chunks(self):
    """Of any size: of one item, that end with the last, beyond it."""
    scores, labels = random_scores(ties=True)
    expected = [
      place_in_sort(s, label, pad=False, last=False)
      for s, label in zip(scores.tolist(), labels.tolist(), strict=True)
    ]
    for chunk in (1, 10, 11, 12):
      got = matrix_ranks(scores, labels, chunk_items=chunk)
      self.assertEqual(got.tolist(), expected)

  def test_dot_products(self):
    """Of vectors, not only of the matrices above."""
    rng = np.random.default_rng(3)
    contexts, items = rng.standard_normal((5, 3)), rng.standard_normal((9, 3))
    labels = np.array([1, 8, 3, 3, 5])
    got = RANKS(contexts, items, labels, chunk_items=4)
    for b, rank in enumerate(np.asarray(got).tolist()):
      scores = [
        sum(a * c for a, c in zip(contexts[b], i, strict=True)) for i in items
      ]
      place = place_in_sort(scores, int(labels[b]), pad=False, last=False)
      self.assertEqual(rank, place)

  def test_equal_items_tie_to_the_last_bit(self):
    rng = np.random.default_rng(0)
    items = rng.standard_normal((400, 16)).astype(np.float32)
    items[1:101] = items[200:300]
    labels = jnp.asarray(rng.integers(1, 101, 20))
    contexts = jnp.asarray(rng.standard_normal((20, 16)), jnp.float32)
    for chunk in (8192, 150):
      _, tied = jax.jit(compare, static_argnames='chunk_items')(
        contexts, jnp.asarray(items), labels, chunk_items=chunk
      )
      self.assertEqual(np.asarray(tied).tolist(), [1] * 20)

  def test_broken_models_rank_last(self):
    """Scores that are not numbers never count as a hit."""
    items = np.random.default_rng(0).standard_normal((7, 3))
    contexts, labels = items[[2, 3, 4]] * 5, jnp.array([2, 3, 4])
    broken = contexts.copy()
    broken[1] = np.nan
    broken[2] = np.inf
    higher, tied = compare(jnp.asarray(broken), jnp.asarray(items), labels)
    self.assertLess(int(higher[0]), 5)
    self.assertEqual(np.asarray(higher[1:]).tolist(), [5, 5])
    self.assertEqual(np.asarray(tied).tolist(), [0, 0, 0])
    items[5] = np.nan  # another item's row: it counts as higher
    got = ranks(jnp.asarray(contexts), jnp.asarray(items), labels)
    sound = np.delete(items, 5, 0)
    for rank, context, label in zip(got, contexts, (2, 3, 4), strict=True):
      beaten = sum(context @ sound[1:].T > context @ items[label])
      self.assertEqual(int(rank), beaten + 1)

  def test_a_dead_context_ties_with_all(self):
    items = jnp.eye(4, 3)
    zero, label = jnp.zeros((1, 3)), jnp.array([2])
    higher, tied = compare(zero, items, label)
    self.assertEqual((int(higher[0]), int(tied[0])), (0, 2))
    self.assertEqual(
      int(ranks(zero, items, label, pessimistic_ties=True)[0]), 2
    )


class TopItemsTest(parameterized.TestCase):
  @parameterized.product(
    ties=(False, True),
    pad=(False, True),
    case=((1, 3), (5, 3), (10, 3), (10, 100)),
  )
  def test_equals_argsort(self, ties, pad, case):
    """Of equal scores the lower number comes first, over all chunks."""
    k, chunk = case
    scores, _ = random_scores(ties=ties)
    best, numbers = matrix_top(
      scores, k=k, pad_is_candidate=pad, chunk_items=chunk
    )
    candidates = scores.copy()
    if not pad:
      candidates[:, 0] = -np.inf
    expected = np.argsort(-candidates, axis=1, kind='stable')[:, :k]
    np.testing.assert_array_equal(numbers, expected)
    np.testing.assert_array_equal(
      best, np.take_along_axis(scores, expected, axis=1)
    )

  @parameterized.parameters(False, True)
  def test_label_is_in_the_best_k_if_its_rank_is_below_k(self, pad):
    found = set()
    for seed in range(4):
      scores, labels = random_scores(ties=False, seed=seed)
      settings = dict(pad_is_candidate=pad, chunk_items=3)
      rank = matrix_ranks(scores, labels, **settings)
      _, numbers = matrix_top(scores, k=10, **settings)
      for k in range(1, 11):
        among = (numbers[:, :k] == labels[:, None]).any(1)
        self.assertEqual(among.tolist(), (rank < k).tolist())
      found |= set(rank.tolist())
    self.assertGreater(len(found), 5)

  def test_the_best(self):
    scores, _ = random_scores(ties=True)
    for chunk in (2, 11):
      best, numbers = matrix_top(scores, k=1, chunk_items=chunk)
      np.testing.assert_array_equal(best[:, 0], scores[:, 1:].max(1))
      np.testing.assert_array_equal(numbers[:, 0], 1 + scores[:, 1:].argmax(1))


class MetricsTest(absltest.TestCase):
  def test_equal_plain_python(self):
    rank = [0, 1, 4, 5, 9, 10, 11, 3000]
    got = ranking_metrics(jnp.asarray(rank))
    expected = {
      'recall_at_1': [1, 0, 0, 0, 0, 0, 0, 0],
      'recall_at_5': [1, 1, 1, 0, 0, 0, 0, 0],
      'recall_at_10': [1, 1, 1, 1, 1, 0, 0, 0],
      'mrr': [1 / (r + 1) for r in rank],
      'ndcg_at_10': [1 / math.log2(r + 2) if r <= 9 else 0 for r in rank],
      'rank': rank,
    }
    self.assertEqual(got.keys(), expected.keys())
    for name, values in expected.items():
      np.testing.assert_allclose(got[name], values, rtol=1e-6, err_msg=name)

  def test_places_of_recall_and_ndcg(self):
    got = ranking_metrics(jnp.asarray([2, 3]), at=(3,), ndcg_at=3)
    self.assertEqual(got.keys(), {'recall_at_3', 'mrr', 'ndcg_at_3', 'rank'})
    np.testing.assert_allclose(got['recall_at_3'], [1, 0])
    np.testing.assert_allclose(got['ndcg_at_3'], [0.5, 0])  # 1 / log2(4)

  def test_equal_ir_measures(self):
    """Of a list of scored documents, as evaluation tools read it."""
    try:
      import ir_measures
      from ir_measures import RR, R, nDCG
    except ImportError:
      self.skipTest('ir_measures is not installed')
    scores, labels = random_scores(ties=False, size=(8, 16), seed=2)
    mine = ranking_metrics(jnp.asarray(matrix_ranks(scores, labels)))
    judged = [
      ir_measures.Qrel(str(q), str(label), 1) for q, label in enumerate(labels)
    ]
    run = [
      ir_measures.ScoredDoc(str(q), str(n), float(scores[q, n]))
      for q in range(len(scores))
      for n in range(1, scores.shape[1])
    ]
    names = {
      R @ 1: 'recall_at_1',
      R @ 5: 'recall_at_5',
      R @ 10: 'recall_at_10',
      RR: 'mrr',
      nDCG @ 10: 'ndcg_at_10',
    }
    found = 0
    for value in ir_measures.iter_calc(list(names), judged, run):
      got = float(mine[names[value.measure]][int(value.query_id)])
      self.assertAlmostEqual(got, value.value, places=5)
      found += 1
    self.assertEqual(found, len(names) * len(scores))


if __name__ == '__main__':
  absltest.main()
