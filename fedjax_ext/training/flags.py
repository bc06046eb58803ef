"""Flags that every experiment shares, and what is built from them.

Groups: `client_*` local work, `server_*` the server's optimizer, `data_*` the
data, and flags of the run itself; those of the machine are in device_flags.
Importing this module defines them.
"""

import functools
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax
from absl import flags

from fedjax_ext import data
from fedjax_ext.core import (
  Layout,
  Phase,
  Sampler,
  poisson_sampler,
  uniform_sampler,
  validate,
  weighted_sampler,
)
from fedjax_ext.core.sampling import check_cohort_size
from fedjax_ext.models import MODELS, dual_encoder
from fedjax_ext.training import (  # embeddings: semantic:embedding=vae
  calls,
  device_flags,
  embeddings,  # noqa: F401
)
from fedjax_ext.training.loop import Schedule, Seeds

FLAGS = flags.FLAGS
_LOG = logging.getLogger(__name__)
# Arguments that other flags, or the data, give to a named function.
GIVEN = ('data_dir', 'seed')
GIVEN_SKEW = ('num_clients', 'seed')
GIVEN_PARTITION = ('seed', 'features', 'client')
GIVEN_EVAL = ('partition', 'num_clients', 'skew', 'eval_clients', 'seed')
GIVEN_MODEL = ('input_shape', 'num_classes')
_ALL_MODELS = {**MODELS, 'dual_encoder': dual_encoder}
DEFAULT_PARTITION = 'dirichlet:num_clients=100,alpha=0.5'
OPTIMIZERS = ('sgd', 'adam', 'adamw', 'yogi', 'adagrad', 'rmsprop')

flags.adopt_module_key_flags(device_flags)

# The run.
flags.DEFINE_string(
  'workdir', None, 'Where everything is written; the same one resumes.'
)
flags.DEFINE_integer('num_rounds', 100, 'Rounds in all.')
flags.DEFINE_integer('cohort_size', 20, 'Clients in a round, K.')
flags.DEFINE_enum(
  'sampler',
  'uniform',
  ['uniform', 'poisson', 'weighted'],
  'How a cohort is drawn: K without replacement; each client with probability '
  'K / C; K without replacement by number of examples.',
)
flags.DEFINE_integer('seed', 0, 'Seed of every role that has none of its own.')
for _role, _what in (
  ('data', 'partition and splits'),
  ('init', 'first model and client states'),
  ('sampling', 'cohorts'),
  ('training', 'shuffles and local steps'),
):
  flags.DEFINE_integer(f'{_role}_seed', None, f'Seed of {_what}.')
flags.DEFINE_integer('eval_every', 10, 'Rounds between evaluations.')
flags.DEFINE_bool(
  'eval_train', False, 'Evaluate part train each time, not only at the end.'
)
flags.DEFINE_string(
  'eval',
  'parts',
  'How clients and examples are split for reports: parts, as '
  '--data_*_fraction and the source say; one of these; or MODULE.FUNCTION:\n'
  f'{calls.describe_all(data.THREE_WAY, reserved=GIVEN_EVAL)}',
)
flags.DEFINE_integer(
  'eval_clients',
  0,
  'Evaluate at most so many clients of a part, always the same; 0: all.',
)
flags.DEFINE_integer('eval_batch_size', 128, 'Examples in an evaluation batch.')
flags.DEFINE_integer('checkpoint_every', 10, 'Rounds between checkpoints.')
flags.DEFINE_integer('keep_checkpoints', 2, 'Checkpoints to keep, >= 2.')
flags.DEFINE_bool('prefetch', True, 'Plan the next round in a thread.')
flags.DEFINE_bool('debug', False, 'Run client by client in plain Python.')

# Data. A function that a flag names takes its arguments after a colon.
flags.DEFINE_string(
  'data_source',
  'digits',
  'Where examples come from: a source or any MODULE.FUNCTION that returns '
  f'Columns. Sources:\n{calls.describe_all(data.SOURCES, reserved=GIVEN)}',
)
flags.DEFINE_string('data_dir', '', 'Folder that a source reads from.')
flags.DEFINE_string(
  'data_partition',
  '',
  'Who owns which example: client (the natural clients), a partition made '
  'here, or MODULE.FUNCTION. Default: the natural clients where there are any, '
  f'else {DEFAULT_PARTITION}. Partitions:\n'
  f'{calls.describe_all(data.PARTITIONERS, reserved=GIVEN_PARTITION)}',
)
flags.DEFINE_string(
  'data_skew',
  '',
  'Images that differ by client, one of these or MODULE.FUNCTION:\n'
  f'{calls.describe_all(data.SKEWS, reserved=GIVEN_SKEW)}',
)
flags.DEFINE_float(
  'data_memory_gb',
  2.0,
  'Columns of at most so many GiB are placed on every device, larger ones are '
  'streamed wave by wave.',
)
flags.DEFINE_string(
  'data_group_column', '', 'Integer column to report test rows by.'
)
flags.DEFINE_float(
  'data_test_fraction', 0.2, 'Test part, where the data has no split column.'
)
flags.DEFINE_enum(
  'data_test_owner',
  'pooled',
  ['pooled', 'clients'],
  'Made partitions: test rows form one pool, or belong to the clients too.',
)
flags.DEFINE_float(
  'data_validation_fraction',
  0.0,
  "Validation part of each client's train rows.",
)
flags.DEFINE_float(
  'data_unparticipating_fraction', 0.0, 'Clients held out of training.'
)

# Model.
flags.DEFINE_string(
  'model',
  'mlp',
  'The model: one of these, or any MODULE.FUNCTION that returns a Model:\n'
  f'{calls.describe_all(_ALL_MODELS, reserved=GIVEN_MODEL)}',
)


def define_optimizer_flags(side: str, learning_rate: float | None) -> None:
  """Defines --SIDE_optimizer and its settings, for `optimizer_from_flags`.

  Args:
    side: 'client', 'server', or another that an experiment has.
    learning_rate: the default, a scalar; None is the clients'.
  """
  flags.DEFINE_enum(
    f'{side}_optimizer', 'sgd', OPTIMIZERS, f'The {side} optimizer.'
  )
  flags.DEFINE_float(
    f'{side}_learning_rate',
    learning_rate,
    f'Learning rate of the {side} optimizer.'
    + (' Default: that of the clients.' if learning_rate is None else ''),
  )
  flags.DEFINE_float(
    f'{side}_momentum', 0.0, f'Momentum of the {side} (sgd and rmsprop).'
  )
  flags.DEFINE_float(f'{side}_b1', 0.9, f'{side}: adam, adamw, yogi.')
  flags.DEFINE_float(f'{side}_b2', 0.99, f'{side}: adam, adamw, yogi.')
  flags.DEFINE_float(
    f'{side}_epsilon', 1e-3, f'{side}: the adaptive optimizers.'
  )


# Clients and server.
define_optimizer_flags('client', 0.1)
define_optimizer_flags('server', 1.0)
flags.DEFINE_float(
  'client_weight_decay', 0.0, 'Decay in the gradient (L2); adamw: decoupled.'
)
flags.DEFINE_integer('client_epochs', 1, 'Local epochs.')
flags.DEFINE_integer(
  'client_steps', 0, 'Local steps instead of epochs, if > 0.'
)
flags.DEFINE_integer('client_batch_size', 20, 'Examples in a local batch, B.')
flags.DEFINE_enum(
  'client_remainder',
  'mask',
  ['mask', 'drop', 'fill'],
  'Last short batch of an epoch: kept, left out, or filled (as FedJAX does).',
)
flags.DEFINE_integer(
  'client_max_examples', 0, 'Use the first so many of a client, if > 0.'
)
flags.DEFINE_enum(
  'client_weighting',
  'examples',
  ['examples', 'uniform'],
  'Weights of clients in the mean.',
)

# Flags that name functions, and the functions known by name.
NAMED = {
  'data_source': data.SOURCES,
  'data_partition': data.PARTITIONERS,
  'data_skew': data.SKEWS,
  'eval': {**data.THREE_WAY, 'parts': data.make_dataset},
}

# Flags that say where things are or how it runs, not what it computes.
UNBOUND = (
  'workdir',
  'data_dir',
  'data_memory_gb',
  'prefetch',
  'debug',
  *device_flags.UNBOUND,
)


def flag_values(
  module: str, named: Mapping[str, Mapping[str, Callable]] | None = None
) -> dict[str, Any]:
  """The flags that define a run, {name: value}.

  Without those that change no result (UNBOUND).

  Args:
    module: `__name__` of the binary, which has adopted this module's flags.
    named: {flag: functions known by name}, besides `NAMED`.
  """
  values = {
    flag.name: flag.value
    for flag in FLAGS.get_key_flags_for_module(module)
    if flag.name not in UNBOUND
  }
  for name, registry in (NAMED | dict(named or {})).items():
    digests = [
      calls.source_digest(name, text, registry)
      for text in filter(None, values[name].split('+'))
      if text != 'client'
    ]
    if any(digests):
      values[f'{name} source'] = digests
  return values


def workdir_from_flags() -> pathlib.Path:
  """--workdir, which must be given."""
  validate.check(FLAGS.workdir, 'Expected --workdir=DIR, got none.')
  path = pathlib.Path(FLAGS.workdir)
  validate.check(
    path.is_dir() or not path.exists(),
    f'Expected a folder at --workdir={path}, got a file.',
  )
  return path


def role_seed(role: str) -> int:
  """The seed (a scalar) of a role: --ROLE_seed, or else --seed."""
  name = 'seed' if FLAGS[f'{role}_seed'].value is None else f'{role}_seed'
  validate.between(name, FLAGS[name].value, 0, 2**31 - 1)
  return FLAGS[name].value


def seeds_from_flags() -> Seeds:
  """One seed (a scalar) for each role but the data's."""
  return Seeds(role_seed('init'), role_seed('sampling'), role_seed('training'))


def schedule_from_flags() -> Schedule:
  """The schedule; scalars."""
  return Schedule(
    num_rounds=FLAGS.num_rounds,
    eval_every=FLAGS.eval_every,
    # The gaps of a three-way report need the train part.
    eval_train=FLAGS.eval_train or FLAGS.eval != 'parts',
    checkpoint_every=FLAGS.checkpoint_every,
    keep_checkpoints=FLAGS.keep_checkpoints,
    prefetch=FLAGS.prefetch,
    eval_batch_size=FLAGS.eval_batch_size,
    data_memory_gb=FLAGS.data_memory_gb,
  )


def layout_from_flags() -> Layout:
  """Devices, lanes and waves; starts jax."""
  return device_flags.layout_from_flags(FLAGS.cohort_size)


def columns_from_flags(flag: str = 'data_source') -> data.Columns:
  """Reads the source; columns [M, ...].

  Args:
    flag: which flag names it.

  Raises:
    InvalidInput: a file is missing or breaks the schema.
  """
  text = FLAGS[flag].value
  load = calls.resolve(flag, text, data.SOURCES)
  settings = calls.arguments(flag, text, load, reserved=GIVEN)
  if calls.takes(load, 'data_dir'):
    must = 'data_dir' in calls.missing(load, {})
    validate.check(
      FLAGS.data_dir or not must,
      f'Expected --data_dir=DIR for {flag}={text}.',
    )
    validate.check(
      not must or pathlib.Path(FLAGS.data_dir).is_dir(),
      f'Expected a folder at --data_dir={FLAGS.data_dir}, found none.',
    )
    settings['data_dir'] = FLAGS.data_dir
  if calls.takes(load, 'seed'):
    settings['seed'] = role_seed('data')
  calls.check_complete(flag, text, load, settings, GIVEN)
  columns = load(**settings)
  calls.check_type(flag, text, columns, data.Columns)
  return columns


def dataset_from_flags(columns: data.Columns) -> data.FederatedDataset:
  """Clients, splits and parts of columns [M, ...]."""
  partition, num_clients = _partition_from_flags(columns)
  skew = None
  if FLAGS.data_skew:
    function = calls.resolve('data_skew', FLAGS.data_skew, data.SKEWS)
    calls.check_takes('data_skew', FLAGS.data_skew, function, *GIVEN_SKEW)
    settings = calls.arguments(
      'data_skew', FLAGS.data_skew, function, reserved=GIVEN_SKEW
    )
    skew = functools.partial(function, **settings)
    pooled = FLAGS.data_test_owner == 'pooled' and FLAGS.eval == 'parts'
    if partition is not None and pooled:
      _LOG.warning(
        'The pooled test set is not skewed; --data_test_owner=clients gives '
        'clients test rows of their own.'
      )
  dataset = _split_from_flags()(
    columns,
    partition=partition,
    num_clients=num_clients,
    skew=skew,
    eval_clients=FLAGS.eval_clients,
    seed=role_seed('data'),
  )
  calls.check_type('eval', FLAGS.eval, dataset, data.FederatedDataset)
  _LOG.info(
    '%s: %d %s clients take part; train examples: %d.',
    columns.name,
    len(dataset.participating),
    'natural' if partition is None else 'made',
    dataset.splits['train'].sizes(dataset.participating).sum(),
  )
  return dataset


def _split_from_flags() -> Callable[..., data.FederatedDataset]:
  """What makes a dataset of columns [M, ...], by --eval."""
  text = FLAGS.eval
  others = {
    f'data_{name}': FLAGS[f'data_{name}'].value
    for name in (
      'test_fraction',
      'test_owner',
      'validation_fraction',
      'unparticipating_fraction',
      'group_column',
    )
  }
  if text == 'parts':
    settings = {n.removeprefix('data_'): v for n, v in others.items()}
    return functools.partial(data.make_dataset, **settings)
  said = [n for n, v in others.items() if v != FLAGS[n].default]
  validate.check(
    not said,
    f'Expected no {", ".join(said)} with --eval={text}, which has settings of '
    'its own.',
  )
  function = calls.resolve('eval', text, data.THREE_WAY)
  calls.check_takes('eval', text, function, *GIVEN_EVAL)
  settings = calls.arguments('eval', text, function, reserved=GIVEN_EVAL)
  calls.check_complete('eval', text, function, settings, GIVEN_EVAL)
  return functools.partial(function, **settings)


def _partition_from_flags(
  columns: data.Columns,
) -> tuple[data.Partitioner | None, int]:
  """(partitioner, C) of --data_partition; (None, 1) for natural clients."""
  text = FLAGS.data_partition
  if not text:
    text = DEFAULT_PARTITION if columns.client is None else 'client'
  if text.partition(':')[0] == 'client':
    validate.check(
      text == 'client',
      f'Expected data_partition=client without settings, got {text}.',
    )
    return None, 1
  known = {**data.PARTITIONERS, 'client': lambda: None}
  function = calls.resolve('data_partition', text, known)
  calls.check_takes('data_partition', text, function, 'num_clients', 'seed')
  settings = calls.arguments(
    'data_partition', text, function, reserved=GIVEN_PARTITION
  )
  calls.check_complete(
    'data_partition', text, function, settings, GIVEN_PARTITION
  )
  num_clients = settings.pop('num_clients', 100)
  validate.check(
    isinstance(num_clients, int),
    f'Expected num_clients of data_partition={text} to be annotated as int.',
  )
  return functools.partial(function, **settings), num_clients


def sampler_from_flags(dataset: data.FederatedDataset) -> Sampler:
  """The cohort sampler over participating clients [C']."""
  clients = dataset.participating
  check_cohort_size(FLAGS.cohort_size, len(clients))
  if FLAGS.sampler == 'poisson':
    return poisson_sampler(
      clients, probability=FLAGS.cohort_size / len(clients)
    )
  if FLAGS.sampler == 'weighted':
    return weighted_sampler(
      clients,
      weights=dataset.splits['train'].sizes(clients).astype(np.float64),
      cohort_size=FLAGS.cohort_size,
    )
  return uniform_sampler(clients, cohort_size=FLAGS.cohort_size)


def phase_from_flags(
  *, epochs: int | None = None, steps: int | None = None
) -> Phase:
  """The clients' local work; scalars.

  Args:
    epochs: instead of --client_epochs.
    steps: instead of --client_steps.
  """
  validate.at_least('client_batch_size', FLAGS.client_batch_size, 1)
  for name in ('client_epochs', 'client_steps', 'client_max_examples'):
    validate.at_least(name, FLAGS[name].value, 0)
  steps = FLAGS.client_steps if steps is None else steps
  return Phase(
    epochs=FLAGS.client_epochs if epochs is None else epochs,
    steps=steps or None,
    batch_size=FLAGS.client_batch_size,
    remainder=FLAGS.client_remainder,
    max_examples=FLAGS.client_max_examples or None,
  )


def optimizer_from_flags(
  side: str, *, learning_rate: float | None = None
) -> optax.GradientTransformation:
  """The optimizer of 'client', 'server' or another side.

  Args:
    side: which flags to read, see `define_optimizer_flags`.
    learning_rate: instead of the flag's.
  """
  get = lambda name: FLAGS[f'{side}_{name}'].value
  rate = get('learning_rate') if learning_rate is None else learning_rate
  rate = FLAGS.client_learning_rate if rate is None else rate
  validate.check(
    0 <= rate < np.inf,
    f'Expected 0 <= {side}_learning_rate < infinity, got '
    f'{side}_learning_rate={rate}.',
  )
  validate.between(f'{side}_momentum', get('momentum'), 0, 1)
  betas = dict(b1=get('b1'), b2=get('b2'), eps=get('epsilon'))
  for name in ('b1', 'b2'):
    validate.check(
      0 <= get(name) < 1,
      f'Expected 0 <= {side}_{name} < 1, got {side}_{name}={get(name)}.',
    )
  validate.at_least(f'{side}_epsilon', get('epsilon'), 0)
  momentum = get('momentum') or None
  decay = FLAGS.client_weight_decay if side == 'client' else 0.0
  validate.at_least('client_weight_decay', decay, 0)
  optimizer = {
    'sgd': lambda: optax.sgd(rate, momentum=momentum),
    'adam': lambda: optax.adam(rate, **betas),
    'adamw': lambda: optax.adamw(rate, weight_decay=decay, **betas),
    'yogi': lambda: optax.yogi(rate, **betas),
    'adagrad': lambda: optax.adagrad(
      rate, initial_accumulator_value=0.0, eps=get('epsilon')
    ),
    'rmsprop': lambda: optax.rmsprop(
      rate,
      decay=get('b2'),
      eps=get('epsilon'),
      eps_in_sqrt=False,
      momentum=momentum,
    ),
  }[get('optimizer')]()
  if decay and get('optimizer') != 'adamw':
    optimizer = optax.chain(optax.add_decayed_weights(decay), optimizer)
  return optimizer


def build_model(
  registry: Mapping[str, Callable],
  kind: type,
  *,
  input_shape: tuple[int, ...],
  num_classes: int,
) -> Any:
  """What --model names, by the registry or as MODULE.FUNCTION.

  Args:
    registry: functions by name.
    kind: the type that the function has to return.
    input_shape: shape of one example.
    num_classes: Y, or the size V of the vocabulary.
  """
  text = FLAGS.model
  function = calls.resolve('model', text, registry)
  calls.check_takes('model', text, function, *GIVEN_MODEL)
  settings = calls.arguments('model', text, function, reserved=GIVEN_MODEL)
  settings |= {'input_shape': input_shape, 'num_classes': num_classes}
  calls.check_complete('model', text, function, settings, GIVEN_MODEL)
  model = function(**settings)
  calls.check_type('model', text, model, kind)
  return model
