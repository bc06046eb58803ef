"""The server's state and its step in algorithms that average deltas."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_ext.algorithms.averaging import Memory
from fedjax_ext.models import params_of, stats_of, with_params

PyTree = Any


class ServerState(NamedTuple):
  """What the server carries from round to round.

  Attributes:
    params: the model, a pytree or `Variables`.
    optimizer_state: a pytree.
    memory: what averaging remembers.
  """

  params: PyTree
  optimizer_state: PyTree
  memory: Memory = Memory((), ())


def first_state(
  optimizer: optax.GradientTransformation,
  model: PyTree,
  memory: Memory = Memory((), ()),
) -> ServerState:
  """The state before the first round; the optimizer sees params alone."""
  return ServerState(model, optimizer.init(params_of(model)), memory)


def server_step(
  optimizer: optax.GradientTransformation, state: ServerState, delta: PyTree
) -> ServerState:
  """One server step; the optimizer sees -delta as its gradient (a pytree).

  Moving statistics become the clients' mean, without the optimizer.
  """
  params = params_of(state.params)
  updates, optimizer_state = optimizer.update(
    jax.tree.map(jnp.negative, params_of(delta)), state.optimizer_state, params
  )
  stats = jax.tree.map(jnp.add, stats_of(state.params), stats_of(delta))
  return ServerState(
    with_params(state.params, optax.apply_updates(params, updates), stats),
    optimizer_state,
    state.memory,
  )
