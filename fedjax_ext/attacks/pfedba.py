"""PFedBA: a trigger that is learned, so that its gradients look honest.

The attackers share a square of pixels. In each round they move it so that the
global model's gradient on triggered images, labelled with the target, comes
close to its gradient on the images as they are; then they train on images that
bear it. A model that learns its task, or is tuned to a client, thus learns the
backdoor along with it.

Lyu, Han, Wang, Liu, Zhu, Xu, Liu and Zhang, "Lurking in the shadows: unveiling
stealthy backdoor attacks against personalized federated learning", 2024,
https://arxiv.org/abs/2406.06207. Place and size of the square, rates and the 50
steps of the loss are those of public code for MNIST. There all attackers share
their images, of which 30 passes are made a round; here each attacker takes its
own steps and the squares are averaged.

Axis letters: S side of the square, D colours.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_ext.algorithms.averaging import Learning, Sent
from fedjax_ext.algorithms.local_sgd import delta_of
from fedjax_ext.attacks.backdoors import train_poisoned
from fedjax_ext.attacks.scenario import LearnedAttack, Scenario, poison
from fedjax_ext.core import Batch, Client, ClientOutput, ClientProgram, validate
from fedjax_ext.defenses.updates import norm_of
from fedjax_ext.models import params_of, with_params

PyTree = Any


class Square(NamedTuple):
  """What the attackers have learned.

  Attributes:
    pixels: [S, S, D] in [0, 1].
    rounds: in how many rounds, a float scalar.
  """

  pixels: jax.Array
  rounds: jax.Array


def pfedba(
  scenario: Scenario,
  *,
  size: int = 10,
  top: int = 10,
  left: int = 10,
  epochs: int = 3,
  rate: float = 0.1,
  loss_steps: int = 50,
) -> LearnedAttack:
  """Training on images with a learned square, the `poisoned` first of a batch.

  Before it, in every round, the square t takes steps t <- clip(t - rate g):

    g = grad_t |grad_w F(x + t, target) - grad_w F(x, y)|

  with the global model w held still; in the first steps of the attack instead
  g = grad_t F(x + t, target). All images of a batch bear it there.

  Args:
    scenario: task, optimizer, target, image_shape; its trigger is not used.
    size: S, in pixels.
    top: first row of the square.
    left: its first column.
    epochs: of learning the trigger, in each round.
    rate: of the steps.
    loss_steps: how many of the first round's steps follow the loss.

  Raises:
    InvalidInput: the square is not within the image, or a value is too small.
  """
  for name, value, least in (
    ('size', size, 1),
    ('top', top, 0),
    ('left', left, 0),
    ('epochs', epochs, 1),
    ('loss_steps', loss_steps, 0),
  ):
    validate.at_least(name, value, least)
  validate.above('rate', rate, 0)
  validate.check(
    len(scenario.image_shape) in (2, 3),
    'Expected image_shape (H, W) or (H, W, D) in the scenario of pfedba, got '
    f'{scenario.image_shape}.',
  )
  height, width, *colours = scenario.image_shape
  validate.check(
    top + size <= height and left + size <= width,
    f'Expected a square within {height}x{width} pixels, got size={size}, '
    f'top={top}, left={left}.',
  )

  def stamp(square: Square, x: jax.Array, part: jax.Array | int) -> jax.Array:
    del part
    place = jnp.s_[:, top : top + size, left : left + size]
    return jnp.asarray(x).at[place].set(square.pixels.astype(x.dtype))

  def stamped(square: Square, batch: Batch, poisoned: int) -> Batch:
    trigger = lambda x, part: stamp(square, x, part)
    changed = scenario._replace(trigger=trigger, poisoned=poisoned)
    return poison(changed, batch, -1)

  def first() -> Square:
    pixels = jnp.zeros((size, size, *(colours or (1,))))
    return Square(pixels, jnp.zeros(()))

  return LearnedAttack(
    train_poisoned(
      scenario,
      craft=lambda model, batch, sent, place: stamped(
        sent.learned, batch, scenario.poisoned
      ),
    ),
    Learning(
      first,
      learn_square(
        scenario.task.loss,
        lambda square, batch: stamped(square, batch, len(batch.mask)),
        rate=rate,
        loss_steps=loss_steps,
      ),
      epochs,
      stamp,
    ),
  )


def learn_square(
  loss: Callable[[PyTree, Batch], Any],
  stamped: Callable[[Square, Batch], Batch],
  *,
  rate: float,
  loss_steps: int,
) -> ClientProgram:
  """An attacker's steps of the square, against a model that is held still.

  Args:
    loss: (model, batch) -> scalar, or (scalar, stats).
    stamped: (square, batch) -> all of the batch with the square, as the target.
    rate: of the steps.
    loss_steps: steps of the first round that follow the loss.
  """

  def value(params: PyTree, model: PyTree, batch: Batch) -> jax.Array:
    result = loss(with_params(model, params), batch)
    return result[0] if isinstance(result, tuple) else result

  def init(sent: Sent, client: Client, key: jax.Array) -> Square:
    del client, key
    return sent.learned

  def step(sent: Sent, square: Square, batch: Batch) -> Square:
    params = params_of(sent.model)

    def to_target(pixels: jax.Array) -> jax.Array:
      triggered = stamped(square._replace(pixels=pixels), batch)
      return value(params, sent.model, triggered)

    def from_clean(pixels: jax.Array) -> jax.Array:
      triggered = stamped(square._replace(pixels=pixels), batch)
      theirs = jax.grad(value)(params, sent.model, triggered)
      clean = jax.grad(value)(params, sent.model, batch)
      return norm_of(delta_of(theirs, clean))

    follow = jax.grad(from_clean)
    # Of clients in lanes only the first round computes both.
    slope = jax.lax.cond(
      sent.learned.rounds == 0,
      lambda pixels: jax.lax.cond(
        batch.info.step < loss_steps, jax.grad(to_target), follow, pixels
      ),
      follow,
      square.pixels,
    )
    pixels = jnp.clip(square.pixels - rate * slope, 0, 1)
    return square._replace(pixels=pixels)

  def final(sent: Sent, client: Client, square: Square) -> ClientOutput:
    change = square.pixels - sent.learned.pixels
    return ClientOutput(
      Square(change, jnp.ones_like(square.rounds)), client.num_examples
    )

  return ClientProgram(init, step, final)
