"""Functions named on the command line: `resnet8:norm=batch,width=32`.

A flag names a function, one of a registry or any importable one
(`my_data.load`), and sets its keyword-only arguments after a colon. So a new
data source, partitioner, model or preprocessing step needs no flag of its own
and no edit outside of its file.
"""

import hashlib
import importlib
import inspect
import pathlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

from fedjax_ext.core import InvalidInput, validate

_SEQUENCES = (tuple, list, Sequence)
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
  except (ImportError, TypeError, ValueError) as error:
    raise InvalidInput(
      f'Expected {flag}={name} to be importable: {error}.'
    ) from error
  validate.check(
    callable(found),
    f'Expected a function {function} in module {module}, got {flag}={name}.',
  )
  return found


def source_digest(
  flag: str, text: str, registry: Mapping[str, Callable]
) -> str:
  """SHA-256 (hex) of the file of a function that is not in the registry, or ''.

  So that a run notices when a user's function has changed.
  """
  if text.partition(':')[0].strip() in registry:
    return ''
  function = resolve(flag, text, registry)
  try:
    source = pathlib.Path(inspect.getsourcefile(function)).read_bytes()
  except (OSError, TypeError):
    return ''
  return hashlib.sha256(source).hexdigest()


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
      f'{sorted(known)} (its keyword-only arguments; items of a tuple stand '
      f'between slashes, 64/32), got {item!r}.',
    )
    result[key] = _parse(flag, key, value, known[key])
  return result


def describe(function: Callable, *, reserved: tuple[str, ...] = ()) -> str:
  """'name=default' of each argument that may be set, for help and messages."""
  parameters = inspect.signature(function).parameters
  return ', '.join(
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
    f'  {name}: {text}' if text else f'  {name}'
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
  """Keyword-only arguments and their types.

  Without an annotation the default's type counts.
  """
  try:
    hints = typing.get_type_hints(function)
  except Exception:  # of a callable object, or names that are not defined
    hints = {}
  return {
    name: hints.get(name, _type_of(parameter.default))
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
  }


def _type_of(default: Any) -> Any:
  if default is inspect.Parameter.empty or default is None:
    return str
  return type(default)


def _written(value: Any) -> str:
  if isinstance(value, (tuple, list)):
    return '/'.join(map(str, value))
  return str(value)


def _parse(flag: str, key: str, text: str, hint: Any) -> Any:
  kind = hint
  if isinstance(hint, types.UnionType) or typing.get_origin(hint) is Union:
    kinds = [k for k in typing.get_args(hint) if k is not type(None)]
    if len(kinds) < len(typing.get_args(hint)) and text.lower() == 'none':
      return None
    kind = kinds[0]
  if kind in (tuple, list) or typing.get_origin(kind) in _SEQUENCES:
    item = (*typing.get_args(kind), str)[0]
    parts = filter(None, text.split('/'))
    return tuple(_parse(flag, key, part, item) for part in parts)
  if typing.get_origin(kind) is Literal:
    validate.one_of(f'{key} of {flag}', text, typing.get_args(kind))
    return text
  validate.check(
    kind in (int, float, bool, str),
    f'Expected {key} of {flag} to be annotated as int, float, bool, str, a '
    f'tuple or Literal of these, got {kind}.',
  )
  try:
    if kind is bool:
      return _BOOLS[text.lower()]
    return kind(text)
  except (KeyError, ValueError) as error:
    raise InvalidInput(
      f'Expected {key} of {flag} to be {kind.__name__}, got {key}={text}.'
    ) from error


def check_complete(
  flag: str,
  text: str,
  function: Callable,
  settings: dict[str, Any],
  given: tuple[str, ...],
) -> None:
  """Checks that nothing that a function needs is missing.

  Args:
    flag: name of the flag, for messages.
    text: as for `resolve`.
    function: what will be called.
    settings: its arguments by name.
    given: arguments that come from elsewhere.

  Raises:
    InvalidInput: an argument is missing.
  """
  left = set(missing(function, settings)) - set(given)
  validate.check(
    not left,
    f'Expected {flag}={text} with {", ".join(sorted(left))}; settings: '
    f'{describe(function, reserved=given)}.',
  )


def check_type(flag: str, text: str, got: Any, kind: type) -> None:
  """Checks what a function returned; raises InvalidInput."""
  validate.check(
    isinstance(got, kind),
    f'Expected {flag}={text} to return {kind.__name__}, got '
    f'{type(got).__name__}.',
  )


def check_takes(flag: str, text: str, function: Callable, *names: str) -> None:
  """Checks that a function has arguments of those names; or InvalidInput."""
  validate.check(
    all(takes(function, name) for name in names),
    f'Expected {flag}={text} to be a function with keyword-only '
    f'{" and ".join(names)}.',
  )
