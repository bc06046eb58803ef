"""Flags of attacks and defences, for any algorithm that averages.

Groups: who attacks and how, what the server does about it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from fedjax_ext import data
from fedjax_ext.algorithms.averaging import Attack, Averaging
from fedjax_ext.attacks import (
  ATTACKS,
  TRIGGERS,
  LearnedAttack,
  Scenario,
  Trigger,
  with_attack_success,
)
from fedjax_ext.core import (
  Batch,
  FederatedAlgorithm,
  Sampler,
  uniform_sampler,
  validate,
)
from fedjax_ext.core.reducers import Reducer
from fedjax_ext.defenses import DEFENSES
from fedjax_ext.training import calls, seed_flags, task_flags
from fedjax_ext.training import flags as shared

FLAGS = flags.FLAGS
# Flags that name functions, for `flags.flag_values`.
NAMED = {'attack': ATTACKS, 'trigger': TRIGGERS, 'defense': DEFENSES}

flags.DEFINE_string(
  'attack',
  '',
  'What malicious clients do; one of these or MODULE.FUNCTION, empty for no '
  f'attack:\n{calls.describe_all(ATTACKS)}',
)
flags.DEFINE_string(
  'trigger',
  'grid',
  'What attackers stamp on images; one of these or MODULE.FUNCTION:\n'
  f'{calls.describe_all(TRIGGERS)}',
)
flags.DEFINE_integer(
  'attackers',
  3,
  'How many clients attack, the same ones in every round, all of them in the '
  'cohort.',
)
flags.DEFINE_integer('attack_start', 1, 'First round of the attack.')
flags.DEFINE_integer('attack_target', 2, 'The label that triggers should get.')
flags.DEFINE_integer(
  'attack_poisoned', 20, 'How many examples of each batch are poisoned.'
)
flags.DEFINE_integer('attack_epochs', None, 'Local epochs of attackers.')
flags.DEFINE_float(
  'attack_learning_rate', None, "Attackers' rate; the clients' by default."
)
flags.DEFINE_string(
  'defense',
  '',
  'How the server averages; one of these or MODULE.FUNCTION, empty for the '
  f'weighted mean:\n{calls.describe_all(DEFENSES)}',
)


def attackers_of(dataset: data.FederatedDataset) -> np.ndarray:
  """Numbers of the malicious clients [A], sorted; none without --attack."""
  if not FLAGS.attack:
    return np.zeros(0, np.int64)
  validate.between('attackers', FLAGS.attackers, 1, FLAGS.cohort_size - 1)
  validate.check(
    FLAGS.attackers < len(dataset.participating),
    f'Expected fewer attackers than the {len(dataset.participating)} '
    f'participating clients, got attackers={FLAGS.attackers}.',
  )
  # A stream of its own: the data and cohorts stay what they are without them.
  rng = np.random.default_rng([seed_flags.role_seed('sampling'), 0xBAD])
  return np.sort(rng.choice(dataset.participating, FLAGS.attackers, False))


def sampler_from_flags(dataset: data.FederatedDataset) -> Sampler:
  """The cohort beside the attackers, who take part in every round."""
  attackers = attackers_of(dataset)
  if not len(attackers):
    return shared.sampler_from_flags(dataset)
  validate.check(
    FLAGS.sampler == 'uniform',
    f'Expected sampler=uniform beside an attack, got {FLAGS.sampler}.',
  )
  honest = np.setdiff1d(dataset.participating, attackers)
  return uniform_sampler(honest, cohort_size=FLAGS.cohort_size - len(attackers))


def honest_parts(dataset: data.FederatedDataset) -> data.FederatedDataset:
  """The dataset with attackers left out of all parts but pooled ones."""
  attackers = attackers_of(dataset)
  parts = {}
  for name, part in dataset.parts.items():
    keep = ~np.isin(part.clients, attackers)
    # A pooled test set has one owner, which need not be the one that trains.
    if len(part.clients) > 1 and not keep.all():
      part = part._replace(clients=part.clients[keep])
    parts[name] = part
  return dataclasses.replace(dataset, parts=parts)


def trigger_from_flags() -> Trigger:
  """--trigger."""
  make = calls.resolve('trigger', FLAGS.trigger, TRIGGERS)
  return make(**calls.arguments('trigger', FLAGS.trigger, make))


def trigger_in(server_state: Any, averaging: Averaging) -> Trigger:
  """--trigger, or the one that attackers have learned so far."""
  attack = averaging.attack
  if attack is None or attack.learning is None:
    return trigger_from_flags()
  learned = jax.tree.map(np.asarray, server_state.memory.learned)
  return lambda x, part: attack.learning.stamp(learned, x, part)


def _features(
  made: task_flags.ImageTask, dataset: data.FederatedDataset
) -> Callable[[Any, Batch], jax.Array] | None:
  """(model, batch) -> the model's last tapped layer, if it has one."""
  if not task_flags.count_taps(made.model, dataset):
    return None

  def features(model: Any, batch: Batch) -> jax.Array:
    inputs = made.inputs(batch, train=False)
    return made.model.tapped(model, inputs, None)[1][-1]

  return features


def scenario_from_flags(
  made: task_flags.ImageTask, dataset: data.FederatedDataset
) -> Scenario:
  """What the attack is built of, checked against the dataset's images."""
  feature = 'image' if 'image' in dataset.features else 'x'
  scenario = Scenario(
    made.task,
    shared.optimizer_from_flags(
      'client', learning_rate=FLAGS.attack_learning_rate
    ),
    trigger_from_flags(),
    FLAGS.attack_target,
    FLAGS.attack_poisoned,
    feature,
    features=_features(made, dataset),
    image_shape=dataset.features[feature].shape[1:],
  )
  images = dataset.features[feature]
  validate.check(
    len(images.shape) in (3, 4),
    f'Expected images to attack, got {feature} of shape {list(images.shape)}.',
  )
  classes = dataset.num_classes
  validate.between('attack_target', scenario.target, 0, classes - 1)
  validate.between(
    'attack_poisoned', scenario.poisoned, 0, FLAGS.client_batch_size
  )
  # Whether the trigger fits, before anything is compiled.
  colours = images.shape[3:] or (1,)
  shape = jax.ShapeDtypeStruct((1, *images.shape[1:3], *colours), float)
  jax.eval_shape(lambda x: scenario.trigger(x, -1), shape)
  return scenario


def averaging_from_flags(
  dataset: data.FederatedDataset, scenario: Scenario | None
) -> Averaging:
  """--defense, and --attack in a scenario; None where nobody attacks."""
  num_clients = dataset.splits['train'].num_clients
  attack = None
  if FLAGS.attack:
    make = calls.resolve('attack', FLAGS.attack, ATTACKS)
    settings = calls.arguments('attack', FLAGS.attack, make)
    validate.at_least('attack_start', FLAGS.attack_start, 1)
    if FLAGS.attack_epochs is not None:
      validate.at_least('attack_epochs', FLAGS.attack_epochs, 1)
    program, learning = make(scenario, **settings), None
    if isinstance(program, LearnedAttack):
      program, learning = program
    attack = Attack(
      program,
      shared.phase_from_flags(epochs=FLAGS.attack_epochs),
      tuple(attackers_of(dataset).tolist()),
      FLAGS.attack_start,
      learning,
    )
  return Averaging(defense_from_flags(), attack, num_clients)


def defense_from_flags() -> Reducer | None:
  """--defense, None for the weighted mean."""
  if not FLAGS.defense:
    return None
  make = calls.resolve('defense', FLAGS.defense, DEFENSES)
  given = ('cohort_size',)
  settings = calls.arguments('defense', FLAGS.defense, make, reserved=given)
  if calls.takes(make, 'cohort_size'):
    settings['cohort_size'] = FLAGS.cohort_size
  return make(**settings)


def with_success(
  algorithm: FederatedAlgorithm,
  scenario: Scenario | None,
  averaging: Averaging,
) -> FederatedAlgorithm:
  """Adds 'attack_success' and 'target_rate' to metrics; None adds nothing."""
  if scenario is None:
    return algorithm
  return algorithm._replace(
    predictors=with_attack_success(
      algorithm.predictors,
      trigger=scenario.trigger,
      target=scenario.target,
      feature=scenario.feature,
      label=scenario.label,
      learning=averaging.attack and averaging.attack.learning,
    )
  )
