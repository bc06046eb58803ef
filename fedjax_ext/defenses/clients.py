"""Defences at the clients: what each does to the global model before using it.

They are predictors, as `algorithms.fine_tuning.fine_tuned` is: evaluation runs
them, training knows nothing of them.

Axis letters: B examples, L tapped layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_ext.algorithms.local_sgd import local_sgd
from fedjax_ext.core import (
  Adaptation,
  Batch,
  Client,
  Phase,
  Predictor,
  validate,
)
from fedjax_ext.losses import Task
from fedjax_ext.losses.distillation import attention
from fedjax_ext.losses.task import masked_mean
from fedjax_ext.models import Model, params_of, with_params

PyTree = Any


def simple_tuning(
  task: Task,
  *,
  optimizer: optax.GradientTransformation,
  phase: Phase,
  layer: str,
) -> Predictor:
  """Draws the classifier anew and trains it alone; the encoder stays.

  Qin, Yao, Chen, Li, Ding and Cheng, "Revisiting personalized federated
  learning: robustness against backdoor attacks", 2023,
  https://arxiv.org/abs/2302.01677.

  Args:
    task: of the model, whose params are a dictionary.
    optimizer: of the tuning.
    phase: its local work.
    layer: name of the classifier among the params, such as 'Dense_1'.

  Raises:
    InvalidInput: there is no such layer.
  """
  template = params_of(jax.eval_shape(task.init, jax.random.key(0)))
  validate.one_of('classifier', layer, sorted(template))

  def begin(shared: PyTree, client: Client, key: jax.Array):
    del client
    fresh = params_of(task.init(key))[layer]
    params = {**params_of(shared), layer: fresh}
    return with_params(shared, params), ()

  only = optax.chain(
    optimizer,
    optax.masked(
      optax.set_to_zero(),
      lambda params: {
        name: jax.tree.map(lambda _, frozen=name != layer: frozen, leaves)
        for name, leaves in params.items()
      },
    ),
  )
  program = local_sgd(task.loss, only, begin=begin)
  return Predictor(
    task.metrics,
    shared=lambda state: state.params,
    adapt=Adaptation(program, (phase,), lambda state: state.params),
  )


def attention_distillation(
  task: Task,
  model: Model,
  *,
  inputs: Callable[..., jax.Array],
  optimizer: optax.GradientTransformation,
  phase: Phase,
  weights: tuple[float, ...] = (500.0, 1000.0, 1000.0),
  power: int = 2,
) -> Predictor:
  """NAD: the global model learns attention from a fine-tuned copy of itself.

    CE + sum_l kappa_l mean (AT_l - AT_l of the teacher)^2

  Li, Lyu, Koren, Lyu, Li and Ma, "Neural attention distillation: erasing
  backdoor triggers from deep neural networks", 2021,
  https://arxiv.org/abs/2101.05930. First the teacher is trained on the client's
  examples, then the student, each for the given phase.

  Args:
    task: of the model.
    model: with taps, without moving statistics.
    inputs: (batch, *, train) -> what the model sees.
    optimizer: of both.
    phase: the local work of each.
    weights: kappa of the tapped layers, shallow to deep; the last one serves
      all further layers.
    power: of `losses.distillation.attention`.
  """

  def loss(both: PyTree, batch: Batch) -> jax.Array:
    params = params_of(both)
    x = inputs(batch, train=False)
    distance = 0.0
    _, student = model.tapped(params['student'], x, None)
    _, teacher = model.tapped(params['teacher'], x, None)
    for i, (mine, theirs) in enumerate(zip(student, teacher, strict=True)):
      gap = attention(mine, power=power) - jax.lax.stop_gradient(
        attention(theirs, power=power)
      )
      kappa = weights[min(i, len(weights) - 1)]
      distance += kappa * masked_mean(jnp.square(gap).mean((1, 2)), batch.mask)
    # One of the two trains at a time; the other's gradient is 0.
    return jnp.where(
      batch.info.phase == 0,
      task.loss(params['teacher'], batch),
      task.loss(params['student'], batch) + distance,
    )

  program = local_sgd(
    loss,
    optimizer,
    begin=lambda shared, client, key: (
      {'teacher': shared, 'student': shared},
      (),
    ),
  )
  return Predictor(
    task.metrics,
    shared=lambda state: state.params,
    adapt=Adaptation(
      program, (phase, phase), lambda state: state.params['student']
    ),
  )
