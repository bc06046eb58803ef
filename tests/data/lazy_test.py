"""Lazy columns: like the arrays that they stand for, read when asked."""

import threading
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import lazy

SIZES = np.array([3, 0, 1, 5])
OFFSETS = np.concatenate([[0], np.cumsum(SIZES)])
LABEL = np.arange(9, dtype=np.int32) % 4
IMAGE = np.arange(18, dtype=np.float32).reshape(9, 2)
TYPES = {
  'label': lazy.RecordType((), np.dtype(np.int32)),
  'image': lazy.RecordType((2,), np.dtype(np.float32)),
}


def make_reader(reads=None, **kwargs):
  """Nine rows of four clients, one of which has none."""

  def read_client(c):
    if reads is not None:
      reads.append(c)
    here = slice(OFFSETS[c], OFFSETS[c + 1])
    return {'label': LABEL[here], 'image': IMAGE[here], 'text': 'no array'}

  return lazy.client_reader(read_client, OFFSETS, TYPES, **kwargs)


class LazyColumnTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.reads = []
    self.columns = lazy.lazy_columns(make_reader(self.reads))

  def test_like_an_array(self):
    """Shape, dtype, size and length, without a read."""
    image = self.columns['image']
    self.assertEqual(
      (image.shape, image.dtype, image.ndim, image.size, len(image)),
      (IMAGE.shape, IMAGE.dtype, 2, 18, 9),
    )
    self.assertEqual(self.columns['label'].size, 9)
    self.assertEmpty(self.reads)

  @parameterized.parameters(
    (slice(None),),
    (slice(7, 1, -2),),
    ([8, 0, 8, -1],),
    ([],),
    (4,),
    (np.int64(-9),),
    (np.array([[1, 2], [8, 1]]),),
    (np.arange(9) % 2 == 0,),
    (np.array([2, 5], np.uint8),),
  )
  def test_rows(self, rows):
    """Any index of rows gives what the array gives."""
    rows = np.array(rows, int) if isinstance(rows, list) else rows
    for name, expected in (('label', LABEL), ('image', IMAGE)):
      got = self.columns[name][rows]
      np.testing.assert_array_equal(got, expected[rows])
      self.assertEqual(got.dtype, expected.dtype)

  @settings(deadline=None, max_examples=50)
  @given(st.lists(st.integers(-9, 8), max_size=20), st.integers(1, 100))
  def test_pieces(self, rows, limit):
    """However small the pieces, the same values in the same order."""
    rows = np.array(rows, np.int64)
    with mock.patch.multiple(lazy, _LARGEST_READ=limit, _PIECE=limit):
      columns = lazy.lazy_columns(make_reader())
      np.testing.assert_array_equal(columns['image'][rows], IMAGE[rows])

  def test_as_array(self):
    np.testing.assert_array_equal(np.asarray(self.columns['image']), IMAGE)
    got = np.asarray(self.columns['label'], np.int64)
    self.assertEqual(got.dtype, np.int64)

  def test_columns_share_a_read(self):
    """Features of the same rows cost one read of each client."""
    rows = np.array([8, 0, 1, 8])
    for name in ('label', 'image', 'label'):
      self.columns[name][rows]
    self.assertEqual(self.reads, [0, 3])

  def test_values_are_copies(self):
    """Changing what was read changes nothing that is read later."""
    self.columns['image'][:3][:] = -1
    np.testing.assert_array_equal(self.columns['image'][:3], IMAGE[:3])

  @parameterized.parameters(
    ([9], r'rows in 0\.\.8, got 9\.\.9'),
    ([-10], r'got -1\.\.-1'),
    ((0, 1), r'got \(0, 1\)'),
    ([0.5], 'integers, got float64'),
    (np.ones(3, bool), r'mask \[9\], got shape \[3\]'),
  )
  def test_bad_rows(self, rows, message):
    with self.assertRaisesRegex(InvalidInput, message):
      self.columns['image'][rows]

  def test_threads(self):
    """Threads that read other rows at the same time get their own."""
    rng = np.random.default_rng(0)
    wrong = []

    def work(rows):
      for name, expected in (('label', LABEL), ('image', IMAGE)) * 20:
        if not np.array_equal(self.columns[name][rows], expected[rows]):
          wrong.append(rows)

    threads = [
      threading.Thread(target=work, args=(rng.integers(0, 9, 5),))
      for _ in range(8)
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    self.assertEmpty(wrong)


class ClientReaderTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'label': np.zeros(3)}, "'image' of client b of FILE with shape .*none"),
    ({'image': np.zeros((2, 2))}, r'shape \[3, 2\], got \[2, 2\]'),
    ({'label': np.array([0, 4, 1])}, r'label of client b .*0\.\.3, got 4'),
    ({'label': np.array([0, -1, 1])}, 'got -1'),
    ({'image': np.full((3, 2), np.nan)}, "'image' of client b of FILE.*NaN"),
  )
  def test_bad_client(self, change, message):
    """Found when the client is read; the message names it."""
    good = {'label': np.zeros(3, int), 'image': np.zeros((3, 2))}
    records = {**good, **change}
    if 'image' not in change and change['label'].dtype.kind == 'f':
      del records['image']
    reader = lazy.client_reader(
      lambda c: records if c == 1 else good,
      np.array([0, 3, 6]),
      TYPES,
      client_ids=np.array(['a', 'b']),
      source='FILE',
      num_classes=4,
    )
    reader.read(np.arange(3))
    with self.assertRaisesRegex(InvalidInput, message):
      reader.read(np.arange(6))

  def test_records_of_another_shape(self):
    """A reader's function must return what was announced."""
    reader = lazy.Reader(lambda rows: {'label': rows[:1]}, TYPES, 9)
    with self.assertRaisesRegex(InvalidInput, r"'label' with shape \[\]"):
      reader.read(np.arange(4))


class CombinedReaderTest(parameterized.TestCase):
  def test_concatenate(self):
    """Rows of all readers, over the features that all have."""
    only_label = lazy.Reader(
      lambda rows: {'label': 10 + rows.astype(np.int32)},
      {'label': TYPES['label']},
      2,
    )
    reader = lazy.concatenate([make_reader(), only_label, make_reader()])
    self.assertEqual((list(reader.types), reader.num_rows), (['label'], 20))
    rows = np.array([19, 10, 0, 9, 8, 11])
    expected = np.concatenate([LABEL, [10, 11], LABEL])
    np.testing.assert_array_equal(reader.read(rows)['label'], expected[rows])

  def test_concatenate_other_types(self):
    other = lazy.Reader(
      lambda rows: {}, {'image': lazy.RecordType((3,), np.dtype('f4'))}, 2
    )
    with self.assertRaisesRegex(
      InvalidInput, r"'image' .*float32\[2\]', 'float32\[3\]"
    ):
      lazy.concatenate([make_reader(), other])
    with self.assertRaisesRegex(InvalidInput, 'number of readers'):
      lazy.concatenate([])

  def test_map_records(self):
    """A function of the records, row by row."""
    reader = lazy.map_records(
      make_reader(),
      lambda records: {'sum': records['image'].sum(1)},
      {'sum': lazy.RecordType((), np.dtype(np.float32))},
    )
    np.testing.assert_array_equal(
      lazy.lazy_columns(reader)['sum'][:], IMAGE.sum(1)
    )


if __name__ == '__main__':
  absltest.main()
