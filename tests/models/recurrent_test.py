"""LSTM: values and gradients of plain autodiff, of flax, in lanes and loops."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen as nn

from fedjax_ext.models import (
  LSTM,
  LanguageLSTM,
  from_module,
  lstm,
  make_model,
)
from tests.models.checks import (
  DTYPES,
  draw,
  lane,
  normal,
  quick_jit,
  value_and_gradient,
  wide,
)
from tests.problems import relative_error, x64


def plain_lstm(gates_x, kernel):
  """The recurrence as in the papers, for autodiff."""
  hidden = kernel.shape[0]

  def step(state, gates):
    h, c = state
    gates = gates + h @ kernel
    i, f, g, o = (gates[:, k * hidden : (k + 1) * hidden] for k in range(4))
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h

  zeros = jnp.zeros((gates_x.shape[1], hidden), gates_x.dtype)
  return jax.lax.scan(step, (zeros, zeros), gates_x)[1]


def flax_lstm(params, x):
  """flax's OptimizedLSTMCell with the parameters of ours, x [T, B, D]."""
  hidden = params['recurrent_kernel'].shape[0]
  weights, split = {}, lambda array: jnp.split(array, 4, axis=-1)
  for k, gate in enumerate('ifgo'):
    weights[f'i{gate}'] = {'kernel': split(params['input_kernel'])[k]}
    weights[f'h{gate}'] = {
      'kernel': split(params['recurrent_kernel'])[k],
      'bias': split(params['bias'])[k],
    }
  cell = nn.OptimizedLSTMCell(hidden, param_dtype=x.dtype)
  layer = nn.RNN(cell, time_major=True)
  return layer.apply({'params': {'cell': weights}}, x)


def plain_language_model(params, tokens):
  """The network layer after layer: rows of the table, cells, dense layers."""
  x = params['embedding']['embedding'][tokens.T]
  layers = [name for name in params if name.startswith('LSTM')]
  for name in sorted(layers):
    x = flax_lstm(params[name], x)
  for name in ('projection', 'output'):
    if name in params:
      x = x @ params[name]['kernel'] + params[name]['bias']
  return x.swapaxes(0, 1)


class LstmTest(parameterized.TestCase):
  @parameterized.product(
    dtype=DTYPES, shape=((7, 3, 4), (1, 3, 4), (5, 1, 2), (1, 1, 1))
  )
  def test_equals_autodiff(self, dtype, shape):
    """Values and gradients; one step and one example too."""
    (dtype, tolerance), (steps, batch, hidden) = dtype, shape
    with wide(dtype):
      gates = normal((steps, batch, 4 * hidden), dtype)
      kernel = normal((hidden, 4 * hidden), dtype, 1)
      got, expected = quick_jit(
        lambda *args: [value_and_gradient(f, *args) for f in (lstm, plain_lstm)]
      )(gates, kernel)
      self.assertEqual(got[0].dtype, dtype)
      self.assertEqual(got[0].shape, (steps, batch, hidden))
      self.assertLess(relative_error(got, expected), tolerance)

  def test_finite_differences(self):
    """The gradient is the slope, in a random direction."""
    with x64():
      gates, kernel = normal((4, 2, 12), 'float64'), normal((3, 12), 'float64')
      along = normal((4, 2, 12), 'float64', 5), normal((3, 12), 'float64', 6)
      f = lambda e: jnp.sum(
        lstm(gates + e * along[0], kernel + e * along[1]) ** 2
      )
      slope = lambda e: (f(e) - f(-e)) / (2 * e)
      got, expected = quick_jit(lambda: (jax.grad(f)(0.0), slope(1e-5)))()
      np.testing.assert_allclose(got, expected, rtol=1e-7)

  def test_vmap_over_clients_equals_a_loop(self):
    """Every client has its own kernel; or all share one."""
    gates, kernels = normal((3, 5, 2, 8)), normal((3, 2, 8), seed=1)
    both = quick_jit(lambda *args: value_and_gradient(lstm, *args))
    got = jax.vmap(both)(gates, kernels)
    shared = jax.vmap(both, (0, None))(gates, kernels[0])
    for c in range(3):
      self.assertLess(
        relative_error(lane(got, c), both(gates[c], kernels[c])), 1e-5
      )
      self.assertLess(
        relative_error(lane(shared, c), both(gates[c], kernels[0])), 1e-5
      )

  def test_in_loops(self):
    """Descent in a compiled loop equals descent in Python."""
    gates, kernel = normal((5, 2, 8)), normal((2, 8), seed=1)
    grad = jax.grad(lambda kernel: (lstm(gates, kernel) ** 2).sum())
    step = lambda kernel: kernel - 0.1 * grad(kernel)
    looped = jax.lax.fori_loop(0, 4, lambda _, kernel: step(kernel), kernel)
    for _ in range(4):
      kernel = quick_jit(step)(kernel)
    self.assertLess(relative_error(looped, kernel), 1e-5)

  def test_layer_equals_flax(self):
    """OptimizedLSTMCell with the same parameters, by inputs too."""
    with x64():
      layer, x = LSTM(4), normal((6, 3, 5), 'float64')
      init = lambda key: layer.init(key, x)['params']
      params = draw(init, 0, 'float64')
      ours = lambda params, x: layer.apply({'params': params}, x)
      got, expected = quick_jit(
        lambda *args: [value_and_gradient(f, *args) for f in (ours, flax_lstm)]
      )(params, x)
      self.assertLess(relative_error(got, expected), 1e-9)

  @parameterized.parameters(2, 50)
  def test_tokens_choose_rows(self, vocabulary):
    """As inputs looked up before, whether rows or tokens are more."""
    with x64():
      layer, table = LSTM(4), normal((vocabulary, 5), 'float64')
      tokens = jnp.asarray(
        np.random.default_rng(0).integers(0, vocabulary, (6, 3))
      )
      init = lambda key: layer.init(key, table, tokens)['params']
      params = draw(init, 0, 'float64')
      apply = lambda *args: layer.apply({'params': params}, *args)
      got, expected = quick_jit(
        lambda table: [
          value_and_gradient(lambda table: apply(table, tokens), table),
          value_and_gradient(lambda table: apply(table[tokens]), table),
        ]
      )(table)
      self.assertLess(relative_error(got, expected), 1e-9)

  def test_forget_gates_start_open(self):
    """Biases are 1 for the second quarter, 0 for the rest."""
    params = LSTM(3).init(jax.random.key(0), normal((2, 1, 2)))['params']
    np.testing.assert_array_equal(params['bias'], 3 * [0] + 3 * [1] + 6 * [0])
    kernel = params['recurrent_kernel']
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(3), atol=1e-5)


class LanguageLSTMTest(parameterized.TestCase):
  @parameterized.parameters(
    {'num_layers': 1},
    {'num_layers': 2},
    {'num_layers': 3, 'projection': 3},
    {'vocabulary': 40, 'projection': 3},  # more rows than tokens
  )
  def test_equals_layer_after_layer(self, vocabulary=7, **settings):
    """Logits [B, T, V] and gradients by every parameter."""
    module = LanguageLSTM(vocabulary, embedding=4, hidden=5, **settings)
    model = from_module(module, (6,), jnp.int32)
    tokens = jnp.asarray(
      np.random.default_rng(0).integers(0, vocabulary, (3, 6))
    )
    with x64():
      params = draw(model.init, 0, 'float64')
      got, expected = quick_jit(
        lambda params: [
          value_and_gradient(lambda params: apply(params, tokens), params)
          for apply in (model.apply, plain_language_model)
        ]
      )(params)
      self.assertEqual(got[0].shape, (3, 6, vocabulary))
      self.assertLess(relative_error(got, expected), 1e-9)

  def test_the_future_is_unseen(self):
    """Logits of a step depend on tokens up to it, and on each of those."""
    model = make_model('char_lstm', input_shape=(6,), num_classes=5, hidden=8)
    params, tokens = draw(model.init), jnp.zeros((1, 6), int)
    apply = quick_jit(model.apply)
    before = apply(params, tokens)
    for step in range(6):
      changed = jnp.abs(apply(params, tokens.at[0, step].set(1)) - before)
      self.assertEqual(float(changed[0, :step].sum()), 0)
      self.assertTrue((changed[0, step:].max(-1) > 0).all())

  def test_other_lengths(self):
    """One set of parameters serves sequences of any length."""
    model = make_model('char_lstm', input_shape=(6,), num_classes=5, hidden=8)
    params = draw(model.init)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (2, 9)))
    apply = quick_jit(model.apply)
    long, short = apply(params, tokens), apply(params, tokens[:, :4])
    self.assertLess(relative_error(long[:, :4], short), 1e-5)


if __name__ == '__main__':
  absltest.main()
