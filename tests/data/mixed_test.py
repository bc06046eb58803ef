"""Small problems of mixed learning: what their generators promise."""

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import (
  make_dataset,
  quadratic,
  split_off_server,
  synthetic_smile,
)
from fedjax_ext.data.server import client_to_server


class SmileTest(parameterized.TestCase):
  SMALL = dict(
    num_clients=5, examples=4, num_test_clients=3, test_examples=2, seed=3
  )

  def test_who_has_what(self):
    columns = synthetic_smile(**self.SMALL)
    x, label = columns.features['x'], columns.features['label']
    self.assertEqual((x.shape, x.dtype), ((20 + 20 + 12, 10), np.float32))
    self.assertEqual(columns.num_classes, 2)
    count = {}
    rows = zip(columns.client, label, columns.split, strict=True)
    for client, y, split in rows:
      key = (str(client), int(y), int(split))
      count[key] = count.get(key, 0) + 1
    expected = {(f'client_{i:05d}', 1, 0): 4 for i in range(5)}
    expected['server', 0, 0] = 20
    for i in range(3):
      expected[f'test_{i:05d}', 1, 1] = 2
      expected[f'test_{i:05d}', 0, 1] = 2
    self.assertEqual(count, expected)

  def test_as_a_dataset(self):
    """Clients and server train; those that are tested never do."""
    dataset = make_dataset(synthetic_smile(**self.SMALL))
    names = dataset.splits['train'].client_ids
    trained = set(names[dataset.participating].tolist())
    self.assertEqual(
      trained, {*(f'client_{i:05d}' for i in range(5)), 'server'}
    )
    tested = set(names[dataset.parts['test'].clients].tolist())
    self.assertEqual(tested, {f'test_{i:05d}' for i in range(3)})

  def test_means(self):
    """+-mean by class; clients lie around it by `shift`, examples by 1."""
    columns = synthetic_smile(
      num_clients=400, examples=30, num_test_clients=200, seed=1
    )
    x, label = columns.features['x'], columns.features['label']
    for test in (0, 1):
      for y, mean in ((1, 0.4), (0, -0.4)):
        mine = x[(columns.split == test) & (label == y)]
        # Client means: deviation 0.5 / sqrt(clients * 10 features).
        self.assertAlmostEqual(mine.mean(), mean, delta=0.05)
    of_client = x[: 400 * 30].reshape(400, 30, 10)
    inside = of_client.std(1, ddof=1)
    self.assertAlmostEqual(inside.mean(), 1.0, delta=0.03)
    # Of a client's mean: shift^2 + 1 / 30.
    between = of_client.mean(1).std()
    self.assertAlmostEqual(between, np.sqrt(0.25 + 1 / 30), delta=0.03)
    # The negatives' shifts are fresh ones.
    negatives = x[400 * 30 : 800 * 30].reshape(400, 30, 10).mean(1)
    positives = of_client.mean(1)
    self.assertAlmostEqual(
      np.corrcoef(negatives.ravel(), positives.ravel())[0, 1], 0, delta=0.06
    )
    # A test client's classes share one.
    tested = x[800 * 30 :].reshape(200, 2, 20, 10).mean(2)
    pair = np.corrcoef(tested[:, 0].ravel(), tested[:, 1].ravel())[0, 1]
    self.assertAlmostEqual(pair, 0.25 / (0.25 + 1 / 20), delta=0.06)

  def test_settings(self):
    columns = synthetic_smile(
      **self.SMALL | dict(num_features=3, mean=50.0, shift=0.0)
    )
    x, label = columns.features['x'], columns.features['label']
    self.assertEqual(x.shape[1], 3)
    np.testing.assert_array_equal(x.min(1) > 40, label == 1)
    np.testing.assert_array_equal(x.max(1) < -40, label == 0)

  def test_seed(self):
    one, same = (synthetic_smile(**self.SMALL) for _ in range(2))
    np.testing.assert_array_equal(one.features['x'], same.features['x'])
    other = synthetic_smile(**self.SMALL | dict(seed=4))
    self.assertGreater(np.abs(one.features['x'] - other.features['x']).min(), 0)

  @parameterized.parameters(
    'num_features',
    'num_clients',
    'examples',
    'num_test_clients',
    'test_examples',
  )
  def test_errors(self, name):
    with self.assertRaisesRegex(InvalidInput, f'{name} >= 1, got {name}=0'):
      synthetic_smile(**self.SMALL | {name: 0})


class QuadraticTest(parameterized.TestCase):
  def test_rows(self):
    columns = quadratic(
      curvatures=(1.0, 3.0),
      optima=(0.5, 4.0),
      examples=(2, 1),
      server_examples=2,
      num_features=3,
    )
    self.assertEqual(
      columns.client.tolist(),
      ['client_00000'] * 2 + ['client_00001'] + ['server'] * 2,
    )
    np.testing.assert_array_equal(
      columns.features['x'],
      np.repeat([[0.5], [0.5], [4.0], [-4.0], [-4.0]], 3, axis=1),
    )
    np.testing.assert_array_equal(
      columns.features['curvature'], [1, 1, 3, 2, 2]
    )
    for name in ('x', 'curvature'):
      self.assertEqual(columns.features[name].dtype, np.float32)
    self.assertFalse(columns.split.any())

  def test_as_a_dataset(self):
    dataset = make_dataset(quadratic(examples=(3, 2)), test_fraction=0.0)
    dataset, server = split_off_server(dataset, client_to_server(dataset))
    train = dataset.splits['train']
    self.assertEqual(train.sizes(dataset.participating).tolist(), [3, 2])
    self.assertEqual(dataset.splits['server'].sizes()[server], 1)

  def test_noise(self):
    """Gradients c (w - x) of the server's examples: the asked deviation."""
    columns = quadratic(
      server_curvature=5.0,
      server_optimum=-4.0,
      server_examples=300,
      noise=2.0,
      num_features=40,
      examples=(1, 300),
    )
    x = columns.features['x']
    gradients = 5.0 * (0.0 - x[-300:])
    self.assertAlmostEqual(gradients.mean(), 20.0, delta=0.1)
    self.assertAlmostEqual(gradients.std(), 2.0, delta=0.1)
    # Independent of each other; the clients have none.
    self.assertLess(np.abs(np.corrcoef(gradients.T) - np.eye(40)).max(), 0.3)
    self.assertAlmostEqual(gradients.mean(1).std(), 2 / 40**0.5, delta=0.05)
    self.assertEqual(set(x[:-300].ravel().tolist()), {0.0, 4.0})

  def test_seed(self):
    draw = lambda seed: quadratic(noise=1.0, seed=seed).features['x']
    np.testing.assert_array_equal(draw(0), draw(0))
    self.assertNotEqual(float(draw(0)[-1, 0]), float(draw(1)[-1, 0]))

  @parameterized.parameters(
    (dict(curvatures=(1.0,)), 'as many curvatures as optima'),
    (dict(optima=(1.0, 2.0, 3.0)), 'as many curvatures as optima'),
    (dict(examples=(1,)), 'as many curvatures as optima'),
    (
      dict(curvatures=(), optima=(), examples=()),
      'as many curvatures as optima',
    ),
    (dict(curvatures=(1.0, 0.0)), 'curvatures > 0'),
    (dict(server_curvature=-2.0), 'curvatures > 0, got curvatures=-2.0'),
    (dict(examples=(1, 0)), 'examples > 0'),
    (dict(server_examples=0), 'examples > 0'),
  )
  def test_errors(self, settings, message):
    with self.assertRaisesRegex(InvalidInput, message):
      quadratic(**settings)


if __name__ == '__main__':
  absltest.main()
