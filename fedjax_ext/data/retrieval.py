"""Item histories by user: MovieLens, and synthetic ones without a download.

A user's items in the order of time become examples of retrieval: predict an
item from the items before it. Items are 1..V; 0 pads a context.

Axis letters: C users, M examples, N items of all users, T context, V items.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.core.plans import ramp
from fedjax_ext.data.columns import Columns, store_clients
from fedjax_ext.data.index_cache import cached_index, file_key
from fedjax_ext.data.records import one_line, open_tfds

_SPLITS = ('train', 'validation', 'test')
_UNKNOWN_RANK = 65535
_CHUNK = 1024  # records read at once


class Ratings(NamedTuple):
  """Who had which item when; what they thought of it does not matter.

  Attributes:
    user: int [N].
    item: int [N], from 1.
    time: numbers [N] that ascend with time within a user.
    num_items: V.
  """

  user: np.ndarray
  item: np.ndarray
  time: np.ndarray
  num_items: int


def timeline_examples(
  items: np.ndarray, offsets: np.ndarray, *, max_context: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Every item but a user's first is a label, the items before its context.

  Args:
    items: int [N], user after user, each in the order of time.
    offsets: int64 [C+1]; user c has items offsets[c]:offsets[c+1].
    max_context: T.

  Returns:
    (context int [M, T], the up to T items before the label, oldest first, then
    zeros; label int [M]; offsets int64 [C+1] of the examples), in the order of
    the items.
  """
  validate.at_least('max_context', max_context, 1)
  items, offsets = np.asarray(items), np.asarray(offsets, np.int64)
  validate.check(
    len(offsets) and offsets[0] == 0 and offsets[-1] == len(items),
    f'Expected offsets from 0 to N={len(items)}, got {offsets[:1]} to '
    f'{offsets[-1:]}.',
  )
  examples = np.maximum(np.diff(offsets) - 1, 0)
  before = ramp(examples) + 1  # items before each label
  label = np.repeat(offsets[:-1], examples) + before
  length = np.minimum(before, max_context)
  context = np.zeros((len(label), max_context), items.dtype)
  for t in range(min(max_context, int(length.max(initial=0)))):
    here = np.flatnonzero(length > t)
    context[here, t] = items[label[here] - length[here] + t]
  ends = np.concatenate([[0], np.cumsum(examples)]).astype(np.int64)
  return context, items[label], ends


def split_users(
  users: np.ndarray,
  *,
  train_fraction: float,
  validation_fraction: float,
  num_users: int = 0,
) -> np.ndarray:
  """Splits users by their ids, in ascending order.

  Of n users, those up to round(n * train_fraction) train and those up to
  round(n * (train_fraction + validation_fraction)) validate.

  Args:
    users: ids int [C], ascending.
    train_fraction: of the users.
    validation_fraction: of the users; the rest is for testing.
    num_users: n, where some of the users 1..n are absent and ids are to be
      counted; 0 counts the C users.

  Returns:
    0 = train, 1 = validation, 2 = test, int [C].
  """
  validate.above('train_fraction', train_fraction, 0)
  validate.at_least('validation_fraction', validation_fraction, 0)
  both = train_fraction + validation_fraction
  validate.check(
    both <= 1,
    'Expected train_fraction + validation_fraction <= 1, got '
    f'{train_fraction} + {validation_fraction}.',
  )
  validate.at_least('num_users', num_users, 0)
  place = np.arange(len(users))
  if num_users and len(users):
    low, high = int(users[0]), int(users[-1])
    validate.check(
      low >= 1 and high <= num_users,
      f'Expected users in 1..{num_users}, as num_users={num_users} says, got '
      f'{low}..{high}.',
    )
    place = np.asarray(users, np.int64) - 1
  count = num_users or len(users)
  cuts = np.rint([count * train_fraction, count * both])
  return np.searchsorted(cuts, place, side='right')


def movielens(
  *,
  data_dir: str,
  file: str = 'ml1m',
  user_column: str = 'user_id',
  item_column: str = 'movie_id',
  max_context: int = 10,
  min_timeline: int = 3,
  train_fraction: float = 0.8,
  validation_fraction: float = 0.1,
  num_items: int = 0,
  num_users: int = 0,
) -> Columns:
  """Histories of DATA_DIR/FILE.npz, whose users train, validate or test.

  The file has a row for each rating, and each is a view. Rows are ordered by
  `time_rank`, where there is one (without the rows of rank 65535, which is
  unknown), else by `timestamp`; ties keep the order of the file. Users with few
  items are dropped after the users were split.

  ML-1M with num_users=6040 trains on the users 1..4832, validates on 4833..5436
  and tests on 5437..6040, also where a copy lacks some of them.

  Args:
    data_dir: folder of the file.
    file: its name, with or without .npz.
    user_column: its column of users, int.
    item_column: its column of items, int from 1.
    max_context: T.
    min_timeline: users with fewer items are dropped.
    train_fraction: of the users, in the order of their ids; see `split_users`.
    validation_fraction: of the users; the rest is for testing.
    num_items: V; 0 takes the largest item of the file, in its table
      (movie_table_id for movie_id) or its ratings.
    num_users: of the original, with ids 1..num_users; 0 counts the users there
      are.

  Returns:
    Columns with `context` [M, T] and `label` [M], int16 where V fits else
    int32, V+1 classes, and stored clients, each in one split.

  Raises:
    InvalidInput: the file or a column is missing, or an id is out of range.
  """
  path = pathlib.Path(data_dir) / f'{file.removesuffix(".npz")}.npz'
  ratings = _read_npz(path, user_column, item_column)
  return _columns(
    path.stem,
    ratings,
    max_context=max_context,
    min_timeline=min_timeline,
    train_fraction=train_fraction,
    validation_fraction=validation_fraction,
    num_items=num_items,
    num_users=num_users,
  )


def movielens_tfds(
  *,
  data_dir: str = '',
  name: str = 'movielens/1m-ratings',
  split: str = 'train',
  max_context: int = 10,
  min_timeline: int = 3,
  train_fraction: float = 0.8,
  validation_fraction: float = 0.1,
  num_items: int = 0,
  num_users: int = 0,
) -> Columns:
  """Histories of MovieLens in TensorFlow Datasets; see `movielens`.

  Reads its features user_id, movie_id and timestamp as random-access records,
  without TensorFlow, and keeps them beside the data set for the next time. The
  order of equal time stamps is the one in which TFDS stores the records.

  Args:
    data_dir: folder of prepared data sets, '' for ~/tensorflow_datasets.
    name: of the data set, with its config.
    split: the TFDS split with all ratings.
    max_context: T.
    min_timeline: users with fewer items are dropped.
    train_fraction: of the users, in the order of their ids; see `split_users`.
    validation_fraction: of the users; the rest is for testing.
    num_items: V; 0 takes the largest movie_id.
    num_users: of the original, with ids 1..num_users; 0 counts the users there
      are.

  Raises:
    InvalidInput: a library, the data set or a feature is missing.
  """
  return _columns(
    name,
    _read_tfds(data_dir, name, split),
    max_context=max_context,
    min_timeline=min_timeline,
    train_fraction=train_fraction,
    validation_fraction=validation_fraction,
    num_items=num_items,
    num_users=num_users,
  )


def synthetic_retrieval(
  *,
  num_items: int = 400,
  num_genres: int = 20,
  num_clients: int = 200,
  num_validation_clients: int = 50,
  num_test_clients: int = 50,
  timeline: int = 49,
  home_probability: float = 0.9,
  zipf: float = 0.8,
  max_context: int = 10,
  seed: int = 0,
) -> Columns:
  """Draws users who mostly stay in one genre.

  Genre g has the items g*V/G+1..(g+1)*V/G. A user has a random home genre; each
  item comes from it with `home_probability`, else from a random genre (any of
  them), and within a genre the i-th item has probability ~ i^-zipf. Splits
  have random streams of their own: the number of users in one changes no other.

  Args:
    num_items: V.
    num_genres: G, which divides V.
    num_clients: train users.
    num_validation_clients: further users to validate on.
    num_test_clients: further users to test on.
    timeline: items of each user.
    home_probability: of the home genre.
    zipf: exponent; 0 makes the items of a genre equally likely.
    max_context: T.
    seed: seed of everything.

  Returns:
    Columns with `context` [M, T] and `label` [M], V+1 classes, and stored
    clients with timeline - 1 examples each.
  """
  validate.at_least('num_genres', num_genres, 1)
  validate.check(
    num_items > 0 and num_items % num_genres == 0,
    f'Expected num_items to be a multiple of num_genres={num_genres}, got '
    f'num_items={num_items}.',
  )
  validate.at_least('num_clients', num_clients, 1)
  validate.at_least('num_validation_clients', num_validation_clients, 0)
  validate.at_least('num_test_clients', num_test_clients, 0)
  validate.at_least('timeline', timeline, 2)
  validate.between('home_probability', home_probability, 0, 1)
  validate.at_least('zipf', zipf, 0)
  size = num_items // num_genres
  weight = np.arange(1, size + 1, dtype=np.float64) ** -zipf
  counts = (num_clients, num_validation_clients, num_test_clients)
  items = []
  for part, count in enumerate(counts):
    rng = np.random.default_rng([seed, part])
    home = rng.integers(num_genres, size=(count, 1))
    away = rng.integers(num_genres, size=(count, timeline))
    stays = rng.random((count, timeline)) < home_probability
    within = rng.choice(size, (count, timeline), p=weight / weight.sum())
    items.append(np.where(stays, home, away) * size + within + 1)
  return _histories(
    'synthetic_retrieval',
    np.concatenate(items).reshape(-1),
    np.full(sum(counts), timeline),
    user=np.arange(sum(counts)),
    part=np.repeat(np.arange(len(counts)), counts),
    num_items=num_items,
    max_context=max_context,
  )


def _columns(
  name: str,
  ratings: Ratings,
  *,
  max_context: int,
  min_timeline: int,
  train_fraction: float,
  validation_fraction: float,
  num_items: int,
  num_users: int,
) -> Columns:
  """Orders, splits and drops; see `movielens`."""
  validate.at_least('min_timeline', min_timeline, 2)
  validate.at_least('num_items', num_items, 0)
  user, item, time, known_items = ratings
  num_items = num_items or known_items
  low, high = item.min(initial=1), item.max(initial=0)
  validate.check(
    low >= 1 and high <= num_items,
    f'Expected items of {name} in 1..{num_items}, got {low}..{high}.',
  )
  order = np.lexsort((time, user))
  users, sizes = np.unique(user, return_counts=True)
  part = split_users(
    users,
    train_fraction=train_fraction,
    validation_fraction=validation_fraction,
    num_users=num_users,
  )
  kept = sizes >= min_timeline
  validate.check(
    (kept & (part == 0)).any(),
    f'Expected train users of {name} with {min_timeline} items or more, got '
    f'{len(users)} users with up to {sizes.max(initial=0)}.',
  )
  return _histories(
    name,
    item[order][np.repeat(kept, sizes)],
    sizes[kept],
    user=users[kept],
    part=part[kept],
    num_items=num_items,
    max_context=max_context,
  )


def _histories(
  name: str,
  items: np.ndarray,
  sizes: np.ndarray,
  *,
  user: np.ndarray,
  part: np.ndarray,
  num_items: int,
  max_context: int,
) -> Columns:
  """Examples of items [N] of users [C], who ascend, as their parts [C] do."""
  fits = num_items <= np.iinfo(np.int16).max
  context, label, offsets = timeline_examples(
    items.astype(np.int16 if fits else np.int32),
    np.concatenate([[0], np.cumsum(sizes)]),
    max_context=max_context,
  )
  width = len(str(user.max(initial=0)))  # so that names ascend as numbers do
  names = np.array([f'{u:0{width}d}' for u in user.tolist()], str)
  examples = np.diff(offsets)
  clients = store_clients(
    {
      split: (names[part == i], examples[part == i])
      for i, split in enumerate(_SPLITS)
      # No empty validation split: `make_dataset` may be asked to make one.
      if split != 'validation' or (part == i).any()
    }
  )
  features = {'context': context, 'label': label}
  # Neighbouring contexts share all items but one.
  return Columns(name, features, num_items + 1, clients, overlapping=True)


def _read_npz(path: pathlib.Path, user: str, item: str) -> Ratings:
  validate.check(path.exists(), f'Expected a data file at {path}, found none.')
  try:
    with np.load(path, allow_pickle=False) as file:
      time = 'time_rank' if 'time_rank' in file.files else 'timestamp'
      for column in (user, item, time):
        validate.check(
          column in file.files,
          f'Expected a column {column!r} in {path}, got {sorted(file.files)}.',
        )
      columns = {n: file[n] for n in (user, item, time)}
      table_name = f'{item.removesuffix("_id")}_table_id'
      table = file[table_name] if table_name in file.files else np.zeros(1, int)
  except validate.InvalidInput:
    raise
  except Exception as error:  # zipfile.BadZipFile, zlib.error, ValueError, ...
    raise validate.InvalidInput(
      f'Expected an intact .npz file at {path}: {error or type(error).__name__}'
    ) from error
  _check_columns(path, columns, integers=(user, item))
  users, items, times = columns.values()
  num_items = int(max(items.max(initial=0), table.max(initial=0)))
  if time == 'time_rank':
    known = times != _UNKNOWN_RANK
    users, items, times = users[known], items[known], times[known]
  return Ratings(users, items, times, num_items)


def _check_columns(
  path: pathlib.Path,
  columns: Mapping[str, np.ndarray],
  *,
  integers: tuple[str, ...],
) -> None:
  """Checks that columns are numbers [N], for one N."""
  rows = {np.shape(x) for x in columns.values()}
  for name, x in columns.items():
    kinds = 'iu' if name in integers else 'iuf'
    validate.check(
      x.ndim == 1 and len(rows) == 1 and x.dtype.kind in kinds,
      f'Expected {"integers" if name in integers else "numbers"} [N] in column '
      f'{name!r} of {path}, one for each rating, got {x.dtype}{list(x.shape)}.',
    )


def _read_tfds(data_dir: str, name: str, split: str) -> Ratings:
  tfds, source = open_tfds(name, split, data_dir)
  info = source.dataset_info
  wanted = ('user_id', 'movie_id', 'timestamp')
  for feature in wanted:
    validate.check(
      feature in info.features,
      f'Expected a feature {feature!r} of {name}, got {sorted(info.features)}.',
    )
  # Only these are decoded; `tfds.decode.PartialDecoding` needs TensorFlow.
  features = tfds.features.FeaturesDict({n: info.features[n] for n in wanted})
  folder = pathlib.Path(info.data_dir)
  index = cached_index(
    folder / 'fedjax_ext.ratings.index.npz',
    file_key(sorted(folder.glob('*.array_record*')), split, len(source)),
    lambda: _decode(source, features, wanted, name),
  )
  user, item, time = (index[n] for n in wanted)
  return Ratings(user, item, time, int(item.max(initial=0)))


def _decode(
  source: Any, features: Any, wanted: tuple[str, ...], name: str
) -> dict[str, np.ndarray]:
  """Integers {feature: int64 [N]} of raw records, some of them as text."""
  values = {n: np.empty(len(source), np.int64) for n in wanted}
  for start in range(0, len(source), _CHUNK):
    numbers = range(start, min(start + _CHUNK, len(source)))
    for i, data in zip(numbers, source.__getitems__([*numbers]), strict=True):
      try:
        record = features.deserialize_example_np(data)
        for n in wanted:
          values[n][i] = int(record[n])
      except Exception as error:
        raise validate.InvalidInput(
          f'Expected integers {", ".join(wanted)} in record {i} of {name}: '
          f'{one_line(error)}'
        ) from error
  return values
