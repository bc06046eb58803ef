"""Embeddings for semantic partitions: examples in, vectors out.

Each is `f(x [N, ...]) -> float [N, D]`, with a partition's examples as they are
stored; one that takes `seed` gets one. `EMBEDDINGS` has them by name; a user's
own pretrained encoder is any importable function of that form, named
`my_module.function`.

Axis letters: N examples, D features.
"""

import importlib
import inspect
import pkgutil
import types
from collections.abc import Callable

import numpy as np

from fedjax_ext.core import validate

Embedding = Callable[..., np.ndarray]


def identity(x: np.ndarray) -> np.ndarray:
  """The examples [N, ...] themselves as float32 [N, D]; bytes over 255."""
  flat = np.asarray(x).reshape(len(x), -1)
  scale = np.float32(255 if flat.dtype == np.uint8 else 1)
  return flat.astype(np.float32) / scale


def principal_components(
  x: np.ndarray, *, components: int, most: int = 100_000, seed: int = 0
) -> np.ndarray:
  """Centres [N, D] and projects it on its first so many directions.

  Args:
    x: float [N, D].
    components: how many, at most N and D.
    most: directions come from a random choice of at most so many rows.
    seed: seed of that choice and of the solver.

  Returns:
    float32 [N, components].

  Raises:
    InvalidInput: components out of range.
  """
  PCA = scikit_learn('decomposition').PCA
  validate.between('components', components, 1, min(x.shape))
  rng = np.random.default_rng(seed)
  rows = np.sort(rng.permutation(len(x))[:most])
  # Exact where few features make it cheap.
  solver = 'full' if x.shape[1] <= 512 else 'randomized'
  fitted = PCA(components, svd_solver=solver, random_state=seed).fit(x[rows])
  return fitted.transform(x).astype(np.float32)


def scikit_learn(module: str) -> types.ModuleType:
  """A module of scikit-learn, which is an extra.

  Raises:
    InvalidInput: it is not installed.
  """
  try:
    return importlib.import_module(f'sklearn.{module}')
  except ImportError as error:
    raise validate.InvalidInput(
      'Expected scikit-learn for a semantic partition; pip install '
      f'fedjax-ext[experiments] ({error}).'
    ) from error


EMBEDDINGS: dict[str, Embedding] = {'identity': identity}


def find_embedding(name: str) -> Embedding:
  """What a name stands for: one of EMBEDDINGS, or MODULE.FUNCTION.

  Raises:
    InvalidInput: nothing has that name.
  """
  if name in EMBEDDINGS:
    return EMBEDDINGS[name]
  try:
    found = pkgutil.resolve_name(name)
  except (ImportError, AttributeError, ValueError) as error:
    raise validate.InvalidInput(
      f'Expected embedding to be one of {", ".join(EMBEDDINGS)}, or '
      f'MODULE.FUNCTION, got embedding={name}: {error}.'
    ) from error
  validate.check(
    callable(found), f'Expected embedding={name} to be a function.'
  )
  return found


def embed(name: str, x: np.ndarray, *, seed: int) -> np.ndarray:
  """Embeds examples [N, ...] by the named function and checks the result.

  Returns:
    float32 [N, D].

  Raises:
    InvalidInput: the name is unknown, or the shape or a value is wrong.
  """
  function = find_embedding(name)
  takes_seed = 'seed' in inspect.signature(function).parameters
  try:
    result = function(x, seed=seed) if takes_seed else function(x)
  except validate.InvalidInput:
    raise
  except Exception as error:
    raise validate.InvalidInput(
      f'Expected embedding={name} to embed {x.dtype}{list(x.shape)}, got '
      f'{type(error).__name__}: {str(error).splitlines()[:1]}.'
    ) from error
  result = np.asarray(result)
  validate.check(
    result.ndim == 2 and len(result) == len(x) and result.dtype.kind == 'f',
    f'Expected embedding={name} to return floats [{len(x)}, D], got '
    f'{result.dtype}{list(result.shape)}.',
  )
  bad = np.flatnonzero(~np.isfinite(result).all(1))
  validate.check(
    not len(bad),
    f'Expected embedding={name} to return finite floats, got NaN or infinity '
    f'for {len(bad)} examples, the first being {bad[:1].tolist()}.',
  )
  return result.astype(np.float32)
