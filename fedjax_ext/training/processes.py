"""What a run of many processes has to agree on.

Every process runs the same program on its own devices. The first one writes the
workdir; each other one keeps what it writes, its copy of the clients' states
among it, in workdir/process_<number>. Checkpoints are common: the workdir has
to be on a disk that all processes see.
"""

import pathlib
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from fedjax_ext.core import InvalidInput

T = TypeVar('T')


def is_first() -> bool:
  """Whether this process writes the workdir and talks."""
  return jax.process_index() == 0


def own_folder(workdir: pathlib.Path) -> pathlib.Path:
  """Where this process writes."""
  if is_first():
    return workdir
  return workdir / f'process_{jax.process_index()}'


def agree(prepare: Callable[[], T]) -> T:
  """Runs a preparation; if it fails in one process, it fails in all of them.

  Without this the others would wait for the one that failed.

  Raises:
    InvalidInput: it failed in another process; what failed here is raised as
      it is.
  """
  if jax.process_count() == 1:
    return prepare()
  result, error = None, None
  try:
    result = prepare()
  except Exception as problem:
    error = problem
  failed = multihost_utils.process_allgather(np.array(error is not None))
  if error is not None:
    raise error
  if failed.any():
    numbers = np.flatnonzero(failed).tolist()
    raise InvalidInput(f'Another process could not start: {numbers}.')
  return result


def largest(value: int) -> int:
  """The largest value (a scalar) that any process has."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.process_allgather(np.array(value)).max())


def wait_for_all(name: str) -> None:
  """Returns when every process has come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
