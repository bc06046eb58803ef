"""FedROD: a generic and a personal predictor from one training run.

Chen and Chao, "On bridging generic and personalized federated learning for
image classification", 2022, https://arxiv.org/abs/2107.00778.

Axis letters: C clients, Y classes.
"""

from typing import Any

import jax
import numpy as np
import optax

from fedjax_ext.algorithms.fed_avg import fed_avg
from fedjax_ext.algorithms.personal_heads import (
  head_predictors,
  heads_of,
  partly_personal,
)
from fedjax_ext.core import FederatedAlgorithm, Layout, Phase
from fedjax_ext.losses.headed import HeadedTask, balanced_softmax, with_head
from fedjax_ext.losses.task import with_stats
from fedjax_ext.models.heads import apply_head

PyTree = Any


def fed_rod(
  task: HeadedTask,
  *,
  counts: np.ndarray,
  client_optimizer: optax.GradientTransformation,
  layout: Layout,
  phase: Phase = Phase(),
  debug: bool = False,
) -> FederatedAlgorithm:
  """Builds FedROD.

  With n_c the client's class counts, f = h(x) and sg = stop-gradient,

    theta, psi <- SGD(CE(psi f + log n_c, y))           (balanced softmax)
    phi_c <- SGD(CE(sg(psi f) + phi_c sg(f), y))

  theta and psi are averaged by examples, phi_c stays; the client predicts by
  psi f + phi_c f. (FedLoGe's official code trains psi by plain cross-entropy.)

  Args:
    task: the backbone's task.
    counts: train examples of every client and class [C, Y].
    client_optimizer: any optax transformation; its state starts anew each
      round.
    layout: devices, lanes, waves.
    phase: the local work.
    debug: run client by client in plain Python.
  """
  counts = np.asarray(counts)

  def loss(model: PyTree, batch, mine: jax.Array) -> Any:
    body, shared, own = heads_of(model)
    features, stats = task.features(body, batch)
    generic = apply_head(shared['head'], features)
    seen, common = jax.lax.stop_gradient((features, generic))
    value = task.cross_entropy(
      balanced_softmax(generic, mine), batch
    ) + task.cross_entropy(common + apply_head(own, seen), batch)
    return with_stats(value, stats)

  generic = lambda shared, f: apply_head(shared['head'], f)
  return fed_avg(
    with_head(task),
    client_optimizer=client_optimizer,
    server_optimizer=optax.sgd(1.0),
    layout=layout,
    phase=phase,
    program=partly_personal(loss, client_optimizer),
    init_client=lambda key, number: task.head(key),
    inputs=lambda cohort: counts[cohort.clients],
    predictors=head_predictors(
      task,
      counts=counts,
      global_logits={'generic': generic},
      personal_logits={
        'personal': lambda shared, own, f: (
          generic(shared, f) + apply_head(own, f)
        )
      },
    ),
    debug=debug,
  )
