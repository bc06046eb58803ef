"""Layers that stay fast under vmap over clients and inside compiled loops.

A native convolution becomes a grouped one under vmap over per-client weights,
and inside a loop XLA:CPU runs it some thirty times slower. Patches and one
matrix product give the same numbers and stay a (batched) matrix product. On CPU
large patches are made a few images at a time, so that they stay in the cache,
and those of one to three channels for the whole batch, places last.

Axis letters: B examples, H height, W width, D features.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_ext.core import validate

Initializer = Callable[..., jax.Array]

NORMS = ('group', 'batch')

# On CPU the patches of one block of images take at most so many bytes: half of
# a core's usual 1 MiB second-level cache.
BLOCK_BYTES = 1 << 19
# On CPU images of at most so many channels have their places last in patches,
# unless those of a batch take more bytes than THIN_BYTES.
THIN = 3
THIN_BYTES = 1 << 26


def patches(
  x: jax.Array, kernel_size: Sequence[int], strides: Sequence[int] = (1, 1)
) -> jax.Array:
  """Every window of an image, flattened: the rows of a convolution.

  Args:
    x: [B, H, W, D].
    kernel_size: (h, w).
    strides: (s, t), the steps between windows.

  Returns:
    [B, (H-h)//s+1, (W-w)//t+1, h*w*D], the order of a kernel [h, w, D, ...].
  """
  return jnp.concatenate(_shifts(x, kernel_size, strides), axis=-1)


def convolution(
  x: jax.Array, kernel: jax.Array, strides: Sequence[int] = (1, 1)
) -> jax.Array:
  """Convolution without padding, as patches times a matrix.

  Args:
    x: [B, H, W, D].
    kernel: [h, w, D, F].
    strides: (s, t), the steps between windows.

  Returns:
    [B, (H-h)//s+1, (W-w)//t+1, F].
  """
  if _is_thin(x, kernel, strides):
    return _convolution_of_thin_images(x, kernel, strides)
  block = _block(x, kernel, strides)
  if block < x.shape[0]:
    return _convolution_in_blocks(x, kernel, tuple(strides), block)
  return patches(x, kernel.shape[:2], strides) @ _matrix(kernel)


def _convolution_of_thin_images(
  x: jax.Array, kernel: jax.Array, strides: Sequence[int]
) -> jax.Array:
  """`convolution` by a product whose long axis, that of places, comes last.

  Patches of few channels are rows of a few numbers, which cost more to make
  than to multiply.
  """
  planes = [
    plane.transpose(3, 0, 1, 2)
    for plane in _shifts(x, kernel.shape[:2], strides)
  ]
  windows = jnp.concatenate(planes)  # [h*w*D, B, H', W']
  y = _matrix(kernel).T @ windows.reshape(len(windows), -1)  # [F, B*H'*W']
  return y.reshape(len(y), *windows.shape[1:]).transpose(1, 2, 3, 0)


def _matrix(kernel: jax.Array) -> jax.Array:
  return kernel.reshape(-1, kernel.shape[-1])


def _is_thin(x: jax.Array, kernel: jax.Array, strides: Sequence[int]) -> bool:
  """Whether to convolve with the places last."""
  return (
    jax.default_backend() == 'cpu'
    and x.shape[-1] <= THIN
    and x.shape[0] * _patch_bytes(x, kernel, strides) <= THIN_BYTES
  )


def _patch_bytes(
  x: jax.Array, kernel: jax.Array, strides: Sequence[int]
) -> int:
  """Bytes of the patches of one image."""
  windows = math.prod(
    (length - size) // stride + 1
    for length, size, stride in zip(
      x.shape[1:3], kernel.shape[:2], strides, strict=True
    )
  )
  return windows * math.prod(kernel.shape[:3]) * x.dtype.itemsize


def _block(x: jax.Array, kernel: jax.Array, strides: Sequence[int]) -> int:
  """How many images to convolve at a time: a divisor of B, B off the CPU."""
  batch = x.shape[0]
  if jax.default_backend() != 'cpu' or not batch:
    return batch
  fits = max(BLOCK_BYTES / max(_patch_bytes(x, kernel, strides), 1), 1)
  return max(b for b in range(1, batch + 1) if not batch % b and b <= fits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolution_in_blocks(
  x: jax.Array, kernel: jax.Array, strides: tuple[int, int], block: int
) -> jax.Array:
  """`convolution` of `block` images at a time.

  The gradient makes the patches again instead of keeping them: a whole batch of
  them is far larger than a cache. Forward mode is not defined.
  """
  matrix = _matrix(kernel)
  one = lambda images: patches(images, kernel.shape[:2], strides) @ matrix
  y = jax.lax.map(one, x.reshape(-1, block, *x.shape[1:]))
  return y.reshape(x.shape[0], *y.shape[2:])


def _forward(x, kernel, strides, block):
  return _convolution_in_blocks(x, kernel, strides, block), (x, kernel)


def _backward(strides, block, kept, d_y):
  x, kernel = kept
  matrix = _matrix(kernel)
  transposed = matrix.T
  # Sums over blocks are kept in float32, as inside one matrix product.
  wide = jnp.promote_types(kernel.dtype, jnp.float32)

  def step(d_matrix, inputs):
    images, d_out = inputs
    windows, to_images = jax.vjp(
      lambda z: patches(z, kernel.shape[:2], strides), images
    )
    d_out = d_out.reshape(-1, matrix.shape[1])
    # Transposed, this product is a fifth faster on CPU.
    part = jnp.matmul(
      d_out.T,
      windows.reshape(-1, matrix.shape[0]),
      preferred_element_type=wide,
    )
    d_windows = (d_out @ transposed).reshape(windows.shape)
    (d_images,) = to_images(d_windows.astype(windows.dtype))
    return d_matrix + part, d_images

  split = lambda z: z.reshape(-1, block, *z.shape[1:])
  zeros = jnp.zeros(transposed.shape, wide)
  d_matrix, d_x = jax.lax.scan(step, zeros, (split(x), split(d_y)))
  return (
    d_x.reshape(x.shape),
    d_matrix.T.reshape(kernel.shape).astype(kernel.dtype),
  )


_convolution_in_blocks.defvjp(_forward, _backward)


class Conv(nn.Module):
  """`flax.linen.Conv` as patches and a matrix product.

  Same parameters: `kernel` [h, w, D, features] and `bias` [features].

  Attributes:
    features: output channels.
    kernel_size: (h, w).
    padding: 'VALID' or 'SAME'.
    strides: (s, t), the steps between windows.
    use_bias: whether to add a bias.
    kernel_init: draws the kernel.
  """

  features: int
  kernel_size: Sequence[int]
  padding: str = 'VALID'
  strides: Sequence[int] = (1, 1)
  use_bias: bool = True
  kernel_init: Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, D] to [B, H', W', features]."""
    validate.one_of('padding', self.padding, ('VALID', 'SAME'))
    validate.at_least('strides', min(self.strides), 1)
    kernel = self.param(
      'kernel',
      self.kernel_init,
      (*self.kernel_size, x.shape[-1], self.features),
      jnp.float32,
    )
    bias = None
    if self.use_bias:
      zeros = nn.initializers.zeros_init()
      bias = self.param('bias', zeros, (self.features,), jnp.float32)
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
    if self.padding == 'SAME':
      x = _pad_same(x, self.kernel_size, self.strides, 0)
    y = convolution(x, kernel, self.strides)
    return y if bias is None else y + bias


class GroupNorm(nn.Module):
  """`flax.linen.GroupNorm`, each example normalised on its own.

    y = scale (x - mean) / sqrt(var + epsilon) + bias

  with mean and variance over all places and one group's channels. Same
  parameters, `scale` and `bias` [D], and the same numbers; rows of an image
  are summed before columns and groups, and centre and bias are one addend,
  which takes 0.62 of the time of evaluating a small CNN with flax's layer and
  0.85 of that of training it (XLA:CPU, benchmarks/group_norm.py).

  Wu and He, "Group normalization", 2018, https://arxiv.org/abs/1803.08494.

  Attributes:
    groups: a divisor of D.
    epsilon: added to the variance.
  """

  groups: int
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises [B, ..., D]; statistics are at least of float32."""
    depth = x.shape[-1]
    a_group = depth // self.groups
    ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
    scale = self.param('scale', ones, (depth,), jnp.float32)
    bias = self.param('bias', zeros, (depth,), jnp.float32)
    dtype = jnp.result_type(x, scale, bias)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # Rows of all channels of all columns: long runs, in which XLA:CPU uses
    # vectors; a run of D channels is too short for them.
    columns = x.shape[-2] if x.ndim > 2 else 1
    rows = wide.reshape(x.shape[0], math.prod(x.shape[1:-2]), columns * depth)
    size = a_group * rows.shape[1] * columns

    def mean(z: jax.Array) -> jax.Array:
      sums = z.sum(1).reshape(-1, columns, depth).sum(1)
      sums = sums.reshape(-1, self.groups, a_group).sum(-1)
      return jnp.repeat(sums, a_group, axis=-1) / size

    def of_rows(z: jax.Array) -> jax.Array:
      """[B, D] for every column; the barrier keeps it out of inner loops."""
      return jax.lax.optimization_barrier(jnp.tile(z, (1, columns)))[:, None]

    centre = mean(rows)
    variance = jnp.maximum(mean(jnp.square(rows)) - jnp.square(centre), 0)
    factor = jax.lax.rsqrt(variance + self.epsilon) * scale
    rows = rows * of_rows(factor) + of_rows(bias - centre * factor)
    return rows.reshape(x.shape).astype(dtype)


class Norm(nn.Module):
  """Group or batch normalisation, chosen by name.

  'group': `GroupNorm`, each example on its own.
  'batch': flax.linen.BatchNorm with momentum 0.9. Ioffe and Szegedy, "Batch
  normalization", 2015, https://arxiv.org/abs/1502.03167. In training the
  statistics are of the examples in the mask; if there is none they are of the
  whole batch, so that an empty step gives no NaN.

  Attributes:
    norm: 'group' or 'batch'.
    groups: for 'group', at most this many; layers whose channels it does not
      divide use the greatest common divisor.
  """

  norm: str = 'group'
  groups: int = 32

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Normalises [B, ..., D] over the examples in the mask, bool [B]."""
    validate.one_of('norm', self.norm, NORMS)
    if self.norm == 'group':
      validate.at_least('groups', self.groups, 1)
      groups = math.gcd(self.groups, x.shape[-1])
      return GroupNorm(groups)(x)
    if mask is not None:
      mask = mask | ~mask.any()
      mask = mask.reshape(-1, *[1] * (x.ndim - 1))
    return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5)(x, mask=mask)


def classify(
  x: jax.Array, num_classes: int, name: str | None = None
) -> jax.Array:
  """A dense layer from features [B, D] to logits [B, Y]; Y = 0 leaves them.

  Call it inside of a module's compact method.
  """
  return nn.Dense(num_classes, name=name)(x) if num_classes else x


def max_pool(x: jax.Array, size: int = 2) -> jax.Array:
  """Non-overlapping max-pool [B, H, W, D] -> [B, H//size, W//size, D].

  As `flax.linen.max_pool` with VALID padding: rows and columns that do not fill
  a window are cut, and of equal values the first gets the gradient.
  """
  batch, height, width, depth = x.shape
  rows, columns = height // size, width // size
  x = x[:, : rows * size, : columns * size]
  x = x.reshape(batch, rows, size, columns, size, depth)
  x = _largest([x[:, :, :, :, j] for j in range(size)])
  return _largest([x[:, :, i] for i in range(size)])


def overlapping_max_pool(
  x: jax.Array, size: int = 3, stride: int = 2
) -> jax.Array:
  """Max-pool of windows that overlap, as `flax.linen.max_pool` with SAME.

  [B, H, W, D] -> [B, ceil(H/stride), ceil(W/stride), D]; of equal values the
  first gets the gradient.
  """
  window, strides = (size, size), (stride, stride)
  return _largest(
    _shifts(_pad_same(x, window, strides, -jnp.inf), window, strides)
  )


def as_float(x: jax.Array) -> jax.Array:
  """Integers [B, ...] are pixels: divided by 255. Floats stay as they are."""
  if jnp.issubdtype(x.dtype, jnp.integer):
    return x.astype(jnp.result_type(float)) / 255
  return x


def as_float_image(x: jax.Array) -> jax.Array:
  """Images [B, H, W] or [B, H, W, D] as floats [B, H, W, D]; see `as_float`."""
  x = as_float(x)
  return x[..., None] if x.ndim == 3 else x


def _shifts(
  x: jax.Array, size: Sequence[int], strides: Sequence[int]
) -> list[jax.Array]:
  """The (i, j)-th entry of every window, [B, H', W', D], for every i, j."""
  ends = [x.shape[1] - size[0] + 1, x.shape[2] - size[1] + 1]
  return [
    x[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
    for i in range(size[0])
    for j in range(size[1])
  ]


def _largest(arrays: Sequence[jax.Array]) -> jax.Array:
  """Elementwise maximum of arrays [...]; NaN wins, then the first.

  Not `jnp.max`: its gradient divides by the number of values that equal the
  maximum, and where XLA rounds a value otherwise in the comparison than in the
  maximum, none does: 0 / 0. A choice cannot fail so.
  """
  return functools.reduce(
    lambda a, b: jnp.where((a >= b) | jnp.isnan(a), a, b), arrays
  )


def _pad_same(
  x: jax.Array, size: Sequence[int], strides: Sequence[int], value: float
) -> jax.Array:
  """Pads [B, H, W, D] so that ceil(H/stride) windows fit, as SAME does."""
  around = [(0, 0)]
  for length, window, stride in zip(x.shape[1:3], size, strides, strict=True):
    windows = -(-length // stride)
    total = max((windows - 1) * stride + window - length, 0)
    around.append((total // 2, total - total // 2))
  return jnp.pad(x, (*around, (0, 0)), constant_values=value)
