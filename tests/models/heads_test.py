"""Simplex classifiers and backbones: angles, zeros, norms, features."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.models import MODELS
from fedjax_ext.models.heads import (
  apply_head,
  class_norms,
  linear_head,
  make_backbone,
  simplex_etf,
  sparse_etf,
  sparse_etf_loss,
)


def angles(kernel):
  """Angles between class vectors [D, Y] in degrees, [Y (Y - 1)]."""
  kernel = np.asarray(kernel, np.float64)
  unit = kernel / np.linalg.norm(kernel, axis=0)
  cosines = (unit.T @ unit)[~np.eye(kernel.shape[1], dtype=bool)]
  return np.degrees(np.arccos(np.clip(cosines, -1, 1)))


class SimplexTest(parameterized.TestCase):
  @parameterized.parameters((6, 4), (3, 3), (40, 10))
  def test_gram_matrix(self, features, classes):
    """Oracle T5."""
    v = simplex_etf(np.random.default_rng(0), features, classes)
    expected = classes / (classes - 1) * np.eye(classes) - 1 / (classes - 1)
    np.testing.assert_allclose(v.T @ v, expected, atol=1e-12)
    np.testing.assert_allclose(v.sum(1), 0, atol=1e-12)
    self.assertEqual(np.linalg.matrix_rank(v), classes - 1)

  def test_too_few_features(self):
    with self.assertRaisesRegex(InvalidInput, 'the 4 classes, got 3'):
      simplex_etf(np.random.default_rng(0), 3, 4)


class SparseTest(parameterized.TestCase):
  def test_loss_by_hand(self):
    """Oracle T6."""
    v = jnp.array([[0.3, 0, 0], [0, 0.4, 0], [0, 0.3, 0.1]])
    self.assertAlmostEqual(float(sparse_etf_loss(v, norm=0.1)), -0.941796, 5)

  @parameterized.parameters(
    (10, 96.3794, 0.01, 0.1),
    (100, 90.5788, 0.005, 0.2),
  )
  def test_optimised(self, classes, angle, norm_error, variance):
    """Oracle T7."""
    v = sparse_etf(num_features=512, num_classes=classes)
    # Entries that are nearly alone in their feature decay, some to 0 as well.
    start = sparse_etf(num_features=512, num_classes=classes, steps=0)
    self.assertEqual((start == 0).sum(), int(0.6 * 512 * classes))
    self.assertTrue((v[start == 0] == 0).all())
    self.assertLess((v[start != 0] == 0).mean(), 0.05)
    self.assertAlmostEqual(angles(v).mean(), angle, delta=0.01)
    self.assertLess(angles(v).var(), variance)
    norms = np.linalg.norm(v, axis=0)
    self.assertLess(abs(norms.mean() / 0.1 - 1), norm_error)
    again = sparse_etf(num_features=512, num_classes=classes)
    self.assertIs(v, again)
    self.assertFalse(v.flags.writeable)

  def test_tiny(self):
    settings = dict(num_features=16, num_classes=4, sparsity=0.5)
    v = sparse_etf(**settings)
    start = sparse_etf(**settings, steps=0)
    self.assertEqual((start == 0).sum(), 32)
    self.assertTrue((v[start == 0] == 0).all())
    self.assertAlmostEqual(angles(v).mean(), 109.471, delta=0.05)
    other = sparse_etf(**settings, seed=1)
    self.assertFalse(np.array_equal(v, other))

  def test_dense(self):
    v = sparse_etf(num_features=16, num_classes=4, sparsity=0.0)
    self.assertEqual((v == 0).sum(), 0)
    self.assertAlmostEqual(angles(v).mean(), 109.471, delta=0.05)

  @parameterized.parameters(
    ({'sparsity': 1.0}, 'sparsity'),
    ({'norm': 0.0}, 'norm=0.0'),
    ({'num_features': 3}, 'the 4 classes'),
    ({'num_features': 4, 'sparsity': 0.95}, 'zeros alone'),
  )
  def test_bad_input(self, setting, message):
    settings = dict(num_features=16, num_classes=4) | setting
    with self.assertRaisesRegex(InvalidInput, message):
      sparse_etf(**settings)


class HeadTest(absltest.TestCase):
  def test_drawn_as_pytorch_does(self):
    head = linear_head(jax.random.key(0), 512, 50)
    for values in head.values():
      self.assertLess(np.abs(values).max(), 512**-0.5)
    self.assertGreater(np.abs(head['kernel']).max(), 0.99 * 512**-0.5)
    self.assertAlmostEqual(float(class_norms(head).mean()), 0.577, delta=0.01)

  def test_logits(self):
    head = {'kernel': jnp.array([[3.0, 0], [4, 2]]), 'bias': jnp.array([1, 0])}
    np.testing.assert_allclose(
      apply_head(head, jnp.array([[1.0, 2]])), [[12, 4]]
    )
    np.testing.assert_allclose(class_norms(head), [5, 2])


class BackboneTest(parameterized.TestCase):
  @parameterized.parameters(
    ('mlp', {'hidden': (12, 7)}, (8, 8, 1), 7),
    ('emnist_cnn', {}, (28, 28, 1), 128),
    ('group_norm_cnn', {'widths': (8, 16), 'pool': 'mean'}, (8, 8, 1), 16),
    ('group_norm_cnn', {'widths': (8, 16)}, (8, 8, 1), 64),
    ('resnet8', {'width': 8}, (8, 8, 3), 32),
    ('resnet18', {'width': 8, 'groups': 4, 'norm': 'batch'}, (8, 8, 3), 64),
  )
  def test_features(self, name, settings, shape, features):
    backbone = make_backbone(MODELS[name], input_shape=shape, **settings)
    self.assertEqual(backbone.num_features, features)
    variables = backbone.model.init(jax.random.key(0))
    x = jnp.ones((3, *shape))
    self.assertEqual(backbone.model.apply(variables, x).shape, (3, features))
    whole = MODELS[name](num_classes=5, input_shape=shape, **settings)
    count = lambda v: sum(x.size for x in jax.tree.leaves(v))
    self.assertEqual(
      count(whole.init(jax.random.key(0))) - count(variables),
      5 * features + 5,
    )

  @parameterized.parameters('softmax_regression', 'char_lstm')
  def test_no_features(self, name):
    shape = (8,) if name == 'char_lstm' else (8, 8, 1)
    if name == 'softmax_regression':
      with self.assertRaises(InvalidInput):
        make_backbone(MODELS[name], input_shape=shape)
      return
    with self.assertRaisesRegex(InvalidInput, name):
      make_backbone(MODELS[name], input_shape=shape)


if __name__ == '__main__':
  absltest.main()
