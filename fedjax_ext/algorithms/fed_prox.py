"""FedProx: federated averaging with a proximal term on clients.

Li et al., "Federated optimization in heterogeneous networks", 2020,
https://arxiv.org/abs/1812.06127.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_ext.algorithms.averaging import Averaging
from fedjax_ext.algorithms.fed_avg import fed_avg
from fedjax_ext.algorithms.local_sgd import local_sgd
from fedjax_ext.core import (
  Client,
  FederatedAlgorithm,
  Layout,
  Phase,
  SparseTable,
  validate,
)
from fedjax_ext.losses import Task
from fedjax_ext.models import params_of

PyTree = Any


def half_squared_distance(x: PyTree, y: PyTree) -> jax.Array:
  """1/2 ||x - y||^2 over all leaves of two like pytrees, a scalar."""
  squares = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), x, y)
  return 0.5 * sum(jax.tree.leaves(squares))


def fed_prox(
  task: Task,
  *,
  proximal_weight: float,
  client_optimizer: optax.GradientTransformation,
  server_optimizer: optax.GradientTransformation,
  layout: Layout,
  phase: Phase = Phase(),
  weighting: str = 'examples',
  tables: tuple[SparseTable, ...] = (),
  averaging: Averaging = Averaging(),
  debug: bool = False,
) -> FederatedAlgorithm:
  """Builds FedProx.

  A client minimises F_c(w) + mu/2 ||w - w_t||^2, where w_t is the server's
  model at the beginning of the round. mu = 0 is federated averaging.

  Args:
    task: init, loss and metrics.
    proximal_weight: mu >= 0.
    client_optimizer: any optax transformation.
    server_optimizer: any optax transformation; the paper's is SGD with rate 1.
    layout: devices, lanes, waves.
    phase: the local work.
    weighting: 'examples', or 'uniform'.
    tables: as in `fed_avg`.
    averaging: how updates are averaged, and who attacks.
    debug: run client by client in plain Python.
  """
  validate.at_least('proximal_weight', proximal_weight, 0)

  def begin(shared: PyTree, client: Client, key: jax.Array):
    del client, key
    return shared, params_of(shared)

  def penalty(params: PyTree, anchor: PyTree) -> jax.Array:
    return proximal_weight * half_squared_distance(params, anchor)

  return fed_avg(
    task,
    client_optimizer=client_optimizer,
    server_optimizer=server_optimizer,
    layout=layout,
    phase=phase,
    weighting=weighting,
    tables=tables,
    averaging=averaging,
    program=local_sgd(
      task.loss, client_optimizer, begin=begin, penalty=penalty
    ),
    debug=debug,
  )
