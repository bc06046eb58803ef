"""Layers: equal to flax's own in values, gradients and parameters."""

from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen as nn

from fedjax_ext.core import InvalidInput
from fedjax_ext.models import (
  Conv,
  GroupNormCNN,
  Norm,
  as_float_image,
  convolution,
  from_module,
  layers,
  max_pool,
  overlapping_max_pool,
  patches,
)
from tests.models.checks import (
  DTYPES,
  normal,
  quick_jit,
  value_and_gradient,
  wide,
)
from tests.problems import is_finite, relative_error, x64


def weights(shape, dtype='float32', seed=2):
  """Parameters of a convolution, drawn with numpy."""
  params = {
    'kernel': normal(shape, dtype, seed),
    'bias': normal(shape[-1:], dtype, seed + 1),
  }
  return {'params': params}


class ConvTest(parameterized.TestCase):
  @parameterized.product(
    dtype=DTYPES,
    padding=('VALID', 'SAME'),
    case=(
      # kernel_size, strides, use_bias
      ((4, 1), (1, 1), True),
      ((3, 3), (2, 2), False),
      ((5, 2), (2, 3), True),
    ),
  )
  def test_equals_flax(self, dtype, padding, case):
    """Values and gradients by weights and input; odd sizes, even kernels."""
    (dtype, tolerance), (kernel_size, strides, use_bias) = dtype, case
    with wide(dtype):
      x = normal((2, 7, 10, 3), dtype)
      params = weights((*kernel_size, 3, 5), dtype)
      if not use_bias:
        del params['params']['bias']
      ours = Conv(5, kernel_size, padding, strides, use_bias)
      flax = nn.Conv(
        5, kernel_size, strides, padding=padding, use_bias=use_bias
      )
      got, expected = quick_jit(
        lambda params, x: [
          value_and_gradient(layer.apply, params, x) for layer in (ours, flax)
        ]
      )(params, x)
      self.assertEqual(got[0].dtype, dtype)
      self.assertEqual(got[0].shape, expected[0].shape)
      self.assertLess(relative_error(got, expected), tolerance)

  @parameterized.product(size=(1, 4, 5), stride=(1, 2, 3), kernel=(1, 7))
  def test_same_has_the_shape_of_flax(self, size, stride, kernel):
    """ceil(H/s) windows, also where the stride passes over the end."""
    ours = Conv(2, (kernel, kernel), 'SAME', (stride, stride))
    got = jax.eval_shape(
      lambda: ours.init_with_output(
        jax.random.key(0), jnp.zeros((1, size, size, 1))
      )[0]
    )
    self.assertEqual(got.shape, (1, -(-size // stride), -(-size // stride), 2))

  def test_initialiser(self):
    """The kernel is drawn as asked; without a bias there is none."""
    x, init = normal((1, 5, 5, 3)), nn.initializers.he_normal()
    ours = Conv(4, (3, 2), use_bias=False, kernel_init=init)
    flax = nn.Conv(4, (3, 2), use_bias=False, kernel_init=init)
    drawn = quick_jit(lambda key: [conv.init(key, x) for conv in (ours, flax)])
    jax.tree.map(np.testing.assert_array_equal, *drawn(jax.random.key(0)))

  @parameterized.parameters('float32', 'float64')
  def test_same_parameters_as_flax(self, dtype):
    """Names, shapes, types and, of one key, values."""
    with wide(dtype):
      x = normal((1, 5, 5, 3), dtype)
      ours, flax = (
        quick_jit(layer.init)(jax.random.key(0), x)
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
    both = quick_jit(lambda p, x: value_and_gradient(conv.apply, p, x))
    got = jax.vmap(both)(params, x)
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

  def test_patches_with_strides(self):
    """Every second row and third column of the windows."""
    x = normal((2, 7, 8, 3))
    np.testing.assert_array_equal(
      patches(x, (2, 3), (2, 3)), patches(x, (2, 3))[:, ::2, ::3]
    )

  @parameterized.parameters(
    ({'padding': 'same'}, 'VALID, SAME, got padding=same'),
    ({'strides': (1, 0)}, 'got strides=0'),
  )
  def test_bad_settings(self, settings, message):
    with self.assertRaisesRegex(InvalidInput, message):
      Conv(2, (3, 3), **settings).init(jax.random.key(0), normal((1, 5, 5, 1)))


class ThinTest(parameterized.TestCase):
  """Convolutions of images of a few channels, with the places last."""

  def both_ways(self, function, *args):
    """The function of thin images, and as it is of others."""
    with mock.patch.object(layers, 'THIN', 0):
      expected = function(*args)
    return function(*args), expected

  @parameterized.product(channels=(1, 3), strides=((1, 1), (2, 1)))
  def test_equals_patches(self, channels, strides):
    """Values, gradients and gradients of gradients."""
    with x64():
      x = normal((5, 6, 7, channels), 'float64')
      kernel = normal((3, 2, channels, 4), 'float64', 5)

      def loss(x, kernel):
        return jnp.sum(jnp.sin(convolution(x, kernel, strides)))

      def second(x, kernel):
        return jnp.sum(jax.grad(loss)(x, kernel) ** 2)

      for function in (
        lambda x, kernel: convolution(x, kernel, strides),
        jax.grad(loss, (0, 1)),
        jax.grad(second, (0, 1)),
      ):
        got, expected = self.both_ways(function, x, kernel)
        self.assertLess(relative_error(got, expected), 1e-12)
      steps = str(jax.make_jaxpr(loss)(x, kernel))
      self.assertIn('transpose', steps)
      thick = jnp.repeat(x, 4, 3), jnp.repeat(kernel, 4, 2)
      self.assertNotIn('transpose', str(jax.make_jaxpr(loss)(*thick)))

  def test_no_images(self):
    y = convolution(jnp.zeros((0, 6, 7, 1)), jnp.ones((3, 2, 1, 4)))
    self.assertEqual(y.shape, (0, 4, 6, 4))

  def test_many_patches_are_made_in_blocks(self):
    x, kernel = normal((4, 6, 7, 3)), normal((3, 2, 3, 4), seed=5)
    steps = lambda: str(jax.make_jaxpr(lambda *a: convolution(*a))(x, kernel))
    patch_bytes = 4 * 4 * 6 * 3 * 2 * 3 * 4
    with mock.patch.object(layers, 'THIN_BYTES', patch_bytes):
      self.assertIn('transpose', steps())
    with mock.patch.object(layers, 'THIN_BYTES', patch_bytes - 1):
      self.assertNotIn('transpose', steps())

  def test_lanes(self):
    """Under vmap over clients' kernels."""
    x, kernels = normal((2, 5, 6, 1)), normal((3, 2, 2, 1, 4), seed=5)
    values = jax.vmap(lambda kernel: convolution(x, kernel))
    got, expected = self.both_ways(values, kernels)
    self.assertLess(relative_error(got, expected), 1e-6)


class TapsTest(absltest.TestCase):
  """What lies between a block's relu and its pool."""

  def test_shifts_alone_are_added_to_relus(self):
    module = GroupNormCNN(3, (4, 8), 2)
    x = normal((2, 8, 8, 1))
    params = module.init(jax.random.key(0), x)['params']
    shifts = module.init(jax.random.key(0), x)['shifts']
    apply = lambda s: module.apply({'params': params, 'shifts': s}, x)
    np.testing.assert_allclose(
      apply(shifts), module.apply({'params': params}, x), rtol=1e-5
    )
    shifted = jax.tree.map(lambda s: s + 1, shifts)
    self.assertGreater(jnp.abs(apply(shifted) - apply(shifts)).max(), 0.1)

  def test_who_taps_sees_relus(self):
    model = from_module(GroupNormCNN(3, (4, 8), 2), (8, 8, 1))
    params = model.init(jax.random.key(0))
    x = normal((2, 8, 8, 1))
    logits, (first, second) = model.tapped(params, x, None)
    self.assertEqual((first.shape, second.shape), ((2, 8, 8, 4), (2, 4, 4, 8)))
    self.assertEqual(float(first.min()), 0)
    np.testing.assert_allclose(logits, model.apply(params, x), rtol=1e-5)


class BlocksTest(parameterized.TestCase):
  """Convolutions a few images at a time, as large ones run on CPU."""

  def case(self, dtype='float64', batch=6, strides=(1, 1)):
    x = normal((batch, 6, 7, 4), dtype)
    kernel = normal((3, 2, 4, 4), dtype, 5)
    return x, kernel, strides

  def in_blocks(self, images: int, function: Callable, rows: int = 4):
    """The same function while `images` images' patches fill a block."""
    bytes_of_one = rows * 6 * 3 * 2 * 4 * 8

    def run(*args):
      with mock.patch.object(layers, 'BLOCK_BYTES', images * bytes_of_one):
        return function(*args)

    return run

  @parameterized.product(
    images=(1, 2, 3, 4), strides=((1, 1), (2, 1)), batch=(6, 5)
  )
  def test_equals_the_whole_batch(self, images, strides, batch):
    """Values and gradients; 4 of 6 images and 2 of 5 leave divisors."""
    with x64():
      x, kernel, strides = self.case(batch=batch, strides=strides)

      def loss(x, kernel):
        return jnp.sum(jnp.sin(convolution(x, kernel, strides)))

      both = jax.value_and_grad(loss, (0, 1))
      expected = both(x, kernel)
      rows = 4 if strides == (1, 1) else 2
      blocks = self.in_blocks(images, both, rows)
      steps = str(jax.make_jaxpr(blocks)(x, kernel))
      self.assertIn('scan', steps)
      got = blocks(x, kernel)
      self.assertLess(relative_error(got, expected), 1e-12)
      whole = self.in_blocks(batch, both)
      self.assertNotIn('scan', str(jax.make_jaxpr(whole)(x, kernel)))

  def test_second_order(self):
    """The gradient of a gradient's norm, as distillation of maps takes it."""
    with x64():
      x, kernel, _ = self.case()

      def norm(x, kernel):
        first = jax.grad(lambda z: jnp.sum(jnp.sin(convolution(z, kernel))))
        return jnp.sum(first(x) ** 2)

      second = jax.grad(norm, (0, 1))
      got = self.in_blocks(2, second)(x, kernel)
      self.assertLess(relative_error(got, second(x, kernel)), 1e-11)

  def test_lanes(self):
    """Under vmap over clients' kernels."""
    with x64():
      x, kernel, _ = self.case()
      kernels = jnp.stack([kernel, 2 * kernel])
      loss = lambda k: jnp.sum(jnp.sin(convolution(x, k)))
      got = self.in_blocks(2, jax.vmap(jax.grad(loss)))(kernels)
      expected = jnp.stack([jax.grad(loss)(k) for k in kernels])
      self.assertLess(relative_error(got, expected), 1e-12)

  def test_images_of_another_type(self):
    x, kernel, _ = self.case('float32')
    loss = lambda x, k: jnp.sum(convolution(x, k))
    x = x.astype(jnp.bfloat16)
    got = self.in_blocks(1, jax.grad(loss, (0, 1)))(x, kernel)
    expected = jax.grad(loss, (0, 1))(x, kernel)
    self.assertEqual([g.dtype for g in got], [e.dtype for e in expected])
    self.assertLess(relative_error(got[1], expected[1]), 1e-2)

  def test_bfloat16_sums_in_float32(self):
    """Blocks lose no more than one product of all images does."""
    x, kernel, _ = self.case('float32', batch=64)
    half = lambda z: z.astype(jnp.bfloat16)
    loss = lambda k, x: jnp.sum(convolution(x, k).astype(jnp.float32) ** 2)
    exact = jax.grad(loss)(kernel, x)
    whole = jax.grad(loss)(half(kernel), half(x)).astype(jnp.float32)
    blocks = self.in_blocks(1, jax.grad(loss))(half(kernel), half(x))
    self.assertEqual(blocks.dtype, jnp.bfloat16)
    self.assertLess(
      relative_error(blocks.astype(jnp.float32), exact),
      1.5 * relative_error(whole, exact),
    )


class NormTest(parameterized.TestCase):
  @parameterized.parameters((8, 4, 4), (8, 32, 8), (6, 4, 2), (7, 32, 1))
  def test_group_equals_flax(self, channels, groups, expected):
    """Groups are at most those asked, and divide the channels."""
    with x64():
      x = normal((3, 4, 5, channels), 'float64')
      params = {
        'scale': normal((channels,), 'float64', 1),
        'bias': normal((channels,), 'float64', 2),
      }
      ours = lambda params, x: Norm('group', groups).apply(
        {'params': {'GroupNorm_0': params}}, x
      )
      flax = lambda params, x: nn.GroupNorm(expected, epsilon=1e-5).apply(
        {'params': params}, x
      )
      got, wanted = quick_jit(
        lambda *args: [value_and_gradient(f, *args) for f in (ours, flax)]
      )(params, x)
      self.assertLess(relative_error(got, wanted), 1e-9)

  @parameterized.product(
    shape=((5, 8), (5, 6, 8), (2, 3, 4, 5, 8), (0, 4, 5, 8)),
    dtype=('float32', 'bfloat16'),
  )
  def test_group_of_any_rank(self, shape, dtype):
    """Also far from 0, where variances lose digits, and of nothing."""
    x = (normal(shape) * 0.5 + 20).astype(dtype)
    params = {'scale': normal((8,), seed=1), 'bias': normal((8,), seed=2)}
    got = layers.GroupNorm(2).apply({'params': params}, x)
    flax = nn.GroupNorm(2, epsilon=1e-5).apply({'params': params}, x)
    self.assertEqual((got.shape, got.dtype), (flax.shape, flax.dtype))
    if x.size:
      exact = nn.GroupNorm(2, epsilon=1e-5, use_fast_variance=False)
      exact = exact.apply({'params': params}, x)
      ours, theirs = (relative_error(y, exact) for y in (got, flax))
      # Ours rounds mean / deviation, some 40 here, once more.
      self.assertLess(ours, 2 * theirs + 100 * np.finfo(np.float32).eps)

  @parameterized.parameters(((6, 3, 2, 4),), ((6, 4),))
  def test_batch_by_hand(self, shape):
    """Mean and variance of the rows in the mask; momentum 0.9."""
    with x64():
      rng = np.random.default_rng(0)
      x, mask = normal(shape, 'float64'), np.array([1, 0, 1, 1, 0, 1], bool)
      params = {'scale': rng.normal(size=4), 'bias': rng.normal(size=4)}
      stats = {'mean': rng.normal(size=4), 'var': rng.uniform(1, 2, 4)}
      variables = {
        'params': {'BatchNorm_0': params},
        'batch_stats': {'BatchNorm_0': stats},
      }
      got, updated = Norm('batch').apply(
        variables, x, True, jnp.asarray(mask), mutable=['batch_stats']
      )
      real = np.asarray(x)[mask].reshape(-1, 4)
      mean, var = real.mean(0), real.var(0)
      affine = lambda x, mean, var: (
        (x - mean) / np.sqrt(var + 1e-5) * params['scale'] + params['bias']
      )
      np.testing.assert_allclose(got, affine(x, mean, var), rtol=1e-9)
      updated = updated['batch_stats']['BatchNorm_0']
      np.testing.assert_allclose(
        updated['mean'], 0.9 * stats['mean'] + 0.1 * mean, rtol=1e-9
      )
      np.testing.assert_allclose(
        updated['var'], 0.9 * stats['var'] + 0.1 * var, rtol=1e-9
      )
      # In evaluation the moving statistics count, and no mask.
      np.testing.assert_allclose(
        Norm('batch').apply(variables, x),
        affine(x, stats['mean'], stats['var']),
        rtol=1e-9,
      )

  @parameterized.parameters(((6, 3, 2, 4),), ((6, 4),))
  def test_batch_equals_flax(self, shape):
    """Values and gradients of the real rows alone, whatever the others hold."""
    with x64():
      x, mask = normal(shape, 'float64'), np.array([1, 0, 1, 1, 0, 1], bool)
      x = x.at[~mask].mul(1e6)
      params = {
        'scale': normal((4,), 'float64', 1),
        'bias': normal((4,), 'float64', 2),
      }
      stats = {'mean': jnp.zeros(4), 'var': jnp.ones(4)}

      def ours(params, x):
        variables = {
          'params': {'BatchNorm_0': params},
          'batch_stats': {'BatchNorm_0': stats},
        }
        y, _ = Norm('batch').apply(
          variables, x, True, jnp.asarray(mask), mutable=['batch_stats']
        )
        return y[mask]

      def flax(params, x):
        layer = nn.BatchNorm(use_running_average=False, epsilon=1e-5)
        variables = {'params': params, 'batch_stats': stats}
        return layer.apply(variables, x[mask], mutable=['batch_stats'])[0]

      got, wanted = quick_jit(
        lambda *args: [value_and_gradient(f, *args) for f in (ours, flax)]
      )(params, x)
      self.assertLess(relative_error(got, wanted), 1e-9)
      np.testing.assert_array_equal(got[1][1][~mask], 0)

  def test_batch_without_examples(self):
    """A mask without any example gives finite values and gradients."""
    norm, x, none = Norm('batch'), normal((3, 2, 2, 4)), jnp.zeros(3, bool)
    variables = norm.init(jax.random.key(0), x)
    apply = lambda x: norm.apply(
      variables, x, True, none, mutable=['batch_stats']
    )
    grad = jax.grad(lambda x: (apply(x)[0] ** 2).sum())
    self.assertTrue(is_finite(quick_jit(lambda x: (apply(x), grad(x)))(x)))

  @parameterized.parameters('group', 'batch')
  def test_vmap_over_clients_equals_a_loop(self, name):
    norm, x = Norm(name, 2), normal((3, 5, 4, 4, 6))
    variables = norm.init(jax.random.key(0), x[0])
    mask = jnp.asarray(np.random.default_rng(0).random((3, 5)) < 0.5)
    apply = quick_jit(
      lambda x, mask: norm.apply(
        variables, x, True, mask, mutable=['batch_stats']
      )
    )
    got = jax.vmap(apply)(x, mask)
    for c in range(3):
      at = jax.tree.map(lambda leaf: leaf[c], got)
      self.assertLess(relative_error(at, apply(x[c], mask[c])), 1e-5)

  @parameterized.parameters(
    ({'norm': 'layer'}, 'group, batch, got norm=layer'),
    ({'groups': 0}, 'got groups=0'),
  )
  def test_bad_settings(self, settings, message):
    with self.assertRaisesRegex(InvalidInput, message):
      Norm(**settings).init(jax.random.key(0), normal((1, 5, 5, 1)))


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
      got, expected = quick_jit(
        lambda x: [value_and_gradient(pool, x) for pool in (ours, flax)]
      )(x)
      np.testing.assert_array_equal(got[0], expected[0])
      self.assertLess(relative_error(got, expected), tolerance)

  def test_ties(self):
    """Of equal values the first gets the gradient, as in flax."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, 6, 9, 3)))
    x = x.astype(jnp.float32)
    for size in (2, 3):
      flax = lambda x: nn.max_pool(x, (size, size), (size, size))
      ours = lambda x: max_pool(x, size)
      got, expected = quick_jit(
        lambda x: [value_and_gradient(pool, x) for pool in (ours, flax)]
      )(x)
      jax.tree.map(np.testing.assert_array_equal, got, expected)

  def test_nan(self):
    """Not-a-number anywhere in a window is what comes out."""
    x = jnp.zeros((1, 2, 8, 1))
    for i in range(4):
      x = x.at[0, i // 2, 2 * i + i % 2, 0].set(jnp.nan)
    self.assertTrue(jnp.isnan(max_pool(x)).all())

  def test_vmap_over_clients_equals_a_loop(self):
    x = normal((3, 2, 5, 4, 2))
    both = quick_jit(lambda x: value_and_gradient(max_pool, x))
    got = jax.vmap(both)(x)
    for c in range(3):
      at = jax.tree.map(lambda leaf: leaf[c], got)
      jax.tree.map(np.testing.assert_array_equal, at, both(x[c]))


class OverlappingMaxPoolTest(parameterized.TestCase):
  @parameterized.parameters(
    ((2, 8, 6, 3), 3, 2), ((2, 7, 9, 3), 3, 2), ((2, 7, 8, 3), 2, 1)
  )
  def test_equals_flax(self, shape, size, stride):
    """Values and gradients where nothing ties, with SAME padding."""
    with x64():
      x = normal(shape, 'float64') - 3  # below zero: padding must not win
      ours = lambda x: overlapping_max_pool(x, size, stride)
      flax = lambda x: nn.max_pool(
        x, (size, size), (stride, stride), padding='SAME'
      )
      got, expected = quick_jit(
        lambda x: [value_and_gradient(pool, x) for pool in (ours, flax)]
      )(x)
      np.testing.assert_array_equal(got[0], expected[0])
      self.assertLess(relative_error(got, expected), 1e-9)

  def test_ties(self):
    """Of equal values the first gets the gradient, as in flax."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, 6, 9, 3)))
    x = x.astype(jnp.float32)
    flax = lambda x: nn.max_pool(x, (3, 3), (2, 2), padding='SAME')
    got, expected = quick_jit(
      lambda x: [
        value_and_gradient(pool, x) for pool in (overlapping_max_pool, flax)
      ]
    )(x)
    self.assertLess(relative_error(got, expected), 1e-6)


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
