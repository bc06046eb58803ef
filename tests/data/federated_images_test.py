"""Published image data sets, from small files of their formats."""

import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import federated_images, sqlite
from tests.data.sqlite_test import write_tff


class FederatedImagesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.rng = np.random.default_rng(0)

  @parameterized.parameters((False, '', 62), (True, 'digitsonly_', 10))
  def test_emnist(self, only_digits, infix, num_classes):
    """Paper is 0 and ink is 1; the same writers train and test."""
    pixels = {}
    for split, n in (('train', 5), ('test', 2)):
      pixels[split] = self.rng.random((n, 28, 28), np.float32)
      examples = {
        'pixels': pixels[split],
        'label': np.full(n, num_classes - 1, np.int32),
      }
      path = self.root / f'federated_emnist_{infix}{split}.sqlite'
      sqlite.write_sqlite(path, [('0123456789abcdef:f0000_14', examples)])
    columns = federated_images.federated_emnist(
      data_dir=str(self.root), only_digits=only_digits
    )
    self.assertEqual(columns.num_classes, num_classes)
    self.assertEqual(
      {s: x[1].tolist() for s, x in columns.client.segments.items()},
      {'train': [5], 'test': [2]},
    )
    image = columns.features['image']
    self.assertEqual((image.shape, image.dtype), ((7, 28, 28, 1), np.float32))
    np.testing.assert_array_equal(image[:5][..., 0], 1 - pixels['train'])
    np.testing.assert_array_equal(image[5:][..., 0], 1 - pixels['test'])
    self.assertEqual(set(columns.features['label'][:]), {num_classes - 1})

  def test_cifar100(self):
    """Integers of tf.train.Example become bytes [32, 32, 3]."""
    clients = {
      split: {
        name: {
          'image': self.rng.integers(0, 256, (2, 32, 32, 3)),
          'label': np.array([99, 0]),
          'coarse_label': np.array([19, 3]),
        }
      }
      for split, name in (('train', '0'), ('test', '7'))
    }
    write_tff(self.root / 'cifar100.sqlite', clients)
    columns = federated_images.federated_cifar100(data_dir=str(self.root))
    self.assertEqual(columns.client.client_ids.tolist(), ['0', '7'])
    image = columns.features['image']
    self.assertEqual((image.shape, image.dtype), ((4, 32, 32, 3), np.uint8))
    np.testing.assert_array_equal(image[2:], clients['test']['7']['image'])
    self.assertEqual(columns.features['label'][:].tolist(), [99, 0, 99, 0])
    self.assertEqual(columns.features['coarse_label'][:].tolist(), [19, 3] * 2)

  @parameterized.parameters(
    (
      federated_images.federated_emnist,
      'download federated_emnist --data_dir=',
    ),
    (
      federated_images.federated_cifar100,
      'download federated_cifar100 --data_',
    ),
  )
  def test_missing(self, source, command):
    """The message has the command that downloads the files."""
    with self.assertRaisesRegex(InvalidInput, command):
      source(data_dir=str(self.root))


if __name__ == '__main__':
  absltest.main()
