"""The autoencoder's embedding: trained by the engine, seeded, of use."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from fedjax_ext import core, data
from fedjax_ext.core.pooled import evaluation_info
from fedjax_ext.losses.reconstruction import reconstruction_task
from fedjax_ext.models.autoencoder import VariationalAutoencoder
from fedjax_ext.training.embeddings import vae


def two_kinds(count=200, features=12):
  """Bytes of two prototypes, with a few flipped."""
  rng = np.random.default_rng(0)
  kind = rng.integers(2, size=count)
  x = rng.integers(2, size=(2, features))[kind]
  flipped = rng.random(x.shape) < 0.05
  return (255 * (x ^ flipped)).astype(np.uint8), kind


class VaeTest(absltest.TestCase):
  def test_codes_tell_kinds_apart(self):
    x, kind = two_kinds()
    settings = dict(latent=2, hidden=16, epochs=15, batch_size=20)
    codes = vae(x, learning_rate=0.01, seed=0, **settings)
    self.assertEqual((codes.shape, codes.dtype), ((200, 2), np.float32))
    centres = [codes[kind == k].mean(0) for k in (0, 1)]
    spread = max(codes[kind == k].std(0).max() for k in (0, 1))
    self.assertGreater(np.abs(centres[0] - centres[1]).max(), 3 * spread)
    again, other = (
      vae(x, learning_rate=0.01, seed=seed, **settings) for seed in (0, 1)
    )
    np.testing.assert_array_equal(codes, again)
    self.assertFalse(np.array_equal(codes, other))

  def test_values_out_of_range(self):
    with self.assertRaisesRegex(core.InvalidInput, r'got 0\.\.3'):
      vae(np.array([[0.0, 3.0]]))

  def test_named_in_a_partition(self):
    x, kind = two_kinds()
    owner = data.semantic_partition(
      np.zeros(len(x), int), num_clients=2, embedding='vae', components=2,
      regularisation=1e-2, feature='x', features={'x': x}, seed=0,
    )  # fmt: skip
    agree = (owner == kind).mean()
    self.assertGreater(max(agree, 1 - agree), 0.95)


class LossTest(absltest.TestCase):
  def test_against_the_formula(self):
    """The divergence against samples, the likelihood against numpy."""
    module = VariationalAutoencoder(6, 5, 3)
    task = reconstruction_task(module, beta=0.5)
    params = task.init(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 6)), jnp.float32)
    mask = jnp.array([True, True, True, False])
    batch = core.Batch({'x': x}, mask, evaluation_info(jnp.int32(0)))
    values, weights = task.metrics(params, batch)['loss']
    logits, mean, log_variance = module.apply(
      {'params': params}, x, batch.info.key
    )
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    likelihood = (x * np.log(p) + (1 - x) * np.log(1 - p)).sum(-1)
    variance = np.exp(np.asarray(log_variance, np.float64))
    mean = np.asarray(mean, np.float64)
    z = mean + np.sqrt(variance) * np.random.default_rng(1).standard_normal(
      (400_000, *mean.shape)
    )
    log_q = -((z - mean) ** 2 / variance + np.log(variance)).sum(-1) / 2
    divergence = (log_q + (z**2).sum(-1) / 2).mean(0)
    np.testing.assert_allclose(
      values, -likelihood + 0.5 * divergence, rtol=5e-3
    )
    np.testing.assert_array_equal(weights, mask)
    np.testing.assert_allclose(
      task.loss(params, batch), values[:3].mean(), rtol=1e-6
    )


if __name__ == '__main__':
  absltest.main()
