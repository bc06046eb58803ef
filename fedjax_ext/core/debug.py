"""The debug path: the same program, client by client, in plain Python.

Nothing is compiled as a whole, so prints, breakpoints and user assertions work
inside a program, and a failure says where it happened.

Axis letters: B examples in a batch, D devices, Kd client slots of one device.
"""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_ext.core import reducers
from fedjax_ext.core.features import Features
from fedjax_ext.core.plans import Plan, client_batches
from fedjax_ext.core.programs import (
  Batch,
  Client,
  ClientOutput,
  ClientProgram,
  StepInfo,
  accept,
  client_keys,
)

_LOG = logging.getLogger(__name__)

PyTree = Any


class ClientError(RuntimeError):
  """A client program failed; says in which stage, for whom, on what batch.

  Attributes:
    stage: 'init', 'step' or 'final'.
    client: client number, a scalar.
    batch: feature rows of the batch, int32 [B], None outside of 'step'.
  """

  def __init__(self, stage: str, client: int, batch: np.ndarray | None):
    self.stage, self.client, self.batch = stage, client, batch
    rows = '' if batch is None else f' on the batch of rows {batch.tolist()}'
    super().__init__(f'{stage} of client {client} failed{rows}')


def _guard(stage, client, batch, function, *args):
  try:
    return function(*args)
  except Exception as error:
    raise ClientError(stage, client, batch) from error


def _is_finite(tree: PyTree) -> bool:
  return all(
    bool(jnp.isfinite(x).all())
    for x in jax.tree.leaves(tree)
    if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
  )


def debug_client(
  program: ClientProgram,
  plan: Plan,
  client: Client,
  key: jax.Array,
  features: Features,
  shared: PyTree,
) -> ClientOutput:
  """Runs one client of a plan, uncompiled.

  Logs the first step after which the client's state is not finite.

  Args:
    program: the client program.
    plan: the wave that the client is in.
    client: the client.
    key: scalar key of the plan.
    features: columns {name: [M, ...]}, read batch by batch.
    shared: what the server sends.

  Raises:
    ClientError: a stage failed; the original exception is its cause.
  """
  number = int(client.number)
  init_key, steps_key = client_keys(key, client.number)
  state = _guard('init', number, None, program.init, shared, client, init_key)
  finite = _is_finite(state)
  for rows, count, info in client_batches(plan, number):
    step = jnp.int32(info['step'])
    batch = Batch(
      jax.tree.map(jnp.asarray, features.read(rows)),
      jnp.arange(len(rows)) < count,
      StepInfo(
        jax.random.fold_in(steps_key, step),
        step,
        jnp.int32(info['epoch']),
        jnp.int32(info['phase']),
        jnp.bool(info['epoch_end']),
        jnp.int32(info['round']),
      ),
    )
    real = rows[:count]
    state = _guard('step', number, real, program.step, shared, state, batch)
    if finite and not _is_finite(state):
      finite = False
      _LOG.warning(
        'Client %d: state not finite after step %d on the batch of rows %s.',
        number,
        step,
        real.tolist(),
      )
  return _guard('final', number, None, program.final, shared, client, state)


def run_debug(
  program: ClientProgram,
  reducer: reducers.Reducer,
  features: Features,
  plan: Plan,
  key: jax.Array,
  shared: PyTree,
  inputs: PyTree,
  rows: PyTree,
) -> tuple[PyTree, PyTree]:
  """One wave, as wave.run_wave returns it: leaves [D * Kd] by slot."""
  clients = plan.clients
  sizes = plan.num_examples.reshape(-1)
  at = lambda tree, i: jax.tree.map(lambda x: jnp.asarray(x)[i], tree)
  client_at = lambda slot: Client(
    jnp.int32(clients[slot]),
    jnp.int32(sizes[slot]),
    at(rows, slot),
    at(inputs, slot),
  )

  acc, new_rows, results = None, {}, {}
  for slot in np.flatnonzero(clients >= 0).tolist():
    client = client_at(slot)
    output = debug_client(program, plan, client, key, features, shared)
    keeps = bool(jax.tree.leaves(output.state))
    update, weight, row, *result = accept(
      output, client.state if keeps else output.state
    )
    if acc is None:
      acc = reducer.init(jax.eval_shape(lambda u: u, update), len(clients))
    acc = reducer.add(acc, update, weight, jnp.int32(slot))
    results[slot] = result
    if keeps:
      new_rows[slot] = row
  if acc is None:  # nobody in this wave: types alone

    def nobody() -> tuple[PyTree, list]:
      state = program.init(shared, client_at(0), key)
      output = program.final(shared, client_at(0), state)
      update, _, _, *result = accept(output, output.state)
      return update, result

    update, result = jax.eval_shape(nobody)
    acc = reducer.init(update, len(clients))
    empty = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), result)
  else:
    empty = jax.tree.map(jnp.zeros_like, next(iter(results.values())))
  metrics, norms, dropped = jax.tree.map(
    lambda *xs: jnp.stack(xs),
    *[results.get(slot, empty) for slot in range(len(clients))],
  )
  written = None
  if new_rows:
    written = jax.tree.map(
      lambda *xs: jnp.stack(xs),
      *[new_rows.get(s, at(rows, s)) for s in range(len(clients))],
    )
  return (acc, metrics, {'update_norm': norms, 'dropped': dropped}), written
