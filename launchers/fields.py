"""Reads TOML tables key by key; each mistake becomes one line with its place.

The checks (`text`, `number`, ...) return the value that they accept and raise
ValueError otherwise; `Section.get` adds the file and the key to that error.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

_REQUIRED = object()


class TableError(ValueError):
  """A mistake in what the user asked for; its text is one clear line."""


class Section:
  """One TOML table with the keys that it may have."""

  def __init__(
    self, file: str, where: str, data: Any, known: Sequence[str]
  ) -> None:
    """Refuses anything but a TOML table with `known` keys.

    Args:
      file: what errors call the file.
      where: the dotted place of this table in it, '' for the top.
      data: what stands there.
      known: the keys that it may have.
    """
    self.file = file
    self.where = where
    if not isinstance(data, dict):
      raise TableError(f'{file}: {where}: expected a table, got {data!r}')
    self.data = data
    for key in data:
      if key not in known:
        self.fail(key, f'unknown key; known are {", ".join(known)}')

  @classmethod
  def of(cls, top: 'Section', where: str, data: Any, kind: Any) -> 'Section':
    """Opens the table at `where`; the fields of `kind` are its known keys."""
    known = [field.name for field in dataclasses.fields(kind)]
    return cls(top.file, where, data, known)

  def fail(self, key: str, message: str) -> None:
    """Raises the error of one key."""
    where = f'{self.where}.{key}' if self.where else key
    raise TableError(f'{self.file}: {where}: {message}')

  def get(
    self, key: str, check: Callable[[Any], Any], default: Any = _REQUIRED
  ) -> Any:
    """Returns a key's value, checked; a missing required key is an error."""
    if key not in self.data:
      if default is _REQUIRED:
        self.fail(key, 'missing key')
      return default
    try:
      return check(self.data[key])
    except ValueError as error:
      self.fail(key, str(error))

  def tables(
    self, key: str, kind: Any, default: Any = _REQUIRED
  ) -> list['Section']:
    """Opens every table of an array of tables such as [[rows]]."""
    found = self.get(key, list_of(lambda value: value), default)
    if not found and default is _REQUIRED:
      self.fail(key, f'expected at least one [[{key}]]')
    return [
      Section.of(self, f'{key}[{index}]', value, kind)
      for index, value in enumerate(found)
    ]


def text(value: Any) -> str:
  """Accepts a text that is not empty."""
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f'expected a text, got {value!r}')
  return value


def number(value: Any) -> float:
  """Accepts a finite number."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise ValueError(f'expected a number, got {value!r}')
  if not math.isfinite(value):
    raise ValueError(f'expected a finite number, got {value!r}')
  return float(value)


def positive(value: Any) -> float:
  """Accepts a finite number above 0."""
  if number(value) <= 0:
    raise ValueError(f'expected a number > 0, got {value!r}')
  return float(value)


def whole(value: Any) -> int:
  """Accepts a whole number."""
  if isinstance(value, bool) or not isinstance(value, int):
    raise ValueError(f'expected a whole number, got {value!r}')
  return value


def one_of(names: Sequence[str]) -> Callable[[Any], str]:
  """Returns a check that accepts one of `names`."""

  def check(value: Any) -> str:
    if value not in names:
      raise ValueError(f'expected one of {", ".join(names)}; got {value!r}')
    return value

  return check


def list_of(check: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
  """Returns a check that accepts a list whose items all pass `check`."""

  def check_all(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
      raise ValueError(f'expected a list, got {value!r}')
    return tuple(check(item) for item in value)

  return check_all


def dict_of(keys: Sequence[str] | None) -> Callable[[Any], dict[str, Any]]:
  """Returns a check that accepts a table, with `keys` alone unless None."""

  def check(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
      raise ValueError(f'expected a table, got {value!r}')
    for key in value:
      if keys is not None and key not in keys:
        raise ValueError(f'unknown key {key!r}; known are {", ".join(keys)}')
    return value

  return check
