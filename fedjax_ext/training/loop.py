"""The training loop: everything about a run that is not pure.

Prefetch of plans, evaluation schedule, metric writers, progress, checkpoints,
preemption. Rounds count from 1. Same workdir = resume.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import logging
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_ext.core import (
  ClientStates,
  Cohort,
  FederatedAlgorithm,
  Layout,
  Part,
  PartReport,
  Report,
  Sampler,
  gap_metrics,
  make_client_states,
  make_cohort,
  make_evaluator,
  place_features,
  prefetch,
  sample_cohort,
  summarize_report,
  validate,
)
from fedjax_ext.core.plans import ClientRows
from fedjax_ext.training import processes
from fedjax_ext.training.checkpoints import Checkpoints, digest
from fedjax_ext.training.manifest import Manifest, open_workdir, write_manifest
from fedjax_ext.training.plots import (
  plot_bands,
  plot_curves,
  plot_participants,
)
from fedjax_ext.training.progress import Progress
from fedjax_ext.training.writers import MetricWriter, write_atomically

_LOG = logging.getLogger(__name__)

PyTree = Any
# (server state, client states, reports of the predictors) after the last round
# -> scalars by name
Finish = Callable[
  [PyTree, ClientStates | None, Mapping[str, Report]], Mapping[str, float]
]


class Dataset(Protocol):
  """What the loop needs of data (`fedjax_ext.data.FederatedDataset`).

  Attributes:
    splits: views by name.
    features: {name: [M, ...]}.
    participating: client numbers int64 [C'].
    parts: what to report on, by name.
  """

  splits: Mapping[str, ClientRows]
  features: Mapping[str, np.ndarray]
  participating: np.ndarray
  parts: Mapping[str, Part]


@dataclasses.dataclass(frozen=True)
class Seeds:
  """One seed (a scalar) for each role.

  Attributes:
    init: the first model and the clients' first states.
    sampling: the cohorts.
    training: shuffles, and the keys of local steps.
  """

  init: int = 0
  sampling: int = 0
  training: int = 0


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When what happens; scalars, counted in rounds.

  Attributes:
    num_rounds: rounds in all.
    eval_every: rounds between evaluations; the last round has one anyway.
    eval_train: also evaluate part 'train' each time, not only at the end.
    checkpoint_every: rounds between checkpoints; the last round has one.
    keep_checkpoints: how many to keep, at least 2.
    prefetch: plan the next round in a thread while the device works.
    eval_batch_size: examples in an evaluation batch.
    data_memory_gb: columns of at most so many 2^30 bytes are placed on every
      device, larger ones are streamed.
  """

  num_rounds: int
  eval_every: int = 10
  eval_train: bool = False
  checkpoint_every: int = 10
  keep_checkpoints: int = 2
  prefetch: bool = True
  eval_batch_size: int = 128
  data_memory_gb: float = 2.0

  def __post_init__(self):
    for name, least in (
      ('num_rounds', 1),
      ('eval_every', 1),
      ('checkpoint_every', 1),
      ('keep_checkpoints', 2),
      ('eval_batch_size', 1),
      ('data_memory_gb', 0),
    ):
      validate.at_least(name, getattr(self, name), least)


@dataclasses.dataclass(frozen=True)
class Result:
  """A finished run.

  Attributes:
    round: the last round, a scalar.
    server_state: pytree.
    client_states: the bank, or None.
    reports: {predictor: report} of the last round; the first is the main one.
    rows: metric rows of all rounds.
    summary: what final.json says.
  """

  round: int
  server_state: PyTree
  client_states: ClientStates | None
  reports: dict[str, Report]
  rows: list[dict[str, Any]]
  summary: dict[str, Any]


class Interrupted(Exception):
  """A signal ended the run after a checkpoint; `signal` is its number."""

  def __init__(self, signal_number: int, round: int, workdir: pathlib.Path):
    self.signal = signal_number
    super().__init__(
      f'Stopped by {signal.Signals(signal_number).name} after round {round}; '
      f'the same command resumes from {workdir}.'
    )


class _Signals:
  """Notes SIGTERM and SIGINT; a second one takes its usual course."""

  def __init__(self):
    self.received = 0
    self._old: dict[int, Any] = {}

  def __enter__(self) -> '_Signals':
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._note)
    return self

  def _note(self, number: int, frame: FrameType | None) -> None:
    self.received = number
    _LOG.info('%s: saving after this round.', signal.Signals(number).name)
    signal.signal(number, self._old[number])

  def __exit__(self, *error: Any) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)


def train(
  algorithm: FederatedAlgorithm,
  dataset: Dataset,
  *,
  sampler: Sampler,
  seeds: Seeds,
  schedule: Schedule,
  layout: Layout,
  workdir: pathlib.Path,
  manifest: Manifest,
  shown: str = 'accuracy',
  drawn: Sequence[str] = (),
  finish: Finish = lambda server_state, client_states, reports: {},
) -> Result:
  """Trains, or resumes what the workdir holds.

  Args:
    algorithm: what to run.
    dataset: splits, features, parts.
    sampler: who takes part in a round.
    seeds: one for each role.
    schedule: rounds, evaluations, checkpoints.
    layout: devices, lanes, waves.
    workdir: gets manifest.json, metrics.jsonl, metrics.csv, tensorboard/,
      checkpoints/, curves.png, bands.png, partition.png, report.json and
        final.json.
    manifest: from `make_manifest`.
    shown: the metric of progress lines and of bands.png.
    drawn: metrics of curves.png beside the loss; empty for all.
    finish: what to say of the last states beside the predictors' metrics; it
      may also write files of its own.

  With many processes, see `processes`.

  Raises:
    InvalidInput: the workdir belongs to another run.
    OSError: a write failed; the last good checkpoint restores.
    Interrupted: SIGTERM or SIGINT came; a checkpoint was saved.
  """
  own = processes.own_folder(workdir)
  with contextlib.ExitStack() as stack:

    def start() -> Manifest:
      stack.enter_context(_locked(own))
      return open_workdir(own, manifest)

    manifest = processes.agree(start)
    run = _Run(
      algorithm,
      dataset,
      sampler,
      seeds,
      schedule,
      layout,
      workdir,
      manifest,
      shown,
      drawn,
      finish,
    )
    # The picture is drawn, and what draws is imported, while rounds run.
    thread = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
    picture = thread.submit(run.draw_participants)
    return run(stack.enter_context(_Signals()), picture)


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps a second process out of a workdir; the lock dies with its holder."""
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / '.lock').open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise validate.InvalidInput(
        f'The workdir {workdir} is in use by another process.'
      ) from error
    yield


class _Run:
  """The pieces of one run, set up once."""

  def __init__(
    self,
    algorithm,
    dataset,
    sampler,
    seeds,
    schedule,
    layout,
    workdir,
    manifest,
    shown,
    drawn,
    finish,
  ):
    self.shown, self.drawn, self.finish = shown, drawn, finish
    self.algorithm, self.dataset = algorithm, dataset
    self.sampler, self.seeds = sampler, seeds
    self.schedule, self.layout = schedule, layout
    self.workdir = processes.own_folder(workdir)
    self.manifest = manifest
    self.checkpoints = Checkpoints(workdir, keep=schedule.keep_checkpoints)
    self.features = place_features(
      dataset.features, layout, memory_gb=schedule.data_memory_gb
    )
    self.sizes = np.diff(dataset.splits['train'].offsets)
    key = jax.random.key(seeds.init)
    self.server_state = layout.replicate(jax.jit(algorithm.init)(key))
    self.client_states = None
    if algorithm.init_client is not None:
      self.client_states = make_client_states(
        algorithm.init_client,
        num_clients=len(self.sizes),
        key=jax.random.fold_in(key, 1),
        directory=self.workdir / 'client_states',
      )
    often = {
      name: part
      for name, part in dataset.parts.items()
      if name != 'train' or schedule.eval_train
    }
    self.often = self._evaluators(often)
    rest = {k: v for k, v in dataset.parts.items() if k not in often}
    self.last = self._evaluators(rest)

  def _evaluators(self, parts: Mapping[str, Part]) -> dict[str, Any]:
    evaluators = {}
    for name, predictor in self.algorithm.predictors.items():
      mine = {
        part: one
        for part, one in parts.items()
        # Personal models say nothing of clients that never train.
        if not predictor.personal or self.sizes[one.clients].any()
      }
      if mine:
        evaluators[name] = make_evaluator(
          predictor,
          data=self.dataset.splits,
          parts=mine,
          features=self.features,
          layout=self.layout,
          batch_size=self.schedule.eval_batch_size,
          seed=self.seeds.training,
        )
    return evaluators

  def __call__(
    self, signals: _Signals, picture: concurrent.futures.Future
  ) -> Result:
    begun = time.monotonic()
    checkpoints = self.checkpoints
    restored = checkpoints.restore(self.server_state, self.client_states)
    first, processed = 0, 0
    if restored is not None:
      first = restored.round
      self.server_state = self.layout.replicate(restored.server_state)
      self.client_states = restored.client_states
      processed = restored.extra['examples_processed']
      _LOG.info('Resuming after round %d of %s.', first, self.workdir)
    elif self.client_states is not None:
      self.client_states.keep({})
    writer = MetricWriter(self.workdir, after_round=first)
    reports: dict[str, Report] = {}
    rounds = range(first + 1, self.schedule.num_rounds + 1)
    earlier = self.manifest['wall_seconds']
    wall = lambda: earlier + time.monotonic() - begun
    try:
      with Progress(
        self.schedule.num_rounds, initial=first, bar=processes.is_first()
      ) as progress:
        for cohort in prefetch(
          self._prepare, rounds, ahead=self.schedule.prefetch
        ):
          values = self._round(cohort)
          processed += values['examples']
          reports = self._evaluate(cohort.round)
          values |= self._values(cohort.round, reports)
          writer.write(cohort.round, values)
          progress.update(_short(values, self.shown), important=bool(reports))
          stopped = processes.largest(signals.received)
          if self._saves(cohort.round) or stopped:
            checkpoints.save(
              cohort.round,
              self.server_state,
              self.client_states,
              {'examples_processed': processed},
            )
          if stopped and cohort.round < rounds[-1]:
            checkpoints.wait()
            raise Interrupted(stopped, cohort.round, self.workdir)
      if not reports:  # resumed after the last round
        reports = self._evaluate(self.schedule.num_rounds)
        self._values(self.schedule.num_rounds, reports)
      checkpoints.close()
    except BaseException:
      checkpoints.abandon()
      raise
    finally:
      writer.close()
      self.manifest = dict(self.manifest, wall_seconds=wall())
      write_manifest(self.workdir, self.manifest)
    picture.result()
    return self._finish(writer.rows, reports, processed)

  def draw_participants(self) -> None:
    """Draws partition.png."""
    plot_participants(
      self.workdir / 'partition.png',
      self.dataset.features.get('label'),
      self.dataset.splits['train'],
      self.dataset.participating,
      title=f'{self.workdir.name}: train examples of participating clients',
    )

  def _prepare(self, round: int) -> Cohort:
    """A planned cohort; pure, so a thread may run it ahead."""
    cohort = make_cohort(
      sample_cohort(self.sampler, self.seeds.sampling, round),
      round=round,
      seed=self.seeds.training,
      specs=self.algorithm.plans,
      data=self.dataset.splits,
      features=self.features,
      layout=self.layout,
    )
    for name in cohort.specs:
      cohort.prepare(name)
    return cohort

  def _round(self, cohort: Cohort) -> dict[str, Any]:
    """One round: its scalars."""
    begun = time.monotonic()
    self.server_state, self.client_states, metrics = self.algorithm.apply(
      self.server_state, self.client_states, cohort
    )
    metrics = {k: np.asarray(v).item() for k, v in metrics.items()}
    if metrics.get('clients_dropped'):
      _LOG.warning(
        'Round %d: %d of %d clients dropped for non-finite updates.',
        cohort.round,
        metrics['clients_dropped'],
        len(cohort.clients),
      )
    if metrics.get('centre_dropped'):
      _LOG.warning(
        'Round %d: what the server did was not finite.', cohort.round
      )
    return metrics | {
      'examples': sum(
        int(plan.count.sum())
        for name in cohort.specs
        for plan in cohort.plans(name)
      ),
      'seconds': time.monotonic() - begun,
    }

  def _evaluate(self, round: int) -> dict[str, Report]:
    last = round == self.schedule.num_rounds
    if not last and round % self.schedule.eval_every:
      return {}
    reports: dict[str, Report] = {}
    for evaluators in (self.last, self.often) if last else (self.often,):
      for name, evaluator in evaluators.items():
        report = evaluator(self.server_state, self.client_states)
        reports[name] = reports.get(name, {}) | report
    return reports

  def _values(self, round: int, reports: dict[str, Report]) -> dict[str, float]:
    """Scalars of a round's reports, those of the last kept for final.json."""
    last = round == self.schedule.num_rounds
    values = _flatten(reports, intervals=last)
    if last:
      values |= self.finish(self.server_state, self.client_states, reports)
      self.final_metrics = values
    return values

  def _saves(self, round: int) -> bool:
    return (
      round % self.schedule.checkpoint_every == 0
      or round == self.schedule.num_rounds
    )

  def _finish(
    self, rows: list[dict], reports: dict[str, Report], processed: int
  ) -> Result:
    """Writes report.json, final.json, curves.png and bands.png."""
    metrics = self.final_metrics
    finite = all(
      bool(jnp.isfinite(x).all())
      for x in jax.tree.leaves(self.server_state)
      if jnp.issubdtype(x.dtype, jnp.inexact)
    )
    summary = {
      'round': self.schedule.num_rounds,
      'diverged': not finite,
      'metrics': {k: v if np.isfinite(v) else None for k, v in metrics.items()},
      'clients': len(self.dataset.participating),
      'examples': int(self.sizes[self.dataset.participating].sum()),
      'examples_processed': processed,
      'wall_seconds': round(self.manifest['wall_seconds'], 1),
      'device': self.manifest['device'],
      'layout': self.manifest['layout'],
      'versions': self.manifest['versions'],
      'commit': self.manifest['commit'],
      'state_sha256': digest(self.server_state),
    }
    if not finite:
      _LOG.warning('The server state is not finite: the run diverged.')
    per_client = {
      name: {part: self._columns(one) for part, one in report.items()}
      for name, report in reports.items()
    }
    write_atomically(
      self.workdir / 'report.json', json.dumps(per_client, allow_nan=False)
    )
    title = self.workdir.name
    plot_curves(
      rows, self.workdir / 'curves.png', title=title, metrics=self.drawn
    )
    plot_bands(rows, self.workdir / 'bands.png', metric=self.shown, title=title)
    write_atomically(
      self.workdir / 'final.json', json.dumps(summary, indent=2) + '\n'
    )
    return Result(
      self.schedule.num_rounds,
      self.server_state,
      self.client_states,
      reports,
      rows,
      summary,
    )

  def _columns(self, report: PartReport) -> dict[str, Any]:
    """A part's report client by client, as plain lists."""
    names = next(iter(self.dataset.splits.values())).client_ids
    columns = {
      'client': report.clients.tolist(),
      'client_id': names[report.clients].tolist(),
      'examples': report.examples.tolist(),
    }
    for name, sums in report.sums.items():
      columns[f'{name}/sum'] = [
        x if np.isfinite(x) else None for x in sums.tolist()
      ]
      columns[f'{name}/weight'] = report.weights[name].tolist()
    return columns


def _flatten(
  reports: Mapping[str, Report], *, intervals: bool
) -> dict[str, float]:
  """Scalars of all predictors; all but the first carry their name.

  Gaps have their bootstrap intervals only where asked for: they take time.
  """
  result = {}
  for i, (name, report) in enumerate(reports.items()):
    gaps = gap_metrics(report, num_samples=1000 if intervals else 0)
    for key, value in (summarize_report(report) | gaps).items():
      result[key if i == 0 else f'{name}:{key}'] = value
  return result


def _short(values: Mapping[str, Any], shown: str) -> str:
  """The few numbers that a progress line has room for."""
  wanted = [
    name
    for name in values
    if name == 'train_loss'
    or (':' not in name and name.endswith(f'{shown}/pooled'))
  ]
  return ' '.join(
    f'{n.removesuffix("/pooled")}={values[n]:.4f}' for n in wanted
  )
