"""BDPFL: personal models that learn from the global one, but not its backdoors.

Each client trains the communicated model, which begins at the global one and
is averaged, and a personal one, which stays. They teach each other on the same
batches: predictions, and heat maps of where their layers look. Triggers leave
traces in deep layers above all, so that shallow layers' maps count more.

Zhu, Zhang, Wu and Long, "Backdoor defense in personalized federated learning by
explainable distillation", 2025, https://arxiv.org/abs/2503.06554. No official
code was found; where the paper is silent or contradicts itself, `Options` says
what is done.

Axis letters: B examples, H height, W width, L tapped layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_ext.algorithms.averaging import Averaging
from fedjax_ext.algorithms.fed_avg import fed_avg
from fedjax_ext.algorithms.local_training import own_params, unseen
from fedjax_ext.algorithms.personal_heads import partly_personal
from fedjax_ext.core import (
  Batch,
  FederatedAlgorithm,
  Layout,
  Phase,
  Predictor,
  validate,
)
from fedjax_ext.losses import Task
from fedjax_ext.losses.distillation import (
  NORMS,
  distance,
  heat_maps,
  kl_divergence,
  normalise,
)
from fedjax_ext.losses.task import masked_mean
from fedjax_ext.models import Model, check_no_statistics, params_of

PyTree = Any
DECAYS = ('communicated', 'personal', 'both', 'none')
MATCHES = ('heatmap', 'features', 'both', 'none')


class Options(NamedTuple):
  """How the two models teach each other, where the paper leaves it open.

  Attributes:
    distillation_weight: lambda of the predictions' term; 0 leaves it out (R7).
    temperature: tau of the predictions (R7).
    squared_temperature: multiply that term by tau^2, as Hinton et al. do (R7).
    match: what of the layers is matched, of MATCHES; 'none' leaves it out
      (R10).
    decay: gamma of beta_l = 1 / (1 + gamma * l) (R8).
    decay_on: whose loss has beta_l: of the communicated model (the paper's
      equation 11 and algorithm 1), of the personal one (its section 4.2), of
      both or of none (R1).
    first_layer: l of the shallowest layer, 0 or 1 (R2).
    layers: which tapped layers, counted from 0; () for all (R3).
    norm: of `losses.distillation.NORMS`, of each example; mean over them (R4).
    normalised: maps and features of norm 1 for each example (R5).
    map_class: maps of the true 'label' or of the 'predicted' class (R6).
  """

  distillation_weight: float = 1.0
  temperature: float = 1.0
  squared_temperature: bool = False
  match: str = 'heatmap'
  decay: float = 1.0
  decay_on: str = 'communicated'
  first_layer: int = 1
  layers: tuple[int, ...] = ()
  norm: str = 'l2sq'
  normalised: bool = True
  map_class: str = 'label'

  def check(self) -> None:
    """Raises InvalidInput where a value is out of range."""
    validate.at_least('distillation_weight', self.distillation_weight, 0)
    validate.above('temperature', self.temperature, 0)
    validate.one_of('match', self.match, MATCHES)
    validate.at_least('decay', self.decay, 0)
    validate.one_of('decay_on', self.decay_on, DECAYS)
    validate.one_of('first_layer', self.first_layer, (0, 1))
    validate.one_of('norm', self.norm, NORMS)
    validate.one_of('map_class', self.map_class, ('label', 'predicted'))


def layer_weights(
  num_layers: int, *, decay: float, first_layer: int = 1
) -> tuple[float, ...]:
  """beta_l = 1 / (1 + decay * l) of layers l = first_layer, ...; [L]."""
  return tuple(1 / (1 + decay * (first_layer + i)) for i in range(num_layers))


class View(NamedTuple):
  """What one model makes of a batch.

  Attributes:
    logits: [B, Y].
    maps: what is matched of each layer, a tuple of tuples of [B, ...].
  """

  logits: jax.Array
  maps: tuple[tuple[jax.Array, ...], ...]


def view(
  model: Model,
  variables: PyTree,
  x: jax.Array,
  labels: jax.Array,
  options: Options,
) -> View:
  """Logits and layers' maps of inputs x [B, ...] with labels [B]."""
  if options.match == 'none':
    return View(model.apply(variables, x), ())
  if options.match == 'features':
    logits, features = model.tapped(variables, x, None)
    kinds = [features]
  else:
    classes = labels if options.map_class == 'label' else None
    logits, features, heat = heat_maps(model, variables, x, classes)
    kinds = [heat] if options.match == 'heatmap' else [heat, features]
  layers = options.layers or range(len(features))
  scale = normalise if options.normalised else lambda m: m
  maps = tuple(tuple(scale(kind[i]) for kind in kinds) for i in layers)
  return View(logits, maps)


def teaching_loss(
  own: View,
  peer: View,
  labels: jax.Array,
  mask: jax.Array,
  *,
  options: Options,
  decayed: bool,
) -> jax.Array:
  """A model's loss beside a peer that stays as it is, a scalar.

    CE(z, y) + lambda KL(q_peer || q) + sum_l beta_l d(H_l, H_l of the peer)

  Args:
    own: of the model that learns.
    peer: of the other one.
    labels: int [B].
    mask: real examples, bool [B]; means are over them.
    options: which terms, and how.
    decayed: whether beta_l is; else it is 1.
  """
  peer = jax.lax.stop_gradient(peer)
  value = masked_mean(
    optax.softmax_cross_entropy_with_integer_labels(own.logits, labels), mask
  )
  if options.distillation_weight:
    tau = options.temperature
    weight = options.distillation_weight
    weight *= tau**2 if options.squared_temperature else 1
    divergence = kl_divergence(peer.logits, own.logits, temperature=tau)
    value += weight * masked_mean(divergence, mask)
  weights = layer_weights(
    len(own.maps),
    decay=options.decay if decayed else 0,
    first_layer=options.first_layer,
  )
  for beta, mine, theirs in zip(weights, own.maps, peer.maps, strict=True):
    for a, b in zip(mine, theirs, strict=True):
      value += beta * masked_mean(distance(a, b, norm=options.norm), mask)
  return value


def bdpfl(
  task: Task,
  model: Model,
  *,
  inputs: Callable[..., jax.Array],
  client_optimizer: optax.GradientTransformation,
  layout: Layout,
  phase: Phase = Phase(),
  options: Options = Options(),
  personal_start: Callable[[], PyTree] | None = None,
  averaging: Averaging = Averaging(),
  label: str = 'label',
  debug: bool = False,
) -> FederatedAlgorithm:
  """Builds BDPFL.

    w_c <- SGD(`teaching_loss` beside w_p),  w_p <- SGD(that beside w_c)

  on the same batches, both gradients at the models before the step, each by its
  own model alone. w_c begins at the global model and is averaged; w_p stays.

  Args:
    task: of the model; its metrics are reported of the 'global' and of the
      'personal' models.
    model: without moving statistics; with taps where layers are matched.
    inputs: (batch, *, train) -> what the model sees, [B, ...].
    client_optimizer: any optax transformation that treats entries one by one;
      its state starts anew each round.
    layout: devices, lanes, waves.
    phase: the local work.
    options: what the models teach each other.
    personal_start: () -> where personal models begin; None: at what the global
      one is when the client first takes part.
    averaging: how updates are averaged, and who attacks.
    label: name of the labels, int [B].
    debug: run client by client in plain Python.

  Raises:
    InvalidInput: an option is out of range or does not suit the model.
  """
  options.check()
  check_no_statistics('bdpfl', model.init)

  def loss(both: PyTree, batch: Batch, _) -> jax.Array:
    params, labels = params_of(both), batch.data[label]
    x = inputs(batch, train=True)
    shared = view(model, params['shared'], x, labels, options)
    own = view(model, params['personal'], x, labels, options)
    on = options.decay_on
    return teaching_loss(
      shared,
      own,
      labels,
      batch.mask,
      options=options,
      decayed=on in ('communicated', 'both'),
    ) + teaching_loss(
      own,
      shared,
      labels,
      batch.mask,
      options=options,
      decayed=on in ('personal', 'both'),
    )

  def init_client(key: jax.Array, number: jax.Array) -> PyTree:
    if personal_start is not None:
      return {'params': personal_start(), 'seen': jnp.bool(True)}
    return unseen(model.init(key))

  return fed_avg(
    task,
    client_optimizer=client_optimizer,
    server_optimizer=optax.sgd(1.0),
    layout=layout,
    phase=phase,
    program=partly_personal(
      loss,
      client_optimizer,
      own=own_params,
      row=lambda personal: {'params': personal, 'seen': jnp.bool(True)},
    ),
    init_client=init_client,
    predictors={
      'global': Predictor(task.metrics, shared=lambda state: state.params),
      'personal': Predictor(
        task.metrics, shared=lambda state: state.params, params=own_params
      ),
    },
    averaging=averaging,
    debug=debug,
  )
