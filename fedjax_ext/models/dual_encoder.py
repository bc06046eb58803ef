"""Dual encoders: contexts and items as vectors in one space.

The model of Ning et al., "Learning federated representations and
recommendations with limited negatives", 2021, https://arxiv.org/abs/2108.07931,
as its published code has it: one item table for both towers, the masked mean of
a context's items, dense layers.

Axis letters: B examples, T items of a context, V items (0 is padding), D
features of an embedding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_ext.core import validate

PyTree = Any
PAD = 0
# Where the item table stands in the params, for `core.SparseTable`.
TABLE = 'items'
ACTIVATIONS = {
  'relu': nn.relu,
  'tanh': jnp.tanh,
  'gelu': nn.gelu,
  'linear': lambda x: x,
}


class DualEncoder(NamedTuple):
  """A retrieval model as pure functions of its params.

  Attributes:
    init: key -> params, with the item table [V+1, D] under `TABLE`.
    contexts: (params, ids int [B, T]) -> [B, D'], 0 being padding.
    items: (params, ids int [N]) -> [N, D'].
    num_items: V.
  """

  init: Callable[[jax.Array], PyTree]
  contexts: Callable[[PyTree, jax.Array], jax.Array]
  items: Callable[[PyTree, jax.Array], jax.Array]
  num_items: int


def masked_mean_embedding(table: jax.Array, ids: jax.Array) -> jax.Array:
  """Mean of the rows of table [V+1, D] at ids int [B, T] that are not padding.

  Returns:
    [B, D]; zeros where all of a row's ids are padding.
  """
  real = (ids != PAD).astype(table.dtype)
  summed = jnp.einsum('btd,bt->bd', table[ids], real)
  return summed / jnp.maximum(real.sum(-1, keepdims=True), 1)


def dual_encoder(
  *,
  num_classes: int,
  input_shape: tuple[int, ...],
  embedding_size: int = 16,
  context_hidden: tuple[int, ...] = (16,),
  context_activations: tuple[str, ...] = ('relu',),
  item_hidden: tuple[int, ...] = (),
  item_activations: tuple[str, ...] = (),
) -> DualEncoder:
  """Builds a dual encoder.

  Context tower: embed, masked mean, dense layers. Item tower: embed, dense
  layers. The table starts from U(-0.05, 0.05), kernels from Glorot's uniform
  distribution, biases from 0: V = 3952 items and 16 features make 63,520
  parameters.

  Args:
    num_classes: V + 1, items and padding.
    input_shape: (T,), the shape of one context.
    embedding_size: D.
    context_hidden: widths of the context tower's dense layers.
    context_activations: their activations, of `ACTIVATIONS`.
    item_hidden: widths of the item tower's dense layers.
    item_activations: their activations.

  Raises:
    InvalidInput: a size is below 1, a tower has more or fewer activations than
      layers, or the towers end with different sizes.
  """
  validate.check(
    len(input_shape) == 1,
    f'Expected contexts of shape [T], got {list(input_shape)}.',
  )
  validate.at_least('num_classes', num_classes, 2)
  validate.at_least('embedding_size', embedding_size, 1)
  towers = (
    ('context', context_hidden, context_activations),
    ('item', item_hidden, item_activations),
  )
  for tower, widths, activations in towers:
    validate.check(
      len(widths) == len(activations),
      f'Expected one activation for each layer, got {tower}_hidden={widths} '
      f'and {tower}_activations={activations}.',
    )
    for width in widths:
      validate.at_least(f'{tower}_hidden', width, 1)
    for name in activations:
      validate.one_of(f'{tower}_activations', name, ACTIVATIONS)
  ends = [(embedding_size, *widths)[-1] for _, widths, _ in towers]
  validate.check(
    ends[0] == ends[1],
    f'Expected towers that end with one size, got {ends[0]} (contexts) and '
    f'{ends[1]} (items).',
  )
  glorot = jax.nn.initializers.glorot_uniform()

  def init(key: jax.Array) -> PyTree:
    table_key, *keys = jax.random.split(key, 3)
    shape = (num_classes, embedding_size)
    params = {
      TABLE: jax.random.uniform(table_key, shape, minval=-0.05, maxval=0.05)
    }
    for (tower, widths, _), tower_key in zip(towers, keys, strict=True):
      sizes = (embedding_size, *widths)
      for i, width in enumerate(widths):
        kernel = glorot(jax.random.fold_in(tower_key, i), (sizes[i], width))
        params[f'{tower}_{i}'] = {'kernel': kernel, 'bias': jnp.zeros(width)}
    return params

  def dense(params: PyTree, tower: int, x: jax.Array) -> jax.Array:
    name, _, activations = towers[tower]
    for i, activation in enumerate(activations):
      layer = params[f'{name}_{i}']
      x = ACTIVATIONS[activation](x @ layer['kernel'] + layer['bias'])
    return x

  return DualEncoder(
    init,
    lambda params, ids: dense(
      params, 0, masked_mean_embedding(params[TABLE], ids)
    ),
    lambda params, ids: dense(params, 1, params[TABLE][ids]),
    num_classes - 1,
  )
