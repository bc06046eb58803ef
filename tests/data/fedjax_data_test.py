"""FedJAX's data objects: a stand-in with the same methods, and real ones."""

import pathlib
import tempfile
import threading

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import fedjax_data, sqlite


class FakeDataset:
  def __init__(self, examples):
    self._examples = examples

  def all_examples(self):
    return self._examples


class FakeData:
  """The methods of fedjax.FederatedData that are used."""

  def __init__(self, clients):
    self.clients, self.asked = clients, []

  def client_sizes(self):
    for name, examples in self.clients.items():
      yield name, len(next(iter(examples.values())))

  def get_client(self, name):
    self.asked.append(name)
    return FakeDataset(self.clients[name])


def make_clients(names, size=2):
  return {
    name: {
      'x': np.full((size + i, 3), 10 * i, np.float32),
      'y': np.arange(size + i) % 3,
      'text': np.array([b'a'] * (size + i), object),
    }
    for i, name in enumerate(names)
  }


class FedjaxDataTest(parameterized.TestCase):
  def test_columns(self):
    """Sorted names; one client is read to know the types."""
    train = FakeData(make_clients([b'b', b'a', b'c']))
    test = FakeData(make_clients([b'd', b'b']))
    columns = fedjax_data.from_fedjax(train, test=test, num_classes=3)
    self.assertEqual((train.asked, test.asked), ([b'a'], [b'b']))
    self.assertEqual(columns.client.client_ids.tolist(), ['a', 'b', 'c', 'd'])
    self.assertCountEqual(columns.features, ['image', 'label'])
    self.assertEqual(columns.features['label'].dtype, np.int32)
    for split, data in (('train', train), ('test', test)):
      first, count = columns.client.segments[split]
      for c, name in enumerate(columns.client.client_ids.tolist()):
        rows = np.arange(first[c], first[c] + count[c])
        expected = data.clients.get(name.encode())
        if expected is None:
          self.assertEmpty(rows)
          continue
        for ours, theirs in (('image', 'x'), ('label', 'y')):
          np.testing.assert_array_equal(
            columns.features[ours][rows], expected[theirs]
          )

  def test_classes_are_counted(self):
    self.assertEqual(
      fedjax_data.from_fedjax(FakeData(make_clients(['a'], 9))).num_classes, 3
    )

  @parameterized.parameters(
    ({}, 'Expected train examples in fedjax'),
    ({'a': {'x': np.zeros(2)}}, r"label \[n\] in train of fedjax.*'image'"),
    ({'a': {'y': np.zeros(2)}}, r"'label': 'float64\[\]'"),
    (make_clients([b'a', 'a']), "'a' twice"),
  )
  def test_bad_data(self, clients, message):
    with self.assertRaisesRegex(InvalidInput, message):
      fedjax_data.from_fedjax(FakeData(clients), num_classes=3)

  def test_label_out_of_range(self):
    columns = fedjax_data.from_fedjax(
      FakeData(make_clients(['a', 'b'])), num_classes=2
    )
    columns.features['image'][:2]
    with self.assertRaisesRegex(
      InvalidInput, r'client b of train.*0\.\.1, got'
    ):
      columns.features['image'][:]

  def test_fedjax(self):
    """Data in memory and in SQLite, preprocessed, read in another thread."""
    try:
      import fedjax
    except ImportError:
      self.skipTest('fedjax is not installed')
    clients = make_clients([b'b', b'a'])
    for examples in clients.values():
      del examples['text']
    root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    path = sqlite.write_sqlite(root / 'train.sqlite', clients.items())
    for data in (
      fedjax.InMemoryFederatedData(clients),
      fedjax.SQLiteFederatedData.new(str(path)),
    ):
      data = data.preprocess_batch(lambda e: {**e, 'x': e['x'] + 1})
      columns = fedjax_data.from_fedjax(data, num_classes=3)
      got = []
      thread = threading.Thread(
        target=lambda: got.append(columns.features['image'][:])
      )
      thread.start()
      thread.join()
      expected = [clients[b'a']['x'] + 1, clients[b'b']['x'] + 1]
      np.testing.assert_array_equal(got[0], np.concatenate(expected))


if __name__ == '__main__':
  absltest.main()
