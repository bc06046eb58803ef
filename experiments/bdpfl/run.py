r"""BDPFL, its controls and other defences against backdoors.

  python -m experiments.bdpfl.run --workdir=runs/bdpfl \
    --flagfile=experiments/bdpfl/flags/digits.flags

See README.md beside this file for the paper, the flag files and results.
"""

import functools
from collections.abc import Mapping

import jax
import numpy as np
from absl import flags

from experiments.bdpfl.pictures import draw_heat_maps
from fedjax_ext.algorithms import fed_avg, fed_prox, local_training
from fedjax_ext.algorithms.averaging import Averaging
from fedjax_ext.algorithms.bdpfl import DECAYS, MATCHES, Options, bdpfl
from fedjax_ext.algorithms.fine_tuning import fine_tuned
from fedjax_ext.attacks import Scenario
from fedjax_ext.core import FederatedAlgorithm, Layout, Report, validate
from fedjax_ext.data import FederatedDataset
from fedjax_ext.defenses.clients import (
  attention_distillation,
  simple_tuning,
)
from fedjax_ext.losses.distillation import NORMS
from fedjax_ext.training import (
  app,
  robust_flags,
  seed_flags,
  task_flags,
)
from fedjax_ext.training import flags as shared
from fedjax_ext.training.experiment import dataset_from_flags, run_experiment
from fedjax_ext.training.loop import Finish

FLAGS = flags.FLAGS
OPTIONS = Options()
# Clients with more ASR than this count as taken over.
TAKEN = 0.2

flags.DEFINE_enum(
  'algorithm',
  'bdpfl',
  ['bdpfl', 'fed_avg', 'fed_prox', 'local_training'],
  'What to run; fed_avg and fed_prox are also evaluated after client_defenses.',
)
flags.DEFINE_float('proximal_weight', 0.01, 'FedProx: mu.')
flags.DEFINE_multi_enum(
  'client_defenses',
  ['fine_tuned'],
  ['fine_tuned', 'simple_tuned', 'distilled'],
  'What clients do to the global model before they use it: fine-tuning, '
  'Simple-Tuning, neural attention distillation (NAD).',
)
flags.DEFINE_integer('tuning_epochs', 5, 'Local epochs of client_defenses.')
flags.DEFINE_float(
  'tuning_learning_rate', None, "Their rate; the clients' by default."
)
flags.DEFINE_string('classifier', 'Dense_1', 'Simple-Tuning: the layer.')
flags.DEFINE_float(
  'distillation_weight', OPTIONS.distillation_weight, 'BDPFL: lambda.'
)
flags.DEFINE_float('temperature', OPTIONS.temperature, 'BDPFL: tau.')
flags.DEFINE_bool(
  'squared_temperature', OPTIONS.squared_temperature, 'BDPFL: times tau^2.'
)
flags.DEFINE_enum(
  'match', OPTIONS.match, MATCHES, 'BDPFL: what of layers is matched.'
)
flags.DEFINE_float('decay', OPTIONS.decay, 'BDPFL: gamma.')
flags.DEFINE_enum(
  'decay_on', OPTIONS.decay_on, DECAYS, 'BDPFL: whose loss has beta_l.'
)
flags.DEFINE_integer(
  'first_layer', OPTIONS.first_layer, 'BDPFL: l of the first layer, 0 or 1.'
)
flags.DEFINE_list('layers', [], 'BDPFL: tapped layers, from 0; empty for all.')
flags.DEFINE_enum('map_norm', OPTIONS.norm, NORMS, 'BDPFL: distance of maps.')
flags.DEFINE_bool(
  'map_normalised', OPTIONS.normalised, 'BDPFL: maps of norm 1.'
)
flags.DEFINE_enum(
  'map_class',
  OPTIONS.map_class,
  ['label', 'predicted'],
  'BDPFL: whose heat maps.',
)
flags.DEFINE_enum(
  'personal_start',
  'global',
  ['global', 'init'],
  'BDPFL: personal models begin at the global one when their client first '
  'takes part, or at the first model of all.',
)
for _module in (shared, task_flags, robust_flags):
  flags.adopt_module_key_flags(_module)
FLAGS.set_default('eval', 'long_tail')


def options_from_flags() -> Options:
  """BDPFL's options, checked."""
  validate.check(
    all(text.isdigit() for text in FLAGS.layers),
    f'Expected layers as whole numbers, got layers={",".join(FLAGS.layers)}.',
  )
  options = Options(
    distillation_weight=FLAGS.distillation_weight,
    temperature=FLAGS.temperature,
    squared_temperature=FLAGS.squared_temperature,
    match=FLAGS.match,
    decay=FLAGS.decay,
    decay_on=FLAGS.decay_on,
    first_layer=FLAGS.first_layer,
    layers=tuple(map(int, FLAGS.layers)),
    norm=FLAGS.map_norm,
    normalised=FLAGS.map_normalised,
    map_class=FLAGS.map_class,
  )
  options.check()
  return options


def make_algorithm(
  dataset: FederatedDataset, layout: Layout
) -> FederatedAlgorithm:
  """Builds --algorithm on a dataset, with attack success among its metrics."""
  made = task_flags.image_task_from_flags(dataset)
  scenario, averaging = threat_from_flags(made, dataset)
  common = dict(
    client_optimizer=shared.optimizer_from_flags('client'),
    layout=layout,
    phase=shared.phase_from_flags(),
    debug=FLAGS.debug,
  )
  if FLAGS.algorithm == 'bdpfl':
    algorithm = _bdpfl(made, dataset, averaging, common)
  elif FLAGS.algorithm == 'local_training':
    algorithm = local_training(made.task, **common)
  else:
    algorithm = _averaged(made, averaging, common)
  return robust_flags.with_success(algorithm, scenario, averaging)


def threat_from_flags(
  made: task_flags.ImageTask, dataset: FederatedDataset
) -> tuple[Scenario, Averaging]:
  """What is stamped on images, and who attacks and defends."""
  scenario = robust_flags.scenario_from_flags(made, dataset)
  averaging = robust_flags.averaging_from_flags(dataset, scenario)
  if FLAGS.algorithm == 'local_training':
    validate.check(
      averaging.reducer is None,
      'Expected no defense with local_training, which averages nothing.',
    )
    # Attackers reach nobody. They are left out, so that honest clients take
    # part as often as beside an attack, and the same ones are scored.
    averaging = averaging._replace(attack=None)
  return scenario, averaging


def _bdpfl(
  made: task_flags.ImageTask,
  dataset: FederatedDataset,
  averaging: Averaging,
  common: dict,
) -> FederatedAlgorithm:
  options = options_from_flags()
  if options.match != 'none':
    task_flags.check_taps(made.model, dataset, options.layers)
  start = None
  if FLAGS.personal_start == 'init':
    key = jax.random.key(seed_flags.role_seed('init'))
    start = functools.partial(made.model.init, key)
  return bdpfl(
    made.task,
    made.model,
    inputs=made.inputs,
    options=options,
    personal_start=start,
    averaging=averaging,
    **common,
  )


def _averaged(
  made: task_flags.ImageTask, averaging: Averaging, common: dict
) -> FederatedAlgorithm:
  """FedAvg or FedProx, and the models that clients make of theirs."""
  common = dict(
    common,
    server_optimizer=shared.optimizer_from_flags('server'),
    weighting=FLAGS.client_weighting,
    averaging=averaging,
  )
  if FLAGS.algorithm == 'fed_prox':
    algorithm = fed_prox(
      made.task, proximal_weight=FLAGS.proximal_weight, **common
    )
  else:
    algorithm = fed_avg(made.task, **common)
  validate.at_least('tuning_epochs', FLAGS.tuning_epochs, 1)
  tuning = dict(
    optimizer=shared.optimizer_from_flags(
      'client', learning_rate=FLAGS.tuning_learning_rate
    ),
    phase=shared.phase_from_flags(epochs=FLAGS.tuning_epochs, steps=0),
  )
  makers = {
    'fine_tuned': functools.partial(fine_tuned, algorithm.predictors['global']),
    'simple_tuned': functools.partial(simple_tuning, layer=FLAGS.classifier),
    'distilled': functools.partial(
      attention_distillation, model=made.model, inputs=made.inputs
    ),
  }
  more = {
    name: makers[name](task=made.task, **tuning)
    for name in FLAGS.client_defenses
  }
  return algorithm._replace(predictors={**algorithm.predictors, **more})


def make_dataset() -> tuple[FederatedDataset, str]:
  """The flags' dataset; personal models are scored of honest clients alone."""
  dataset, digest = dataset_from_flags()
  validate.check(
    'local_test' in dataset.splits,
    'Expected local test examples; use --eval=long_tail:....',
  )
  return robust_flags.honest_parts(dataset), digest


def make_finish(dataset: FederatedDataset) -> Finish:
  """What is said beside the metrics: clients taken over, and pictures."""
  made = task_flags.image_task_from_flags(dataset)
  _, averaging = threat_from_flags(made, dataset)
  personal = FLAGS.algorithm in ('bdpfl', 'local_training')

  def finish(server_state, client_states, reports: Mapping[str, Report]):
    draw_heat_maps(
      made,
      dataset,
      server_state,
      client_states if personal else None,
      trigger=robust_flags.trigger_in(server_state, averaging),
      target=FLAGS.attack_target,
      workdir=shared.workdir_from_flags(),
    )
    return taken_over(reports)

  return finish


def taken_over(reports: Mapping[str, Report]) -> dict[str, float]:
  """Of clients with local tests, the share whose ASR is above 20 %, and spread.

  Returns:
    {'PREDICTOR:taken_over': share, 'PREDICTOR:attack_success_std': standard
    deviation over clients, 'PREDICTOR:accuracy_std': the same of ACC}.
  """
  values = {}
  for name, report in reports.items():
    if 'local_test' not in report:
      continue
    part = report['local_test']
    for metric, shown in (
      ('attack_success', 'attack_success_std'),
      ('accuracy', 'accuracy_std'),
    ):
      weight = part.weights[metric]
      rates = part.sums[metric][weight > 0] / weight[weight > 0]
      if not len(rates):
        continue
      values[f'{name}:{shown}'] = float(np.std(rates))
      if metric == 'attack_success':
        values[f'{name}:taken_over'] = float(np.mean(rates > TAKEN))
  return values


def main() -> None:
  """Checks everything, trains or resumes, prints the result."""
  run_experiment(
    __name__,
    make_algorithm=make_algorithm,
    make_dataset=make_dataset,
    make_sampler=robust_flags.sampler_from_flags,
    make_finish=make_finish,
    named=task_flags.NAMED | robust_flags.NAMED,
    said={
      'accuracy': 'test/accuracy/pooled',
      'attack_success': 'test/attack_success/pooled',
      'personal_accuracy': 'personal:local_test/accuracy/mean',
      'personal_attack_success': 'personal:local_test/attack_success/mean',
      'fine_tuned_attack_success': 'fine_tuned:local_test/attack_success/mean',
    },
    metrics=('accuracy', 'attack_success', 'target_rate'),
  )


if __name__ == '__main__':
  app.run(main)
