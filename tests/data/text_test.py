"""Text: vocabularies, windows, and the same clients from every kind of file."""

import gzip
import json
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import make_dataset, text
from fedjax_ext.data.sqlite import write_sqlite

BOS, EOS, PAD = text.BOS, text.EOS, text.PAD
ROLES = {
  'play/B': ['Aye.', 'No, no!'],
  'play/A': ['To be, or not to be', ''],
  'other/C': ['x' * 23],
}


def objects(texts):
  """Texts as FedJAX stores them: an array of bytes objects."""
  return np.array([t.encode() for t in texts], object)


class VocabularyTest(parameterized.TestCase):
  def test_characters(self):
    vocabulary = text.character_vocabulary()
    self.assertLen(text.CHARACTERS, 86)
    self.assertEqual(vocabulary.size, 90)
    tokens = vocabulary.encode(text.CHARACTERS)
    self.assertEqual(tokens.tolist(), [*range(3, 89)])
    self.assertEqual(tokens.dtype, np.uint8)
    unknown = vocabulary.encode('é+'.encode())
    self.assertEqual(unknown.tolist(), [89, 89, 89])

  def test_words(self):
    vocabulary = text.word_vocabulary(['the', 'a'])
    self.assertEqual(vocabulary.size, 6)
    self.assertEqual(vocabulary.encode(b'a the b').tolist(), [4, 3, 5])
    self.assertEqual(vocabulary.encode(b'a  the').tolist(), [4, 5, 3])
    self.assertEqual(vocabulary.encode(b'').tolist(), [5])
    with self.assertRaisesRegex(InvalidInput, 'each word'):
      text.word_vocabulary(['a', 'a'])
    with self.assertRaisesRegex(InvalidInput, '40000'):
      text.word_vocabulary([str(i) for i in range(40000)])


class WindowsTest(parameterized.TestCase):
  def test_the_example_of_fedjax(self):
    """[b'ABCD', b'E'] in threes, from the docstring of FedJAX's Shakespeare."""
    a, b, c, d, e = range(10, 15)
    got = text.windows([np.array([a, b, c, d]), np.array([e])], 3)
    inputs, outputs = got[:, :-1], got[:, 1:]
    self.assertEqual(
      outputs.tolist(), [[a, b, c], [d, EOS, BOS], [e, EOS, PAD]]
    )
    real = outputs != PAD
    expected = np.array([[BOS, a, b], [c, d, EOS], [BOS, e, PAD]])
    np.testing.assert_array_equal(inputs[real], expected[real])

  @parameterized.product(length=[1, 2, 7, 80], sizes=[(0,), (3, 0, 5), (160,)])
  def test_every_token_is_a_target_once(self, length, sizes):
    rng = np.random.default_rng(0)
    parts = [rng.integers(3, 90, n).astype(np.uint8) for n in sizes]
    got = text.windows(parts, length)
    stream = np.concatenate([np.r_[BOS, p, EOS] for p in parts])
    targets = got[:, 1:].reshape(-1)
    np.testing.assert_array_equal(targets[: len(stream) - 1], stream[1:])
    np.testing.assert_array_equal(targets[len(stream) - 1 :], PAD)
    self.assertEqual(len(got), -(-(len(stream) - 1) // length))
    np.testing.assert_array_equal(got[1:, 0], got[:-1, -1])
    self.assertEqual(got.dtype, np.uint8)

  def test_no_text(self):
    self.assertEqual(text.windows([], 5).shape, (0, 6))

  @parameterized.parameters(
    (2, [BOS, 7, 8, EOS, PAD, PAD]),
    (4, [BOS, 7, 8, 9, 10, EOS]),
    (5, [BOS, 7, 8, 9, 10, 11]),
    (9, [BOS, 7, 8, 9, 10, 11]),
    (0, [BOS, EOS, PAD, PAD, PAD, PAD]),
  )
  def test_sentence(self, size, expected):
    """As FedJAX's tokenizer: x and y are cut to T tokens each."""
    tokens = np.arange(7, 7 + size, dtype=np.int16)
    self.assertEqual(text.sentence(tokens, 5).tolist(), expected)


class SourceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def jsonl(self, name='roles.jsonl', records=None):
    records = records or [
      {'client': c, 'speeches': s} for c, s in ROLES.items()
    ]
    lines = ''.join(json.dumps(r) + '\n' for r in records)
    path = self.folder / name
    if name.endswith('.gz'):
      path.write_bytes(gzip.compress(lines.encode()))
    else:
      path.write_text(lines)
    return text.text_jsonl(
      data_dir=str(self.folder), file=name, sequence_length=8
    )

  @parameterized.parameters('roles.jsonl', 'roles.jsonl.gz')
  def test_roles(self, name):
    columns = self.jsonl(name)
    self.assertEqual((columns.name, columns.num_classes), ('roles', 90))
    dataset = make_dataset(columns, test_fraction=0.0)
    train = dataset.splits['train']
    self.assertEqual(train.client_ids.tolist(), sorted(ROLES))
    vocabulary = text.character_vocabulary()
    for i, client in enumerate(train.client_ids):
      parts = [vocabulary.encode(t.encode()) for t in ROLES[client]]
      np.testing.assert_array_equal(
        train.client(i)['tokens'], text.windows(parts, 8)
      )
    self.assertEqual(columns.features['tokens'].dtype, np.uint8)

  def test_sqlite_gives_the_same_clients(self):
    """Whatever the order in the file, and with texts for testing beside it."""
    path = self.folder / 'train.sqlite'
    write_sqlite(
      path, [(c, {'snippets': objects(s)}) for c, s in ROLES.items()]
    )
    more = {'play/A': ['and more'], 'zz': ['new']}
    write_sqlite(
      self.folder / 'test.sqlite',
      [(c, {'snippets': objects(s)}) for c, s in more.items()],
    )
    settings = dict(data_dir=str(self.folder), sequence_length=8)
    alone = make_dataset(
      text.text_sqlite(file='train.sqlite', **settings), test_fraction=0.0
    )
    expected = make_dataset(self.jsonl(), test_fraction=0.0)
    a, b = alone.splits['train'], expected.splits['train']
    self.assertEqual(a.client_ids.tolist(), b.client_ids.tolist())
    for c in range(3):
      np.testing.assert_array_equal(
        a.client(c)['tokens'], b.client(c)['tokens']
      )
    both = make_dataset(
      text.text_sqlite(file='train.sqlite', test_file='test.sqlite', **settings)
    )
    test = both.splits['test']
    self.assertEqual(test.client_ids.tolist(), [*sorted(ROLES), 'zz'])
    self.assertEqual(test.sizes().tolist(), [0, 2, 0, 1])
    self.assertEqual(both.participating.tolist(), [0, 1, 2])
    with self.assertRaisesRegex(InvalidInput, "'nope'.*snippets"):
      text.text_sqlite(file='train.sqlite', text='nope', **settings)

  def test_bad_files(self):
    with self.assertRaisesRegex(InvalidInput, 'missing.jsonl, found none'):
      text.text_jsonl(data_dir=str(self.folder), file='missing.jsonl')
    with self.assertRaisesRegex(InvalidInput, 'line 2.*speeches'):
      self.jsonl(records=[{'client': 'a', 'speeches': ['x']}, {'client': 'b'}])
    with self.assertRaisesRegex(InvalidInput, "client 'a' once"):
      self.jsonl(records=[{'client': 'a', 'speeches': ['x']}] * 2)
    with self.assertRaisesRegex(InvalidInput, "line 1.*'speeches' is a str"):
      self.jsonl(records=[{'client': 'a', 'speeches': 'hello'}])
    with self.assertRaisesRegex(InvalidInput, 'texts in roles, got none'):
      self.jsonl(records=[{'client': 'a', 'speeches': []}])
    with self.assertRaisesRegex(InvalidInput, 'fedjax_ext.data.download shak'):
      text.shakespeare(data_dir=str(self.folder))
    (self.folder / 'junk.jsonl').write_text('{not json\n')
    with self.assertRaisesRegex(InvalidInput, 'junk.jsonl'):
      text.text_jsonl(data_dir=str(self.folder), file='junk.jsonl')

  def test_stackoverflow_is_read_lazily(self):
    words = self.folder / 'stackoverflow.word_count'
    words.write_text('the 9\na 7\nof 3\n')
    for split, users in (
      ('train', {'u1': ['the a', 'b of the the'], 'u0': ['a']}),
      ('held_out', {'h': ['of']}),
      ('test', {'t': ['the of a', '']}),
    ):
      write_sqlite(
        self.folder / f'stackoverflow_{split}.sqlite',
        [
          (u, {'tokens': objects(s), 'score': np.arange(len(s))})
          for u, s in users.items()
        ],
      )
    columns = text.stackoverflow(
      data_dir=str(self.folder), vocab_size=3, sequence_length=4
    )
    self.assertEqual(columns.num_classes, 7)
    dataset = make_dataset(columns)
    train = dataset.splits['train']
    self.assertEqual(train.client_ids.tolist(), ['h', 't', 'u0', 'u1'])
    self.assertEqual(
      train.client(3)['tokens'].tolist(),
      [[BOS, 3, 4, EOS, PAD], [BOS, 6, 5, 3, 3]],
    )
    self.assertEqual(dataset.participating.tolist(), [2, 3])
    self.assertEqual(dataset.parts['validation'].clients.tolist(), [0])
    self.assertEqual(dataset.parts['test'].clients.tolist(), [1])
    self.assertEqual(
      dataset.splits['test'].client(1)['tokens'].tolist(),
      [[BOS, 3, 5, 4, EOS], [BOS, 6, EOS, PAD, PAD]],
    )
    with self.assertRaisesRegex(InvalidInput, '4 words in .*got 3'):
      text.stackoverflow(data_dir=str(self.folder), vocab_size=4)


if __name__ == '__main__':
  absltest.main()
