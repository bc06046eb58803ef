"""The embedded digits, and what is said where scikit-learn is missing."""

import importlib.util
import sys
import unittest
from unittest import mock

import numpy as np
from absl.testing import absltest

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import iid_partition, load_digits, make_dataset

needs_sklearn = unittest.skipUnless(
  importlib.util.find_spec('sklearn'), 'needs scikit-learn'
)


class DigitsTest(absltest.TestCase):
  @needs_sklearn
  def test_images(self):
    """1,797 images in [0, 1] of ten classes, which use the whole range."""
    columns = load_digits()
    image, label = columns.features['image'], columns.features['label']
    self.assertEqual(image.shape, (1797, 8, 8, 1))
    self.assertEqual(
      (image.dtype, label.dtype), (np.dtype('f4'), np.dtype('i4'))
    )
    self.assertEqual((image.min(), image.max()), (0, 1))
    self.assertEqual(columns.num_classes, 10)
    self.assertEqual(
      np.bincount(label).tolist(),
      [178, 182, 177, 183, 181, 182, 181, 179, 174, 180],
    )
    self.assertIsNone(columns.client)

  @needs_sklearn
  def test_default_split(self):
    """A fifth is test: 360 images, 1,437 to train on."""
    dataset = make_dataset(
      load_digits(), partition=iid_partition, num_clients=10
    )
    self.assertEqual(dataset.splits['test'].num_examples, 360)
    self.assertEqual(dataset.splits['train'].num_examples, 1437)

  def test_without_sklearn(self):
    """One line that says what to install."""
    with (
      mock.patch.dict(sys.modules, {'sklearn': None}),
      self.assertRaisesRegex(InvalidInput, 'pip install scikit-learn'),
    ):
      load_digits()


if __name__ == '__main__':
  absltest.main()
