"""Columns: what a file may hold, and one-line errors that say where."""

import dataclasses
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import (
  fingerprint,
  lazy,
  load_columns,
  make_columns,
  make_dataset,
)
from fedjax_ext.data.columns import Columns, store_clients


def arrays(**extra):
  return {
    'label': np.array([0, 2, 1, 2], np.uint8),
    'image': np.arange(16, dtype=np.float32).reshape(4, 2, 2, 1),
    **extra,
  }


class MakeColumnsTest(parameterized.TestCase):
  def test_schema(self):
    """Features, client and split are told apart; labels become int32."""
    columns = make_columns(
      'here',
      arrays(
        client=np.array(['b', 'a', 'b', 'c']),
        split=np.array([0, 1, 1, 0]),
        domain=np.array([3, 3, 4, 4]),
      ),
    )
    self.assertEqual((columns.name, columns.num_classes), ('here', 3))
    self.assertCountEqual(columns.features, ['label', 'image', 'domain'])
    self.assertEqual(columns.features['label'].dtype, np.int32)
    np.testing.assert_array_equal(columns.features['label'], [0, 2, 1, 2])
    np.testing.assert_array_equal(columns.features['image'], arrays()['image'])
    self.assertEqual(columns.client.tolist(), ['b', 'a', 'b', 'c'])
    np.testing.assert_array_equal(columns.split, [0, 1, 1, 0])

  def test_optional_columns(self):
    """Neither client nor split; more classes than occur."""
    columns = make_columns('here', arrays(), num_classes=62)
    self.assertEqual(columns.num_classes, 62)
    self.assertIsNone(columns.client)
    self.assertIsNone(columns.split)

  def test_client_column_of_another_name(self):
    columns = make_columns(
      'here', arrays(writer=np.arange(4)), client_column='writer'
    )
    np.testing.assert_array_equal(columns.client, np.arange(4))
    self.assertNotIn('writer', columns.features)

  @parameterized.parameters(((7, 3),), ((0, 3),), ((),))
  def test_tables_are_left_out(self, shape):
    """Arrays of another length, or of none, are not features, NaN or not."""
    columns = make_columns('here', arrays(table=np.full(shape, np.nan)))
    self.assertCountEqual(columns.features, ['label', 'image'])

  def test_client_column_absent(self):
    """Asking for natural clients without their column says so."""
    columns = make_columns('here', arrays())
    with self.assertRaisesRegex(
      InvalidInput, r"client column in here .*\['image', 'label'\]"
    ):
      make_dataset(columns)

  @parameterized.parameters(
    ({'label': np.array([0, -1, 1, -2])}, r'got -1 in row 1 \(2 such rows\)'),
    ({'label': np.array([0, 1, 9, 1])}, r'0\.\.4, got 9 in row 2 \(1 such'),
    ({'label': np.array([0.0, 1, 2, 1])}, r'integers \[M\], got float64\[4\]'),
    ({'label': np.zeros((4, 1), int)}, r'integers \[M\], got int64\[4, 1\]'),
    ({'label': np.array(3)}, r'integers \[M\], got int64\[\]'),
    ({'label': np.zeros(0, int)}, r'integers \[M\], got int64\[0\]'),
    ({'label': np.array(['0', '1'])}, r'integers \[M\], got <U1\[2\]'),
    ({'split': np.array([0, 1, 2, 1])}, r'split .*0\.\.1, got 2 in row 2'),
    ({'split': np.array([0, -1, 0, 1])}, r'split .*0\.\.1, got -1 in row 1'),
    ({'split': np.array([0, 0, 1])}, 'split of here to have 4 rows'),
    ({'client': np.arange(3)}, 'client of here to have 4 rows'),
    ({'split': np.array([0, 0.5, 0, 1])}, 'split of here'),
    ({'split': np.array(['0', '1', '0', '1'])}, 'split of here'),
    ({'split': np.zeros((4, 2), int)}, 'split of here'),
    ({'client': np.zeros((4, 2), int)}, 'client'),
  )
  def test_broken_schema(self, extra, message):
    """The message names the column, the value and the first bad row."""
    with self.assertRaisesRegex(InvalidInput, message):
      make_columns('here', arrays(**extra), num_classes=5)

  def test_no_label(self):
    with self.assertRaisesRegex(
      InvalidInput, r'"label" in here, got \[\'x\'\]'
    ):
      make_columns('here', {'x': np.zeros(3)})

  @parameterized.parameters(np.nan, np.inf, -np.inf)
  def test_not_finite(self, value):
    """The feature and its first bad row are named, also far down a column."""
    for row, size in ((2, 4), (70_000, 70_002)):
      x = np.zeros((size, 2), np.float32)
      x[row:, 1] = value
      with self.assertRaisesRegex(
        InvalidInput, rf"feature 'x' of here, .* in row {row}\."
      ):
        make_columns('here', {'label': np.zeros(size, int), 'x': x})


class LoadColumnsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def write(self, kind, **extra):
    """Writes FILE.npz or a folder of .npy; its path."""
    if kind == 'npz':
      np.savez(self.root / 'file.npz', **arrays(**extra))
      return self.root / 'file.npz'
    folder = self.root / 'file'
    folder.mkdir(exist_ok=True)
    for name, x in arrays(**extra).items():
      np.save(folder / f'{name}.npy', x)
    return folder

  @parameterized.parameters('npz', 'folder')
  def test_round_trip(self, kind):
    """What was written is read, and makes natural clients."""
    writer, split = np.array(['b', 'a', 'b', 'a']), np.array([0, 0, 1, 0])
    columns = load_columns(
      self.write(kind, writer=writer, split=split, table=np.zeros(9)),
      num_classes=4,
      client_column='writer',
    )
    self.assertEqual((columns.name, columns.num_classes), ('file', 4))
    self.assertCountEqual(columns.features, ['label', 'image'])
    np.testing.assert_array_equal(columns.features['image'], arrays()['image'])
    np.testing.assert_array_equal(columns.split, split)
    dataset = make_dataset(columns)
    train, test = dataset.splits['train'], dataset.splits['test']
    self.assertEqual(train.client_ids.tolist(), ['a', 'b'])
    self.assertEqual(
      [train.client_rows(c).tolist() for c in (0, 1)], [[1, 3], [0]]
    )
    self.assertEqual(test.rows.tolist(), [2])

  def test_a_folder_is_memory_mapped(self):
    """Big columns stay on disk until rows are taken."""
    columns = load_columns(self.write('folder'))
    self.assertIsInstance(columns.features['image'], np.memmap)

  @parameterized.parameters('file.npz', 'folder')
  def test_missing(self, name):
    with self.assertRaisesRegex(InvalidInput, f'at .*{name}, found none'):
      load_columns(self.root / name)

  @parameterized.parameters(b'', b'hello', b'PK\x03\x04 not really a zip')
  def test_not_an_npz(self, content):
    path = self.root / 'file.npz'
    path.write_bytes(content)
    with self.assertRaisesRegex(InvalidInput, r'file\.npz'):
      load_columns(path)

  @parameterized.parameters('cut', 'flipped')
  def test_corrupt_zip(self, how):
    """A half-copied file, and one with wrong bytes in the middle."""
    path = self.write('npz', big=np.arange(4000.0).reshape(4, 1000))
    content = bytearray(path.read_bytes())
    if how == 'cut':
      content = content[: len(content) // 2]
    else:
      middle = len(content) // 2
      content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    with self.assertRaisesRegex(InvalidInput, r'file\.npz'):
      load_columns(path)

  def test_broken_array_in_a_folder(self):
    folder = self.write('folder')
    (folder / 'image.npy').write_bytes(b'no array')
    with self.assertRaisesRegex(InvalidInput, 'readable arrays in .*file'):
      load_columns(folder)

  def test_empty_folder(self):
    with self.assertRaisesRegex(InvalidInput, r'"label" in .*got \[\]'):
      load_columns(self.root)

  def test_pickled_objects_are_refused(self):
    """Reading data never runs what a file holds."""
    path = self.write('npz', client=np.array(['a', 1, 'b', 2], object))
    with self.assertRaisesRegex(InvalidInput, 'allow_pickle'):
      load_columns(path)

  @parameterized.parameters('npz', 'folder')
  def test_broken_schema_names_the_file(self, kind):
    with self.assertRaisesRegex(InvalidInput, 'label of file in 0..1, got 2'):
      load_columns(self.write(kind), num_classes=2)


class StoreClientsTest(parameterized.TestCase):
  def test_segments(self):
    """Rows lie split by split, in the order of the names given."""
    clients = store_clients(
      {
        'train': (np.array(['b', 'a', 'd']), np.array([2, 3, 0])),
        'test': (np.array(['c', 'b']), np.array([4, 1])),
      }
    )
    self.assertEqual(clients.client_ids.tolist(), ['a', 'b', 'c', 'd'])
    first, count = clients.segments['train']
    self.assertEqual(count.tolist(), [3, 2, 0, 0])
    self.assertEqual(first[:2].tolist(), [2, 0])
    first, count = clients.segments['test']
    self.assertEqual(count.tolist(), [0, 1, 4, 0])
    self.assertEqual(first[1:3].tolist(), [9, 5])

  def test_no_clients_in_a_split(self):
    clients = store_clients(
      {'train': (np.array(['a']), [2]), 'test': (np.zeros(0, '<U1'), [])}
    )
    self.assertEqual(clients.segments['test'][1].tolist(), [0])

  def test_names_occur_once(self):
    with self.assertRaisesRegex(InvalidInput, "of train .*got 'b' twice"):
      store_clients({'train': (np.array(['a', 'b', 'b']), np.ones(3, int))})


class LazyFingerprintTest(parameterized.TestCase):
  def columns(self, label, sizes=(2, 3)):
    """Lazy columns of two clients."""
    label = np.asarray(label, np.int32)
    reader = lazy.Reader(
      lambda rows: {'label': label[rows]},
      {'label': lazy.RecordType((), np.dtype(np.int32))},
      len(label),
    )
    clients = store_clients({'train': (np.array(['a', 'b']), sizes)})
    return Columns('here', lazy.lazy_columns(reader), 9, clients)

  def test_values_and_clients_count(self):
    """Of few rows all; and where clients begin and end."""
    expected = fingerprint(self.columns(range(5)))
    self.assertEqual(expected, fingerprint(self.columns(range(5))))
    others = (
      self.columns([0, 1, 2, 3, 5]),
      self.columns(range(5), (3, 2)),
      dataclasses.replace(
        self.columns(range(5)),
        client=store_clients({'train': (np.array(['a', 'c']), (2, 3))}),
      ),
    )
    for columns in others:
      self.assertNotEqual(expected, fingerprint(columns))

  def test_few_rows_are_read(self):
    """However many there are."""
    read = []

    def log(rows):
      read.extend(rows)
      return {'tokens': np.zeros((len(rows), 2), int)}

    types = {'tokens': lazy.RecordType((2,), np.dtype(int))}
    reader = lazy.Reader(log, types, 1_000_000)
    fingerprint(Columns('text', lazy.lazy_columns(reader), 9))
    self.assertLessEqual(len(read), 64)


class FingerprintTest(parameterized.TestCase):
  def columns(self, size=3000):
    rng = np.random.default_rng(0)
    return make_columns(
      'here',
      {
        'label': rng.integers(0, 9, size),
        'image': rng.standard_normal((size, 3)).astype(np.float32),
        'client': np.arange(size) // 10,
        'split': np.arange(size) % 2,
      },
      num_classes=10,
    )

  def change(self, columns, name, row):
    """The columns with one value of one row changed."""
    if name in ('client', 'split'):
      x = getattr(columns, name).copy()
      x[row] = 1 - x[row]
      return dataclasses.replace(columns, **{name: x})
    x = columns.features[name].copy()
    x[row] = (x[row] + 1) % 10 if name == 'label' else -x[row]
    return dataclasses.replace(columns, features={**columns.features, name: x})

  def test_of_equal_data_is_equal(self):
    """Content counts, not where it lies; 64 hex digits."""
    got = fingerprint(self.columns())
    self.assertEqual(got, fingerprint(self.columns()))
    self.assertRegex(got, '^[0-9a-f]{64}$')

  @settings(deadline=None, max_examples=40)
  @given(st.sampled_from(['label', 'client', 'split']), st.integers(0, 2999))
  def test_any_label_client_or_split(self, name, row):
    """Of these every row counts, however many there are."""
    columns = self.columns()
    self.assertNotEqual(
      fingerprint(columns), fingerprint(self.change(columns, name, row))
    )

  @settings(deadline=None, max_examples=40)
  @given(
    st.integers(1, 1024).flatmap(
      lambda m: st.tuples(st.just(m), st.integers(0, m - 1))
    )
  )
  def test_any_feature_row_of_small_data(self, case):
    """Up to 1,024 rows, all rows of the features count."""
    size, row = case
    columns = self.columns(size)
    self.assertNotEqual(
      fingerprint(columns), fingerprint(self.change(columns, 'image', row))
    )

  def test_sampled_rows_of_large_data(self):
    """Beyond, 1,024 rows spread from the first to the last are read."""
    columns = self.columns(3000)
    before = fingerprint(columns)
    changed = [
      fingerprint(self.change(columns, 'image', row)) != before
      for row in (0, 2999)
    ]
    self.assertEqual(changed, [True, True])
    image = columns.features['image'].copy()
    image[1000:1003] *= -1  # one in three rows is read
    features = {**columns.features, 'image': image}
    self.assertNotEqual(
      before, fingerprint(dataclasses.replace(columns, features=features))
    )

  def test_names_types_and_shapes(self):
    """The same bytes under another name, type or shape differ."""
    columns = make_columns(
      'here', {'label': np.zeros(4, int), 'x': np.zeros((4, 2), np.int32)}
    )
    x = columns.features['x']
    prints = {fingerprint(columns)}
    for features in (
      {'y': x},
      {'x': x.view(np.uint32)},
      {'x': x.reshape(4, 1, 2)},
    ):
      features = {'label': columns.features['label'], **features}
      prints.add(fingerprint(dataclasses.replace(columns, features=features)))
    self.assertLen(prints, 4)

  def test_client_is_not_split(self):
    """The same bytes as client column or as split column differ."""
    columns = make_columns('here', {'label': np.arange(4)})
    x = np.array([0, 1, 0, 1], np.int8)
    self.assertNotEqual(
      fingerprint(dataclasses.replace(columns, client=x)),
      fingerprint(dataclasses.replace(columns, split=x)),
    )

  def test_client_names_as_objects(self):
    """Names kept as Python objects count by value, not by address."""
    make = lambda *texts: make_columns(
      'here',
      {
        'label': np.arange(3),
        'client': np.array([''.join(t) for t in texts], object),
      },
    )
    one, two = make('ab', 'cd', 'ab'), make('ab', 'cd', 'ab')
    self.assertIsNot(one.client[0], two.client[0])
    self.assertEqual(fingerprint(one), fingerprint(two))
    self.assertNotEqual(fingerprint(one), fingerprint(make('ab', 'cd', 'cd')))


if __name__ == '__main__':
  absltest.main()
