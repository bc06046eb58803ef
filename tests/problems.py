"""Small problems and plain Python oracles that several tests share.

The oracles know nothing of masks, lanes, plans or reducers: they train on the
real rows of each batch, client after client, in numpy and single jax calls.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_ext import core, data
from fedjax_ext.core.plans import client_batches
from fedjax_ext.losses import Task, classification_task
from fedjax_ext.models import make_model

PyTree = Any

# Ragged, two empty (3, 7) and one single-example client (5).
SIZES = (5, 12, 9, 0, 20, 1, 7, 0, 33, 2, 14, 6, 8, 3, 11, 4, 10, 25, 13)


@contextlib.contextmanager
def x64(enabled: bool = True) -> Iterator[None]:
  """Runs a block with 64-bit types on or off."""
  before = jax.config.jax_enable_x64
  jax.config.update('jax_enable_x64', enabled)
  try:
    yield
  finally:
    jax.config.update('jax_enable_x64', before)


class Problem(NamedTuple):
  """Data of C clients and a task on it."""

  federated: data.FederatedData
  task: Task
  model: Any

  @property
  def splits(self) -> dict[str, data.FederatedData]:
    """One split, 'train'."""
    return {'train': self.federated}

  def cohort(self, algorithm, clients, layout, *, round=1, seed=3):
    """A cohort of int clients [K]."""
    return core.make_cohort(
      np.asarray(clients),
      round=round,
      seed=seed,
      specs=algorithm.plans,
      data=self.splits,
      features=core.place_features(self.federated.features, layout),
      layout=layout,
    )


def make_problem(
  name: str = 'mlp', *, sizes=SIZES, float64: bool = False, poison=()
) -> Problem:
  """Images [N, 8, 8, 1] of 3 classes; `poison` clients hold an infinity."""
  rng = np.random.default_rng(0)
  owner = np.repeat(np.arange(len(sizes)), sizes)
  dtype = np.float64 if float64 else np.float32
  label = rng.integers(0, 3, len(owner)).astype(np.int32)
  image = rng.standard_normal((len(owner), 8, 8, 1)).astype(dtype)
  image[:, :3, :3, 0] += label[:, None, None]
  for client in poison:
    image[np.flatnonzero(owner == client)[-1]] = np.inf
  # Rows are not in client order, so that views are exercised.
  order = rng.permutation(len(owner))
  federated = data.from_client_column(
    {'image': image[order], 'label': label[order]}, owner[order]
  )
  if 0 in sizes:  # from_client_column cannot know empty clients
    federated = data.from_assignment(
      {'image': image[order], 'label': label[order]},
      owner[order],
      client_ids=np.arange(len(sizes)),
    )
  settings = {'mlp': {'hidden': (16,)}, 'emnist_cnn': {'dropout': ()}}
  model = make_model(
    name, input_shape=(8, 8, 1), num_classes=3, **settings.get(name, {})
  )
  task = classification_task(model)
  cast = lambda key: jax.tree.map(lambda x: x.astype(dtype), model.init(key))
  return Problem(federated, task._replace(init=cast), model)


@functools.cache
def plain_loss(model) -> Callable:
  """(params, image, label) -> (mean cross-entropy of real examples, gradient).

  Written out, without a mask; compiled once for each number of examples.
  """

  def loss(params, image, label):
    logits = model.apply(params, image)
    picked = jnp.take_along_axis(logits, label[:, None], 1)[:, 0]
    return jnp.mean(jax.scipy.special.logsumexp(logits, axis=1) - picked)

  return jax.jit(jax.value_and_grad(loss))


@functools.cache
def plain_step(optimizer: optax.GradientTransformation) -> Callable:
  """(gradient, state, params) -> (params, state), compiled once."""

  def step(grads, state, params):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(step)


def real_batches(problem: Problem, plans, client: int) -> list:
  """[(image [n, ...], label [n])] of a client, without padding."""
  features = problem.federated.features
  for plan in plans:
    if client in plan.clients:
      return [
        (features['image'][rows[:count]], features['label'][rows[:count]])
        for rows, count, _ in client_batches(plan, client)
      ]
  raise AssertionError(f'client {client} is in no plan')


def tree_add(a: PyTree, b: PyTree, scale: float = 1.0) -> PyTree:
  """a + scale * b in numpy."""
  return jax.tree.map(lambda x, y: np.asarray(x) + scale * np.asarray(y), a, b)


def is_finite(tree: PyTree) -> bool:
  """Whether every leaf is finite."""
  return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def relative_error(a: PyTree, b: PyTree) -> float:
  """Largest ||x - y|| / ||y|| over leaves; absolute where y is zero.

  NaN where either has one, which is neither below nor above any bound.
  """
  errors = [0.0]
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    scale = np.linalg.norm(y) or 1.0
    errors.append(np.linalg.norm(x - y) / scale)
  return float(np.max(errors))  # not max(), which takes NaN for the smaller
