"""How clients' updates become the server's, and who among the clients lies.

Any algorithm that averages deltas takes an `Averaging`: by it defences and
attacks come in without the algorithm's knowing them.

Axis letters: K' client slots of a round.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_ext.core import (
  ClientProgram,
  Cohort,
  Layout,
  Phase,
  PlanSpec,
  SparseTable,
  combine,
  finish,
  for_each_client,
  sparse_weighted_mean,
  validate,
  weighted_mean,
  with_sparse_rows,
)
from fedjax_ext.core.engine import RoundOutput
from fedjax_ext.core.reducers import Reducer, by_key, premap
from fedjax_ext.models import Variables, params_of

PyTree = Any


class Sent(NamedTuple):
  """What a malicious client gets from the server.

  Attributes:
    model: the global model.
    last: the last round's change of its params, zeros at first.
    learned: what malicious clients have learned together, () if nothing.
  """

  model: PyTree
  last: PyTree
  learned: PyTree = ()


class Learning(NamedTuple):
  """What malicious clients learn together before they train, in each round.

  Attributes:
    first: () -> what they begin with, a pytree of arrays.
    program: `shared` is `Sent`; the update is a change of what was learned, of
      which the mean is taken.
    epochs: passes of the program over a client's examples; for the rest its
      phase is the attack's, whose epochs and steps do not count here.
    stamp: (learned, images, part) -> images; the trigger to test with, before
      the attack starts what `first` makes of them.
  """

  first: Callable[[], PyTree]
  program: ClientProgram
  epochs: int
  stamp: Callable[[PyTree, jax.Array, jax.Array | int], jax.Array]


class Attack(NamedTuple):
  """Malicious clients of a run.

  Attributes:
    program: what they do: `shared` is `Sent`, a client's `inputs` its place
      among the attackers, an int; the update is a delta like the model. They
      keep no state.
    phase: their local work.
    clients: their numbers, sorted. They take part in every round, beside the
      cohort, which has to be drawn of the others.
    start: first round of the attack; before it they do what honest clients do.
    learning: what they do together before, or None.
  """

  program: ClientProgram
  phase: Phase
  clients: tuple[int, ...]
  start: int = 1
  learning: Learning | None = None


class Averaging(NamedTuple):
  """What becomes of the clients' updates.

  Attributes:
    reducer: None for the weighted mean; of params alone, moving statistics are
      always averaged.
    attack: who attacks, or None.
    num_clients: of the population, for rules that remember clients.
  """

  reducer: Reducer | None = None
  attack: Attack | None = None
  num_clients: int = 0


class Memory(NamedTuple):
  """What averaging carries from round to round.

  Attributes:
    reducer: the rule's memory, () if it has none.
    last: the last change of the model's params, () where nobody attacks.
    learned: see `Sent`.
  """

  reducer: PyTree
  last: PyTree
  learned: PyTree = ()


def on_params(reducer: Reducer, model: PyTree) -> Reducer:
  """A rule for params in updates like the model; moving statistics: the mean.

  Args:
    reducer: of params.
    model: shapes are enough.
  """
  if not isinstance(model, Variables):
    return reducer
  split = premap(
    lambda update, weight: {'params': update.params, 'stats': update.stats},
    by_key(params=reducer, stats=weighted_mean()),
  )

  def join(acc, memory, clients, key):
    result, memory = split.finish(acc, memory, clients, key)
    return Variables(result['params'], result['stats']), memory

  return split._replace(finish=join)


def by_sparse_rows(
  program: ClientProgram,
  averaging: Averaging,
  tables: tuple[SparseTable, ...],
  inputs: Callable[[Cohort], PyTree] | None,
) -> tuple[ClientProgram, Averaging, Callable[[Cohort], PyTree]]:
  """Clients who get and send only those rows of tables that they train.

  Returns:
    The program, its averaging, and what a cohort's clients get: their rows.

  Raises:
    InvalidInput: clients get something else, or there is a defence or attack.
  """
  validate.check(inputs is None, 'Expected one of tables and inputs, got both.')
  validate.check(
    averaging == Averaging(),
    'Expected no defence and no attack with tables of sparse rows.',
  )
  program = with_sparse_rows(program, tables)
  inputs = lambda cohort: (cohort.touched('train'), ())
  return program, Averaging(sparse_weighted_mean(tables)), inputs


class RunAveraged(NamedTuple):
  """A round and what its updates come to.

  Attributes:
    memory: model -> the first `Memory`.
    run: (model, memory, cohort, client states, inputs) -> (delta, memory, round
      output, client states).
    plans: plan specs of the attack, to go beside the algorithm's own.
  """

  memory: Callable[[PyTree], Memory]
  run: Callable[..., tuple[PyTree, Memory, RoundOutput, Any]]
  plans: dict[str, PlanSpec]


def run_averaged(
  program: ClientProgram,
  averaging: Averaging,
  *,
  init: Callable[[jax.Array], PyTree],
  plan: PlanSpec,
  layout: Layout,
  debug: bool = False,
) -> RunAveraged:
  """Runs 'train' over a cohort, and the attack beside it.

  Args:
    program: of honest clients; takes the model as `shared`.
    averaging: reducer and attack.
    init: key -> a model, which updates are like.
    plan: the honest clients' plan.
    layout: devices, lanes, waves.
    debug: run client by client in plain Python.
  """
  attack = averaging.attack
  reducer = averaging.reducer or weighted_mean()
  if averaging.reducer and not plan.tables:
    model = jax.eval_shape(init, jax.random.key(0))
    reducer = on_params(reducer, model)
  honest = for_each_client(program, reducer, layout=layout, debug=debug)
  plans = {}
  learning = None
  if attack is not None:
    learning = attack.learning
    lie = for_each_client(attack.program, reducer, layout=layout, debug=debug)
    places = np.arange(len(attack.clients), dtype=np.int32)
    plans['attack'] = PlanSpec(
      (attack.phase,), clients=attack.clients, first_round=attack.start
    )
    plans['before_attack'] = plan._replace(
      clients=attack.clients, last_round=attack.start - 1
    )
  if learning is not None:
    learn = for_each_client(
      learning.program, weighted_mean(), layout=layout, debug=debug
    )
    phase = attack.phase._replace(epochs=learning.epochs, steps=None)
    plans['learning'] = plans['attack']._replace(phases=(phase,))

  def first_memory(model: PyTree) -> Memory:
    delta = jax.eval_shape(lambda: model)
    last = jax.tree.map(jnp.zeros_like, params_of(model)) if attack else ()
    learned = learning.first() if learning else ()
    return Memory(reducer.memory(delta, averaging.num_clients), last, learned)

  @jax.jit
  def result_of(output: RoundOutput, memory: Memory, key: jax.Array):
    delta, kept = finish(reducer, output, memory.reducer, key)
    last = params_of(delta) if attack else ()
    return delta, Memory(kept, last, memory.learned)

  @jax.jit
  def learned_of(output: RoundOutput, learned: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, learned, finish(weighted_mean(), output)[0])

  def run(model: PyTree, memory: Memory, cohort: Cohort, states, inputs=()):
    output, states = honest(
      model, cohort, 'train', states=states, inputs=inputs
    )
    if 'attack' in cohort.specs:
      sent = Sent(model, memory.last, memory.learned)
      if 'learning' in cohort.specs:
        learnt, _ = learn(sent, cohort, 'learning', inputs=places)
        learned = learned_of(learnt, memory.learned)
        sent = sent._replace(learned=learned)
        memory = memory._replace(learned=learned)
      theirs, _ = lie(sent, cohort, 'attack', inputs=places)
      output = combine(reducer, output, theirs)
    elif 'before_attack' in cohort.specs:
      theirs, states = honest(model, cohort, 'before_attack', states=states)
      output = combine(reducer, output, theirs)
    delta, memory = result_of(output, memory, cohort.key)
    return delta, memory, output, states

  return RunAveraged(first_memory, run, plans)
