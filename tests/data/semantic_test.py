"""Semantic partitions: divergences and matching by hand, clusters, clients."""

import itertools

import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import (
  PARTITIONERS,
  Gaussians,
  kl_divergences,
  match_clusters,
  semantic_partition,
)
from fedjax_ext.data.semantic import fit_clusters


def gaussians(means, covariances):
  return Gaussians(np.array(means, float), np.array(covariances, float))


def random_gaussians(rng, count, features, *, diagonal=False):
  means = rng.standard_normal((count, features))
  if diagonal:
    return Gaussians(means, rng.uniform(0.2, 3, (count, features)))
  a = rng.standard_normal((count, features, features))
  return Gaussians(means, a @ a.swapaxes(1, 2) + 0.3 * np.eye(features))


class DivergenceTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_one_feature(self, diagonal):
    """Oracle G6."""
    shape = (1, 1) if diagonal else (1, 1, 1)
    a = gaussians([[0]], np.full(shape, 1))
    b = gaussians([[1]], np.full(shape, 4))
    self.assertAlmostEqual(kl_divergences(a, b)[0, 0], 0.4431471806, 9)
    self.assertAlmostEqual(kl_divergences(b, a)[0, 0], 1.3068528194, 9)

  def test_two_features(self):
    """Oracle G7."""
    one, two = np.array([[1, 0], [0.5, 2]]), np.array([[2, 0], [0, 1]])
    a = gaussians([[0, 0]], [one @ one.T])
    b = gaussians([[1, -1]], [two @ two.T])
    self.assertAlmostEqual(kl_divergences(a, b)[0, 0], 1.875)
    self.assertAlmostEqual(kl_divergences(b, a)[0, 0], 2.03125)

  def test_every_pair_against_the_plain_formula(self):
    rng = np.random.default_rng(0)
    a, b = random_gaussians(rng, 4, 3), random_gaussians(rng, 5, 3)
    got = kl_divergences(a, b)
    for i, j in itertools.product(range(4), range(5)):
      m, s, n, t = a.means[i], a.covariances[i], b.means[j], b.covariances[j]
      inverse = np.linalg.inv(t)
      expected = (
        np.trace(inverse @ s)
        + (n - m) @ inverse @ (n - m)
        - 3
        + np.log(np.linalg.det(t) / np.linalg.det(s))
      ) / 2
      self.assertAlmostEqual(got[i, j], expected, 9)
    np.testing.assert_allclose(np.diag(kl_divergences(a, a)), 0, atol=1e-9)

  def test_diagonal_is_full(self):
    rng = np.random.default_rng(1)
    a, b = (random_gaussians(rng, 4, 3, diagonal=True) for _ in range(2))
    full = [
      Gaussians(g.means, np.stack([np.diag(v) for v in g.covariances]))
      for g in (a, b)
    ]
    np.testing.assert_allclose(
      kl_divergences(a, b), kl_divergences(*full), rtol=1e-9
    )

  def test_not_positive_definite(self):
    bad = gaussians([[0, 0]], [[[1, 2], [2, 1]]])
    with self.assertRaisesRegex(InvalidInput, 'positive definite'):
      kl_divergences(bad, bad)
    with self.assertRaisesRegex(InvalidInput, 'variances > 0'):
      kl_divergences(*[gaussians([[0]], [[0]])] * 2)


class MatchingTest(absltest.TestCase):
  def test_chain_by_hand(self):
    """Oracle G8: half squared distances of unit-variance clusters."""
    a, b, c = (
      gaussians(np.array(x)[:, None], np.ones((3, 1)))
      for x in ((0, 5, 10), (9, 1, 6), (5.5, 10.5, 0.2))
    )
    client = match_clusters([a, b, c], order=[0, 1, 2])
    np.testing.assert_array_equal(client[0], [0, 1, 2])
    # Cluster j of B goes to ...: A0 with B1, A1 with B2, A2 with B0.
    np.testing.assert_array_equal(client[1], [2, 0, 1])
    np.testing.assert_array_equal(client[2], [1, 2, 0])
    cost = kl_divergences(a, b)
    self.assertAlmostEqual(cost[[0, 1, 2], [1, 2, 0]].sum(), 1.5)
    cost = kl_divergences(b, c)
    self.assertAlmostEqual(cost[[0, 1, 2], [1, 2, 0]].sum(), 1.57)

  def test_least_cost_is_not_greedy(self):
    """Oracle G9."""
    cost = np.array([[1, 2], [1.5, 4]])
    two = gaussians([[0], [1]], [[1], [1]])
    client = match_clusters([two, two], order=[0, 1], cost=lambda a, b: cost)
    # Row 0 takes column 1, row 1 column 0: 3.5 in all.
    np.testing.assert_array_equal(client[1], [1, 0])

  def test_every_class_is_a_permutation(self):
    rng = np.random.default_rng(0)
    clusters = [random_gaussians(rng, 6, 2) for _ in range(5)]
    for matching in ('kl', 'random'):
      one, two, other = (
        match_clusters(clusters, matching=matching, seed=s) for s in (0, 0, 1)
      )
      np.testing.assert_array_equal(one, two)
      self.assertFalse(np.array_equal(one, other))
      np.testing.assert_array_equal(
        np.sort(one, axis=1), np.tile(np.arange(6), (5, 1))
      )


class ClustersTest(parameterized.TestCase):
  def test_two_pairs(self):
    """Oracle G10: the fixed point of two well separated pairs."""
    x = np.array([0.0, 1, 4, 5])[:, None]
    got, cluster = fit_clusters(x, num_clusters=2, seed=0)
    order = np.argsort(got.means[:, 0])
    np.testing.assert_allclose(got.means[order, 0], [0.5, 4.5], atol=1e-6)
    np.testing.assert_allclose(
      got.covariances[order, 0, 0], [0.2501, 0.2501], atol=1e-6
    )
    self.assertEqual(cluster[0], cluster[1])
    self.assertEqual(cluster[2], cluster[3])
    self.assertNotEqual(cluster[0], cluster[2])
    density = sum(
      0.5 * stats.norm.pdf(x[:, 0], m[0], np.sqrt(v[0, 0]))
      for m, v in zip(got.means, got.covariances, strict=True)
    )
    self.assertAlmostEqual(np.log(density).mean(), -1.4189385732, 6)

  @parameterized.parameters('full', 'diag')
  def test_fewer_examples_than_clusters(self, covariance):
    x = np.random.default_rng(0).standard_normal((3, 2))
    got, cluster = fit_clusters(
      x, num_clusters=5, covariance=covariance, seed=0
    )
    self.assertLen(got.means, 5)
    self.assertLess(cluster.max(), 3)
    np.testing.assert_allclose(got.means[3:], np.tile(x.mean(0), (2, 1)))
    self.assertTrue(np.isfinite(kl_divergences(got, got)).all())


class OddInputTest(absltest.TestCase):
  def test_one_example(self):
    got, cluster = fit_clusters(np.array([[1.0, 2.0]]), num_clusters=3, seed=0)
    np.testing.assert_array_equal(got.means, np.tile([1.0, 2.0], (3, 1)))
    self.assertEqual(cluster.tolist(), [0])
    owner = semantic_partition(
      np.array([0, 0, 0, 1]),
      num_clients=2,
      components=0,
      feature='x',
      features={'x': np.random.default_rng(0).normal(size=(4, 3))},
      seed=0,
    )
    self.assertLen(owner, 4)

  def test_what_no_mixture_fits(self):
    x = 1e8 * np.random.default_rng(0).normal(size=(40, 6))
    with self.assertRaisesRegex(InvalidInput, 'raise regularisation'):
      fit_clusters(x, num_clusters=20, seed=0)

  def test_no_examples(self):
    with self.assertRaisesRegex(InvalidInput, 'got none'):
      semantic_partition(
        np.zeros(0, int), num_clients=2, features={'image': np.zeros((0, 2))},
        seed=0,
      )  # fmt: skip


def styles(num_clients=6, num_classes=3, each=20, features=4, seed=0):
  """Examples in clusters that are wide apart, the same ones in each class."""
  rng = np.random.default_rng(seed)
  style = 20 * rng.standard_normal((num_clients, features))
  mean = rng.standard_normal((num_classes, features))
  label, client = np.divmod(
    np.arange(num_classes * num_clients * each) // each, num_clients
  )
  noise = 0.1 * rng.standard_normal((len(label), features))
  return (mean[label] + style[client] + noise).astype(np.float32), label, client


def same_groups(a, b):
  """Whether two assignments are the same up to names."""
  pairs = set(zip(a.tolist(), b.tolist(), strict=True))
  return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


class PartitionTest(parameterized.TestCase):
  @parameterized.product(covariance=['full', 'diag'], components=[0, 2])
  def test_finds_styles_again(self, covariance, components):
    x, label, client = styles()
    owner = semantic_partition(
      label,
      num_clients=6,
      components=components,
      covariance=covariance,
      regularisation=1e-2,
      feature='x',
      features={'x': x},
      seed=0,
    )
    self.assertTrue(same_groups(owner, client))

  def test_random_matching_mixes_styles(self):
    x, label, client = styles()
    owner = semantic_partition(
      label,
      num_clients=6,
      components=0,
      regularisation=1e-2,
      matching='random',
      feature='x',
      features={'x': x},
      seed=0,
    )
    self.assertFalse(same_groups(owner, client))
    for y in range(3):
      self.assertTrue(same_groups(owner[label == y], client[label == y]))

  def test_every_example_in_one_client_and_seeded(self):
    x, label, _ = styles(each=7)
    partition = lambda seed: PARTITIONERS['semantic'](
      label,
      num_clients=4,
      components=3,
      feature='x',
      features={'x': x},
      seed=seed,
    )
    one, two, other = partition(0), partition(0), partition(1)
    self.assertEqual(one.shape, label.shape)
    self.assertBetween(one.min(), 0, 3)
    self.assertBetween(one.max(), 0, 3)
    np.testing.assert_array_equal(one, two)
    self.assertFalse(np.array_equal(one, other))

  def test_warns_of_few_examples(self):
    x, label, _ = styles(each=3)
    label = np.where(np.arange(len(label)) < 5, 7, label)
    with self.assertLogs('fedjax_ext.data.semantic', 'WARNING') as logs:
      semantic_partition(
        label, num_clients=2, components=0, feature='x', features={'x': x},
        seed=0,
      )  # fmt: skip
    self.assertRegex(logs.output[0], r'fewer than 10 .*: .*7 \(2\.5\)')

  @parameterized.parameters(
    ({'feature': 'image'}, "'image'"),
    ({'components': 99}, 'components=99'),
    ({'components': -1}, 'components=-1'),
    ({'covariance': 'tied'}, 'covariance=tied'),
    ({'matching': 'greedy'}, 'matching=greedy'),
    ({'start': 'zero'}, 'start=zero'),
    ({'regularisation': 0.0}, 'regularisation=0.0'),
    ({'iterations': 0}, 'iterations=0'),
    ({'num_clients': 0}, 'num_clients=0'),
    ({'embedding': 'nothing.here'}, 'embedding=nothing.here'),
  )
  def test_bad_input(self, setting, message):
    x, label, _ = styles()
    settings = dict(num_clients=6, feature='x', components=0) | setting
    with self.assertRaisesRegex(InvalidInput, message):
      semantic_partition(label, features={'x': x}, seed=0, **settings)


if __name__ == '__main__':
  absltest.main()
