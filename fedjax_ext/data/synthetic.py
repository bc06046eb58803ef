"""Synthetic federated data with clients of their own style, no download.

Axis letters: C clients, M examples, Y classes.
"""

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.data.columns import Columns, make_columns

_SIDE = 28


def synthetic_femnist(
  *,
  num_clients: int = 100,
  mean_examples: float = 200.0,
  sigma: float = 0.6,
  num_classes: int = 62,
  label_alpha: float = 10.0,
  style: float = 1.0,
  noise: float = 0.25,
  seed: int = 0,
) -> Columns:
  """Draws images of class prototypes in each client's own style.

  Sizes are log-normal with the given mean, clipped to 10..3 * mean. A client
  draws labels from Dirichlet(label_alpha) and writes in its own style: a shift
  of up to two pixels, a slant, a contrast, and a smooth background of its own.

  Args:
    num_clients: C.
    mean_examples: mean examples of a client.
    sigma: standard deviation of log size; 0 gives equal sizes.
    num_classes: Y.
    label_alpha: concentration of a client's label distribution.
    style: strength of styles; 0 makes clients alike.
    noise: standard deviation of pixel noise, image contrast being about 1.
    seed: seed of everything.

  Returns:
    Columns with `image` uint8 [M, 28, 28, 1] and client numbers as names.
  """
  validate.at_least('num_clients', num_clients, 1)
  validate.at_least('mean_examples', mean_examples, 10)
  validate.at_least('num_classes', num_classes, 2)
  validate.above('label_alpha', label_alpha, 0)
  for name, value in (('sigma', sigma), ('style', style), ('noise', noise)):
    validate.at_least(name, value, 0)
  rng = np.random.default_rng(seed)
  prototypes = _smooth_fields(rng, num_classes)
  sizes = rng.lognormal(
    np.log(mean_examples) - sigma**2 / 2, sigma, num_clients
  )
  sizes = np.clip(np.rint(sizes), 10, 3 * mean_examples).astype(np.int64)
  client = np.repeat(np.arange(num_clients), sizes)
  image = np.empty((len(client), _SIDE, _SIDE, 1), np.uint8)
  label = np.empty(len(client), np.int32)
  first = 0
  for size in sizes.tolist():
    here = slice(first, first + size)
    first += size
    shares = rng.dirichlet(np.full(num_classes, label_alpha))
    label[here] = rng.choice(num_classes, size, p=shares)
    written = _write(rng, prototypes, style)[label[here]]
    written = written + noise * rng.standard_normal(
      written.shape, dtype=np.float32
    )
    image[here, :, :, 0] = np.clip(64 * written + 128, 0, 255).astype(np.uint8)
  return make_columns(
    'synthetic_femnist',
    {'image': image, 'label': label, 'client': client},
    num_classes=num_classes,
  )


def synthetic_styles(
  *,
  num_clients: int = 40,
  num_classes: int = 5,
  examples: int = 20,
  num_features: int = 16,
  style: float = 0.84,
  label_style: float = 0.84,
  seed: int = 0,
) -> Columns:
  """Vectors with a style of the client, and one of the client and the class.

    x = mean_y + style_c + style_{c, y} + N(0, I),  mean_y ~ N(0, I),
    style_c ~ N(0, style^2 I),  style_{c, y} ~ N(0, label_style^2 I)

  Clients have as much of each class: they differ in what it looks like alone.

  Args:
    num_clients: C.
    num_classes: Y.
    examples: of each client and class.
    num_features: D.
    style: standard deviation of a client's style.
    label_style: of its style of a class.
    seed: seed of everything.

  Returns:
    Columns with `x` float32 [M, D] and client numbers as names.
  """
  for name, value in (
    ('num_clients', num_clients),
    ('num_classes', num_classes),
    ('examples', examples),
    ('num_features', num_features),
  ):
    validate.at_least(name, value, 1)
  for name, value in (('style', style), ('label_style', label_style)):
    validate.at_least(name, value, 0)
  rng = np.random.default_rng(seed)
  means = rng.standard_normal((num_classes, num_features))
  styles = style * rng.standard_normal((num_clients, 1, num_features))
  both = styles + label_style * rng.standard_normal(
    (num_clients, num_classes, num_features)
  )
  client = np.repeat(np.arange(num_clients), num_classes * examples)
  label = np.tile(np.repeat(np.arange(num_classes), examples), num_clients)
  x = means[label] + both[client, label]
  x += rng.standard_normal((len(client), num_features))
  return make_columns(
    'synthetic_styles',
    {'x': x.astype(np.float32), 'label': label, 'client': client},
    num_classes=num_classes,
  )


def _smooth_fields(rng: np.random.Generator, count: int) -> np.ndarray:
  """Low-frequency fields of unit variance, float32 [count, 28, 28]."""
  grid = np.arange(_SIDE) / _SIDE
  waves = np.arange(1, 5)
  basis = np.concatenate(
    [
      np.sin(np.pi * waves * grid[:, None]),
      np.cos(np.pi * waves * grid[:, None]),
    ],
    axis=1,
  )  # [28, 8]
  weights = rng.standard_normal((count, 8, 8))
  fields = np.einsum('ia,nab,jb->nij', basis, weights, basis)
  fields -= fields.mean((1, 2), keepdims=True)
  fields /= fields.std((1, 2), keepdims=True)
  return fields.astype(np.float32)


def _write(
  rng: np.random.Generator, prototypes: np.ndarray, style: float
) -> np.ndarray:
  """Prototypes [Y, 28, 28] as one client writes them."""
  shift = np.rint(style * rng.uniform(-2, 2, 2)).astype(int)
  slant = style * rng.uniform(-3, 3)
  contrast = np.exp(style * rng.normal(0, 0.2))
  background = _smooth_fields(rng, 1)[0] * (0.3 * style)
  row_shift = shift[1] + np.rint(
    slant * (np.arange(_SIDE) / _SIDE - 0.5)
  ).astype(int)
  column = (np.arange(_SIDE) - row_shift[:, None]) % _SIDE
  row = (np.arange(_SIDE) - shift[0]) % _SIDE
  moved = prototypes[:, row][:, np.arange(_SIDE)[:, None], column]
  return contrast * moved + background
