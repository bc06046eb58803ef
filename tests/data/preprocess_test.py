"""Preprocessing in the step: what it does, and that examples stay apart."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import PREPROCESS, chain
from fedjax_ext.data.preprocess import (
  normalise,
  random_crop,
  random_flip,
  standardise,
)
from tests.problems import x64

KEY = jax.random.key(0)


def images(batch=6, side=8, depth=3, dtype=np.uint8):
  rng = np.random.default_rng(0)
  return jnp.asarray(
    rng.integers(1, 256, (batch, side, side, depth)).astype(dtype)
  )


class PreprocessTest(parameterized.TestCase):
  @parameterized.parameters((2, 0), (0, 5), (3, 6), (4, 12))
  def test_a_crop_is_a_window_of_the_padded_image(self, padding, size):
    x = images()
    got = np.asarray(random_crop(padding=padding, size=size)(KEY, x))
    side = size or 8
    self.assertEqual(got.shape, (6, side, side, 3))
    self.assertEqual(got.dtype, np.uint8)
    border = ((padding, padding),) * 2
    found = set()
    for image, crop in zip(np.asarray(x), got, strict=True):
      padded = np.pad(image, (*border, (0, 0)))
      places = [
        (i, j)
        for i in range(len(padded) - side + 1)
        for j in range(len(padded) - side + 1)
        if (padded[i : i + side, j : j + side] == crop).all()
      ]
      self.assertLen(places, 1)
      found |= set(places)
    if 8 + 2 * padding - side > 1:
      self.assertGreater(len(found), 1)

  def test_every_place_is_equally_likely(self):
    x = jnp.broadcast_to(jnp.arange(4.0).reshape(1, 2, 2, 1), (4000, 2, 2, 1))
    got = random_crop(padding=0, size=1)(KEY, x).reshape(-1)
    counts = np.bincount(np.asarray(got, int), minlength=4)
    # Four standard deviations of a binomial count with p = 1/4.
    self.assertLess(np.abs(counts - 1000).max(), 4 * np.sqrt(4000 * 3 / 16))

  def test_evaluation_takes_the_middle_and_never_draws(self):
    x = images()
    np.testing.assert_array_equal(random_crop(padding=4)(None, x), x)
    np.testing.assert_array_equal(random_flip()(None, x), x)
    middle = random_crop(padding=4, size=4)(None, x)
    np.testing.assert_array_equal(middle, x[:, 2:6, 2:6])
    larger = random_crop(padding=2, size=12)(None, x)
    np.testing.assert_array_equal(larger[:, 2:10, 2:10], x)
    self.assertEqual(float(larger[:, :2].sum()), 0)

  def test_flip(self):
    x = images(batch=400, side=3, depth=1)
    got = np.asarray(random_flip()(KEY, x))
    mirrored = np.asarray(x)[:, :, ::-1]
    flipped = (got == mirrored).all((1, 2, 3))
    same = (got == np.asarray(x)).all((1, 2, 3))
    self.assertTrue((flipped | same).all())
    self.assertBetween(flipped.mean(), 0.4, 0.6)

  def test_standardise(self):
    with x64():
      x = images()
      got = standardise()(KEY, x)
      self.assertEqual(got.dtype, jnp.float64)
      flat = np.asarray(x, np.float64).reshape(6, -1)
      mean, std = flat.mean(1, keepdims=True), flat.std(1, keepdims=True)
      np.testing.assert_allclose(
        got.reshape(6, -1), (flat - mean) / std, atol=1e-12
      )
      constant = standardise()(None, jnp.full((1, 4, 4, 1), 7, jnp.uint8))
      np.testing.assert_array_equal(constant, 0)
      # A deviation below 1/sqrt(pixels) counts as that.
      nearly = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(1e-3)
      centred = np.asarray(nearly) - 1e-3 / 16
      np.testing.assert_allclose(
        standardise()(None, nearly), centred / 0.25, rtol=1e-12
      )

  def test_normalise(self):
    x = images()
    got = normalise(mean=(0.1, 0.2, 0.3), std=(2.0,))(KEY, x)
    want = (np.asarray(x, np.float64) / 255 - [0.1, 0.2, 0.3]) / 2
    np.testing.assert_allclose(got, want, atol=1e-6)
    floats = normalise(mean=(0.0,), std=(1.0,))(KEY, x.astype(jnp.float32))
    np.testing.assert_array_equal(floats, np.asarray(x, np.float32))

  def test_chain(self):
    """Steps get different keys; a channel axis is added; flips keep bytes."""
    x = images(depth=1)[..., 0]
    step = chain(random_crop(padding=1), random_flip(), standardise())
    got = step(KEY, x)
    self.assertEqual(got.shape, (6, 8, 8, 1))
    np.testing.assert_array_equal(got, jax.jit(step)(KEY, x))
    other = step(jax.random.key(1), x)
    self.assertTrue(bool((got != other).any()))
    np.testing.assert_allclose(
      step(None, x), standardise()(None, x[..., None]), atol=1e-6
    )
    np.testing.assert_array_equal(chain()(KEY, x), x[..., None])

  def test_examples_do_not_depend_on_each_other(self):
    """Other content in masked rows changes nothing in the rest."""
    x = images()
    step = chain(random_crop(padding=2), random_flip(), standardise())
    junk = x.at[3:].set(0)
    np.testing.assert_array_equal(step(KEY, x)[:3], step(KEY, junk)[:3])

  def test_lanes(self):
    """vmap over lanes with keys of their own equals a loop."""
    x = jnp.stack([images(), images() // 2])
    keys = jax.random.split(KEY, 2)
    step = chain(random_crop(padding=2), random_flip())
    got = jax.vmap(step)(keys, x)
    for lane in range(2):
      np.testing.assert_array_equal(got[lane], step(keys[lane], x[lane]))

  @parameterized.parameters(
    (lambda: random_crop(padding=-1), 'padding=-1'),
    (lambda: random_crop(size=-2), 'size=-2'),
    (lambda: random_crop(padding=1, size=11)(KEY, images()), 'size=11'),
    (lambda: normalise(std=(0.0,)), 'std=0'),
    (
      lambda: normalise(mean=(0.0, 1.0))(KEY, images()),
      'mean to have 1 value or one for each of 3',
    ),
  )
  def test_bad_settings(self, build, message):
    with self.assertRaisesRegex(InvalidInput, message):
      build()

  def test_all_are_registered(self):
    for name in ('random_crop', 'random_flip', 'standardise', 'normalise'):
      self.assertIn(name, PREPROCESS)


if __name__ == '__main__':
  absltest.main()
