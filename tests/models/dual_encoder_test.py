"""Dual encoders: known values, parameters, towers by hand, errors."""

import math

import jax
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.models import dual_encoder
from fedjax_ext.models.dual_encoder import masked_mean_embedding


def tower(params, name, x):
  """One dense layer in numpy, before its activation."""
  return x @ np.asarray(params[name]['kernel']) + np.asarray(
    params[name]['bias']
  )


class DualEncoderTest(parameterized.TestCase):
  def test_masked_mean(self):
    """R11."""
    table = np.array([[0, 0], [1, 2], [3, 4], [5, 6]], np.float32)
    ids = np.array([[1, 3, 0], [0, 0, 0], [2, 2, 1]])
    expected = [[3, 4], [0, 0], [7 / 3, 10 / 3]]
    mean = jax.jit(masked_mean_embedding)
    got = mean(table, ids)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    # What the row of padding holds does not matter, nor where padding stands.
    junk = np.maximum(table, [[9], [0], [0], [0]]).astype(np.float32)
    got = mean(junk, ids[:, ::-1])
    np.testing.assert_allclose(got, expected, rtol=1e-6)

  def test_parameters_of_movielens(self):
    encoder = dual_encoder(num_classes=3953, input_shape=(10,))
    params = jax.jit(encoder.init)(jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(params))
    self.assertEqual(count, 63_520)
    self.assertEqual(encoder.num_items, 3952)
    self.assertEqual(params.keys(), {'items', 'context_0'})
    self.assertEqual(params['items'].shape, (3953, 16))
    table, kernel = (
      np.asarray(x) for x in (params['items'], params['context_0']['kernel'])
    )
    # U(-0.05, 0.05) and Glorot's U(-a, a), a^2 = 6 / (16 + 16).
    for x, width in ((table, 0.05), (kernel, math.sqrt(6 / 32))):
      self.assertLessEqual(np.abs(x).max(), width)
      self.assertGreater(x.max(), 0.9 * width)
      self.assertLess(x.min(), -0.9 * width)
      self.assertAlmostEqual(x.std() / (width / math.sqrt(3)), 1, delta=0.1)
    np.testing.assert_array_equal(params['context_0']['bias'], np.zeros(16))

  def test_keys(self):
    """Another key makes other parameters; towers do not share theirs."""
    encoder = dual_encoder(
      num_classes=5,
      input_shape=(2,),
      item_hidden=(16,),
      item_activations=('relu',),
    )
    init = jax.jit(encoder.init)
    one, same, two = (init(jax.random.key(k)) for k in (0, 0, 1))
    one, same, two = jax.device_get((one, same, two))
    np.testing.assert_array_equal(one['items'], same['items'])
    for path in (('items',), ('context_0', 'kernel')):
      a, b = one, two
      for name in path:
        a, b = a[name], b[name]
      self.assertGreater(np.abs(a - b).min(), 0)
    kernels = [one[f'{name}_0']['kernel'] for name in ('context', 'item')]
    self.assertGreater(np.abs(kernels[0] - kernels[1]).max(), 0.1)

  def test_towers(self):
    """Contexts through two layers, items through one, by hand."""
    encoder = dual_encoder(
      num_classes=6,
      input_shape=(3,),
      embedding_size=4,
      context_hidden=(5, 3),
      context_activations=('relu', 'linear'),
      item_hidden=(3,),
      item_activations=('tanh',),
    )
    params = jax.eval_shape(encoder.init, jax.random.key(1))
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(lambda x: draw(x.shape).astype(x.dtype), params)
    shapes = {k: v['kernel'].shape for k, v in params.items() if k != 'items'}
    self.assertEqual(
      shapes, {'context_0': (4, 5), 'context_1': (5, 3), 'item_0': (4, 3)}
    )
    table = np.asarray(params['items'])
    mean = np.stack([(table[2] + table[5]) / 2, table[3]])
    hidden = np.maximum(tower(params, 'context_0', mean), 0)
    expected = tower(params, 'context_1', hidden)
    ids = np.array([[2, 5, 0], [3, 0, 0]])
    got = jax.jit(encoder.contexts)(params, ids)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    self.assertLess(expected.min(), 0)  # the last layer is linear
    ids = np.array([4, 0, 1])
    expected = np.tanh(tower(params, 'item_0', table[ids]))
    got = jax.jit(encoder.items)(params, ids)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)

  @parameterized.parameters(
    ('relu', [0.0, 2.0]),
    ('linear', [-1.0, 2.0]),
    ('tanh', [-math.tanh(1), math.tanh(2)]),
    ('gelu', [-0.1588, 1.9546]),
  )
  def test_padding_alone(self, activation, expected):
    """Zeros go into the dense layers, whatever the row of padding holds."""
    encoder = dual_encoder(
      num_classes=4,
      input_shape=(3,),
      embedding_size=2,
      context_hidden=(2,),
      context_activations=(activation,),
    )
    params = jax.device_get(jax.jit(encoder.init)(jax.random.key(0)))
    params['context_0']['bias'] = np.array([-1, 2], np.float32)
    got = jax.jit(encoder.contexts)(params, np.zeros((1, 3), np.int32))
    np.testing.assert_allclose(got, [expected], atol=1e-4)

  def test_without_layers(self):
    encoder = dual_encoder(
      num_classes=4,
      input_shape=(2,),
      embedding_size=3,
      context_hidden=(),
      context_activations=(),
    )
    params = jax.jit(encoder.init)(jax.random.key(0))
    self.assertEqual(params.keys(), {'items'})
    got = jax.jit(encoder.contexts)(params, np.array([[0, 0], [2, 0]]))
    np.testing.assert_array_equal(got[0], np.zeros(3))
    np.testing.assert_array_equal(got[1], params['items'][2])
    np.testing.assert_array_equal(
      encoder.items(params, np.array([3])), params['items'][3:]
    )

  @parameterized.parameters(
    (dict(context_hidden=(16, 16)), 'one activation for each layer'),
    (dict(context_activations=()), 'one activation for each layer'),
    (dict(item_hidden=(16,)), 'item_activations=\\(\\)'),
    (dict(context_hidden=(8,)), r'got 8 \(contexts\) and 16 \(items\)'),
    (
      dict(item_hidden=(4,), item_activations=('relu',)),
      r'got 16 \(contexts\) and 4 \(items\)',
    ),
    (dict(context_activations=('swish',)), 'got context_activations=swish'),
    (dict(context_hidden=(0,)), 'context_hidden >= 1'),
    (dict(embedding_size=0), 'embedding_size >= 1'),
    (dict(num_classes=1), 'num_classes >= 2'),
    (dict(input_shape=(10, 2)), r'shape \[T\], got \[10, 2\]'),
  )
  def test_errors(self, changes, message):
    settings = dict(num_classes=5, input_shape=(10,)) | changes
    with self.assertRaisesRegex(InvalidInput, message):
      dual_encoder(**settings)


if __name__ == '__main__':
  absltest.main()
