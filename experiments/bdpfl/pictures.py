"""Where the global and a personal model look in triggered images.

Axis letters: I images, L tapped layers, H height, W width.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_ext.attacks import Trigger, stamp
from fedjax_ext.core import ClientStates, examples_of
from fedjax_ext.core.programs import Batch, StepInfo
from fedjax_ext.data import FederatedDataset
from fedjax_ext.losses.distillation import heat_maps
from fedjax_ext.training import processes
from fedjax_ext.training.plots import plot_heat_maps
from fedjax_ext.training.task_flags import ImageTask

PyTree = Any
_IMAGES = 4


def draw_heat_maps(
  made: ImageTask,
  dataset: FederatedDataset,
  server_state: PyTree,
  client_states: ClientStates | None,
  *,
  trigger: Trigger,
  target: int,
  workdir: pathlib.Path,
) -> bool:
  """Writes heat_maps.png: images, triggered, and heat maps by layer and model.

  Test images of other classes than the target. Maps are of the class that the
  model predicts. The personal model is that of the first honest client that has
  trained.

  Args:
    made: model and inputs.
    dataset: images and labels.
    server_state: with params, or params themselves.
    client_states: rows {'params', 'seen'}, or None.
    trigger: all of it is stamped.
    target: the attack's label.
    workdir: where to write.

  Returns:
    Whether a picture was written; not of models without taps.
  """
  images = _images(dataset, target)
  if not processes.is_first() or not len(images) or made.model.tapped is None:
    return False
  models = {'global': getattr(server_state, 'params', server_state)}
  if client_states is not None:
    who = dataset.parts['local_test'].clients
    rows = client_states.gather(who)
    seen = np.flatnonzero(np.asarray(rows['seen']))
    if len(seen):
      name = f'personal, client {who[seen[0]]}'
      models[name] = jax.tree.map(lambda x: x[seen[0]], rows['params'])
  stamped = stamp(trigger, jnp.asarray(images), -1)
  zero = jnp.int32(0)
  info = StepInfo(jax.random.key(0), zero, zero, zero, jnp.bool(False))
  batch = Batch({'image': stamped}, jnp.ones(len(images), bool), info)
  x = made.inputs(batch, train=False)
  if not made.model.tapped(models['global'], x, None)[1]:
    return False
  shown = {'image': [np.asarray(images)], 'triggered': [np.asarray(stamped)]}
  for name, model in models.items():
    logits, _, maps = jax.jit(lambda v: heat_maps(made.model, v, x, None))(
      jax.tree.map(jnp.asarray, model)
    )
    shown[name] = [np.asarray(m) for m in maps]
    shown[f'{name} predicts'] = np.asarray(logits.argmax(-1))
  return plot_heat_maps(shown, workdir / 'heat_maps.png', title=workdir.name)


def _images(dataset: FederatedDataset, target: int) -> np.ndarray:
  """A few test images [I, H, W] or [I, H, W, D] of other classes."""
  features = dataset.features
  if 'image' not in features:
    return np.zeros(0)
  part = dataset.parts['test']
  rows = examples_of(part, dataset.splits).alone().rows
  label = np.asarray(features['label'][rows])
  # One of each of the first other classes.
  others = [y for y in np.unique(label) if y != target][:_IMAGES]
  chosen = np.sort([rows[np.flatnonzero(label == y)[0]] for y in others])
  return np.asarray(features['image'][chosen])
