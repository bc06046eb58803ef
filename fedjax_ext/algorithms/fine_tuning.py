"""Federated averaging followed by local fine-tuning of every client.

Yu et al., "Salvaging federated learning by local adaptation", 2020,
https://arxiv.org/abs/2002.04758.
"""

from typing import Any

import optax

from fedjax_ext.algorithms.local_sgd import local_sgd
from fedjax_ext.core import Adaptation, FederatedAlgorithm, Phase, Predictor
from fedjax_ext.losses import Task


def with_fine_tuning(
  algorithm: FederatedAlgorithm,
  task: Task,
  *,
  optimizer: optax.GradientTransformation,
  phase: Phase = Phase(),
) -> FederatedAlgorithm:
  """Adds the predictor 'fine_tuned' to an algorithm with a 'global' one.

  Training is unchanged. Evaluation lets each client train the global model on
  its own examples first; nothing is stored, so it costs memory for one model a
  lane, not for one a client.

  Args:
    algorithm: what trains the global model (scalar or pytree state alike).
    task: loss and metrics.
    optimizer: of the fine-tuning.
    phase: the fine-tuning's local work.
  """
  predictor: Predictor = algorithm.predictors['global']
  program = local_sgd(task.loss, optimizer)

  def params(state: Any) -> Any:
    return state.params

  fine_tuned = predictor._replace(adapt=Adaptation(program, (phase,), params))
  return algorithm._replace(
    predictors={'fine_tuned': fine_tuned, **algorithm.predictors}
  )
