"""The engine: one client's program over a whole cohort, as one compiled loop.

`for_each_client(program, reducer)` returns a function that runs a round. On
each device a loop (wave.py) walks the plan's steps.

Axis letters: D devices, L lanes, S steps, B examples in a batch, Kd client
slots of one device, K' = W * D * Kd slots of a round with W waves.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_ext.core import reducers, validate
from fedjax_ext.core.client_states import ClientStates
from fedjax_ext.core.cohort import Cohort, cohort_inputs
from fedjax_ext.core.debug import run_debug
from fedjax_ext.core.layout import Layout, to_host
from fedjax_ext.core.plans import lane_utilisation
from fedjax_ext.core.programs import ClientProgram
from fedjax_ext.core.reducers import Reducer
from fedjax_ext.core.wave import run_wave, writes_rows

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

  compiled = {
    (writes, sharded): jax.jit(
      functools.partial(run_wave, program, reducer, layout, writes, sharded),
      donate_argnames='rows' if writes else (),
    )
    for writes in (False, True)
    for sharded in (False, True)
  }
  known: dict[Any, bool] = {}

  def wave(table, key, shared, inputs, rows):
    structure = jax.tree.structure((inputs, rows))
    if structure not in known:
      known[structure] = writes_rows(program, shared, inputs, rows)
    table = table.send(layout)
    return compiled[known[structure], table.sharded](
      plan=table.sent,
      key=layout.replicate(key),
      features=table.arrays,
      shared=layout.replicate(shared),
      inputs=layout.shard(inputs),
      rows=layout.shard(rows),
    )

  def run(
    shared: PyTree,
    cohort: Cohort,
    plan_name: str,
    *,
    states: ClientStates | None = None,
    inputs: PyTree = (),
  ) -> tuple[RoundOutput, ClientStates | None]:
    members = cohort.clients_of(plan_name)
    _check_inputs(inputs, len(members))
    plans = cohort.plans(plan_name)
    key = cohort.plan_key(plan_name)
    waves = _Waves(reducer.merge)
    running = None
    for table in cohort.tables(plan_name, read=not debug):
      # The wave before runs while this one's examples were read; the one before
      # that has to be done, so that two waves' examples exist at a time.
      if table.sharded:
        jax.block_until_ready(running)
      running = waves.last
      clients = table.plan.clients
      rows = () if states is None else states.gather(clients)
      mine = cohort_inputs(members, table.plan, inputs)
      if debug:
        result, rows = run_debug(
          program, reducer, cohort.features, table.plan, key, shared, mine, rows
        )
      else:
        result, rows = wave(table, key, shared, mine, rows)
      if states is not None and rows is not None:
        states = states.scatter(clients, to_host(rows))
      waves.add(*result)
    acc, metrics, diagnostics = waves.merged()
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


class _Waves:
  """Merges what waves return.

  What is added is added as it comes, into the memory of what was there. What is
  joined is kept and joined once, so that the programs which do it do not depend
  on a wave's number.
  """

  def __init__(self, merge: reducers.Merge):
    self._merge = merge
    self._sums: list[jax.Array] = []
    self._rows: list[PyTree] = []
    self.last: PyTree = None

  def add(self, acc: PyTree, metrics: PyTree, diagnostics: PyTree) -> None:
    """Takes the next wave's (acc, metrics, diagnostics)."""
    leaves, self._structure = jax.tree.flatten(acc)
    self._added = jax.tree.leaves(
      reducers.map_merge(self._merge, acc, lambda x: True, lambda x: False)
    )
    pairs = list(zip(leaves, self._added, strict=True))
    sums = [leaf for leaf, added in pairs if added]
    self._sums = _add(self._sums, sums) if self._rows else sums
    joined = [leaf for leaf, added in pairs if not added]
    self._rows.append((joined, metrics, diagnostics))
    self.last = self._rows[-1]  # not the sums, whose memory is used again

  def merged(self) -> tuple[PyTree, PyTree, PyTree]:
    """(acc, metrics, diagnostics) of all waves."""
    rows, metrics, diagnostics = (
      _join(self._rows) if len(self._rows) > 1 else self._rows[0]
    )
    sums, rows = iter(self._sums), iter(rows)
    leaves = [next(sums if added else rows) for added in self._added]
    acc = jax.tree.unflatten(self._structure, leaves)
    return acc, metrics, diagnostics


@functools.partial(jax.jit, donate_argnums=0)
def _add(a: PyTree, b: PyTree) -> PyTree:
  return jax.tree.map(jnp.add, a, b)


@jax.jit
def _join(trees: list[PyTree]) -> PyTree:
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


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
  for name, (values, _) in metrics.items():
    validate.check(
      values.ndim == 1,
      f'Expected a scalar sum of metric {name!r} for each client, got shape '
      f'{list(values.shape[1:])}.',
    )
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
    (clients [K], {name: (sum [K, ...], weight [K, ...])}).
  """
  order = np.argsort(output.clients, kind='stable')
  order = order[output.clients[order] >= 0]
  pick = lambda x: x[order]
  metrics = jax.tree.map(pick, to_host(output.metrics))
  return output.clients[order], metrics
