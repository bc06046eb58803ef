"""Feature skews: turned and noisy images, by client."""

import pathlib
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import skew
from fedjax_ext.data.lazy import Reader, RecordType, lazy_columns
from fedjax_ext.data.skew import SKEWS, noise_skew, rotate_skew, skew_groups


def make_images(shape, dtype, seed=0):
  """Random images of uint8 0..255 or floats in [0, 1)."""
  rng = np.random.default_rng(seed)
  if dtype == np.uint8:
    return rng.integers(0, 256, shape).astype(np.uint8)
  return rng.random(shape).astype(dtype)


def lazy(image):
  """The images as a column that is read row by row, and the rows it read."""
  asked = []

  def read(rows):
    asked.extend(rows.tolist())
    return {'image': image[rows]}

  types = {'image': RecordType(image.shape[1:], image.dtype)}
  return lazy_columns(Reader(read, types, len(image)))['image'], asked


class AnySkewTest(parameterized.TestCase):
  @settings(deadline=None, max_examples=60)
  @given(
    st.sampled_from(sorted(SKEWS)),
    st.integers(0, 12),
    st.integers(1, 5),
    st.sampled_from([np.uint8, np.float16, np.float32, np.float64]),
    st.sampled_from([(4, 4), (5, 5, 1), (3, 4, 3)]),
    st.integers(0, 2**31),
  )
  def test_like_the_image(self, name, rows, num_clients, dtype, shape, seed):
    """Shape, type, unowned rows and the input stay; seeded."""
    image = make_images((rows, *shape), dtype)
    before = image.copy()
    owner = np.random.default_rng(seed).integers(-1, num_clients, rows)
    run = lambda x: SKEWS[name](x, owner, num_clients=num_clients, seed=seed)
    got = run(image)
    self.assertEqual((got.shape, got.dtype), (image.shape, image.dtype))
    self.assertTrue(np.isfinite(got).all())
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(got[owner < 0], image[owner < 0])
    np.testing.assert_array_equal(got, run(image))
    np.testing.assert_array_equal(got, run(lazy(image)[0]))

  @parameterized.parameters(*SKEWS)
  def test_pieces_and_memory_maps(self, name):
    """Small pieces and memory maps give the same bits; rows are read once."""
    image = make_images((50, 6, 6, 1), np.float32)
    owner = np.random.default_rng(1).integers(-1, 7, 50)
    run = lambda x: SKEWS[name](x, owner, num_clients=7, seed=3)
    want = run(image)
    self.enter_context(mock.patch.object(skew, '_PIECE_BYTES', 3 * 36 * 4))
    column, asked = lazy(image)
    np.testing.assert_array_equal(run(column), want)
    self.assertEqual(sorted(asked), list(range(50)))
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'image.npy'
      np.save(path, image)
      got = run(np.load(path, mmap_mode='r'))
    self.assertIs(type(got), np.ndarray)
    np.testing.assert_array_equal(got, want)

  @parameterized.parameters(*SKEWS)
  def test_bad_input(self, name):
    """Shapes, types and owners that do not fit are named."""
    image, owner = np.zeros((3, 4, 4), np.float32), np.zeros(3, int)
    for message, changed in (
      (r'int32\[3, 4, 4\]', {'image': image.astype(np.int32)}),
      (r'float32\[3, 16\]', {'image': image.reshape(3, 16)}),
      ('Expected 3 owners, got 2', {'owner': owner[:2]}),
      (r'Expected owners in -1\.\.1, got 0\.\.2', {'owner': np.arange(3)}),
      (r'got -2\.\.', {'owner': owner - 2}),
      ('num_clients=0', {'num_clients': 0}),
    ):
      given = {'image': image, 'owner': owner, 'num_clients': 2} | changed
      with self.assertRaisesRegex(InvalidInput, message):
        SKEWS[name](**given, seed=0)


class RotateTest(parameterized.TestCase):
  @parameterized.product(
    dtype=[np.uint8, np.float32], shape=[(5, 5), (6, 6, 3)]
  )
  def test_quarter_turns_are_exact(self, dtype, shape):
    """Client c is turned by c mod 4 quarters, counter-clockwise."""
    image = make_images((9, *shape), dtype)
    owner = np.arange(9)
    got = rotate_skew(image, owner, num_clients=9, seed=0, num_groups=4)
    for c in range(9):
      np.testing.assert_array_equal(got[c], np.rot90(image[c], c % 4))

  def test_by_hand(self):
    got = rotate_skew(
      np.array([[[1, 2], [3, 4]]] * 2, np.uint8),
      np.array([0, 1]),
      num_clients=2,
      seed=0,
    )
    self.assertEqual(got.tolist(), [[[1, 2], [3, 4]], [[2, 4], [1, 3]]])

  def test_half_turn_of_oblong_images(self):
    image = make_images((2, 3, 5), np.float32)
    got = rotate_skew(
      image, np.array([0, 1]), num_clients=2, seed=0, num_groups=2
    )
    np.testing.assert_array_equal(got[1], image[1, ::-1, ::-1])

  @parameterized.parameters(3, 5, 8)
  def test_other_angles(self, num_groups):
    """As scipy turns each image on its own."""
    image = make_images((num_groups, 7, 7), np.float32)
    got = rotate_skew(
      image,
      np.arange(num_groups),
      num_clients=num_groups,
      seed=0,
      num_groups=num_groups,
    )
    for g in range(num_groups):
      want = ndimage.rotate(
        image[g], 360 * g / num_groups, reshape=False, order=1, mode='nearest'
      )
      np.testing.assert_allclose(got[g], want, atol=1e-5)

  def test_uint8_is_rounded(self):
    """A bilinear turn of bytes is that of floats, rounded; constants stay."""
    image = make_images((2, 8, 8), np.uint8)
    turn = lambda x: rotate_skew(
      x, np.array([0, 1]), num_clients=2, seed=0, num_groups=8
    )
    np.testing.assert_array_equal(
      turn(image), np.rint(turn(image.astype(np.float32))).astype(np.uint8)
    )
    flat = np.full((2, 8, 8), 255, np.uint8)
    np.testing.assert_array_equal(turn(flat), flat)

  def test_one_group_changes_nothing(self):
    image = make_images((4, 3, 3), np.float32)
    got = rotate_skew(image, np.arange(4), num_clients=4, seed=0, num_groups=1)
    np.testing.assert_array_equal(got, image)

  def test_bad_number_of_groups(self):
    with self.assertRaisesRegex(InvalidInput, 'num_groups=0'):
      rotate_skew(
        np.zeros((1, 2, 2)), np.zeros(1), num_clients=1, seed=0, num_groups=0
      )


class NoiseTest(parameterized.TestCase):
  def test_grows_with_the_client(self):
    """Mean 0 and standard deviation level * (c + 1) / C."""
    image = np.zeros((4000, 5, 5), np.float32)
    owner = np.arange(4000) % 4
    got = noise_skew(image, owner, num_clients=4, seed=0, level=2.0)
    for c in range(4):
      values = got[owner == c]
      self.assertAlmostEqual(values.std(), 2 * (c + 1) / 4, delta=0.03)
      self.assertAlmostEqual(values.mean(), 0, delta=0.04)

  def test_bytes_are_scaled_and_clipped(self):
    """level is a share of 255; no value wraps around."""
    rows = np.repeat([0, 128, 255], 500)
    image = np.broadcast_to(rows[:, None, None], (1500, 6, 6)).astype(np.uint8)
    got = noise_skew(
      image, np.zeros(1500, int), num_clients=1, seed=0, level=0.1
    )
    self.assertAlmostEqual(got[rows == 128].std(), 25.5, delta=0.6)
    self.assertAlmostEqual(got[rows == 128].mean(), 128, delta=0.6)
    self.assertLess(got[rows == 0].max(), 160)
    self.assertGreater(got[rows == 255].min(), 95)
    self.assertGreater((got[rows == 0] == 0).mean(), 0.45)

  def test_clients_do_not_matter_to_each_other(self):
    """Without the others, and at other places, a client's noise is the same."""
    image = make_images((30, 4, 4), np.float64)
    owner = np.arange(30) % 3
    run = lambda x, o, seed=7: noise_skew(x, o, num_clients=3, seed=seed)
    both = run(image, owner)
    alone = run(image[owner == 1], np.ones(10, int))
    np.testing.assert_array_equal(both[owner == 1], alone)
    noise = both - image
    self.assertFalse(np.array_equal(noise[owner == 0], noise[owner == 1] / 2))
    self.assertFalse(np.array_equal(both, run(image, owner, seed=8)))

  def test_no_level_changes_nothing(self):
    image = make_images((4, 3, 3), np.uint8)
    got = noise_skew(image, np.arange(4), num_clients=4, seed=0, level=0.0)
    np.testing.assert_array_equal(got, image)

  @parameterized.parameters(-0.1, float('nan'), float('inf'))
  def test_bad_level(self, level):
    with self.assertRaisesRegex(InvalidInput, f'level={level}'):
      noise_skew(
        np.zeros((1, 2, 2)), np.zeros(1), num_clients=1, seed=0, level=level
      )


class GroupsTest(absltest.TestCase):
  def test_by_hand(self):
    of = lambda name: skew_groups(name, num_clients=6, num_groups=3).tolist()
    self.assertEqual(of('rotate'), [0, 1, 2, 0, 1, 2])
    self.assertEqual(of('noise'), [0, 0, 1, 1, 2, 2])

  def test_bad_input(self):
    for message, name, groups in (
      ('skew=blur', 'blur', 2),
      ('num_groups=0', 'noise', 0),
    ):
      with self.assertRaisesRegex(InvalidInput, message):
        skew_groups(name, num_clients=2, num_groups=groups)


if __name__ == '__main__':
  absltest.main()
