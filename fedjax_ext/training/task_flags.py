"""Flags of experiments that classify or predict tokens, and their task.

Groups: what happens to a batch of images, how models compute.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from fedjax_ext import data
from fedjax_ext.core import InvalidInput, validate
from fedjax_ext.losses import Task, classification_task, next_token_task
from fedjax_ext.losses.headed import HeadedTask, headed_task
from fedjax_ext.losses.task import image_inputs
from fedjax_ext.models import (
  MODELS,
  Model,
  rematerialised,
  with_compute_dtype,
)
from fedjax_ext.models.heads import make_backbone
from fedjax_ext.training import calls
from fedjax_ext.training import flags as shared

FLAGS = flags.FLAGS
# Flags that name functions, for `flags.flag_values`.
NAMED = {'model': MODELS, 'data_preprocess': data.PREPROCESS}

flags.DEFINE_string(
  'data_preprocess',
  '',
  'What happens to a batch of images inside the client step; these or '
  'MODULE.FUNCTION, several joined by "+":\n'
  f'{calls.describe_all(data.PREPROCESS)}',
)
flags.DEFINE_enum(
  'compute_dtype',
  'float32',
  ['float32', 'bfloat16'],
  'What models compute in; params and aggregation stay float32.',
)
flags.DEFINE_bool(
  'rematerialise',
  False,
  'Recompute activations in the backward pass: less memory, more time.',
)
flags.DEFINE_float(
  'expected_length',
  0.0,
  "Text: divide each example's loss by this constant (as FedJAX does: T for "
  "Shakespeare, 13.3 for Stack Overflow); 0: a batch's by its tokens.",
)


def preprocess_from_flags() -> data.Preprocess | None:
  """--data_preprocess as one function of images [B, ...], or None."""
  steps = []
  for text in filter(None, FLAGS.data_preprocess.split('+')):
    function = calls.resolve('data_preprocess', text, data.PREPROCESS)
    steps.append(function(**calls.arguments('data_preprocess', text, function)))
  return data.chain(*steps) if steps else None


def model_from_flags(example: jax.ShapeDtypeStruct, num_classes: int) -> Model:
  """The model for a batch like the example, checked before compilation.

  Args:
    example: a batch's shape [B, ...] and dtype, as the model sees it.
    num_classes: Y, or the size V of the vocabulary.
  """
  text = FLAGS.model
  model = shared.build_model(
    MODELS, Model, input_shape=example.shape[1:], num_classes=num_classes
  )
  tokens = jnp.issubdtype(example.dtype, jnp.integer)
  expected = (*(example.shape if tokens else example.shape[:1]), num_classes)
  try:
    variables = jax.eval_shape(model.init, jax.random.key(0))
    got = jax.eval_shape(model.apply, variables, example).shape
  except InvalidInput:
    raise
  except Exception as error:
    got = (str(error).splitlines() or [type(error).__name__])[0][:200]
  validate.check(
    got == expected,
    f'Expected model={text} to map {"tokens" if tokens else "inputs"} '
    f'{list(example.shape)} to logits {list(expected)}, got '
    f'{list(got) if isinstance(got, tuple) else got}',
  )
  return _computed(model)


def _computed(model: Model) -> Model:
  """The model as --compute_dtype and --rematerialise say."""
  if FLAGS.compute_dtype != 'float32':
    model = with_compute_dtype(model, FLAGS.compute_dtype)
  return rematerialised(model) if FLAGS.rematerialise else model


class ImageTask(NamedTuple):
  """A task with the model and inputs that it is made of.

  Attributes:
    task: classification.
    model: of images or vectors.
    inputs: (batch, *, train) -> what the model sees, [B, ...].
  """

  task: Task
  model: Model
  inputs: Callable[..., jax.Array]


def image_task_from_flags(dataset: data.FederatedDataset) -> ImageTask:
  """What --model learns of the column `image`, or `x`, on a dataset."""
  feature, preprocess, example = _inputs(dataset)
  model = model_from_flags(example, dataset.num_classes)
  task = classification_task(model, feature=feature, preprocess=preprocess)
  return ImageTask(task, model, image_inputs(feature, preprocess))


def count_taps(model: Model, dataset: data.FederatedDataset) -> int:
  """How many tapped layers a model of a dataset's images has."""
  if model.tapped is None:
    return 0
  _, _, example = _inputs(dataset)
  variables = jax.eval_shape(model.init, jax.random.key(0))
  _, taps = jax.eval_shape(
    lambda v, x: model.tapped(v, x, None), variables, example
  )
  return len(taps)


def check_taps(
  model: Model, dataset: data.FederatedDataset, layers: tuple[int, ...] = ()
) -> None:
  """Checks that a model of images has the tapped layers that are asked for.

  Args:
    model: of the dataset's images.
    dataset: columns [M, ...].
    layers: numbers from 0; () asks for one at least.
  """
  taps = count_taps(model, dataset)
  validate.check(
    taps > 0,
    'Expected a convolutional model with tapped layers, such as lenet, '
    'group_norm_cnn or resnet8 in float32, got '
    f'model={FLAGS.model}, compute_dtype={FLAGS.compute_dtype}.',
  )
  for layer in layers:
    validate.between('layers', layer, 0, taps - 1)


def task_from_flags(dataset: data.FederatedDataset) -> Task:
  """What --model learns on a dataset (columns [M, ...]).

  Next tokens where there is a column `tokens` [M, T+1]; else the column `label`
  from `image`, or from `x`.
  """
  features = dataset.features
  if 'tokens' in features:
    validate.check(
      not FLAGS.data_preprocess,
      f'Expected no data_preprocess for tokens, got {FLAGS.data_preprocess}.',
    )
    shape = (2, features['tokens'].shape[1] - 1)
    return next_token_task(
      model_from_flags(
        jax.ShapeDtypeStruct(shape, jnp.int32), dataset.num_classes
      ),
      vocab_size=dataset.num_classes,
      expected_length=FLAGS.expected_length,
    )
  return image_task_from_flags(dataset).task


def headed_task_from_flags(
  dataset: data.FederatedDataset, test_counts: np.ndarray | None = None
) -> HeadedTask:
  """The backbone of --model on a dataset with images or vectors and labels.

  Args:
    dataset: columns [M, ...].
    test_counts: test examples of each class [Y], for balanced accuracy.
  """
  feature, preprocess, example = _inputs(dataset)
  builder, settings = shared.model_builder(MODELS)
  backbone = make_backbone(builder, input_shape=example.shape[1:], **settings)
  backbone = backbone._replace(model=_computed(backbone.model))
  return headed_task(
    backbone,
    num_classes=dataset.num_classes,
    feature=feature,
    preprocess=preprocess,
    test_counts=test_counts,
  )


def _inputs(
  dataset: data.FederatedDataset,
) -> tuple[str, data.Preprocess | None, jax.ShapeDtypeStruct]:
  """The input feature, its preprocessing, and what a model sees of 2 of it."""
  features = dataset.features
  validate.check(
    not FLAGS.expected_length,
    'Expected expected_length=0 for data without tokens, got '
    f'{FLAGS.expected_length}.',
  )
  feature = 'image' if 'image' in features else 'x'
  validate.check(
    feature in features and 'label' in features,
    'Expected features "image" or "x" and "label", or "tokens", got '
    f'{sorted(features)}.',
  )
  column = features[feature]
  _check_numbers(feature, column)
  example = jax.ShapeDtypeStruct((2, *column.shape[1:]), column.dtype)
  preprocess = preprocess_from_flags()
  if preprocess is not None:
    validate.check(
      feature == 'image' and column.ndim in (3, 4),
      f'Expected a feature "image" [M, H, W] or [M, H, W, D] for '
      f'data_preprocess={FLAGS.data_preprocess}, got {feature!r} of shape '
      f'{["M", *column.shape[1:]]}.',
    )
    example = jax.eval_shape(lambda x: preprocess(None, x), example)
  dtype = jnp.result_type(float)
  return feature, preprocess, jax.ShapeDtypeStruct(example.shape, dtype)


def _check_numbers(feature: str, column: Any) -> None:
  """Checks that a column has floats, or integers that are pixels."""
  validate.check(
    column.dtype.kind in 'fiub',
    f'Expected numbers in feature {feature!r}, got {column.dtype}.',
  )
  if column.dtype.kind == 'b' or column.dtype.itemsize == 1:
    return
  if column.dtype.kind in 'iu' and type(column) is np.ndarray and column.size:
    low, high = column.min(), column.max()
    validate.check(
      low >= 0 and high <= 255,
      f'Expected integers of feature {feature!r} to be pixels in 0..255 '
      f'(store other numbers as floats), got {low}..{high}.',
    )
