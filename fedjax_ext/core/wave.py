"""One wave on the devices: the loop that walks a plan's steps.

Before a step the device opens the clients that the plan lists (`init`), then
all lanes take one step (`step` under vmap), then it closes the clients that end
(`final`, the finiteness check and the reducer's `add`). A single lane has no
lane axis at all.

Axis letters: D devices, L lanes, S steps, B examples in a batch, Kd client
slots of one device.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from fedjax_ext.core import reducers, validate
from fedjax_ext.core.layout import CLIENTS, Layout
from fedjax_ext.core.plans import Plan
from fedjax_ext.core.programs import (
  Batch,
  Client,
  ClientOutput,
  ClientProgram,
  StepInfo,
  accept,
  as_types,
  client_keys,
)
from fedjax_ext.core.reducers import Reducer

PyTree = Any


def run_wave(
  program: ClientProgram,
  reducer: Reducer,
  layout: Layout,
  writes: bool,
  sharded: bool,
  *,
  plan: Plan,
  key: jax.Array,
  features: PyTree,
  shared: PyTree,
  inputs: PyTree,
  rows: PyTree,
) -> tuple[PyTree, PyTree]:
  """One wave on all devices.

  Args:
    program: what one client does.
    reducer: how updates combine.
    layout: devices and lanes.
    writes: what `writes_rows` said.
    sharded: how features are placed, see `features.Table`.
    plan: the wave, leaves [D, ...].
    key: scalar key of the plan.
    features: {name: [M, ...]} replicated, or {name: [D, R, ...]} sharded.
    shared: what the server sends, replicated.
    inputs: leaves [D * Kd, ...].
    rows: leaves [D * Kd, ...].

  Returns:
    (acc, metrics, diagnostics), and the new rows or None.
  """
  split, whole = P(CLIENTS), P()
  acc_specs = _specs(reducer.merge)
  return jax.shard_map(
    functools.partial(_run_device, program, reducer, layout, writes, sharded),
    mesh=layout.mesh,
    in_specs=(split, whole, split if sharded else whole, whole, split, split),
    out_specs=((acc_specs, split, split), split),
    # With type tracking, a user's recurrent model whose carry starts from
    # constants would raise.
    check_vma=False,
  )(plan, key, features, shared, inputs, rows)


def _specs(merge: Any) -> Any:
  if isinstance(merge, dict):
    return {name: _specs(m) for name, m in merge.items()}
  return P() if merge == 'sum' else P(CLIENTS)


def _at(tree: PyTree, i: jax.Array) -> PyTree:
  return jax.tree.map(
    lambda x: lax.dynamic_index_in_dim(x, i, 0, keepdims=False), tree
  )


def _put(tree: PyTree, i: jax.Array, value: PyTree) -> PyTree:
  return jax.tree.map(lambda x, v: x.at[i].set(v), tree, as_types(value, tree))


def _zeros(types: PyTree, *leading: int) -> PyTree:
  def zeros(t):
    if jax.dtypes.issubdtype(t.dtype, jax.dtypes.prng_key):
      return jnp.broadcast_to(jax.random.key(0), (*leading, *t.shape))
    return jnp.zeros((*leading, *t.shape), t.dtype)

  return jax.tree.map(zeros, types)


class _Folded(NamedTuple):
  """What closing clients writes to; everything but acc has leading axis Kd."""

  acc: PyTree
  rows: PyTree
  metrics: PyTree
  norms: jax.Array
  dropped: jax.Array


class _Clients:
  """The program on one device's share of a plan: open, step, close by slot."""

  def __init__(
    self, program, reducer, writes, plan, key, features, shared, inputs
  ):
    self.program, self.reducer, self.writes = program, reducer, writes
    self.plan, self.key = plan, key
    self.features, self.shared, self.inputs = features, shared, inputs

  def client(self, slot: jax.Array, rows: PyTree) -> Client:
    return Client(
      self.plan.client[slot],
      self.plan.num_examples[slot],
      _at(rows, slot),
      _at(self.inputs, slot),
    )

  def keys(self, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
    return client_keys(self.key, self.plan.client[slot])

  def open(self, slot: jax.Array, rows: PyTree) -> PyTree:
    client = self.client(slot, rows)
    return self.program.init(self.shared, client, self.keys(slot)[0])

  def step_args(self, s: jax.Array) -> tuple[jax.Array, ...]:
    """The arguments of `step` for every lane, leaves [L, ...]."""
    p = self.plan
    columns = (
      p.example,
      p.count,
      p.step,
      p.epoch,
      p.phase,
      p.epoch_end,
      p.slot,
    )
    return tuple(column[s] for column in columns)

  def step(
    self, state, example, count, step, epoch, phase, end, slot
  ) -> PyTree:
    key = jax.random.fold_in(self.keys(slot)[1], step)
    data = jax.tree.map(lambda x: x[example], self.features)
    mask = jnp.arange(example.shape[0]) < count
    info = StepInfo(key, step, epoch, phase, end, self.plan.round)
    return self.program.step(self.shared, state, Batch(data, mask, info))

  def types(self, rows: PyTree) -> tuple[PyTree, ClientOutput]:
    """Types of a client's state and output; checks that steps keep them."""
    zero = jnp.int32(0)
    state = jax.eval_shape(lambda: self.open(zero, rows))
    state = jax.tree.map(
      lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype), state
    )
    first = lambda: [column[0] for column in self.step_args(zero)]
    after = jax.eval_shape(lambda s: self.step(s, *first()), state)
    _check_step(state, after)
    output = jax.eval_shape(
      lambda s: self.program.final(self.shared, self.client(zero, rows), s),
      state,
    )
    validate.check(
      self.writes
      or bool(jax.tree.leaves(rows))
      or not jax.tree.leaves(output.state),
      'Expected states= for a program whose final returns a client state.',
    )
    return state, output

  def nothing_folded(self, output: ClientOutput, rows: PyTree) -> _Folded:
    num_slots = self.plan.client.shape[0]
    return _Folded(
      self.reducer.init(output.update, num_slots),
      rows,
      jax.tree.map(lambda t: jnp.zeros((num_slots, *t.shape)), output.metrics),
      jnp.zeros(num_slots),
      jnp.zeros(num_slots, bool),
    )

  def close(self, folded: _Folded, slot: jax.Array, state: PyTree) -> _Folded:
    client = self.client(slot, folded.rows)
    output = self.program.final(self.shared, client, state)
    update, weight, row, metrics, norm, dropped = accept(
      output, client.state if self.writes else output.state
    )
    return _Folded(
      self.reducer.add(folded.acc, update, weight, slot),
      _put(folded.rows, slot, row) if self.writes else folded.rows,
      _put(folded.metrics, slot, metrics),
      folded.norms.at[slot].set(norm.astype(folded.norms.dtype)),
      folded.dropped.at[slot].set(dropped),
    )

  def close_empty(self, i: jax.Array, folded: _Folded) -> _Folded:
    slot = self.plan.empty[i]
    return self.close(folded, slot, self.open(slot, folded.rows))


def _one_lane(types: PyTree, step: Any) -> tuple[Any, ...]:
  """States, get, put, advance and events without a lane axis.

  Convolutions stay ungrouped. There is at most one event a step: a branch,
  which is 1.4 times the speed of a loop on CPU.
  """

  def events(count, function, value):
    return lax.cond(count > 0, lambda v: function(0, v), lambda v: v, value)

  return (
    _zeros(types),
    lambda states, lane: states,
    lambda states, lane, state: as_types(state, types),
    lambda states, *args: step(states, *[column[0] for column in args]),
    events,
  )


def _many_lanes(types: PyTree, step: Any, lanes: int) -> tuple[Any, ...]:
  """The same with a leading lane axis [L]."""

  def events(count, function, value):
    return lax.fori_loop(0, count, function, value)

  return _zeros(types, lanes), _at, _put, jax.vmap(step), events


def _run_device(
  program: ClientProgram,
  reducer: Reducer,
  layout: Layout,
  writes: bool,
  sharded: bool,
  plan: Plan,
  key: jax.Array,
  features: PyTree,
  shared: PyTree,
  inputs: PyTree,
  rows: PyTree,
) -> tuple[PyTree, PyTree]:
  """The loop of one device; see the module's docstring."""
  mine = lambda tree: jax.tree.map(lambda x: x[0], tree)  # shard of axis D
  plan = mine(plan)
  features = mine(features) if sharded else features
  clients = _Clients(
    program, reducer, writes, plan, key, features, shared, inputs
  )
  types, output_types = clients.types(rows)
  lanes = plan.slot.shape[1]
  states, get, put, advance, events = (
    _one_lane(types, clients.step)
    if lanes == 1
    else _many_lanes(types, clients.step, lanes)
  )

  def body(s: jax.Array, carry: tuple[PyTree, _Folded]):
    states, folded = carry

    def begin(i, states):
      lane = plan.start[s, i]
      opened = clients.open(plan.slot[s, lane], folded.rows)
      return put(states, lane, opened)

    def end(i, folded):
      lane = plan.end[s, i]
      return clients.close(folded, plan.slot[s, lane], get(states, lane))

    states = events(plan.num_start[s], begin, states)
    states = as_types(advance(states, *clients.step_args(s)), types)
    return states, events(plan.num_end[s], end, folded)

  folded = clients.nothing_folded(output_types, rows)
  folded = lax.fori_loop(0, plan.num_empty, clients.close_empty, folded)
  _, folded = lax.fori_loop(0, plan.num_steps, body, (states, folded))
  acc = reducers.map_merge(
    reducer.merge, folded.acc, layout.sum_devices, lambda x: x
  )
  diagnostics = {'update_norm': folded.norms, 'dropped': folded.dropped}
  return (
    (acc, folded.metrics, diagnostics),
    folded.rows if writes else None,
  )


def writes_rows(
  program: ClientProgram, shared: PyTree, inputs: PyTree, rows: PyTree
) -> bool:
  """Whether a program returns a client state, by its types alone.

  Args:
    program: the client program.
    shared: what the server sends.
    inputs: leaves [D * Kd, ...].
    rows: leaves [D * Kd, ...], () without states.

  Raises:
    InvalidInput: it returns a state without having rows, or another one.
  """
  if not jax.tree.leaves(rows):
    return False
  one = jax.tree.map(lambda r: jax.ShapeDtypeStruct(r.shape[1:], r.dtype), rows)
  number = jax.ShapeDtypeStruct((), jnp.int32)
  client = Client(
    number,
    number,
    one,
    jax.tree.map(lambda r: jax.ShapeDtypeStruct(r.shape[1:], r.dtype), inputs),
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(program.init, shared, client, key)
  returned = jax.eval_shape(program.final, shared, client, state).state
  if not jax.tree.leaves(returned):
    return False
  same = jax.tree.structure(one) == jax.tree.structure(returned) and all(
    a.shape == b.shape and (a.dtype == b.dtype or b.weak_type)
    for a, b in zip(
      jax.tree.leaves(one), jax.tree.leaves(returned), strict=True
    )
  )
  validate.check(
    same,
    'Expected ClientProgram.final to return a state like its row '
    f'{one}, got {returned}.',
  )
  return True


def _check_step(before: PyTree, after: PyTree) -> None:
  """Checks that a step keeps the structure, shapes and dtypes of the state."""
  validate.check(
    jax.tree.structure(before) == jax.tree.structure(after),
    'Expected ClientProgram.step to keep the structure of its state, got '
    f'{jax.tree.structure(after)} from {jax.tree.structure(before)}.',
  )
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(before),
    jax.tree.leaves(after),
    strict=True,
  )
  for (path, old), new in pairs:
    validate.check(
      old.shape == new.shape and (old.dtype == new.dtype or new.weak_type),
      f'Expected ClientProgram.step to keep {old.dtype}{list(old.shape)} at '
      f'state{jax.tree_util.keystr(path)}, got '
      f'{new.dtype}{list(new.shape)}.',
    )
