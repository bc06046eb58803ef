"""Arrays as bytes, and back: FedJAX's MessagePack and TensorFlow's Example.

FedJAX's encoding is a MessagePack map of arrays, which are extension types: 1
an array of numbers (shape, name of the dtype, its bytes in C order), 3 a
scalar in the same way, 4 an array of bytes (shape, list of its elements); see
https://github.com/google/fedjax/blob/main/fedjax/core/serialization.py.

`tf.train.Example` is a protocol buffer: a map from names to a list of bytes,
floats or integers; see
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/example/example.proto.

Axis letters: N examples.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fedjax_ext.core import validate

_ARRAY, _SCALAR, _BYTES_ARRAY = 1, 3, 4


def pack_arrays(arrays: Mapping[str, Any]) -> bytes:
  """Encodes {name: array, number, text or bytes} as FedJAX does.

  Arrays of text are kept as arrays of their UTF-8 bytes.

  Raises:
    InvalidInput: a value is none of these.
  """
  import msgpack

  return msgpack.packb(
    {name: _prepared(name, x) for name, x in arrays.items()},
    default=functools.partial(_pack, msgpack),
    strict_types=True,
  )


def _prepared(name: str, x: Any) -> Any:
  if isinstance(x, bytes | str | int | float) and not isinstance(x, np.generic):
    return x
  x = np.asarray(x)
  if x.dtype.kind in 'OSU':
    flat = [v.encode() if isinstance(v, str) else v for v in x.ravel().tolist()]
    validate.check(
      all(isinstance(v, bytes) for v in flat),
      f'Expected array {name!r} to hold numbers, bytes or text, got {x.dtype}.',
    )
    x = np.empty(x.shape, object)
    x.ravel()[:] = flat
  validate.check(
    x.dtype.kind not in 'mM' and x.dtype.names is None,
    f'Expected array {name!r} to hold numbers, bytes or text, got {x.dtype}.',
  )
  return x


def _pack(msgpack: Any, x: np.ndarray) -> Any:
  if x.dtype.kind == 'O':
    content = x.shape, x.ravel().tolist()
    return msgpack.ExtType(_BYTES_ARRAY, msgpack.packb(content))
  code = _ARRAY if x.ndim else _SCALAR
  content = x.shape, x.dtype.name, x.tobytes('C')
  return msgpack.ExtType(code, msgpack.packb(content))


def unpack_arrays(
  data: bytes, *, only: Collection[str] | None = None
) -> dict[str, Any]:
  """Decodes what `pack_arrays` or FedJAX made; arrays are read-only.

  Args:
    data: the bytes.
    only: names to decode; others cost next to nothing. None decodes all.

  Returns:
    {name: array, number, text or bytes}; an array of bytes is of objects.

  Raises:
    InvalidInput: the bytes are something else.
  """
  import msgpack

  try:
    record = msgpack.unpackb(data, ext_hook=msgpack.ExtType, raw=False)
    if not isinstance(record, dict):
      raise ValueError(f'a map was expected, not {type(record).__name__}')
    return {
      name: _unpack(msgpack, x) if isinstance(x, msgpack.ExtType) else x
      for name, x in record.items()
      if only is None or name in only
    }
  except (msgpack.UnpackException, ValueError, TypeError) as error:
    raise validate.InvalidInput(
      f'Expected MessagePack arrays: {error or type(error).__name__}'
    ) from error


def _unpack(msgpack: Any, x: Any) -> np.ndarray:
  shape, *content = msgpack.unpackb(x.data, raw=True)
  if x.code == _BYTES_ARRAY:
    array = np.empty(len(content[0]), object)
    array[:] = content[0]
    return array.reshape(shape)
  if x.code not in (_ARRAY, _SCALAR):
    raise ValueError(f'extension type {x.code} is none of 1, 3, 4')
  name, data = content
  name = name.decode()
  dtype = ml_dtypes.bfloat16 if name == 'bfloat16' else np.dtype(name)
  return np.frombuffer(data, dtype).reshape(shape)


@functools.cache
def _example_class() -> Any:
  """The message class `tf.train.Example`, made without TensorFlow."""
  from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
  )

  field = descriptor_pb2.FieldDescriptorProto
  file = descriptor_pb2.FileDescriptorProto(
    name='fedjax_ext/example.proto', package='fedjax_ext', syntax='proto3'
  )

  def add(message: str, *fields: tuple[str, int, int, str]) -> None:
    made = file.message_type.add(name=message)
    for number, (name, kind, label, of) in enumerate(fields, 1):
      made.field.add(
        name=name,
        number=number,
        type=kind,
        label=label,
        type_name=f'.fedjax_ext.{of}' if of else None,
      )

  one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
  add('BytesList', ('value', field.TYPE_BYTES, many, ''))
  add('FloatList', ('value', field.TYPE_FLOAT, many, ''))
  add('Int64List', ('value', field.TYPE_INT64, many, ''))
  add(
    'Feature',
    ('bytes_list', field.TYPE_MESSAGE, one, 'BytesList'),
    ('float_list', field.TYPE_MESSAGE, one, 'FloatList'),
    ('int64_list', field.TYPE_MESSAGE, one, 'Int64List'),
  )
  add(  # a map, as it is on the wire
    'Entry',
    ('key', field.TYPE_STRING, one, ''),
    ('value', field.TYPE_MESSAGE, one, 'Feature'),
  )
  add('Features', ('feature', field.TYPE_MESSAGE, many, 'Entry'))
  add('Example', ('features', field.TYPE_MESSAGE, one, 'Features'))
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(
    pool.FindMessageTypeByName('fedjax_ext.Example')
  )


def pack_example(features: Mapping[str, Any]) -> bytes:
  """Encodes {name: array, number, text or bytes} as a `tf.train.Example`.

  Shapes are not kept: an array becomes the list of its values in C order.
  """
  message = _example_class()()
  for name, x in features.items():
    flat = np.asarray(x, object if isinstance(x, bytes) else None).ravel()
    entry = message.features.feature.add(key=name)
    if flat.dtype.kind == 'f':
      entry.value.float_list.value.extend(flat.tolist())
    elif flat.dtype.kind in 'biu':
      entry.value.int64_list.value.extend(flat.tolist())
    else:
      values = [v.encode() if isinstance(v, str) else v for v in flat.tolist()]
      entry.value.bytes_list.value.extend(values)
  return message.SerializeToString()


def unpack_example(data: bytes) -> dict[str, np.ndarray]:
  """Decodes a `tf.train.Example`.

  Returns:
    {name: float32, int64 or object (bytes) array}: [] where the list has one
    value, since the format keeps no shapes, else [number of values].

  Raises:
    InvalidInput: the bytes are something else.
  """
  from google.protobuf import message as message_lib

  message = _example_class()()
  try:
    message.ParseFromString(data)
  except message_lib.DecodeError as error:
    raise validate.InvalidInput(
      f'Expected a tf.train.Example: {error}'
    ) from error
  return {e.key: _values(e.value) for e in message.features.feature}


def _values(feature: Any) -> np.ndarray:
  if feature.HasField('int64_list'):
    values = np.array(list(feature.int64_list.value), np.int64)
  elif feature.HasField('float_list'):
    values = np.array(list(feature.float_list.value), np.float32)
  else:
    values = np.empty(len(feature.bytes_list.value), object)
    values[:] = list(feature.bytes_list.value)
  return values.reshape(()) if len(values) == 1 else values


def unpack_examples(data: Sequence[bytes]) -> dict[str, np.ndarray]:
  """Decodes `tf.train.Example`s with the same features, {name: [N, ...]}.

  Raises:
    InvalidInput: a feature is absent, or its number of values or kind differs.
  """
  examples = [unpack_example(x) for x in data]
  result = {}
  for name in sorted(set().union(*examples)):
    found = {
      f'{e[name].dtype}{list(e[name].shape)}' if name in e else 'none'
      for e in examples
    }
    validate.check(
      len(found) == 1,
      f'Expected feature {name!r} of one type, got {sorted(found)}.',
    )
    result[name] = np.stack([e[name] for e in examples])
  return result
