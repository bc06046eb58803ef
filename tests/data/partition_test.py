"""Partitioners: every example once, seeded, with the promised statistics."""

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import apportion, dirichlet_partition, iid_partition

ALPHAS = (1e-6, 0.1, 1.0, 1e6)


def table(owner, label, num_clients):
  """Examples of every client and class, int [C, Y]."""
  counts = np.zeros((num_clients, label.max(initial=0) + 1), int)
  np.add.at(counts, (owner, label), 1)
  return counts


class ApportionTest(parameterized.TestCase):
  @parameterized.parameters(
    ([1, 1, 1], 3, [1, 1, 1]),
    ([1, 1, 1], 4, [2, 1, 1]),
    ([1, 1, 1], 5, [2, 2, 1]),
    ([0.5, 0.3, 0.2], 9, [4, 3, 2]),  # 4.5, 2.7, 1.8: remainders .8 and .7
    ([0, 5, 0], 7, [0, 7, 0]),
    ([2], 0, [0]),
  )
  def test_by_hand(self, shares, total, expected):
    """Largest remainders win, ties go to the lower index."""
    got = apportion(np.array(shares), total)
    self.assertEqual(got.tolist(), expected)

  @settings(deadline=None, max_examples=200)
  @given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=30),
    st.integers(0, 100_000),
  )
  def test_sums_to_the_total_within_one(self, shares, total):
    """Counts are whole, sum to the total and miss their share by under 1."""
    shares = np.array(shares) + 1e-3
    got = apportion(shares, total)
    self.assertEqual((got.dtype, got.sum()), (np.int64, total))
    self.assertGreaterEqual(got.min(), 0)
    exact = shares / shares.sum() * total
    self.assertLess(np.abs(got - exact).max(), 1 + 1e-6)


class IidTest(parameterized.TestCase):
  @settings(deadline=None, max_examples=60)
  @given(st.integers(0, 200), st.integers(1, 40), st.integers(0, 2**31))
  def test_each_example_once_and_even(self, size, num_clients, seed):
    """One owner each, sizes within 1 of another, the same for the same seed."""
    owner = iid_partition(size, num_clients=num_clients, seed=seed)
    self.assertEqual((owner.dtype, owner.shape), (np.int64, (size,)))
    sizes = np.bincount(owner, minlength=num_clients)
    self.assertLen(sizes, num_clients)
    self.assertLessEqual(sizes.max() - sizes.min(), 1)
    np.testing.assert_array_equal(
      owner, iid_partition(size, num_clients=num_clients, seed=seed)
    )

  def test_shuffled(self):
    """Owners depend on the seed and not on an example's place."""
    owners = np.stack(
      [iid_partition(40, num_clients=4, seed=s) for s in range(1000)]
    )
    for c in range(4):
      rates = (owners == c).mean(0)
      np.testing.assert_allclose(rates, 0.25, atol=0.06)

  def test_bad_input(self):
    with self.assertRaisesRegex(InvalidInput, 'num_clients=0'):
      iid_partition(5, num_clients=0, seed=0)


class DirichletTest(parameterized.TestCase):
  @settings(deadline=None, max_examples=80)
  @given(st.data())
  def test_each_example_once_with_the_minimum(self, draw):
    """Every example has one owner, every client its minimum, for any alpha."""
    num_clients = draw.draw(st.integers(1, 12), label='num_clients')
    minimum = draw.draw(st.integers(0, 4), label='min_examples')
    fewest = max(1, num_clients * minimum)
    label = np.array(
      draw.draw(
        st.lists(st.integers(0, 4), min_size=fewest, max_size=fewest + 40)
      )
    )
    settings = {
      'num_clients': num_clients,
      'alpha': draw.draw(st.sampled_from(ALPHAS), label='alpha'),
      'min_examples': minimum,
      'seed': draw.draw(st.integers(0, 2**31), label='seed'),
    }
    owner = dirichlet_partition(label, **settings)
    self.assertEqual((owner.dtype, owner.shape), (np.int64, label.shape))
    sizes = np.bincount(owner, minlength=num_clients)
    self.assertLen(sizes, num_clients)
    self.assertGreaterEqual(sizes.min(), minimum)
    np.testing.assert_array_equal(owner, dirichlet_partition(label, **settings))

  @parameterized.parameters(*ALPHAS)
  def test_ends_when_every_example_is_needed(self, alpha):
    """The tightest request that can be met is met exactly."""
    label = np.arange(3000) % 7
    owner = dirichlet_partition(
      label, num_clients=1000, alpha=alpha, min_examples=3, seed=1
    )
    self.assertTrue((np.bincount(owner, minlength=1000) == 3).all())

  def test_extreme_alpha(self):
    """Tiny alpha: a class goes to one client; huge: it is cut evenly."""
    label = np.repeat(np.arange(6), 50)
    of = lambda alpha, seed: table(
      dirichlet_partition(
        label, num_clients=5, alpha=alpha, min_examples=0, seed=seed
      ),
      label,
      5,
    )
    for seed in range(5):
      self.assertTrue((of(1e-6, seed).max(0) == 50).all())
      self.assertLessEqual(np.abs(of(1e6, seed) - 10).max(), 1)

  def test_the_minimum_is_taken_from_the_largest(self):
    """One class at alpha -> 0: all but one client get just the minimum."""
    owner = dirichlet_partition(
      np.zeros(100, int), num_clients=5, alpha=1e-6, min_examples=3, seed=0
    )
    self.assertEqual(sorted(np.bincount(owner)), [3, 3, 3, 3, 88])

  def test_the_minimum_takes_the_most_frequent_class(self):
    """A giver's most frequent class shrinks, its rare ones stay."""
    label = np.repeat([0, 1], [90, 10])
    for seed in range(20):
      owner = dirichlet_partition(
        label, num_clients=2, alpha=1e-6, min_examples=5, seed=seed
      )
      counts = table(owner, label, 2)
      if counts.sum(1).min() == 5:  # both classes fell to one client
        self.assertEqual(sorted(counts.tolist()), [[5, 0], [85, 10]])
        return
    self.fail('no seed gave both classes to one client')

  @parameterized.parameters(0.1, 0.5, 5.0)
  def test_class_shares(self, alpha):
    """Shares have Dirichlet's mean 1/C and variance; classes do not depend."""
    num_clients, per_class = 4, 1000
    label = np.repeat(np.arange(3), per_class)
    shares = np.stack(
      [
        table(
          dirichlet_partition(
            label,
            num_clients=num_clients,
            alpha=alpha,
            min_examples=0,
            seed=seed,
          ),
          label,
          num_clients,
        )
        / per_class
        for seed in range(500)
      ]
    )  # [500, C, Y]
    mean = 1 / num_clients
    variance = mean * (1 - mean) / (num_clients * alpha + 1)
    error = 4 * (variance / len(shares)) ** 0.5
    np.testing.assert_allclose(shares.mean(0), mean, atol=error)
    np.testing.assert_allclose(shares.var(0), variance, rtol=0.25)
    np.testing.assert_allclose(shares.var((0, 2)), variance, rtol=0.12)
    between = np.corrcoef(shares[:, 0, 0], shares[:, 0, 1])[0, 1]
    self.assertLess(abs(between), 0.15)

  def test_which_examples_is_random(self):
    """Within a class, every example is as likely to go to a client."""
    label = np.zeros(20, int)
    owners = np.stack(
      [
        dirichlet_partition(label, num_clients=2, alpha=1e6, seed=s)
        for s in range(1000)
      ]
    )
    np.testing.assert_allclose((owners == 0).mean(0), 0.5, atol=0.07)

  def test_labels_with_gaps(self):
    """Labels need not be 0..Y-1, nor all occur."""
    label = np.array([7, 100, 7, 100, -3, 7])
    owner = dirichlet_partition(label, num_clients=3, alpha=1.0, seed=0)
    self.assertEqual(np.bincount(owner, minlength=3).sum(), 6)
    self.assertGreaterEqual(np.bincount(owner, minlength=3).min(), 1)

  def test_another_seed_differs(self):
    label = np.arange(100) % 3
    one, two = (
      dirichlet_partition(label, num_clients=4, alpha=1.0, seed=s)
      for s in (0, 1)
    )
    self.assertFalse(np.array_equal(one, two))

  def test_bad_input(self):
    """What cannot be met is named with its numbers."""
    label = np.zeros(10, int)
    for settings_, message in (
      (
        {'num_clients': 4, 'min_examples': 3, 'alpha': 1.0},
        r'<= 10 examples, got num_clients=4, min_examples=3',
      ),
      ({'num_clients': 11, 'alpha': 1.0}, 'num_clients=11'),
      ({'num_clients': 0, 'alpha': 1.0}, 'num_clients=0'),
      ({'num_clients': 2, 'min_examples': -1, 'alpha': 1.0}, 'examples=-1'),
      ({'num_clients': 2, 'alpha': 0}, 'alpha=0'),
      ({'num_clients': 2, 'alpha': -1.0}, 'alpha=-1'),
      ({'num_clients': 2, 'alpha': float('nan')}, 'alpha=nan'),
    ):
      with self.assertRaisesRegex(InvalidInput, message):
        dirichlet_partition(label, seed=0, **settings_)

  def test_infinite_alpha(self):
    """An alpha whose draw is not a number is refused by name."""
    with self.assertRaisesRegex(InvalidInput, 'alpha=inf'):
      dirichlet_partition(
        np.arange(40) % 2, num_clients=4, alpha=float('inf'), seed=0
      )

  def test_no_examples(self):
    """Nothing to split is split into nothing."""
    owner = dirichlet_partition(
      np.zeros(0, int), num_clients=3, alpha=1.0, min_examples=0, seed=0
    )
    self.assertEqual(owner.shape, (0,))


if __name__ == '__main__':
  absltest.main()
