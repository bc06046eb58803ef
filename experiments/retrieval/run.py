r"""Federated deep retrieval: losses that do, and do not, depend on the batch.

  python -m experiments.retrieval.run --workdir=runs/retrieval \
    --flagfile=experiments/retrieval/flags/synthetic.flags

See README.md beside this file for the paper, the flag files and results.
"""

import numpy as np
from absl import flags

from fedjax_ext.algorithms import centralised, fed_avg, popularity
from fedjax_ext.core import FederatedAlgorithm, Layout, validate
from fedjax_ext.core.plans import rows_of
from fedjax_ext.data import (
  FederatedDataset,
  fingerprint,
  fingerprint_splits,
  first_examples,
  pool_clients,
  shuffle_across_clients,
)
from fedjax_ext.training import (
  app,
  data_flags,
  retrieval_flags,
  seed_flags,
)
from fedjax_ext.training import flags as shared
from fedjax_ext.training.experiment import run_experiment

FLAGS = flags.FLAGS

flags.DEFINE_enum(
  'algorithm',
  'fed_avg',
  ['fed_avg', 'centralised', 'popularity'],
  'What to run. centralised pools the training clients and takes '
  '--client_steps steps of --client_optimizer a round; popularity ranks items '
  'by how often they are a label.',
)
flags.DEFINE_bool(
  'shuffle_across_users',
  False,
  'The IID control: train examples are dealt out anew, each client keeping its '
  'number of them.',
)
flags.adopt_module_key_flags(shared)
flags.adopt_module_key_flags(retrieval_flags)
FLAGS.set_default('model', 'dual_encoder')
FLAGS.set_default('data_source', 'synthetic_retrieval')

METRICS = ('recall_at_1', 'recall_at_5', 'recall_at_10', 'mrr')


def make_dataset() -> tuple[FederatedDataset, str]:
  """Reads the data under the chosen control; with its fingerprint."""
  columns = data_flags.columns_from_flags()
  dataset = data_flags.dataset_from_flags(columns)
  pooled = FLAGS.algorithm == 'centralised'
  if FLAGS.client_max_examples and (FLAGS.shuffle_across_users or pooled):
    # The controls see the examples that clients train on, and no others.
    dataset = first_examples(dataset, max_examples=FLAGS.client_max_examples)
  if FLAGS.shuffle_across_users:
    dataset = shuffle_across_clients(dataset, seed=seed_flags.role_seed('data'))
  if pooled:
    dataset = pool_clients(dataset)
  return dataset, f'{fingerprint(columns)} {fingerprint_splits(dataset)}'


def make_algorithm(
  dataset: FederatedDataset, layout: Layout
) -> FederatedAlgorithm:
  """Builds --algorithm on a dataset (C clients)."""
  encoder = retrieval_flags.encoder_from_flags(dataset)
  if FLAGS.algorithm == 'popularity':
    train_rows, _ = rows_of(dataset.splits['train'], dataset.participating)
    labels = np.asarray(dataset.features['label'][train_rows])
    return popularity(
      labels,
      num_items=encoder.num_items,
      pad_is_candidate=FLAGS.pad_is_candidate,
      pessimistic_ties=FLAGS.pessimistic_ties,
    )
  loss = retrieval_flags.retrieval_loss_from_flags()
  task = retrieval_flags.retrieval_task_from_flags(encoder, loss)
  phase = shared.phase_from_flags()
  optimizer = shared.optimizer_from_flags('client')
  if FLAGS.algorithm == 'centralised':
    validate.at_least('client_steps', FLAGS.client_steps, 1)
    return centralised(
      task,
      optimizer=optimizer,
      layout=layout,
      phase=phase._replace(max_examples=None),
      debug=FLAGS.debug,
    )
  return fed_avg(
    task,
    client_optimizer=optimizer,
    server_optimizer=shared.optimizer_from_flags('server'),
    layout=layout,
    phase=phase,
    weighting=FLAGS.client_weighting,
    tables=retrieval_flags.sparse_tables(encoder, loss),
    debug=FLAGS.debug,
  )


def main() -> None:
  """Checks everything, trains or resumes, prints the result."""
  run_experiment(
    __name__,
    make_algorithm=make_algorithm,
    make_dataset=make_dataset,
    named=retrieval_flags.NAMED,
    said={
      f'{part}_{metric}': f'{part}/{metric}/pooled'
      for part in ('validation', 'test')
      for metric in METRICS[:3]
    },
    metrics=METRICS,
    shown='recall_at_10',
  )


if __name__ == '__main__':
  app.run(main)
