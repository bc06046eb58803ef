"""Checks of what users hand in, made in Python before anything is traced.

Every message names the value: "Expected batch_size >= 1, got batch_size=0."
"""

from collections.abc import Collection
from typing import Any


class InvalidInput(ValueError):
  """A flag, file, shape or hyper-parameter that cannot work, in one line."""


def check(condition: Any, message: str) -> None:
  """Raises InvalidInput(message) unless the scalar condition holds."""
  if not condition:
    raise InvalidInput(message)


def at_least(name: str, value: Any, minimum: Any) -> None:
  """Checks that the scalar value >= minimum."""
  check(value >= minimum, f'Expected {name} >= {minimum}, got {name}={value}.')


def above(name: str, value: Any, minimum: Any) -> None:
  """Checks that the scalar value > minimum."""
  check(value > minimum, f'Expected {name} > {minimum}, got {name}={value}.')


def between(name: str, value: Any, low: Any, high: Any) -> None:
  """Checks that the scalar low <= value <= high."""
  check(
    low <= value <= high,
    f'Expected {low} <= {name} <= {high}, got {name}={value}.',
  )


def one_of(name: str, value: Any, choices: Collection[Any]) -> None:
  """Checks that the scalar value is one of the choices."""
  check(
    value in choices,
    f'Expected {name} to be one of {", ".join(map(str, choices))}, '
    f'got {name}={value}.',
  )
