"""Round plans: which example every lane of every device trains on, and when.

A plan is host numpy, computed by vectorised code as a pure function of (spec,
data, clients, seed, round, layout), so a background thread can prepare the
next round and any round can be recomputed alone.

Ragged clients are packed onto lanes by longest processing time first: when a
client ends, the next begins in the same lane. Open and close events tell the
engine which lanes start or end a client at a step.

Axis letters: K clients of the cohort, D devices, L lanes, S steps, B examples
in a batch, N examples, Kd client slots of one device, W waves.
"""

import functools
import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.core.layout import Layout, bucket

# Plans with fewer example numbers a device are padded to as many: rounds of
# different length then share a compiled program. Padded steps are never run.
SMALL_PLAN = 1 << 15


class ClientRows(Protocol):
  """What a plan needs of a data set (`fedjax_ext.data.FederatedData`).

  Attributes:
    offsets: int64 [C+1]; client c owns positions offsets[c]:offsets[c+1].
    rows: int64 [N], the feature row of every position; or an object that is
      indexed like it, with `starts` int64 [C] if each client's are successive.
  """

  offsets: np.ndarray
  rows: np.ndarray


class Phase(NamedTuple):
  """One stretch of a client's local work.

  Attributes:
    split: name of the split whose examples are used.
    epochs: passes over the client's examples, or a function of the number of
      examples [K] -> epochs int [K].
    steps: if set, the number of local steps instead of epochs; the passes
      repeat until it is reached.
    batch_size: B.
    shuffle: a fresh order per round and epoch, or the stored order.
    remainder: an epoch's last, short batch is kept with a mask ('mask'),
      left out ('drop'), or topped up from the next epoch so that batches run
      on across epochs ('fill', as FedJAX's ShuffleRepeatBatchView does).
    max_examples: use only the first so many examples of a client.
  """

  split: str = 'train'
  epochs: int | Callable[[np.ndarray], np.ndarray] = 1
  steps: int | None = None
  batch_size: int = 20
  shuffle: bool = True
  remainder: Literal['mask', 'drop', 'fill'] = 'mask'
  max_examples: int | None = None


class SparseTable(NamedTuple):
  """A table of the model and the features that name its rows.

  Attributes:
    path: how the paths of its leaves end, as in 'embedding/embedding'; the
      leaves are [V, ...].
    features: names of integer columns whose values are rows of it.
    num_rows: V.
    always: rows that every client holds, such as that of padding.
  """

  path: str
  features: tuple[str, ...]
  num_rows: int
  always: tuple[int, ...] = ()


class PlanSpec(NamedTuple):
  """A client's local work.

  Attributes:
    phases: a tuple of Phase, in order.
    tables: a tuple of SparseTable, for which `Cohort.touched` lists the rows
      that each client touches.
    clients: numbers of the clients that run this plan in every round, instead
      of the cohort: of a server that has data of its own, say. It is laid out
      on at most as many lanes as there are of them.
    first_round: the plan is part of no round before this one; evaluation is
      round 0.
    last_round: nor of one after this one; None for no end.
  """

  phases: tuple[Phase, ...] = (Phase(),)
  tables: tuple[SparseTable, ...] = ()
  clients: tuple[int, ...] | None = None
  first_round: int = 0
  last_round: int | None = None

  def runs_in(self, round: int) -> bool:
    """Whether a round, a scalar, has this plan."""
    last = self.last_round
    return self.first_round <= round and (last is None or round <= last)


class Plan(NamedTuple):
  """One wave of clients; the leading axis D is sharded over the devices.

  Attributes:
    example: int32 [D, S, L, B], feature rows; masked places repeat the batch's
      first example.
    count: int32 [D, S, L], real examples in the batch; they come first.
    step, epoch, phase: int32 [D, S, L], as in StepInfo.
    epoch_end: bool [D, S, L].
    slot: int32 [D, S, L], which client of this device runs in the lane.
    start: int32 [D, S, L], the first num_start entries are the lanes that open
      a client before step s.
    num_start: int32 [D, S].
    end: int32 [D, S, L], likewise the lanes that close one after step s.
    num_end: int32 [D, S].
    num_steps: int32 [D], a device's steps; the rest of S is padding.
    empty: int32 [D, Kd], the first num_empty entries are slots of clients
      without a single step.
    num_empty: int32 [D].
    client: int32 [D, Kd], client numbers by slot, ascending; -1 pads.
    num_examples: int32 [D, Kd], as in Client.
    round: int32 [D], as in StepInfo.
  """

  example: np.ndarray
  count: np.ndarray
  step: np.ndarray
  epoch: np.ndarray
  phase: np.ndarray
  epoch_end: np.ndarray
  slot: np.ndarray
  start: np.ndarray
  num_start: np.ndarray
  end: np.ndarray
  num_end: np.ndarray
  num_steps: np.ndarray
  empty: np.ndarray
  num_empty: np.ndarray
  client: np.ndarray
  num_examples: np.ndarray
  round: np.ndarray

  @property
  def clients(self) -> np.ndarray:
    """Client numbers of all slots, int32 [D * Kd], -1 pads."""
    return self.client.reshape(-1)


def validate_spec(spec: PlanSpec) -> None:
  """Checks every phase of a spec (scalars); raises InvalidInput."""
  validate.at_least('number of phases', len(spec.phases), 1)
  sizes = {phase.batch_size for phase in spec.phases}
  validate.check(
    len(sizes) == 1,
    f'Expected one batch_size for all phases of a plan, got {sorted(sizes)}.',
  )
  for phase in spec.phases:
    validate.at_least('batch_size', phase.batch_size, 1)
    if not callable(phase.epochs):
      validate.at_least('epochs', phase.epochs, 0)
    if phase.steps is not None:
      validate.at_least('steps', phase.steps, 0)
    if phase.max_examples is not None:
      validate.at_least('max_examples', phase.max_examples, 1)
    validate.one_of('remainder', phase.remainder, ('mask', 'drop', 'fill'))


def plan_round(
  spec: PlanSpec,
  data: Mapping[str, ClientRows],
  clients: np.ndarray,
  *,
  seed: int,
  round: int,
  layout: Layout,
) -> list[Plan]:
  """Plans a cohort's local steps.

  A client's batches depend on (seed, round, its number) only: not on the
  cohort, the lanes, the devices or the waves.

  Args:
    spec: the phases.
    data: splits by name, all over the same clients and feature rows.
    clients: distinct client numbers [K], in any order; may be empty.
    seed: the seed of the shuffles.
    round: round number, from 1.
    layout: devices, lanes and waves.

  Returns:
    W plans of one padded shape; W >= 1, also for an empty cohort.

  Raises:
    InvalidInput: a phase is invalid, its split is unknown, or a client is out
      of range or named twice.
  """
  validate_spec(spec)
  clients = np.sort(np.asarray(clients, np.int64))
  validate.check(
    not np.any(clients[1:] == clients[:-1]), 'Expected distinct clients.'
  )
  for phase in spec.phases:
    validate.one_of('split', phase.split, list(data))
    population = len(data[phase.split].offsets) - 1
    validate.check(
      not len(clients) or 0 <= clients[0] <= clients[-1] < population,
      f'Expected client numbers in 0..{population - 1}, got '
      f'{clients[[0, -1]].tolist() if len(clients) else []}.',
    )
  size = layout.wave_clients or max(len(clients), 1)
  chunks = [clients[i : i + size] for i in range(0, max(len(clients), 1), size)]
  work = [
    _ClientSteps.plan(spec, data, chunk, seed=seed, round=round)
    for chunk in chunks
  ]
  packed = [_pack(w.num_steps, layout) for w in work]
  num_steps = bucket(max(p.num_steps.max() for p in packed))
  a_step = layout.lanes * spec.phases[0].batch_size
  num_steps = max(num_steps, SMALL_PLAN // a_step)
  num_slots = bucket(max(p.num_slots for p in packed))
  return [
    _fill(w, p, layout, num_steps, num_slots, round)
    for w, p in zip(work, packed, strict=True)
  ]


class _ClientSteps(NamedTuple):
  """The steps of K clients before packing; M steps in all, phase by phase."""

  clients: np.ndarray  # [K]
  num_examples: np.ndarray  # [K]
  num_steps: np.ndarray  # [K]
  owner: np.ndarray  # [M] index into clients
  example: np.ndarray  # [M, B]
  count: np.ndarray  # [M]
  step: np.ndarray  # [M]
  epoch: np.ndarray  # [M]
  phase: np.ndarray  # [M]
  epoch_end: np.ndarray  # [M]

  @classmethod
  def plan(
    cls,
    spec: PlanSpec,
    data: Mapping[str, ClientRows],
    clients: np.ndarray,
    *,
    seed: int,
    round: int,
  ) -> '_ClientSteps':
    done = np.zeros(len(clients), np.int64)
    parts, first_sizes = [], None
    for number, phase in enumerate(spec.phases):
      key = _mix_all(seed, round, number)
      part, sizes = _phase_steps(phase, data[phase.split], clients, key)
      part['step'] += done[part['owner']]
      part['phase'] = np.full(len(part['owner']), number)
      done += np.bincount(part['owner'], minlength=len(clients))
      parts.append(part)
      first_sizes = sizes if first_sizes is None else first_sizes
    merged = parts[0]
    if len(parts) > 1:
      merged = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    return cls(clients, first_sizes, done, **merged)


def examples_used(phase: Phase, sizes: np.ndarray) -> np.ndarray:
  """How many examples clients with sizes int [K] use in a phase, int [K]."""
  if phase.max_examples is None:
    return sizes
  return np.minimum(sizes, phase.max_examples)


def local_steps(
  phase: Phase, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Steps that clients take in a phase, and batches of an epoch: int [K] each.

  Args:
    phase: their work.
    sizes: their examples, after the phase's cap, int [K].
  """
  size = phase.batch_size
  per_epoch = sizes // size if phase.remainder == 'drop' else -(-sizes // size)
  epochs = phase.epochs(sizes) if callable(phase.epochs) else phase.epochs
  epochs = np.broadcast_to(np.asarray(epochs, np.int64), sizes.shape)
  if phase.steps is not None:
    return np.where(per_epoch > 0, phase.steps, 0), per_epoch
  if phase.remainder == 'fill':
    return -(-epochs * sizes // size), per_epoch
  return epochs * per_epoch, per_epoch


def _phase_steps(
  phase: Phase, data: ClientRows, clients: np.ndarray, key: np.uint64
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Batches of one phase for K clients: ({field: [M, ...]}, sizes [K])."""
  size = phase.batch_size
  starts = np.asarray(data.offsets[clients], np.int64)
  sizes = np.asarray(data.offsets[clients + 1], np.int64) - starts
  sizes = examples_used(phase, sizes)
  fill = phase.remainder == 'fill'
  steps, per_epoch = local_steps(phase, sizes)

  owner = np.repeat(np.arange(len(clients)), steps)
  step = ramp(steps)
  n = sizes[owner]
  if fill:  # one stream of positions that runs on from epoch to epoch
    flat = step[:, None] * size + np.arange(size)
    passes, position = np.divmod(flat, n[:, None])
    epoch, count = passes[:, 0], np.full(len(owner), size)
    epoch_end = (step + 1) * size // n > step * size // n
    num_passes = -(-steps * size // np.maximum(sizes, 1))
  else:
    epoch, batch = np.divmod(step, per_epoch[owner])
    count = np.minimum(size, n - batch * size)
    offset = np.arange(size)
    # Masked places repeat the batch's first example.
    position = offset * (offset < count[:, None])
    position += (batch * size)[:, None]
    passes = epoch[:, None]
    epoch_end = batch == per_epoch[owner] - 1
    num_passes = -(-steps // np.maximum(per_epoch, 1))
  if phase.shuffle:
    order, first = _shuffles(key, clients, sizes, num_passes)
    position += first[owner][:, None] + passes * n[:, None]
    position = order.take(position)
  # Where each client owns one stretch of rows, no position has to be looked up.
  segments = getattr(data.rows, 'starts', None)
  if segments is not None:
    position += segments[clients][owner][:, None]
    example = position
  else:
    example = data.rows[starts[owner][:, None] + position]
  part = dict(
    owner=owner,
    example=np.asarray(example, np.int64).reshape(-1, size),
    count=count,
    step=step,
    epoch=epoch,
    epoch_end=epoch_end,
  )
  return part, sizes


def ramp(lengths: np.ndarray) -> np.ndarray:
  """[0..lengths[0]), [0..lengths[1]), ... in one array."""
  ends = np.cumsum(lengths)
  return np.arange(ends[-1] if len(ends) else 0) - np.repeat(
    ends - lengths, lengths
  )


def rows_of(
  data: ClientRows, clients: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """All rows of clients int64 [K], and where in `clients` their owners are.

  Returns:
    (rows int64 [N], owner int64 [N]), client after client.
  """
  starts = np.asarray(data.offsets[clients], np.int64)
  sizes = np.asarray(data.offsets[clients + 1], np.int64) - starts
  rows = data.rows[np.repeat(starts, sizes) + ramp(sizes)]
  return np.asarray(rows), np.repeat(np.arange(len(clients)), sizes)


def _mix(x: np.ndarray) -> np.ndarray:
  """SplitMix64's output function on uint64: Steele et al., "Fast splittable
  pseudorandom number generators", 2014, https://doi.org/10.1145/2660193.2660195
  """
  with np.errstate(over='ignore'):
    x = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    # In place where x is an array: a plan hashes every example.
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _mix_all(*numbers: int) -> np.uint64:
  key = np.uint64(0)
  for number in numbers:
    key = _mix(key ^ np.uint64(number % 2**64))
  return key


def _shuffles(
  key: np.uint64, clients: np.ndarray, sizes: np.ndarray, passes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Orders of every pass of every client, by one sort of hashed counters.

  Returns:
    order int64 [sum of sizes * passes], position inside the client; first
    int64 [K], where a client's first pass begins in `order`.
  """
  owner = np.repeat(np.arange(len(clients)), passes)
  lengths = sizes[owner]
  with np.errstate(over='ignore'):
    base = _mix(
      _mix(key ^ clients.astype(np.uint64))[owner]
      + ramp(passes).astype(np.uint64)
    )
    segment = np.repeat(np.arange(len(owner)), lengths)
    position = ramp(lengths)
    hashed = _mix(base[segment] ^ position.astype(np.uint64))
  # One sort of (segment, hash, position): numbers sort faster than an argsort,
  # and equal hashes keep their order on every machine.
  high = np.uint64(max(len(owner) - 1, 1).bit_length())
  low = np.uint64(max(int(lengths.max(initial=1)) - 1, 1).bit_length())
  keys = (
    segment.astype(np.uint64) << (np.uint64(64) - high)
    | hashed >> (high + low) << low
    | position.astype(np.uint64)
  )
  order = np.sort(keys, kind='stable') & ((np.uint64(1) << low) - np.uint64(1))
  work = sizes * passes
  return order.view(np.int64), np.cumsum(work) - work


def client_shuffles(
  seed: int, clients: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
  """A random order of every client's items.

  It depends on the seed, the client's number and its number of items, and not
  on which other clients there are.

  Args:
    seed: a scalar.
    clients: numbers int64 [K].
    sizes: items of each, int64 [K].

  Returns:
    Positions within clients, client after client, int64 [sum of sizes].
  """
  sizes = np.asarray(sizes, np.int64)
  ones = np.ones(len(clients), np.int64)
  return _shuffles(_mix_all(seed), np.asarray(clients), sizes, ones)[0]


class _Packing(NamedTuple):
  """Where K clients run."""

  device: np.ndarray  # [K]
  lane: np.ndarray  # [K]
  first: np.ndarray  # [K] the client's first step in its lane
  slot: np.ndarray  # [K] ascending by client number within a device
  num_steps: np.ndarray  # [D]
  num_slots: int


def _pack(work: np.ndarray, layout: Layout) -> _Packing:
  """Packs clients with work [K] steps onto D x L lanes, longest first."""
  devices, lanes = layout.num_devices, layout.lanes
  tracks, firsts = [0] * len(work), [0] * len(work)
  # Track t is lane t // D of device t % D, so that ties spread over devices.
  heap = [(0, t) for t in range(devices * lanes)]
  busy = np.argsort(-work, kind='stable')[: int((work > 0).sum())]
  for i, steps in zip(busy.tolist(), work[busy].tolist(), strict=True):
    load, t = heap[0]
    tracks[i], firsts[i] = t, load
    heapq.heapreplace(heap, (load + steps, t))
  track, first = np.array([tracks, firsts], np.int64)
  idle = np.flatnonzero(work == 0)
  track[idle] = np.arange(len(idle)) % devices
  device, lane = track % devices, track // devices
  slot = np.zeros(len(work), np.int64)
  num_steps = np.zeros(devices, np.int64)
  for d in range(devices):
    here = np.flatnonzero(device == d)
    slot[here] = np.arange(len(here))
    num_steps[d] = (first + work)[here].max(initial=0)
  num_slots = int(np.bincount(device, minlength=1).max())
  return _Packing(device, lane, first, slot, num_steps, num_slots)


def _fill(
  work: _ClientSteps,
  packing: _Packing,
  layout: Layout,
  num_steps: int,
  num_slots: int,
  round: int,
) -> Plan:
  """Writes packed clients into padded arrays."""
  devices, lanes = layout.num_devices, layout.lanes
  zeros = functools.partial(np.zeros, dtype=np.int32)
  grid = (devices, num_steps, lanes)
  size = work.example.shape[1]
  plan = Plan(
    example=zeros((*grid, size)),
    count=zeros(grid),
    step=zeros(grid),
    epoch=zeros(grid),
    phase=zeros(grid),
    epoch_end=np.zeros(grid, bool),
    slot=zeros(grid),
    start=zeros(grid),
    num_start=zeros(grid[:2]),
    end=zeros(grid),
    num_end=zeros(grid[:2]),
    num_steps=packing.num_steps.astype(np.int32),
    empty=zeros((devices, num_slots)),
    num_empty=zeros(devices),
    client=zeros((devices, num_slots)) - 1,
    num_examples=zeros((devices, num_slots)),
    round=zeros(devices) + np.int32(round),
  )
  device, lane, first, slot = packing[:4]
  where = (
    device[work.owner],
    first[work.owner] + work.step,
    lane[work.owner],
  )
  plan.slot[where] = slot[work.owner]
  for name in ('example', 'count', 'step', 'epoch', 'phase', 'epoch_end'):
    getattr(plan, name)[where] = getattr(work, name)
  some = work.num_steps > 0
  _write_events(plan.start, plan.num_start, device, first, lane, some)
  last = first + work.num_steps - 1
  _write_events(plan.end, plan.num_end, device, last, lane, some)
  plan.client[device, slot] = work.clients
  plan.num_examples[device, slot] = work.num_examples
  for d in range(devices):
    none = slot[(device == d) & ~some]
    plan.empty[d, : len(none)] = none
    plan.num_empty[d] = len(none)
  return plan


def _write_events(
  lanes: np.ndarray,
  counts: np.ndarray,
  device: np.ndarray,
  step: np.ndarray,
  lane: np.ndarray,
  some: np.ndarray,
) -> None:
  """Lists, for every (device, step), the lanes with an event, ascending."""
  device, step, lane = device[some], step[some], lane[some]
  order = np.lexsort((lane, step, device))
  device, step, lane = device[order], step[order], lane[order]
  np.add.at(counts, (device, step), 1)
  group = device * lanes.shape[1] + step
  fresh = np.flatnonzero(np.diff(group, prepend=-1))
  rank = ramp(np.diff(fresh, append=len(group)))
  lanes[device, step, rank] = lane


def client_batches(
  plan: Plan, client: int
) -> Iterator[tuple[np.ndarray, int, dict[str, Any]]]:
  """Yields a client's batches in order, for debugging and for oracles.

  Args:
    plan: one wave.
    client: client number.

  Yields:
    (rows int32 [B], count, {'step', 'epoch', 'phase', 'epoch_end', 'round'}:
    scalars).
  """
  device, slot = (int(i[0]) for i in np.nonzero(plan.client == client))
  live = np.arange(plan.slot.shape[1])[:, None] < plan.num_steps[device]
  mine = live & (plan.slot[device] == slot) & (plan.count[device] > 0)
  for step, lane in sorted(zip(*np.nonzero(mine), strict=True)):
    at = (device, step, lane)
    names = ('step', 'epoch', 'phase', 'epoch_end')
    info = {name: getattr(plan, name)[at] for name in names}
    info['round'] = plan.round[device]
    yield plan.example[at], int(plan.count[at]), info


def lane_utilisation(plans: list[Plan]) -> float:
  """Share of lane steps that do work, a scalar in 0..1."""
  busy = sum(int((plan.count > 0).sum()) for plan in plans)
  total = sum(
    int(plan.num_steps.max()) * plan.slot.shape[0] * plan.slot.shape[2]
    for plan in plans
  )
  return busy / total if total else 1.0
