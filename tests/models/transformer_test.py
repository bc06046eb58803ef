"""Transformers equal plain numpy-like formulas; causality, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.models import (
  TextTransformer,
  VisionTransformer,
  from_module,
  make_model,
)
from tests.models.checks import (
  draw,
  normal,
  quick_jit,
  value_and_gradient,
  whole_error,
)
from tests.problems import relative_error, x64


def dense(params, x):
  return x @ params['kernel'] + params['bias']


def layer_norm(params, x):
  x = x - x.mean(-1, keepdims=True)
  x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  return x * params['scale'] + params['bias']


def attention(params, x, causal):
  """Multi-head attention from Vaswani et al.'s equation 1, head by head."""
  out = params['out']['bias']
  for head in range(params['query']['bias'].shape[0]):
    query, key, value = (
      x @ params[name]['kernel'][:, head] + params[name]['bias'][head]
      for name in ('query', 'key', 'value')
    )
    scores = query @ key.swapaxes(1, 2) / jnp.sqrt(query.shape[-1])
    if causal:
      seen = np.tril(np.ones(scores.shape[1:], bool))
      scores = jnp.where(seen, scores, -jnp.inf)
    out = out + jax.nn.softmax(scores) @ value @ params['out']['kernel'][head]
  return out


def body(params, x, causal):
  """Positions, pre-norm blocks and the last norm."""
  x = x + params['position']
  blocks = [name for name in params if name.startswith('TransformerBlock')]
  for name in sorted(blocks):
    block = params[name]
    normed = layer_norm(block['LayerNorm_0'], x)
    x = x + attention(block['MultiHeadDotProductAttention_0'], normed, causal)
    y = dense(block['Dense_0'], layer_norm(block['LayerNorm_1'], x))
    x = x + dense(block['Dense_1'], jax.nn.gelu(y))
  return layer_norm(params['LayerNorm_0'], x)


def plain_text(params, tokens):
  x = params['embedding']['embedding'][tokens]
  return dense(params['output'], body(params['Transformer_0'], x, True))


def plain_vision(params, images, patch, pool):
  batch, height, width, depth = images.shape
  x = images.reshape(
    batch, height // patch, patch, width // patch, patch, depth
  )
  x = x.swapaxes(2, 3).reshape(batch, -1, patch * patch * depth)
  kernel = params['Conv_0']['kernel']
  x = x @ kernel.reshape(-1, kernel.shape[-1]) + params['Conv_0']['bias']
  if pool == 'cls':
    cls = jnp.tile(params['cls'], (batch, 1, 1))
    x = jnp.concatenate([cls, x], axis=1)
  x = body(params['Transformer_0'], x, False)
  return dense(params['classifier'], x.mean(1) if pool == 'mean' else x[:, 0])


class TransformerTest(parameterized.TestCase):
  @parameterized.parameters('mean', 'cls')
  def test_vision_by_hand(self, pool):
    """Logits and gradients of the formulas; images that are not square."""
    module = VisionTransformer(3, 2, 8, depth=2, heads=2, pool=pool)
    model = from_module(module, (4, 6, 3))
    with x64():
      params = draw(model.init, 0, 'float64')
      x = normal((2, 4, 6, 3), 'float64')
      got, expected = quick_jit(
        lambda params: [
          value_and_gradient(lambda params: f(params, x), params)
          for f in (model.apply, lambda p, x: plain_vision(p, x, 2, pool))
        ]
      )(params)
      self.assertLess(relative_error(got[0], expected[0]), 1e-9)
      self.assertLess(whole_error(got[1], expected[1]), 1e-9)

  def test_text_by_hand(self):
    """Logits and gradients of the formulas, with the causal mask."""
    module = TextTransformer(7, 8, depth=2, heads=2)
    model = from_module(module, (5,), jnp.int32)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (3, 5)))
    with x64():
      params = draw(model.init, 0, 'float64')
      got, expected = quick_jit(
        lambda params: [
          value_and_gradient(lambda params: f(params, tokens), params)
          for f in (model.apply, plain_text)
        ]
      )(params)
      self.assertEqual(got[0].shape, (3, 5, 7))
      self.assertLess(relative_error(got[0], expected[0]), 1e-9)
      self.assertLess(whole_error(got[1], expected[1]), 1e-9)

  def test_the_future_is_unseen(self):
    """Logits of a step depend on tokens up to it, and on each of those."""
    model = make_model(
      'text_transformer', input_shape=(5,), num_classes=4, width=8, depth=2
    )
    params, tokens = draw(model.init), jnp.zeros((1, 5), int)
    apply = quick_jit(model.apply)
    before = apply(params, tokens)
    for step in range(5):
      changed = jnp.abs(apply(params, tokens.at[0, step].set(1)) - before)
      self.assertEqual(float(changed[0, :step].sum()), 0)
      self.assertTrue((changed[0, step:].max(-1) > 0).all())

  @parameterized.parameters(
    ('vision_transformer', (4, 4, 1)), ('text_transformer', (5,))
  )
  def test_dropout_only_in_training(self, name, shape):
    """There it depends on the key and on nothing else."""
    settings = {'width': 8, 'depth': 1, 'heads': 2}
    model, without = (
      make_model(
        name, input_shape=shape, num_classes=3, dropout=rate, **settings
      )
      for rate in (0.5, 0.0)
    )
    params, mask = draw(model.init), jnp.ones(2, bool)
    x = normal((2, *shape)) if len(shape) > 1 else jnp.ones((2, *shape), int)
    train = quick_jit(lambda key: model.train(params, x, key, mask)[0])
    one, again, two = (train(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    self.assertGreater(relative_error(one, two), 0.01)
    np.testing.assert_array_equal(
      *quick_jit(lambda: (model.apply(params, x), without.apply(params, x)))()
    )


if __name__ == '__main__':
  absltest.main()
