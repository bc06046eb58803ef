"""Controls: the same train rows in other hands, all else untouched."""

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import (
  Columns,
  FederatedData,
  FederatedDataset,
  LazyColumn,
  Reader,
  RecordType,
  SegmentRows,
  fingerprint_splits,
  first_examples,
  from_assignment,
  lazy_columns,
  make_columns,
  make_dataset,
  pool_clients,
  shuffle_across_clients,
  store_clients,
)

SIZES = (3, 7, 1, 5, 12, 4, 6, 2)


def from_arrays():
  """Rows that are arrays, a client in any place; all splits and parts."""
  owner = np.random.default_rng(0).permutation(
    np.repeat(np.arange(8), 10 * np.array(SIZES))
  )
  arrays = {'x': np.arange(len(owner)), 'label': owner % 3, 'client': owner}
  return make_dataset(
    make_columns('arrays', arrays),
    validation_fraction=0.2,
    unparticipating_fraction=0.3,
  )


def from_segments(lazy):
  """Stored clients: rows that are stretches, columns that may be lazy."""
  sizes = {'train': SIZES[:6], 'validation': SIZES[6:], 'test': SIZES[2:5]}
  names = {'train': 'abcdef', 'validation': 'gh', 'test': 'cde'}
  clients = store_clients(
    {s: (np.array([*names[s]]), np.array(sizes[s])) for s in sizes}
  )
  size = sum(sum(s) for s in sizes.values())
  features = {'x': np.arange(size), 'label': np.arange(size) % 3}
  if lazy:
    types = {n: RecordType((), x.dtype) for n, x in features.items()}
    made = features
    read = lambda rows: {n: x[rows] for n, x in made.items()}
    features = lazy_columns(Reader(read, types, size))
  columns = Columns('segments', features, 3, clients)
  return make_dataset(columns, unparticipating_fraction=0.3)


DATASETS = (
  ('arrays', from_arrays),
  ('segments', lambda: from_segments(False)),
  ('lazy', lambda: from_segments(True)),
)


def rows_of(view: FederatedData, clients) -> list[int]:
  rows = [view.client_rows(int(c)) for c in clients]
  return np.concatenate([np.zeros(0, int), *rows]).tolist()


class ControlsTest(parameterized.TestCase):
  def check_untouched(
    self, before: FederatedDataset, after: FederatedDataset, parts
  ):
    """Other splits and clients, names, columns and the given parts."""
    added = [s for s in after.splits if s not in before.splits]
    self.assertIn(added, ([], ['train_by_client']))
    self.assertEqual([*before.splits, *added], [*after.splits])
    for name, view in before.splits.items():
      if name != 'train':
        self.assertIs(after.splits[name], view)
    old, new = before.splits['train'], after.splits['train']
    others = np.setdiff1d(np.arange(old.num_clients), before.participating)
    self.assertNotEmpty(rows_of(old, others))
    for client in others:
      self.assertEqual(rows_of(old, [client]), rows_of(new, [client]))
    np.testing.assert_array_equal(old.client_ids, new.client_ids)
    for name, x in old.features.items():
      self.assertIs(new.features[name], x)
    self.assertEqual(before.parts.keys(), after.parts.keys())
    for name in parts:
      self.assertIs(after.parts[name], before.parts[name])
    self.assertEqual(
      (before.name, before.num_classes), (after.name, after.num_classes)
    )

  @parameterized.named_parameters(*DATASETS)
  def test_shuffle(self, make):
    """A permutation of the participating clients' rows, sizes kept."""
    before = make()
    clients, old = before.participating, before.splits['train']
    rows = rows_of(old, clients)
    after = shuffle_across_clients(before, seed=1)
    new = after.splits['train']
    self.check_untouched(before, after, before.parts)
    self.assertIs(after.participating, clients)
    np.testing.assert_array_equal(old.offsets, new.offsets)
    self.assertCountEqual(rows_of(new, clients), rows)
    self.assertNotEqual(rows_of(new, clients), rows)
    self.assertEqual(rows_of(old, clients), rows)  # the given one stays
    client = int(clients[-1])
    np.testing.assert_array_equal(
      new.client(client)['x'], new.client_rows(client)
    )

  @parameterized.named_parameters(*DATASETS)
  def test_seed(self, make):
    made = make()
    prints = [
      fingerprint_splits(shuffle_across_clients(made, seed=s))
      for s in (0, 0, 1)
    ]
    self.assertEqual(prints[0], prints[1])
    self.assertLen({*prints, fingerprint_splits(made)}, 3)

  def test_deal_is_uniform(self):
    """Each row comes to a client as often as its size says."""
    view = from_assignment(
      {'x': np.arange(6)}, np.array([0, 0, 0, 1, 1, 2]), client_ids=np.arange(3)
    )
    made = FederatedDataset('six', {'train': view}, np.arange(3), {}, 1)
    times = np.zeros((6, 3))
    for seed in range(2000):
      train = shuffle_across_clients(made, seed=seed).splits['train']
      times[train.rows, train.owners()] += 1
    np.testing.assert_allclose(
      times / 2000, np.tile([1 / 2, 1 / 3, 1 / 6], (6, 1)), atol=0.05
    )

  @parameterized.named_parameters(*DATASETS)
  def test_pool(self, make):
    """One client trains on all rows; where others are reported is as it was."""
    before = make()
    clients, old = before.participating, before.splits['train']
    after = pool_clients(before)
    new = after.splits['train']
    others = [name for name in before.parts if name != 'train']
    self.assertNotEmpty(others)
    self.check_untouched(before, after, others)
    first = clients[:1].tolist()
    self.assertEqual(after.participating.tolist(), first)
    # Reported on the same clients and rows as before.
    part = after.parts['train']
    self.assertEqual(part.clients.tolist(), clients.tolist())
    theirs = after.splits[part.split]
    for client in part.clients:
      self.assertEqual(
        theirs.client_rows(client).tolist(), old.client_rows(client).tolist()
      )
    self.assertEqual(rows_of(new, first), rows_of(old, clients))
    self.assertEqual(new.sizes(clients[1:]).tolist(), [0] * (len(clients) - 1))
    self.assertEqual(new.num_examples, old.num_examples)
    self.assertNotEqual(fingerprint_splits(before), fingerprint_splits(after))

  @parameterized.named_parameters(*DATASETS)
  def test_first_examples(self, make):
    before = make()
    after = first_examples(before, max_examples=4)
    old, new = before.splits['train'], after.splits['train']
    for client in range(old.num_clients):
      expected = old.client_rows(client)
      if client in before.participating:
        expected = expected[:4]
      self.assertEqual(
        new.client_rows(client).tolist(), expected.tolist(), client
      )
    self.assertEqual(
      after.participating.tolist(), before.participating.tolist()
    )
    # The controls then deal out these rows and no others.
    shuffled = shuffle_across_clients(after, seed=1).splits['train']
    self.assertEqual(sorted(shuffled.rows[:]), sorted(new.rows[:]))
    with self.assertRaisesRegex(InvalidInput, 'got max_examples=0'):
      first_examples(before, max_examples=0)

  def test_kinds(self):
    """The data sets here are of the kinds that the tests speak of."""
    arrays, stored, lazy = (make() for _, make in DATASETS)
    self.assertIsInstance(arrays.splits['train'].rows, np.ndarray)
    self.assertIsInstance(stored.splits['train'].rows, SegmentRows)
    self.assertIsInstance(lazy.features['x'], LazyColumn)

  def test_pool_needs_clients(self):
    view = from_assignment(
      {'x': np.arange(2)}, np.array([0, 0]), client_ids=np.arange(1)
    )
    made = FederatedDataset('none', {'train': view}, np.arange(0), {}, 1)
    with self.assertRaisesRegex(InvalidInput, 'participating clients'):
      pool_clients(made)


if __name__ == '__main__':
  absltest.main()
