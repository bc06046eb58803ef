r"""Mixed federated learning: a loss on clients and a loss at the server.

  python -m experiments.mixed_fl.run --workdir=runs/smile \
    --flagfile=experiments/mixed_fl/flags/synthetic_smile.flags

See README.md beside this file for the paper, the tasks, flag files and results.
"""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from fedjax_ext import data
from fedjax_ext.algorithms import MODES, ServerLoss, mixed_fl
from fedjax_ext.algorithms import mixed_fl_costs as costs
from fedjax_ext.algorithms.mixed_fl import GRADIENTS
from fedjax_ext.core import (
  FederatedAlgorithm,
  Layout,
  SparseTable,
  validate,
)
from fedjax_ext.core.plans import examples_used, local_steps
from fedjax_ext.core.sparse_rows import touched_rows
from fedjax_ext.losses import (
  Task,
  quadratic_task,
  table_regulariser,
)
from fedjax_ext.models.dual_encoder import TABLE
from fedjax_ext.training import (
  app,
  calls,
  data_flags,
  processes,
  retrieval_flags,
  seed_flags,
  task_flags,
)
from fedjax_ext.training import flags as shared
from fedjax_ext.training.loop import train
from fedjax_ext.training.manifest import make_manifest
from fedjax_ext.training.writers import write_atomically

FLAGS = flags.FLAGS
_LOG = logging.getLogger('fedjax_ext.experiments.mixed_fl')
GIVEN_SELECTION = ('seed',)

flags.DEFINE_enum(
  'mode',
  'parallel_training',
  list(MODES),
  'Who trains, and who adds whose gradient. parallel_training: both sides, '
  "their deltas added; one_way: clients, with the server's gradient; two_way: "
  "both, each with the other's gradient; fed_only, central_only: one side; "
  "oracle, client_side: clients evaluate the server's loss at every step, with "
  'its examples or without.',
)
flags.DEFINE_string(
  'server_data',
  'client',
  "Which train rows of the data are the server's: one of these, or "
  'MODULE.FUNCTION:\n'
  f'{calls.describe_all(data.SERVER_DATA, reserved=GIVEN_SELECTION)}',
)
flags.DEFINE_string(
  'server_data_source',
  '',
  'A source of its own for the server, as in --data_source, instead of '
  '--server_data.',
)
flags.DEFINE_float(
  'server_test_fraction',
  0.2,
  'Of the clients of --server_data_source: held out as part server_test.',
)
flags.DEFINE_float(
  'server_spreadout',
  0.0,
  'Retrieval: f_c is this times the spreadout of the item table, and the '
  'server has no data.',
)
flags.DEFINE_integer(
  'server_steps',
  0,
  'Central steps a round, K_c, or for one_way the central batches that its '
  "gradient is the mean of; 0: as many as a client's steps on average.",
)
flags.DEFINE_integer('server_batch_size', 20, 'Examples in a central batch.')
flags.DEFINE_float('federated_weight', 1.0, 'Weight of the clients, w_f.')
flags.DEFINE_float('central_weight', 1.0, 'Weight of the server, w_c.')
flags.DEFINE_list(
  'merge_weights', None, 'Weights of the two deltas instead of the default.'
)
flags.DEFINE_enum(
  'gradients',
  'stale',
  GRADIENTS,
  'two_way: gradients of the round before, 0 at first; the same, but warm from '
  "those at the first model; or fresh ones at each round's model.",
)
shared.define_optimizer_flags('central', None)
flags.adopt_module_key_flags(shared)
flags.adopt_module_key_flags(task_flags)
flags.adopt_module_key_flags(retrieval_flags)
FLAGS.set_default('data_source', 'synthetic_smile')

NAMED = {
  'server_data': data.SERVER_DATA,
  'server_data_source': data.SOURCES,
}


def make_dataset() -> tuple[data.FederatedDataset, int | None, str]:
  """The data, the server's client number (None without data), a digest."""
  columns = data_flags.columns_from_flags()
  dataset = data_flags.dataset_from_flags(columns)
  digest = data.fingerprint(columns)
  validate.at_least('server_spreadout', FLAGS.server_spreadout, 0)
  if FLAGS.server_spreadout:
    validate.check(
      'context' in dataset.features and not FLAGS.server_data_source,
      'Expected --server_spreadout with retrieval data and no '
      '--server_data_source.',
    )
    return dataset, None, f'{digest} {data.fingerprint_splits(dataset)}'
  if FLAGS.server_data_source:
    other = data_flags.columns_from_flags('server_data_source')
    dataset, server = data.add_server_data(
      dataset,
      other,
      test_fraction=FLAGS.server_test_fraction,
      seed=seed_flags.role_seed('data'),
    )
    digest = f'{digest} {data.fingerprint(other)}'
  else:
    text = FLAGS.server_data
    function = calls.resolve('server_data', text, data.SERVER_DATA)
    settings = calls.arguments(
      'server_data', text, function, reserved=GIVEN_SELECTION
    )
    calls.check_complete(
      'server_data', text, function, settings, GIVEN_SELECTION
    )
    if calls.takes(function, 'seed'):
      settings['seed'] = seed_flags.role_seed('data')
    dataset, server = data.split_off_server(
      dataset, function(dataset, **settings)
    )
  _LOG.info(
    'Examples of the server: %d; of %d clients: %d.',
    dataset.splits['server'].sizes().sum(),
    len(dataset.participating),
    dataset.splits['train'].sizes(dataset.participating).sum(),
  )
  return dataset, server, f'{digest} {data.fingerprint_splits(dataset)}'


def make_task(dataset: data.FederatedDataset) -> Task:
  """What clients learn, by the features of the data."""
  if 'context' in dataset.features:
    return retrieval_flags.retrieval_task_from_flags(
      retrieval_flags.encoder_from_flags(dataset),
      retrieval_flags.retrieval_loss_from_flags(),
    )
  if 'curvature' in dataset.features:
    return quadratic_task(dataset.features['x'].shape[1])
  return task_flags.task_from_flags(dataset)


def mean_steps(dataset: data.FederatedDataset) -> int:
  """Mean local steps of a participating client in a round, at least 1.

  Clients count as they do in the mean of their deltas.
  """
  phase = shared.phase_from_flags()
  sizes = dataset.splits['train'].sizes(dataset.participating)
  sizes = examples_used(phase, sizes)
  steps, _ = local_steps(phase, sizes)
  weights = sizes if FLAGS.client_weighting == 'examples' else None
  return max(round(float(np.average(steps, weights=weights))), 1)


def make_server(
  dataset: data.FederatedDataset, task: Task, client: int | None
) -> ServerLoss:
  """f_c: the clients' loss on the server's data, or the spreadout."""
  validate.at_least('server_steps', FLAGS.server_steps, 0)
  validate.at_least('server_batch_size', FLAGS.server_batch_size, 1)
  steps = FLAGS.server_steps or mean_steps(dataset)
  optimizer = shared.optimizer_from_flags('central')
  if client is None:
    return ServerLoss(
      lambda params, batch: table_regulariser(
        params[TABLE], spreadout=FLAGS.server_spreadout, form=FLAGS.table_form
      ),
      optimizer,
      steps,
      FLAGS.central_weight,
    )
  features = None
  if FLAGS.mode == 'oracle':
    features = {
      name: jnp.asarray(x) for name, x in data.server_features(dataset).items()
    }
  return ServerLoss(
    task.loss,
    optimizer,
    steps,
    FLAGS.central_weight,
    client,
    FLAGS.server_batch_size,
    features,
  )


def sparse_tables(dataset: data.FederatedDataset) -> tuple[SparseTable, ...]:
  """The item table, where clients can do with the rows that they name."""
  chosen = MODES[FLAGS.mode]
  if (
    'context' not in dataset.features
    or chosen.augment_clients
    or chosen.on_clients
  ):
    return ()
  return retrieval_flags.sparse_tables(
    retrieval_flags.encoder_from_flags(dataset),
    retrieval_flags.retrieval_loss_from_flags(),
  )


def make_algorithm(
  dataset: data.FederatedDataset, task: Task, client: int | None, layout: Layout
) -> FederatedAlgorithm:
  """Builds --mode."""
  merge = None
  if FLAGS.merge_weights is not None:
    try:
      merge = tuple(float(x) for x in FLAGS.merge_weights)
    except ValueError:
      merge = ()
    validate.check(
      len(merge) == 2,
      'Expected --merge_weights=A,B with two numbers, got '
      f'{",".join(FLAGS.merge_weights)}.',
    )
  return mixed_fl(
    task,
    mode=FLAGS.mode,
    server=make_server(dataset, task, client),
    client_optimizer=shared.optimizer_from_flags('client'),
    server_optimizer=shared.optimizer_from_flags('server'),
    layout=layout,
    phase=shared.phase_from_flags(),
    federated_weight=FLAGS.federated_weight,
    merge_weights=merge,
    gradients=FLAGS.gradients,
    weighting=FLAGS.client_weighting,
    tables=sparse_tables(dataset),
    debug=FLAGS.debug,
  )


def client_costs(
  dataset: data.FederatedDataset, params: dict
) -> dict[str, float]:
  """Floats and multiply-adds of a client in a round of retrieval.

  Means over the participating clients; a forward pass is counted.

  Args:
    dataset: with columns [M, ...].
    params: of the dual encoder, or their shapes.
  """
  rows, features = params[TABLE].shape
  model = sum(x.size for x in jax.tree.leaves(params))
  tables = sparse_tables(dataset)
  sparse = None
  if tables:
    used = dataset
    if FLAGS.client_max_examples:
      used = data.first_examples(
        dataset, max_examples=FLAGS.client_max_examples
      )
    named = touched_rows(
      tables,
      {'train': used.splits['train']},
      dataset.features,
      dataset.participating,
    )[TABLE]
    own_rows = float((named < rows).sum(1).mean())
    sparse = own_rows * features + model - rows * features
  plain_sgd = FLAGS.client_optimizer == 'sgd' and not FLAGS.client_momentum
  said = costs.communication(
    'client_side' if FLAGS.mode == 'oracle' else FLAGS.mode,
    model_floats=model,
    augmentation_floats=rows * features if FLAGS.server_spreadout else model,
    sparse_floats=sparse,
    server_steps=FLAGS.server_steps or mean_steps(dataset),
    raw_gradients=not plain_sgd,
  )
  tower = sorted(n for n in params if n.startswith('context_'))
  own = costs.dual_encoder_multiply_adds(
    batch_size=FLAGS.client_batch_size,
    context=dataset.features['context'].shape[1],
    features=features,
    hidden=tuple(params[name]['bias'].size for name in tower),
  )
  result = {
    'floats_down': said.down,
    'floats_up': said.up,
    'server_gradients': said.server_gradients,
    'multiply_adds_a_step': own,
  }
  on_clients = bool(FLAGS.server_spreadout) and MODES[FLAGS.mode].on_clients
  for form in ('pairs', 'gram'):
    extra = costs.spreadout_multiply_adds(rows, features, form=form)
    result[f'multiply_adds_a_step_{form}'] = own + (extra if on_clients else 0)
  return result


def main() -> None:
  """Checks everything, trains or resumes, prints the result."""
  workdir = shared.workdir_from_flags()
  schedule = shared.schedule_from_flags()
  seeds = seed_flags.seeds_from_flags()
  layout = shared.layout_from_flags()
  dataset, client, data_digest = make_dataset()
  sampler = shared.sampler_from_flags(dataset)
  task = make_task(dataset)
  algorithm = make_algorithm(dataset, task, client, layout)
  said = {}
  if 'context' in dataset.features:
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    said = client_costs(dataset, shapes)
  retrieval = 'context' in dataset.features
  quadratic = 'curvature' in dataset.features
  metric = 'recall_at_10' if retrieval else 'w' if quadratic else 'accuracy'
  result = train(
    algorithm,
    dataset,
    sampler=sampler,
    seeds=seeds,
    schedule=schedule,
    layout=layout,
    workdir=workdir,
    manifest=make_manifest(
      flags=shared.flag_values(
        __name__,
        NAMED | task_flags.NAMED | (retrieval_flags.NAMED if retrieval else {}),
      ),
      data=data_digest,
      layout=layout.describe(),
    ),
    shown=metric,
  )
  if said and processes.is_first():
    write_atomically(workdir / 'costs.json', json.dumps(said, indent=2) + '\n')
    print('a client in a round (costs.json): ', end='')
    print(' '.join(f'{name}={value:.6g}' for name, value in said.items()))
  metrics = (metric,)
  if retrieval:
    metrics = ('recall_at_1', 'recall_at_5', 'recall_at_10')
  app.print_result(
    result,
    {
      f'{part}_{name}': f'{part}/{name}/pooled'
      for part in (
        ('train',)
        if quadratic
        else ('validation', 'test', 'unparticipating', 'server_test')
      )
      for name in metrics
    },
    workdir=workdir,
    metrics=metrics,
  )


if __name__ == '__main__':
  app.run(main)
