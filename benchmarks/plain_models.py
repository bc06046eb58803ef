"""The benchmark models of flax's own layers, as a user of FedJAX writes them.

Axis letters: B examples, T time steps, V vocabulary, Y classes.
"""

import jax
from flax import linen as nn


class CNN(nn.Module):
  """Native convolutions 32 and 64 (3x3), max-pool, dense 128, dense Y."""

  num_classes: int

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps images [B, 28, 28, 1] to logits [B, Y]."""
    del train, mask
    x = nn.relu(nn.Conv(32, (3, 3), padding='VALID')(x))
    x = nn.relu(nn.Conv(64, (3, 3), padding='VALID')(x))
    x = nn.max_pool(x, (2, 2), strides=(2, 2))
    x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
    return nn.Dense(self.num_classes)(x)


class LSTM(nn.Module):
  """Embedding 8, flax's LSTM 128, dense V."""

  vocabulary: int

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
  ) -> jax.Array:
    """Maps tokens [B, T] to logits [B, T, V]."""
    del train, mask
    x = nn.Embed(self.vocabulary, 8)(x)
    x = nn.RNN(nn.OptimizedLSTMCell(128))(x)
    return nn.Dense(self.vocabulary)(x)
