"""Functions named on the command line: `resnet8:norm=batch,width=32`.

A flag names a function, one of a registry or any importable one
(`my_data.load`), and sets its keyword-only arguments after a colon. So a new
data source, partitioner, model or preprocessing step needs no flag of its own
and no edit outside of its file.
"""

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from fedjax_ext.core import InvalidInput, validate

_BOOLS = {'true': True, '1': True, 'false': False, '0': False}


def resolve(flag: str, text: str, registry: Mapping[str, Callable]) -> Callable:
  """The function that a flag's text names, before its colon.

  Args:
    flag: name of the flag, for messages.
    text: 'name', 'name:key=value,key=value', or 'module.function:...'.
    registry: known functions by name.

  Raises:
    InvalidInput: nothing has that name.
  """
  name = text.partition(':')[0].strip()
  if name in registry:
    return registry[name]
  module, _, function = name.rpartition('.')
  validate.check(
    bool(module),
    f'Expected {flag} to be one of {sorted(registry)}, or MODULE.FUNCTION, got '
    f'{flag}={name}.',
  )
  try:
    found = getattr(importlib.import_module(module), function, None)
  except ImportError as error:
    raise InvalidInput(
      f'Expected {flag}={name} to be importable: {error}.'
    ) from error
  validate.check(
    callable(found),
    f'Expected a function {function} in module {module}, got {flag}={name}.',
  )
  return found


def arguments(
  flag: str, text: str, function: Callable, *, reserved: tuple[str, ...] = ()
) -> dict[str, Any]:
  """The keyword arguments after the colon, typed as the function declares.

  Numbers and bools are written plainly; a tuple's items stand between slashes
  (`hidden=200/100`).

  Args:
    flag: name of the flag, for messages.
    text: as for `resolve`.
    function: what will be called.
    reserved: arguments that other flags set.

  Raises:
    InvalidInput: an argument is unknown or not of its type.
  """
  name, _, rest = text.partition(':')
  known = {
    key: hint
    for key, hint in _settings(function).items()
    if key not in reserved
  }
  result: dict[str, Any] = {}
  for item in filter(None, (part.strip() for part in rest.split(','))):
    key, equals, value = item.partition('=')
    validate.check(
      bool(equals) and key in known and key not in result,
      f'Expected {flag}={name}:KEY=VALUE,... with each KEY once of '
      f'{sorted(known)}, got {item!r}.',
    )
    result[key] = _parse(flag, key, value, known[key])
  return result


def describe(function: Callable, *, reserved: tuple[str, ...] = ()) -> str:
  """'name=default' of each argument that may be set, for help and messages."""
  parameters = inspect.signature(function).parameters
  return ','.join(
    key
    if parameters[key].default is inspect.Parameter.empty
    else f'{key}={_written(parameters[key].default)}'
    for key in _settings(function)
    if key not in reserved
  )


def describe_all(
  registry: Mapping[str, Callable], *, reserved: tuple[str, ...] = ()
) -> str:
  """The functions of a registry with their arguments, for a flag's help."""
  described = {
    name: describe(function, reserved=reserved)
    for name, function in registry.items()
  }
  return '\n'.join(
    f'  {name}:{text}' if text else f'  {name}'
    for name, text in described.items()
  )


def takes(function: Callable, name: str) -> bool:
  """Whether a function has an argument of that name, a scalar bool."""
  return name in _settings(function)


def missing(function: Callable, given: Mapping[str, Any]) -> list[str]:
  """Arguments without a default that are not given."""
  parameters = inspect.signature(function).parameters
  return [
    name
    for name in _settings(function)
    if parameters[name].default is inspect.Parameter.empty and name not in given
  ]


def _settings(function: Callable) -> dict[str, Any]:
  """Keyword-only arguments and their types."""
  hints = typing.get_type_hints(function)
  return {
    name: hints.get(name, str)
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
  }


def _written(value: Any) -> str:
  if isinstance(value, (tuple, list)):
    return '/'.join(map(str, value))
  return str(value)


def _parse(flag: str, key: str, text: str, hint: Any) -> Any:
  kinds = [hint]
  if isinstance(hint, types.UnionType):
    kinds = [k for k in typing.get_args(hint) if k is not type(None)]
  if typing.get_origin(kinds[0]) in (tuple, list):
    item = (*typing.get_args(kinds[0]), str)[0]
    return tuple(
      _parse(flag, key, part, item) for part in filter(None, text.split('/'))
    )
  try:
    if kinds[0] is bool:
      return _BOOLS[text.lower()]
    return kinds[0](text) if kinds[0] in (int, float) else text
  except (KeyError, ValueError) as error:
    raise InvalidInput(
      f'Expected {key} of {flag} to be {kinds[0].__name__}, got {key}={text}.'
    ) from error
