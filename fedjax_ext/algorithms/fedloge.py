"""FedLoGe: joint local and generic learning under long-tailed data.

One backbone learns against a fixed, sparse simplex classifier (SSE-C); an
auxiliary head is averaged, and each client keeps a head of its own; both see
the features without changing them. After training, heads are realigned by the
norms of their class vectors alone.

Xiao, Chen, Liu, Wang, Feng, Yue, Peng, Zheng and Liu, "FedLoGe: joint local and
generic federated learning under long-tailed data", 2024,
https://arxiv.org/abs/2401.08977.

Axis letters: B examples, C clients, D features, Y classes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_ext.algorithms.fed_avg import fed_avg
from fedjax_ext.algorithms.personal_heads import (
  PersonalLogits,
  head_predictors,
  heads_of,
  partly_personal,
)
from fedjax_ext.core import FederatedAlgorithm, Layout, Phase, validate
from fedjax_ext.losses import Task
from fedjax_ext.losses.headed import HeadedTask, join
from fedjax_ext.losses.task import with_stats
from fedjax_ext.models import params_of
from fedjax_ext.models.heads import Head, apply_head, class_norms

PyTree = Any


def realign_global(
  head: Head, *, scale: float = 1.7, exponent: float = 1.0
) -> Head:
  """GA-FR: class vectors psi_y -> scale * psi_y / |psi_y|^exponent.

  The bias [Y] stays, so the scale trades vectors against it. Exponent 1 gives
  all vectors one norm, 0 leaves them.
  """
  norms = jnp.maximum(class_norms(head), 1e-12)
  return head | {'kernel': scale * head['kernel'] / norms**exponent}


def realign_local(head: Head, own: Head) -> Head:
  """LA-FR: psi_y -> |phi_y| psi_y, norms of the client's head; bias stays."""
  return head | {'kernel': head['kernel'] * class_norms(own)}


def _sum(*heads: Callable[[Head, Head], Head]) -> PersonalLogits:
  """Logits of a sum of heads that are made of (psi, phi)."""

  def logits(shared: PyTree, own: Head, features: jax.Array) -> jax.Array:
    return sum(
      apply_head(head(shared['head'], own), features) for head in heads
    )

  return logits


_auxiliary = lambda psi, phi: psi
_local = lambda psi, phi: phi
# How a client predicts: the sum of the logits of these heads.
PERSONAL: Mapping[str, PersonalLogits] = {
  'local_plus_transfer': _sum(_local, realign_local),
  'transfer_plus_global': _sum(realign_local, _auxiliary),
  'transfer_only': _sum(realign_local),
  'local_plus_global': _sum(_local, _auxiliary),
  'local': _sum(_local),
}


def fed_loge(
  task: HeadedTask,
  *,
  classifier: np.ndarray,
  counts: np.ndarray,
  client_optimizer: optax.GradientTransformation,
  layout: Layout,
  phase: Phase = Phase(),
  scale: float = 1.7,
  exponent: float = 1.0,
  pm_mode: str = 'local_plus_transfer',
  random_bias: bool = False,
  debug: bool = False,
) -> FederatedAlgorithm:
  """Builds FedLoGe.

  A client's step, on one computation of features f = h(x), with sg =
  stop-gradient:

    theta <- SGD(CE(V'f + b, y)),  psi <- SGD(CE(psi sg(f), y)),
    phi_c <- SGD(CE(phi_c sg(f), y))

  theta and psi are averaged by examples; phi_c stays with its client. Heads
  reported: global 'realigned' (first), 'auxiliary' and 'classifier'; personal
  `PERSONAL`, `pm_mode` first.

  Args:
    task: the backbone's task.
    classifier: V [D, Y], as `models.heads.sparse_etf` makes it; never trained.
    counts: train examples of every client and class [C, Y], for masks.
    client_optimizer: any optax transformation; its state starts anew each
      round.
    layout: devices, lanes, waves.
    phase: the local work.
    scale: s of `realign_global`.
    exponent: of `realign_global`.
    pm_mode: the personal prediction to report first, of `PERSONAL`.
    random_bias: keep a frozen bias U(-1/sqrt(D), 1/sqrt(D)) in the classifier,
      as the official code does; else 0.
    debug: run client by client in plain Python.

  Raises:
    InvalidInput: the classifier's shape, the exponent or the mode is wrong.
  """
  shape = (task.num_features, task.num_classes)
  validate.check(
    classifier.shape == shape,
    f'Expected a classifier of shape {list(shape)}, got '
    f'{list(classifier.shape)}.',
  )
  validate.above('scale', scale, 0)
  validate.between('exponent', exponent, 0, 1)
  validate.one_of('pm_mode', pm_mode, list(PERSONAL))
  kernel = jnp.asarray(classifier)

  def init(key: jax.Array) -> PyTree:
    body, head, bias = jax.random.split(key, 3)
    variables = task.init(body)
    frozen = task.head(bias)['bias'] * random_bias
    return join(
      variables,
      {'body': params_of(variables), 'head': task.head(head), 'bias': frozen},
    )

  def fixed(shared: PyTree, features: jax.Array) -> jax.Array:
    bias = jax.lax.stop_gradient(shared['bias'])
    return apply_head({'kernel': kernel, 'bias': bias}, features)

  def loss(model: PyTree, batch, _) -> Any:
    body, shared, own = heads_of(model)
    features, stats = task.features(body, batch)
    seen = jax.lax.stop_gradient(features)
    value = (
      task.cross_entropy(fixed(shared, features), batch)
      + task.cross_entropy(apply_head(shared['head'], seen), batch)
      + task.cross_entropy(apply_head(own, seen), batch)
    )
    return with_stats(value, stats)

  modes = {pm_mode: PERSONAL[pm_mode], **PERSONAL}
  return fed_avg(
    Task(init, None, None),
    client_optimizer=client_optimizer,
    server_optimizer=optax.sgd(1.0),
    layout=layout,
    phase=phase,
    program=partly_personal(loss, client_optimizer),
    init_client=lambda key, number: task.head(key),
    predictors=head_predictors(
      task,
      counts=counts,
      global_logits={
        'realigned': lambda shared, f: apply_head(
          realign_global(shared['head'], scale=scale, exponent=exponent), f
        ),
        'auxiliary': lambda shared, f: apply_head(shared['head'], f),
        'classifier': fixed,
      },
      personal_logits=modes,
    ),
    debug=debug,
  )
