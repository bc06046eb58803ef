"""Classifiers: softmax regression, multi-layer perceptron, EMNIST CNN.

Axis letters: B examples, H height, W width, D features, Y classes.
"""

from collections.abc import Sequence

import jax
from flax import linen as nn

from fedjax_ext.models.layers import (
  Conv,
  as_float_image,
  classify,
  max_pool,
)
from fedjax_ext.models.model import tap


class SoftmaxRegression(nn.Module):
  """One dense layer; 784 x 10 + 10 = 7,850 parameters on MNIST.

  Attributes:
    num_classes: Y.
  """

  num_classes: int

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps images or vectors [B, ...] to logits [B, Y]."""
    del train, mask
    return nn.Dense(self.num_classes)(_flat(x))


class MLP(nn.Module):
  """Dense layers with relu between them.

  McMahan et al.'s 2NN is hidden=(200, 200): 199,210 parameters on MNIST,
  https://arxiv.org/abs/1602.05629.

  Attributes:
    num_classes: Y; 0 returns the features before the last layer.
    hidden: width of each hidden layer.
  """

  num_classes: int
  hidden: Sequence[int] = (200,)

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps images or vectors [B, ...] to logits [B, Y]."""
    del train, mask
    x = _flat(x)
    for width in self.hidden:
      x = nn.relu(nn.Dense(width)(x))
    return classify(x, self.num_classes)


class EmnistCNN(nn.Module):
  """Two 3x3 convolutions (32, 64), max-pool, dense 128, with dropout.

  1,206,590 parameters for 28x28 images and 62 classes. Reddi et al., "Adaptive
  federated optimization", 2021, table 4, https://arxiv.org/abs/2003.00295.

  Attributes:
    num_classes: Y; 0 returns the features before the last layer.
    dropout: the paper's rates (0.25, 0.5), or () for none.
  """

  num_classes: int
  dropout: Sequence[float] = (0.25, 0.5)

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps images [B, H, W] or [B, H, W, D] to logits [B, Y]."""
    del mask
    x = as_float_image(x)
    x = tap(self, 0, nn.relu(Conv(32, (3, 3), name='Conv_0')(x)))
    x = tap(self, 1, nn.relu(Conv(64, (3, 3), name='Conv_1')(x)))
    x = max_pool(x)
    x = self._drop(0, x, train)
    x = x.reshape(x.shape[0], -1)
    x = nn.relu(nn.Dense(128)(x))
    x = self._drop(1, x, train)
    return classify(x, self.num_classes)

  def _drop(self, which: int, x: jax.Array, train: bool) -> jax.Array:
    if not self.dropout:
      return x
    return nn.Dropout(self.dropout[which], deterministic=not train)(x)


def _flat(x: jax.Array) -> jax.Array:
  return as_float_image(x).reshape(x.shape[0], -1)
