"""A round's cohort: which clients, their plans and their data on the device.

Axis letters: K clients of the cohort, M rows of the columns.
"""

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.core.features import Features, Table
from fedjax_ext.core.layout import Layout
from fedjax_ext.core.plans import ClientRows, Plan, PlanSpec, plan_round
from fedjax_ext.core.sparse_rows import touched_rows


@dataclasses.dataclass(frozen=True)
class Cohort:
  """What `FederatedAlgorithm.apply` gets to know about a round.

  Attributes:
    round: number of the round, a scalar from 1.
    clients: client numbers int64 [K], sorted.
    key: the round's scalar random key.
    features: columns {name: [M, ...]}, placed on the devices or streamed.
    specs: plan specs by name.
    data: splits by name, which the plans draw from.
    seed: seed of the shuffles, a scalar.
    layout: devices, lanes, waves.
  """

  round: int
  clients: np.ndarray
  key: jax.Array
  features: Features
  specs: Mapping[str, PlanSpec]
  data: Mapping[str, ClientRows]
  seed: int
  layout: Layout
  _plans: dict[str, list[Plan]] = dataclasses.field(
    default_factory=dict, repr=False, compare=False
  )
  _first: dict[str, Table] = dataclasses.field(
    default_factory=dict, repr=False, compare=False
  )
  _touched: dict[str, dict[str, np.ndarray]] = dataclasses.field(
    default_factory=dict, repr=False, compare=False
  )

  def clients_of(self, name: str) -> np.ndarray:
    """Who runs a plan: the cohort, or the plan's own clients; int64 [K]."""
    validate.one_of('plan', name, list(self.specs))
    chosen = self.specs[name].clients
    return self.clients if chosen is None else np.array(sorted(chosen))

  def plans(self, name: str) -> list[Plan]:
    """The waves of a plan; [D, ...] arrays, computed once, on first use."""
    if name not in self._plans:
      clients, layout = self.clients_of(name), self.layout
      if self.specs[name].clients is not None:
        layout = layout._replace(lanes=min(layout.lanes, len(clients) or 1))
      self._plans[name] = plan_round(
        self.specs[name],
        self.data,
        clients,
        seed=self.seed ^ zlib.crc32(name.encode()),
        round=self.round,
        layout=layout,
      )
    return self._plans[name]

  def touched(self, name: str) -> dict[str, np.ndarray]:
    """Rows of the plan's tables that clients touch, {path: int32 [K, R]}.

    Computed once, on first use; see `sparse_rows`.
    """
    if name not in self._touched:
      spec = self.specs[name]
      splits = {p.split: self.data[p.split] for p in spec.phases}
      self._touched[name] = touched_rows(
        spec.tables, splits, self.features.columns, self.clients_of(name)
      )
    return self._touched[name]

  def prepare(self, name: str) -> None:
    """Plans, reads the first wave's examples and sends both to the devices.

    For a thread that prefetches. The other waves are read while the one before
    them runs.
    """
    if name not in self._first and self.plans(name):
      table = self.features.table(self.plans(name)[0], self.layout.local)
      self._first[name] = table.send(self.layout)
    if self.specs[name].tables:
      self.touched(name)

  def tables(self, name: str, *, read: bool = True) -> Iterator[Table]:
    """The waves of a plan with the examples that each gathers from.

    What `prepare` has read is handed out, and let go, once.

    Args:
      name: of the plan.
      read: False leaves the examples out.
    """
    for i, plan in enumerate(self.plans(name)):
      ready = self._first.pop(name, None) if i == 0 else None
      if not read:
        yield Table(plan, {}, sharded=False)
      else:
        yield ready or self.features.table(plan, self.layout.local)

  def plan_key(self, name: str) -> jax.Array:
    """The scalar key of a plan, which clients' keys are folded from."""
    return jax.random.fold_in(self.key, zlib.crc32(name.encode()))

  def select(self, chosen: np.ndarray) -> 'Cohort':
    """The sub-cohort of clients where the mask bool [K] is True.

    A client's batches and keys stay what they are in the whole cohort.
    """
    return dataclasses.replace(
      self,
      clients=self.clients[np.asarray(chosen, bool)],
      _plans={},
      _first={},
      _touched={},
    )


def make_cohort(
  clients: np.ndarray,
  *,
  round: int,
  seed: int,
  specs: Mapping[str, PlanSpec],
  data: Mapping[str, ClientRows],
  features: Features,
  layout: Layout,
) -> Cohort:
  """Builds the cohort of a round.

  Args:
    clients: client numbers [K], in any order.
    round: number of the round, from 1.
    seed: the training seed, for shuffles and for the clients' keys.
    specs: plan specs by name (`FederatedAlgorithm.plans`); the cohort has those
      of its round.
    data: splits by name.
    features: what `place_features` returned.
    layout: devices, lanes, waves.
  """
  return Cohort(
    round=round,
    clients=np.sort(np.asarray(clients, np.int64)),
    key=jax.random.fold_in(jax.random.key(seed), round),
    features=features,
    specs={n: spec for n, spec in specs.items() if spec.runs_in(round)},
    data=data,
    seed=seed,
    layout=layout,
  )


def cohort_inputs(clients: np.ndarray, plan: Plan, inputs: Any) -> Any:
  """Picks rows of `inputs` (leaves [K, ...]) for a plan's slots [D * Kd].

  Args:
    clients: who the rows belong to, int64 [K], ascending.
    plan: the wave.
    inputs: any pytree.
  """
  if not len(clients):
    empty = lambda x: np.zeros((len(plan.clients), *x.shape[1:]), x.dtype)
    return jax.tree.map(empty, inputs)
  slots = np.searchsorted(clients, np.maximum(plan.clients, 0))
  slots = np.minimum(slots, len(clients) - 1)
  return jax.tree.map(lambda x: x[slots], inputs)
