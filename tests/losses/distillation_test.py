"""Distillation against numbers worked out apart (B2 to B5 of the BDPFL notes).

Heat maps' second derivatives against finite differences in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.losses.distillation import (
  attention,
  distance,
  heat_maps,
  kl_divergence,
  normalise,
)
from fedjax_ext.models import Model, make_model
from tests.models.checks import draw, normal
from tests.problems import relative_error, x64

SHARED, OWN = np.array([[2.0, 0, -1]]), np.array([[0.0, 1, 0]])
A = np.array([[[[1.0, 2], [3, 0]], [[0, 1], [2, 1]]]])  # [1, 2, 2, 2]
A2 = np.array([[[[2.0, 0], [0, 0]], [[0, 0], [0, 2]]]])
W = np.array([[1.0, -2], [0.5, 1], [-1, 0]])
V = np.array([[1.0, 0.5], [-0.5, 1]])


def model_of(head):
  """A model whose input is its only feature map; logits of its mean."""

  def tapped(variables, x, shifts):
    del variables
    x = x if shifts is None else x + shifts[0]
    return head(x.mean((1, 2))), (x,)

  return Model(None, None, None, tapped)


LINEAR = model_of(lambda f: f @ W.T)
NONLINEAR = model_of(lambda f: jax.nn.relu(f @ V.T) @ W.T)


def heat(model, x, label):
  with x64():
    logits, _, maps = heat_maps(model, {}, jnp.asarray(x), jnp.array([label]))
    return np.asarray(logits), np.asarray(maps[0][0])


class DistillationTest(parameterized.TestCase):
  @parameterized.parameters(
    (1.0, 0.982577, 0.912983),
    (2.0, 0.258889, 0.272806),
    (4.0, 0.064389, 0.068001),
  )
  def test_divergence(self, temperature, of_own, of_shared):
    kl = lambda a, b: kl_divergence(a, b, temperature=temperature)[0]
    with x64():
      np.testing.assert_allclose(kl(OWN, SHARED), of_own, atol=2e-6)
      np.testing.assert_allclose(kl(SHARED, OWN), of_shared, atol=2e-6)

  def test_divergence_slope(self):
    """(q_own - q_teacher) / tau."""
    with x64():
      slope = jax.grad(
        lambda z: kl_divergence(OWN, z[None], temperature=2.0)[0]
      )(jnp.asarray(SHARED[0]))
    wanted = [0.177232, -0.110319, -0.066912]
    np.testing.assert_allclose(slope, wanted, atol=2e-6)

  def test_divergence_of_certain_teachers_is_finite(self):
    sure = jnp.array([[1e4, 0.0, -1e4]])
    value, slope = jax.value_and_grad(lambda z: kl_divergence(sure, z)[0])(
      -sure
    )
    self.assertTrue(np.isfinite(value))
    self.assertTrue(np.isfinite(slope).all())

  @parameterized.parameters(
    (LINEAR, 0, [[0, 0.75], [0, 0]]),
    (LINEAR, 1, [[0.625, 0.375], [0.25, 0.5]]),
    (LINEAR, 2, [[0, 0], [0, 0]]),
    (NONLINEAR, 1, [[0.625, 0], [0.3125, 0.3125]]),
  )
  def test_heat_maps(self, model, label, wanted):
    logits, maps = heat(model, A, label)
    np.testing.assert_allclose(maps, wanted, atol=1e-6)
    if model is LINEAR:
      np.testing.assert_allclose(logits, [[-0.5, 1.75, -1.5]], atol=1e-6)

  def test_predicted_class(self):
    _, _, given = heat_maps(LINEAR, {}, jnp.asarray(A), jnp.array([1]))
    _, _, found = heat_maps(LINEAR, {}, jnp.asarray(A), None)
    np.testing.assert_array_equal(given[0], found[0])

  def test_distances(self):
    """Raw and normalised maps, features, attention."""
    h, h2 = heat(LINEAR, A, 1)[1][None], heat(LINEAR, A2, 1)[1][None]
    with x64():
      for norm, wanted in (
        ('l2', 0.586302),
        ('l2sq', 0.34375),
        ('mse', 0.085938),
      ):
        got = distance(h, h2, norm=norm)
        np.testing.assert_allclose(got, [wanted], atol=1e-6)
      n, n2 = normalise(jnp.asarray(h)), normalise(jnp.asarray(h2))
      np.testing.assert_allclose(distance(n, n2), [0.417690], atol=1e-6)
      np.testing.assert_allclose(
        distance(n, n2), 2 - 2 * (n * n2).sum((1, 2)), atol=1e-9
      )
      np.testing.assert_allclose(
        distance(n, n2, norm='mse'), [0.104423], atol=1e-6
      )
      np.testing.assert_allclose(distance(A, A2), [20], atol=1e-6)
      np.testing.assert_allclose(
        distance(A, A2, norm='l2'), [4.472136], atol=1e-6
      )
      gap = attention(jnp.asarray(A)) - attention(jnp.asarray(A2))
      np.testing.assert_allclose(jnp.square(gap).mean(), 0.192271, atol=1e-6)

  def test_nothing_has_a_slope_of_zero(self):
    """Equal maps, maps of zeros, features of zeros: 0, not NaN."""
    zeros = jnp.zeros((2, 3, 3))
    for loss in (
      lambda x: distance(x, zeros, norm='l2').sum(),
      lambda x: normalise(x).sum(),
      lambda x: attention(x[..., None]).sum(),
    ):
      slope = jax.grad(loss)(zeros)
      self.assertTrue(np.isfinite(slope).all())
    slope = jax.grad(lambda x: distance(x, zeros, norm='l2').sum())(zeros)
    self.assertEqual(float(jnp.abs(slope).max()), 0)

  @parameterized.parameters('l2sq', 'l2', 'mse')
  def test_second_derivatives(self, norm):
    """The slope of a distance of heat maps equals finite differences."""
    with x64():
      model = make_model(
        'group_norm_cnn',
        input_shape=(8, 8, 1),
        num_classes=3,
        widths=(4, 6),
        groups=2,
      )
      x = normal((3, 8, 8, 1), 'float64')
      mine, peer = (draw(model.init, seed, 'float64') for seed in (0, 1))
      labels = jnp.array([0, 2, 1])
      _, _, theirs = heat_maps(model, peer, x, labels)

      @jax.jit
      def loss(params):
        _, _, maps = heat_maps(model, params, x, labels)
        return sum(
          distance(normalise(a), normalise(b), norm=norm).sum()
          for a, b in zip(maps, theirs, strict=True)
        )

      slope = jax.jit(jax.grad(loss))(mine)
      rng = np.random.default_rng(0)
      for _ in range(3):
        way = jax.tree.map(
          lambda p: jnp.asarray(rng.standard_normal(p.shape)), mine
        )
        move = lambda s, way=way: jax.tree.map(
          lambda p, w: p + s * w, mine, way
        )
        step = 1e-6
        wanted = (loss(move(step)) - loss(move(-step))) / (2 * step)
        got = sum(
          jax.tree.leaves(jax.tree.map(lambda g, w: (g * w).sum(), slope, way))
        )
        self.assertLess(relative_error(got, wanted), 1e-5)

  def test_a_model_without_taps(self):
    model = make_model('mlp', input_shape=(4, 4), num_classes=3)
    params = model.init(jax.random.key(0))
    with self.assertRaisesRegex(InvalidInput, 'tapped layers'):
      heat_maps(model, params, jnp.zeros((1, 4, 4)), jnp.zeros(1, int))


if __name__ == '__main__':
  absltest.main()
