"""Arrays as bytes: round trips, bytes made elsewhere, broken ones."""

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import InvalidInput
from fedjax_ext.data import serialization

# {'y': int32 [2]} as FedJAX wrote it, by hand from the format: a map of one,
# 'y', an extension of type 1 with [[2], 'int32', 8 bytes].
GOLDEN = b'\x81\xa1y' + (
  b'\xc7\x13\x01' + b'\x93\x91\x02\xa5int32\xc4\x08' + b'\1\0\0\0\2\0\0\0'
)
# features { feature { key: "a", value { int64_list { value: [1, 300] } } } },
# packed, and one tag for each value.
PACKED = b'\x0a\x0e\x0a\x0c\x0a\x01a\x12\x07\x1a\x05\x0a\x03\x01\xac\x02'
UNPACKED = b'\x0a\x0f\x0a\x0d\x0a\x01a\x12\x08\x1a\x06\x08\x01\x08\xac\x02'
UNPACKED = UNPACKED.replace(b'\x1a\x06', b'\x1a\x05').replace(
  b'\x0a\x0f\x0a\x0d\x0a\x01a\x12\x08', b'\x0a\x0e\x0a\x0c\x0a\x01a\x12\x07'
)


class PackArraysTest(parameterized.TestCase):
  @parameterized.parameters(
    (np.arange(6, dtype=np.uint8).reshape(2, 3),),
    (np.zeros((0, 4), np.float32),),
    (np.array([[True], [False]]),),
    (np.arange(3, dtype=ml_dtypes.bfloat16),),
    (np.arange(12.0).reshape(3, 4).T,),
    (np.float32(2.5),),
  )
  def test_round_trip(self, x):
    got = serialization.unpack_arrays(serialization.pack_arrays({'x': x}))['x']
    np.testing.assert_array_equal(got, x)
    self.assertEqual((got.dtype, got.shape), (x.dtype, x.shape))

  def test_text(self):
    """Text comes back as its bytes, which is what FedJAX has."""
    for x in (
      np.array(['é', 'b']),
      np.array(['é', 'b'], object),
      np.array(['é'.encode(), b'b'], object),
    ):
      got = serialization.unpack_arrays(serialization.pack_arrays({'x': x}))
      self.assertEqual(got['x'].tolist(), ['é'.encode(), b'b'])
      self.assertEqual(got['x'].dtype, object)

  def test_plain_values(self):
    record = {'client': 'me', 'n': 3, 'x': 0.5, 'b': b'\xff'}
    packed = serialization.pack_arrays(record)
    self.assertEqual(serialization.unpack_arrays(packed), record)

  def test_only(self):
    packed = serialization.pack_arrays({'a': np.zeros(2), 'b': np.ones(2)})
    self.assertEqual(
      list(serialization.unpack_arrays(packed, only=('b',))), ['b']
    )

  def test_bytes_of_fedjax(self):
    got = serialization.unpack_arrays(GOLDEN)['y']
    np.testing.assert_array_equal(got, np.array([1, 2], np.int32))
    packed = serialization.pack_arrays({'y': np.array([1, 2], np.int32)})
    self.assertEqual(packed, GOLDEN)

  @parameterized.parameters(
    b'', b'\xff', b'hello', GOLDEN[:-1], b'\x90', GOLDEN.replace(b'32', b'99'),
    GOLDEN.replace(b'\x13\x01', b'\x13\x07'),
    GOLDEN.replace(b'\x91\x02', b'\x91\x03'),
  )  # fmt: skip
  def test_broken(self, data):
    with self.assertRaisesRegex(InvalidInput, 'Expected MessagePack arrays: .'):
      serialization.unpack_arrays(data)

  @parameterized.parameters(
    (np.array([1, 'a'], object),),
    (np.array(['2020-01-01'], 'M8[D]'),),
    (np.zeros(2, [('a', int)]),),
  )
  def test_not_arrays_of_numbers(self, x):
    with self.assertRaisesRegex(InvalidInput, "array 'x' to hold numbers"):
      serialization.pack_arrays({'x': x})


class ExampleTest(parameterized.TestCase):
  @parameterized.parameters(PACKED, UNPACKED)
  def test_wire_format(self, data):
    """Lists in either of the two encodings."""
    got = serialization.unpack_example(data)
    self.assertEqual(got['a'].tolist(), [1, 300])
    self.assertEqual(got['a'].dtype, np.int64)

  def test_round_trip(self):
    packed = serialization.pack_example(
      {'i': [-1, 2**40], 'f': np.float32([0.1]), 'b': b'\xff', 't': ['é', 'b']}
    )
    got = serialization.unpack_example(packed)
    self.assertEqual(got['i'].tolist(), [-1, 2**40])
    self.assertEqual((got['f'].shape, got['f'].dtype), ((), np.float32))
    self.assertEqual((got['b'].item(), got['b'].dtype), (b'\xff', object))
    self.assertEqual(got['t'].tolist(), ['é'.encode(), b'b'])

  def test_stacked(self):
    packed = [
      serialization.pack_example({'label': i, 'x': [i, i + 1], 't': f'{i}'})
      for i in range(3)
    ]
    got = serialization.unpack_examples(packed)
    self.assertEqual(got['label'].tolist(), [0, 1, 2])
    self.assertEqual(got['x'].shape, (3, 2))
    self.assertEqual(got['t'].tolist(), [b'0', b'1', b'2'])

  @parameterized.parameters(
    ({'x': [1, 2, 3]}, r"'x' .*int64\[2\]', 'int64\[3\]"),
    ({'x': [0.5, 1.5]}, r'float32\[2\]'),
    ({'y': 1}, "'x' .*none"),
  )
  def test_stacked_of_other_types(self, other, message):
    packed = [serialization.pack_example(e) for e in ({'x': [1, 2]}, other)]
    with self.assertRaisesRegex(InvalidInput, message):
      serialization.unpack_examples(packed)

  @parameterized.parameters(b'\xff', b'hello', PACKED[:-3])
  def test_broken(self, data):
    with self.assertRaisesRegex(InvalidInput, r'Expected a tf\.train\.Example'):
      serialization.unpack_example(data)


if __name__ == '__main__':
  absltest.main()
