"""ArrayRecord files and prepared TFDS data sets, without TensorFlow."""

import io
import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from absl.testing import absltest, parameterized
from PIL import Image

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import columns as columns_lib
from fedjax_ext.data import records


def examples(owners, first=0, key='client'):
  """An example for each client given, with values that name its number."""
  for i, owner in enumerate(owners, first):
    example = {
      'label': i % 5,
      'image': np.full((2, 3), i, np.float32),
      'text': 'left out',
    }
    yield example if owner is None else {**example, key: owner}


def numbers_by_client(columns, split):
  """{client: numbers of its examples}, from `image`."""
  first, count = columns.client.segments[split]
  return {
    name: columns.features['image'][np.arange(f, f + n)][:, 0, 0].tolist()
    for name, f, n in zip(
      columns.client.client_ids.tolist(), first, count, strict=True
    )
  }


class ArrayRecordTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def load(self, **kwargs):
    return records.load_array_record(data_dir=str(self.root), **kwargs)

  def test_clients(self):
    """Sorted by split and client, each with its examples in their order."""
    records.write_array_record(self.root, examples('bcab'))
    records.write_array_record(self.root, examples('db', 10), split='test')
    columns = self.load()
    self.assertEqual(columns.num_classes, 4)
    self.assertCountEqual(columns.features, ['image', 'label'])
    self.assertEqual(
      numbers_by_client(columns, 'train'),
      {'a': [2], 'b': [0, 3], 'c': [1], 'd': []},
    )
    self.assertEqual(
      numbers_by_client(columns, 'test'),
      {'a': [], 'b': [11], 'c': [], 'd': [10]},
    )
    image = columns.features['image']
    self.assertEqual((image.shape, image.dtype), ((6, 2, 3), np.float32))
    rows = np.array([5, 0, 5, 1])
    np.testing.assert_array_equal(image[rows][:, 0, 0], [10, 2, 10, 0])
    np.testing.assert_array_equal(
      columns.features['label'], image[:][:, 0, 0] % 5
    )

  @parameterized.parameters(([b'b', b'a'],), ([2, 1],), ([np.int64(2), 1],))
  def test_kinds_of_names(self, names):
    records.write_array_record(self.root, examples(names))
    expected = sorted(
      n.decode() if isinstance(n, bytes) else str(n) for n in names
    )
    self.assertEqual(self.load().client.client_ids.tolist(), expected)

  def test_no_clients(self):
    """Then rows are as in the files, with a split column if there is a test."""
    records.write_array_record(self.root, examples([None] * 3))
    columns = self.load()
    self.assertIsNone(columns.client)
    self.assertIsNone(columns.split)
    records.write_array_record(self.root, examples([None], 3), split='test')
    columns = self.load(num_classes=9)
    self.assertEqual(columns.split.tolist(), [0, 0, 0, 1])
    self.assertEqual(columns.num_classes, 9)
    np.testing.assert_array_equal(
      columns.features['image'][:][:, 0, 0], np.arange(4)
    )

  def test_several_files(self):
    for i in range(3):
      records.write_array_record(self.root, examples('ab', 2 * i))
      path = self.root / 'train.array_record'
      path.rename(self.root / f'train-{i}.array_record')
    self.assertEqual(
      numbers_by_client(self.load(), 'train'), {'a': [0, 2, 4], 'b': [1, 3, 5]}
    )

  def test_renamed(self):
    written = ({'y': i, 'x': np.ones(2), 'client': 'a'} for i in range(3))
    records.write_array_record(self.root, written)
    columns = self.load(label='y', image='x')
    self.assertCountEqual(columns.features, ['image', 'label'])
    self.assertEqual(columns.features['label'].tolist(), [0, 1, 2])

  def test_index(self):
    """A later open passes over nothing, until a file changes."""
    records.write_array_record(self.root, examples('ba'))
    self.load()
    with mock.patch.object(records, '_pass', wraps=records._pass) as passed:
      self.assertEqual(numbers_by_client(self.load(), 'train')['b'], [0])
      passed.assert_not_called()
      records.write_array_record(self.root, examples('c', 2), split='test')
      self.assertEqual(numbers_by_client(self.load(), 'test')['c'], [2])
      self.assertTrue(passed.called)

  def test_converted(self):
    """Lazy rows can be counted on by what reads columns in general."""
    records.write_array_record(self.root, examples('ba'))
    self.assertRegex(columns_lib.fingerprint(self.load()), '^[0-9a-f]{64}$')

  @parameterized.parameters(
    (
      [{'label': 0, 'client': 'a'}, {'label': 0}],
      'a client in every .*got 1 in 2',
    ),
    ([{'x': np.ones(2)}], 'an integer label in every record .*got 0 in 1'),
    ([{'label': 0.5}], r'integer label in record 0 .*float64'),
    ([{'label': -1}], r'label of records .*got -1'),
    ([], 'got 0 in 0 records'),
  )
  def test_bad_records(self, written, message):
    records.write_array_record(self.root, written)
    with self.assertRaisesRegex(InvalidInput, message):
      self.load()

  def test_other_shape(self):
    """Found when read; the message names record and file."""
    written = [{'label': 0, 'x': np.zeros(n)} for n in (2, 2, 3)]
    records.write_array_record(self.root, written)
    x = self.load().features['x']
    x[:2]
    with self.assertRaisesRegex(
      InvalidInput,
      r"'x' of record 2 of .*train\.array_record .*\[2\], got \[3\]",
    ):
      x[:]

  def test_no_files(self):
    with self.assertRaisesRegex(
      InvalidInput, r'train\*\.array_record in .*\[\]'
    ):
      self.load()

  def test_not_array_record(self):
    (self.root / 'train.array_record').write_bytes(b'hello' * 1000)
    with self.assertRaisesRegex(InvalidInput, r'train\.array_record'):
      self.load()

  def test_other_records(self):
    module = records._array_record()
    writer = module.ArrayRecordWriter(
      str(self.root / 'train.array_record'), 'group_size:1'
    )
    writer.write(b'hello')
    writer.close()
    with self.assertRaisesRegex(InvalidInput, 'record 0 of .*: Expected Mess'):
      self.load()

  def test_written_once_or_not_at_all(self):
    def broken():
      yield {'label': 0}
      raise RuntimeError

    with self.assertRaises(RuntimeError):
      records.write_array_record(self.root, broken())
    self.assertEmpty(list(self.root.iterdir()))
    records.write_array_record(self.root, examples('a'))
    with self.assertRaisesRegex(InvalidInput, 'no file at'):
      records.write_array_record(self.root, examples('a'))

  def test_not_installed(self):
    with (
      mock.patch.dict(sys.modules, {'array_record.python': None}),
      self.assertRaisesRegex(InvalidInput, r'pip install fedjax_ext\[tfds\]'),
    ):
      self.load_any()

  def load_any(self):
    (self.root / 'train.array_record').touch()
    return self.load()


def png(pixels):
  """An encoded image, so that TFDS needs no TensorFlow to write it."""
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'PNG')
  file.seek(0)
  return file


class TinyImages(tfds.core.GeneratorBasedBuilder):
  """Images of three writers, with a nested feature and one of any length."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'photo': tfds.features.Image(shape=(4, 4, 3)),
          'digit': tfds.features.ClassLabel(num_classes=7),
          'words': tfds.features.Tensor(shape=(None,), dtype=np.int64),
          'meta': {'writer': tfds.features.Text(), 'age': np.int64},
        }
      ),
    )

  def _split_generators(self, manager):
    return {'train': self._make(0, 9), 'test': self._make(9, 13)}

  def _generate_examples(self):
    raise NotImplementedError

  def _make(self, first, end):
    for i in range(first, end):
      yield (
        i,
        {
          'photo': png(np.full((4, 4, 3), i, np.uint8)),
          'digit': i % 5,
          'words': np.arange(i),
          'meta': {'writer': f'w{i % 3}', 'age': 10 * i},
        },
      )


class TfdsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = cls.enterClassContext(tempfile.TemporaryDirectory())
    TinyImages(
      data_dir=cls.root, file_format='array_record'
    ).download_and_prepare()

  def load(self, **kwargs):
    return records.load_tfds(
      **{
        'data_dir': self.root,
        'name': 'tiny_images',
        'image': 'photo',
        'label': 'digit',
        **kwargs,
      }
    )

  def images(self, rows):
    """What the images of some examples are, numbers to arrays."""
    return np.broadcast_to(
      np.array(rows, np.uint8)[:, None, None, None], (len(rows), 4, 4, 3)
    )

  def test_split_column(self):
    """Rows of both splits; text and varying shapes are left out."""
    columns = self.load()
    self.assertEqual((columns.name, columns.num_classes), ('tiny_images', 7))
    self.assertCountEqual(columns.features, ['image', 'label', 'meta/age'])
    self.assertIsNone(columns.client)
    self.assertEqual(columns.split.tolist(), [0] * 9 + [1] * 4)
    image = columns.features['image']
    self.assertEqual((image.shape, image.dtype), ((13, 4, 4, 3), np.uint8))
    numbers = image[:][:, 0, 0, 0]
    self.assertCountEqual(numbers[:9], range(9))
    np.testing.assert_array_equal(columns.features['label'], numbers % 5)
    np.testing.assert_array_equal(
      columns.features['meta/age'][:], 10 * numbers.astype(int)
    )

  def test_natural_clients(self):
    columns = self.load(client_feature='meta/writer')
    self.assertEqual(columns.client.client_ids.tolist(), ['w0', 'w1', 'w2'])
    for split, numbers in (('train', range(9)), ('test', range(9, 13))):
      first, count = columns.client.segments[split]
      for c in range(3):
        rows = np.arange(first[c], first[c] + count[c])
        got = columns.features['image'][rows][:, 0, 0, 0]
        self.assertCountEqual(got, [i for i in numbers if i % 3 == c])

  def test_changed_files_are_indexed_again(self):
    """Corrected shards of the same version and number keep no old labels."""
    with tempfile.TemporaryDirectory() as root:
      builder = TinyImages(data_dir=root, file_format='array_record')
      builder.download_and_prepare()
      folder = pathlib.Path(builder.data_dir)
      first = self.load(data_dir=root)
      shards = sorted(folder.glob('*.array_record*'))
      self.assertNotEmpty(shards)
      for shard in shards:
        os.utime(shard, ns=(1, 1))
      with mock.patch.object(records, '_pass', wraps=records._pass) as passed:
        again = self.load(data_dir=root)
        passed.assert_called()
      np.testing.assert_array_equal(
        first.features['label'], again.features['label']
      )

  def test_second_open_passes_over_nothing(self):
    self.load(client_feature='meta/age')
    with mock.patch.object(records, '_pass', wraps=records._pass) as passed:
      self.load(client_feature='meta/age')
      passed.assert_not_called()
      self.load(client_feature='meta/writer', test_split='')
      self.assertTrue(passed.called)

  def test_part_of_a_split(self):
    columns = self.load(split='train[:4]', test_split='')
    self.assertLen(columns.features['label'], 4)
    self.assertIsNone(columns.split)

  @parameterized.parameters(
    ({'name': 'no_such_data'}, 'TFDS data set no_such_data'),
    ({'split': 'nothing'}, 'split nothing of TFDS data set tiny_images'),
    ({'label': 'x'}, r'label to be .*photo.*label=x'),
    ({'client_feature': 'writer'}, r'meta/writer.*client_feature=writer'),
    ({'label': 'photo'}, r'integer label .*uint8\[4, 4, 3\]'),
  )
  def test_bad_input(self, settings, message):
    with self.assertRaisesRegex(InvalidInput, message):
      self.load(**settings)

  def test_not_installed(self):
    with (
      mock.patch.dict(sys.modules, {'tensorflow_datasets': None}),
      self.assertRaisesRegex(InvalidInput, r'pip install fedjax_ext\[tfds\]'),
    ):
      self.load()

  def test_tensorflow_is_not_loaded(self):
    """Neither to open nor to read, in a fresh process."""
    code = (
      'import sys; from fedjax_ext.data import records; '
      f'c = records.load_tfds(data_dir={self.root!r}, name="tiny_images", '
      'image="photo", label="digit", client_feature="meta/writer"); '
      'c.features["image"][:]; print("tensorflow" in sys.modules)'
    )
    run = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True
    )
    self.assertEqual((run.stdout, run.returncode), ('False\n', 0), run.stderr)


if __name__ == '__main__':
  absltest.main()
