"""Image preprocessing inside the compiled client step.

Columns stay on the device as they are stored, as uint8 say, and a batch is
cropped, flipped and made floating when it is used: a quarter of the memory of
floats, and fresh augmentation at every step.

A step is a function (key, image [B, H, W, D]) -> image; in evaluation the key
is None and random steps do what is usual there. `chain` makes one of several.
Every example draws by itself, so masked ones change nothing for the others.

Axis letters: B examples, H height, W width, D features.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_ext.core import validate

Preprocess = Callable[[jax.Array | None, jax.Array], jax.Array]


def chain(*steps: Preprocess) -> Preprocess:
  """One preprocessing function of several, each with a key of its own.

  It takes images [B, H, W] or [B, H, W, D] and hands on [B, H, W, D].
  """

  def preprocess(key: jax.Array | None, image: jax.Array) -> jax.Array:
    image = image[..., None] if image.ndim == 3 else image
    for i, step in enumerate(steps):
      mine = None if key is None else jax.random.fold_in(key, i)
      image = step(mine, image)
    return image

  return preprocess


def random_crop(*, padding: int = 4, size: int = 0) -> Preprocess:
  """Pads with zeros, then cuts a window at a random place of each image.

  He et al., "Deep residual learning for image recognition", 2016, section 4.2
  (padding 4, size 32), https://arxiv.org/abs/1512.03385. In evaluation: the
  window in the middle, without padding.

  Args:
    padding: pixels of zeros on each side.
    size: side of the window; 0 keeps the image's own height and width.
  """
  validate.at_least('padding', padding, 0)
  validate.at_least('size', size, 0)

  def step(key: jax.Array | None, image: jax.Array) -> jax.Array:
    batch, height, width, depth = image.shape
    rows, columns = size or height, size or width
    validate.check(
      rows <= height + 2 * padding and columns <= width + 2 * padding,
      f'Expected size <= {min(height, width) + 2 * padding} for images of '
      f'{height}x{width} with padding={padding}, got size={size}.',
    )
    border = (padding, padding)
    if key is None:
      # Without padding, unless the window is larger than the image.
      border = (max(rows - height, 0), max(columns - width, 0))
      image = jnp.pad(
        image, ((0, 0), (border[0],) * 2, (border[1],) * 2, (0, 0))
      )
      top, left = (image.shape[1] - rows) // 2, (image.shape[2] - columns) // 2
      return image[:, top : top + rows, left : left + columns]
    image = jnp.pad(image, ((0, 0), border, border, (0, 0)))
    free = (image.shape[1] - rows + 1, image.shape[2] - columns + 1)
    start = jax.random.randint(key, (batch, 2), 0, jnp.array(free))
    cut = lambda x, at: jax.lax.dynamic_slice(
      x, (at[0], at[1], 0), (rows, columns, depth)
    )
    return jax.vmap(cut)(image, start)

  return step


def random_flip() -> Preprocess:
  """Mirrors each image left to right with probability 1/2, in training."""

  def step(key: jax.Array | None, image: jax.Array) -> jax.Array:
    if key is None:
      return image
    flipped = jax.random.bernoulli(key, shape=(len(image),))
    return jnp.where(flipped[:, None, None, None], image[:, :, ::-1], image)

  return step


def standardise() -> Preprocess:
  """Each image minus its mean, over its standard deviation, as floats.

  (x - mean) / max(std, 1 / sqrt(number of pixels)), over all pixels and
  channels of the image, as TensorFlow's per_image_standardization does, with
  integers taken as they are (0..255).
  """

  def step(key: jax.Array | None, image: jax.Array) -> jax.Array:
    del key
    if jnp.issubdtype(image.dtype, jnp.integer):
      image = image.astype(jnp.result_type(float))
    axes = (1, 2, 3)
    mean = image.mean(axes, keepdims=True)
    least = 1 / jnp.sqrt(jnp.asarray(image[0].size, image.dtype))
    deviation = jnp.maximum(image.std(axes, keepdims=True), least)
    return (image - mean) / deviation

  return step


def normalise(
  *, mean: tuple[float, ...] = (0.5,), std: tuple[float, ...] = (0.5,)
) -> Preprocess:
  """(x - mean) / std by channel; integers are divided by 255 first.

  Args:
    mean: of each channel, or one for all.
    std: likewise, above 0.
  """
  for value in std:
    validate.above('std', value, 0)

  def step(key: jax.Array | None, image: jax.Array) -> jax.Array:
    del key
    for name, values in (('mean', mean), ('std', std)):
      validate.check(
        len(values) in (1, image.shape[-1]),
        f'Expected {name} to have 1 value or one for each of '
        f'{image.shape[-1]} channels, got {len(values)}.',
      )
    if jnp.issubdtype(image.dtype, jnp.integer):
      image = image.astype(jnp.result_type(float)) / 255
    cast = lambda values: jnp.asarray(values, image.dtype)
    return (image - cast(mean)) / cast(std)

  return step


PREPROCESS: dict[str, Callable[..., Preprocess]] = {
  'random_crop': random_crop,
  'random_flip': random_flip,
  'standardise': standardise,
  'normalise': normalise,
}
