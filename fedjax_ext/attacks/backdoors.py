"""Backdoors: training on triggered images, and what is done to the update.

Axis letters: P parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_ext.algorithms.averaging import Sent
from fedjax_ext.algorithms.local_sgd import LocalState, delta_of, local_sgd
from fedjax_ext.attacks.scenario import Scenario, poison
from fedjax_ext.core import Batch, Client, ClientOutput, ClientProgram, validate
from fedjax_ext.defenses.norm_clipping import clip
from fedjax_ext.defenses.updates import norm_of
from fedjax_ext.models import params_of, with_params

PyTree = Any


def train_poisoned(
  scenario: Scenario,
  *,
  penalty: Callable[[PyTree, PyTree], jax.Array] | None = None,
  class_weight: float = 1.0,
  boost: float = 1.0,
  craft: Callable[[PyTree, Batch, Sent, jax.Array], Batch] | None = None,
  prepare: Callable[[Sent], PyTree] = lambda sent: (),
  hold: Callable[[PyTree, Sent, PyTree, jax.Array], PyTree] | None = None,
) -> ClientProgram:
  """Local SGD on poisoned batches: what most attacks consist of.

    x <- x - eta grad(a F_poisoned(x) + penalty(x, w));  x <- hold(x)
    update = boost (x - w)

  Args:
    scenario: task, optimizer, trigger.
    penalty: (params, the global model's) -> scalar.
    class_weight: a.
    boost: zeta, what the update is multiplied by.
    craft: (model, batch, what the server sent, the attacker's place) ->
      poisoned batch; by default the trigger is stamped.
    prepare: what the server sent -> anything that `hold` needs, once.
    hold: (params, what the server sent, what was prepared, whether the epoch
      ends) -> params, after each step.
  """

  def loss(model: PyTree, batch: Batch, context: tuple) -> Any:
    sent, _, place = context
    if craft is None:
      batch = poison(scenario, batch, place)
    else:
      batch = craft(model, batch, sent, place)
    result = scenario.task.loss(model, batch)
    if isinstance(result, tuple):
      return class_weight * result[0], result[1]
    return class_weight * result

  def begin(sent: Sent, client: Client, key: jax.Array):
    del key
    return sent.model, (sent, prepare(sent), client.inputs)

  def end(sent: Sent, client: Client, state: LocalState) -> ClientOutput:
    delta = delta_of(state.params, sent.model)
    params = jax.tree.map(lambda d: boost * d, params_of(delta))
    return ClientOutput(
      with_params(delta, params),
      client.num_examples,
      metrics={'train_loss': state.loss},
    )

  extra = None
  if penalty is not None:
    extra = lambda params, context: penalty(params, params_of(context[0].model))
  program = local_sgd(
    loss,
    scenario.optimizer,
    begin=begin,
    penalty=extra,
    end=end,
    uses_context=True,
  )
  if hold is None:
    return program

  def step(sent: Sent, state: LocalState, batch: Batch) -> LocalState:
    state = program.step(sent, state, batch)
    _, prepared, _ = state.context
    ends = batch.info.epoch_end
    params = hold(params_of(state.params), sent, prepared, ends)
    return state._replace(params=with_params(state.params, params))

  return program._replace(step=step)


def backdoor(scenario: Scenario) -> ClientProgram:
  """Data poisoning alone.

  Gu, Dolan-Gavitt and Garg, "BadNets", 2017, https://arxiv.org/abs/1708.06733.
  With the trigger `strips` this is DBA, the distributed backdoor attack, where
  each attacker stamps a part: Xie, Huang, Chen and Li, 2020,
  https://openreview.net/forum?id=rkgyS0VFvr.
  """
  return train_poisoned(scenario)


def constrain_and_scale(
  scenario: Scenario, *, boost: float = 10.0, class_weight: float = 1.0
) -> ClientProgram:
  """CSC, model replacement: updates that stay close to w, and are scaled up.

    minimise a F_poisoned(x) + (1 - a) |x - w|,  upload w + zeta (x - w)

  With zeta = n / (attackers * server rate) the mean becomes the attackers'
  model where the others no longer move. Bagdasaryan, Veit, Hua, Estrin and
  Shmatikov, "How to backdoor federated learning", 2020,
  https://arxiv.org/abs/1807.00459.

  Args:
    scenario: task, optimizer, trigger.
    boost: zeta > 0.
    class_weight: a in [0, 1].
  """
  validate.above('boost', boost, 0)
  validate.between('class_weight', class_weight, 0, 1)

  def away(params: PyTree, start: PyTree) -> jax.Array:
    return (1 - class_weight) * norm_of(delta_of(params, start))

  return train_poisoned(
    scenario,
    penalty=away if class_weight < 1 else None,
    class_weight=class_weight,
    boost=boost,
  )


def quiet_parameters(last: PyTree, *, keep: float) -> PyTree:
  """Masks of the `keep` share of parameters that moved least; all at first.

  Args:
    last: what the benign clients' gradients are judged by, [P] over all leaves.
    keep: in (0, 1].

  Returns:
    Bool leaves like `last`; of equal sizes all are kept.
  """
  sizes = jnp.concatenate([jnp.abs(x).ravel() for x in jax.tree.leaves(last)])
  count = max(round(keep * sizes.size), 1)
  limit = jnp.sort(sizes)[count - 1]
  return jax.tree.map(lambda x: jnp.abs(x) <= limit, last)


def neurotoxin(
  scenario: Scenario, *, keep: float = 0.95, boost: float = 1.0
) -> ClientProgram:
  """Training of those parameters alone that benign clients leave alone.

  Judged by the last round's change of the global model. Zhang et al.,
  "Neurotoxin: durable backdoors in federated learning", 2022,
  https://arxiv.org/abs/2206.10341.

  Args:
    scenario: task, optimizer, trigger.
    keep: share of parameters that may move, of the whole model.
    boost: what the update is multiplied by.
  """
  validate.above('keep', keep, 0)
  validate.between('keep', keep, 0, 1)

  def hold(params: PyTree, sent: Sent, masks: PyTree, _) -> PyTree:
    return jax.tree.map(jnp.where, masks, params, params_of(sent.model))

  return train_poisoned(
    scenario,
    boost=boost,
    prepare=lambda sent: quiet_parameters(sent.last, keep=keep),
    hold=hold,
  )


def projected(
  scenario: Scenario, *, radius: float = 2.0, boost: float = 1.0
) -> ClientProgram:
  """PGD: after each epoch back into a ball around the global model.

  Wang et al., "Attack of the tails: yes, you really can backdoor federated
  learning", 2020, https://arxiv.org/abs/2007.05084.

  Args:
    scenario: task, optimizer, trigger.
    radius: of the ball, Euclidean.
    boost: what the update is multiplied by.
  """
  validate.above('radius', radius, 0)

  def hold(params: PyTree, sent: Sent, _, epoch_end: jax.Array) -> PyTree:
    start = params_of(sent.model)
    bound = jnp.where(epoch_end, radius, jnp.inf)
    near = clip(delta_of(params, start), bound)
    return jax.tree.map(jnp.add, start, near)

  return train_poisoned(scenario, boost=boost, hold=hold)


def label_flip(scenario: Scenario, *, source: int = -1) -> ClientProgram:
  """Training on images as they are with the target as label.

  Tolpegin, Truex, Gursoy and Liu, "Data poisoning attacks against federated
  learning systems", 2020, https://arxiv.org/abs/2007.08432.

  Args:
    scenario: task, optimizer, target; `poisoned` examples of a batch.
    source: the label that is flipped; -1 takes any.
  """
  plain = scenario._replace(trigger=lambda x, part: x)

  def flipped(model: PyTree, batch: Batch) -> Any:
    labels = batch.data[scenario.label]
    wanted = jnp.full_like(labels, scenario.target)
    flip = jnp.arange(len(labels)) < scenario.poisoned
    if source >= 0:
      flip &= labels == source
    data = {**batch.data, scenario.label: jnp.where(flip, wanted, labels)}
    return scenario.task.loss(model, batch._replace(data=data))

  task = scenario.task._replace(loss=flipped)
  return train_poisoned(plain._replace(task=task, poisoned=0))
