"""What one client does: three pure functions, written for one client.

A `ClientProgram` knows nothing of lanes, devices or other clients. The engine
(engine.py) runs it over a whole cohort in one compiled program; `run_one` runs
it for a single client, which is also how a server trains on data of its own.

Axis letters: B examples in a batch, S steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any


class Client(NamedTuple):
  """What one client brings to a round.

  Attributes:
    number: scalar int32, the client's position in the population.
    num_examples: scalar int32, its examples in the split of the plan's first
      phase, after the phase's cap.
    state: its row of the `ClientStates` bank, () if the algorithm has none.
    inputs: its row of the `inputs` handed to the round, () if none.
  """

  number: jax.Array
  num_examples: jax.Array
  state: PyTree = ()
  inputs: PyTree = ()


class StepInfo(NamedTuple):
  """Where a local step stands; all scalars.

  Attributes:
    key: this step's own random key.
    step: steps of this client so far, counted over all phases from 0.
    epoch: epochs of this phase so far, from 0.
    phase: index of the plan's phase.
    epoch_end: whether this step is the last of its epoch.
    round: the round, from 1; 0 in evaluation and where there are none.
  """

  key: jax.Array
  step: jax.Array
  epoch: jax.Array
  phase: jax.Array
  epoch_end: jax.Array
  round: jax.Array | int = 0


class Batch(NamedTuple):
  """One batch of one client.

  Attributes:
    data: {name: [B, ...]}. Masked positions repeat a real example of the same
      batch.
    mask: bool [B], True for real examples; at least one is.
    info: the step's StepInfo.
  """

  data: dict[str, jax.Array]
  mask: jax.Array
  info: StepInfo


class ClientOutput(NamedTuple):
  """What a client returns.

  Attributes:
    update: pytree for the reducer, e.g. {'params': after - before}.
    weight: scalar; 0 leaves the client out of every reducer, 1 everywhere
      gives a uniform mean.
    state: the client's new `ClientStates` row; kept only if update, weight and
      state are finite.
    metrics: {name: (sum, weight)}, both scalars; or of one shape, for
      `per_client` alone.
  """

  update: PyTree
  weight: jax.Array
  state: PyTree = ()
  metrics: dict[str, tuple[jax.Array, jax.Array]] = {}


class ClientProgram(NamedTuple):
  """One client's work as three pure, unbatched functions.

  A client without a single batch goes from `init` straight to `final`.

  Attributes:
    init: (shared, client, key) -> state pytree. `shared` is what the server
      sends to everybody.
    step: (shared, state, batch) -> state, once per batch.
    final: (shared, client, state) -> ClientOutput.
  """

  init: Callable[[PyTree, Client, jax.Array], PyTree]
  step: Callable[[PyTree, PyTree, Batch], PyTree]
  final: Callable[[PyTree, Client, PyTree], ClientOutput]


def client_keys(
  key: jax.Array, number: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the scalar keys of a client's `init` and of its steps.

  Args:
    key: the scalar key of the round (and of the plan).
    number: the client's number, scalar int.
  """
  init_key, steps_key = jax.random.split(jax.random.fold_in(key, number))
  return init_key, steps_key


def run_one(
  program: ClientProgram,
  shared: PyTree,
  client: Client,
  key: jax.Array,
  batches: dict[str, jax.Array],
  mask: jax.Array,
) -> ClientOutput:
  """Runs one client over stacked batches; jit it where it is called.

  Serves a server's own training (mixed federated learning) and tests.

  Args:
    program: the client program.
    shared: what the server sends, any pytree.
    client: the client.
    key: scalar key of the round.
    batches: {name: [S, B, ...]}.
    mask: bool [S, B]; every step has at least one real example.

  Returns:
    The program's ClientOutput, after S steps of a single epoch.
  """
  init_key, steps_key = client_keys(key, client.number)
  num_steps = mask.shape[0]
  state = program.init(shared, client, init_key)
  types = jax.eval_shape(lambda: state)

  def body(state: PyTree, inputs: Any) -> tuple[PyTree, None]:
    step, data, step_mask = inputs
    info = StepInfo(
      key=jax.random.fold_in(steps_key, step),
      step=step,
      epoch=jnp.int32(0),
      phase=jnp.int32(0),
      epoch_end=step == num_steps - 1,
    )
    state = program.step(shared, state, Batch(data, step_mask, info))
    return as_types(state, types), None

  steps = jnp.arange(num_steps, dtype=jnp.int32)
  state, _ = lax.scan(body, as_types(state, types), (steps, batches, mask))
  return program.final(shared, client, state)


def accept(
  output: ClientOutput, old_row: PyTree
) -> tuple[PyTree, jax.Array, PyTree, dict, jax.Array, jax.Array]:
  """Checks what a client returns; a non-finite one counts as absent.

  Finite are: update, weight, state, and weight times the update's norm, so that
  no single client can push a sum out of range.

  Returns:
    (update, weight, row, metrics, update norm, dropped): pytrees and scalars.
    If anything is not finite, update, weight, metrics and norm are zeros and
    the row is the old one.
  """
  float_type = jnp.result_type(float)
  weight = jnp.asarray(output.weight, float_type)
  squares = [jnp.sum(jnp.square(jnp.abs(x))) for x in _inexact(output.update)]
  norm = jnp.sqrt(sum(squares, jnp.zeros(())))
  # A finite norm has finite terms: the update needs no pass of its own.
  finite = jnp.isfinite(norm) & jnp.isfinite(weight * norm)
  for x in _inexact((weight, output.state)):
    finite &= jnp.isfinite(x).all()
  zero = lambda x: jnp.where(finite, x, jnp.zeros_like(x))
  row = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old), output.state, old_row
  )
  metrics = jax.tree.map(
    lambda x: zero(jnp.asarray(x, float_type)), output.metrics
  )
  return (
    jax.tree.map(zero, output.update),
    zero(weight),
    row,
    metrics,
    zero(norm),
    ~finite,
  )


def _inexact(tree: PyTree) -> list[jax.Array]:
  return [
    x
    for x in jax.tree.leaves(tree)
    if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
  ]


def as_types(tree: PyTree, types: PyTree) -> PyTree:
  """Converts leaves to the dtypes of `types` (same structure); drops weak."""
  return jax.tree.map(
    lambda x, t: (
      x
      if jax.dtypes.issubdtype(t.dtype, jax.dtypes.prng_key)
      else lax.convert_element_type(x, t.dtype)
    ),
    tree,
    types,
  )
