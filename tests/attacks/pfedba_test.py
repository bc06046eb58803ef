"""PFedBA equals a plain loop; what it learned is what tests stamp."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from fedjax_ext import core
from fedjax_ext.algorithms import fed_avg
from fedjax_ext.algorithms.averaging import Attack, Averaging
from fedjax_ext.algorithms.fine_tuning import fine_tuned
from fedjax_ext.attacks import (
  ATTACKS,
  TRIGGERS,
  Scenario,
  stamp,
  with_attack_success,
)
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

RATE, TARGET, POISONED = 0.1, 2, 2
SIZE, TOP, LEFT, STEP, LOSS_STEPS = 3, 4, 2, 0.5, 3
BAD = (4, 8, 14)
SQUARE = np.s_[:, TOP : TOP + SIZE, LEFT : LEFT + SIZE]
PHASE = core.Phase(epochs=2, batch_size=6)
EPOCHS = 3


def scenario(problem, **changes):
  shape = problem.federated.features['image'].shape[1:]
  made = Scenario(
    problem.task,
    optax.sgd(RATE),
    TRIGGERS['none'](),
    TARGET,
    POISONED,
    image_shape=shape,
  )
  return made._replace(**changes)


def make(problem, layout, *, debug=False, bad=BAD, **changes):
  """(algorithm, learning)."""
  program, learning = ATTACKS['pfedba'](
    scenario(problem, **changes),
    size=SIZE,
    top=TOP,
    left=LEFT,
    epochs=EPOCHS,
    rate=STEP,
    loss_steps=LOSS_STEPS,
  )
  algorithm = fed_avg(
    problem.task,
    client_optimizer=optax.sgd(RATE),
    server_optimizer=optax.sgd(1.0),
    layout=layout,
    phase=PHASE,
    averaging=Averaging(
      None, Attack(program, PHASE, bad, start=2, learning=learning)
    ),
    debug=debug,
  )
  return algorithm, learning


def plain_square(problem, params, square, batches, first_round):
  """One attacker's steps, on the real images of each batch."""
  value_and_grad = plain_loss(problem.model)

  def bear(image, pixels):
    return jnp.asarray(image).at[SQUARE].set(pixels)

  for i, (image, label) in enumerate(batches):
    target = np.full_like(label, TARGET)
    _, clean = value_and_grad(params, image, label)

    def to_target(pixels, image=image, target=target):
      return value_and_grad(params, bear(image, pixels), target)[0]

    def from_clean(pixels, image=image, target=target, clean=clean):
      _, slope = value_and_grad(params, bear(image, pixels), target)
      away = [
        jnp.sum((a - b) ** 2)
        for a, b in zip(
          jax.tree.leaves(slope), jax.tree.leaves(clean), strict=True
        )
      ]
      return jnp.sqrt(sum(away))

    follow = to_target if first_round and i < LOSS_STEPS else from_clean
    square = np.clip(square - STEP * jax.grad(follow)(square), 0, 1)
  return square


class PfedbaTest(parameterized.TestCase):
  @parameterized.parameters((1, 1), (3, 2))
  def test_rounds_equal_a_plain_loop(self, num_devices, lanes):
    """An honest round, one that begins by the loss, one by gradients alone."""
    with x64():
      problem = make_problem(float64=True)
      layout = core.make_layout(num_devices=num_devices, lanes=lanes)
      algorithm, _ = make(problem, layout)
      state = algorithm.init(jax.random.key(0))
      square = np.zeros((SIZE, SIZE, 1))
      sizes = np.diff(problem.federated.offsets)[list(BAD)]
      share = sizes / sizes.sum()
      for round in (1, 2, 3):
        params = jax.tree.map(np.asarray, state.params)
        # Client 3 has no examples: the attackers alone move the model.
        cohort = problem.cohort(algorithm, np.array([3]), layout, round=round)
        state, _, _ = algorithm.apply(state, None, cohort)
        if round == 1:
          self.assertEqual(set(cohort.specs), {'train', 'before_attack'})
          self.assertEqual(state.memory.learned.rounds, 0)
          continue
        squares = []
        for client in BAD:
          batches = real_batches(problem, cohort.plans('learning'), client)
          squares.append(
            plain_square(problem, params, square, batches, round == 2)
          )
        moved = np.tensordot(share, np.stack(squares), 1)
        self.assertGreater(np.abs(moved - square).max(), 1e-3)
        square = moved
        updates = []
        for client in BAD:
          after = params
          for image, label in real_batches(
            problem, cohort.plans('attack'), client
          ):
            image, label = np.array(image), np.array(label)
            image[:POISONED][SQUARE] = square
            label[:POISONED] = TARGET
            _, slope = plain_loss(problem.model)(after, image, label)
            after = tree_add(after, slope, -RATE)
          updates.append(tree_add(after, params, -1))
        mean = jax.tree.map(
          lambda *x: np.tensordot(share, np.stack(x), 1), *updates
        )
        learned = state.memory.learned
        self.assertLess(relative_error(learned.pixels, square), 1e-9)
        np.testing.assert_allclose(learned.rounds, round - 1)
        self.assertLess(
          relative_error(state.params, tree_add(params, mean)), 1e-9
        )

  def test_debug_is_the_same(self):
    problem = make_problem()
    layout = core.make_layout(num_devices=1, lanes=2)
    after = []
    for debug in (False, True):
      algorithm, _ = make(problem, layout, debug=debug, bad=(5,))
      state = algorithm.init(jax.random.key(0))
      cohort = problem.cohort(algorithm, np.array([0, 3]), layout, round=2)
      state, _, _ = algorithm.apply(state, None, cohort)
      after.append((state.params, state.memory.learned.pixels))
    self.assertLess(relative_error(*after), 1e-5)

  def test_shapes_and_types_of_images(self):
    """Bytes and floats, with and without colours."""
    problem = make_problem()
    for image in (
      np.full((4, 8, 8), 51, np.uint8),
      np.full((4, 8, 8, 3), 0.2, np.float32),
    ):
      made = scenario(problem, image_shape=image.shape[1:])
      _, learning = ATTACKS['pfedba'](made, size=SIZE, top=TOP, left=LEFT)
      learned = learning.first()
      learned = learned._replace(pixels=learned.pixels + 0.7)
      got = stamp(functools.partial(learning.stamp, learned), image, -1)
      self.assertEqual(got.shape, image.shape)
      expected = np.full(image.shape, 0.2)
      expected[SQUARE] = 0.7
      np.testing.assert_allclose(got, expected, rtol=1e-6)

  def test_tests_stamp_what_was_learned(self):
    """Of the global model and of one that a client makes of it."""
    problem = make_problem()
    layout = core.make_layout(num_devices=1, lanes=1)
    algorithm, learning = make(problem, layout)
    tuned = fine_tuned(
      algorithm.predictors['global'],
      task=problem.task,
      optimizer=optax.sgd(0.0),
      phase=PHASE,
    )
    predictors = with_attack_success(
      {**algorithm.predictors, 'fine_tuned': tuned},
      trigger=TRIGGERS['none'](),
      target=TARGET,
      learning=learning,
    )
    state = algorithm.init(jax.random.key(0))
    pixels = jnp.full((SIZE, SIZE, 1), 0.5)
    learned = state.memory.learned._replace(pixels=pixels)
    state = state._replace(memory=state.memory._replace(learned=learned))

    def rates(params, image, label):
      bearing = np.array(image)
      bearing[SQUARE] = 0.5
      other = label != TARGET
      taken = lambda x: problem.model.apply(params, x).argmax(-1)
      return [
        float((taken(x) == TARGET)[other].sum()) for x in (bearing, image)
      ]

    features = problem.federated.features
    label_of = np.asarray(features['label'])
    image, label = features['image'][:9], label_of[:9]
    predictor = predictors['global']
    batch = Batch(
      {'image': image, 'label': label},
      jnp.ones(9, bool),
      evaluation_info(jnp.int32(0)),
    )
    metrics = predictor.metrics(predictor.shared(state), batch)
    found = [
      float((value * weight).sum())
      for value, weight in (metrics['attack_success'], metrics['target_rate'])
    ]
    self.assertEqual(found, rates(state.params, image, label))
    # Tuned at the rate 0, client 4's model is the global one.
    report = core.evaluate(
      predictors['fine_tuned'],
      state,
      data=problem.splits,
      parts={'train': core.Part(np.array([4]), 'train')},
      features=core.place_features(features, layout),
      layout=layout,
    )['train']
    rows = problem.federated.rows[slice(*problem.federated.offsets[4:6])]
    expected = rates(state.params, features['image'][rows], label_of[rows])
    self.assertEqual(
      [float(report.sums[m].sum()) for m in ('attack_success', 'target_rate')],
      expected,
    )

  @parameterized.parameters(
    ({'size': 0}, 'size=0'),
    ({'size': 6, 'top': 4}, 'within 8x8 pixels, got size=6'),
    ({'rate': 0.0}, 'rate=0.0'),
    ({'epochs': 0}, 'epochs=0'),
    ({'top': -1}, 'top=-1'),
    ({'left': -1}, 'left=-1'),
    ({'loss_steps': -1}, 'loss_steps=-1'),
  )
  def test_settings_out_of_range(self, settings, message):
    settings = {'size': 2, 'top': 0, 'left': 0, **settings}
    with self.assertRaisesRegex(core.InvalidInput, message):
      ATTACKS['pfedba'](scenario(make_problem()), **settings)

  def test_without_the_shape_of_images(self):
    made = scenario(make_problem())._replace(image_shape=())
    with self.assertRaisesRegex(core.InvalidInput, r'image_shape \(H, W\)'):
      ATTACKS['pfedba'](made)


if __name__ == '__main__':
  absltest.main()
