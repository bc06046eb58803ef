"""Text by client: vocabularies, windows, and sources of characters and words.

A client's texts become rows of tokens [T+1]: a model reads the first T and
predicts the last T. Characters fit into uint8, words into int16, so that data
stay compact on the device.

Special tokens: PAD 0, BOS 1, EOS 2; unknown ones are the last of the
vocabulary.

Axis letters: C clients, M rows, T time steps, V vocabulary.
"""

import gzip
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.data.columns import Columns, store_clients
from fedjax_ext.data.lazy import Records, RecordType, lazy_columns, map_records
from fedjax_ext.data.published import dataset_paths
from fedjax_ext.data.sqlite import open_sqlite, read_clients

PAD, BOS, EOS = 0, 1, 2
NUM_SPECIAL = 3

# The 86 characters of TensorFlow Federated's Shakespeare, in byte order.
CHARACTERS = bytes(
  sorted(
    b'\n\r !"#$%&\'()*,-./0123456789:;?@[]_'
    b'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz'
  )
)


class Vocabulary(NamedTuple):
  """Tokens of texts.

  Attributes:
    encode: text -> tokens int [n] between 3 and V-1.
    size: V, with the special tokens and one for all unknown ones.
  """

  encode: Callable[[bytes], np.ndarray]
  size: int


def character_vocabulary(characters: bytes = CHARACTERS) -> Vocabulary:
  """A token for each byte in `characters`; V = their number + 4.

  The 86 default characters give V = 90: McMahan et al.,
  "Communication-efficient learning of deep networks from decentralized data",
  2017, https://arxiv.org/abs/1602.05629.
  """
  size = len(characters) + NUM_SPECIAL + 1
  table = np.full(256, size - 1, np.uint8 if size <= 256 else np.int16)
  table[list(characters)] = np.arange(NUM_SPECIAL, size - 1)
  return Vocabulary(lambda text: table[np.frombuffer(text, np.uint8)], size)


def word_vocabulary(words: Sequence[str]) -> Vocabulary:
  """A token for each word between single blanks; V = their number + 4.

  As in FedJAX, two blanks have an empty, unknown word between them.
  """
  size = len(words) + NUM_SPECIAL + 1
  validate.at_least('number of words', len(words), 1)
  validate.check(
    size <= np.iinfo(np.int16).max,
    f'Expected at most {np.iinfo(np.int16).max - 4} words, got {len(words)}.',
  )
  number = {w.encode(): i + NUM_SPECIAL for i, w in enumerate(words)}
  validate.check(
    len(number) == len(words), 'Expected each word of the vocabulary once.'
  )

  def encode(text: bytes) -> np.ndarray:
    return np.array(
      [number.get(word, size - 1) for word in text.split(b' ')], np.int16
    )

  return Vocabulary(encode, size)


def windows(sequences: Sequence[np.ndarray], length: int) -> np.ndarray:
  """Joins sequences into one stream and cuts it into windows.

  Each sequence gets BOS before and EOS after it. Row m holds tokens m*T to
  m*T+T of the stream, so that every token but the first is a target exactly
  once; the last row is padded. FedJAX cuts its Shakespeare data likewise.

  Args:
    sequences: tokens int [n] each.
    length: T.

  Returns:
    Tokens [M, T+1], M = ceil((n_1 + n_2 + ... + 2 * sequences - 1) / T).
  """
  if not len(sequences):
    return np.zeros((0, length + 1), np.uint8)
  dtype = sequences[0].dtype
  ends = np.array([[BOS], [EOS]], dtype)
  stream = np.concatenate([p for s in sequences for p in (ends[0], s, ends[1])])
  count = -(-(len(stream) - 1) // length)
  padded = np.full(count * length + 1, PAD, dtype)
  padded[: len(stream)] = stream
  where = np.arange(count)[:, None] * length + np.arange(length + 1)
  return padded[where]


def sentence(tokens: np.ndarray, length: int) -> np.ndarray:
  """BOS, tokens int [n], EOS, cut or padded to one row [T+1]; T = length."""
  row = np.full(length + 1, PAD, tokens.dtype)
  row[0] = BOS
  kept = tokens[:length]
  row[1 : len(kept) + 1] = kept
  if len(kept) < length:
    row[len(kept) + 1] = EOS
  return row


Clients = Iterable[tuple[str, Sequence[bytes]]]


def text_columns(
  name: str,
  splits: Mapping[str, Clients],
  *,
  vocabulary: Vocabulary,
  sequence_length: int,
  by_text: bool = False,
) -> Columns:
  """Windows over each client's texts, all in memory.

  Args:
    name: of the data set.
    splits: {'train' or 'test': (client, its texts) ...}; a client may be in
      several.
    vocabulary: of the texts.
    sequence_length: T.
    by_text: no window reaches over the end of a text.

  Returns:
    Columns with `tokens` [M, T+1] and stored clients; by text also with `text`
    int32 [M], the number of the text that a window is of.
  """
  validate.at_least('sequence_length', sequence_length, 1)
  rows: list[np.ndarray] = []
  text_sizes: list[int] = []
  sizes: dict[str, dict[str, int]] = {}
  for split, clients in splits.items():
    sizes[split] = {}
    for client, texts in clients:
      validate.check(
        client not in sizes[split],
        f'Expected client {client!r} once in {split} of {name}.',
      )
      encoded = [vocabulary.encode(text) for text in texts]
      units = [[e] for e in encoded] if by_text else [encoded]
      cut = [windows(unit, sequence_length) for unit in units]
      rows += cut
      text_sizes += map(len, cut)
      sizes[split][client] = sum(map(len, cut))
  validate.check(bool(rows), f'Expected clients in {name}, got none.')
  clients = store_clients(
    {
      split: (np.array(list(mine)), np.array(list(mine.values()), np.int64))
      for split, mine in sizes.items()
    }
  )
  tokens = np.concatenate(rows)
  validate.check(len(tokens) > 0, f'Expected texts in {name}, got none.')
  features = {'tokens': tokens}
  if by_text:
    features['text'] = np.repeat(
      np.arange(len(text_sizes), dtype=np.int32), text_sizes
    )
  return Columns(name, features, vocabulary.size, client=clients)


def text_jsonl(
  *,
  data_dir: str,
  file: str,
  client: str = 'client',
  text: str = 'speeches',
  sequence_length: int = 80,
) -> Columns:
  """Characters of FILE.jsonl or FILE.jsonl.gz: one JSON object a client.

  Args:
    data_dir: folder of the file.
    file: its name.
    client: field with the client's name.
    text: field with a list of its texts, or with texts by name.
    sequence_length: T.
  """
  path = pathlib.Path(data_dir) / file
  validate.check(path.exists(), f'Expected a data file at {path}, found none.')
  return text_columns(
    path.name.split('.')[0],
    {'train': read_jsonl(path, client, text)},
    vocabulary=character_vocabulary(),
    sequence_length=sequence_length,
  )


def read_jsonl(
  path: pathlib.Path, client: str, text: str
) -> Iterator[tuple[str, list[bytes]]]:
  """The clients of a FILE.jsonl or FILE.jsonl.gz with an object on each line.

  Args:
    path: the file.
    client: the field with a client's name.
    text: the field with a list of its texts, or with texts by name.

  Yields:
    (name, texts).

  Raises:
    InvalidInput: a line is broken; the message says which.
  """
  opener = gzip.open if path.suffix == '.gz' else open
  number = 0
  try:
    with opener(path, 'rt', encoding='utf8') as lines:
      for line in lines:
        number += 1
        record = json.loads(line)
        texts = record[text]
        if isinstance(texts, dict):
          texts = list(texts.values())
        if not isinstance(texts, list):
          raise TypeError(f'{text!r} is a {type(texts).__name__}')
        yield str(record[client]), [t.encode() for t in texts]
  except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
    raise validate.InvalidInput(
      f'Expected JSON objects with {client!r} and texts {text!r} in {path}, '
      f'line {number}: {type(error).__name__}: {error}.'
    ) from error


def text_sqlite(
  *,
  data_dir: str,
  file: str,
  test_file: str = '',
  text: str = 'snippets',
  sequence_length: int = 80,
) -> Columns:
  """Characters of SQLite files in FedJAX's or TFF's format.

  Args:
    data_dir: folder of the files.
    file: with the train texts of each client.
    test_file: with their test texts, if any.
    text: the feature with the texts.
    sequence_length: T.
  """
  folder = pathlib.Path(data_dir)
  files = {'train': file} | ({'test': test_file} if test_file else {})
  return text_columns(
    pathlib.Path(file).stem,
    {
      split: _read_sqlite(folder / name, split, text)
      for split, name in files.items()
    },
    vocabulary=character_vocabulary(),
    sequence_length=sequence_length,
  )


def _read_sqlite(
  path: pathlib.Path, split: str, text: str
) -> Iterator[tuple[str, list[bytes]]]:
  for client, records in read_clients(path, split):
    validate.check(
      text in records and records[text].dtype.kind in 'OS',
      f'Expected a feature {text!r} of bytes of client {client} in {path}, got '
      f'{sorted(records)}.',
    )
    yield client, list(records[text])


def shakespeare(*, data_dir: str, sequence_length: int = 80) -> Columns:
  """FedJAX's Shakespeare files: characters of 715 roles.

  `python -m fedjax_ext.data.download shakespeare --data_dir=DIR` gets them.

  Args:
    data_dir: folder of shakespeare_train.sqlite and shakespeare_test.sqlite.
    sequence_length: T.
  """
  dataset_paths('shakespeare', data_dir)
  return text_sqlite(
    data_dir=data_dir,
    file='shakespeare_train.sqlite',
    test_file='shakespeare_test.sqlite',
    sequence_length=sequence_length,
  )


def stackoverflow(
  *, data_dir: str, vocab_size: int = 10_000, sequence_length: int = 20
) -> Columns:
  """FedJAX's Stack Overflow files: sentences of 342,477 users, read lazily.

  A sentence is one row: BOS, its words, EOS, cut to T+1 tokens. Clients are
  decoded when they are sampled. `python -m fedjax_ext.data.download
  stackoverflow --data_dir=DIR` gets the files.

  Args:
    data_dir: folder of stackoverflow_{train,held_out,test}.sqlite and of
      stackoverflow.word_count, with a word and its count on each line.
    vocab_size: the most frequent so many words; V is 4 more.
    sequence_length: T.
  """
  validate.at_least('sequence_length', sequence_length, 1)
  folder = pathlib.Path(data_dir)
  dataset_paths('stackoverflow', folder)
  vocabulary = word_vocabulary(
    read_words(folder / 'stackoverflow.word_count', vocab_size)
  )
  files = {
    split: folder / f'stackoverflow_{name}.sqlite'
    for split, name in (
      ('train', 'train'),
      ('validation', 'held_out'),
      ('test', 'test'),
    )
  }
  reader, clients = open_sqlite(files, text=('tokens',))

  def tokenize(records: Records) -> Records:
    rows = [
      sentence(vocabulary.encode(text), sequence_length)
      for text in records['tokens']
    ]
    return {'tokens': np.stack(rows)}

  types = {'tokens': RecordType((sequence_length + 1,), np.dtype(np.int16))}
  return Columns(
    'stackoverflow',
    lazy_columns(map_records(reader, tokenize, types)),
    vocabulary.size,
    client=clients,
  )


def read_words(path: pathlib.Path, count: int) -> list[str]:
  """The first `count` words of a file with a word and a number on each line."""
  validate.at_least('vocab_size', count, 1)
  validate.check(path.exists(), f'Expected a word list at {path}, found none.')
  with path.open(encoding='utf8') as lines:
    words = [line.split()[0] for line in lines if line.strip()][:count]
  validate.check(
    len(words) == count,
    f'Expected {count} words in {path}, got {len(words)}.',
  )
  return words
