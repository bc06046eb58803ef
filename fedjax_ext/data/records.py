"""Examples in ArrayRecord files: our own simple records, and prepared TFDS.

ArrayRecord (https://github.com/google/array_record) gives records by number.
Ours are MessagePack maps in FedJAX's encoding (see `serialization`): one
example each, {feature: array or number}, with `client`, if there are natural
clients, as text, bytes or an integer. A folder has files
SPLIT*.array_record, where SPLIT is train, validation or test.

Opening for the first time passes over all records, but decodes clients and
labels only. What it finds (4 bytes a row, and 8 more where a client's records
are not next to each other) is kept in a file beside the records, so that later
opens read that; where the folder is read-only every open is like the first.

Axis letters: C clients, M rows, N rows asked for.
"""

import array
import logging
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.data.columns import Columns, StoredClients
from fedjax_ext.data.index_cache import cached_index, file_key
from fedjax_ext.data.lazy import (
  Reader,
  Records,
  RecordType,
  check_records,
  lazy_columns,
)
from fedjax_ext.data.serialization import pack_arrays, unpack_arrays

_LOG = logging.getLogger(__name__)
_SPLITS = ('train', 'validation', 'test')
_CHUNK = 1024  # records read at once
_CLIENT = 'client'

# A record's (client or None, label or None).
Keys = tuple[Any, Any]


def _array_record() -> Any:
  try:
    from array_record.python import array_record_module
  except ImportError as error:
    raise validate.InvalidInput(
      'Expected array-record; pip install fedjax_ext[tfds].'
    ) from error
  return array_record_module


def write_array_record(
  folder: str | pathlib.Path,
  examples: Iterable[Mapping[str, Any]],
  *,
  split: str = 'train',
) -> pathlib.Path:
  """Writes one split; examples of one client next to each other read fastest.

  Args:
    folder: made if absent.
    examples: {feature: array or number}, all with the same features, and
      `client` (text, bytes or an integer) in all or none.
    split: 'train', 'validation' or 'test'.

  Returns:
    The file, FOLDER/SPLIT.array_record; it appears when all is written.

  Raises:
    InvalidInput: the file exists, or array-record is not installed.
  """
  validate.one_of('split', split, _SPLITS)
  path = pathlib.Path(folder, f'{split}.array_record')
  validate.check(not path.exists(), f'Expected no file at {path} yet.')
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'{path.name}.partial')
  writer = _array_record().ArrayRecordWriter(str(partial), 'group_size:1')
  try:
    for example in examples:
      writer.write(pack_arrays(example))
    writer.close()
    os.replace(partial, path)
  finally:
    if writer.is_open():
      writer.close()
    partial.unlink(missing_ok=True)
  return path


class _Files:
  """The records of some files, one file after another.

  Attributes:
    paths: of the files.
    bounds: int64 [files + 1]; file i has records bounds[i]:bounds[i+1].
  """

  def __init__(self, paths: Sequence[pathlib.Path]):
    module = _array_record()
    self.paths, self._readers = list(paths), []
    counts = []
    for path in self.paths:
      try:
        reader = module.ArrayRecordReader(str(path))
        counts.append(reader.num_records() if reader.ok() else None)
      except (RuntimeError, ValueError):
        counts.append(None)
      validate.check(
        counts[-1] is not None, f'Expected an intact ArrayRecord file {path}.'
      )
      self._readers.append(reader)
    self.bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

  def read(self, numbers: np.ndarray) -> list[bytes]:
    """The records of the numbers int64 [N]."""
    found: list[bytes] = [b''] * len(numbers)
    owner = np.searchsorted(self.bounds, numbers, side='right') - 1
    for i in np.unique(owner):
      where = np.flatnonzero(owner == i)
      try:
        data = self._readers[i].read((numbers[where] - self.bounds[i]).tolist())
      except (RuntimeError, ValueError) as error:
        raise validate.InvalidInput(
          f'Expected an intact ArrayRecord file {self.paths[i]}: {error}'
        ) from error
      for position, record in zip(where.tolist(), data, strict=True):
        found[position] = record
    return found

  def where(self, number: int) -> str:
    """A record's place, for messages."""
    i = int(np.searchsorted(self.bounds, number, side='right') - 1)
    return f'record {number - self.bounds[i]} of {self.paths[i]}'


def load_array_record(
  *,
  data_dir: str,
  num_classes: int = 0,
  label: str = 'label',
  image: str = 'image',
) -> Columns:
  """Opens a folder of ArrayRecord files, in the format of this module.

  Args:
    data_dir: the folder; train*.array_record, validation*, test*.
    num_classes: Y; 0 takes the largest label + 1.
    label: integer feature to be called 'label'.
    image: feature to be called 'image', where the records have it.

  Returns:
    Lazy columns; the labels are in memory. Clients are `StoredClients` where
    records have them.

  Raises:
    InvalidInput: there is no such file, one is broken, or records differ in
      their features.
  """
  folder = pathlib.Path(data_dir)
  by_split = {s: sorted(folder.glob(f'{s}*.array_record')) for s in _SPLITS}
  validate.check(
    by_split['train'],
    f'Expected files train*.array_record in {folder}, got '
    f'{sorted(p.name for p in folder.glob("*"))[:5]}.',
  )
  paths = [path for found in by_split.values() for path in found]
  files = _Files(paths)
  ends = np.cumsum([0] + [len(found) for found in by_split.values()])
  ranges = {
    split: (files.bounds[ends[i]], files.bounds[ends[i + 1]])
    for i, split in enumerate(by_split)
    if ends[i] < ends[i + 1]
  }

  def keys(data: bytes) -> Keys:
    found = unpack_arrays(data, only=(_CLIENT, label))
    return found.get(_CLIENT), found.get(label)

  index = cached_index(
    folder / 'records.index.npz',
    file_key(paths, label),
    lambda: _index(
      {s: _pass(files, first, end, keys) for s, (first, end) in ranges.items()},
      str(folder),
    ),
  )

  def decode(data: bytes) -> dict[str, Any]:
    record = unpack_arrays(data)
    record = {n: x for n, x in record.items() if n not in (_CLIENT, label)}
    if image in record:
      record['image'] = record.pop(image)
    return {n: np.asarray(x) for n, x in record.items()}

  types = _types(decode(files.read(np.zeros(1, np.int64))[0]))
  reader = _record_reader(files, decode, types, index)
  return _columns(folder.name, reader, index, num_classes)


def _pass(
  files: _Files, first: int, end: int, keys: Callable[[bytes], Keys]
) -> Iterator[Keys]:
  """Yields the keys of the records first..end-1."""
  for start in range(first, end, _CHUNK):
    numbers = np.arange(start, min(start + _CHUNK, end))
    for number, data in zip(numbers.tolist(), files.read(numbers), strict=True):
      try:
        yield keys(data)
      except validate.InvalidInput as error:
        raise validate.InvalidInput(
          f'{files.where(number)}: {error}'
        ) from error


def _index(
  passes: Mapping[str, Iterable[Keys]], source: str
) -> dict[str, np.ndarray]:
  """Sorts records by split and client.

  Returns:
    {'label': int32 [M], 'order': record of every row int64 [M], empty where
    they are in order; 'client_ids' [C], and '<split>_first', '<split>_count'
    int64 [C] with clients, or '<split>_count' [] without}.
  """
  _LOG.info('Reading the clients and labels of %s.', source)
  numbers: dict[str, int] = {}
  owners, labels, counts = array.array('q'), array.array('q'), {}
  rows = 0
  for split, records in passes.items():
    before = rows
    for client, label in records:
      rows += 1
      if client is not None:
        text = client.decode() if isinstance(client, bytes) else str(client)
        owners.append(numbers.setdefault(text, len(numbers)))
      if label is not None:
        labels.append(_integer(label, source, rows - 1))
    counts[split] = rows - before
  for name, found in (('a client', owners), ('an integer label', labels)):
    optional = name == 'a client' and not found
    validate.check(
      rows and (optional or len(found) == rows),
      f'Expected {name} in every record of {source}, got {len(found)} in '
      f'{rows} records.',
    )
  label = np.array(labels, np.int32)
  if not numbers:
    order = np.zeros(0, np.int64)
    return {'label': label, 'order': order} | {
      f'{s}_count': np.array(n) for s, n in counts.items()
    }
  client_ids, rank = np.unique(np.array(list(numbers)), return_inverse=True)
  owner = rank.reshape(-1)[np.frombuffer(owners, np.int64)]
  split = np.repeat(np.arange(len(counts)), list(counts.values()))
  order = np.lexsort((owner, split))
  result = {'label': label[order], 'client_ids': client_ids}
  in_order = (order == np.arange(rows)).all()
  result['order'] = np.zeros(0, np.int64) if in_order else order
  start = 0
  for i, (name, size) in enumerate(counts.items()):
    count = np.bincount(owner[split == i], minlength=len(client_ids))
    result[f'{name}_first'] = start + np.cumsum(count) - count
    result[f'{name}_count'] = count
    start += size
  return result


def _integer(label: Any, source: str, row: int) -> int:
  value = np.asarray(label)
  validate.check(
    value.shape == () and value.dtype.kind in 'iu',
    f'Expected an integer label in record {row} of {source}, got '
    f'{value.dtype}{list(value.shape)}.',
  )
  return int(value)


def _types(record: Mapping[str, np.ndarray]) -> dict[str, RecordType]:
  return {
    n: RecordType(x.shape, x.dtype)
    for n, x in record.items()
    if x.dtype.kind not in 'OSU'
  }


def _record_reader(
  files: Any,
  decode: Callable[[bytes], Mapping[str, np.ndarray]],
  types: Mapping[str, RecordType],
  index: Mapping[str, np.ndarray],
) -> Reader:
  """Reads rows of an index from `files` (see `_Files`), in file order."""
  order = index['order']

  def read(rows: np.ndarray) -> Records:
    numbers, inverse = np.unique(
      order[rows] if len(order) else rows, return_inverse=True
    )
    result = {
      n: np.empty((len(numbers), *t.shape), t.dtype) for n, t in types.items()
    }
    for i, data in enumerate(files.read(numbers)):
      where = files.where(int(numbers[i]))
      try:
        record = decode(data)
      except validate.InvalidInput as error:
        raise validate.InvalidInput(f'{where}: {error}') from error
      for name, t in types.items():
        got = np.shape(record[name]) if name in record else None
        validate.check(
          got == t.shape,
          f'Expected feature {name!r} of {where} with shape {list(t.shape)}, '
          f'got {"none" if got is None else list(got)}.',
        )
        result[name][i] = record[name]
    check_records(result, where=f'{files.where(int(numbers[0]))} and others')
    return {n: x[inverse] for n, x in result.items()}

  return Reader(read, types, len(index['label']))


def _columns(
  name: str, reader: Reader, index: Mapping[str, np.ndarray], num_classes: int
) -> Columns:
  label = index['label']
  check_records(
    {'label': label}, where=f'records of {name}', num_classes=num_classes
  )
  num_classes = num_classes or int(label.max()) + 1
  features = {**lazy_columns(reader), 'label': label}
  splits = [s for s in _SPLITS if f'{s}_count' in index]
  if 'client_ids' in index:
    segments = {s: (index[f'{s}_first'], index[f'{s}_count']) for s in splits}
    clients = StoredClients(index['client_ids'], segments)
    return Columns(name, features, num_classes, clients)
  validate.check(
    'validation' not in splits,
    f'Expected a client in every record of {name}, which has a validation '
    'split, got none.',
  )
  is_test = np.repeat(
    np.array([s == 'test' for s in splits], np.int8),
    [int(index[f'{s}_count']) for s in splits],
  )
  split = is_test if is_test.any() else None
  return Columns(name, features, num_classes, None, split)


class _Sources:
  """Raw records of TFDS data sources, one after another; like `_Files`."""

  def __init__(self, sources: Mapping[str, Any]):
    self._names, self._sources = list(sources), list(sources.values())
    sizes = [len(s) for s in self._sources]
    self.bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

  def read(self, numbers: np.ndarray) -> list[bytes]:
    """The records of the numbers int64 [N], ascending."""
    found = []
    owner = np.searchsorted(self.bounds, numbers, side='right') - 1
    for i in np.unique(owner):
      mine = (numbers[owner == i] - self.bounds[i]).tolist()
      found += self._sources[i].__getitems__(mine)
    return found

  def where(self, number: int) -> str:
    """A record's place, for messages."""
    i = int(np.searchsorted(self.bounds, number, side='right') - 1)
    return f'record {number - self.bounds[i]} of {self._names[i]}'


def load_tfds(
  *,
  data_dir: str = '',
  name: str,
  split: str = 'train',
  test_split: str = 'test',
  client_feature: str = '',
  image: str = 'image',
  label: str = 'label',
) -> Columns:
  """Opens a data set of TensorFlow Datasets as random-access records.

  TensorFlow is not needed to read; a data set that is not prepared yet is
  downloaded and prepared, which needs TensorFlow for some. See
  https://www.tensorflow.org/datasets/data_source. A nested feature is called
  'a/b'. Features without a fixed shape, or that are not numbers, are left out.

  Args:
    data_dir: folder of prepared data sets, '' for ~/tensorflow_datasets.
    name: of the data set, with its config, e.g. 'mnist' or 'emnist/letters'.
    split: train split, e.g. 'train' or 'train[:80%]'.
    test_split: test split, '' for none.
    client_feature: feature that names a row's natural client, '' for none.
    image: feature to be called 'image', where there is one.
    label: integer feature to be called 'label'.

  Returns:
    Lazy columns; the labels are in memory. Clients are `StoredClients` if there
    is a client feature.

  Raises:
    InvalidInput: a library, data set, split or feature is missing.
  """
  splits = {'train': split} | ({'test': test_split} if test_split else {})
  sources = {}
  for ours, theirs in splits.items():
    tfds, sources[ours] = open_tfds(name, theirs, data_dir)
  info = sources['train'].dataset_info
  features = _leaves(tfds, info.features)
  for what, feature in (('label', label), ('client_feature', client_feature)):
    validate.check(
      feature in features or (what == 'client_feature' and not feature),
      f'Expected {what} to be a feature of {name}, {", ".join(features)}; got '
      f'{what}={feature}.',
    )
  files = _Sources({f'{splits[s]} of {name}': x for s, x in sources.items()})
  keys_only = {n: features[n] for n in (client_feature, label) if n}
  wanted = _decoder(tfds, keys_only)

  def keys(data: bytes) -> Keys:
    record = wanted(data)
    return record.get(client_feature), record[label]

  what = (info.full_name, splits, files.bounds.tolist(), client_feature, label)
  folder = pathlib.Path(info.data_dir)
  shards = sorted(folder.glob('*.array_record*'))
  name_of_index = f'fedjax_ext.{zlib.crc32(repr(what).encode()):08x}.index.npz'
  index = cached_index(
    folder / name_of_index,
    file_key(shards, *what),
    lambda: _index(
      {
        s: _pass(files, files.bounds[i], files.bounds[i + 1], keys)
        for i, s in enumerate(splits)
      },
      name,
    ),
  )
  types = _feature_types(features, leave_out=(client_feature, label))
  decode = _decoder(tfds, {n: features[n] for n in types})
  rename = {image: 'image'}
  reader = _record_reader(
    files,
    lambda data: {rename.get(n, n): x for n, x in decode(data).items()},
    {rename.get(n, n): t for n, t in types.items()},
    index,
  )
  classes = features[label]
  known = isinstance(classes, tfds.features.ClassLabel)
  return _columns(
    name, reader, index, int(classes.num_classes or 0) if known else 0
  )


def one_line(error: Exception) -> str:
  """The first line of an error's text, or its type."""
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__


def open_tfds(name: str, split: str, data_dir: str) -> tuple[Any, Any]:
  """(the library, one split of a TFDS data set as raw records).

  Args:
    name: of the data set, with its config.
    split: as TFDS writes it.
    data_dir: folder of prepared data sets, '' for ~/tensorflow_datasets.

  Raises:
    InvalidInput: the library, data set or split is missing.
  """
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise validate.InvalidInput(
      'Expected tensorflow-datasets; pip install fedjax_ext[tfds].'
    ) from error
  try:
    return tfds, tfds.data_source(
      name,
      split=split,
      data_dir=data_dir or None,
      deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
    )
  except Exception as error:
    raise validate.InvalidInput(
      f'Expected to open split {split} of TFDS data set {name} in '
      f'{data_dir or "~/tensorflow_datasets"}: {one_line(error)}'
    ) from error


def _leaves(tfds: Any, features: Any, prefix: str = '') -> dict[str, Any]:
  """Features by name, nested ones as 'a/b'."""
  result = {}
  for name, feature in features.items():
    if isinstance(feature, tfds.features.FeaturesDict):
      result |= _leaves(tfds, feature, f'{prefix}{name}/')
    else:
      result[prefix + name] = feature
  return result


def _feature_types(
  features: Mapping[str, Any], *, leave_out: Sequence[str]
) -> dict[str, RecordType]:
  types, left_out = {}, []
  for name, feature in features.items():
    if name in leave_out:
      continue
    shape, dtype = feature.shape, feature.np_dtype
    fixed = isinstance(shape, tuple) and None not in shape
    if fixed and np.dtype(dtype).kind not in 'OSU':
      types[name] = RecordType(shape, np.dtype(dtype))
    else:
      left_out.append(name)
  if left_out:
    _LOG.info('Left out, not numbers of one shape: %s.', left_out)
  return types


def _decoder(
  tfds: Any, features: Mapping[str, Any]
) -> Callable[[bytes], dict[str, np.ndarray]]:
  """Decodes these features of a raw record; the others cost nothing.

  `tfds.decode.PartialDecoding` would do the same but imports TensorFlow.
  """
  nested: dict[str, Any] = {}
  for name, feature in features.items():
    *outer, last = name.split('/')
    inner = nested
    for part in outer:
      inner = inner.setdefault(part, {})
    inner[last] = feature
  chosen = tfds.features.FeaturesDict(nested)

  def decode(data: bytes) -> dict[str, np.ndarray]:
    try:
      example = chosen.deserialize_example_np(data)
    except Exception as error:
      raise validate.InvalidInput(
        f'Expected an intact example: {one_line(error)}'
      ) from error
    result = {}
    for name in features:
      value = example
      for part in name.split('/'):
        value = value[part]
      result[name] = value
    return result

  return decode
