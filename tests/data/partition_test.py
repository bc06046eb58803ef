"""Partitioners: every example once, seeded, with the promised statistics."""

import inspect

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import dirichlet, draws, partition
from fedjax_ext.data.partition import (
  PARTITIONERS,
  apportion,
  class_counts,
  classes_partition,
  coarse_fine_dirichlet_partition,
  dirichlet_client_partition,
  dirichlet_partition,
  iid_partition,
  quantity_partition,
  shards_partition,
)

# Those that need nothing but labels.
BY_LABEL = {
  name: function
  for name, function in PARTITIONERS.items()
  if 'features' not in inspect.signature(function).parameters
}
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
    label = np.zeros(size, int)
    owner = iid_partition(label, num_clients=num_clients, seed=seed)
    self.assertEqual((owner.dtype, owner.shape), (np.int64, (size,)))
    sizes = np.bincount(owner, minlength=num_clients)
    self.assertLen(sizes, num_clients)
    self.assertLessEqual(sizes.max() - sizes.min(), 1)
    np.testing.assert_array_equal(
      owner, iid_partition(label, num_clients=num_clients, seed=seed)
    )

  def test_shuffled(self):
    """Owners depend on the seed and not on an example's place."""
    owners = np.stack(
      [iid_partition(np.zeros(40), num_clients=4, seed=s) for s in range(1000)]
    )
    for c in range(4):
      rates = (owners == c).mean(0)
      np.testing.assert_allclose(rates, 0.25, atol=0.06)

  def test_bad_input(self):
    with self.assertRaisesRegex(InvalidInput, 'num_clients=0'):
      iid_partition(np.zeros(5), num_clients=0, seed=0)


class AnyPartitionerTest(parameterized.TestCase):
  @settings(deadline=None, max_examples=200)
  @given(st.data())
  def test_each_example_once(self, draw):
    """One owner each, seeded; values of labels do not matter, their order does.

    Or a refusal in one line, with the same verdict under other seeds.
    """
    name = draw.draw(st.sampled_from(sorted(BY_LABEL)), label='name')
    label = np.array(
      draw.draw(st.lists(st.integers(0, 5), max_size=50)), np.int64
    )
    num_clients = draw.draw(st.integers(1, 12), label='num_clients')
    seed = draw.draw(st.integers(0, 2**31), label='seed')
    run = lambda label, seed: BY_LABEL[name](
      label, num_clients=num_clients, seed=seed
    )
    try:
      owner = run(label, seed)
    except InvalidInput as error:
      self.assertRegex(str(error), r'^Expected [^\n]*[0-9][^\n]*\.$')
      with self.assertRaises(InvalidInput):
        run(label, seed + 1)
      return
    self.assertEqual((owner.dtype, owner.shape), (np.int64, label.shape))
    self.assertGreaterEqual(owner.min(initial=0), 0)
    self.assertLess(owner.max(initial=0), num_clients)
    np.testing.assert_array_equal(owner, run(label, seed))
    np.testing.assert_array_equal(owner, run(label * 3 - 7, seed))

  @parameterized.parameters(*BY_LABEL)
  def test_another_seed_differs(self, name):
    label = np.arange(200) % 5
    one, two = (BY_LABEL[name](label, num_clients=10, seed=s) for s in (0, 1))
    self.assertFalse(np.array_equal(one, two))

  @parameterized.parameters(*BY_LABEL)
  def test_one_client_owns_all(self, name):
    label = np.arange(30) % 2
    owner = BY_LABEL[name](label, num_clients=1, seed=0)
    self.assertEqual(owner.tolist(), [0] * 30)

  @parameterized.parameters(
    *sorted({*BY_LABEL} - {'shards', 'multinomial_dirichlet'})
  )
  def test_a_client_for_each_example(self, name):
    """N = C, with one class: nobody gets two."""
    settings = {'classes_per_client': 1} if name == 'classes' else {}
    owner = BY_LABEL[name](
      np.zeros(40, int), num_clients=40, seed=0, **settings
    )
    self.assertEqual(sorted(owner), list(range(40)))

  @parameterized.parameters(*BY_LABEL)
  def test_many_examples_and_clients(self, name):
    """A million examples over ten thousand clients."""
    label = np.random.default_rng(0).integers(0, 10, 1_000_000)
    owner = BY_LABEL[name](label, num_clients=10_000, seed=0)
    self.assertLen(owner, 1_000_000)
    if name != 'multinomial_dirichlet':  # which has no minimum
      self.assertLen(np.unique(owner), 10_000)

  @parameterized.parameters(*BY_LABEL)
  def test_no_client(self, name):
    with self.assertRaisesRegex(InvalidInput, 'num_clients=0'):
      BY_LABEL[name](np.arange(9) % 3, num_clients=0, seed=0)

  def test_which_examples_is_random(self):
    """An example's place does not decide on its owner."""
    label = np.repeat([0, 1], 20)
    for name, function in BY_LABEL.items():
      owners = np.stack(
        [function(label, num_clients=2, seed=s) for s in range(400)]
      )
      np.testing.assert_allclose(
        (owners == 0).mean(0), 0.5, atol=0.12, err_msg=name
      )


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


class DirichletClientTest(parameterized.TestCase):
  @settings(deadline=None, max_examples=100)
  @given(st.data())
  def test_equal_sizes(self, draw):
    """Sizes within 1 of another for any alpha, however skewed the classes."""
    label = np.array(draw.draw(st.lists(st.integers(0, 6), max_size=80)), int)
    num_clients = draw.draw(st.integers(1, 12), label='num_clients')
    owner = dirichlet_client_partition(
      label,
      num_clients=num_clients,
      alpha=draw.draw(st.sampled_from((*ALPHAS, 5e-324, 1e308)), label='alpha'),
      seed=draw.draw(st.integers(0, 2**31), label='seed'),
    )
    sizes = np.bincount(owner, minlength=num_clients)
    even = np.bincount(np.arange(len(label)) % num_clients)
    self.assertEqual(sizes[: len(even)].tolist(), even.tolist())

  def test_extreme_alpha(self):
    """Tiny alpha: mostly one class a client; huge: everyone's mix is global."""
    label = np.repeat(np.arange(5), [400, 300, 200, 80, 20])
    of = lambda alpha: table(
      dirichlet_client_partition(label, num_clients=20, alpha=alpha, seed=0),
      label,
      20,
    )
    self.assertGreaterEqual(np.median(of(1e-6).max(1)), 40)
    deviation = of(1e9) / 50 - np.array([0.4, 0.3, 0.2, 0.08, 0.02])
    self.assertLess(np.abs(deviation).max(), 0.3)
    self.assertLess(deviation.std(), 0.06)  # that of draws of 50 is 0.05

  def test_fewer_classes_at_smaller_alpha(self):
    label = np.repeat(np.arange(10), 500)
    held = [
      (
        table(
          dirichlet_client_partition(
            label, num_clients=50, alpha=alpha, seed=0
          ),
          label,
          50,
        )
        > 0
      )
      .sum(1)
      .mean()
      for alpha in (0.01, 1.0, 10.0, 1000.0)
    ]
    self.assertEqual(held, sorted(held))
    self.assertLess(held[0], 3)
    self.assertGreater(held[-1], 9.9)

  @parameterized.parameters(0.5, 5.0)
  def test_mixes_are_a_dirichlet_draw(self, alpha):
    """A client's shares have the mean and variance of their Dirichlet.

    For n draws, Var = m (1 - m) ((n - 1) / (alpha + 1) + 1) / n; the pools
    run out only at the very end for so many clients.
    """
    prior, size, num_clients = np.array([0.5, 0.3, 0.2]), 20, 2000
    label = np.repeat(np.arange(3), (prior * size * num_clients).astype(int))
    owner = dirichlet_client_partition(
      label, num_clients=num_clients, alpha=alpha, seed=0
    )
    shares = table(owner, label, num_clients) / size
    variance = prior * (1 - prior) * ((size - 1) / (alpha + 1) + 1) / size
    np.testing.assert_allclose(shares.mean(0), prior)
    np.testing.assert_allclose(shares.var(0), variance, rtol=0.12)

  def test_no_client_is_served_last(self):
    """Mixes are as skewed for the last clients as for the first."""
    label = np.repeat(np.arange(10), 1000)
    largest = np.mean(
      [
        table(
          dirichlet_client_partition(
            label, num_clients=100, alpha=0.3, seed=seed
          ),
          label,
          100,
        ).max(1)
        for seed in range(20)
      ],
      axis=0,
    )
    first, last = largest[:50].mean(), largest[50:].mean()
    self.assertAlmostEqual(first, last, delta=0.05 * first)

  @parameterized.parameters(0, -1.0, float('nan'), float('inf'))
  def test_bad_alpha(self, alpha):
    with self.assertRaisesRegex(InvalidInput, f'alpha={alpha}'):
      dirichlet_client_partition(
        np.zeros(4, int), num_clients=2, alpha=alpha, seed=0
      )


class NaturalSizesTest(absltest.TestCase):
  def test_sizes_are_those_of_the_natural_clients(self):
    rng = np.random.default_rng(0)
    client = np.repeat(['b', 'a', 'c'], [5, 20, 11])
    label = rng.integers(4, size=len(client))
    for name, more in (
      ('dirichlet_client', {}),
      ('coarse_fine_dirichlet', {'features': {'coarse': label // 2}}),
    ):
      owner = PARTITIONERS[name](
        label, num_clients=3, sizes='natural', client=client, seed=0, **more
      )
      np.testing.assert_array_equal(np.bincount(owner), [20, 5, 11])

  def test_bad_input(self):
    with self.assertRaisesRegex(InvalidInput, 'natural clients'):
      dirichlet_client_partition(
        np.arange(4), num_clients=2, sizes='natural', seed=0
      )
    with self.assertRaisesRegex(InvalidInput, 'num_clients=2, as many'):
      dirichlet_client_partition(
        np.arange(4),
        num_clients=3,
        sizes='natural',
        client=np.array([0, 0, 1, 1]),
        seed=0,
      )


class RotationTest(absltest.TestCase):
  def test_as_serving_clients_in_rotation(self):
    """As a plain loop in which clients draw one example after another."""
    num_clients, alpha = 20, 0.3
    label = np.repeat(np.arange(5), 80)

    def rotation(seed):
      rng = np.random.default_rng(seed)
      pool = np.bincount(label).astype(float)
      mixes = rng.dirichlet(alpha * pool / pool.sum(), num_clients)
      counts = np.zeros((num_clients, 5), int)
      for _ in range(len(label) // num_clients):
        for c in rng.permutation(num_clients):
          left = mixes[c] * (pool > 0)
          left = left if left.sum() > 0 else pool
          y = rng.choice(5, p=left / left.sum())
          pool[y] -= 1
          counts[c, y] += 1
      return counts

    def ours(seed):
      owner = dirichlet_client_partition(
        label, num_clients=num_clients, alpha=alpha, seed=seed
      )
      return class_counts(label, owner, num_clients=num_clients, num_classes=5)

    def spread(counts):
      return (counts / counts.sum(1, keepdims=True)).std(0).mean()

    a, b = (
      np.array([spread(f(seed)) for seed in range(40)])
      for f in (rotation, ours)
    )
    error = np.hypot(a.std(), b.std()) / np.sqrt(40)
    self.assertLess(abs(a.mean() - b.mean()), 3 * error)


class CoarseFineTest(absltest.TestCase):
  def shares(self, coarse_alpha, fine_alpha):
    """Shares [C, Y] of 6 classes, 2 to each of 3 superclasses."""
    label = np.repeat(np.arange(6), 4000)
    owner = coarse_fine_dirichlet_partition(
      label,
      num_clients=60,
      coarse_alpha=coarse_alpha,
      fine_alpha=fine_alpha,
      features={'coarse': label // 2},
      seed=0,
    )
    counts = class_counts(label, owner, num_clients=60, num_classes=6)
    np.testing.assert_array_equal(counts.sum(1), 400)
    return counts / counts.sum(1, keepdims=True)

  def test_skewed_superclasses_with_even_classes(self):
    shares = self.shares(1.0, 1e5).reshape(60, 3, 2)
    coarse = shares.sum(2)
    self.assertGreater(coarse.std(0).mean(), 0.15)
    large = coarse > 0.2
    within = shares[large] / shares[large].sum(1, keepdims=True)
    self.assertLess(np.abs(within - 0.5).mean(), 0.06)

  def test_even_superclasses_with_skewed_classes(self):
    shares = self.shares(1e5, 1.0).reshape(60, 3, 2)
    self.assertLess(np.abs(shares.sum(2) - 1 / 3).mean(), 0.04)
    within = shares / shares.sum(2, keepdims=True)
    self.assertGreater(within.std(), 0.2)

  def test_bad_input(self):
    call = lambda features, **more: coarse_fine_dirichlet_partition(
      np.arange(4) % 2, num_clients=2, features=features, seed=0, **more
    )
    with self.assertRaisesRegex(InvalidInput, "'coarse'"):
      call({'x': np.zeros(4)})
    with self.assertRaisesRegex(InvalidInput, 'one superclass'):
      call({'coarse': np.arange(4)})
    with self.assertRaisesRegex(InvalidInput, 'fine_alpha=0'):
      call({'coarse': np.zeros(4, int)}, fine_alpha=0)


class MixesTest(absltest.TestCase):
  def test_spread_of_one_probability(self):
    """Oracle G12: Dirichlet(100 * uniform) over ten classes."""
    logs = draws.log_gammas(
      np.random.default_rng(0), np.full(10, 10.0), (40_000, 10)
    )
    deviation = draws.softmax(logs)[:, 0].std()
    self.assertAlmostEqual(deviation, 0.0298511, delta=3e-4)


class ShardsTest(parameterized.TestCase):
  @settings(deadline=None, max_examples=100)
  @given(st.integers(1, 8), st.integers(1, 4), st.data())
  def test_sizes(self, num_clients, shards_per_client, draw):
    """s whole shards each, that differ by at most 1."""
    fewest = num_clients * shards_per_client
    label = np.array(
      draw.draw(
        st.lists(st.integers(0, 4), min_size=fewest, max_size=fewest + 40)
      )
    )
    owner = shards_partition(
      label,
      num_clients=num_clients,
      shards_per_client=shards_per_client,
      seed=draw.draw(st.integers(0, 2**31), label='seed'),
    )
    sizes = np.bincount(owner, minlength=num_clients)
    small = len(label) // fewest
    self.assertGreaterEqual(sizes.min(), shards_per_client * small)
    self.assertLessEqual(sizes.max(), shards_per_client * (small + 1))

  def test_as_published(self):
    """600 examples each in two shards of 300: at most two classes each."""
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 6000))
    owner = shards_partition(label, num_clients=100, seed=0)
    counts = table(owner, label, 100)
    self.assertTrue((counts.sum(1) == 600).all())
    self.assertTrue(np.isin(counts, [0, 300, 600]).all())
    self.assertGreater((counts == 300).sum(), 100)

  def test_a_shard_holds_neighbouring_labels(self):
    """One shard each: classes of a client follow one another, in some order."""
    label = np.arange(60) % 6
    owner = shards_partition(label, num_clients=4, shards_per_client=1, seed=0)
    held = {tuple(np.unique(label[owner == c])) for c in range(4)}
    self.assertEqual(held, {(0, 1), (1, 2), (3, 4), (4, 5)})

  @parameterized.parameters((40, 2), (61, 1), (1, 61))
  def test_too_many_shards(self, num_clients, shards_per_client):
    with self.assertRaisesRegex(
      InvalidInput,
      r'Expected num_clients \* shards_per_client <= 60 examples, got '
      f'num_clients={num_clients}, shards_per_client={shards_per_client}.',
    ):
      shards_partition(
        np.zeros(60, int),
        num_clients=num_clients,
        shards_per_client=shards_per_client,
        seed=0,
      )

  def test_no_shards(self):
    with self.assertRaisesRegex(InvalidInput, 'shards_per_client=0'):
      shards_partition(
        np.zeros(9, int), num_clients=2, shards_per_client=0, seed=0
      )


class QuantityTest(parameterized.TestCase):
  @settings(deadline=None, max_examples=100)
  @given(
    st.integers(1, 12),
    st.integers(0, 5),
    st.integers(0, 60),
    st.sampled_from(ALPHAS),
    st.integers(0, 2**31),
  )
  def test_minimum(self, num_clients, minimum, more, alpha, seed):
    owner = quantity_partition(
      np.zeros(num_clients * minimum + more, int),
      num_clients=num_clients,
      alpha=alpha,
      min_examples=minimum,
      seed=seed,
    )
    sizes = np.bincount(owner, minlength=num_clients)
    self.assertEqual((len(sizes), sizes.sum()), (num_clients, len(owner)))
    self.assertGreaterEqual(sizes.min(), minimum)

  @settings(deadline=None, max_examples=200)
  @given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.data())
  def test_the_minimum_is_taken_from_the_largest(self, sizes, draw):
    """As when each missing example is taken from the largest client in turn."""
    minimum = draw.draw(st.integers(0, sum(sizes) // len(sizes)))
    counts = np.array(sizes)[:, None]
    dirichlet._raise_minimum(counts, minimum)
    got = partition._at_least(np.array(sizes), minimum)
    self.assertEqual(sorted(got), sorted(counts[:, 0]))
    self.assertGreaterEqual(got.min(), minimum)

  def test_sizes_are_skewed_and_labels_are_not(self):
    label = np.repeat([0, 1], [30_000, 10_000])
    sizes = {}
    for alpha in (0.5, 1e6):
      owner = quantity_partition(label, num_clients=10, alpha=alpha, seed=0)
      counts = table(owner, label, 10)
      sizes[alpha] = counts.sum(1)
      large = counts[sizes[alpha] > 500]
      np.testing.assert_allclose(large[:, 0] / large.sum(1), 0.75, atol=0.06)
    self.assertGreater(sizes[0.5].std(), 1000)
    self.assertLess(sizes[1e6].std(), 20)

  def test_shares(self):
    """Sizes have the mean and variance of their Dirichlet."""
    shares = np.stack(
      [
        np.bincount(
          quantity_partition(
            np.zeros(1000), num_clients=4, alpha=2.0, min_examples=0, seed=s
          ),
          minlength=4,
        )
        / 1000
        for s in range(600)
      ]
    )
    np.testing.assert_allclose(shares.mean(0), 0.25, atol=0.03)
    np.testing.assert_allclose(shares.var(), 0.25 * 0.75 / 9, rtol=0.12)

  def test_bad_input(self):
    for settings_, message in (
      ({'alpha': 0.0}, 'alpha=0.0'),
      ({'alpha': float('inf')}, 'alpha=inf'),
      (
        {'min_examples': 4},
        '<= 10 examples, got num_clients=3, min_examples=4',
      ),
      ({'min_examples': -1}, 'min_examples=-1'),
    ):
      with self.assertRaisesRegex(InvalidInput, message):
        quantity_partition(np.zeros(10), num_clients=3, seed=0, **settings_)


class ClassesTest(parameterized.TestCase):
  @settings(deadline=None, max_examples=200)
  @given(st.data())
  def test_exactly_k_classes(self, draw):
    """k classes each, holders within 1, a class cut evenly over its holders."""
    num_classes = draw.draw(st.integers(1, 7), label='num_classes')
    k = draw.draw(st.integers(1, num_classes), label='classes_per_client')
    num_clients = draw.draw(
      st.integers(-(-num_classes // k), 15), label='num_clients'
    )
    fewest = num_clients * k // num_classes
    extra = draw.draw(
      st.lists(st.integers(0, 9), min_size=num_classes, max_size=num_classes)
    )
    need = num_clients * k % num_classes
    pool = fewest + np.array(extra) + (np.arange(num_classes) < need)
    label = np.random.default_rng(0).permutation(
      np.repeat(np.arange(num_classes), pool)
    )
    owner = classes_partition(
      label,
      num_clients=num_clients,
      classes_per_client=k,
      seed=draw.draw(st.integers(0, 2**31), label='seed'),
    )
    counts = table(owner, label, num_clients)
    self.assertTrue(((counts > 0).sum(1) == k).all())
    holders = (counts > 0).sum(0)
    self.assertGreaterEqual(holders.min(), 1)
    self.assertLessEqual(holders.max() - holders.min(), 1)
    for y in range(num_classes):
      shares = counts[counts[:, y] > 0, y]
      self.assertLessEqual(shares.max() - shares.min(), 1)

  def test_classes_meet_at_random(self):
    """Every pair of classes is as likely to be held by one client."""
    label = np.arange(400) % 5
    pairs = np.zeros((5, 5))
    for seed in range(200):
      held = table(
        classes_partition(label, num_clients=20, seed=seed), label, 20
      )
      held = (held > 0).astype(float)
      pairs += held.T @ held / 200
    off = pairs[~np.eye(5, dtype=bool)]
    np.testing.assert_allclose(off, 2, atol=0.35)  # 20 pairs over 10 kinds
    np.testing.assert_allclose(np.diag(pairs), 8)

  def test_all_classes_each(self):
    """k = Y: everyone has an equal share of everything."""
    label = np.arange(60) % 3
    owner = classes_partition(
      label, num_clients=5, classes_per_client=3, seed=0
    )
    self.assertTrue((table(owner, label, 5) == 4).all())

  def test_infeasible(self):
    """The message names what cannot be met."""
    label = np.array([4] * 9 + [7] * 9 + [9] * 2)
    for num_clients, k, message in (
      (5, 4, '1 <= classes_per_client <= 3, got classes_per_client=4'),
      (5, 0, 'got classes_per_client=0'),
      (
        2,
        1,
        r'num_clients \* classes_per_client >= 3 classes, got num_clients=2, '
        'classes_per_client=1',
      ),
      (
        5,
        2,
        'at least 3 examples of class 9, one for each client that holds it, '
        'got 2 with num_clients=5, classes_per_client=2',
      ),
    ):
      with self.assertRaisesRegex(InvalidInput, message):
        classes_partition(
          label, num_clients=num_clients, classes_per_client=k, seed=0
        )

  def test_a_rare_class_has_the_fewer_holders(self):
    """What can be met is met: 7 places, and class 2 has but two examples."""
    label = np.array([0] * 9 + [1] * 9 + [2] * 2)
    for seed in range(20):
      owner = classes_partition(
        label, num_clients=7, classes_per_client=1, seed=seed
      )
      self.assertEqual((table(owner, label, 7) > 0).sum(0).tolist()[2], 2)


class ClassCountsTest(absltest.TestCase):
  def test_by_hand(self):
    """Nobody's examples do not count; clients and classes may be empty."""
    got = class_counts(
      np.array([0, 2, 2, 1, 2]),
      np.array([1, 1, 1, -1, 0]),
      num_clients=3,
      num_classes=4,
    )
    self.assertEqual(got.dtype, np.int64)
    self.assertEqual(got.tolist(), [[0, 0, 1, 0], [1, 0, 2, 0], [0, 0, 0, 0]])

  def test_no_examples(self):
    none = np.zeros(0, int)
    got = class_counts(none, none, num_clients=2, num_classes=3)
    self.assertEqual(got.tolist(), [[0] * 3] * 2)

  def test_bad_input(self):
    for label, owner, message in (
      ([0, 3], [0, 0], r'label in 0\.\.2, got 0\.\.3'),
      ([-1], [0], r'label in 0\.\.2, got -1'),
      ([0], [2], r'owner in -1\.\.1, got 0\.\.2'),
      ([0], [-2], r'owner in -1\.\.1, got -2'),
      ([0, 1], [0], 'Expected 2 owners, got 1'),
    ):
      with self.assertRaisesRegex(InvalidInput, message):
        class_counts(label, owner, num_clients=2, num_classes=3)


if __name__ == '__main__':
  absltest.main()
