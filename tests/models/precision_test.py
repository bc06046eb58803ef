"""bfloat16 compute and rematerialisation: how far from float32, what stays."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.models import (
  make_model,
  params_of,
  rematerialised,
  stats_of,
  with_compute_dtype,
)

MODELS = {
  'mlp': dict(input_shape=(8, 8, 1)),
  'group_norm_cnn': dict(input_shape=(8, 8, 1), widths=(8, 8)),
  'resnet8': dict(input_shape=(8, 8, 1), norm='group', width=8),
  'char_lstm': dict(input_shape=(6,), hidden=16),
  'text_transformer': dict(input_shape=(6,), width=16, depth=1),
}
MASK = jnp.array([True] * 5 + [False])


def setting(name, pixels=False):
  """Model, its variables, inputs and a loss with its gradient."""
  model = make_model(name, num_classes=12, **MODELS[name])
  rng = np.random.default_rng(0)
  shape = (6, *MODELS[name]['input_shape'])
  if len(shape) == 2:
    x = rng.integers(0, 12, shape)
  elif pixels:
    x = rng.integers(0, 256, shape).astype(np.uint8)
  else:
    x = rng.standard_normal(shape).astype(np.float32)
  return model, model.init(jax.random.key(0)), jnp.asarray(x)


def outcome(model, variables, x):
  """Logits, stats, gradient of a fixed loss, logits of an evaluation."""

  def loss(params):
    mine = variables._replace(params=params) if stats_of(variables) else params
    logits, stats = model.train(mine, x, jax.random.key(1), MASK)
    real = MASK.reshape(-1, *[1] * (logits.ndim - 1))
    return (jnp.sin(logits) * real).mean(), (logits, stats)

  grads, (logits, stats) = jax.jit(jax.grad(loss, has_aux=True))(
    params_of(variables)
  )
  return logits, stats, grads, jax.jit(model.apply)(variables, x)


def relative(a, b):
  """Relative distance of two like pytrees, as one vector, in the 2-norm."""
  a, b = (
    np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in t])
    for t in map(jax.tree.leaves, (a, b))
  )
  return np.linalg.norm(a - b) / np.linalg.norm(b)


class PrecisionTest(parameterized.TestCase):
  @parameterized.parameters(*MODELS)
  def test_bfloat16_is_near_float32(self, name):
    """Within 16 of bfloat16's steps (2^-8), two for each of eight layers."""
    model, variables, x = setting(name)
    half = with_compute_dtype(model)
    expected = outcome(model, variables, x)
    got = outcome(half, variables, x)
    for a, b in zip(got, expected, strict=True):
      self.assertEqual(
        [leaf.dtype for leaf in jax.tree.leaves(a)],
        [leaf.dtype for leaf in jax.tree.leaves(b)],
      )
    for a, b in zip(
      got[:1] + got[2:], expected[:1] + expected[2:], strict=True
    ):
      self.assertBetween(relative(a, b), 1e-6, 16 * 2**-8)
    self.assertEqual(
      jax.tree.structure(half.init(jax.random.key(0))),
      jax.tree.structure(variables),
    )

  def test_moving_statistics_stay_float32(self):
    settings = dict(MODELS['resnet8'], norm='batch')
    model = make_model('resnet8', num_classes=12, **settings)
    variables = model.init(jax.random.key(0))
    x = setting('resnet8')[2]
    _, stats = with_compute_dtype(model).train(variables, x, None, MASK)
    _, expected = model.train(variables, x, None, MASK)
    for leaf in jax.tree.leaves(stats):
      self.assertEqual(leaf.dtype, jnp.float32)
    self.assertBetween(relative(stats, expected), 1e-7, 8 * 2**-8)

  @parameterized.parameters('mlp', 'group_norm_cnn')
  def test_pixels_are_scaled_before_the_cast(self, name):
    model, variables, x = setting(name, pixels=True)
    expected = model.apply(variables, x)
    got = with_compute_dtype(model).apply(variables, x)
    self.assertBetween(relative(got, expected), 1e-6, 8 * 2**-8)

  def test_the_computation_is_in_bfloat16(self):
    model, variables, x = setting('mlp')
    text = str(jax.make_jaxpr(with_compute_dtype(model).apply)(variables, x))
    products = [line for line in text.splitlines() if 'dot_general' in line]
    self.assertLen(products, 2)
    for line in products:
      self.assertIn('bf16', line)

  @parameterized.parameters(*MODELS)
  def test_rematerialised_gives_the_same_numbers(self, name):
    model, variables, x = setting(name)
    expected = outcome(model, variables, x)
    got = outcome(rematerialised(model), variables, x)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
      got,
      expected,
    )

  def test_rematerialised_keeps_fewer_activations(self):
    """What is kept for the backward pass: the input and params alone."""
    model, variables, x = setting('group_norm_cnn')

    def kept(model):
      loss = lambda params: model.train(params, x, None, MASK)[0].sum()
      _, backward = jax.vjp(loss, variables)
      return sum(leaf.size for leaf in jax.tree.leaves(backward))

    self.assertLess(kept(rematerialised(model)), kept(model) / 5)


if __name__ == '__main__':
  absltest.main()
