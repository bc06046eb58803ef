"""Reducers: how clients' updates become one result.

A reducer folds each update in as its client closes. `weighted_mean` and
`total` keep one model of memory per device whatever the cohort; rules that
must see every client `collect` first and work in `finish`.

Axis letters: K' client slots over all devices and waves (some empty), Kd slots
of one device.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any
Merge = Literal['sum', 'concat'] | dict[str, Any]


def _no_memory(template: PyTree, num_clients: int) -> PyTree:
  del template, num_clients
  return ()


class Reducer(NamedTuple):
  """Folds updates; `add` runs once per client, unbatched.

  Attributes:
    init: (update template, Kd) -> accumulator pytree of one device.
    add: (accumulator, update, weight, slot) -> accumulator; weight and slot
      are scalars. An absent or dropped client comes with weight 0 and zeros.
    merge: how accumulators of devices, waves and calls combine: leaves are
      added ('sum') or joined along their leading Kd axis ('concat'); a dict
      says it key by key.
    finish: (accumulator, memory, clients int32 [K'], key) -> (result, memory).
      `clients` names the rows of what was collected; -1 marks an empty slot.
    memory: (update template, C) -> what the rule carries from round to round.
  """

  init: Callable[[PyTree, int], PyTree]
  add: Callable[[PyTree, PyTree, jax.Array, jax.Array], PyTree]
  merge: Merge
  finish: Callable[
    [PyTree, PyTree, jax.Array, jax.Array | None], tuple[PyTree, PyTree]
  ]
  memory: Callable[[PyTree, int], PyTree] = _no_memory


class Collected(NamedTuple):
  """What `collect` returns: every leaf of update is [K', ...], weight [K']."""

  update: PyTree
  weight: jax.Array


def _zeros(template: PyTree) -> PyTree:
  return jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), template)


def total() -> Reducer:
  """The sum of weight * update over clients, a pytree shaped like one update.

  `finish` returns (sum, sum of weights): a fixed denominator, as differential
  privacy asks for, is the caller's choice.
  """

  def add(acc, update, weight, slot):
    del slot
    summed, weights = acc
    summed = jax.tree.map(
      # An absent client counts for nothing even if a map made it NaN.
      lambda a, u: a + jnp.where(weight == 0, 0, weight * u).astype(a.dtype),
      summed,
      update,
    )
    return summed, weights + weight

  return Reducer(
    init=lambda template, num_slots: (_zeros(template), jnp.zeros(())),
    add=add,
    merge='sum',
    finish=lambda acc, memory, clients, key: (acc, memory),
  )


def weighted_mean() -> Reducer:
  """sum(weight * update) / sum(weight), a pytree shaped like one update.

  Zeros if no client counts. McMahan et al., "Communication-efficient learning
  of deep networks from decentralized data", 2017,
  https://arxiv.org/abs/1602.05629.
  """

  def finish(acc, memory, clients, key):
    del clients, key
    summed, weights = acc
    scale = jnp.where(weights > 0, 1 / jnp.where(weights > 0, weights, 1), 0)
    mean = jax.tree.map(lambda x: (x * scale).astype(x.dtype), summed)
    return mean, memory

  return total()._replace(finish=finish)


def collect() -> Reducer:
  """Keeps every update: `finish` returns a Collected, leaves [K', ...].

  The memory is K' updates, sharded over the devices.
  """

  def init(template, num_slots):
    rows = jax.tree.map(
      lambda t: jnp.zeros((num_slots, *t.shape), t.dtype), template
    )
    return Collected(rows, jnp.zeros(num_slots))

  def add(acc, update, weight, slot):
    return jax.tree.map(
      lambda a, u: a.at[slot].set(u), acc, Collected(update, weight)
    )

  return Reducer(
    init, add, 'concat', lambda acc, memory, clients, key: (acc, memory)
  )


def by_key(**reducers: Reducer) -> Reducer:
  """Reduces each key of a dict update by its own rule.

  Updates, accumulators, results and memories are dicts over the same keys.
  """
  names = list(reducers)

  def finish(acc, memory, clients, key):
    done = {
      name: reducers[name].finish(
        acc[name],
        memory[name] if memory else (),
        clients,
        None if key is None else jax.random.fold_in(key, i),
      )
      for i, name in enumerate(names)
    }
    return {n: r for n, (r, _) in done.items()}, {
      n: m for n, (_, m) in done.items()
    }

  return Reducer(
    init=lambda template, num_slots: {
      n: reducers[n].init(template[n], num_slots) for n in names
    },
    add=lambda acc, update, weight, slot: {
      n: reducers[n].add(acc[n], update[n], weight, slot) for n in names
    },
    merge={n: reducers[n].merge for n in names},
    finish=finish,
    memory=lambda template, num_clients: {
      n: reducers[n].memory(template[n], num_clients) for n in names
    },
  )


def premap(
  function: Callable[[PyTree, jax.Array], PyTree], reducer: Reducer
) -> Reducer:
  """Maps each update before it is folded in, e.g. clips it.

  Args:
    function: (update pytree, scalar weight) -> update.
    reducer: what folds the mapped updates.
  """

  def mapped(template):
    weight = jax.ShapeDtypeStruct((), float)
    return jax.eval_shape(function, template, weight)

  def add(acc, update, weight, slot):
    return reducer.add(acc, function(update, weight), weight, slot)

  return reducer._replace(
    init=lambda template, num_slots: reducer.init(mapped(template), num_slots),
    add=add,
    memory=lambda template, num_clients: reducer.memory(
      mapped(template), num_clients
    ),
  )


def merge_accumulators(merge: Merge, a: PyTree, b: PyTree) -> PyTree:
  """Combines the accumulator pytrees of two waves or calls."""
  if isinstance(merge, dict):
    return {n: merge_accumulators(m, a[n], b[n]) for n, m in merge.items()}
  if merge == 'sum':
    return jax.tree.map(jnp.add, a, b)
  return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)


def map_merge(
  merge: Merge, acc: PyTree, on_sum: Callable, on_concat: Callable
) -> PyTree:
  """Applies a function to every accumulator leaf by its merge rule."""
  if isinstance(merge, dict):
    return {
      n: map_merge(m, acc[n], on_sum, on_concat) for n, m in merge.items()
    }
  return jax.tree.map(on_sum if merge == 'sum' else on_concat, acc)


def finish(
  reducer: Reducer,
  output: Any,
  memory: PyTree = (),
  key: jax.Array | None = None,
) -> tuple[PyTree, PyTree]:
  """Finishes a `RoundOutput`: (result pytree, memory pytree).

  Args:
    reducer: the reducer that the round ran with.
    output: anything with `acc` and `clients` [K'].
    memory: the rule's memory, from `reducer.memory` or the last round.
    key: scalar key for rules that draw noise or break ties.
  """
  return reducer.finish(output.acc, memory, output.clients, key)
