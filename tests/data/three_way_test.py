"""The three-way split: exact sizes, disjoint parts, streams of their own."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import (
  Columns,
  iid_partition,
  make_columns,
  store_clients,
  synthetic_retrieval,
  three_way,
)


def natural(sizes, split=None, **more):
  """Clients 0, 1, ... of these sizes, rows in random order."""
  owner = np.repeat(np.arange(len(sizes)), sizes)
  order = np.random.default_rng(0).permutation(len(owner))
  arrays = {
    'x': np.arange(len(owner), dtype=np.float32),
    'label': np.arange(len(owner)) % 3,
    'client': owner,
  } | more
  if split is not None:
    arrays['split'] = np.asarray(split)
  arrays = {name: np.asarray(x)[order] for name, x in arrays.items()}
  return make_columns('natural', arrays)


def rows(dataset, part):
  """{client: set of its x} of a part."""
  part = dataset.parts[part]
  view = dataset.splits[part.split]
  return {int(c): set(view.client(int(c))['x'].tolist()) for c in part.clients}


class ThreeWayTest(parameterized.TestCase):
  @settings(deadline=None, max_examples=40)
  @given(
    st.lists(st.integers(0, 15), min_size=6, max_size=20),
    st.sampled_from([0.2, 0.5]),
    st.integers(1, 5),
    st.integers(0, 99),
  )
  def test_every_part(self, sizes, share, ratio, seed):
    sizes = [*sizes, 5, 7, 9, 11]
    columns = natural(sizes)
    dataset = three_way(
      columns,
      unparticipating=share,
      train_per_validation=ratio,
      seed=seed,
    )
    enough = [c for c, n in enumerate(sizes) if n >= 2]
    names = dataset.splits['train'].client_ids
    held_out = names[dataset.parts['unparticipating'].clients]
    part = names[dataset.participating]
    self.assertLen(held_out, round(share * len(enough)))
    self.assertCountEqual([*held_out, *part], enough)
    train, validation = rows(dataset, 'train'), rows(dataset, 'validation')
    unparticipating = rows(dataset, 'unparticipating')
    for c in dataset.participating.tolist():
      n = sizes[names[c]]
      self.assertLen(validation[c], -(-n // (ratio + 1)))
      self.assertLen(train[c], n - len(validation[c]))
      self.assertFalse(train[c] & validation[c])
    for c, mine in unparticipating.items():
      self.assertLen(mine, -(-sizes[names[c]] // (ratio + 1)))

  def test_eleven_examples(self):
    """Oracle G1: 3 of 11 are validation; one example makes no client."""
    dataset = three_way(natural([11, 11, 11, 11, 11, 1]), seed=3)
    for mine in rows(dataset, 'validation').values():
      self.assertLen(mine, 3)
    for mine in rows(dataset, 'train').values():
      self.assertLen(mine, 8)
    self.assertLen(dataset.participating, 4)

  def test_which_examples_is_random(self):
    seen = {
      frozenset(rows(three_way(natural([11] * 5), seed=s), 'validation')[0])
      for s in range(20)
      if 0 in rows(three_way(natural([11] * 5), seed=s), 'validation')
    }
    self.assertGreater(len(seen), 10)

  def test_bankers_rounding(self):
    dataset = three_way(natural([4] * 5), unparticipating=0.5, seed=0)
    self.assertLen(dataset.parts['unparticipating'].clients, 2)

  def test_unparticipating_clients_stay_whatever_participates(self):
    columns = natural([6] * 30)
    few, more, share = (
      three_way(columns, seed=4, **setting)
      for setting in (
        {'participating_clients': 5},
        {'participating_clients': 12},
        {'participating': 0.5},
      )
    )
    for dataset in (more, share):
      np.testing.assert_array_equal(
        few.parts['unparticipating'].clients,
        dataset.parts['unparticipating'].clients,
      )
    self.assertLen(few.participating, 5)
    self.assertLen(share.participating, 12)
    self.assertContainsSubset(few.participating, more.participating)
    small, large = rows(few, 'train'), rows(more, 'train')
    for c in small:
      self.assertEqual(small[c], large[c])

  def test_another_seed_differs(self):
    one, two = (three_way(natural([6] * 30), seed=s) for s in (0, 1))
    self.assertFalse(
      np.array_equal(
        one.parts['unparticipating'].clients,
        two.parts['unparticipating'].clients,
      )
    )

  def test_strata(self):
    group = np.repeat(np.arange(40) % 4 == 0, 5).astype(int)
    dataset = three_way(
      natural([5] * 40, group=group), stratify_column='group', seed=1
    )
    held_out = dataset.parts['unparticipating'].clients
    self.assertLen(held_out, 8)
    self.assertEqual((held_out % 4 == 0).sum(), 2)

  def test_units_stay_together(self):
    sizes = [12] * 10
    unit = np.tile(np.repeat(np.arange(6), 2), 10)
    columns = natural(sizes, unit=unit)
    dataset = three_way(columns, unit_column='unit', seed=0)
    for c in dataset.participating.tolist():
      train = dataset.splits['train'].client(c)['unit']
      validation = dataset.splits['validation'].client(c)['unit']
      self.assertLen(np.unique(validation), 2)
      self.assertLen(np.unique(train), 4)
      self.assertFalse(set(train.tolist()) & set(validation.tolist()))

  def test_fewer_units_than_two_leave_a_client_out(self):
    unit = np.concatenate([np.zeros(12, int), np.tile(np.arange(6), 4)])
    dataset = three_way(
      natural([12, 6, 6, 6, 6], unit=unit), unit_column='unit', seed=0
    )
    clients = [
      *dataset.participating,
      *dataset.parts['unparticipating'].clients,
    ]
    self.assertCountEqual(clients, [1, 2, 3, 4])

  def test_max_examples(self):
    dataset = three_way(natural([50] * 10), max_examples=7, seed=0)
    for part in ('train', 'validation', 'unparticipating'):
      self.assertEqual({len(x) for x in rows(dataset, part).values()}, {7})

  def test_all_unparticipating(self):
    dataset = three_way(natural([10] * 10), all_unparticipating=True, seed=0)
    sizes = {len(x) for x in rows(dataset, 'unparticipating').values()}
    self.assertEqual(sizes, {10})

  def test_eval_clients_of_train_and_validation_are_the_same(self):
    dataset = three_way(natural([10] * 30), eval_clients=3, seed=0)
    parts = dataset.parts
    np.testing.assert_array_equal(
      parts['train'].clients, parts['validation'].clients
    )
    self.assertLen(parts['train'].clients, 3)
    self.assertLen(dataset.participating, 24)

  def test_split_by_example_is_kept(self):
    split = np.tile([0, 0, 0, 1], 20)
    columns = natural([8] * 10, split=split, was_test=split)
    dataset = three_way(columns, split='by_example', seed=0)
    for name, value in (
      ('train', 0),
      ('validation', 1),
      ('unparticipating', 1),
    ):
      part = dataset.parts[name]
      view = dataset.splits[part.split]
      for c in part.clients.tolist():
        self.assertEqual(set(view.client(c)['was_test'].tolist()), {value})

  def test_split_by_client_is_kept(self):
    split = np.repeat([0, 0, 0, 0, 0, 0, 1, 1, 1, 1], 8)
    dataset = three_way(natural([8] * 10, split=split), split='by_client')
    np.testing.assert_array_equal(dataset.participating, np.arange(6))
    np.testing.assert_array_equal(
      dataset.parts['unparticipating'].clients, np.arange(6, 10)
    )

  def test_made_by_default_though_the_source_has_a_split(self):
    split = np.repeat([0, 0, 0, 0, 0, 0, 1, 1, 1, 1], 8)
    dataset = three_way(natural([8] * 10, split=split), seed=0)
    self.assertLen(dataset.participating, 8)

  def test_stored_clients_with_several_splits(self):
    names = np.array(['a', 'b', 'c', 'd', 'e'])
    stored = store_clients(
      {'train': (names, np.full(5, 6)), 'test': (names, np.full(5, 4))}
    )
    columns = Columns('stored', {'x': np.arange(50)}, 2, client=stored)
    dataset = three_way(columns, seed=0)
    for mine in rows(dataset, 'validation').values():
      self.assertLen(mine, 2)
    kept = three_way(columns, split='by_example', seed=0)
    for mine in rows(kept, 'validation').values():
      self.assertLen(mine, 4)
      self.assertTrue(all(x >= 30 for x in mine))

  def test_a_sources_validation_rows_are_left_out_of_its_splits(self):
    names = np.array(['a', 'b', 'c', 'd', 'e'])
    stored = store_clients(
      {
        'train': (names, np.full(5, 6)),
        'validation': (names, np.full(5, 3)),
        'test': (names, np.full(5, 4)),
      }
    )
    columns = Columns('stored', {'x': np.arange(65)}, 2, client=stored)
    kept = three_way(columns, split='by_example', seed=0)
    self.assertEqual({len(x) for x in rows(kept, 'train').values()}, {6})
    self.assertEqual({len(x) for x in rows(kept, 'validation').values()}, {4})
    made = three_way(columns, seed=0)
    self.assertEqual({len(x) for x in rows(made, 'validation').values()}, {3})

  def test_overlapping_rows_are_not_split_at_random(self):
    columns = dataclasses.replace(natural([6] * 10), overlapping=True)
    with self.assertRaisesRegex(InvalidInput, 'overlap'):
      three_way(columns)
    timelines = synthetic_retrieval(
      num_items=60, num_genres=4, num_clients=12, timeline=13
    )
    with self.assertRaisesRegex(InvalidInput, 'overlap'):
      three_way(timelines)

  def test_only_rows_of_clients_that_count_are_read(self):
    dataset = three_way(natural([6] * 30), participating_clients=2, seed=0)
    self.assertEqual(dataset.splits['train'].num_examples, 8 * 4)

  def test_made_clients(self):
    columns = natural([10] * 12)
    dataset = three_way(
      columns, partition=iid_partition, num_clients=20, seed=0
    )
    self.assertLen(dataset.participating, 16)
    everything = [
      x
      for p in dataset.parts
      for mine in rows(dataset, p).values()
      for x in mine
    ]
    self.assertLen(set(everything), len(everything))

  @parameterized.parameters(
    ({'unparticipating': 1.0}, 'unparticipating'),
    ({'unparticipating': 0.01}, "part 'unparticipating'"),
    ({'participating': 0.0}, 'participating=0.0'),
    ({'participating': 0.5, 'participating_clients': 3}, '0.5 and 3'),
    ({'participating_clients': 99}, 'participating_clients=99'),
    ({'train_per_validation': 0}, 'train_per_validation=0'),
    ({'min_examples': 1}, 'min_examples=1'),
    ({'min_examples': 99}, 'clients that may train'),
    ({'split': 'by_example'}, 'test rows'),
    (
      {'split': 'by_example', 'train_per_validation': 3},
      'train_per_validation=3',
    ),
    ({'split': 'by_client', 'unparticipating': 0.7}, 'unparticipating=0.7'),
    ({'split': 'by_client', 'stratify_column': 'x'}, 'stratify_column=x'),
    ({'split': 'given'}, 'split=given'),
    ({'stratify_column': 'hsf'}, 'stratify_column=hsf'),
    ({'stratify_column': 'x'}, 'stratify_column=x'),
    ({'unit_column': 'text'}, 'unit_column=text'),
  )
  def test_bad_input(self, setting, message):
    with self.assertRaisesRegex(InvalidInput, message):
      three_way(natural([6] * 10), **setting)


if __name__ == '__main__':
  absltest.main()
