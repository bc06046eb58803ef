"""Feature skew: images that look different from client to client.

Each is `f(image [M, H, W] or [M, H, W, D], owner [M], *, num_clients, seed,
**settings) -> array like image`, over any partition, and depends on its
arguments only. `SKEWS` has them by name. Images may be memory maps or lazy
columns: they are read in pieces, each row once, into the one array that is
returned. Rows that nobody owns stay as they are.

Axis letters: M rows, H height, W width, D channels, C clients, N rows of a
piece.
"""

import types
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from fedjax_ext.core import validate

_PIECE_BYTES = 1 << 24


def rotate_skew(
  image: np.ndarray,
  owner: np.ndarray,
  *,
  num_clients: int,
  seed: int,
  num_groups: int = 4,
) -> np.ndarray:
  """Turns the images of client c by (c mod G) * 360 / G degrees.

  Counter-clockwise. Turns by multiples of 90 degrees are exact on square
  images, and by 180 degrees on all; others are bilinear about the centre, at
  the same size, with border pixels repeated outwards.

  Four such groups are the rotated MNIST of Ghosh, Chung, Yin and Ramchandran,
  "An efficient framework for clustered federated learning", 2020,
  https://arxiv.org/abs/2006.04088.

  Args:
    image: uint8 or float [M, H, W] or [M, H, W, D].
    owner: int [M], in 0..C-1, or -1 for nobody.
    num_clients: C.
    seed: unused, for nothing is drawn.
    num_groups: G.

  Returns:
    Images of the same shape and type.

  Raises:
    InvalidInput: num_groups < 1, or an array is not as above.
  """
  del seed
  owner = _check_images(image, owner, num_clients)
  groups = skew_groups('rotate', num_clients=num_clients, num_groups=num_groups)
  result = np.empty(image.shape, image.dtype)
  for piece in _pieces(np.arange(len(image)), image):
    rows = slice(piece[0], piece[-1] + 1)
    values, of = np.asarray(image[rows]), owner[rows]
    result[rows] = values
    group = np.where(of >= 0, groups[of], 0)
    for g in np.unique(group[group > 0]).tolist():
      where = np.flatnonzero(group == g)
      result[piece[where]] = _turn(values[where], g, num_groups)
  return result


def noise_skew(
  image: np.ndarray,
  owner: np.ndarray,
  *,
  num_clients: int,
  seed: int,
  level: float = 0.1,
) -> np.ndarray:
  """Adds Gaussian noise that grows from client to client.

  x' = x + level * (c + 1) / C * z, z ~ Normal(0, 1), for c = 0..C-1: the last
  client has standard deviation `level`. In uint8 images `level` is a share of
  255, and results are rounded and clipped to 0..255; float images are not
  clipped. A client's noise depends on the seed, its number and the order of its
  rows, not on other clients.

  The noise-based feature imbalance of Li, Diao, Chen and He, "Federated
  learning on non-IID data silos: an experimental study", 2022,
  https://arxiv.org/abs/2102.02079. The paper calls level * (c + 1) / C the
  variance; as in its code it is the standard deviation here.

  Args:
    image: uint8 or float [M, H, W] or [M, H, W, D].
    owner: int [M], in 0..C-1, or -1 for nobody.
    num_clients: C.
    seed: seed of the noise.
    level: standard deviation of the last client's noise.

  Returns:
    Images of the same shape and type.

  Raises:
    InvalidInput: level < 0 or infinite, or an array is not as above.
  """
  owner = _check_images(image, owner, num_clients)
  validate.check(
    0 <= level < np.inf, f'Expected 0 <= level < infinity, got level={level}.'
  )
  result = np.empty(image.shape, image.dtype)
  order = np.argsort(owner, kind='stable')
  bounds = np.searchsorted(owner[order], np.arange(-1, num_clients + 1))
  for rows in _pieces(order[: bounds[1]], image):
    result[rows] = image[rows]
  scale = level * (255 if image.dtype.kind == 'u' else 1)
  for c in np.flatnonzero(np.diff(bounds[1:])).tolist():
    rng = np.random.default_rng([seed, c])
    for rows in _pieces(order[bounds[c + 1] : bounds[c + 2]], image):
      values = _as_float(np.asarray(image[rows]))
      noise = rng.standard_normal(values.shape, np.float32)
      noise *= np.float32(scale * (c + 1) / num_clients)
      result[rows] = _as_type(values + noise, image.dtype)
  return result


def skew_groups(
  name: str, *, num_clients: int, num_groups: int = 4
) -> np.ndarray:
  """Groups of clients with a like skew, to report on one by one.

  Rotation: group c mod G, turned by group * 360 / G degrees. Noise: group
  floor(c * G / C), in the order of rising noise.

  Args:
    name: one of `SKEWS`.
    num_clients: C.
    num_groups: G, for a rotation that of the skew itself.

  Returns:
    Groups 0..G-1 of the clients, int64 [C]; those of rows are
    `groups[owner]`, where somebody owns them.

  Raises:
    InvalidInput: an unknown name, or a number below 1.
  """
  validate.one_of('skew', name, SKEWS)
  validate.at_least('num_clients', num_clients, 1)
  validate.at_least('num_groups', num_groups, 1)
  clients = np.arange(num_clients, dtype=np.int64)
  if name == 'rotate':
    return clients % num_groups
  return clients * num_groups // num_clients


Skew = Callable[..., np.ndarray]

SKEWS: Mapping[str, Skew] = types.MappingProxyType(
  {'rotate': rotate_skew, 'noise': noise_skew}
)


def _check_images(
  image: np.ndarray, owner: np.ndarray, num_clients: int
) -> np.ndarray:
  """Checks the arguments that all skews share; returns owners int64 [M]."""
  validate.at_least('num_clients', num_clients, 1)
  validate.check(
    len(image.shape) in (3, 4)
    and (image.dtype == np.uint8 or image.dtype.kind == 'f'),
    'Expected images uint8 or float [M, H, W] or [M, H, W, D], got '
    f'{image.dtype}{list(image.shape)}.',
  )
  owner = np.asarray(owner, np.int64)
  validate.check(
    owner.shape == image.shape[:1],
    f'Expected {len(image)} owners, got {len(owner)}.',
  )
  low, high = owner.min(initial=0), owner.max(initial=-1)
  validate.check(
    low >= -1 and high < num_clients,
    f'Expected owners in -1..{num_clients - 1}, got {low}..{high}.',
  )
  return owner


def _pieces(rows: np.ndarray, image: np.ndarray) -> Iterator[np.ndarray]:
  """Yields rows [M] in pieces [N] of about 16 MiB of images."""
  row_bytes = int(np.prod(image.shape[1:])) * image.dtype.itemsize
  step = max(1, _PIECE_BYTES // max(1, row_bytes))
  for start in range(0, len(rows), step):
    yield rows[start : start + step]


def _turn(values: np.ndarray, group: int, num_groups: int) -> np.ndarray:
  """Turns images [N, H, W, ...] by group / num_groups of a full turn."""
  quarters, rest = divmod(4 * group, num_groups)
  square = values.shape[1] == values.shape[2]
  if not rest and (square or quarters % 2 == 0):
    return np.rot90(values, quarters, axes=(1, 2))
  from scipy import ndimage

  turned = ndimage.rotate(
    _as_float(values),
    360 * group / num_groups,
    axes=(2, 1),
    reshape=False,
    order=1,
    mode='nearest',
  )
  return _as_type(turned, values.dtype)


def _as_float(values: np.ndarray) -> np.ndarray:
  """Values [N, ...] as float64 where they are, else as float32."""
  wide = values.dtype.itemsize > 4
  return values.astype(np.float64 if wide else np.float32, copy=False)


def _as_type(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Floats [N, ...] as a float or, rounded and clipped, as uint8."""
  if dtype == np.uint8:
    values = np.clip(np.rint(values), 0, 255)
  return values.astype(dtype, copy=False)
