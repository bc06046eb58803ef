"""Synthetic handwriting: sizes, styles, and classes that can be learned."""

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import fingerprint, synthetic_femnist


class SyntheticTest(parameterized.TestCase):
  def test_columns(self):
    """Bytes, all classes counted, every client with its own rows."""
    columns = synthetic_femnist(num_clients=7, mean_examples=20)
    image, label = columns.features['image'], columns.features['label']
    self.assertEqual((image.dtype, image.shape[1:]), (np.uint8, (28, 28, 1)))
    self.assertEqual((len(image), columns.num_classes), (len(label), 62))
    np.testing.assert_array_equal(np.unique(columns.client), np.arange(7))
    self.assertLess(label.max(), 62)
    self.assertIsNone(columns.split)
    # Contrast fits a byte: few pixels are cut off at either end.
    self.assertLess(np.isin(image, (0, 255)).mean(), 0.1)
    self.assertBetween(image.mean(), 100, 156)

  def test_reproducible(self):
    """The seed decides everything."""
    make = lambda seed: fingerprint(
      synthetic_femnist(num_clients=5, mean_examples=15, seed=seed)
    )
    self.assertEqual(make(1), make(1))
    self.assertNotEqual(make(1), make(2))

  def test_sizes(self):
    """Log-normal with the given mean and spread of logarithms."""
    sizes = np.bincount(
      synthetic_femnist(
        num_clients=500, mean_examples=60, sigma=0.5, num_classes=3
      ).client
    )
    self.assertLen(sizes, 500)
    self.assertAlmostEqual(sizes.mean(), 60, delta=6)
    self.assertAlmostEqual(np.log(sizes).std(), 0.5, delta=0.05)
    self.assertAlmostEqual(
      np.log(sizes).mean(), np.log(60) - 0.5**2 / 2, delta=0.1
    )

  def test_sizes_are_clipped(self):
    """Never below 10, nor above three times the mean."""
    sizes = np.bincount(
      synthetic_femnist(
        num_clients=200, mean_examples=20, sigma=2.0, num_classes=3
      ).client
    )
    self.assertEqual((sizes.min(), sizes.max()), (10, 60))

  def test_equal_sizes(self):
    columns = synthetic_femnist(num_clients=6, mean_examples=12, sigma=0)
    self.assertEqual(np.bincount(columns.client).tolist(), [12] * 6)

  @parameterized.parameters(0.0, 1.0)
  def test_style(self, style):
    """Without noise a client writes a class one way; all alike at style 0."""
    columns = synthetic_femnist(
      num_clients=6, mean_examples=30, num_classes=3, style=style, noise=0
    )
    image, label = columns.features['image'], columns.features['label']
    ways = lambda rows: len(np.unique(image[rows].reshape(-1, 784), axis=0))
    for y in range(3):
      clients = np.unique(columns.client[label == y])
      self.assertGreater(len(clients), 3)
      for c in clients:
        self.assertEqual(ways((label == y) & (columns.client == c)), 1)
      expected = 1 if style == 0 else len(clients)
      self.assertEqual(ways(label == y), expected)

  @parameterized.parameters(0.0, 1.0)
  def test_learnable(self, style):
    """The nearest class mean of other clients beats chance by far."""
    columns = synthetic_femnist(
      num_clients=30, mean_examples=60, num_classes=10, style=style
    )
    x = columns.features['image'].reshape(-1, 784).astype(np.float32)
    y, train = columns.features['label'], columns.client < 20
    means = np.stack([x[train & (y == c)].mean(0) for c in range(10)])
    distance = ((x[~train, None] - means) ** 2).sum(-1)
    accuracy = (distance.argmin(1) == y[~train]).mean()
    self.assertGreater(accuracy, 0.99 if style == 0 else 0.5)

  def test_label_skew(self):
    """A small label_alpha gives a client few classes, a large one all."""
    shares = {}
    for alpha in (0.05, 1000.0):
      columns = synthetic_femnist(
        num_clients=20, mean_examples=50, num_classes=5, label_alpha=alpha
      )
      counts = np.zeros((20, 5))
      np.add.at(counts, (columns.client, columns.features['label']), 1)
      shares[alpha] = (counts.max(1) / counts.sum(1)).mean()
    self.assertGreater(shares[0.05], 0.75)
    self.assertLess(shares[1000.0], 0.4)

  @parameterized.parameters(
    ('num_clients', 0),
    ('mean_examples', 9),
    ('num_classes', 1),
    ('label_alpha', 0),
    ('sigma', -1),
    ('style', -1),
    ('noise', -0.5),
  )
  def test_bad_input(self, name, value):
    with self.assertRaisesRegex(InvalidInput, f'{name}={value}'):
      synthetic_femnist(**{name: value})


if __name__ == '__main__':
  absltest.main()
