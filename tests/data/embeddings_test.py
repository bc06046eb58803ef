"""Embeddings: identity, principal components, a user's own encoder."""

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import embed, principal_components


def halves(x):
  """A user's encoder."""
  return x.reshape(len(x), -1)[:, :2] / 2.0


def wrong_shape(x, *, seed):
  del seed
  return x.reshape(-1).astype(float)


def not_finite(x):
  return np.full((len(x), 2), np.nan)


def broken(x):
  raise KeyError('weights')


class EmbeddingsTest(parameterized.TestCase):
  def test_identity_scales_bytes(self):
    x = np.array([[[0, 255], [51, 102]]], np.uint8)
    got = embed('identity', x, seed=0)
    np.testing.assert_allclose(got, [[0, 1, 0.2, 0.4]], atol=1e-7)
    floats = np.array([[3.0, -1.0]])
    np.testing.assert_allclose(embed('identity', floats, seed=0), floats)

  @parameterized.parameters(20, 700)
  def test_principal_components_against_svd(self, features):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 4)) @ rng.standard_normal((4, features))
    x = (x + 3).astype(np.float32)
    got = principal_components(x, components=3)
    centred = x - x.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    expected = u[:, :3] * s[:3]
    sign = np.sign((got * expected).sum(0))
    np.testing.assert_allclose(got, expected * sign, rtol=1e-3, atol=1e-2)

  def test_a_users_encoder(self):
    x = np.arange(12).reshape(3, 4)
    got = embed(f'{__name__}.halves', x, seed=0)
    np.testing.assert_allclose(got, x[:, :2] / 2)

  @parameterized.parameters(
    ('nothing', 'embedding=nothing'),
    ('no_module.function', 'embedding=no_module.function'),
    (f'{__name__}.absent', 'absent'),
    (f'{__name__}.wrong_shape', r'floats \[3, D\], got float64\[12\]'),
    (f'{__name__}.not_finite', r'NaN or infinity for 3 examples'),
    (f'{__name__}.broken', 'KeyError'),
  )
  def test_bad_input(self, name, message):
    with self.assertRaisesRegex(InvalidInput, message):
      embed(name, np.arange(12).reshape(3, 4), seed=0)

  def test_too_many_components(self):
    with self.assertRaisesRegex(InvalidInput, 'components=5'):
      principal_components(np.zeros((9, 4)), components=5)


if __name__ == '__main__':
  absltest.main()
