"""A model as pure functions, and models with moving statistics.

Axis letters: B examples.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_ext.core import validate

PyTree = Any
# Collections of flax modules: what `tap` leaves, and what is added there.
TAPS, SHIFTS = 'taps', 'shifts'


class Variables(NamedTuple):
  """The variables of a model that keeps more than trained parameters.

  A model without moving statistics is a plain pytree of params. With BatchNorm
  it is this pair: optimizers, penalties and robust rules see `params` alone,
  while `stats` follow the batches and are averaged over clients.

  Attributes:
    params: what gradients train, a pytree.
    stats: moving statistics, a pytree.
  """

  params: PyTree
  stats: PyTree


class Model(NamedTuple):
  """A model as three pure functions.

  Attributes:
    init: key -> variables: a pytree of params, or `Variables`.
    apply: (variables, x [B, ...]) -> logits [B, ...], as in evaluation.
    train: (variables, x [B, ...], key, mask bool [B]) -> (logits, stats), as in
      training: with dropout (unless the key is None), and BatchNorm over the
      examples in the mask. The new stats are () for a model without any.
    tapped: (variables, x [B, ...], shifts) -> (logits, feature maps), as in
      evaluation. The maps are a tuple of the tapped layers' outputs
      [B, H, W, D], shallow to deep, empty for a model without taps; `shifts`
      are arrays like them that are added there, or None. So the gradient by
      zero shifts is the one by the maps. None for models of no flax module.
  """

  init: Callable[[jax.Array], PyTree]
  apply: Callable[[PyTree, jax.Array], jax.Array]
  train: Callable[
    [PyTree, jax.Array, jax.Array, jax.Array], tuple[jax.Array, PyTree]
  ]
  tapped: (
    Callable[
      [PyTree, jax.Array, tuple[jax.Array, ...] | None],
      tuple[jax.Array, tuple[jax.Array, ...]],
    ]
    | None
  ) = None


def params_of(variables: PyTree) -> PyTree:
  """The trained params (a pytree) of a model's variables."""
  return variables.params if isinstance(variables, Variables) else variables


def stats_of(variables: PyTree) -> PyTree:
  """The moving statistics (a pytree) of a model's variables, () without."""
  return variables.stats if isinstance(variables, Variables) else ()


def with_params(
  variables: PyTree, params: PyTree, stats: PyTree = ()
) -> PyTree:
  """Variables like the given ones with other params and, if any, stats.

  Args:
    variables: a pytree of params, or `Variables`.
    params: a pytree like theirs.
    stats: a pytree like theirs; () keeps the old ones.
  """
  if not isinstance(variables, Variables):
    return params
  kept = stats if jax.tree.leaves(stats) else variables.stats
  return Variables(params, kept)


def check_no_statistics(
  algorithm: str, init: Callable[[jax.Array], PyTree]
) -> None:
  """Raises InvalidInput where a model (key -> variables) has statistics."""
  model = jax.eval_shape(init, jax.random.key(0))
  validate.check(
    not isinstance(model, Variables),
    f'Expected a model without moving statistics for {algorithm}, got '
    'norm=batch.',
  )


def from_module(
  module: nn.Module, input_shape: Sequence[int], dtype: Any = jnp.float32
) -> Model:
  """Wraps a flax module called as module(x, train=False, mask=None).

  The module returns logits [B, ...]. It may use the random stream 'dropout' in
  training and keep the collection 'batch_stats'; `mask` bool [B] says which
  examples count in BatchNorm.

  Args:
    module: the module.
    input_shape: shape of one example, without B.
    dtype: of the examples that `init` sees; integers for tokens.
  """

  def split(variables: PyTree) -> dict[str, PyTree]:
    stats = stats_of(variables)
    collections = {'params': params_of(variables)}
    return collections | ({'batch_stats': stats} if stats else {})

  def init(key: jax.Array) -> PyTree:
    variables = module.init(key, jnp.zeros((1, *input_shape), dtype))
    stats = variables.get('batch_stats', {})
    params = variables['params']
    return Variables(params, stats) if stats else params

  def apply(variables: PyTree, x: jax.Array) -> jax.Array:
    return module.apply(split(variables), x)

  def train(
    variables: PyTree, x: jax.Array, key: jax.Array | None, mask: jax.Array
  ) -> tuple[jax.Array, PyTree]:
    logits, updated = module.apply(
      split(variables),
      x,
      train=True,
      mask=mask,
      rngs=None if key is None else {'dropout': key},
      mutable=['batch_stats'],
    )
    return logits, updated.get('batch_stats', ())

  def tapped(
    variables: PyTree, x: jax.Array, shifts: tuple[jax.Array, ...] | None
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    given = split(variables)
    if shifts is not None:
      shape = jax.eval_shape(module.init, jax.random.key(0), x)
      places = jax.tree.structure(shape.get(SHIFTS, {}))
      given[SHIFTS] = jax.tree.unflatten(places, shifts)
    logits, sown = module.apply(given, x, mutable=[TAPS])
    return logits, tuple(jax.tree.leaves(sown.get(TAPS, {})))

  return Model(init, apply, train, tapped)


def tap(module: nn.Module, layer: int, x: jax.Array) -> jax.Array:
  """Lets others read and shift a feature map; see `Model.tapped`.

  Args:
    module: whose compact method this is called in; all taps of a model belong
      to one module.
    layer: 0, 1, ... from shallow to deep, below 100.
    x: [B, H, W, D].

  Returns:
    x, shifted if somebody asks for it.
  """
  name = f'layer{layer:02d}'
  module.sow(TAPS, name, x)
  return module.perturb(name, x, collection=SHIFTS)
