"""What the tests of models share: numbers drawn with numpy, and gradients."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_ext.models import params_of, with_params
from tests.problems import x64

# Tolerance by dtype.
DTYPES = (('float32', 1e-5), ('float64', 1e-9))


def wide(dtype):
  """64-bit types for float64, the default ones else."""
  return x64() if dtype == 'float64' else contextlib.nullcontext()


def normal(shape, dtype='float32', seed=0):
  return jnp.asarray(
    np.random.default_rng(seed).standard_normal(shape), dtype=dtype
  )


def quick_jit(function):
  """jax.jit for code that runs once: it compiles twice as fast."""
  options = {'xla_backend_optimization_level': 0}
  return jax.jit(function, compiler_options=options)


def draw(init, seed=0, dtype=None):
  """Variables of about flax's scale, biases too; numpy, as init compiles.

  Args:
    init: key -> variables.
    seed: of numpy.
    dtype: of every leaf; its own without.
  """
  rng = np.random.default_rng(seed)

  def leaf(path, spec):
    name = path[-1].key
    values = rng.standard_normal(spec.shape)
    if name in ('scale', 'var'):
      values = 1 + 0.5 * np.tanh(values)
    else:
      values *= max(1, np.prod(spec.shape[:-1])) ** -0.5
    return jnp.asarray(values, dtype or spec.dtype)

  return jax.tree_util.tree_map_with_path(
    leaf, jax.eval_shape(init, jax.random.key(0))
  )


def scalar_of(out):
  """A generic scalar of an array."""
  weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
  return (weights * out).sum()


def value_and_gradient(function, *inputs):
  """Output and the gradients of a generic scalar of it, by every input."""

  def scalar(*args):
    out = function(*args)
    return scalar_of(out), out

  grads, out = jax.grad(scalar, tuple(range(len(inputs))), has_aux=True)(
    *inputs
  )
  return out, grads


def train_step(model, variables, x, key, mask):
  """(logits [B, ...], stats, gradient of a scalar of the rows in the mask)."""

  def loss(params):
    logits, stats = model.train(with_params(variables, params), x, key, mask)
    rows = mask.reshape(-1, *[1] * (logits.ndim - 1))
    weights = jnp.cos(1.0 + jnp.arange(logits[0].size)).reshape(logits[0].shape)
    return jnp.where(rows, weights * logits**2, 0).sum(), (logits, stats)

  grads, (logits, stats) = jax.grad(loss, has_aux=True)(params_of(variables))
  return logits, stats, grads


def whole_error(a, b):
  """||x - y|| / ||y|| of two trees, each as one vector.

  For gradients of which some leaves are zero but for rounding, as that of the
  bias of attention's keys is.
  """
  flat = lambda tree: jnp.concatenate(
    [x.ravel() for x in jax.tree.leaves(tree)]
  )
  a, b = flat(a), flat(b)
  return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def num_params(init):
  """Number of trained parameters of init: key -> variables."""
  variables = jax.eval_shape(init, jax.random.key(0))
  return sum(leaf.size for leaf in jax.tree.leaves(params_of(variables)))


def stack(trees):
  """Trees of arrays [...] as one of [L, ...]."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def lane(tree, index):
  """One of the stacked trees."""
  return jax.tree.map(lambda leaf: leaf[index], tree)
