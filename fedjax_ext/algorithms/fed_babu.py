"""FedBABU: only the body is trained federatedly; heads are fine-tuned after.

Oh, Kim and Yun, "FedBABU: toward enhanced representation for federated image
classification", 2022, https://arxiv.org/abs/2106.06042.

Axis letters: C clients, Y classes.
"""

from typing import Any

import jax
import numpy as np
import optax

from fedjax_ext.algorithms.fed_avg import fed_avg
from fedjax_ext.algorithms.local_sgd import local_sgd
from fedjax_ext.algorithms.personal_heads import fine_tuned_predictors
from fedjax_ext.core import FederatedAlgorithm, Layout, Phase
from fedjax_ext.losses.headed import HeadedTask, join, with_head
from fedjax_ext.models import params_of

PyTree = Any


def fed_babu(
  task: HeadedTask,
  *,
  counts: np.ndarray,
  client_optimizer: optax.GradientTransformation,
  layout: Layout,
  phase: Phase = Phase(),
  fine_tuning: Phase | None = None,
  debug: bool = False,
) -> FederatedAlgorithm:
  """Builds FedBABU: FedAvg with a head that stays as it was drawn.

  Personal models are the global one, fine-tuned as a whole on the client's own
  examples before it is scored; nothing is stored.

  Args:
    task: the backbone's task.
    counts: train examples of every client and class [C, Y], for masks.
    client_optimizer: any optax transformation; also of the fine-tuning.
    layout: devices, lanes, waves.
    phase: the local work.
    fine_tuning: the local work before scoring; default: `phase`.
    debug: run client by client in plain Python.
  """
  plain = with_head(task)

  def frozen_head(model: PyTree, batch) -> Any:
    params = params_of(model)
    head = jax.lax.stop_gradient(params['head'])
    return plain.loss(join(model, params | {'head': head}), batch)

  return fed_avg(
    plain,
    client_optimizer=client_optimizer,
    server_optimizer=optax.sgd(1.0),
    layout=layout,
    phase=phase,
    program=local_sgd(frozen_head, client_optimizer),
    predictors=fine_tuned_predictors(
      task,
      counts=counts,
      optimizer=client_optimizer,
      phase=fine_tuning or phase,
    ),
    debug=debug,
  )
