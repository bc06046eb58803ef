"""Splits: exact counts, by class and by client, seeded."""

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import (
  choose_clients,
  client_mask,
  from_assignment,
  stratified_mask,
)

# Images of each digit in scikit-learn's data set, 1,797 in all.
DIGITS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)


def by_sizes(sizes):
  owner = np.repeat(np.arange(len(sizes)), sizes)
  order = np.random.default_rng(0).permutation(len(owner))
  return from_assignment(
    {'x': np.arange(len(owner))},
    owner[order],
    client_ids=np.arange(len(sizes)),
  )


class StratifiedMaskTest(parameterized.TestCase):
  def test_digits(self):
    """A fifth of the digits is 360, each class by its share."""
    label = np.random.default_rng(0).permutation(
      np.repeat(np.arange(10), DIGITS)
    )
    chosen = stratified_mask(label, fraction=0.2, seed=0)
    self.assertEqual((chosen.dtype, chosen.sum()), (bool, 360))
    per_class = np.bincount(label[chosen])
    np.testing.assert_allclose(per_class, np.array(DIGITS) / 5, atol=1)

  @settings(deadline=None, max_examples=80)
  @given(
    st.lists(st.integers(0, 5), max_size=120),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 2**31),
  )
  def test_counts(self, label, fraction, seed):
    """ceil(fraction * N) in all, each class within 1 of its share."""
    label = np.array(label, int)
    chosen = stratified_mask(label, fraction=fraction, seed=seed)
    total = int(np.ceil(fraction * len(label)))
    self.assertEqual(chosen.sum(), total)
    for y in np.unique(label):
      share = total * (label == y).mean()
      self.assertLess(abs(chosen[label == y].sum() - share), 1 + 1e-9)
    np.testing.assert_array_equal(
      chosen, stratified_mask(label, fraction=fraction, seed=seed)
    )

  def test_which_examples_is_random(self):
    """Within a class, every example is as likely to be chosen."""
    label = np.repeat([0, 1], [30, 10])
    rate = np.mean(
      [stratified_mask(label, fraction=0.3, seed=s) for s in range(1500)], 0
    )
    np.testing.assert_allclose(rate, 0.3, atol=0.06)

  @parameterized.parameters(-0.1, 1.0, 2.0, float('nan'))
  def test_bad_fraction(self, fraction):
    """All three splitters name a fraction they cannot take."""
    message = f'fraction={fraction}'
    with self.assertRaisesRegex(InvalidInput, message):
      stratified_mask(np.zeros(4, int), fraction=fraction, seed=0)
    with self.assertRaisesRegex(InvalidInput, message):
      client_mask(by_sizes((3, 2)), fraction=fraction, seed=0)
    with self.assertRaisesRegex(InvalidInput, message):
      choose_clients(np.arange(4), fraction=fraction, seed=0)


class ClientMaskTest(parameterized.TestCase):
  @parameterized.parameters(
    (0.0, [0, 0, 0, 0, 0, 0]),
    (0.2, [0, 0, 0, 1, 2, 4]),
    (0.5, [0, 0, 1, 2, 5, 10]),  # 1.5 and 2.5 round to even
    (0.99, [0, 0, 1, 4, 9, 20]),
  )
  def test_counts(self, fraction, expected):
    """round(fraction * n) of each client, and never its last example."""
    sizes = np.array([0, 1, 2, 5, 10, 21])
    view = by_sizes(sizes)
    chosen = client_mask(view, fraction=fraction, seed=3)
    self.assertEqual(view.filter(chosen).sizes().tolist(), expected)
    np.testing.assert_array_equal(
      chosen, client_mask(view, fraction=fraction, seed=3)
    )

  def test_which_examples_is_random(self):
    """Within a client, every example is as likely to be chosen."""
    view = by_sizes((10, 0, 5))
    rate = np.mean(
      [client_mask(view, fraction=0.4, seed=s) for s in range(1500)], 0
    )
    np.testing.assert_allclose(rate, 0.4, atol=0.06)


class ChooseClientsTest(parameterized.TestCase):
  @parameterized.parameters((0.0, 0), (0.1, 1), (0.3, 3), (0.5, 5), (0.99, 10))
  def test_counts(self, fraction, expected):
    """round(fraction * C) distinct clients of the given ones, sorted."""
    clients = np.arange(100, 110)
    chosen = choose_clients(clients, fraction=fraction, seed=1)
    self.assertLen(chosen, expected)
    self.assertTrue((np.diff(chosen) > 0).all())
    self.assertTrue(np.isin(chosen, clients).all())
    np.testing.assert_array_equal(
      chosen, choose_clients(clients, fraction=fraction, seed=1)
    )

  def test_which_clients_is_random(self):
    clients = np.arange(10)
    chosen = [choose_clients(clients, fraction=0.3, seed=s) for s in range(999)]
    rate = np.bincount(np.concatenate(chosen), minlength=10) / 999
    np.testing.assert_allclose(rate, 0.3, atol=0.06)


if __name__ == '__main__':
  absltest.main()
