"""Federated data: views over shared columns, checked against plain loops."""

import pathlib
import sys
import tempfile
import time

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import FederatedData, from_assignment, from_client_column

OWNER = np.array([2, 0, 2, -1, 4, 0, 2])  # client 1 and 3 empty, row 3 unowned


def example():
  return from_assignment(
    {'x': np.arange(14).reshape(7, 2), 'label': np.arange(7)},
    OWNER,
    client_ids=np.array(['a', 'b', 'c', 'd', 'e']),
  )


class FederatedDataTest(parameterized.TestCase):
  def test_assignment(self):
    """Clients own their rows, in row order; rows of owner -1 are nobody's."""
    view = example()
    self.assertEqual((view.num_clients, view.num_examples), (5, 6))
    self.assertEqual(
      [view.client_rows(c).tolist() for c in range(5)],
      [[1, 5], [], [0, 2, 6], [], [4]],
    )
    np.testing.assert_array_equal(view.sizes(), [2, 0, 3, 0, 1])
    np.testing.assert_array_equal(view.sizes(np.array([4, 0, 4])), [1, 2, 1])
    np.testing.assert_array_equal(view.owners(), [0, 0, 2, 2, 2, 4])
    np.testing.assert_array_equal(OWNER[view.rows], view.owners())

  def test_client_is_a_copy(self):
    """One client's examples, also of an empty one; not a window on them."""
    view = example()
    got = view.client(2)
    np.testing.assert_array_equal(got['x'], [[0, 1], [4, 5], [12, 13]])
    np.testing.assert_array_equal(got['label'], [0, 2, 6])
    got['label'][:] = -1
    np.testing.assert_array_equal(view.client(2)['label'], [0, 2, 6])
    self.assertEqual(view.client(3)['x'].shape, (0, 2))

  def test_rows_of_another_order(self):
    """`rows` says which rows the owners speak of; a row may come twice."""
    view = from_assignment(
      {'x': np.arange(5) * 10},
      np.array([1, 0, 1]),
      client_ids=np.arange(2),
      rows=np.array([4, 4, 1]),
    )
    np.testing.assert_array_equal(view.client(0)['x'], [40])
    np.testing.assert_array_equal(view.client(1)['x'], [40, 10])

  def test_client_column(self):
    """Names sort ascending; numbers keep their order as numbers."""
    x = np.arange(5)
    view = from_client_column({'x': x}, np.array(['b', 'a', 'b', 'c', 'a']))
    self.assertEqual(view.client_ids.tolist(), ['a', 'b', 'c'])
    np.testing.assert_array_equal(view.rows, [1, 4, 0, 2, 3])
    view = from_client_column({'x': x}, np.array([10, 9, 10, 9, 100]))
    self.assertEqual(view.client_ids.tolist(), [9, 10, 100])
    np.testing.assert_array_equal(view.sizes(), [2, 2, 1])

  def test_filter_keeps_client_numbers(self):
    """A client left without examples stays, empty; the columns are shared."""
    view = example()
    kept = view.filter(view.owners() != 2)
    self.assertEqual(kept.client_ids.tolist(), view.client_ids.tolist())
    np.testing.assert_array_equal(kept.sizes(), [2, 0, 0, 0, 1])
    np.testing.assert_array_equal(kept.client_rows(4), [4])
    self.assertIs(kept.features['x'], view.features['x'])
    self.assertEqual(view.num_examples, 6)
    nothing = kept.filter(np.zeros(3, bool))
    self.assertEqual((nothing.num_clients, nothing.num_examples), (5, 0))

  @settings(deadline=None, max_examples=60)
  @given(st.lists(st.tuples(st.integers(-1, 4), st.booleans()), max_size=25))
  def test_filter_equals_filtering_each_client(self, pairs):
    """Building then filtering equals a list comprehension per client."""
    owner = np.array([p[0] for p in pairs], int)
    keep = np.array([p[1] for p in pairs], bool)
    view = from_assignment(
      {'x': np.arange(len(owner))}, owner, client_ids=np.arange(5)
    )
    kept = view.filter(keep[view.rows])
    for c in range(5):
      rows = [i for i, o in enumerate(owner) if o == c]
      self.assertEqual(view.client_rows(c).tolist(), rows)
      self.assertEqual(
        kept.client_rows(c).tolist(), [i for i in rows if keep[i]]
      )

  def test_a_million_clients(self):
    """Two arrays, not a million objects: few allocations, little time."""
    owner = np.random.default_rng(0).permutation(np.arange(2_000_000) // 2)
    features = {'x': np.zeros((len(owner), 1), np.uint8)}
    blocks, start = sys.getallocatedblocks(), time.process_time()
    view = from_assignment(
      features, owner, client_ids=np.arange(1_000_000, dtype=np.int32)
    )
    kept = view.filter(view.rows % 3 > 0)
    self.assertLess(sys.getallocatedblocks() - blocks, 1000)
    self.assertLess(time.process_time() - start, 10)
    self.assertEqual(view.num_clients, 1_000_000)
    self.assertTrue((view.sizes() == 2).all())
    self.assertEqual((view.offsets.dtype, view.rows.dtype), (np.int64,) * 2)
    np.testing.assert_array_equal(
      view.client_rows(765_432), np.flatnonzero(owner == 765_432)
    )
    self.assertEqual(kept.num_examples, (np.arange(len(owner)) % 3 > 0).sum())

  def test_memory_mapped_features(self):
    """A memory map stays one through views; a client is read into memory."""
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    np.save(folder / 'x.npy', np.arange(14).reshape(7, 2))
    mapped = np.load(folder / 'x.npy', mmap_mode='r')
    view = from_assignment({'x': mapped}, OWNER, client_ids=np.arange(5))
    kept = view.filter(view.rows > 0)
    self.assertIs(kept.features['x'], mapped)
    got = kept.client(2)['x']
    self.assertNotIsInstance(got, np.memmap)
    np.testing.assert_array_equal(got, [[4, 5], [12, 13]])

  def test_bad_input(self):
    """Messages name what was wrong."""
    x, ids = np.arange(4), np.arange(2)
    owner = np.array([0, 1, 1, 0])
    for make, message in (
      (
        lambda: from_assignment({'x': x, 'y': x[1:]}, owner, client_ids=ids),
        "one length, got {'x': 4, 'y': 3}",
      ),
      (
        lambda: from_assignment({'x': x}, owner + 1, client_ids=ids),
        r'owners in -1\.\.1, got .*\.\.2',
      ),
      (
        lambda: from_assignment({'x': x}, owner - 2, client_ids=ids),
        r'owners in -1\.\.1, got -2',
      ),
      (
        lambda: from_assignment(
          {'x': x}, owner, client_ids=ids, rows=np.arange(3)
        ),
        'Expected 3 owners, got 4',
      ),
      (
        lambda: FederatedData(ids, np.array([0, 4]), x, {'x': x}),
        r'C\+1=3, got 2',
      ),
      (
        lambda: FederatedData(ids, np.array([0, 1, 3]), x, {'x': x}),
        'to N=4, got 0 to 3',
      ),
    ):
      with self.assertRaisesRegex(InvalidInput, message):
        make()

  @parameterized.parameters(3, 5)
  def test_owners_of_another_length(self, count):
    """Without `rows`, every row of the columns needs its owner."""
    x = {'x': np.arange(4)}
    with self.assertRaisesRegex(InvalidInput, rf'\b{count}\b'):
      from_assignment(x, np.zeros(count, int), client_ids=np.arange(1))
    with self.assertRaisesRegex(InvalidInput, rf'\b{count}\b'):
      from_client_column(x, np.zeros(count, int))


if __name__ == '__main__':
  absltest.main()
