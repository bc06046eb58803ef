"""The engine: one client's program over a whole cohort, as one compiled loop.

`for_each_client(program, reducer)` returns a function that runs a round. On
each device a loop walks the plan's steps. Before a step it opens the clients
that the plan lists (`init`), then all lanes take one step (`step` under vmap),
then it closes the clients that end (`final`, the finiteness check and the
reducer's `add`). A single lane has no lane axis at all.

Axis letters: D devices, L lanes, S steps, B examples in a batch, Kd client
slots of one device, K' = W * D * Kd slots of a round with W waves.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from fedjax_ext.core import reducers, validate
from fedjax_ext.core.client_states import ClientStates
from fedjax_ext.core.cohort import Cohort, cohort_inputs
from fedjax_ext.core.debug import run_debug
from fedjax_ext.core.layout import CLIENTS, Layout
from fedjax_ext.core.plans import Plan, lane_utilisation
from fedjax_ext.core.programs import (
  Batch,
  Client,
  ClientProgram,
  StepInfo,
  accept,
  as_types,
  client_keys,
)
from fedjax_ext.core.reducers import Reducer

PyTree = Any


class RoundOutput(NamedTuple):
  """What a round leaves behind, by slot.

  Attributes:
    acc: the reducer's accumulator; `reducers.finish` makes the result.
    clients: client number of every slot, int32 [K'], -1 where empty.
    metrics: {name: (sum [K'], weight [K'])}; zeros for dropped clients.
    diagnostics: 'update_norm' [K'], the L2 norm of each update; 'dropped'
      bool [K'], clients whose update, weight or state was not finite;
      'lane_utilisation', a scalar.
  """

  acc: PyTree
  clients: np.ndarray
  metrics: dict[str, tuple[jax.Array, jax.Array]]
  diagnostics: dict[str, Any]


RunClients = Callable[..., tuple[RoundOutput, ClientStates | None]]


def for_each_client(
  program: ClientProgram,
  reducer: Reducer,
  *,
  layout: Layout,
  debug: bool = False,
) -> RunClients:
  """Compiles a client program and a reducer into a function over cohorts.

  Args:
    program: what one client does.
    reducer: how updates combine.
    layout: devices, lanes, waves.
    debug: run the same program client by client, uncompiled, and name the
      stage, client and batch of a failure.

  Returns:
    run(shared, cohort, plan_name, *, states=None, inputs=()) -> (RoundOutput,
    states). `shared` is what the server sends; `inputs` has leaves [K, ...],
    one row for each client of the cohort in its sorted order. With `states`,
    each client gets its row, and the handle that comes back holds the new
    ones; the old handle is not to be used any more.
  """
  if debug:
    wave = functools.partial(run_debug, program, reducer, layout)
  else:
    compile = functools.partial(_run_wave, program, reducer, layout)
    compiled = {
      False: jax.jit(functools.partial(compile, False)),
      True: jax.jit(functools.partial(compile, True), donate_argnames='rows'),
    }

    known: dict[Any, bool] = {}

    def wave(plan, key, features, shared, inputs, rows):
      structure = jax.tree.structure((inputs, rows))
      if structure not in known:
        known[structure] = writes_rows(program, shared, inputs, rows)
      return compiled[known[structure]](
        plan=layout.shard(plan),
        key=key,
        features=features,
        shared=layout.replicate(shared),
        inputs=layout.shard(inputs),
        rows=layout.shard(rows),
      )

  merge = jax.jit(functools.partial(_merge_waves, reducer.merge))

  def run(
    shared: PyTree,
    cohort: Cohort,
    plan_name: str,
    *,
    states: ClientStates | None = None,
    inputs: PyTree = (),
  ) -> tuple[RoundOutput, ClientStates | None]:
    _check_inputs(inputs, len(cohort.clients))
    plans = cohort.plans(plan_name)
    key = cohort.plan_key(plan_name)
    merged = None
    for plan in plans:
      rows = () if states is None else states.gather(plan.clients)
      mine = cohort_inputs(cohort, plan, inputs)
      result, rows = wave(plan, key, cohort.features, shared, mine, rows)
      if states is not None and rows is not None:
        states = states.scatter(plan.clients, rows)
      merged = result if merged is None else merge(merged, result)
    acc, metrics, diagnostics = merged
    diagnostics = dict(diagnostics, lane_utilisation=lane_utilisation(plans))
    clients = np.concatenate([plan.clients for plan in plans])
    return RoundOutput(acc, clients, metrics, diagnostics), states

  return run


def _check_inputs(inputs: PyTree, num_clients: int) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(inputs):
    validate.check(
      np.ndim(leaf) > 0 and leaf.shape[0] == num_clients,
      f'Expected inputs{jax.tree_util.keystr(path)} with leading axis '
      f'K={num_clients}, got shape {list(np.shape(leaf))}.',
    )


def _merge_waves(merge: Any, a: PyTree, b: PyTree) -> PyTree:
  """Merges (acc, metrics, diagnostics) of two waves."""
  join = lambda x, y: jnp.concatenate([x, y])
  return (
    reducers.merge_accumulators(merge, a[0], b[0]),
    jax.tree.map(join, a[1], b[1]),
    jax.tree.map(join, a[2], b[2]),
  )


def combine(reducer: Reducer, a: RoundOutput, b: RoundOutput) -> RoundOutput:
  """Merges the outputs of two calls with the same reducer, slot by slot [K'].

  Metrics and diagnostics that only one call has are left out; lane
  utilisation is averaged.
  """
  names = a.metrics.keys() & b.metrics.keys()
  join = lambda x, y: jnp.concatenate([x, y])
  keep = lambda d: {n: d[n] for n in ('update_norm', 'dropped')}
  return RoundOutput(
    reducers.merge_accumulators(reducer.merge, a.acc, b.acc),
    np.concatenate([a.clients, b.clients]),
    {n: jax.tree.map(join, a.metrics[n], b.metrics[n]) for n in sorted(names)},
    dict(
      jax.tree.map(join, keep(a.diagnostics), keep(b.diagnostics)),
      lane_utilisation=(
        a.diagnostics['lane_utilisation'] + b.diagnostics['lane_utilisation']
      )
      / 2,
    ),
  )


def summarize(output: RoundOutput) -> dict[str, Any]:
  """A round's scalars: each metric's sum / weight over clients, and how it ran.

  Returns:
    {name: scalar}: the program's metrics; 'update_norm' (mean over the clients
    that were kept) and 'update_norm_max'; 'clients_dropped'; 'clients';
    'lane_utilisation'.
  """
  present = output.clients >= 0
  scalars = _summarize(
    output.metrics,
    output.diagnostics['update_norm'],
    output.diagnostics['dropped'],
    present,
  )
  return dict(
    scalars,
    clients=int(present.sum()),
    lane_utilisation=output.diagnostics['lane_utilisation'],
  )


@jax.jit
def _summarize(metrics, norms, dropped, present):
  kept = present & ~dropped
  return {name: s.sum() / w.sum() for name, (s, w) in metrics.items()} | {
    'update_norm': jnp.where(kept, norms, 0).sum() / jnp.maximum(kept.sum(), 1),
    'update_norm_max': jnp.where(kept, norms, 0).max(),
    'clients_dropped': (present & dropped).sum(),
  }


def per_client(
  output: RoundOutput,
) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
  """A round's metrics in the order of client numbers, on the host.

  Returns:
    (clients [K], {name: (sum [K], weight [K])}).
  """
  order = np.argsort(output.clients, kind='stable')
  order = order[output.clients[order] >= 0]
  pick = lambda x: np.asarray(x)[order]
  return output.clients[order], jax.tree.map(pick, output.metrics)


def _run_wave(
  program: ClientProgram,
  reducer: Reducer,
  layout: Layout,
  writes: bool,
  *,
  plan: Plan,
  key: jax.Array,
  features: PyTree,
  shared: PyTree,
  inputs: PyTree,
  rows: PyTree,
) -> tuple[PyTree, PyTree]:
  """One wave on all devices: ((acc, metrics, diagnostics), rows or None)."""
  split, whole = P(CLIENTS), P()
  acc_specs = _specs(reducer.merge)
  return jax.shard_map(
    functools.partial(_run_device, program, reducer, writes),
    mesh=layout.mesh,
    in_specs=(split, whole, whole, whole, split, split),
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


def _run_device(
  program: ClientProgram,
  reducer: Reducer,
  writes: bool,
  plan: Plan,
  key: jax.Array,
  features: PyTree,
  shared: PyTree,
  inputs: PyTree,
  rows: PyTree,
) -> tuple[PyTree, PyTree]:
  """The loop of one device; see the module's docstring."""
  plan = jax.tree.map(lambda x: x[0], plan)  # this device's shard of axis D
  num_slots = plan.client.shape[0]
  lanes, batch_size = plan.example.shape[1:]

  def client_at(slot: jax.Array, rows: PyTree) -> Client:
    return Client(
      plan.client[slot],
      plan.num_examples[slot],
      _at(rows, slot),
      _at(inputs, slot),
    )

  def keys_at(slot: jax.Array) -> tuple[jax.Array, jax.Array]:
    return client_keys(key, plan.client[slot])

  def open_client(slot: jax.Array, rows: PyTree) -> PyTree:
    return program.init(shared, client_at(slot, rows), keys_at(slot)[0])

  def step(state: PyTree, example, count, step, epoch, phase, end, slot):
    info = StepInfo(
      jax.random.fold_in(keys_at(slot)[1], step), step, epoch, phase, end
    )
    data = jax.tree.map(lambda x: x[example], features)
    mask = jnp.arange(batch_size) < count
    return program.step(shared, state, Batch(data, mask, info))

  def step_args(s: jax.Array) -> tuple[jax.Array, ...]:
    return (
      plan.example[s],
      plan.count[s],
      plan.step[s],
      plan.epoch[s],
      plan.phase[s],
      plan.epoch_end[s],
      plan.slot[s],
    )

  zero = jnp.int32(0)
  state_types = _strong(jax.eval_shape(lambda: open_client(zero, rows)))
  first = lambda: [a[0] for a in step_args(zero)]
  _check_step(
    state_types,
    jax.eval_shape(lambda s: step(s, *first()), state_types),
  )
  output_types = jax.eval_shape(
    lambda s: program.final(shared, client_at(zero, rows), s), state_types
  )

  if lanes == 1:  # no lane axis: convolutions stay ungrouped
    # At most one event a step: a branch, 1.4 times the speed of a loop on CPU.
    for_events = lambda count, function, value: lax.cond(
      count > 0, lambda v: function(0, v), lambda v: v, value
    )
    get = lambda states, lane: states
    put = lambda states, lane, state: as_types(state, state_types)
    states = _zeros(state_types)
    advance = lambda states, *args: step(states, *[a[0] for a in args])
  else:
    for_events = lambda count, function, value: lax.fori_loop(
      0, count, function, value
    )
    get, put = _at, _put
    states = _zeros(state_types, lanes)
    advance = jax.vmap(step)

  def close_client(folded: _Folded, slot: jax.Array, state: PyTree) -> _Folded:
    client = client_at(slot, folded.rows)
    output = program.final(shared, client, state)
    update, weight, row, metrics, norm, dropped = accept(
      output, client.state if writes else output.state
    )
    return _Folded(
      reducer.add(folded.acc, update, weight, slot),
      _put(folded.rows, slot, row) if writes else folded.rows,
      _put(folded.metrics, slot, metrics),
      folded.norms.at[slot].set(norm.astype(folded.norms.dtype)),
      folded.dropped.at[slot].set(dropped),
    )

  float_type = jnp.result_type(float)
  metric_types = jax.tree.map(
    lambda t: jax.ShapeDtypeStruct((), float_type), output_types.metrics
  )
  folded = _Folded(
    reducer.init(output_types.update, num_slots),
    rows,
    _zeros(metric_types, num_slots),
    jnp.zeros(num_slots),
    jnp.zeros(num_slots, bool),
  )

  def close_empty(i: jax.Array, folded: _Folded) -> _Folded:
    slot = plan.empty[i]
    return close_client(folded, slot, open_client(slot, folded.rows))

  def body(s: jax.Array, carry: tuple[PyTree, _Folded]):
    states, folded = carry

    def begin(i, states):
      lane = plan.start[s, i]
      slot = plan.slot[s, lane]
      return put(states, lane, open_client(slot, folded.rows))

    states = for_events(plan.num_start[s], begin, states)
    states = as_types(advance(states, *step_args(s)), state_types)

    def end(i, folded):
      lane = plan.end[s, i]
      return close_client(folded, plan.slot[s, lane], get(states, lane))

    return states, for_events(plan.num_end[s], end, folded)

  folded = lax.fori_loop(0, plan.num_empty, close_empty, folded)
  _, folded = lax.fori_loop(0, plan.num_steps, body, (states, folded))
  acc = reducers.map_merge(
    reducer.merge,
    folded.acc,
    lambda x: lax.psum(x, CLIENTS),
    lambda x: x,
  )
  if not writes:
    validate.check(
      bool(jax.tree.leaves(rows)) or not jax.tree.leaves(output_types.state),
      'Expected states= for a program whose final returns a client state.',
    )
  diagnostics = {'update_norm': folded.norms, 'dropped': folded.dropped}
  return (
    (acc, folded.metrics, diagnostics),
    folded.rows if writes else None,
  )


def _strong(types: PyTree) -> PyTree:
  return jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype), types)


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
