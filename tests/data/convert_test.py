"""Conversion: the same columns, clients and splits from memory maps."""

import json
import pathlib
import shutil
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import columns as columns_lib
from fedjax_ext.data import convert, lazy, sqlite


def make_columns(**kwargs):
  features = {
    'label': np.array([0, 2, 1, 2, 0], np.int32),
    'image': np.arange(20, dtype=np.float32).reshape(5, 2, 2, 1),
    'meta/age': np.arange(5, dtype=np.uint8),
  }
  return columns_lib.Columns('mine', features, 4, **kwargs)


class WriteColumnsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.folder = self.root / 'converted'

  def convert(self, columns):
    self.assertEqual(convert.write_columns(columns, self.folder), self.folder)
    self.assertEqual([p.name for p in self.root.iterdir()], ['converted'])
    return columns_lib.load_columns(self.folder)

  def assert_same_features(self, got, expected):
    self.assertCountEqual(got, expected)
    for name, x in expected.items():
      np.testing.assert_array_equal(got[name], np.asarray(x))
      self.assertEqual((got[name].dtype, got[name].shape), (x.dtype, x.shape))

  @parameterized.parameters(1, 50, 1 << 26)
  def test_round_trip(self, chunk):
    """In chunks of any size: features, names, client and split columns."""
    columns = make_columns(
      client=np.array(['b', 'a', 'b', 'c', 'é'], object),
      split=np.array([0, 1, 1, 0, 0], np.int8),
    )
    with mock.patch.object(convert, '_CHUNK', chunk):
      got = self.convert(columns)
    self.assertEqual((got.name, got.num_classes), ('mine', 4))
    self.assert_same_features(got.features, columns.features)
    self.assertEqual(got.client.tolist(), ['b', 'a', 'b', 'c', 'é'])
    np.testing.assert_array_equal(got.split, columns.split)

  def test_neither_client_nor_split(self):
    got = self.convert(make_columns())
    self.assertIsNone(got.client)
    self.assertIsNone(got.split)

  def test_lazy_source(self):
    """Clients of an SQLite file stay two numbers a client and split."""
    for split, names in (('train', 'ba'), ('test', 'bc')):
      clients = {
        n: {'label': np.arange(3), 'x': np.full((3, 2), ord(n), np.float32)}
        for n in names
      }
      sqlite.write_sqlite(self.root / split, clients.items())
    columns = sqlite.load_sqlite(
      data_dir=str(self.root), file='train', test_file='test', num_classes=3
    )
    with mock.patch.object(convert, '_CHUNK', 50):
      convert.write_columns(columns, self.folder)
    got = columns_lib.load_columns(self.folder)
    self.assert_same_features(got.features, columns.features)
    self.assertIsInstance(got.client, columns_lib.StoredClients)
    np.testing.assert_array_equal(
      got.client.client_ids, columns.client.client_ids
    )
    self.assertEqual(list(got.client.segments), ['train', 'test'])
    for split, segment in columns.client.segments.items():
      np.testing.assert_array_equal(got.client.segments[split], segment)

  def test_opening_reads_no_column(self):
    """They are memory maps, and were checked when they were written."""
    self.convert(make_columns())
    with (
      mock.patch.object(columns_lib, '_check_range') as labels,
      mock.patch.object(columns_lib, '_check_finite') as finite,
    ):
      got = columns_lib.load_columns(self.folder)
    labels.assert_not_called()
    finite.assert_not_called()
    for x in got.features.values():
      self.assertIsInstance(x, np.memmap)

  def test_columns_share_a_read(self):
    """A chunk of a lazy source is decoded once for all its features."""
    reads = []
    types = {n: lazy.RecordType((), np.dtype(int)) for n in ('label', 'x')}

    def read(rows):
      reads.append(len(rows))
      return {n: np.zeros(len(rows), int) for n in types}

    reader = lazy.Reader(read, types, 10)
    columns = columns_lib.Columns('mine', lazy.lazy_columns(reader), 1)
    with mock.patch.object(convert, '_CHUNK', 16 * 4):
      convert.write_columns(columns, self.folder)
    self.assertEqual(reads, [4, 4, 2])

  def test_text_is_left_out(self):
    columns = make_columns()
    features = {**columns.features, 'text': np.array([b'a'] * 5, object)}
    with self.assertLogs(convert.__name__, 'INFO') as logs:
      got = self.convert(columns_lib.Columns('mine', features, 4))
    self.assertNotIn('text', got.features)
    self.assertIn("['text']", logs.output[0])

  @parameterized.parameters(
    (
      'label',
      np.array([0, 1, 2, 4, 0]),
      r'of mine in 0\.\.3, got 4',
    ),
    ('image', np.full(5, np.inf), "'image' of rows 0 to 4 of mine"),
  )
  def test_wrong_values(self, name, values, message):
    """Nothing is left behind."""
    columns = make_columns()
    features = {**columns.features, name: values}
    with self.assertRaisesRegex(InvalidInput, message):
      convert.write_columns(
        columns_lib.Columns('mine', features, 4), self.folder
      )
    self.assertEmpty(list(self.root.iterdir()))

  def test_sequences(self):
    """Labels of tokens [M, T] are no classes and may be negative."""
    features = {'label': np.full((3, 4), -1), 'tokens': np.ones((3, 4), int)}
    got = self.convert(columns_lib.Columns('text', features, 9))
    self.assert_same_features(got.features, features)

  def test_existing_folder(self):
    self.folder.mkdir()
    with self.assertRaisesRegex(InvalidInput, 'no folder at .*converted'):
      convert.write_columns(make_columns(), self.folder)

  def test_interrupted_before(self):
    """What an earlier call left is removed."""
    partial = self.root / 'converted.partial'
    partial.mkdir()
    (partial / 'old.npy').write_bytes(b'x')
    got = self.convert(make_columns())
    self.assertNotIn('old', got.features)

  def test_disk_is_full(self):
    with (
      mock.patch.object(json, 'dumps', side_effect=OSError('No space left')),
      self.assertRaisesRegex(InvalidInput, 'write .*converted: No space left'),
    ):
      convert.write_columns(make_columns(), self.folder)
    self.assertEmpty(list(self.root.iterdir()))


class LoadConvertedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    stored = columns_lib.store_clients(
      {'train': (np.array(['a', 'b']), np.array([2, 3]))}
    )
    self.folder = convert.write_columns(
      make_columns(client=stored), root / 'converted'
    )

  @parameterized.parameters(
    ('image.npy', None), ('image.npy', b'x'), ('clients.npz', b'x'),
    ('clients.npz', None), ('columns.json', b'{'), ('columns.json', b'{}'),
    ('columns.json', b'{"format": 2}'),
  )  # fmt: skip
  def test_broken(self, name, content):
    if content is None:
      (self.folder / name).unlink()
    else:
      (self.folder / name).write_bytes(content)
    with self.assertRaisesRegex(InvalidInput, 'in.* .*converted'):
      columns_lib.load_columns(self.folder)

  def test_other_rows(self):
    np.save(self.folder / 'image.npy', np.zeros(4))
    with self.assertRaisesRegex(InvalidInput, "5 rows in .*'image': 4"):
      columns_lib.load_columns(self.folder)

  def test_num_classes(self):
    load = lambda n: columns_lib.load_columns(self.folder, num_classes=n)
    self.assertEqual(load(9).num_classes, 9)
    with self.assertRaisesRegex(InvalidInput, '>= 4, .*num_classes=3'):
      load(3)

  def test_moved(self):
    """A folder may be renamed; its data keep their name."""
    moved = self.folder.with_name('moved')
    shutil.move(self.folder, moved)
    self.assertEqual(columns_lib.load_columns(moved).name, 'mine')


if __name__ == '__main__':
  absltest.main()
