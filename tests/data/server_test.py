"""The server as one more client: rows that move to it, or come from outside."""

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import (
  SERVER_DATA,
  Columns,
  add_server_data,
  make_columns,
  make_dataset,
  server_features,
  split_off_server,
  store_clients,
)
from fedjax_ext.data.server import SERVER


def make(**settings):
  """Clients a to h with 2 to 9 rows; x is the row's number."""
  owner = np.random.default_rng(1).permutation(
    np.repeat([*'abcdefgh'], np.arange(2, 10))
  )
  number = np.arange(len(owner))
  settings = dict(test_fraction=0.25) | settings
  return make_dataset(
    make_columns(
      'letters',
      {
        'x': number.astype(np.float32),
        'label': (number % 3).astype(np.int32),
        'client': owner,
      },
    ),
    **settings,
  )


def rows(view, client):
  """Sorted rows of a client, by number."""
  return sorted(view.client_rows(int(client)).tolist())


def owner_of(view):
  """{row: client number}."""
  return {int(row): c for c in range(view.num_clients) for row in rows(view, c)}


class SplitOffTest(parameterized.TestCase):
  def check(self, before, after, server, chosen):
    """Chosen rows of participants are the server's; all else is as it was."""
    old, new = before.splits['train'], after.splits['train']
    self.assertEqual(server, old.num_clients)
    part = set(before.participating.tolist())
    moved, kept = set(), {}
    for position, row in enumerate(np.asarray(old.rows).tolist()):
      owner = int(old.owners()[position])
      if chosen[position] and owner in part:
        moved.add(row)
      else:
        kept[row] = owner
    self.assertEqual(owner_of(new), kept)
    self.assertEqual(
      owner_of(after.splits['server']), dict.fromkeys(moved, server)
    )
    self.assertEqual(
      after.participating.tolist(),
      sorted(c for c in part if c in kept.values()),
    )
    for name, view in after.splits.items():
      self.assertEqual(view.num_clients, server + 1, name)
      self.assertEqual(view.client_ids[server], SERVER)
      if name != 'server':
        self.assertEqual(view.sizes()[server], 0)
        self.assertEqual(
          view.client_ids[:server].tolist(), old.client_ids.tolist()
        )
      if name not in ('train', 'server'):
        self.assertEqual(owner_of(view), owner_of(before.splits[name]))
    for name, x in before.features.items():
      self.assertIs(after.features[name], x)

  @parameterized.parameters(0, 1, 2)
  def test_random_rows(self, seed):
    before = make(unparticipating_fraction=0.25, validation_fraction=0.2)
    size = before.splits['train'].num_examples
    chosen = np.random.default_rng(seed).random(size) < 0.6
    after, server = split_off_server(before, chosen)
    self.check(before, after, server, chosen)
    held_out = before.parts['unparticipating']
    self.assertEqual(held_out.split, 'test')
    for client in held_out.clients:
      for name in before.splits:
        self.assertEqual(
          rows(after.splits[name], client), rows(before.splits[name], client)
        )

  def test_clients_without_rows_take_part_no_more(self):
    before = make(validation_fraction=0.3)
    train = before.splits['train']
    chosen = np.isin(train.owners(), [1, 4])
    after, server = split_off_server(before, chosen)
    self.check(before, after, server, chosen)
    left = [0, 2, 3, 5, 6, 7]
    self.assertEqual(after.participating.tolist(), left)
    self.assertEqual(after.parts['train'].clients.tolist(), left)
    # They are still reported on where they have rows.
    for name in ('validation', 'test'):
      self.assertEqual(
        after.parts[name].clients.tolist(), before.parts[name].clients.tolist()
      )
    self.assertEqual(before.participating.tolist(), [*range(8)])

  def test_held_out_clients_keep_what_is_chosen(self):
    """Also where they are reported on their train rows."""
    before = make(test_fraction=0.0, unparticipating_fraction=0.25)
    self.assertEqual(before.parts['unparticipating'].split, 'train')
    held_out = before.parts['unparticipating'].clients
    train = before.splits['train']
    everybody_but_one = train.owners() != before.participating[0]
    after, server = split_off_server(before, everybody_but_one)
    self.check(before, after, server, everybody_but_one)
    self.assertEqual(
      after.parts['unparticipating'].clients.tolist(), held_out.tolist()
    )
    self.assertEqual(
      after.participating.tolist(), before.participating[:1].tolist()
    )

  def test_server_features(self):
    before = make()
    size = before.splits['train'].num_examples
    after, _ = split_off_server(before, np.arange(size) % 4 == 0)
    expected = np.asarray(before.splits['train'].rows)[::4]
    got = server_features(after)
    np.testing.assert_array_equal(got['x'], expected)
    np.testing.assert_array_equal(got['label'], expected % 3)

  def test_errors(self):
    before = make(unparticipating_fraction=0.25)
    train = before.splits['train']
    none = np.zeros(train.num_examples, bool)
    held_out = np.isin(train.owners(), before.parts['unparticipating'].clients)
    for chosen in (none, held_out):
      with self.assertRaisesRegex(InvalidInput, 'rows for the server'):
        split_off_server(before, chosen)
    with self.assertRaisesRegex(InvalidInput, 'rows that stay on clients'):
      split_off_server(before, ~none)


class SelectionTest(parameterized.TestCase):
  def test_client(self):
    dataset = make()
    chosen = SERVER_DATA['client'](dataset, name='c')
    train = dataset.splits['train']
    self.assertEqual(
      sorted(np.asarray(train.rows)[chosen].tolist()), rows(train, 2)
    )
    with self.assertRaisesRegex(InvalidInput, "client named 'server'"):
      SERVER_DATA['client'](dataset)

  @parameterized.parameters((1,), (0, 2))
  def test_classes(self, *labels):
    dataset = make()
    chosen = SERVER_DATA['classes'](dataset, labels=labels)
    expected = [row % 3 in labels for row in dataset.splits['train'].rows]
    self.assertEqual(chosen.tolist(), expected)
    self.assertEqual(chosen.dtype, bool)

  def test_random(self):
    owner = np.repeat(np.arange(10), 300)
    columns = make_columns('many', {'label': owner % 2, 'client': owner})
    dataset = make_dataset(columns, test_fraction=0.0)
    pick = SERVER_DATA['random']
    chosen = pick(dataset, fraction=0.3, seed=1)
    self.assertEqual(chosen.shape, (3000,))
    self.assertAlmostEqual(chosen.mean(), 0.3, delta=0.04)
    of_client = chosen.reshape(10, 300).mean(1)
    self.assertLess(np.abs(of_client - 0.3).max(), 0.12)
    np.testing.assert_array_equal(chosen, pick(dataset, fraction=0.3, seed=1))
    other = pick(dataset, fraction=0.3, seed=2)
    self.assertGreater((chosen != other).mean(), 0.2)
    self.assertAlmostEqual(pick(dataset).mean(), 0.5, delta=0.04)
    with self.assertRaisesRegex(InvalidInput, 'fraction < 1'):
      pick(dataset, fraction=1.0)


def other_source(kind, size=40):
  """x from 1000; clients of 4 rows each, or none."""
  number = np.arange(size)
  features = {
    'more': number,
    'label': (number % 2).astype(np.int64),
    'x': 1000.0 + number,
  }
  client = None
  if kind == 'arrays':
    client = np.array([f'user_{i // 4:03d}' for i in number])
  elif kind == 'stored':
    names = np.array([f'user_{i:03d}' for i in range(size // 4)])
    client = store_clients({'train': (names, np.full(size // 4, 4))})
  return Columns('other', features, 2, client)


class AddServerDataTest(parameterized.TestCase):
  def check(self, before, after, server, size):
    """What every kind of source has in common; the rows of both splits."""
    first = len(before.features['x'])
    self.assertEqual(server, before.splits['train'].num_clients)
    self.assertEqual([*after.features], [*before.features])
    for name, theirs in (
      ('x', 1000 + np.arange(size)),
      ('label', np.arange(size) % 2),
    ):
      mine = after.features[name]
      self.assertEqual(mine.dtype, before.features[name].dtype)
      np.testing.assert_array_equal(mine[:first], before.features[name])
      np.testing.assert_array_equal(mine[first:], theirs)
    for name, view in after.splits.items():
      self.assertEqual(view.num_clients, server + 1)
      self.assertEqual(view.client_ids[server], SERVER)
      self.assertIs(view.features, after.features)
      if name in before.splits:
        self.assertEqual(owner_of(view), owner_of(before.splits[name]))
      else:
        self.assertEqual(set(owner_of(view).values()), {server})
    np.testing.assert_array_equal(after.participating, before.participating)
    for name, part in before.parts.items():
      self.assertEqual(
        after.parts[name].clients.tolist(), part.clients.tolist()
      )
    found = [
      [row - first for row in rows(after.splits[name], server)]
      if name in after.splits
      else []
      for name in ('server', 'server_test')
    ]
    self.assertFalse(set(found[0]) & set(found[1]))
    self.assertEqual(sorted(found[0] + found[1]), [*range(size)])
    return found

  @parameterized.parameters('arrays', 'stored')
  def test_whole_clients_are_held_out(self, kind):
    before = make(validation_fraction=0.2)
    after, server = add_server_data(
      before, other_source(kind), test_fraction=0.3, seed=1
    )
    train, test = self.check(before, after, server, 40)
    owners = [{row // 4 for row in found} for found in (train, test)]
    self.assertEqual([len(o) for o in owners], [7, 3])
    self.assertFalse(owners[0] & owners[1])
    part = after.parts['server_test']
    self.assertEqual(
      (part.clients.tolist(), part.split), ([server], 'server_test')
    )

  @parameterized.parameters(10, 44, 200)
  def test_without_clients_rows_are_held_out(self, size):
    """Of a source that is shorter, or longer, than the clients' (44)."""
    before = make()
    self.assertLen(before.features['x'], 44)
    after, server = add_server_data(
      before, other_source('rows', size), test_fraction=0.25, seed=1
    )
    _, test = self.check(before, after, server, size)
    self.assertLen(test, round(size / 4))
    self.assertNotEqual(test, [*range(len(test))])
    self.assertIn('server_test', after.parts)

  @parameterized.parameters('arrays', 'stored', 'rows')
  def test_nothing_held_out(self, kind):
    before = make()
    source = other_source(kind, 44)
    after, server = add_server_data(before, source, test_fraction=0.0)
    _, test = self.check(before, after, server, 44)
    self.assertEqual(test, [])
    self.assertNotIn('server_test', after.splits)
    self.assertEqual(after.parts.keys(), before.parts.keys())

  @parameterized.parameters('arrays', 'stored', 'rows')
  def test_seed(self, kind):
    before = make()
    tests = []
    for seed in (0, 0, 1, 2, 3):
      after, server = add_server_data(
        before, other_source(kind, 44), test_fraction=0.3, seed=seed
      )
      tests.append(rows(after.splits['server_test'], server))
    self.assertEqual(tests[0], tests[1])
    self.assertGreater(len(set(map(tuple, tests))), 2)

  def test_errors(self):
    before, source = make(), other_source('arrays')
    features = dict(source.features)
    wide = Columns('wide', features | {'x': np.zeros((40, 2))}, 2)
    with self.assertRaisesRegex(InvalidInput, r"'x' \['M'\].*\['M', 2\]"):
      add_server_data(before, wide)
    del features['x']
    with self.assertRaisesRegex(InvalidInput, r"'x'.*\['label', 'more'\]"):
      add_server_data(before, Columns('short', features, 2))
    with self.assertRaisesRegex(InvalidInput, 'test_fraction < 1'):
      add_server_data(before, source, test_fraction=1.0)


if __name__ == '__main__':
  absltest.main()
