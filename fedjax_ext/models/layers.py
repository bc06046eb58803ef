"""Layers that stay fast under vmap over clients and inside compiled loops.

A native convolution becomes a grouped one under vmap over per-client weights,
and inside a loop XLA:CPU runs it some thirty times slower. Patches and one
matrix product give the same numbers and stay a (batched) matrix product.

Axis letters: B examples, H height, W width, D features.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_ext.core import validate


def patches(x: jax.Array, kernel_size: Sequence[int]) -> jax.Array:
  """Every window of an image, flattened: the rows of a convolution.

  Args:
    x: [B, H, W, D].
    kernel_size: (h, w).

  Returns:
    [B, H-h+1, W-w+1, h*w*D], the order of a kernel [h, w, D, ...].
  """
  height, width = kernel_size
  rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
  return jnp.concatenate(
    [
      x[:, i : i + rows, j : j + columns]
      for i in range(height)
      for j in range(width)
    ],
    axis=-1,
  )


class Conv(nn.Module):
  """`flax.linen.Conv` with stride 1, as patches and a matrix product.

  Same parameters: `kernel` [h, w, D, features] and `bias` [features].

  Attributes:
    features: output channels.
    kernel_size: (h, w).
    padding: 'VALID' or 'SAME'.
  """

  features: int
  kernel_size: Sequence[int]
  padding: str = 'VALID'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, D] to [B, H', W', features]."""
    validate.one_of('padding', self.padding, ('VALID', 'SAME'))
    height, width = self.kernel_size
    kernel = self.param(
      'kernel',
      nn.initializers.lecun_normal(),
      (height, width, x.shape[-1], self.features),
      jnp.float32,
    )
    bias = self.param(
      'bias', nn.initializers.zeros_init(), (self.features,), jnp.float32
    )
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
    if self.padding == 'SAME':
      around = [((s - 1) // 2, s // 2) for s in (height, width)]
      x = jnp.pad(x, ((0, 0), *around, (0, 0)))
    windows = patches(x, self.kernel_size)
    return windows @ kernel.reshape(-1, self.features) + bias


def max_pool(x: jax.Array, size: int = 2) -> jax.Array:
  """Non-overlapping max-pool [B, H, W, D] -> [B, H//size, W//size, D].

  A reshape and a maximum; rows and columns that do not fill a window are cut,
  as `flax.linen.max_pool` with VALID padding does. Where values tie (such as
  zeros after relu), the gradient is shared among them.
  """
  batch, height, width, depth = x.shape
  rows, columns = height // size, width // size
  x = x[:, : rows * size, : columns * size]
  x = x.reshape(batch, rows, size, columns, size, depth)
  return x.max((2, 4))


def as_float_image(x: jax.Array) -> jax.Array:
  """Images [B, H, W] or [B, H, W, D] as floats [B, H, W, D].

  Integers are pixel values: they are divided by 255, so data stay compact on
  the device. Floats are taken as they are.
  """
  if jnp.issubdtype(x.dtype, jnp.integer):
    x = x.astype(jnp.result_type(float)) / 255
  return x[..., None] if x.ndim == 3 else x
