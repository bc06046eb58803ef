"""Triggers: what an attacker does to an image.

A trigger maps floats in [0, 1], [B, H, W, D], and a part: attacker j of several
may stamp part j of a trigger alone; part -1 is the whole, which tests use.

Axis letters: B examples, H height, W width, D colours.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_ext.core import validate

Trigger = Callable[[jax.Array, jax.Array | int], jax.Array]


def _painted(masks: Callable[[int, int], np.ndarray]) -> Trigger:
  """Sets pixels to 1; masks (H, W) -> bool [J, H, W] of J parts."""

  def stamp(x: jax.Array, part: jax.Array | int) -> jax.Array:
    parts = masks(x.shape[1], x.shape[2])
    every = jnp.asarray(np.concatenate([parts, parts.any(0)[None]]))
    # Attackers beyond the parts begin again; -1 is the last row, the union.
    part = jnp.where(jnp.asarray(part) < 0, -1, jnp.asarray(part) % len(parts))
    return jnp.where(every[part][..., None], jnp.ones_like(x), x)

  return stamp


def grid(*, size: int = 3, margin: int = 1) -> Trigger:
  """A checkerboard in the lower right corner, all of it by every attacker.

  Gu, Dolan-Gavitt and Garg, "BadNets: identifying vulnerabilities in the
  machine learning model supply chain", 2017, https://arxiv.org/abs/1708.06733.

  Args:
    size: of the square, in pixels.
    margin: between it and the corner.
  """
  validate.at_least('size', size, 1)
  validate.at_least('margin', margin, 0)

  def masks(height: int, width: int) -> np.ndarray:
    _check_fits(size + margin, height, width)
    mask = np.zeros((height, width), bool)
    top, left = height - margin - size, width - margin - size
    board = np.indices((size, size)).sum(0) % 2 == 0
    mask[top : top + size, left : left + size] = board
    return mask[None]

  return _painted(masks)


def strips(*, length: int = 4, gap: int = 2, rows: int = 3) -> Trigger:
  """DBA: four strips, of which each attacker stamps one.

  Two in row 0 and two in row `rows`, `gap` pixels apart. The defaults are the
  code's for MNIST (16 pixels); for CIFAR it has length=6, gap=3, rows=4.

  Xie, Huang, Chen and Li, "DBA: distributed backdoor attacks against federated
  learning", 2020, https://openreview.net/forum?id=rkgyS0VFvr.

  Args:
    length: of a strip, in pixels.
    gap: between the two strips of a row.
    rows: between the upper and the lower ones.
  """
  for name, value in (('length', length), ('gap', gap), ('rows', rows)):
    validate.at_least(name, value, 1)

  def masks(height: int, width: int) -> np.ndarray:
    _check_fits(max(2 * length + gap, rows + 1), height, width)
    result = np.zeros((4, height, width), bool)
    for part, (row, left) in enumerate(
      (row, left) for row in (0, rows) for left in (0, length + gap)
    ):
      result[part, row, left : left + length] = True
    return result

  return _painted(masks)


def blend(*, amount: float = 0.1, seed: int = 0) -> Trigger:
  """x <- (1 - a) x + a noise, with one random image for all.

  Chen, Liu, Li, Lu and Song, "Targeted backdoor attacks on deep learning
  systems using data poisoning", 2017, https://arxiv.org/abs/1712.05526.

  Args:
    amount: a in (0, 1].
    seed: of the image.
  """
  validate.above('amount', amount, 0)
  validate.between('amount', amount, 0, 1)

  def stamp(x: jax.Array, part: jax.Array | int) -> jax.Array:
    del part
    pattern = np.random.default_rng(seed).random(x.shape[1:])
    return blended(x, jnp.asarray(pattern, x.dtype), amount)

  return stamp


def blended(x: jax.Array, pattern: jax.Array, amount: float) -> jax.Array:
  """(1 - amount) x + amount * pattern, for x [B, ...], pattern [...]."""
  return (1 - amount) * x + amount * pattern


def sinusoid(*, amplitude: float = 20 / 255, frequency: float = 6) -> Trigger:
  """SIG: x <- clip(x + A sin(2 pi f j / W)) in column j.

  Barni, Kallas and Tondi, "A new backdoor attack in CNNs by training set
  corruption without label poisoning", 2019, https://arxiv.org/abs/1902.11237.

  Args:
    amplitude: A > 0, of pixels in [0, 1].
    frequency: f, periods over the width.
  """
  validate.above('amplitude', amplitude, 0)

  def stamp(x: jax.Array, part: jax.Array | int) -> jax.Array:
    del part
    columns = np.arange(x.shape[2])
    wave = amplitude * np.sin(2 * np.pi * frequency * columns / x.shape[2])
    return jnp.clip(x + jnp.asarray(wave, x.dtype)[:, None], 0, 1)

  return stamp


def warp(*, points: int = 4, strength: float = 0.5, seed: int = 0) -> Trigger:
  """WaNet: a smooth warp that is the same for all images.

  A field of points x points random shifts, of mean size 1, is resized to the
  image (bicubic) and times `strength / H` in coordinates of [-1, 1]; pixels
  between pixels are bilinear.

  Nguyen and Tran, "WaNet: imperceptible warping-based backdoor attack", 2021,
  https://arxiv.org/abs/2102.10369.

  Args:
    points: of the field, along a side.
    strength: s > 0.
    seed: of the field.
  """
  validate.at_least('points', points, 2)
  validate.above('strength', strength, 0)

  def stamp(x: jax.Array, part: jax.Array | int) -> jax.Array:
    del part
    height, width = x.shape[1:3]
    rng = np.random.default_rng(seed)
    field = rng.uniform(-1, 1, (points, points, 2))
    field /= np.abs(field).mean()
    field = jax.image.resize(jnp.asarray(field), (height, width, 2), 'cubic')
    field = strength / height * field
    rows = jnp.linspace(-1, 1, height)[:, None] + field[..., 0]
    columns = jnp.linspace(-1, 1, width) + field[..., 1]
    place = lambda u, n: (jnp.clip(u, -1, 1) + 1) / 2 * (n - 1)
    where = [place(rows, height), place(columns, width)]
    one = lambda image: jax.scipy.ndimage.map_coordinates(image, where, order=1)
    colours = jax.vmap(jax.vmap(one, in_axes=-1, out_axes=-1))
    return colours(x).astype(x.dtype)

  return stamp


def none() -> Trigger:
  """Leaves images as they are, for attacks on labels."""
  return lambda x, part: x


TRIGGERS: dict[str, Callable[..., Trigger]] = {
  make.__name__: make for make in (grid, strips, blend, sinusoid, warp, none)
}


def _check_fits(size: int, height: int, width: int) -> None:
  validate.check(
    size <= min(height, width),
    f'Expected a trigger of at most {height}x{width} pixels, got {size}.',
  )
