r"""FedLoGe and its baselines: generic and personal models on long-tailed data.

  python -m experiments.fedloge.run --workdir=runs/fedloge \
    --flagfile=experiments/fedloge/flags/digits.flags

See README.md beside this file for the paper, the flag files and results.
"""

import functools
from collections.abc import Callable

import numpy as np
from absl import flags

from experiments.fedloge.norms import report_norms
from fedjax_ext.algorithms import fed_avg, fed_prox, local_training
from fedjax_ext.algorithms.creff import creff
from fedjax_ext.algorithms.ditto import ditto
from fedjax_ext.algorithms.fed_babu import fed_babu
from fedjax_ext.algorithms.fed_bn import fed_bn
from fedjax_ext.algorithms.fed_etf import fed_etf
from fedjax_ext.algorithms.fed_per import fed_per
from fedjax_ext.algorithms.fed_rep import fed_rep
from fedjax_ext.algorithms.fed_rod import fed_rod
from fedjax_ext.algorithms.fedloge import PERSONAL, fed_loge
from fedjax_ext.algorithms.personal_heads import (
  fine_tuned_predictors,
  whole_model_predictors,
)
from fedjax_ext.core import FederatedAlgorithm, Layout, validate
from fedjax_ext.data import FederatedDataset, count_classes
from fedjax_ext.losses.headed import HeadedTask, with_head
from fedjax_ext.models.heads import sparse_etf
from fedjax_ext.training import app, seed_flags, task_flags
from fedjax_ext.training import flags as shared
from fedjax_ext.training.experiment import run_experiment
from fedjax_ext.training.loop import Finish

FLAGS = flags.FLAGS
# Methods that are a function of the task, class counts and what is common.
METHODS: dict[str, Callable[..., FederatedAlgorithm]] = {
  'ditto': ditto,
  'fed_per': fed_per,
  'fed_rep': fed_rep,
  'fed_babu': fed_babu,
  'fed_bn': fed_bn,
  'fed_rod': fed_rod,
  'fed_etf': fed_etf,
  'creff': creff,
}

flags.DEFINE_enum(
  'algorithm',
  'fedloge',
  ['fedloge', 'fed_avg', 'fed_prox', 'local_training', *METHODS],
  'What to run. fed_avg and fed_prox also report models after local '
  'fine-tuning.',
)
flags.DEFINE_float('sparsity', 0.6, 'FedLoGe: share of zeros in SSE-C, beta.')
flags.DEFINE_float('classifier_norm', 0.1, 'FedLoGe: norm in SSE-C, gamma.')
flags.DEFINE_float('realignment_scale', 1.7, 'FedLoGe: s of GA-FR.')
flags.DEFINE_float('realignment_exponent', 1.0, 'FedLoGe: p of GA-FR.')
flags.DEFINE_enum(
  'pm_mode',
  'local_plus_transfer',
  list(PERSONAL),
  'FedLoGe: the personal prediction that goes without a name in reports.',
)
flags.DEFINE_bool(
  'classifier_bias', False, 'FedLoGe: a frozen random bias in SSE-C.'
)
flags.DEFINE_float('proximal_weight', 0.01, 'FedProx: mu; Ditto: lambda.')
flags.DEFINE_integer(
  'fine_tuning_epochs',
  1,
  'Local epochs before a fine-tuned model is scored; with 0 fed_avg and '
  'fed_prox have none.',
)
flags.adopt_module_key_flags(shared)
flags.adopt_module_key_flags(task_flags)
FLAGS.set_default('eval', 'long_tail')


def counts_of(dataset: FederatedDataset, split: str) -> np.ndarray:
  """Examples of every client and class in a split, int64 [C, Y]."""
  return count_classes(
    dataset.splits[split],
    dataset.features['label'],
    num_classes=dataset.num_classes,
  )


def make_algorithm(
  dataset: FederatedDataset, layout: Layout
) -> FederatedAlgorithm:
  """Builds --algorithm on a dataset (C clients)."""
  validate.check(
    'test' in dataset.splits and 'local_test' in dataset.splits,
    'Expected test and local test examples; use --eval=long_tail:....',
  )
  task = task_flags.headed_task_from_flags(
    dataset, counts_of(dataset, 'test').sum(0)
  )
  counts = counts_of(dataset, 'train')
  common = dict(
    client_optimizer=shared.optimizer_from_flags('client'),
    layout=layout,
    phase=shared.phase_from_flags(),
    debug=FLAGS.debug,
  )
  if FLAGS.algorithm == 'fedloge':
    return fed_loge(
      task,
      classifier=sparse_etf(
        num_features=task.num_features,
        num_classes=task.num_classes,
        sparsity=FLAGS.sparsity,
        norm=FLAGS.classifier_norm,
        seed=seed_flags.role_seed('init'),
      ),
      counts=counts,
      scale=FLAGS.realignment_scale,
      exponent=FLAGS.realignment_exponent,
      pm_mode=FLAGS.pm_mode,
      random_bias=FLAGS.classifier_bias,
      **common,
    )
  if FLAGS.algorithm in METHODS:
    method = METHODS[FLAGS.algorithm]
    if FLAGS.algorithm in ('fed_babu', 'fed_etf'):
      method = functools.partial(method, fine_tuning=_fine_tuning())
    if FLAGS.algorithm == 'ditto':
      method = functools.partial(method, proximal_weight=FLAGS.proximal_weight)
    return method(task, counts=counts, **common)
  return _plain(task, counts, common)


def _plain(
  task: HeadedTask, counts: np.ndarray, common: dict
) -> FederatedAlgorithm:
  """FedAvg, FedProx or local training of a backbone and a head."""
  plain = with_head(task)
  if FLAGS.algorithm == 'local_training':
    return local_training(plain, **common)._replace(
      predictors=whole_model_predictors(
        task, counts=counts, shared_of=lambda state: state, generic=False
      )
    )
  common['server_optimizer'] = shared.optimizer_from_flags('server')
  if FLAGS.algorithm == 'fed_prox':
    algorithm = fed_prox(plain, proximal_weight=FLAGS.proximal_weight, **common)
  else:
    algorithm = fed_avg(plain, **common)
  predictors = fine_tuned_predictors(
    task,
    counts=counts,
    optimizer=common['client_optimizer'],
    phase=_fine_tuning(),
  )
  if not FLAGS.fine_tuning_epochs:
    del predictors['fine_tuned']
  return algorithm._replace(predictors=predictors)


def make_finish(dataset: FederatedDataset) -> Finish:
  """What to say of the last heads: their norms by class."""
  return functools.partial(
    report_norms,
    counts=counts_of(dataset, 'train'),
    own_heads=FLAGS.algorithm == 'fedloge',
    workdir=shared.workdir_from_flags(),
  )


def _fine_tuning():
  """The local work before a fine-tuned model is scored."""
  validate.at_least('fine_tuning_epochs', FLAGS.fine_tuning_epochs, 0)
  return shared.phase_from_flags(epochs=FLAGS.fine_tuning_epochs, steps=0)


def main() -> None:
  """Checks everything, trains or resumes, prints the result."""
  run_experiment(
    __name__,
    make_algorithm=make_algorithm,
    make_finish=make_finish,
    named=task_flags.NAMED,
    said={
      'generic': 'test/accuracy/pooled',
      'personal': 'personal:local_test/accuracy/mean',
      'personal_masked': 'personal:local_test/accuracy_masked/mean',
      'fine_tuned': 'fine_tuned:local_test/accuracy/mean',
    },
    metrics=('accuracy', 'accuracy_masked', 'balanced_accuracy'),
  )


if __name__ == '__main__':
  app.run(main)
