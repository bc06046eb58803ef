"""Data sets: clients, splits and parts fit together and never overlap."""

import dataclasses
import functools

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import (
  PARTITIONERS,
  Columns,
  RecordType,
  StoredClients,
  client_reader,
  fingerprint_splits,
  lazy_columns,
  make_columns,
  make_dataset,
)


def columns(size=200, clients=20, split=None, **extra):
  """Natural clients of ragged sizes, rows shuffled; 4 classes."""
  rng = np.random.default_rng(0)
  shares = np.arange(1, clients + 1) / np.arange(1, clients + 1).sum()
  owner = np.concatenate(
    [np.arange(clients), rng.choice(clients, size - clients, p=shares)]
  )
  owner = rng.permutation(owner)
  arrays = {
    'label': rng.integers(0, 4, size),
    'x': rng.standard_normal((size, 2)).astype(np.float32),
    'client': owner,
    **extra,
  }
  if split is not None:
    arrays['split'] = split
  return make_columns('here', arrays)


def make(source, *, partition, **settings):
  """`make_dataset` with a partitioner by name, 'client' for the natural one."""
  own = {k: settings.pop(k) for k in ('alpha', 'min_examples') if k in settings}
  if partition == 'dirichlet':
    own = {'alpha': 0.5} | own
  elif partition == 'iid':
    own = {}
  function = None
  if partition != 'client':
    function = functools.partial(PARTITIONERS[partition], **own)
  return make_dataset(source, partition=function, **settings)


def flat(dataset):
  """Everything that makes two data sets equal, as lists."""
  return (
    {
      n: (v.rows.tolist(), v.offsets.tolist())
      for n, v in dataset.splits.items()
    },
    dataset.participating.tolist(),
    {n: (p.clients.tolist(), p.split) for n, p in dataset.parts.items()},
  )


class DatasetTest(parameterized.TestCase):
  def check(self, dataset, source):
    """Splits cover all rows without overlap; parts name real views."""
    rows = np.concatenate(
      [
        v.rows
        for n, v in dataset.splits.items()
        if n in ('train', 'validation', 'test')
      ]
    )
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(rows)))
    self.assertLen(rows, len(source.features['label']))
    for part in dataset.parts.values():
      self.assertIn(part.split, dataset.splits)
    train = dataset.splits['train']
    self.assertTrue((train.sizes(dataset.participating) > 0).all())
    self.assertTrue((np.diff(dataset.participating) > 0).all())
    for view in dataset.splits.values():
      self.assertEqual(view.client_ids.tolist(), train.client_ids.tolist())

  def test_natural_clients(self):
    """Rows stay with their writers; each gives round(0.2 n) to the test."""
    source = columns()
    dataset = make(source, partition='client')
    self.check(dataset, source)
    self.assertEqual((dataset.name, dataset.num_classes), ('here', 4))
    self.assertIs(dataset.features, dataset.splits['train'].features)
    sizes = np.bincount(source.client)
    for name, view in dataset.splits.items():
      np.testing.assert_array_equal(
        source.client[view.rows], view.client_ids[view.owners()], name
      )
    expected = np.minimum(np.rint(0.2 * sizes), sizes - 1)
    np.testing.assert_array_equal(dataset.splits['test'].sizes(), expected)
    np.testing.assert_array_equal(dataset.participating, np.arange(20))
    self.assertCountEqual(dataset.parts, ['train', 'test'])
    np.testing.assert_array_equal(
      dataset.parts['test'].clients, np.flatnonzero(expected)
    )

  def test_writers_with_only_test_rows(self):
    """As in MNIST: test writers are clients of the test part, and no other."""
    source = columns()
    source = dataclasses.replace(
      source, split=(source.client >= 15).astype(np.int8)
    )
    dataset = make(source, partition='client', test_fraction=0.9)
    self.check(dataset, source)
    np.testing.assert_array_equal(dataset.participating, np.arange(15))
    np.testing.assert_array_equal(dataset.parts['train'].clients, np.arange(15))
    np.testing.assert_array_equal(
      dataset.parts['test'].clients, np.arange(15, 20)
    )
    self.assertEqual(dataset.splits['train'].num_clients, 20)
    np.testing.assert_array_equal(
      np.sort(dataset.splits['test'].rows), np.flatnonzero(source.split)
    )

  @parameterized.product(
    partition=('iid', 'dirichlet'), test_owner=('pooled', 'clients')
  )
  def test_made_partitions(self, partition, test_owner):
    """A fifth of the rows is test: one pool, or the clients' own."""
    source = columns()
    dataset = make(
      source,
      partition=partition,
      test_owner=test_owner,
      num_clients=8,
      min_examples=5,
    )
    self.check(dataset, source)
    train, test = dataset.splits['train'], dataset.splits['test']
    self.assertEqual(test.num_examples, 40)
    self.assertEqual(train.client_ids.tolist(), [*'01234567', 'test'])
    np.testing.assert_array_equal(dataset.participating, np.arange(8))
    sizes = train.sizes()[:8]
    if test_owner == 'pooled':
      self.assertEqual(test.sizes().tolist(), [0] * 8 + [40])
      self.assertEqual(dataset.parts['test'].clients.tolist(), [8])
    else:
      self.assertEqual(test.sizes()[8], 0)
      sizes = sizes + test.sizes()[:8]
      self.assertNotIn(8, dataset.parts['test'].clients)
    self.assertGreaterEqual(sizes.min(), 5)
    if partition == 'iid':
      self.assertLessEqual(sizes.max() - sizes.min(), 1)
    self.assertEqual(train.sizes()[8], 0)

  def test_test_rows_follow_their_client(self):
    """With test_owner=clients a client's test rows have its own classes."""
    source = columns()
    dataset = make(
      source,
      partition='dirichlet',
      test_owner='clients',
      num_clients=3,
      alpha=1e-6,
      min_examples=0,
    )
    label = source.features['label']
    for c in range(3):
      train, test = (
        set(label[dataset.splits[n].client_rows(c)]) for n in ('train', 'test')
      )
      self.assertEqual(train, test)

  def test_a_pooled_test_uses_the_split_column(self):
    """A given split wins over test_fraction, also for a partition made here."""
    split = np.arange(200) < 30
    source = columns(split=split.astype(int))
    dataset = make(source, partition='iid', num_clients=4)
    self.check(dataset, source)
    np.testing.assert_array_equal(
      dataset.splits['test'].client_rows(4), np.arange(30)
    )

  def test_validation(self):
    """round(0.25 n) of each client's train rows, and never all of them."""
    source = columns()
    before = make(source, partition='client').splits
    dataset = make(source, partition='client', validation_fraction=0.25)
    self.check(dataset, source)
    sizes = before['train'].sizes()
    expected = np.minimum(np.rint(0.25 * sizes), sizes - 1)
    np.testing.assert_array_equal(
      dataset.splits['validation'].sizes(), expected
    )
    np.testing.assert_array_equal(
      dataset.splits['test'].rows, before['test'].rows
    )
    part = dataset.parts['validation']
    np.testing.assert_array_equal(part.clients, dataset.participating)
    self.assertEqual(part.split, 'validation')

  @parameterized.parameters(
    (0.2, 0.0, 'test'),
    (0.2, 0.3, 'test'),
    (0.0, 0.0, 'train'),
    (0.0, 0.3, 'validation'),
  )
  def test_unparticipating(self, test_fraction, validation_fraction, split):
    """A quarter of the clients is held out and reported by itself."""
    source = columns()
    dataset = make(
      source,
      partition='client',
      test_fraction=test_fraction,
      validation_fraction=validation_fraction,
      unparticipating_fraction=0.25,
    )
    self.check(dataset, source)
    part = dataset.parts['unparticipating']
    self.assertEqual((len(part.clients), part.split), (5, split))
    np.testing.assert_array_equal(
      np.union1d(part.clients, dataset.participating), np.arange(20)
    )
    self.assertLen(dataset.participating, 15)
    np.testing.assert_array_equal(
      dataset.parts['train'].clients, dataset.participating
    )

  def test_pooled_test_client_is_never_held_out(self):
    """Only clients with train rows are held out, so the pool stays."""
    for seed in range(20):
      dataset = make(
        columns(),
        partition='iid',
        num_clients=4,
        unparticipating_fraction=0.5,
        seed=seed,
      )
      self.assertNotIn(4, dataset.parts['unparticipating'].clients)
      self.assertLen(dataset.participating, 2)

  def test_group_column(self):
    """Each value of the column gets a split and a part of its test rows."""
    domain = np.random.default_rng(1).choice([2, 5, 7], 200)
    source = columns(domain=domain)
    dataset = make(source, partition='client', group_column='domain')
    self.check(dataset, source)
    names = ['test_domain_2', 'test_domain_5', 'test_domain_7']
    self.assertCountEqual(dataset.splits, ['train', 'test', *names])
    self.assertCountEqual(dataset.parts, ['train', 'test', *names])
    test = dataset.splits['test']
    for value in (2, 5, 7):
      view = dataset.splits[f'test_domain_{value}']
      part = dataset.parts[f'test_domain_{value}']
      np.testing.assert_array_equal(
        view.rows, test.rows[domain[test.rows] == value]
      )
      np.testing.assert_array_equal(
        part.clients, np.flatnonzero(view.sizes() > 0)
      )
      self.assertEqual(part.split, f'test_domain_{value}')
      np.testing.assert_array_equal(
        source.client[view.rows], view.client_ids[view.owners()]
      )

  def test_no_test_rows(self):
    """Without test rows there is no test split and no such part."""
    dataset = make(columns(), partition='client', test_fraction=0.0)
    self.assertEqual(list(dataset.splits), ['train'])
    self.assertEqual(list(dataset.parts), ['train'])

  @parameterized.parameters('client', 'iid', 'dirichlet')
  def test_reproducible(self, partition):
    """The same seed gives the same data set, another seed another."""
    again = lambda seed: flat(
      make(
        columns(),
        partition=partition,
        num_clients=7,
        validation_fraction=0.2,
        unparticipating_fraction=0.3,
        seed=seed,
      )
    )
    self.assertEqual(again(1), again(1))
    self.assertNotEqual(again(1), again(2))

  @parameterized.parameters(
    ({'partition': 'iid', 'test_owner': 'x'}, 'test_owner=x'),
    ({'partition': 'iid', 'num_clients': 0}, 'num_clients=0'),
    ({'partition': 'iid', 'test_fraction': 1.0}, 'fraction=1'),
    ({'partition': 'client', 'test_fraction': -0.5}, 'fraction=-0.5'),
    ({'partition': 'dirichlet', 'alpha': 0.0}, 'alpha=0'),
    (
      {'partition': 'dirichlet', 'num_clients': 100, 'min_examples': 2},
      '<= 160 examples, got num_clients=100, min_examples=2',
    ),
    ({'partition': 'client', 'num_clients': 0}, 'num_clients=0'),
    ({'partition': 'client', 'validation_fraction': 1.0}, 'fraction=1'),
    ({'partition': 'client', 'validation_fraction': -0.1}, 'fraction=-0.1'),
    ({'partition': 'client', 'unparticipating_fraction': -0.1}, 'n=-0.1'),
    ({'partition': 'client', 'group_column': 'y'}, 'group_column=y'),
    ({'partition': 'client', 'group_column': 'x'}, 'group_column'),
  )
  def test_bad_input(self, settings, message):
    """What cannot be met is named."""
    with self.assertRaisesRegex(InvalidInput, message):
      make(columns(), **settings)

  @parameterized.parameters('client', 'iid', 'dirichlet')
  def test_no_train_rows(self, partition):
    """A split column that is all test leaves nothing to train on."""
    source = columns(split=np.ones(200, int))
    with self.assertRaisesRegex(InvalidInput, 'train rows'):
      make(source, partition=partition, min_examples=0)

  def test_evaluation_on_some_clients(self):
    """A fixed choice of each part's clients; training is not changed."""
    settings = dict(partition='client', unparticipating_fraction=0.3, seed=4)
    whole = make(columns(), **settings)
    few = make(columns(), eval_clients=5, **settings)
    self.assertEqual(flat(few)[:2], flat(whole)[:2])
    for name, part in few.parts.items():
      self.assertLen(part.clients, 5)
      self.assertEqual(part.split, whole.parts[name].split)
      self.assertContainsSubset(part.clients, whole.parts[name].clients)
      self.assertEqual(part.clients.tolist(), sorted(part.clients))
    again = make(columns(), eval_clients=5, **settings)
    self.assertEqual(flat(few), flat(again))
    many = make(columns(), eval_clients=500, **settings)
    self.assertEqual(flat(many), flat(whole))
    with self.assertRaisesRegex(InvalidInput, 'eval_clients=-1'):
      make(columns(), eval_clients=-1, **settings)

  def test_nobody_participates(self):
    """Holding out every client leaves nobody to train."""
    with self.assertRaisesRegex(InvalidInput, 'unparticipating_fraction'):
      make(columns(clients=2), partition='client', unparticipating_fraction=0.8)


class StoredClientsTest(parameterized.TestCase):
  """Sources that keep each client's rows together are opened by offsets."""

  def columns(self, segments=None):
    """Three clients; rows say whose they are: client * 100 + number."""
    sizes = {'train': [3, 0, 5], 'test': [2, 4, 0]} | (segments or {})
    rows, stored, first = [], {}, 0
    self.decoded = []
    for split, counts in sizes.items():
      starts = first + np.cumsum([0, *counts[:-1]])
      stored[split] = (starts.astype(np.int64), np.array(counts, np.int64))
      first += sum(counts)
      rows += [c * 100 + i for c, n in enumerate(counts) for i in range(n)]
    offsets = np.concatenate(
      [[0], np.cumsum([n for counts in sizes.values() for n in counts])]
    )

    def read(client):
      self.decoded.append(client)
      part = slice(offsets[client], offsets[client + 1])
      mine = np.array(rows[part], np.int32)
      return {'x': mine.astype(np.float32)[:, None], 'label': mine % 3}

    types = {
      'x': RecordType((1,), np.dtype(np.float32)),
      'label': RecordType((), np.dtype(np.int32)),
    }
    features = lazy_columns(client_reader(read, offsets, types))
    clients = StoredClients(np.array(['a', 'b', 'c']), stored)
    return Columns('stored', features, 3, client=clients)

  def test_splits_are_views_and_nothing_is_read(self):
    dataset = make_dataset(self.columns())
    self.assertEmpty(self.decoded)
    self.assertEqual(list(dataset.splits), ['train', 'test'])
    train, test = dataset.splits['train'], dataset.splits['test']
    self.assertEqual(train.client_ids.tolist(), ['a', 'b', 'c'])
    self.assertEqual(train.sizes().tolist(), [3, 0, 5])
    self.assertEqual(test.sizes().tolist(), [2, 4, 0])
    self.assertEqual(dataset.participating.tolist(), [0, 2])
    self.assertEqual(dataset.parts['test'].clients.tolist(), [0, 1])
    self.assertEqual(train.client(2)['x'][:, 0].tolist(), [*range(200, 205)])
    self.assertEqual(test.client(1)['x'][:, 0].tolist(), [*range(100, 104)])
    self.assertCountEqual(self.decoded, [2, 4])

  def test_validation_clients_of_the_source(self):
    dataset = make_dataset(self.columns({'validation': [0, 1, 1]}))
    self.assertEqual(dataset.parts['validation'].clients.tolist(), [1, 2])
    self.assertEqual(dataset.splits['validation'].num_examples, 2)
    with self.assertRaisesRegex(InvalidInput, 'validation_fraction=0.5'):
      make_dataset(
        self.columns({'validation': [0, 1, 1]}), validation_fraction=0.5
      )

  def test_a_test_split_is_made_where_there_is_none(self):
    source = self.columns()
    segments = {'train': source.client.segments['train']}
    source = dataclasses.replace(
      source, client=source.client._replace(segments=segments)
    )
    dataset = make_dataset(source, test_fraction=0.4)
    self.assertEqual(dataset.splits['test'].sizes().tolist(), [1, 0, 2])
    whole = make_dataset(source, test_fraction=0.0)
    self.assertEqual(list(whole.splits), ['train'])

  def test_held_out_clients(self):
    dataset = make_dataset(self.columns(), unparticipating_fraction=0.5)
    self.assertLen(dataset.participating, 1)
    self.assertLen(dataset.parts['unparticipating'].clients, 1)

  def test_partitioned_anew(self):
    """A made partition keeps the source's test rows apart."""
    dataset = make(self.columns(), partition='iid', num_clients=2)
    self.assertEqual(dataset.splits['train'].sizes().tolist(), [4, 4, 0])
    self.assertEqual(
      np.sort(dataset.splits['test'].rows).tolist(), [*range(8, 14)]
    )


class MadePartitionTest(parameterized.TestCase):
  def test_validation_rows_of_the_source_train_nobody(self):
    stored = StoredClientsTest()
    source = stored.columns({'validation': [0, 3, 1]})
    dataset = make(source, partition='iid', num_clients=2)
    self.assertEqual(list(dataset.splits), ['train', 'test'])
    rows = np.concatenate([v.rows for v in dataset.splits.values()])
    self.assertEqual(np.sort(rows).tolist(), [*range(14)])
    self.assertEqual(dataset.splits['train'].num_examples, 8)

  @parameterized.parameters(
    (lambda n: np.arange(n) % 5, r'0\.\.3, got 0\.\.4'),
    (lambda n: np.arange(n) % 4 - 1, r'0\.\.3, got -1\.\.2'),
    (lambda n: np.zeros(n - 1, int), r'160 integers, got int64\[159\]'),
    (lambda n: np.zeros((n, 1), int), r'160 integers, got int64\[160, 1\]'),
    (np.zeros, r'160 integers, got float64\[160\]'),
  )
  def test_what_a_partitioner_may_not_return(self, owners, message):
    function = lambda label, *, num_clients, seed: owners(len(label))
    with self.assertRaisesRegex(InvalidInput, message):
      make_dataset(columns(), partition=function, num_clients=4)

  def test_fingerprint(self):
    """It tells who owns what; the same for the same, stored clients too."""
    settings = dict(partition='dirichlet', num_clients=5)
    first = make(columns(), **settings)
    self.assertEqual(
      fingerprint_splits(first), fingerprint_splits(make(columns(), **settings))
    )
    prints = {
      fingerprint_splits(first),
      fingerprint_splits(make(columns(), alpha=0.1, **settings)),
      fingerprint_splits(make(columns(), seed=1, **settings)),
      fingerprint_splits(make(columns(), partition='client')),
      fingerprint_splits(
        make(columns(), unparticipating_fraction=0.5, **settings)
      ),
    }
    self.assertLen(prints, 5)
    stored = StoredClientsTest().columns
    one, two = (fingerprint_splits(make_dataset(stored())) for _ in range(2))
    self.assertEqual(one, two)


class SkewTest(absltest.TestCase):
  def test_images_are_replaced_by_client(self):
    source = columns(image=np.zeros((200, 2, 2), np.float32))

    def skew(image, owner, *, num_clients, seed):
      del seed
      self.assertEqual(num_clients, 20)
      return image + owner[:, None, None]

    dataset = make_dataset(source, skew=skew)
    for name, view in dataset.splits.items():
      got = dataset.features['image'][view.rows][:, 0, 0]
      np.testing.assert_array_equal(got, view.owners(), name)
    np.testing.assert_array_equal(source.features['image'], 0)

  def test_no_image(self):
    with self.assertRaisesRegex(InvalidInput, 'feature "image" to skew'):
      make_dataset(columns(), skew=lambda image, owner, **_: image)


if __name__ == '__main__':
  absltest.main()
