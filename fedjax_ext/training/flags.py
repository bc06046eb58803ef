"""Flags that every experiment shares, and what is built from them.

Groups: `client_*` local work, `server_*` the server's optimizer, and flags of
the run itself; those of the data, of seeds and of the machine are in
data_flags, seed_flags and device_flags. Importing this module defines all.
"""

import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax
from absl import flags

from fedjax_ext import data
from fedjax_ext.algorithms.local_sgd import decay_by_round
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
from fedjax_ext.training import calls, data_flags, device_flags, seed_flags
from fedjax_ext.training.loop import Schedule

FLAGS = flags.FLAGS
_LOG = logging.getLogger(__name__)
# Arguments that the data give to a model.
GIVEN_MODEL = ('input_shape', 'num_classes')
_ALL_MODELS = {**MODELS, 'dual_encoder': dual_encoder}
OPTIMIZERS = ('sgd', 'adam', 'adamw', 'yogi', 'adagrad', 'rmsprop')

flags.adopt_module_key_flags(device_flags)
flags.adopt_module_key_flags(seed_flags)
flags.adopt_module_key_flags(data_flags)

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
flags.DEFINE_integer('eval_every', 10, 'Rounds between evaluations.')
flags.DEFINE_bool(
  'eval_train', False, 'Evaluate part train each time, not only at the end.'
)
flags.DEFINE_integer('eval_batch_size', 128, 'Examples in an evaluation batch.')
flags.DEFINE_integer('checkpoint_every', 10, 'Rounds between checkpoints.')
flags.DEFINE_integer('keep_checkpoints', 2, 'Checkpoints to keep, >= 2.')
flags.DEFINE_bool('prefetch', True, 'Plan the next round in a thread.')
flags.DEFINE_bool('debug', False, 'Run client by client in plain Python.')

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
flags.DEFINE_float(
  'client_learning_rate_decay',
  1.0,
  "What the clients' rate is multiplied by every --client_decay_every rounds.",
)
flags.DEFINE_integer('client_decay_every', 1, 'Rounds between such decays.')
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
    named: {flag: functions known by name}, besides those of the data.
  """
  values = {
    flag.name: flag.value
    for flag in FLAGS.get_key_flags_for_module(module)
    if flag.name not in UNBOUND
  }
  for name, registry in (data_flags.NAMED | dict(named or {})).items():
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


def schedule_from_flags() -> Schedule:
  """The schedule; scalars."""
  return Schedule(
    num_rounds=FLAGS.num_rounds,
    eval_every=FLAGS.eval_every,
    # The gaps of a three-way report need the train part.
    eval_train=FLAGS.eval_train or FLAGS.eval.partition(':')[0] == 'three_way',
    checkpoint_every=FLAGS.checkpoint_every,
    keep_checkpoints=FLAGS.keep_checkpoints,
    prefetch=FLAGS.prefetch,
    eval_batch_size=FLAGS.eval_batch_size,
    data_memory_gb=FLAGS.data_memory_gb,
  )


def layout_from_flags() -> Layout:
  """Devices, lanes and waves; starts jax."""
  return device_flags.layout_from_flags(FLAGS.cohort_size)


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
  factor = FLAGS.client_learning_rate_decay
  validate.above('client_learning_rate_decay', factor, 0)
  validate.between('client_learning_rate_decay', factor, 0, 1)
  validate.at_least('client_decay_every', FLAGS.client_decay_every, 1)
  if side == 'client' and factor < 1:
    optimizer = optax.chain(
      optimizer,
      decay_by_round(factor=factor, every=FLAGS.client_decay_every),
    )
  return optimizer


def model_builder(
  registry: Mapping[str, Callable],
) -> tuple[Callable, dict[str, Any]]:
  """(builder, its settings) of what --model names, both checked.

  Args:
    registry: functions by name, besides MODULE.FUNCTION.
  """
  text = FLAGS.model
  function = calls.resolve('model', text, registry)
  calls.check_takes('model', text, function, *GIVEN_MODEL)
  settings = calls.arguments('model', text, function, reserved=GIVEN_MODEL)
  given = settings | dict.fromkeys(GIVEN_MODEL)
  calls.check_complete('model', text, function, given, GIVEN_MODEL)
  return function, settings


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
  function, settings = model_builder(registry)
  model = function(input_shape=input_shape, num_classes=num_classes, **settings)
  calls.check_type('model', FLAGS.model, model, kind)
  return model
