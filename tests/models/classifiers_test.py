"""Models: sizes, equality with flax's own layers, dropout, pixels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen as nn

from fedjax_ext.core import InvalidInput
from fedjax_ext.models import EmnistCNN, from_module, make_model
from tests.problems import relative_error

# Name, settings, parameters; for 28x28 images.
SIZES = (
  ('softmax_regression', {}, 10, 7_850),
  ('mlp', {'hidden': (200, 200)}, 10, 199_210),
  ('emnist_cnn', {}, 62, 1_206_590),
)


class FlaxCNN(nn.Module):
  """Reddi et al.'s EMNIST CNN in nothing but flax's layers."""

  num_classes: int

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.Conv(32, (3, 3), padding='VALID')(x))
    x = nn.relu(nn.Conv(64, (3, 3), padding='VALID')(x))
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.Dropout(0.25, deterministic=not train)(x)
    x = x.reshape(len(x), -1)
    x = nn.relu(nn.Dense(128)(x))
    x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(self.num_classes)(x)


def draw(model, seed=0):
  """Parameters of about flax's scale, biases too; numpy, as init compiles."""
  rng = np.random.default_rng(seed)

  def leaf(spec):
    scale = max(1, np.prod(spec.shape[:-1])) ** -0.5
    return jnp.asarray(scale * rng.standard_normal(spec.shape), spec.dtype)

  return jax.tree.map(leaf, jax.eval_shape(model.init, jax.random.key(0)))


@functools.cache
def small(name, **settings):
  """A model of 8x8 images and 3 classes, compiled, and its parameters."""
  model = make_model(name, input_shape=(8, 8, 1), num_classes=3, **settings)
  model = model._replace(apply=jax.jit(model.apply))
  return model, draw(model)


def images(shape=(4, 8, 8, 1)):
  return jnp.asarray(np.random.default_rng(0).standard_normal(shape), 'float32')


class ClassifiersTest(parameterized.TestCase):
  @parameterized.parameters(*SIZES)
  def test_parameter_counts(self, name, settings, num_classes, expected):
    """As in the papers, with or without a depth axis."""
    for shape in ((28, 28), (28, 28, 1)):
      model = make_model(
        name, input_shape=shape, num_classes=num_classes, **settings
      )
      params = jax.eval_shape(model.init, jax.random.key(0))
      self.assertEqual(
        sum(leaf.size for leaf in jax.tree.leaves(params)), expected
      )
      logits = jax.eval_shape(model.apply, params, jnp.zeros((5, *shape)))
      self.assertEqual(logits.shape, (5, num_classes))

  @parameterized.parameters(
    ((28, 28, 1), 62, None),
    ((9, 7, 3), 4, 5),  # odd sizes, colours, dropout
  )
  def test_emnist_cnn_equals_flax(self, shape, num_classes, seed):
    """Logits and gradients of the same parameters, in training too."""
    x = images((3, *shape))
    label = jnp.arange(3) % num_classes
    key = None if seed is None else jax.random.key(seed)
    models = [
      from_module(module(num_classes), shape) for module in (EmnistCNN, FlaxCNN)
    ]

    def loss(params, model):
      logits = model.apply(params, x, key)
      chosen = jnp.take_along_axis(
        jax.nn.log_softmax(logits), label[:, None], 1
      )
      return -chosen.mean(), logits

    ours, flax = jax.jit(
      lambda params: [
        jax.grad(loss, has_aux=True)(params, model) for model in models
      ]
    )(draw(models[0]))
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
    ours, flax = jax.jit(
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
  def test_jit_equals_eager(self, name):
    """Compiling changes nothing, with and without a key."""
    model, params = small(name)
    eager = make_model(name, input_shape=(8, 8, 1), num_classes=3).apply
    for key in (None, jax.random.key(3)):
      got = model.apply(params, images(), key)
      self.assertLess(relative_error(got, eager(params, images(), key)), 1e-5)

  @parameterized.parameters('softmax_regression', 'mlp', 'emnist_cnn')
  def test_pixels(self, name):
    """Bytes are the same images as floats / 255."""
    model, params = small(name)
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    expected = model.apply(params, jnp.asarray(x / 255, jnp.float32))
    self.assertLess(relative_error(model.apply(params, x), expected), 1e-6)
    self.assertLess(
      relative_error(model.apply(params, x[..., 0]), expected), 1e-6
    )

  def test_dropout_needs_a_key(self):
    """Off without a key; with one it depends on it and on nothing else."""
    model, params = small('emnist_cnn')
    without, _ = small('emnist_cnn', dropout=())
    apply, x = model.apply, images()
    off = apply(params, x)
    keys = jax.random.split(jax.random.key(0), 2)
    one, two = (apply(params, x, key) for key in keys)
    np.testing.assert_array_equal(one, apply(params, x, keys[0]))
    for a, b in ((one, two), (one, off)):
      self.assertGreater(relative_error(a, b), 0.01)
    np.testing.assert_array_equal(off, without.apply(params, x, keys[0]))

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

    model = make_model('emnist_cnn', input_shape=(8, 8, 1), num_classes=3)
    _, params = small('emnist_cnn')
    with nn.intercept_methods(spy):
      model.apply(params, images(), jax.random.key(0))
    np.testing.assert_allclose(zeroed, [0.25, 0.5], atol=0.08)
    self.assertLen(scales, 2)
    np.testing.assert_allclose(scales[0], 1 / 0.75, rtol=1e-5)
    np.testing.assert_allclose(scales[1], 1 / 0.5, rtol=1e-5)

  def test_dropout_of_clients_under_vmap(self):
    """Each client's own key and weights: equal to a loop."""
    model, _ = small('emnist_cnn')
    keys = jax.random.split(jax.random.key(0), 3)
    params = jax.tree.map(
      lambda *leaves: jnp.stack(leaves), *(draw(model, c) for c in range(3))
    )
    x = images((3, 4, 8, 8, 1))
    got = jax.jit(jax.vmap(model.apply))(params, x, keys)
    for c in range(3):
      at = jax.tree.map(lambda leaf: leaf[c], params)
      self.assertLess(
        relative_error(got[c], model.apply(at, x[c], keys[c])), 1e-5
      )

  @parameterized.parameters(
    ({'name': 'resnet'}, 'emnist_cnn, got model=resnet'),
    ({'num_classes': 0}, 'num_classes=0'),
    ({'name': 'emnist_cnn', 'input_shape': (64,)}, r'got shape \[64\]'),
    ({'name': 'emnist_cnn', 'input_shape': (5, 9, 1)}, r'6x6 .*\[5, 9, 1\]'),
    ({'name': 'emnist_cnn', 'input_shape': (9, 5)}, r'6x6 .*\[9, 5\]'),
    ({'name': 'emnist_cnn', 'input_shape': (2, 9, 9, 1)}, r'\[2, 9, 9, 1\]'),
  )
  def test_bad_input(self, settings, message):
    """What no model can be built for is named."""
    with self.assertRaisesRegex(InvalidInput, message):
      make_model(
        **{
          'name': 'mlp',
          'input_shape': (8, 8, 1),
          'num_classes': 3,
          **settings,
        }
      )

  def test_smallest_images(self):
    """6x6, the least the CNN takes, leaves one pooled pixel."""
    model = make_model('emnist_cnn', input_shape=(6, 6), num_classes=2)
    params = jax.eval_shape(model.init, jax.random.key(0))
    self.assertEqual(params['Dense_0']['kernel'].shape, (64, 128))
    logits = jax.eval_shape(model.apply, params, jnp.ones((2, 6, 6)))
    self.assertEqual(logits.shape, (2, 2))


if __name__ == '__main__':
  absltest.main()
