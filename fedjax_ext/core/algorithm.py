"""What a federated algorithm is: a handful of functions.

Axis letters: B examples in a batch.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from fedjax_ext.core.client_states import ClientStates
from fedjax_ext.core.cohort import Cohort
from fedjax_ext.core.plans import Phase, PlanSpec
from fedjax_ext.core.programs import Batch, Client, ClientProgram

PyTree = Any
Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Adaptation(NamedTuple):
  """Local work that a client does before its model is evaluated.

  Attributes:
    program: a client program; its update is not used.
    phases: tuple of Phase, the adaptation's plan.
    params: client state of the program -> model, any pytree.
  """

  program: ClientProgram
  phases: tuple[Phase, ...]
  params: Callable[[PyTree], PyTree]


class Predictor(NamedTuple):
  """A model to evaluate: one for all clients, or one each.

  Attributes:
    metrics: (params, batch) -> {name: (value [B], weight [B])} per example.
    shared: server_state -> what all clients get, any pytree; the model itself
      if neither of the next two is set.
    params: (shared, client) -> the client's own model.
    adapt: local work from `shared` that makes the client's own model.
  """

  metrics: Callable[[PyTree, Batch], Metrics]
  shared: Callable[[PyTree], PyTree] = lambda server_state: server_state
  params: Callable[[PyTree, Client], PyTree] | None = None
  adapt: Adaptation | None = None

  @property
  def personal(self) -> bool:
    """Whether clients have models of their own, a scalar."""
    return self.params is not None or self.adapt is not None


class FederatedAlgorithm(NamedTuple):
  """A federated algorithm; every function is observably pure.

  Attributes:
    init: key -> server state, a pytree of arrays.
    apply: (server_state, client_states, cohort) -> (server_state,
      client_states, {name: scalar metric}). Host code that calls functions
      which `for_each_client` compiled once, in the algorithm's factory.
    plans: plan specs by name, for `cohort.plans(name)`.
    predictors: what to evaluate, by name; the first is the main one.
    init_client: (key, client number) -> a client's first state row; None for
      algorithms without client state (client_states is None then).
  """

  init: Callable[[jax.Array], PyTree]
  apply: Callable[
    [PyTree, ClientStates | None, Cohort],
    tuple[PyTree, ClientStates | None, dict[str, Any]],
  ]
  plans: Mapping[str, PlanSpec]
  predictors: Mapping[str, Predictor]
  init_client: Callable[[jax.Array, jax.Array], PyTree] | None = None
