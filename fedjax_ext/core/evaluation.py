"""Evaluation over named parts of the population.

A part is a set of clients and a split, for instance "participating clients,
validation". One shared model is scored in a single pass over all examples, with
sums by client. Clients' own models go through the engine, client by client.

Axis letters: C clients, K' clients of a part, B examples in a batch, G groups
(a client's examples in one split), D devices, S steps.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjax_ext.core import validate
from fedjax_ext.core.algorithm import Predictor
from fedjax_ext.core.client_states import ClientStates
from fedjax_ext.core.cohort import make_cohort
from fedjax_ext.core.engine import for_each_client, per_client
from fedjax_ext.core.features import Features
from fedjax_ext.core.layout import Layout
from fedjax_ext.core.plans import ClientRows, Phase, PlanSpec
from fedjax_ext.core.pooled import evaluation_info, pooled_scorer
from fedjax_ext.core.programs import (
  Batch,
  Client,
  ClientOutput,
  ClientProgram,
  as_types,
)
from fedjax_ext.core.reducers import total

PyTree = Any
PERCENTILES = (5, 25, 50, 75, 95)


class Part(NamedTuple):
  """Clients (numbers int64 [K']) and the split they are evaluated on."""

  clients: np.ndarray
  split: str


class PartReport(NamedTuple):
  """What was measured on one part, client by client.

  Attributes:
    clients: client numbers int64 [K'], those with at least one example.
    examples: number of examples int64 [K'].
    sums: {name: [K']}, sum of value * weight.
    weights: {name: [K']}, sum of weights (examples, or tokens).
  """

  clients: np.ndarray
  examples: np.ndarray
  sums: dict[str, np.ndarray]
  weights: dict[str, np.ndarray]

  def summary(self) -> dict[str, float]:
    """{'<metric>/<statistic>': scalar} and the counts.

    'pooled' weighs every example (or token) alike. The others are over each
    client's own mean: 'mean' weighs clients alike, 'weighted_mean' weighs them
    by examples, 'variance' is that of the clients at hand (divided by K'), and
    'p5' to 'p95' are percentiles over clients by the nearest rule: of n sorted
    values the one at round((n - 1) q / 100), so that each is some client's.
    'p50' is the median. Yuan et al., "What do we mean by generalization in
    federated learning?", 2022, https://arxiv.org/abs/2110.14216, call these
    wavg (weighted_mean), avg, var, med and pct5 to pct95.
    """
    result = {
      'clients': len(self.clients),
      'examples': int(self.examples.sum()),
    }
    for name, sums in self.sums.items():
      weights = self.weights[name]
      some = weights > 0
      if not some.any():
        continue
      values = sums[some] / weights[some]
      examples = self.examples[some]
      result[f'{name}/pooled'] = float(sums.sum() / weights.sum())
      result[f'{name}/mean'] = float(values.mean())
      result[f'{name}/weighted_mean'] = float(
        (values * examples).sum() / examples.sum()
      )
      result[f'{name}/variance'] = float(values.var())
      for p in PERCENTILES:
        result[f'{name}/p{p}'] = float(
          np.percentile(values, p, method='nearest')
        )
    return result


Report = dict[str, PartReport]
Evaluator = Callable[[PyTree, ClientStates | None], Report]


def summarize_report(report: Report) -> dict[str, float]:
  """Flattens a report to {'<part>/<metric>/<statistic>': scalar}."""
  return {
    f'{part}/{name}': value
    for part, one in report.items()
    for name, value in one.summary().items()
  }


def make_evaluator(
  predictor: Predictor,
  *,
  data: Mapping[str, ClientRows],
  parts: Mapping[str, Part],
  features: Features,
  layout: Layout,
  batch_size: int = 256,
  seed: int = 0,
) -> Evaluator:
  """Compiles the evaluation of a predictor on fixed parts.

  Every (client, split) is computed once, however many parts name it.

  Args:
    predictor: the model or models.
    data: splits by name.
    parts: what to report on, by name.
    features: what `place_features` returned.
    layout: devices, lanes, waves.
    batch_size: B of a pass without adaptation.
    seed: for the adaptation's shuffles and keys, the same at each evaluation.

  Returns:
    (server_state, client_states) -> {part: PartReport}.

  Raises:
    InvalidInput: a part names an unknown split.
  """
  validate.at_least('batch_size', batch_size, 1)
  for part in parts.values():
    validate.one_of('split', part.split, list(data))
    low = np.min(part.clients, initial=0)
    high = np.max(part.clients, initial=0)
    population = len(data[part.split].offsets) - 1
    validate.check(
      low >= 0 and high < population,
      f'Expected client numbers in 0..{population - 1}, got {low}..{high}.',
    )
  clients = {
    split: np.unique(
      np.concatenate([p.clients for p in parts.values() if p.split == split])
    )
    for split in sorted({part.split for part in parts.values()})
  }
  if not parts:
    return lambda server_state, states=None: {}
  scorer = _personal_scorer if predictor.personal else pooled_scorer
  score = scorer(predictor, data, clients, features, layout, batch_size, seed)

  def evaluator(
    server_state: PyTree, states: ClientStates | None = None
  ) -> Report:
    scores = score(server_state, states)
    return {
      name: _select(part, clients[part.split], data, scores[part.split])
      for name, part in parts.items()
    }

  return evaluator


def evaluate(
  predictor: Predictor,
  server_state: PyTree,
  states: ClientStates | None = None,
  **settings: Any,
) -> Report:
  """`make_evaluator` and one call of it: {part: PartReport} of [K'] arrays."""
  return make_evaluator(predictor, **settings)(server_state, states)


def _sizes(data: ClientRows, clients: np.ndarray) -> np.ndarray:
  return np.asarray(data.offsets[clients + 1] - data.offsets[clients])


def _select(
  part: Part,
  clients: np.ndarray,
  data: Mapping[str, ClientRows],
  scores: dict[str, tuple[np.ndarray, np.ndarray]],
) -> PartReport:
  """Picks a part's clients out of the scores [K'] of its split."""
  sizes = _sizes(data[part.split], part.clients)
  chosen = np.asarray(part.clients)[sizes > 0]
  at = np.searchsorted(clients, chosen)
  return PartReport(
    chosen,
    sizes[sizes > 0],
    {name: sums[at] for name, (sums, _) in scores.items()},
    {name: weights[at] for name, (_, weights) in scores.items()},
  )


def _personal_scorer(
  predictor: Predictor,
  data: Mapping[str, ClientRows],
  clients: Mapping[str, np.ndarray],
  features: Features,
  layout: Layout,
  batch_size: int,
  seed: int,
) -> Callable:
  """Clients' own models: the engine runs adaptation and scoring as phases."""
  adaptation = () if predictor.adapt is None else predictor.adapt.phases
  if adaptation:
    batch_size = adaptation[0].batch_size
  run = for_each_client(
    evaluation_program(predictor, features, batch_size), total(), layout=layout
  )
  # One plan name for all splits: a client adapts to the same model in each.
  cohorts = {
    split: make_cohort(
      numbers,
      round=0,
      seed=seed,
      specs={
        'evaluation': PlanSpec(
          (*adaptation, Phase(split, batch_size=batch_size, shuffle=False))
        )
      },
      data=data,
      features=features,
      layout=layout,
    )
    for split, numbers in clients.items()
  }

  def score(server_state: PyTree, states: ClientStates | None) -> dict:
    shared = predictor.shared(server_state)
    scores = {}
    for split, cohort in cohorts.items():
      output, _ = run(shared, cohort, 'evaluation', states=states)
      _, scores[split] = per_client(output)
    return scores

  return score


def evaluation_program(
  predictor: Predictor, features: Features, batch_size: int
) -> ClientProgram:
  """A client program that scores the client's own model.

  The phases of the adaptation train it, the phase after them is scored. The
  update is empty; the metrics are the predictor's, summed (scalars).

  Args:
    predictor: one with `params` or `adapt`.
    features: columns {name: [M, ...]}, for the types of a batch.
    batch_size: B.
  """
  adapt = predictor.adapt
  num_adapt = 0 if adapt is None else len(adapt.phases)

  def score(model: PyTree, batch: Batch) -> dict:
    params = model if adapt is None else adapt.params(model)
    result = {}
    for name, (value, weight) in predictor.metrics(params, batch).items():
      weight = jnp.where(batch.mask, weight, 0)
      value = jnp.where(weight == 0, 0, value * weight)
      result[name] = (value.sum(), weight.sum())
    return result

  def init(shared: PyTree, client: Client, key: jax.Array) -> PyTree:
    if adapt is None:
      model = predictor.params(shared, client)
    else:
      model = adapt.program.init(shared, client, key)
    batch = Batch(
      {
        name: jnp.zeros((batch_size, *t.shape), t.dtype)
        for name, t in features.types.items()
      },
      jnp.ones(batch_size, bool),
      evaluation_info(jnp.int32(0)),
    )
    types = jax.eval_shape(score, model, batch)
    return model, jax.tree.map(lambda t: jnp.zeros(()), types)

  def evaluate_step(state: PyTree, batch: Batch) -> PyTree:
    model, sums = state
    return model, jax.tree.map(
      lambda a, b: a + b.astype(a.dtype), sums, score(model, batch)
    )

  def step(shared: PyTree, state: PyTree, batch: Batch) -> PyTree:
    if adapt is None:
      return evaluate_step(state, batch)
    train = lambda: (
      as_types(adapt.program.step(shared, state[0], batch), state[0]),
      state[1],
    )
    return lax.cond(
      batch.info.phase < num_adapt,
      train,
      lambda: evaluate_step(state, batch),
    )

  def final(shared: PyTree, client: Client, state: PyTree) -> ClientOutput:
    del shared, client
    return ClientOutput((), jnp.ones(()), metrics=state[1])

  return ClientProgram(init, step, final)
