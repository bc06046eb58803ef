"""SQLite files of FedJAX and TensorFlow Federated: opened, read, written."""

import os
import pathlib
import sqlite3
import tempfile
import threading
import zlib
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import serialization, sqlite


def make_clients(names=('b', 'a', 'é'), first=0):
  """Clients of 2, 3, ... examples with values that name client and row."""
  clients = {}
  for i, name in enumerate(names, first):
    n = 2 + i
    clients[name] = {
      'label': np.arange(n, dtype=np.int64) % 5,
      'pixels': (100 * i + np.arange(2 * n, dtype=np.float32)).reshape(n, 2),
      'snippets': np.array([f'{name}{j}' for j in range(n)]),
    }
  return clients


def write_tff(path, splits):
  """A file in TensorFlow Federated's format of {split: clients}."""
  connection = sqlite3.connect(path)
  connection.executescript(
    'CREATE TABLE examples (split_name TEXT NOT NULL, client_id TEXT NOT NULL,'
    ' serialized_example_proto BLOB NOT NULL);'
    'CREATE INDEX idx_examples_client_id_split ON examples'
    ' (split_name, client_id);'
    'CREATE TABLE client_metadata (client_id TEXT NOT NULL, split_name TEXT '
    'NOT NULL, num_examples INTEGER NOT NULL);'
  )
  for split, clients in splits.items():
    for name, examples in clients.items():
      n = len(examples['label'])
      connection.execute(
        'INSERT INTO client_metadata VALUES (?, ?, ?)', (name, split, n)
      )
      connection.executemany(
        'INSERT INTO examples VALUES (?, ?, ?)',
        (
          (split, name, serialization.pack_example(
            {feature: x[j] for feature, x in examples.items()}
          ))
          for j in range(n)
        ),
      )  # fmt: skip
  connection.commit()
  connection.close()


class SqliteTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = self.root / 'train.sqlite'

  def load(self, **kwargs):
    return sqlite.load_sqlite(
      **{'data_dir': str(self.root), 'file': 'train.sqlite', **kwargs}
    )

  def change(self, query, *values):
    """Changes the file."""
    connection = sqlite3.connect(self.path)
    connection.execute(query, values)
    connection.commit()
    connection.close()

  def assert_holds(self, columns, split, clients):
    """Every client of a split has its examples, and others have none."""
    first, count = columns.client.segments[split]
    for c, name in enumerate(columns.client.client_ids.tolist()):
      rows = np.arange(first[c], first[c] + count[c])
      expected = clients.get(name, {'label': [], 'pixels': np.zeros((0, 2))})
      for feature in ('label', 'pixels'):
        got = columns.features[feature][rows]
        np.testing.assert_array_equal(got, expected[feature])


class LoadSqliteTest(SqliteTestCase):
  def test_fedjax(self):
    """Names in order; test clients may be others; text is left out."""
    train, test = make_clients(), make_clients(('é', 'c'), 1)
    sqlite.write_sqlite(self.path, train.items())
    sqlite.write_sqlite(self.root / 'test.sqlite', test.items())
    columns = self.load(test_file='test.sqlite', num_classes=7)
    self.assertEqual((columns.name, columns.num_classes), ('train', 7))
    self.assertCountEqual(columns.features, ['label', 'pixels'])
    self.assertEqual(columns.features['label'].dtype, np.int32)
    self.assertEqual(columns.features['pixels'].shape, (2 + 3 + 4 + 3 + 4, 2))
    self.assertEqual(columns.client.client_ids.tolist(), ['a', 'b', 'c', 'é'])
    self.assertCountEqual(columns.client.segments, ['train', 'test'])
    self.assert_holds(columns, 'train', train)
    self.assert_holds(columns, 'test', test)

  def test_tff(self):
    """All splits in one file; 'heldout' is our validation."""
    splits = {
      'test': make_clients(('c', 'a')),
      'train': make_clients(),
      'heldout': make_clients(('z',), 3),
    }
    write_tff(self.path, splits)
    columns = self.load(num_classes=5)
    self.assertEqual(
      columns.client.client_ids.tolist(), ['a', 'b', 'c', 'z', 'é']
    )
    self.assertCountEqual(
      columns.client.segments, ['train', 'validation', 'test']
    )
    self.assert_holds(columns, 'train', splits['train'])
    self.assert_holds(columns, 'validation', splits['heldout'])
    self.assert_holds(columns, 'test', splits['test'])

  def test_any_rows(self):
    """Rows of several clients in any order, with repeats."""
    clients = make_clients()
    sqlite.write_sqlite(self.path, clients.items())
    columns = self.load(num_classes=5)
    whole = np.concatenate([clients[c]['pixels'] for c in ('a', 'b', 'é')])
    rows = np.array([8, 0, 4, 0, 3])
    np.testing.assert_array_equal(columns.features['pixels'][rows], whole[rows])

  def test_renamed(self):
    """Other features take the places of image and label."""
    clients = {
      'a': {'x': np.ones((2, 3)), 'y': np.array([1, 3]), 'label': np.zeros(2)}
    }
    sqlite.write_sqlite(self.path, clients.items())
    columns = self.load(label='y', image='x')
    self.assertCountEqual(columns.features, ['image', 'label'])
    self.assertEqual(columns.features['label'][:].tolist(), [1, 3])

  def test_classes_are_counted(self):
    """Without num_classes the largest label says how many."""
    sqlite.write_sqlite(self.path, make_clients().items())
    self.assertEqual(self.load().num_classes, 4)

  def test_opening_decodes_one_client(self):
    """However many there are; reading decodes those that are read."""
    names = [f'c{i:04d}' for i in range(1000)]
    one = make_clients(('x',))['x']
    sqlite.write_sqlite(self.path, ((name, one) for name in names))
    with mock.patch.object(
      sqlite, 'unpack_arrays', wraps=sqlite.unpack_arrays
    ) as decode:
      columns = self.load(num_classes=5)
      opening = decode.call_count
      self.assertLessEqual(opening, 2)
      first, _ = columns.client.segments['train']
      columns.features['pixels'][first[[5, 900, 5]]]
      self.assertEqual(decode.call_count, opening + 2)
    self.assertLen(columns.client.client_ids, 1000)

  def test_clients_without_examples(self):
    clients = make_clients()
    clients['0'] = {n: x[:0] for n, x in clients['a'].items()}
    sqlite.write_sqlite(self.path, clients.items())
    columns = self.load(num_classes=5)
    self.assertEqual(columns.client.client_ids.tolist(), ['0', 'a', 'b', 'é'])
    self.assert_holds(columns, 'train', clients)

  def test_threads(self):
    """Plans are made in another thread than the one that opened the file."""
    clients = make_clients()
    sqlite.write_sqlite(self.path, clients.items())
    columns = self.load(num_classes=5)
    done = []

    def work():
      for _ in range(20):
        self.assert_holds(columns, 'train', clients)
      done.append(True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    self.assertLen(done, 4)

  def test_missing(self):
    with self.assertRaisesRegex(InvalidInput, r'train\.sqlite, found none'):
      self.load()

  def test_wrong_tables(self):
    self.change('CREATE TABLE other (x)')
    with self.assertRaisesRegex(
      InvalidInput,
      r'table federated_data, or examples.*train\.sqlite, got tables \[\'other',
    ):
      self.load()

  def test_not_sqlite(self):
    self.path.write_bytes(b'hello' * 1000)
    with self.assertRaisesRegex(
      InvalidInput, r'intact SQLite file at .*train\.sqlite'
    ):
      self.load()

  @parameterized.parameters(
    (b'hello',),
    (zlib.compress(b'hello'),),
    (zlib.compress(serialization.pack_arrays({'label': np.zeros(9, int)})),),
    (zlib.compress(serialization.pack_arrays({'label': 3})),),
  )
  def test_corrupt_client(self, data):
    """Found when the client is read; the file and the client are named."""
    sqlite.write_sqlite(self.path, make_clients().items())
    self.change(
      'UPDATE federated_data SET data = ? WHERE client_id = ?', data, b'b'
    )
    columns = self.load(num_classes=5)
    columns.features['label'][:3]
    with self.assertRaisesRegex(
      InvalidInput, r'client b in .*train\.sqlite: .'
    ):
      columns.features['label'][:]

  def test_changed_after_opening(self):
    sqlite.write_sqlite(self.path, make_clients().items())
    columns = self.load(num_classes=5)
    self.change('DELETE FROM federated_data WHERE client_id = ?', b'b')
    with self.assertRaisesRegex(InvalidInput, 'client b in .* has changed'):
      columns.features['label'][:]

  def test_corrupt_example(self):
    write_tff(self.path, {'train': make_clients()})
    self.change(
      'UPDATE examples SET serialized_example_proto = ? WHERE client_id = ?',
      b'\xff',
      'b',
    )
    columns = self.load(num_classes=5)
    with self.assertRaisesRegex(
      InvalidInput, r'client b in .*train\.sqlite: .'
    ):
      columns.features['label'][:]

  def test_examples_are_missing(self):
    """The table of clients and that of examples must agree."""
    write_tff(self.path, {'train': make_clients()})
    self.change('DELETE FROM examples WHERE client_id = ?', 'b')
    with self.assertRaisesRegex(InvalidInput, 'client b '):
      self.load(num_classes=5).features['label'][:]

  def test_label_out_of_range(self):
    sqlite.write_sqlite(self.path, make_clients().items())
    columns = self.load(num_classes=3)
    columns.features['label'][:5]
    with self.assertRaisesRegex(InvalidInput, r'client é .*0\.\.2, got 3'):
      columns.features['label'][:]

  def test_no_label(self):
    sqlite.write_sqlite(self.path, make_clients().items())
    with self.assertRaisesRegex(
      InvalidInput, r"feature y in .*\['label', 'pix.*'snip"
    ):
      self.load(label='y')

  def test_labels_are_no_integers(self):
    sqlite.write_sqlite(self.path, [('a', {'label': np.zeros(3)})])
    with self.assertRaisesRegex(InvalidInput, 'integers .*float64'):
      self.load()

  def test_no_examples(self):
    sqlite.write_sqlite(self.path, [])
    with self.assertRaisesRegex(InvalidInput, r'train\.sqlite, got none'):
      self.load()

  def test_second_file_of_tff(self):
    write_tff(self.path, {'train': make_clients()})
    sqlite.write_sqlite(self.root / 'test.sqlite', make_clients().items())
    with self.assertRaisesRegex(InvalidInput, r'no other file.*test\.sqlite'):
      self.load(test_file='test.sqlite')


class IndexTest(SqliteTestCase):
  """What is kept beside large files."""

  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.object(sqlite, '_KEEP_INDEX_FROM', 0))
    self.clients = make_clients()
    sqlite.write_sqlite(self.path, self.clients.items())
    self.index = self.root / 'train.sqlite.index.npz'

  def opened(self):
    """The clients, and whether all of the file was walked through."""
    with mock.patch.object(sqlite, '_sizes', wraps=sqlite._sizes) as sizes:
      columns = self.load(num_classes=5)
    return columns, sizes.called

  def test_second_open_reads_the_index(self):
    first, walked = self.opened()
    self.assertTrue(walked)
    second, walked = self.opened()
    self.assertFalse(walked)
    for columns in (first, second):
      self.assert_holds(columns, 'train', self.clients)
    self.assertEqual(
      sorted(p.name for p in self.root.iterdir()),
      ['train.sqlite', 'train.sqlite.index.npz'],
    )

  def test_stale(self):
    """A changed file is walked through again, and its index replaced."""
    self.opened()
    self.path.unlink()
    clients = make_clients(('q', 'p'))
    sqlite.write_sqlite(self.path, clients.items())
    for expected in (True, False):
      columns, walked = self.opened()
      self.assertEqual(walked, expected)
      self.assert_holds(columns, 'train', clients)

  @parameterized.parameters(b'', b'PK\x03\x04', b'hello')
  def test_broken(self, content):
    self.index.write_bytes(content)
    columns, walked = self.opened()
    self.assertTrue(walked)
    self.assert_holds(columns, 'train', self.clients)
    self.assertFalse(self.opened()[1])

  def test_nothing_can_be_written(self):
    """Then nothing is kept and nothing is said."""
    with mock.patch.object(os, 'replace', side_effect=PermissionError('no')):
      columns, _ = self.opened()
    self.assert_holds(columns, 'train', self.clients)
    self.assertEqual([p.name for p in self.root.iterdir()], ['train.sqlite'])

  def test_small_files_have_none(self):
    with mock.patch.object(sqlite, '_KEEP_INDEX_FROM', 1 << 24):
      self.opened()
    self.assertFalse(self.index.exists())


class ReadClientsTest(SqliteTestCase):
  def test_fedjax(self):
    """Text included, in ascending order of names."""
    clients = make_clients()
    sqlite.write_sqlite(self.path, clients.items())
    got = list(sqlite.read_clients(self.path))
    self.assertEqual([name for name, _ in got], ['a', 'b', 'é'])
    self.assertEqual(got[0][1]['snippets'].tolist(), [b'a0', b'a1', b'a2'])
    np.testing.assert_array_equal(got[1][1]['pixels'], clients['b']['pixels'])

  def test_tff(self):
    write_tff(self.path, {'train': make_clients(), 'test': make_clients('c')})
    ((name, examples),) = sqlite.read_clients(self.path, 'test')
    self.assertEqual(name, 'c')
    self.assertEqual(examples['snippets'].tolist(), [b'c0', b'c1'])
    with self.assertRaisesRegex(InvalidInput, 'train, test, got .*=validation'):
      next(sqlite.read_clients(self.path, 'validation'))


class WriteSqliteTest(SqliteTestCase):
  def test_existing_file(self):
    self.path.write_bytes(b'mine')
    with self.assertRaisesRegex(InvalidInput, r'no file at .*train\.sqlite'):
      sqlite.write_sqlite(self.path, [])
    self.assertEqual(self.path.read_bytes(), b'mine')

  @parameterized.parameters(
    ([('a', {'x': np.zeros(2)}), ('a', {'x': np.zeros(2)})], 'names of their'),
    ([('a', {'x': np.zeros(2), 'y': np.zeros(3)})], "client 'a' .*'y': 3"),
    ([('a', {'x': np.float32(2)})], "client 'a' of one length"),
    ([('a', {})], "client 'a' of one length"),
  )
  def test_bad_clients(self, clients, message):
    """Nothing is left behind."""
    with self.assertRaisesRegex(InvalidInput, message):
      sqlite.write_sqlite(self.path, clients)
    self.assertEmpty(list(self.root.iterdir()))

  def test_fedjax_reads_it(self):
    """Names, sizes and arrays, by the original; and its files by us."""
    try:
      import fedjax
    except ImportError:
      self.skipTest('fedjax is not installed')
    clients = make_clients()
    sqlite.write_sqlite(self.path, clients.items())
    data = fedjax.SQLiteFederatedData.new(str(self.path))
    self.assertEqual(
      dict(data.client_sizes()),
      {name.encode(): len(x['label']) for name, x in clients.items()},
    )
    theirs = self.root / 'theirs.sqlite'
    with fedjax.SQLiteFederatedDataBuilder(str(theirs)) as builder:
      builder.add_many(
        (name, dataset.all_examples()) for name, dataset in data.clients()
      )
    for name, examples in sqlite.read_clients(theirs):
      for feature in ('label', 'pixels'):
        np.testing.assert_array_equal(examples[feature], clients[name][feature])
      self.assertEqual(
        examples['snippets'].tolist(),
        [x.encode() for x in clients[name]['snippets']],
      )


if __name__ == '__main__':
  absltest.main()
