r"""Federated averaging and its baselines on federated images.

  python -m experiments.fed_avg.run --workdir=runs/digits \
    --flagfile=experiments/fed_avg/flags/digits.flags

See README.md beside this file for the papers, the flag files and results.
"""

import numpy as np
from absl import flags

from fedjax_ext.algorithms import (
  fed_avg,
  fed_prox,
  local_training,
  scaffold,
  with_fine_tuning,
)
from fedjax_ext.core import FederatedAlgorithm, Layout, validate
from fedjax_ext.core.plans import rows_of
from fedjax_ext.data import FederatedDataset
from fedjax_ext.training import app, robust_flags, task_flags
from fedjax_ext.training import flags as shared
from fedjax_ext.training.experiment import dataset_from_flags, run_experiment

FLAGS = flags.FLAGS

flags.DEFINE_enum(
  'algorithm',
  'fed_avg',
  ['fed_avg', 'fed_prox', 'scaffold', 'local_training', 'fine_tuning'],
  'What to run; fine_tuning is fed_avg, evaluated after local fine-tuning.',
)
flags.DEFINE_float('proximal_weight', 0.01, 'FedProx: mu.')
flags.DEFINE_integer('fine_tuning_epochs', 1, 'fine_tuning: local epochs.')
flags.DEFINE_float(
  'fine_tuning_learning_rate', None, 'fine_tuning: the rate, if another one.'
)
flags.adopt_module_key_flags(shared)
flags.adopt_module_key_flags(task_flags)
flags.adopt_module_key_flags(robust_flags)


def make_algorithm(
  dataset: FederatedDataset, layout: Layout
) -> FederatedAlgorithm:
  """Builds --algorithm on a dataset (C clients).

  Under an attack, its success is among the metrics.
  """
  scenario = None
  if FLAGS.attack:
    validate.check(
      'tokens' not in dataset.features,
      f'Expected images to attack, got attack={FLAGS.attack} with tokens.',
    )
    made = task_flags.image_task_from_flags(dataset)
    scenario = robust_flags.scenario_from_flags(made, dataset)
    task = made.task
  else:
    task = task_flags.task_from_flags(dataset)
  phase = shared.phase_from_flags()
  if FLAGS.algorithm in ('local_training', 'fine_tuning'):
    check_personal_parts(dataset)
  if FLAGS.algorithm in ('local_training', 'scaffold'):
    validate.check(
      not FLAGS.attack and not FLAGS.defense,
      'Expected no attack and no defense for '
      f'algorithm={FLAGS.algorithm}, which does not average updates of one '
      'kind.',
    )
  if FLAGS.algorithm == 'scaffold':
    validate.check(
      FLAGS.client_optimizer == 'sgd'
      and FLAGS.server_optimizer == 'sgd'
      and not FLAGS.client_momentum
      and not FLAGS.server_momentum
      and not FLAGS.client_weight_decay
      and FLAGS.client_learning_rate_decay == 1
      and FLAGS.client_weighting == 'examples',
      'Expected plain sgd on clients and server and no client_weighting for '
      'algorithm=scaffold, which averages clients uniformly.',
    )
    return scaffold(
      task,
      client_learning_rate=FLAGS.client_learning_rate,
      server_learning_rate=FLAGS.server_learning_rate,
      num_clients=len(dataset.participating),
      layout=layout,
      phase=phase,
      debug=FLAGS.debug,
    )
  client_optimizer = shared.optimizer_from_flags('client')
  if FLAGS.algorithm == 'local_training':
    return local_training(
      task,
      client_optimizer=client_optimizer,
      layout=layout,
      phase=phase,
      debug=FLAGS.debug,
    )
  averaging = robust_flags.averaging_from_flags(dataset, scenario)
  common = dict(
    averaging=averaging,
    client_optimizer=client_optimizer,
    server_optimizer=shared.optimizer_from_flags('server'),
    layout=layout,
    phase=phase,
    weighting=FLAGS.client_weighting,
    debug=FLAGS.debug,
  )
  if FLAGS.algorithm == 'fed_prox':
    algorithm = fed_prox(task, proximal_weight=FLAGS.proximal_weight, **common)
  else:
    algorithm = fed_avg(task, **common)
  if FLAGS.algorithm == 'fine_tuning':
    validate.at_least('fine_tuning_epochs', FLAGS.fine_tuning_epochs, 0)
    algorithm = with_fine_tuning(
      algorithm,
      task,
      optimizer=shared.optimizer_from_flags(
        'client', learning_rate=FLAGS.fine_tuning_learning_rate
      ),
      phase=shared.phase_from_flags(epochs=FLAGS.fine_tuning_epochs, steps=0),
    )
  return robust_flags.with_success(algorithm, scenario, averaging)


def check_personal_parts(dataset: FederatedDataset) -> None:
  """Refuses parts that say nothing about personal models.

  These are test rows of clients without train rows (the model would not be
  theirs), and held-out clients scored on the rows that they are tuned on.
  """
  test = dataset.parts.get('test')
  validate.check(
    test is None or dataset.splits['train'].sizes(test.clients).sum() > 0,
    f'Expected test rows of clients that train, for '
    f'algorithm={FLAGS.algorithm}; got test rows of others only. Use '
    '--data_test_owner=clients, or a natural partition with both.',
  )
  held_out = dataset.parts.get('unparticipating')
  if held_out is None:
    return
  scored, tuned = (
    rows_of(dataset.splits[split], held_out.clients)[0]
    for split in (held_out.split, 'train')
  )
  validate.check(
    not np.isin(scored, tuned).any(),
    f'Expected test or validation rows of held-out clients, for '
    f'algorithm={FLAGS.algorithm}, which tunes on their train rows; use '
    '--data_validation_fraction, or --eval=three_way without '
    'all_unparticipating.',
  )


def make_dataset() -> tuple[FederatedDataset, str]:
  """The flags' dataset; attackers are left out of reports."""
  dataset, digest = dataset_from_flags()
  return robust_flags.honest_parts(dataset), digest


def main() -> None:
  """Checks everything, trains or resumes, prints the result."""

  run_experiment(
    __name__,
    make_algorithm=make_algorithm,
    make_dataset=make_dataset,
    make_sampler=robust_flags.sampler_from_flags,
    named=task_flags.NAMED | robust_flags.NAMED,
    said={
      'test_accuracy': 'test/accuracy/pooled',
      'test_attack_success': 'test/attack_success/pooled',
      'unparticipating_accuracy': 'unparticipating/accuracy/pooled',
    },
    metrics=('accuracy', 'attack_success', 'target_rate'),
  )


if __name__ == '__main__':
  app.run(main)
