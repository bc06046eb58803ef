"""Layers: equal to flax's own in values, gradients and parameters."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen as nn

from fedjax_ext.core import InvalidInput
from fedjax_ext.models import Conv, as_float_image, max_pool, patches
from tests.problems import relative_error, x64

# Tolerance by dtype.
DTYPES = (('float32', 1e-5), ('float64', 1e-9))


def wide(dtype):
  """64-bit types for float64, the default ones else."""
  return x64() if dtype == 'float64' else contextlib.nullcontext()


def normal(shape, dtype='float32', seed=0):
  return jnp.asarray(
    np.random.default_rng(seed).standard_normal(shape), dtype=dtype
  )


def value_and_gradient(function, *inputs):
  """Output and the gradients of a generic scalar of it, by every input."""

  def scalar(*args):
    out = function(*args)
    weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
    return (weights * out).sum(), out

  grads, out = jax.grad(scalar, tuple(range(len(inputs))), has_aux=True)(
    *inputs
  )
  return out, grads


def weights(shape, dtype='float32', seed=2):
  """Parameters of a convolution, drawn with numpy."""
  params = {
    'kernel': normal(shape, dtype, seed),
    'bias': normal(shape[-1:], dtype, seed + 1),
  }
  return {'params': params}


class ConvTest(parameterized.TestCase):
  @parameterized.product(
    dtype=DTYPES, padding=('VALID', 'SAME'), kernel_size=((3, 3), (4, 1))
  )
  def test_equals_flax(self, dtype, padding, kernel_size):
    """Values and gradients by weights and input; odd sizes, even kernels."""
    dtype, tolerance = dtype
    with wide(dtype):
      x = normal((2, 7, 9, 3), dtype)
      params = weights((*kernel_size, 3, 5), dtype)
      ours = Conv(5, kernel_size, padding)
      flax = nn.Conv(5, kernel_size, padding=padding)
      got, expected = jax.jit(
        lambda params, x: [
          value_and_gradient(layer.apply, params, x) for layer in (ours, flax)
        ]
      )(params, x)
      self.assertEqual(got[0].dtype, dtype)
      self.assertEqual(got[0].shape, expected[0].shape)
      self.assertLess(relative_error(got, expected), tolerance)

  @parameterized.parameters('float32', 'float64')
  def test_same_parameters_as_flax(self, dtype):
    """Names, shapes, types and, of one key, values."""
    with wide(dtype):
      x = normal((1, 5, 5, 3), dtype)
      ours, flax = (
        jax.jit(layer.init)(jax.random.key(0), x)
        for layer in (Conv(4, (3, 2)), nn.Conv(4, (3, 2), padding='VALID'))
      )
      of = lambda tree: jax.tree.map(lambda leaf: leaf.dtype.name, tree)
      self.assertEqual(of(ours), of(flax))
      jax.tree.map(np.testing.assert_array_equal, ours, flax)

  def test_vmap_over_clients_equals_a_loop(self):
    """Every client has its own weights, values and gradients."""
    conv = Conv(4, (3, 3))
    x = normal((3, 2, 6, 5, 2))
    params = jax.tree.map(
      lambda *leaves: jnp.stack(leaves),
      *(weights((3, 3, 2, 4), seed=10 * c) for c in range(3)),
    )
    both = jax.jit(lambda p, x: value_and_gradient(conv.apply, p, x))
    got = jax.jit(jax.vmap(both))(params, x)
    for c in range(3):
      at = lambda tree: jax.tree.map(lambda leaf: leaf[c], tree)
      self.assertLess(relative_error(at(got), both(at(params), x[c])), 1e-5)

  def test_integers_are_taken_as_numbers(self):
    """Integer inputs give what flax gives; weights are not cut to integers."""
    x = jnp.arange(50).reshape(1, 5, 5, 2)
    conv = Conv(3, (3, 3))
    params = weights((3, 3, 2, 3))
    expected = nn.Conv(3, (3, 3), padding='VALID').apply(params, x)
    self.assertLess(relative_error(conv.apply(params, x), expected), 1e-5)

  def test_patches(self):
    """Every window, flattened in the order of a kernel."""
    x = normal((2, 4, 5, 3))
    got = patches(x, (2, 3))
    self.assertEqual(got.shape, (2, 3, 3, 18))
    for i in range(3):
      for j in range(3):
        np.testing.assert_array_equal(
          got[:, i, j], x[:, i : i + 2, j : j + 3].reshape(2, -1)
        )

  def test_bad_padding(self):
    with self.assertRaisesRegex(InvalidInput, 'VALID, SAME, got padding=same'):
      Conv(2, (3, 3), 'same').init(jax.random.key(0), normal((1, 5, 5, 1)))


class MaxPoolTest(parameterized.TestCase):
  @parameterized.product(
    dtype=DTYPES, case=(((2, 8, 6, 3), 2), ((2, 7, 9, 3), 2), ((2, 7, 9, 3), 3))
  )
  def test_equals_flax(self, dtype, case):
    """Values and gradients where nothing ties; odd borders are cut."""
    (dtype, tolerance), (shape, size) = dtype, case
    with wide(dtype):
      x = normal(shape, dtype)
      ours = lambda x: max_pool(x, size)
      flax = lambda x: nn.max_pool(x, (size, size), (size, size))
      got, expected = jax.jit(
        lambda x: [value_and_gradient(pool, x) for pool in (ours, flax)]
      )(x)
      np.testing.assert_array_equal(got[0], expected[0])
      self.assertLess(relative_error(got, expected), tolerance)

  def test_ties_share_the_gradient(self):
    """A window of equal values spreads its gradient, which sums to 1."""
    x = jnp.zeros((1, 2, 4, 1)).at[0, 0, 2].set(1.0).at[0, 1, 3].set(1.0)
    got = jax.grad(lambda x: max_pool(x).sum())(x)[0, :, :, 0]
    np.testing.assert_array_equal(
      got, [[0.25, 0.25, 0.5, 0], [0.25, 0.25, 0, 0.5]]
    )

  def test_vmap_over_clients_equals_a_loop(self):
    x = normal((3, 2, 5, 4, 2))
    both = jax.jit(lambda x: value_and_gradient(max_pool, x))
    got = jax.jit(jax.vmap(both))(x)
    for c in range(3):
      at = jax.tree.map(lambda leaf: leaf[c], got)
      jax.tree.map(np.testing.assert_array_equal, at, both(x[c]))


class AsFloatImageTest(parameterized.TestCase):
  @parameterized.parameters('uint8', 'int32')
  def test_integers_are_pixels(self, dtype):
    """0..255 becomes 0..1, with a depth axis."""
    x = jnp.arange(256).astype(dtype).reshape(1, 16, 16)
    got = as_float_image(x)
    self.assertEqual((got.dtype, got.shape), (jnp.float32, (1, 16, 16, 1)))
    np.testing.assert_allclose(got.ravel(), np.arange(256) / 255, rtol=1e-6)

  def test_floats_stay(self):
    x = normal((2, 4, 4, 3))
    np.testing.assert_array_equal(as_float_image(x), x)
    np.testing.assert_array_equal(as_float_image(x[..., 0]), x[..., :1])

  def test_64_bit(self):
    """Pixels are as wide as the default float."""
    with x64():
      x = jnp.ones((1, 2, 2, 1), jnp.uint8)
      self.assertEqual(as_float_image(x).dtype, jnp.float64)


if __name__ == '__main__':
  absltest.main()
