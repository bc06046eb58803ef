"""The hidden trigger equals a plain loop; its poison stays near the image."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest

from fedjax_ext import core
from fedjax_ext.algorithms import fed_avg
from fedjax_ext.algorithms.averaging import Attack, Averaging
from fedjax_ext.attacks import ATTACKS, TRIGGERS, Scenario
from fedjax_ext.attacks.hidden_trigger import collided
from fedjax_ext.core.pooled import evaluation_info
from fedjax_ext.core.programs import Batch
from tests.problems import (
  make_problem,
  plain_loss,
  real_batches,
  relative_error,
  tree_add,
  x64,
)

RATE, TARGET, POISONED, RADIUS, STEPS = 0.1, 2, 2, 0.1, 3
BAD = (4, 8, 14)


def features(params, batch):
  """Of one linear layer: [B, F]."""
  x = batch.data['image']
  return x.reshape(len(x), -1) @ params['Dense_0']['kernel']


def scenario(problem, **changes):
  made = Scenario(
    problem.task,
    optax.sgd(RATE),
    TRIGGERS['grid'](size=2, margin=0),
    TARGET,
    POISONED,
    features=features,
  )
  return made._replace(**changes)


def plain_collided(kernel, images, labels):
  """Image by image, coordinate by coordinate of its gradient."""
  images = np.array(images)
  others = [i for i in range(len(labels)) if labels[i] != TARGET]
  wanted = [i for i in range(len(labels)) if labels[i] == TARGET]
  moved = images.copy()
  for rank, i in enumerate(wanted[:POISONED] if others else []):
    other = images[others[rank % len(others)]].copy()
    height, width = other.shape[:2]
    for row, column in ((0, 0), (1, 1)):
      other[height - 2 + row, width - 2 + column] = 1
    aim = kernel.T @ other.ravel()
    start = images[i].ravel()
    x = start.copy()
    for _ in range(STEPS):
      slope = 2 * kernel @ (kernel.T @ x - aim)
      x = x - 2 * RADIUS / STEPS * np.sign(slope)
      x = np.clip(np.clip(x, start - RADIUS, start + RADIUS), 0, 1)
    moved[i] = x.reshape(images[i].shape)
  return moved


class HiddenTriggerTest(absltest.TestCase):
  def test_a_round_equals_a_plain_loop(self):
    with x64():
      problem = make_problem(float64=True)
      layout = core.make_layout(num_devices=1, lanes=2)
      program = ATTACKS['hidden_trigger'](
        scenario(problem), radius=RADIUS, steps=STEPS
      )
      phase = core.Phase(epochs=2, batch_size=6)
      algorithm = fed_avg(
        problem.task,
        client_optimizer=optax.sgd(RATE),
        server_optimizer=optax.sgd(1.0),
        layout=layout,
        phase=phase,
        averaging=Averaging(None, Attack(program, phase, BAD)),
      )
      state = algorithm.init(jax.random.key(0))
      start = jax.tree.map(np.asarray, state.params)
      # Client 3 has no examples: the attackers alone move the model.
      cohort = problem.cohort(algorithm, np.array([3]), layout)
      after, _, _ = algorithm.apply(state, None, cohort)
      updates, sizes, crafted = [], [], 0
      for client in BAD:
        params = start
        batches = real_batches(problem, cohort.plans('attack'), client)
        for image, label in batches:
          kernel = np.asarray(params['Dense_0']['kernel'])
          moved = plain_collided(kernel, image, np.asarray(label))
          crafted += int((moved != np.asarray(image)).any())
          _, slope = plain_loss(problem.model)(params, moved, label)
          params = tree_add(params, slope, -RATE)
        updates.append(tree_add(params, start, -1))
        sizes.append(np.diff(problem.federated.offsets)[client])
      self.assertGreater(crafted, 0)
      share = np.array(sizes) / np.sum(sizes)
      mean = jax.tree.map(
        lambda *x: np.tensordot(share, np.stack(x), 1), *updates
      )
      self.assertLess(relative_error(after.params, tree_add(start, mean)), 1e-9)

  def test_poison_stays_near_and_comes_closer(self):
    problem = make_problem()
    params = problem.task.init(jax.random.key(0))
    shape = problem.federated.features['image'].shape[1:]
    images = jax.random.uniform(jax.random.key(1), (6, *shape))
    labels = jnp.array([2, 0, 2, 1, 2, 2])
    mask = jnp.array([1, 1, 1, 1, 1, 0], bool)
    batch = Batch(
      {'image': images, 'label': labels}, mask, evaluation_info(jnp.int32(0))
    )
    made = scenario(problem, poisoned=3)
    moved = collided(made, params, batch, 0, radius=0.1, steps=5)
    change = np.asarray(jnp.abs(moved.data['image'] - images))
    change = change.reshape(6, -1).max(1)
    np.testing.assert_array_equal(change > 0, [1, 0, 1, 0, 1, 0])
    self.assertLessEqual(change.max(), 0.1 + 1e-6)
    np.testing.assert_array_equal(moved.data['label'], labels)
    stamped = made.trigger(images[..., None] if images.ndim == 3 else images, 0)
    aim = features(
      params, batch._replace(data={'image': stamped.reshape(images.shape)})
    )[jnp.array([1, 3, 1])]
    place = jnp.array([0, 2, 4])
    before = jnp.linalg.norm(features(params, batch)[place] - aim, axis=1)
    after = jnp.linalg.norm(features(params, moved)[place] - aim, axis=1)
    self.assertTrue((after < before).all(), (before, after))

  def test_without_features_one_line_says_so(self):
    problem = make_problem()
    with self.assertRaisesRegex(core.InvalidInput, 'with tapped layers'):
      ATTACKS['hidden_trigger'](scenario(problem, features=None))


if __name__ == '__main__':
  absltest.main()
