"""Classifiers: equality with flax's own layers, dropout, pixels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen as nn

from fedjax_ext.models import EmnistCNN, from_module, make_model
from tests.models.checks import draw, lane, normal, quick_jit, stack
from tests.problems import relative_error


class FlaxCNN(nn.Module):
  """Reddi et al.'s EMNIST CNN in nothing but flax's layers."""

  num_classes: int

  @nn.compact
  def __call__(self, x, train=False, mask=None):
    x = nn.relu(nn.Conv(32, (3, 3), padding='VALID')(x))
    x = nn.relu(nn.Conv(64, (3, 3), padding='VALID')(x))
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.Dropout(0.25, deterministic=not train)(x)
    x = x.reshape(len(x), -1)
    x = nn.relu(nn.Dense(128)(x))
    x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(self.num_classes)(x)


@functools.cache
def small(name, **settings):
  """A model of 8x8 images and 3 classes, compiled, and its parameters."""
  model = make_model(name, input_shape=(8, 8, 1), num_classes=3, **settings)
  model = model._replace(
    apply=quick_jit(model.apply), train=quick_jit(model.train)
  )
  return model, draw(model.init)


def images(shape=(4, 8, 8, 1)):
  return normal(shape)


def train_logits(model, params, x, key):
  """Logits in training with every example in the mask."""
  return model.train(params, x, key, jnp.ones(len(x), bool))[0]


class ClassifiersTest(parameterized.TestCase):
  @parameterized.parameters(
    ((28, 28, 1), 62, None),
    ((9, 7, 3), 4, 5),  # odd sizes, colours, dropout
  )
  def test_emnist_cnn_equals_flax(self, shape, num_classes, seed):
    """Logits and gradients of the same parameters, in training too."""
    x = images((3, *shape))
    label = jnp.arange(3) % num_classes
    models = [
      from_module(module(num_classes), shape) for module in (EmnistCNN, FlaxCNN)
    ]

    def loss(params, model):
      if seed is None:
        logits = model.apply(params, x)
      else:
        logits = train_logits(model, params, x, jax.random.key(seed))
      chosen = jnp.take_along_axis(
        jax.nn.log_softmax(logits), label[:, None], 1
      )
      return -chosen.mean(), logits

    ours, flax = quick_jit(
      lambda params: [
        jax.grad(loss, has_aux=True)(params, model) for model in models
      ]
    )(draw(models[0].init))
    (grads, logits), (flax_grads, flax_logits) = ours, flax
    self.assertLess(relative_error(logits, flax_logits), 1e-5)
    self.assertEqual(
      jax.tree.map(jnp.shape, grads), jax.tree.map(jnp.shape, flax_grads)
    )
    self.assertLess(relative_error(grads, flax_grads), 1e-5)
    self.assertGreater(
      min(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)), 0
    )

  def test_emnist_cnn_initialises_as_flax_does(self):
    """One key gives the same parameters under the same names."""
    ours, flax = quick_jit(
      lambda key: [
        from_module(module(3), (6, 6, 1)).init(key)
        for module in (EmnistCNN, FlaxCNN)
      ]
    )(jax.random.key(4))
    jax.tree.map(np.testing.assert_array_equal, ours, flax)

  def test_dense_models_by_hand(self):
    """Softmax regression and MLP are the matrix products they say."""
    x = images()
    flat = np.asarray(x).reshape(4, -1)
    model, params = small('softmax_regression')
    layer = params['Dense_0']
    np.testing.assert_allclose(
      model.apply(params, x), flat @ layer['kernel'] + layer['bias'], atol=1e-5
    )
    model, params = small('mlp', hidden=(6, 5))
    for i in range(3):
      layer = params[f'Dense_{i}']
      flat = flat @ layer['kernel'] + layer['bias']
      flat = np.maximum(flat, 0) if i < 2 else flat
    np.testing.assert_allclose(model.apply(params, x), flat, atol=1e-5)

  @parameterized.parameters('softmax_regression', 'mlp', 'emnist_cnn')
  def test_pixels(self, name):
    """Bytes are the same images as floats / 255, with or without depth."""
    model, params = small(name)
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    expected = model.apply(params, jnp.asarray(x / 255, jnp.float32))
    self.assertLess(relative_error(model.apply(params, x), expected), 1e-6)
    self.assertLess(
      relative_error(model.apply(params, x[..., 0]), expected), 1e-6
    )

  def test_dropout_only_in_training(self):
    """There it depends on the key and on nothing else."""
    model, params = small('emnist_cnn', dropout=True)
    without, _ = small('emnist_cnn')
    x, keys = images(), jax.random.split(jax.random.key(0), 2)
    off = model.apply(params, x)
    one, two = (train_logits(model, params, x, key) for key in keys)
    np.testing.assert_array_equal(one, train_logits(model, params, x, keys[0]))
    for a, b in ((one, two), (one, off)):
      self.assertGreater(relative_error(a, b), 0.01)
    self.assertLess(
      relative_error(train_logits(without, params, x, keys[0]), off), 1e-6
    )

  def test_dropout_rates(self):
    """A quarter after the pool, half after the dense layer, as in the paper."""
    zeroed, scales = [], []

    def spy(call, args, kwargs, context):
      out = call(*args, **kwargs)
      if isinstance(context.module, nn.Dropout):
        x, y = np.asarray(args[0]), np.asarray(out)
        zeroed.append((y == 0)[x != 0].mean())
        scales.append((y[y != 0] / x[y != 0]).tolist())
      return out

    model = make_model(
      'emnist_cnn', input_shape=(8, 8, 1), num_classes=3, dropout=True
    )
    _, params = small('emnist_cnn', dropout=True)
    with nn.intercept_methods(spy):
      train_logits(model, params, images(), jax.random.key(0))
    np.testing.assert_allclose(zeroed, [0.25, 0.5], atol=0.08)
    self.assertLen(scales, 2)
    np.testing.assert_allclose(scales[0], 1 / 0.75, rtol=1e-5)
    np.testing.assert_allclose(scales[1], 1 / 0.5, rtol=1e-5)

  def test_dropout_of_clients_under_vmap(self):
    """Each client's own key and weights: equal to a loop."""
    model = make_model(
      'emnist_cnn', input_shape=(8, 8, 1), num_classes=3, dropout=True
    )
    keys = jax.random.split(jax.random.key(0), 3)
    params = stack([draw(model.init, c) for c in range(3)])
    x = images((3, 4, 8, 8, 1))
    apply = quick_jit(functools.partial(train_logits, model))
    got = jax.vmap(apply)(params, x, keys)
    for c in range(3):
      expected = apply(lane(params, c), x[c], keys[c])
      self.assertLess(relative_error(got[c], expected), 1e-5)

  def test_padding_keeps_the_dropout_of_the_rows_before(self):
    """A batch padded at its end drops in its real rows what it did before."""
    model, params = small('emnist_cnn', dropout=True)
    x, key = images(), jax.random.key(0)
    padded = jnp.concatenate([x, 1e3 * x[:2]])
    mask = jnp.arange(6) < 4
    got, _ = model.train(params, padded, key, mask)
    expected = train_logits(model, params, x, key)
    self.assertLess(relative_error(got[:4], expected), 1e-5)

  def test_smallest_images(self):
    """6x6, the least the CNN takes, leaves one pooled pixel."""
    model = make_model('emnist_cnn', input_shape=(6, 6), num_classes=2)
    params = jax.eval_shape(model.init, jax.random.key(0))
    self.assertEqual(params['Dense_0']['kernel'].shape, (64, 128))
    logits = jax.eval_shape(model.apply, params, jnp.ones((2, 6, 6)))
    self.assertEqual(logits.shape, (2, 2))


if __name__ == '__main__':
  absltest.main()
