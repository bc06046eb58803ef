"""Evaluation over named parts of the population (see `parts`).

One shared model is scored in a single pass over all examples, with sums by
client. Clients' own models go through the engine, client by client.

Axis letters: C clients, K' clients of a part, B examples in a batch, P pieces.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
from fedjax_ext.core.layout import Layout, bucket
from fedjax_ext.core.parts import (
  Part,
  Piece,
  Report,
  Scores,
  cut,
  report_on,
)
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


Evaluator = Callable[[PyTree, ClientStates | None], Report]


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

  Every example of a client in a split is scored once, however many parts name
  it, and a client adapts once for all of them. Where columns are streamed, what
  a wave of clients adapts to and is scored on is read at once.

  What `Predictor.params` gets as `client.num_examples` is the number of the
  client's train examples, as in training.

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
    InvalidInput: a part names an unknown split or client, or its mask does not
      fit the split.
  """
  validate.at_least('batch_size', batch_size, 1)
  pieces, of_part = cut(data, parts)
  if not parts:
    return lambda server_state, states=None: {}
  scorer = _personal_scorer if predictor.personal else pooled_scorer
  score = scorer(predictor, data, pieces, features, layout, batch_size, seed)

  def evaluator(
    server_state: PyTree, states: ClientStates | None = None
  ) -> Report:
    scores = score(server_state, states)
    return {
      name: report_on(
        part,
        [pieces[i] for i in of_part[name]],
        [scores[i] for i in of_part[name]],
      )
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


def _personal_scorer(
  predictor: Predictor,
  data: Mapping[str, ClientRows],
  pieces: Sequence[Piece],
  features: Features,
  layout: Layout,
  batch_size: int,
  seed: int,
) -> Callable:
  """Clients' own models: the engine runs adaptation and scoring as phases.

  A client adapts once, then each piece is a phase.
  """
  if predictor.adapt is None:  # no steps, but the number of examples
    known = 'train' if 'train' in data else sorted(data)[0]
    before = (Phase(known, epochs=0, batch_size=batch_size),)
  else:
    before = predictor.adapt.phases
    batch_size = before[0].batch_size
  run = for_each_client(
    evaluation_program(
      predictor,
      features,
      batch_size,
      num_before=len(before),
      num_pieces=bucket(max(len(pieces), 4)),
    ),
    total(),
    layout=layout,
  )
  clients = np.unique(np.concatenate([piece.clients for piece in pieces]))
  views = {
    f'piece {i}': piece.view
    if len(piece.clients) == len(clients)
    else piece.alone()
    for i, piece in enumerate(pieces)
  }
  phases = (Phase(name, batch_size=batch_size, shuffle=False) for name in views)
  cohort = make_cohort(
    clients,
    round=0,
    seed=seed,
    specs={'evaluation': PlanSpec((*before, *phases))},
    data={phase.split: data[phase.split] for phase in before} | views,
    features=features,
    layout=layout,
  )

  def score(server_state: PyTree, states: ClientStates | None) -> list[Scores]:
    output, _ = run(
      predictor.shared(server_state), cohort, 'evaluation', states=states
    )
    ran, metrics = per_client(output)
    at = [np.searchsorted(ran, piece.clients) for piece in pieces]
    return [
      {name: (s[at[i], i], w[at[i], i]) for name, (s, w) in metrics.items()}
      for i in range(len(pieces))
    ]

  return score


def evaluation_program(
  predictor: Predictor,
  features: Features,
  batch_size: int,
  *,
  num_before: int,
  num_pieces: int,
) -> ClientProgram:
  """A client program that scores the client's own model.

  The first phases train it, if it adapts; each phase after them is scored. The
  update is empty; the metrics are the predictor's, summed by phase [P].

  Args:
    predictor: one with `params` or `adapt`.
    features: columns {name: [M, ...]}, for the types of a batch.
    batch_size: B.
    num_before: phases that are not scored.
    num_pieces: P, at least as many as there are phases to score.
  """
  adapt = predictor.adapt

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
    return model, jax.tree.map(lambda t: jnp.zeros(num_pieces), types)

  def evaluate_step(state: PyTree, batch: Batch) -> PyTree:
    model, sums = state
    here = jnp.arange(num_pieces) == batch.info.phase - num_before
    return model, jax.tree.map(
      lambda a, b: jnp.where(here, a + b.astype(a.dtype), a),
      sums,
      score(model, batch),
    )

  def step(shared: PyTree, state: PyTree, batch: Batch) -> PyTree:
    if adapt is None:
      return evaluate_step(state, batch)
    train = lambda: (
      as_types(adapt.program.step(shared, state[0], batch), state[0]),
      state[1],
    )
    return lax.cond(
      batch.info.phase < num_before,
      train,
      lambda: evaluate_step(state, batch),
    )

  def final(shared: PyTree, client: Client, state: PyTree) -> ClientOutput:
    del shared, client
    return ClientOutput((), jnp.ones(()), metrics=state[1])

  return ClientProgram(init, step, final)
