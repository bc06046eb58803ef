"""Server-side defences against plain numpy, through the engine's reducers.

Oracle numbers are B6 to B8 of the BDPFL notes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.defenses import DEFENSES
from fedjax_ext.defenses.flame import largest_cluster
from fedjax_ext.defenses.fools_gold import fools_gold_weights
from fedjax_ext.defenses.krum import krum_scores
from fedjax_ext.defenses.updates import norm_of

ROWS = np.array([[1.0, 0], [1, 0.1], [0.9, -0.1], [1.1, 0], [-5, 5]])
SIGNS = np.array(
  [[0.1, 0.2, -0.3], [0.1, 0.2, 0.3], [0.1, -0.2, -0.3], [0.1, -0.2, 0.3]]
)


def apply(reducer, rows, weights=None, clients=None, memory=None):
  """Folds rows [K', P] in, in the order of slots; (result [P], memory)."""
  k = len(rows)
  weights = np.ones(k) if weights is None else weights
  clients = np.arange(k) if clients is None else clients
  # Two leaves, so that rules have to look at all of them together.
  tree = lambda row: {'a': jnp.asarray(row[:1]), 'b': jnp.asarray(row[1:])}
  template = jax.eval_shape(lambda: tree(rows[0]))

  @jax.jit
  def run(memory):
    acc = reducer.init(template, k)
    for slot, (row, weight) in enumerate(zip(rows, weights, strict=True)):
      # The engine hands absent clients in as zeros.
      row = row if weight else np.zeros_like(row)
      acc = reducer.add(acc, tree(row), jnp.float32(weight), slot)
    key = jax.random.key(0)
    return reducer.finish(acc, memory, jnp.asarray(clients), key)

  if memory is None:
    memory = reducer.memory(template, 12)
  result, memory = run(memory)
  return np.concatenate([result['a'], result['b']]), memory


def plain_krum(rows, f, keep, weights):
  scores = []
  for i in range(len(rows)):
    away = sorted(
      ((rows[i] - rows[j]) ** 2).sum() for j in range(len(rows)) if j != i
    )
    scores.append(sum(away[: len(rows) - f - 2]))
  best = np.argsort(scores, kind='stable')[:keep]
  return np.average(rows[best], axis=0, weights=weights[best])


def plain_geometric_median(rows, weights, iterations=10):
  middle = np.average(rows, axis=0, weights=weights)
  for _ in range(iterations):
    away = np.maximum(np.linalg.norm(rows - middle, axis=1), 1e-6)
    middle = np.average(rows, axis=0, weights=weights / away)
  return middle


def plain_clip(rows, weights, bound):
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  return np.average(rows * np.minimum(1, bound / norms), 0, weights)


def plain_fools_gold(rows):
  """The loops of DBA's code."""
  unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  cs = unit @ unit.T - np.eye(len(rows))
  v = cs.max(1)
  for i in range(len(rows)):
    for j in range(len(rows)):
      if i != j and v[i] < v[j]:
        cs[i][j] = cs[i][j] * v[i] / v[j]
  w = np.clip(1 - cs.max(1), 0, 1)
  w = w / w.max()
  w[w == 1] = 0.99
  with np.errstate(divide='ignore'):
    return np.clip(np.log(w / (1 - w)) + 0.5, 0, 1)


def plain(name, rows, weights):
  """The result of a rule on rows [K, P] with weights [K] > 0."""
  return {
    'norm_clipping': lambda: plain_clip(rows, weights, 0.5),
    'krum': lambda: plain_krum(rows, 1, 1, weights),
    'multi_krum': lambda: plain_krum(rows, 1, 3, weights),
    'fools_gold': lambda: np.average(rows, 0, weights * plain_fools_gold(rows)),
    'robust_learning_rate': lambda: (
      np.where(np.abs(np.sign(rows).sum(0)) >= 4, 1, -1)
      * np.average(rows, 0, weights)
    ),
    'median': lambda: np.median(rows, 0),
    'trimmed_mean': lambda: np.sort(rows, 0)[2:-2].mean(0),
    'geometric_median': lambda: plain_geometric_median(rows, weights),
  }[name]()


SETTINGS = {
  'multi_krum': {'keep': 3},
  'trimmed_mean': {'trim': 2},
  'flame': {'noise': 0.0},
}
PLAIN = (
  'norm_clipping', 'krum', 'multi_krum', 'fools_gold', 'robust_learning_rate',
  'median', 'trimmed_mean', 'geometric_median',
)  # fmt: skip


def make(name, cohort_size=7):
  settings = dict(SETTINGS.get(name, {}))
  if name in ('krum', 'multi_krum', 'trimmed_mean'):
    settings['cohort_size'] = cohort_size
  return DEFENSES[name](**settings)


@functools.cache
def drawn():
  rng = np.random.default_rng(3)
  rows = rng.standard_normal((7, 5)).astype(np.float32) + 1
  rows[5:] = rows[4] + 0.05 * rng.standard_normal((2, 5))
  return rows, rng.integers(1, 20, 7).astype(np.float32)


class RulesTest(parameterized.TestCase):
  @parameterized.parameters(*PLAIN)
  def test_equals_numpy(self, name):
    rows, weights = drawn()
    got, _ = apply(make(name), rows, weights)
    np.testing.assert_allclose(
      got, plain(name, rows, weights), rtol=2e-4, atol=2e-5
    )

  @parameterized.parameters(*PLAIN, 'flame')
  def test_order_and_empty_slots_change_nothing(self, name):
    rows, weights = drawn()
    wanted, _ = apply(make(name), rows, weights)
    order = np.random.default_rng(1).permutation(7)
    got, _ = apply(make(name), rows[order], weights[order], order)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    # Empty slots before, between and behind, and a client that was dropped.
    places = np.array([1, 2, 4, 5, 6, 8, 9])
    padded, w, who = np.full((11, 5), 7.0), np.zeros(11), np.full(11, -1)
    padded[places], w[places], who[places] = rows, weights, np.arange(7)
    who[7] = 9
    got, _ = apply(make(name), padded.astype(np.float32), w, who)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)

  @parameterized.parameters(*PLAIN, 'flame')
  def test_nobody_left_moves_nothing(self, name):
    rows, _ = drawn()
    got, _ = apply(make(name), rows, np.zeros(7))
    np.testing.assert_array_equal(got, np.zeros(5))

  def test_norm_of_nothing_and_of_nan(self):
    tree = lambda x: {'a': jnp.array([x]), 'b': jnp.array([0.0, 0.0])}
    value, slope = jax.value_and_grad(norm_of)(tree(0.0))
    self.assertEqual([value, *slope['a'], *slope['b']], [0, 0, 0, 0])
    self.assertEqual(norm_of(tree(-3.0)), 3)
    self.assertTrue(np.isnan(norm_of(tree(np.nan))))

  def test_krum_numbers(self):
    rows = jnp.asarray(ROWS, jnp.float32)
    scores = krum_scores(rows, jnp.ones(5, bool), num_malicious=1)
    wanted = [0.02, 0.03, 0.07, 0.03, 120.83]
    np.testing.assert_allclose(scores, wanted, atol=1e-4)
    best, _ = apply(DEFENSES['krum'](cohort_size=5), ROWS)
    np.testing.assert_allclose(best, [1, 0], atol=1e-6)
    # m = 3 is more than n - f - 2 = 2: two of the three.
    two, _ = apply(DEFENSES['multi_krum'](cohort_size=5, keep=2), ROWS)
    np.testing.assert_allclose(two, [1, 0.05], atol=1e-6)

  def test_other_numbers(self):
    make = lambda name, **settings: apply(DEFENSES[name](**settings), ROWS)[0]
    for got, wanted in (
      (make('median'), [1, 0]),
      (make('trimmed_mean', cohort_size=5), [0.966667, 0.033333]),
      (make('norm_clipping'), [0.328181, 0.069618]),
    ):
      np.testing.assert_allclose(got, wanted, atol=1e-5)
    got = make('geometric_median', iterations=200)
    np.testing.assert_allclose(got, [0.9987, 0.0026], atol=1e-3)

  def test_learning_rate_numbers(self):
    rule = DEFENSES['robust_learning_rate'](threshold=3)
    got, _ = apply(rule, SIGNS)
    np.testing.assert_allclose(got, [0.1, 0, 0], atol=1e-6)

  @parameterized.parameters(
    ([[1, 0], [1, 0], [0, 1]], [0, 0, 1]),
    ([[1, 0], [0, 1], [1, 1]], [1, 1, 1]),
    ([[1, 0, 0], [0.9, 0.1, 0], [0, 0, 1], [0.1, 0.7, 0.3]], [0, 0, 1, 1]),
  )
  def test_fools_gold_numbers(self, rows, wanted):
    rows = jnp.asarray(rows, jnp.float32)
    got = fools_gold_weights(rows, jnp.ones(len(rows), bool))
    np.testing.assert_allclose(got, wanted, atol=1e-5)

  def test_fools_gold_remembers(self):
    """Two rounds of other clients: sums of their own rows, and no others'."""
    rows, _ = drawn()
    rule = DEFENSES['fools_gold'](layers=('z', 'b'))
    _, memory = apply(rule, rows[:3], clients=np.array([4, 2, 9]))
    got, memory = apply(
      rule, rows[3:6], clients=np.array([2, 0, 9]), memory=memory
    )
    sums = np.zeros((12, 4))
    for client, row in zip((4, 2, 9, 2, 0, 9), rows, strict=False):
      sums[client] += row[1:]
    np.testing.assert_allclose(memory, sums, rtol=1e-6)
    weights = plain_fools_gold(sums[[2, 0, 9]])
    np.testing.assert_allclose(
      got, np.average(rows[3:6], 0, weights), rtol=1e-4
    )
    with self.assertRaisesRegex(InvalidInput, r"\['c'\]"):
      apply(DEFENSES['fools_gold'](layers=('c',)), rows)

  def test_flame(self):
    """The outlier by direction goes; lengths end at the median; noise."""
    rng = np.random.default_rng(0)
    rows = np.ones((7, 5)) + 0.01 * rng.standard_normal((7, 5))
    rows[2] *= 4
    rows[6] *= -1
    chosen = largest_cluster(rows, np.ones(7, bool))
    self.assertFalse(chosen[6])
    # The clustering may leave out a point on the rim, but no more than half.
    self.assertGreaterEqual(chosen.sum(), 4)
    norms = np.linalg.norm(rows, axis=1)
    bound = np.median(norms)
    clipped = rows * np.minimum(1, bound / norms)[:, None]
    got, _ = apply(DEFENSES['flame'](noise=0.0), rows)
    np.testing.assert_allclose(got, clipped[chosen].mean(0), rtol=1e-5)
    noisy, _ = apply(DEFENSES['flame'](noise=0.1), rows)
    self.assertGreater(np.abs(noisy - got).max(), 0)
    self.assertLess(np.abs(noisy - got).max(), 0.5 * bound)

  @parameterized.parameters(
    ('krum', {'cohort_size': 4}, 'cohort_size >= 5'),
    ('multi_krum', {'cohort_size': 9, 'num_malicious': 4}, 'cohort_size >= 11'),
    ('multi_krum', {'cohort_size': 10, 'keep': 8}, 'keep'),
    ('trimmed_mean', {'cohort_size': 4, 'trim': 2}, 'cohort_size > 2'),
    ('norm_clipping', {'bound': 0}, 'bound'),
    ('robust_learning_rate', {'threshold': -1}, 'threshold'),
    ('geometric_median', {'iterations': 0}, 'iterations'),
    ('flame', {'noise': -1.0}, 'noise'),
  )
  def test_what_cannot_be(self, name, settings, message):
    with self.assertRaisesRegex(InvalidInput, message):
      DEFENSES[name](**settings)


if __name__ == '__main__':
  absltest.main()
