"""A small variational autoencoder of images or vectors.

Kingma and Welling, "Auto-encoding variational Bayes", 2014,
https://arxiv.org/abs/1312.6114.

Axis letters: B examples, D features, L latent features.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn


class VariationalAutoencoder(nn.Module):
  """D - hidden - L - hidden - D, with relu and a Gaussian code.

  Attributes:
    num_features: D.
    hidden: width of both hidden layers.
    latent: L.
  """

  num_features: int
  hidden: int = 256
  latent: int = 32

  def setup(self):
    self.encoder = nn.Dense(self.hidden)
    self.code = nn.Dense(2 * self.latent)
    self.decoder = nn.Dense(self.hidden)
    self.out = nn.Dense(self.num_features)

  def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log-variance [B, L] of the codes of x [B, D]."""
    both = self.code(nn.relu(self.encoder(x)))
    return tuple(jnp.split(both, 2, axis=-1))

  def __call__(
    self, x: jax.Array, key: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits [B, D] of x [B, D] from one drawn code; its mean, log-variance."""
    mean, log_variance = self.encode(x)
    noise = jax.random.normal(key, mean.shape, mean.dtype)
    drawn = mean + jnp.exp(log_variance / 2) * noise
    return self.out(nn.relu(self.decoder(drawn))), mean, log_variance
