"""Flags of the data: the source, its clients, what is reported.

Importing this module defines them.
"""

import functools
import logging
import pathlib
from collections.abc import Callable

from absl import flags

from fedjax_ext import data
from fedjax_ext.core import validate
from fedjax_ext.training import (  # embeddings: semantic:embedding=vae
  calls,
  embeddings,  # noqa: F401
)
from fedjax_ext.training.seed_flags import role_seed

FLAGS = flags.FLAGS
_LOG = logging.getLogger(__name__)
# Arguments that other flags, or the data, give to a named function.
GIVEN = ('data_dir', 'seed')
GIVEN_SKEW = ('num_clients', 'seed')
GIVEN_PARTITION = ('seed', 'features', 'client')
GIVEN_EVAL = ('partition', 'num_clients', 'skew', 'eval_clients', 'seed')
DEFAULT_PARTITION = 'dirichlet:num_clients=100,alpha=0.5'
# Flags that name functions, and the functions known by name.
NAMED = {
  'data_source': data.SOURCES,
  'data_partition': data.PARTITIONERS,
  'data_skew': data.SKEWS,
  'eval': {**data.SPLITTERS, 'parts': data.make_dataset},
}


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
flags.DEFINE_string(
  'eval',
  'parts',
  'How clients and examples are split for reports: parts, as '
  '--data_*_fraction and the source say; one of these; or MODULE.FUNCTION:\n'
  f'{calls.describe_all(data.SPLITTERS, reserved=GIVEN_EVAL)}',
)
flags.DEFINE_integer(
  'eval_clients',
  0,
  'Evaluate at most so many clients of a part, always the same; 0: all.',
)


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
  validate.check(
    text.partition(':')[0] != 'parts',
    f'Expected eval=parts without settings, got {text}.',
  )
  known = {**data.SPLITTERS, 'parts': data.make_dataset}
  function = calls.resolve('eval', text, known)
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
