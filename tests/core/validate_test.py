"""Checks of input: what passes, and messages that name the value."""

import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext import core
from fedjax_ext.core import validate


class ValidateTest(parameterized.TestCase):
  def assert_message(self, message, function, *args):
    with self.assertRaises(core.InvalidInput) as caught:
      function(*args)
    self.assertEqual(str(caught.exception), message)

  def test_invalid_input_is_a_value_error(self):
    self.assertTrue(issubclass(core.InvalidInput, ValueError))
    self.assertIs(core.InvalidInput, validate.InvalidInput)

  @parameterized.parameters(True, 1, 'text', np.bool_(True))
  def test_check_passes(self, condition):
    self.assertIsNone(validate.check(condition, 'never seen'))

  @parameterized.parameters(False, 0, '', None, np.bool_(False))
  def test_check_raises_its_message(self, condition):
    self.assert_message(
      'Expected 50% of {it}.',
      validate.check,
      condition,
      'Expected 50% of {it}.',
    )

  def test_at_least(self):
    self.assertIsNone(validate.at_least('batch_size', 1, 1))
    self.assertIsNone(validate.at_least('rate', 0.5, 0))
    self.assert_message(
      'Expected batch_size >= 1, got batch_size=0.',
      validate.at_least,
      *('batch_size', 0, 1),
    )

  def test_above(self):
    self.assertIsNone(validate.above('rate', 1e-9, 0))
    self.assert_message(
      'Expected rate > 0, got rate=0.0.', validate.above, 'rate', 0.0, 0
    )

  def test_between(self):
    for value in (0, 0.5, 1):
      self.assertIsNone(validate.between('fraction', value, 0, 1))
    for value in (-0.5, 1.5):
      self.assert_message(
        f'Expected 0 <= fraction <= 1, got fraction={value}.',
        validate.between,
        *('fraction', value, 0, 1),
      )

  def test_one_of(self):
    self.assertIsNone(validate.one_of('split', 'train', {'train': 1}))
    self.assertIsNone(validate.one_of('depth', 18, (18, 34)))
    self.assert_message(
      'Expected split to be one of train, test, got split=tset.',
      validate.one_of,
      *('split', 'tset', ['train', 'test']),
    )
    self.assert_message(
      'Expected depth to be one of 18, 34, got depth=50.',
      validate.one_of,
      *('depth', 50, (18, 34)),
    )

  def test_not_a_number_never_passes(self):
    nan = float('nan')
    for function, limits in (
      (validate.at_least, (0,)),
      (validate.above, (0,)),
      (validate.between, (0, 1)),
    ):
      with self.assertRaisesRegex(core.InvalidInput, 'rate=nan'):
        function('rate', nan, *limits)


if __name__ == '__main__':
  absltest.main()
