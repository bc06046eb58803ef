"""Federated averaging followed by local fine-tuning of every client.

Yu et al., "Salvaging federated learning by local adaptation", 2020,
https://arxiv.org/abs/2002.04758.
"""

import optax

from fedjax_ext.algorithms.local_sgd import local_sgd
from fedjax_ext.core import Adaptation, FederatedAlgorithm, Phase, Predictor
from fedjax_ext.losses import Task


def fine_tuned(
  predictor: Predictor,
  task: Task,
  *,
  optimizer: optax.GradientTransformation,
  phase: Phase,
) -> Predictor:
  """A predictor whose shared model each client first trains on its examples."""
  program = local_sgd(task.loss, optimizer)
  return predictor._replace(
    adapt=Adaptation(program, (phase,), lambda state: state.params)
  )


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
  tuned = fine_tuned(
    algorithm.predictors['global'], task, optimizer=optimizer, phase=phase
  )
  return algorithm._replace(
    predictors={'fine_tuned': tuned, **algorithm.predictors}
  )
