"""Classifiers: softmax regression, multi-layer perceptron, EMNIST CNN.

Axis letters: B examples, Y classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_ext.core import validate
from fedjax_ext.models.layers import Conv, as_float_image, max_pool

PyTree = Any


class Model(NamedTuple):
  """A model as two pure functions.

  Attributes:
    init: key -> params, a pytree.
    apply: (params, x [B, ...], key=None) -> logits [B, Y]; with a scalar key,
      as in training (dropout), without as in evaluation.
  """

  init: Callable[[jax.Array], PyTree]
  apply: Callable[..., jax.Array]


class SoftmaxRegression(nn.Module):
  """One dense layer; 784 x 10 + 10 = 7,850 parameters on MNIST."""

  num_classes: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images or vectors [B, ...] to logits [B, Y]."""
    del train
    x = _flat(x)
    return nn.Dense(self.num_classes)(x)


class MLP(nn.Module):
  """Dense layers with relu between them.

  McMahan et al.'s 2NN is hidden=(200, 200): 199,210 parameters on MNIST,
  https://arxiv.org/abs/1602.05629.
  """

  num_classes: int
  hidden: Sequence[int] = (200,)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images or vectors [B, ...] to logits [B, Y]."""
    del train
    x = _flat(x)
    for width in self.hidden:
      x = nn.relu(nn.Dense(width)(x))
    return nn.Dense(self.num_classes)(x)


class EmnistCNN(nn.Module):
  """Two 3x3 convolutions (32, 64), max-pool, dense 128, with dropout.

  1,206,590 parameters for 28x28 images and 62 classes. Reddi et al., "Adaptive
  federated optimization", 2021, table 4, https://arxiv.org/abs/2003.00295.

  Attributes:
    num_classes: Y.
    dropout: the paper's rates (0.25, 0.5), or () for none.
  """

  num_classes: int
  dropout: Sequence[float] = (0.25, 0.5)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W] or [B, H, W, D] to logits [B, Y]."""
    x = as_float_image(x)
    x = nn.relu(Conv(32, (3, 3), name='Conv_0')(x))
    x = nn.relu(Conv(64, (3, 3), name='Conv_1')(x))
    x = max_pool(x)
    x = self._drop(0, x, train)
    x = x.reshape(x.shape[0], -1)
    x = nn.relu(nn.Dense(128)(x))
    x = self._drop(1, x, train)
    return nn.Dense(self.num_classes)(x)

  def _drop(self, which: int, x: jax.Array, train: bool) -> jax.Array:
    if not self.dropout:
      return x
    return nn.Dropout(self.dropout[which], deterministic=not train)(x)


def _flat(x: jax.Array) -> jax.Array:
  return as_float_image(x).reshape(x.shape[0], -1)


MODELS = {
  'softmax_regression': SoftmaxRegression,
  'mlp': MLP,
  'emnist_cnn': EmnistCNN,
}


def make_model(
  name: str, *, input_shape: Sequence[int], num_classes: int, **settings: Any
) -> Model:
  """Builds a model by name.

  Args:
    name: one of MODELS.
    input_shape: shape of one example, without B.
    num_classes: Y.
    **settings: attributes of the module, e.g. hidden, dropout.

  Raises:
    InvalidInput: the name is unknown or the model cannot take such inputs.
  """
  validate.one_of('model', name, list(MODELS))
  validate.at_least('num_classes', num_classes, 1)
  if name == 'emnist_cnn':
    validate.check(
      len(input_shape) in (2, 3) and min(input_shape[:2]) >= 6,
      f'Expected images of at least 6x6 for model=emnist_cnn, got shape '
      f'{list(input_shape)}.',
    )
  return from_module(
    MODELS[name](num_classes=num_classes, **settings), input_shape
  )


def from_module(module: nn.Module, input_shape: Sequence[int]) -> Model:
  """Wraps a flax module whose call takes (x, train) and returns logits [B, Y].

  Args:
    module: has only parameters, no other variables.
    input_shape: shape of one example, without B.
  """

  def init(key: jax.Array) -> PyTree:
    example = jnp.zeros((1, *input_shape))
    return module.init(key, example)['params']

  def apply(
    params: PyTree, x: jax.Array, key: jax.Array | None = None
  ) -> jax.Array:
    rngs = None if key is None else {'dropout': key}
    return module.apply({'params': params}, x, train=key is not None, rngs=rngs)

  return Model(init, apply)
