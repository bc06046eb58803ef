"""Histories: examples by the plain rule, order of time, split of users."""

import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import (
  SOURCES,
  fingerprint,
  fingerprint_splits,
  make_dataset,
  movielens,
  retrieval,
  synthetic_retrieval,
  timeline_examples,
)


def plain_examples(timelines, max_context):
  """[(user, context, label)], one at a time."""
  found = []
  for user, items in enumerate(timelines):
    for t in range(1, len(items)):
      context = items[max(0, t - max_context) : t]
      context = context + [0] * (max_context - len(context))
      found.append((user, context, items[t]))
  return found


def by_client(columns):
  """{split: {client: [(context, label)]}} of stored clients."""
  context, label = columns.features['context'], columns.features['label']
  return {
    split: {
      str(name): list(
        zip(context[f : f + n].tolist(), label[f : f + n].tolist(), strict=True)
      )
      for name, f, n in zip(
        columns.client.client_ids, first, count, strict=True
      )
      if n
    }
    for split, (first, count) in columns.client.segments.items()
  }


class TimelineTest(parameterized.TestCase):
  def test_spec(self):
    """R15."""
    context, label, offsets = timeline_examples(
      np.array([1, 5, 3, 2]), np.array([0, 4]), max_context=3
    )
    self.assertEqual(context.tolist(), [[1, 0, 0], [1, 5, 0], [1, 5, 3]])
    self.assertEqual(label.tolist(), [5, 3, 2])
    self.assertEqual(offsets.tolist(), [0, 3])

  @settings(deadline=None, max_examples=100)
  @given(
    st.lists(st.lists(st.integers(1, 30), max_size=9), max_size=8),
    st.integers(1, 12),
  )
  def test_plain_loop(self, timelines, max_context):
    """Ragged timelines, also of users with no item or one."""
    items = np.array([i for t in timelines for i in t], np.int16)
    ends = np.cumsum([0] + [len(t) for t in timelines])
    context, label, offsets = timeline_examples(
      items, ends, max_context=max_context
    )
    self.assertEqual((context.dtype, label.dtype), (np.int16, np.int16))
    self.assertEqual(context.shape, (len(label), max_context))
    owner = np.repeat(np.arange(len(timelines)), np.diff(offsets))
    self.assertEqual(
      [*zip(owner.tolist(), context.tolist(), label.tolist(), strict=True)],
      plain_examples(timelines, max_context),
    )

  def test_bad_input(self):
    with self.assertRaisesRegex(InvalidInput, 'max_context=0'):
      timeline_examples(np.arange(3), np.array([0, 3]), max_context=0)
    with self.assertRaisesRegex(InvalidInput, 'offsets from 0 to N=3'):
      timeline_examples(np.arange(3), np.array([0, 2]), max_context=2)


class SplitUsersTest(parameterized.TestCase):
  @parameterized.parameters(
    ((1, 3, 4, 7), 0.3, 0.3, 0, [0, 1, 2, 2]),  # R16
    ((1, 3, 4, 7), 0.3, 0.3, 10, [0, 0, 1, 2]),  # by id: ..3, ..6, the rest
    ((2, 9), 1.0, 0.0, 0, [0, 0]),
    ((2, 9), 0.5, 0.5, 0, [0, 1]),
    ((), 0.5, 0.5, 4, []),
  )
  def test_split(self, users, train, validation, num_users, expected):
    part = retrieval.split_users(
      np.array(users, int),
      train_fraction=train,
      validation_fraction=validation,
      num_users=num_users,
    )
    self.assertEqual(part.tolist(), expected)

  @parameterized.parameters(0, 6040)
  def test_movielens(self, num_users):
    """4832, 604 and 604 users of ML-1M."""
    part = retrieval.split_users(
      np.arange(1, 6041),
      train_fraction=0.8,
      validation_fraction=0.1,
      num_users=num_users,
    )
    self.assertEqual(np.bincount(part).tolist(), [4832, 604, 604])
    self.assertTrue((np.diff(part) >= 0).all())


class MovielensTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = self.enterContext(tempfile.TemporaryDirectory())

  def write(self, ratings, file='made', **arrays):
    """A file of ratings (user, movie, time)."""
    user, movie, time = np.array(ratings).T
    arrays = {
      'user_id': user.astype(np.uint16),
      'movie_id': movie.astype(np.uint16),
      'timestamp': time.astype(np.int32),
      'rating': np.ones(len(user), np.uint8),
    } | arrays
    np.savez(
      pathlib.Path(self.root, f'{file}.npz'),
      **{n: x for n, x in arrays.items() if x is not None},
    )

  def load(self, **kwargs):
    return movielens(**{'data_dir': self.root, 'file': 'made'} | kwargs)

  def test_order_of_time(self):
    """By user and time; equal times keep the order of the file."""
    ratings = [
      *((2, 11, 5), (1, 7, 30), (1, 8, 10), (2, 12, 5), (1, 9, 20)),
      *((2, 13, 4), (1, 6, 20), (2, 14, 5)),
    ]
    self.write(ratings)
    columns = self.load(max_context=4, train_fraction=0.5)
    self.assertEqual((columns.name, columns.num_classes), ('made', 15))
    self.assertEqual(
      by_client(columns),
      {
        'train': {
          '1': [
            ([8, 0, 0, 0], 9),
            ([8, 9, 0, 0], 6),
            ([8, 9, 6, 0], 7),
          ]
        },
        'test': {
          '2': [
            ([13, 0, 0, 0], 11),
            ([13, 11, 0, 0], 12),
            ([13, 11, 12, 0], 14),
          ]
        },
      },
    )

  def test_ranks_before_times(self):
    """Ranks decide where there are any; rows of unknown rank are left out."""
    rank = np.array([2, 0, 65535, 1], np.uint16)
    self.write([(1, m, m) for m in (1, 2, 9, 3)], time_rank=rank)
    columns = self.load(max_context=2, train_fraction=1, validation_fraction=0)
    self.assertEqual(
      by_client(columns)['train'], {'1': [([2, 0], 3), ([2, 3], 1)]}
    )
    self.assertEqual(columns.num_classes, 10)  # 9 is an item all the same

  def test_short_timelines(self):
    """Users with too few items count in the split and are dropped after."""
    sizes = {1: 2, 2: 3, 5: 4, 7: 5, 10: 2, 12: 3}
    self.write([(u, 1 + i, i) for u, n in sizes.items() for i in range(n)])
    load = lambda **kwargs: {
      split: {client: len(rows) for client, rows in clients.items()}
      for split, clients in by_client(
        self.load(train_fraction=0.5, validation_fraction=0.2, **kwargs)
      ).items()
    }
    self.assertEqual(
      load(),  # 3 and 1 of 6 users
      {
        'train': {'02': 2, '05': 3},
        'validation': {'07': 4},
        'test': {'12': 2},
      },
    )
    self.assertEqual(load(min_timeline=4)['train'], {'5': 3})
    self.assertEqual(load(min_timeline=2)['test'], {'10': 1, '12': 2})

  def test_split_by_id(self):
    """Absent users count: 20 of them make the ids ..10, ..14, ..20."""
    users = (2, 9, 10, 11, 14, 15, 20)
    self.write([(u, 1 + i, i) for u in users for i in range(3)])
    columns = self.load(
      train_fraction=0.5, validation_fraction=0.2, num_users=20
    )
    self.assertEqual(
      {s: [*clients] for s, clients in by_client(columns).items()},
      {
        'train': ['02', '09', '10'],
        'validation': ['11', '14'],
        'test': ['15', '20'],
      },
    )
    dataset = make_dataset(columns)
    self.assertEqual(dataset.participating.tolist(), [0, 1, 2])
    self.assertEqual(dataset.parts['validation'].clients.tolist(), [3, 4])
    self.assertEqual(dataset.parts['test'].clients.tolist(), [5, 6])

  def test_ids(self):
    """V is the table's largest id, the given one, or that of the ratings."""
    ratings = [(1, m, m) for m in (3, 1, 4)]
    load = lambda **kwargs: self.load(
      train_fraction=1, validation_fraction=0, **kwargs
    )
    self.write(ratings)
    self.assertEqual(load().num_classes, 5)
    self.write(ratings, movie_table_id=np.array([2, 7]))
    self.assertEqual(load().num_classes, 8)
    self.assertEqual(load(num_items=40).num_classes, 41)
    for num_items, dtype in ((32767, np.int16), (32768, np.int32)):
      features = load(num_items=num_items).features
      self.assertEqual(
        {n: x.dtype for n, x in features.items()},
        {'context': dtype, 'label': dtype},
      )

  def test_other_columns(self):
    """Any file with users, items and times, under any names."""
    self.write(
      [(1, m, m) for m in (3, 1, 4)],
      file='other',
      who=np.array([6, 6, 6]),
      what=np.array([2, 3, 4]),
      user_id=None,
      movie_id=None,
    )
    columns = self.load(
      file='other.npz', user_column='who', item_column='what', max_context=1
    )
    self.assertEqual(by_client(columns)['train'], {'6': [([3], 2), ([2], 4)]})

  @parameterized.parameters(
    ({'file': 'absent'}, r'data file at .*absent\.npz, found none'),
    ({'item_column': 'x'}, r"column 'x' in .*made\.npz, got \['movie_id', "),
    ({'item_column': 'score'}, r"integers \[N\] in column 'score'.*float64"),
    ({'user_column': 'short'}, r'one for each rating, got int64\[2\]'),
    ({'item_column': 'rating'}, r'items of made in 1\.\.1, got 0\.\.1'),
    ({'num_items': 3}, r'items of made in 1\.\.3, got 1\.\.4'),
    ({'num_users': 5}, r'users in 1\.\.5.*got 6\.\.6'),
    ({'min_timeline': 1}, 'min_timeline >= 2, got min_timeline=1'),
    ({'min_timeline': 4}, 'train users of made with 4 items or more'),
    ({'max_context': 0}, 'max_context=0'),
    ({'train_fraction': 0}, 'train_fraction > 0'),
    ({'train_fraction': 0.95}, r'<= 1, got 0\.95 \+ 0\.1'),
    ({'validation_fraction': -0.1}, 'validation_fraction=-0.1'),
  )
  def test_bad_input(self, kwargs, message):
    self.write(
      [(6, m, m) for m in (3, 1, 4)],
      rating=np.array([1, 0, 1]),
      score=np.ones(3),
      short=np.ones(2, int),
    )
    with self.assertRaisesRegex(InvalidInput, message):
      self.load(**kwargs)

  def test_no_time(self):
    self.write([(6, m, m) for m in (3, 1, 4)], timestamp=None)
    with self.assertRaisesRegex(InvalidInput, "a column 'timestamp'"):
      self.load()

  def test_broken_file(self):
    pathlib.Path(self.root, 'made.npz').write_bytes(b'PK nonsense')
    with self.assertRaisesRegex(InvalidInput, 'intact .npz file'):
      self.load()


# (user, movie, time); movies 6 and 1 of user 10 in this order.
RATINGS = [
  *((10, 6, 3), (9, 2, 100), (10, 1, 4), (9, 8, 50), (9, 4, 75)),
  *((10, 5, 1), (30, 3, 2), (30, 7, 1), (30, 2, 3), (4, 1, 1)),
]


class TinyRatings(tfds.core.GeneratorBasedBuilder):
  """Ratings with the features of MovieLens in TFDS."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'user_id': tfds.features.Text(),
          'movie_id': tfds.features.Text(),
          'movie_title': tfds.features.Text(),
          'timestamp': np.int64,
          'user_rating': np.float32,
        }
      ),
    )

  def _split_generators(self, manager):
    return {'train': self._make(False), 'broken': self._make(True)}

  def _generate_examples(self):
    raise NotImplementedError

  def _make(self, broken):
    for i, (user, movie, time) in enumerate(RATINGS):
      yield (
        i,
        {
          'user_id': 'somebody' if broken and i == 3 else str(user),
          'movie_id': str(movie),
          'movie_title': f'The {movie}',
          'timestamp': time,
          'user_rating': 3.5,
        },
      )


class MovielensTfdsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = cls.enterClassContext(tempfile.TemporaryDirectory())
    TinyRatings(
      data_dir=cls.root, file_format='array_record'
    ).download_and_prepare()

  def load(self, **kwargs):
    return retrieval.movielens_tfds(
      **{
        'data_dir': self.root,
        'name': 'tiny_ratings',
        'train_fraction': 0.5,
        'validation_fraction': 0.25,
        'max_context': 2,
        **kwargs,
      }
    )

  def test_histories(self):
    """Texts are numbers: user 10 comes after user 9."""
    columns = self.load()
    self.assertEqual((columns.name, columns.num_classes), ('tiny_ratings', 9))
    self.assertEqual(
      by_client(columns),
      {
        'train': {'09': [([8, 0], 4), ([8, 4], 2)]},
        'validation': {'10': [([5, 0], 6), ([5, 6], 1)]},
        'test': {'30': [([7, 0], 3), ([7, 3], 2)]},
      },
    )

  def test_second_open_decodes_nothing(self):
    first = self.load()
    with mock.patch.object(retrieval, '_decode') as decode:
      again = self.load()
      decode.assert_not_called()
    self.assertEqual(fingerprint(first), fingerprint(again))

  @parameterized.parameters(
    ({'name': 'no_such_data'}, 'TFDS data set no_such_data in .*: '),
    ({'split': 'nothing'}, 'split nothing of TFDS data set tiny_ratings'),
    ({'split': 'broken'}, 'integers user_id, .* of tiny_ratings: .*somebody'),
    ({'num_items': 5}, r'1\.\.5, got 1\.\.8'),
  )
  def test_bad_input(self, kwargs, message):
    with self.assertRaisesRegex(InvalidInput, message) as caught:
      self.load(**kwargs)
    self.assertNotIn('\n', str(caught.exception))

  def test_not_installed(self):
    with (
      mock.patch.dict(sys.modules, {'tensorflow_datasets': None}),
      self.assertRaisesRegex(InvalidInput, r'pip install fedjax_ext\[tfds\]'),
    ):
      self.load()

  def test_tensorflow_is_not_loaded(self):
    code = (
      'import sys; from fedjax_ext.data import retrieval; '
      f'retrieval.movielens_tfds(data_dir={self.root!r}, '
      'name="tiny_ratings", split="train[:9]"); '
      'print("tensorflow" in sys.modules)'
    )
    run = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True
    )
    self.assertEqual((run.stdout, run.returncode), ('False\n', 0), run.stderr)


class SyntheticTest(parameterized.TestCase):
  def test_sizes(self):
    """200, 50 and 50 users with 48 examples each, of 400 items."""
    columns = synthetic_retrieval()
    self.assertEqual(columns.num_classes, 401)
    self.assertEqual(columns.features['context'].shape, (300 * 48, 10))
    label = columns.features['label']
    self.assertEqual((label.min(), label.max()), (1, 400))
    dataset = make_dataset(columns)
    np.testing.assert_array_equal(dataset.participating, np.arange(200))
    for split, users in (('train', 200), ('validation', 50), ('test', 50)):
      self.assertLen(dataset.parts[split].clients, users)
      sizes = dataset.splits[split].sizes(dataset.parts[split].clients)
      np.testing.assert_array_equal(sizes, 48)

  def test_home_genre(self):
    """A user's share of one genre is 0.9 + 0.1/20; homes are spread out."""
    columns = synthetic_retrieval(num_clients=400)
    clients = by_client(columns)['train'].values()
    genre = np.array([[label - 1 for _, label in rows] for rows in clients])
    genre //= 20
    home = np.array([np.bincount(g).argmax() for g in genre])
    self.assertAlmostEqual((genre == home[:, None]).mean(), 0.905, delta=0.01)
    np.testing.assert_allclose(np.bincount(home, minlength=20), 20, atol=15)
    away = genre[genre != home[:, None]]
    self.assertLess(np.bincount(away).max() / len(away), 0.09)

  def test_zipf(self):
    """Within a genre the i-th item's share is i^-0.8 over the sum of them."""
    label = synthetic_retrieval(num_clients=1000).features['label']
    share = np.bincount((label - 1) % 20) / len(label)
    expected = np.arange(1, 21) ** -0.8
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.005)

  def test_context(self):
    """Contexts are the labels before, and the first item."""
    columns = synthetic_retrieval(num_clients=3, timeline=6, max_context=4)
    for clients in by_client(columns).values():
      for rows in clients.values():
        items = rows[0][0][:1] + [label for _, label in rows]
        self.assertEqual(
          [(c, y) for _, c, y in plain_examples([items], 4)], rows
        )

  def test_seed(self):
    """It decides everything, and no split depends on another's size."""
    make = lambda **kwargs: synthetic_retrieval(num_clients=5, **kwargs)
    self.assertEqual(fingerprint(make(seed=1)), fingerprint(make(seed=1)))
    self.assertNotEqual(fingerprint(make(seed=1)), fingerprint(make(seed=2)))
    self.assertEqual(
      fingerprint_splits(make_dataset(make(seed=1), seed=0)),
      fingerprint_splits(make_dataset(make(seed=2), seed=0)),
    )
    more = by_client(make())
    fewer = by_client(make(num_validation_clients=0))
    self.assertNotIn('validation', fewer)
    for split in ('train', 'test'):
      self.assertEqual([*more[split].values()], [*fewer[split].values()])

  @parameterized.parameters(
    ({'num_items': 30}, 'multiple of num_genres=20, got num_items=30'),
    ({'num_genres': 0}, 'num_genres=0'),
    ({'num_clients': 0}, 'num_clients=0'),
    ({'num_validation_clients': -1}, 'num_validation_clients=-1'),
    ({'num_test_clients': -1}, 'num_test_clients=-1'),
    ({'timeline': 1}, 'timeline=1'),
    ({'home_probability': 1.5}, 'home_probability=1.5'),
    ({'zipf': -1}, 'zipf=-1'),
    ({'max_context': 0}, 'max_context=0'),
  )
  def test_bad_input(self, kwargs, message):
    with self.assertRaisesRegex(InvalidInput, message):
      synthetic_retrieval(**kwargs)


class SourcesTest(absltest.TestCase):
  def test_registered(self):
    for name in ('movielens', 'movielens_tfds', 'synthetic_retrieval'):
      self.assertIs(SOURCES[name], getattr(retrieval, name))


if __name__ == '__main__':
  absltest.main()
