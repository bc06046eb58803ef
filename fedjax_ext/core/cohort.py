"""A round's cohort: which clients, their plans and their data on the device.

Axis letters: K clients of the cohort, N examples.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.core.layout import Layout
from fedjax_ext.core.plans import ClientRows, Plan, PlanSpec, plan_round


def place_features(
  features: Mapping[str, np.ndarray], layout: Layout
) -> dict[str, jax.Array]:
  """Copies numeric features {name: [N, ...]} to every device, once.

  Columns of text stay on the host. 64-bit numbers become 32-bit ones unless
  jax runs with 64 bits.

  Raises:
    InvalidInput: an integer does not fit into 32 bits.
  """
  placed = {}
  for name, column in features.items():
    if column.dtype.kind not in 'biuf':
      continue
    dtype = jax.dtypes.canonicalize_dtype(column.dtype)
    if dtype != column.dtype and dtype.kind in 'iu' and column.size:
      limits = np.iinfo(dtype)
      validate.check(
        limits.min <= column.min() and column.max() <= limits.max,
        f'Expected feature {name!r} to fit into {dtype}, got values from '
        f'{column.min()} to {column.max()}.',
      )
    placed[name] = np.asarray(column, dtype)
  return layout.replicate(placed)


@dataclasses.dataclass(frozen=True)
class Cohort:
  """What `FederatedAlgorithm.apply` gets to know about a round.

  Attributes:
    round: number of the round, a scalar from 1.
    clients: client numbers int64 [K], sorted.
    key: the round's scalar random key.
    features: {name: [N, ...]} on the devices.
    specs: plan specs by name.
    data: splits by name, which the plans draw from.
    seed: seed of the shuffles, a scalar.
    layout: devices, lanes, waves.
  """

  round: int
  clients: np.ndarray
  key: jax.Array
  features: Mapping[str, jax.Array]
  specs: Mapping[str, PlanSpec]
  data: Mapping[str, ClientRows]
  seed: int
  layout: Layout
  _plans: dict[str, list[Plan]] = dataclasses.field(
    default_factory=dict, repr=False, compare=False
  )

  def plans(self, name: str) -> list[Plan]:
    """The waves of a plan; [D, ...] arrays, computed once, on first use."""
    if name not in self._plans:
      validate.one_of('plan', name, list(self.specs))
      self._plans[name] = plan_round(
        self.specs[name],
        self.data,
        self.clients,
        seed=self.seed ^ zlib.crc32(name.encode()),
        round=self.round,
        layout=self.layout,
      )
    return self._plans[name]

  def plan_key(self, name: str) -> jax.Array:
    """The scalar key of a plan, which clients' keys are folded from."""
    return jax.random.fold_in(self.key, zlib.crc32(name.encode()))

  def select(self, chosen: np.ndarray) -> 'Cohort':
    """The sub-cohort of clients where the mask bool [K] is True.

    A client's batches and keys stay what they are in the whole cohort.
    """
    return dataclasses.replace(
      self, clients=self.clients[np.asarray(chosen, bool)], _plans={}
    )


def make_cohort(
  clients: np.ndarray,
  *,
  round: int,
  seed: int,
  specs: Mapping[str, PlanSpec],
  data: Mapping[str, ClientRows],
  features: Mapping[str, jax.Array],
  layout: Layout,
) -> Cohort:
  """Builds the cohort of a round.

  Args:
    clients: client numbers [K], in any order.
    round: number of the round, from 1.
    seed: the training seed, for shuffles and for the clients' keys.
    specs: plan specs by name (`FederatedAlgorithm.plans`).
    data: splits by name.
    features: what `place_features` returned.
    layout: devices, lanes, waves.
  """
  return Cohort(
    round=round,
    clients=np.sort(np.asarray(clients, np.int64)),
    key=jax.random.fold_in(jax.random.key(seed), round),
    features=features,
    specs=specs,
    data=data,
    seed=seed,
    layout=layout,
  )


def cohort_inputs(cohort: Cohort, plan: Plan, inputs: Any) -> Any:
  """Picks rows of `inputs` (leaves [K, ...]) for a plan's slots [D * Kd]."""
  if not len(cohort.clients):
    empty = lambda x: np.zeros((len(plan.clients), *x.shape[1:]), x.dtype)
    return jax.tree.map(empty, inputs)
  slots = np.searchsorted(cohort.clients, np.maximum(plan.clients, 0))
  slots = np.minimum(slots, len(cohort.clients) - 1)
  return jax.tree.map(lambda x: x[slots], inputs)
