r"""Participation gap: how a model does beyond the clients that trained it.

  python -m experiments.participation_gap.run --workdir=runs/gap \
    --flagfile=experiments/participation_gap/flags/synthetic.flags

See README.md beside this file for the paper, the flag files and results.
"""

from absl import flags

from fedjax_ext.algorithms import centralised, fed_avg
from fedjax_ext.core import FederatedAlgorithm, Layout
from fedjax_ext.data import FederatedDataset, pool_clients
from fedjax_ext.training import app, task_flags
from fedjax_ext.training import flags as shared
from fedjax_ext.training.experiment import dataset_from_flags, run_experiment

FLAGS = flags.FLAGS

flags.DEFINE_enum(
  'algorithm',
  'fed_avg',
  ['fed_avg', 'centralised'],
  'How the participating clients train; centralised pools their train '
  'examples, a round being --client_epochs over all of them (--cohort_size is '
  '1 then).',
)
flags.adopt_module_key_flags(shared)
flags.adopt_module_key_flags(task_flags)
FLAGS.set_default('eval', 'three_way')
FLAGS.set_default('data_source', 'synthetic_styles')


def make_dataset() -> tuple[FederatedDataset, str]:
  """Reads and splits the data; with its fingerprint."""
  dataset, digest = dataset_from_flags()
  if FLAGS.algorithm == 'centralised':
    dataset = pool_clients(dataset)
  return dataset, digest


def make_algorithm(
  dataset: FederatedDataset, layout: Layout
) -> FederatedAlgorithm:
  """Builds --algorithm on a dataset (C clients)."""
  task = task_flags.task_from_flags(dataset)
  optimizer = shared.optimizer_from_flags('client')
  common = dict(
    layout=layout, phase=shared.phase_from_flags(), debug=FLAGS.debug
  )
  if FLAGS.algorithm == 'centralised':
    return centralised(task, optimizer=optimizer, **common)
  return fed_avg(
    task,
    client_optimizer=optimizer,
    server_optimizer=shared.optimizer_from_flags('server'),
    weighting=FLAGS.client_weighting,
    **common,
  )


def main() -> None:
  """Checks everything, trains or resumes, prints the result."""
  if FLAGS.algorithm == 'centralised':
    FLAGS.cohort_size = 1  # the one client that has everything
  run_experiment(
    __name__,
    make_algorithm=make_algorithm,
    make_dataset=make_dataset,
    named=task_flags.NAMED,
    said={
      'train_accuracy': 'train/accuracy/pooled',
      'validation_accuracy': 'validation/accuracy/pooled',
      'unparticipating_accuracy': 'unparticipating/accuracy/pooled',
      'out_of_sample_gap': 'gap/accuracy/out_of_sample',
      'participation_gap': 'gap/accuracy/participation',
    },
  )


if __name__ == '__main__':
  app.run(main)
