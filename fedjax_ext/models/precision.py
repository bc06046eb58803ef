"""Models that compute in bfloat16, and models that recompute activations.

Both wrap a `Model`: params, gradients, optimizers and aggregation stay float32.

Axis letters: B examples.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_ext.models.layers import as_float_image
from fedjax_ext.models.model import Model, Variables, params_of

PyTree = Any


def with_compute_dtype(model: Model, dtype: Any = jnp.bfloat16) -> Model:
  """Casts params and inputs before the model, and its logits after it.

  Gradients arrive at the float32 params by way of the cast, so that updates
  smaller than bfloat16's steps add up. Moving statistics stay as they are.
  Micikevicius et al., "Mixed precision training", 2018,
  https://arxiv.org/abs/1710.03740; bfloat16 has the range of float32, so no
  loss scaling is needed.

  Args:
    model: takes images [B, H, W], [B, H, W, D], vectors or tokens [B, T].
    dtype: what to compute in.
  """

  def cast(tree: PyTree) -> PyTree:
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if floating(x) else x, tree)

  def cast_params(variables: PyTree) -> PyTree:
    if isinstance(variables, Variables):
      return variables._replace(params=cast(variables.params))
    return cast(variables)

  def cast_input(x: jax.Array) -> jax.Array:
    # Integers of two axes are tokens, of more pixels.
    if x.ndim > 2 and jnp.issubdtype(x.dtype, jnp.integer):
      x = as_float_image(x)
    return cast(x)

  def master_type(variables: PyTree) -> Any:
    return jnp.result_type(*jax.tree.leaves(params_of(variables)))

  def apply(variables: PyTree, x: jax.Array) -> jax.Array:
    logits = model.apply(cast_params(variables), cast_input(x))
    return logits.astype(master_type(variables))

  def train(
    variables: PyTree, x: jax.Array, key: jax.Array | None, mask: jax.Array
  ) -> tuple[jax.Array, PyTree]:
    logits, stats = model.train(
      cast_params(variables), cast_input(x), key, mask
    )
    return logits.astype(master_type(variables)), stats

  return Model(model.init, apply, train)


def rematerialised(model: Model) -> Model:
  """Recomputes activations in the backward pass instead of keeping them.

  About a third more time for memory that no longer grows with depth: Chen et
  al., "Training deep nets with sublinear memory cost", 2016,
  https://arxiv.org/abs/1604.06174. Values and gradients are the same.

  Args:
    model: of inputs [B, ...].
  """
  return model._replace(train=jax.checkpoint(model.train))
