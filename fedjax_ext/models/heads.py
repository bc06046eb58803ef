"""Backbones, linear heads on their features, and fixed simplex classifiers.

Axis letters: B examples, D features, Y classes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_ext.core import validate
from fedjax_ext.models.model import Model

PyTree = Any
Head = dict[str, jax.Array]


class Backbone(NamedTuple):
  """A model that ends in features.

  Attributes:
    model: x [B, ...] -> features [B, D].
    num_features: D.
  """

  model: Model
  num_features: int


def make_backbone(
  builder: Callable[..., Model], *, input_shape: Sequence[int], **settings: Any
) -> Backbone:
  """A classifier without its last layer.

  Args:
    builder: of `registry.MODELS`: softmax_regression and models of text have no
      features of their own and are refused.
    input_shape: shape of one example, without B.
    **settings: keywords of the builder.

  Raises:
    InvalidInput: the model has no features [B, D].
  """
  try:
    model = builder(num_classes=0, input_shape=tuple(input_shape), **settings)
    x = jax.ShapeDtypeStruct((2, *input_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    shape = jax.eval_shape(model.apply, variables, x).shape
  except validate.InvalidInput:
    raise
  except Exception:
    shape = ()
  name = getattr(builder, '__name__', str(builder))
  validate.check(
    len(shape) == 2 and shape[1] > 0,
    f'Expected model={name} to have features before its last layer, got none.',
  )
  return Backbone(model, shape[1])


def linear_head(key: jax.Array, num_features: int, num_classes: int) -> Head:
  """A dense layer drawn from U(-1/sqrt(D), 1/sqrt(D)), as PyTorch does.

  Returns:
    {'kernel': [D, Y], 'bias': [Y]}; the vector of class y is kernel[:, y].
  """
  bound = num_features**-0.5
  kernel, bias = jax.random.split(key)
  draw = lambda key, shape: jax.random.uniform(
    key, shape, minval=-bound, maxval=bound
  )
  return {
    'kernel': draw(kernel, (num_features, num_classes)),
    'bias': draw(bias, (num_classes,)),
  }


def apply_head(head: Head, features: jax.Array) -> jax.Array:
  """Logits [B, Y] of features [B, D]."""
  return features @ head['kernel'] + head['bias']


def class_norms(head: Head) -> jax.Array:
  """Euclidean norm of every class vector, [Y]."""
  return jnp.linalg.norm(head['kernel'], axis=0)


def simplex_etf(
  rng: np.random.Generator, num_features: int, num_classes: int
) -> np.ndarray:
  """Unit class vectors at equal angles, arccos(-1 / (Y - 1)).

    V = sqrt(Y / (Y - 1)) P (I - 1/Y 1 1'),  P'P = I

  Papyan, Han and Donoho, "Prevalence of neural collapse during the terminal
  phase of deep learning training", 2020, https://arxiv.org/abs/2008.08186.

  Returns:
    float64 [D, Y].

  Raises:
    InvalidInput: D < Y, or fewer than two classes.
  """
  validate.at_least('num_classes', num_classes, 2)
  validate.check(
    num_features >= num_classes,
    f'Expected at least as many features as the {num_classes} classes, got '
    f'{num_features}.',
  )
  basis, _ = np.linalg.qr(rng.random((num_features, num_classes)))
  centre = np.eye(num_classes) - 1 / num_classes
  return np.sqrt(num_classes / (num_classes - 1)) * basis @ centre


def sparse_etf_loss(kernel: jax.Array, *, norm: float) -> jax.Array:
  """How far class vectors [D, Y] are from one norm and from equal angles.

  sum_y (|v_y| - norm)^2 - mean_y arccos(max_{j != y} cos(v_y, v_j))
  """
  norms = jnp.linalg.norm(kernel, axis=0)
  unit = kernel / norms
  cosines = unit.T @ unit
  cosines -= jnp.diag(jnp.diag(cosines)) + jnp.eye(kernel.shape[1])
  nearest = jnp.clip(cosines.max(1), -0.99999, 0.99999)
  return jnp.square(norms - norm).sum() - jnp.arccos(nearest).mean()


@functools.cache
def sparse_etf(
  *,
  num_features: int,
  num_classes: int,
  sparsity: float = 0.6,
  norm: float = 0.1,
  steps: int = 10_000,
  learning_rate: float = 1e-4,
  seed: int = 0,
) -> np.ndarray:
  """The sparse simplex classifier SSE-C; about a second for 10 classes.

  A simplex ETF of which floor(sparsity * D * Y) random entries are zero; the
  others are optimised by Adam on `sparse_etf_loss`. Zeros stay exactly zero.

  Xiao et al., "FedLoGe: joint local and generic federated learning under
  long-tailed data", 2024, https://arxiv.org/abs/2401.08977.

  Args:
    num_features: D.
    num_classes: Y.
    sparsity: share of zeros, beta.
    norm: that class vectors should have, gamma.
    steps: of Adam.
    learning_rate: of Adam.
    seed: of the basis and of the zeros.

  Returns:
    float32 [D, Y], read only; the same array for the same arguments.

  Raises:
    InvalidInput: D < Y, a number out of range, or a class without any entry.
  """
  validate.check(
    0 <= sparsity < 1, f'Expected 0 <= sparsity < 1, got {sparsity}.'
  )
  validate.above('norm', norm, 0)
  rng = np.random.default_rng(seed)
  kernel = simplex_etf(rng, num_features, num_classes)
  zeros = rng.permutation(kernel.size)[: int(sparsity * kernel.size)]
  kernel.reshape(-1)[zeros] = 0
  validate.check(
    (kernel != 0).any(0).all(),
    f'Expected entries in every class vector, got one of zeros alone with '
    f'{num_features} features and sparsity={sparsity}; try another seed.',
  )
  start = jnp.asarray(kernel, jnp.float32)
  mask = (start != 0).astype(start.dtype)
  optimizer = optax.adam(learning_rate)

  @jax.jit
  def optimise(start: jax.Array) -> jax.Array:
    def step(carry, _):
      kernel, state = carry
      gradient = mask * jax.grad(sparse_etf_loss)(kernel, norm=norm)
      updates, state = optimizer.update(gradient, state)
      return (optax.apply_updates(kernel, updates), state), None

    (kernel, _), _ = jax.lax.scan(
      step, (start, optimizer.init(start)), length=steps
    )
    return kernel

  result = np.array(optimise(start))
  result.flags.writeable = False
  return result
