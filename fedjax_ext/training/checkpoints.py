"""Checkpoints of a run: orbax, asynchronous, verified, with fallback.

Layout under the workdir: checkpoints/<round>/ by orbax, client_states/ with the
rows of the `ClientStates` bank. A checkpoint holds the server state, the bank's
index and a digest by which an unreadable or altered one is recognised.
"""

import hashlib
import logging
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_ext.core import ClientStates, InvalidInput

_LOG = logging.getLogger(__name__)

PyTree = Any


class WriteError(OSError):
  """Something could not be written; what was written before is intact."""


class Restored(NamedTuple):
  """A restored run: round (scalar), pytrees, and the extra of `save`."""

  round: int
  server_state: PyTree
  client_states: ClientStates | None
  extra: dict[str, Any]


def digest(tree: PyTree) -> str:
  """SHA-256 (hex) over the bytes of all leaves of a pytree, in order."""
  sha = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    leaf = np.asarray(leaf)
    sha.update(f'{leaf.dtype.str}{leaf.shape}'.encode())
    sha.update(np.ascontiguousarray(leaf).tobytes())
  return sha.hexdigest()


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(self, workdir: pathlib.Path, *, keep: int = 2):
    """Opens or makes workdir/checkpoints.

    Args:
      workdir: the run's folder.
      keep: how many to keep, at least 2: a fallback must remain while the
        newest is being written.
    """
    import orbax.checkpoint as ocp  # slow to import

    if keep < 2:
      raise InvalidInput(f'Expected keep_checkpoints >= 2, got {keep}.')
    self._ocp = ocp
    self._workdir = workdir
    self._keep = keep
    self._manager = self._open()

  def _open(self) -> Any:
    options = self._ocp.CheckpointManagerOptions(
      max_to_keep=self._keep,
      enable_async_checkpointing=True,
      create=True,
      cleanup_tmp_directories=True,  # what a killed run left half written
    )
    path = (self._workdir / 'checkpoints').absolute()
    return self._ocp.CheckpointManager(path, options=options)

  def save(
    self,
    round: int,
    server_state: PyTree,
    client_states: ClientStates | None,
    extra: dict[str, Any],
  ) -> None:
    """Starts writing a checkpoint; `wait` or the next save finishes it.

    Args:
      round: the round just finished.
      server_state: any pytree of arrays.
      client_states: the bank, or None.
      extra: plain values to get back from `restore`.

    Raises:
      WriteError: this or the previous checkpoint could not be written.
    """
    args = self._ocp.args
    self.wait()
    try:
      items, index = {}, None
      if client_states is not None:
        client_states.keep(set(self._manager.all_steps()))
        index = client_states.snapshot(round)
        items['client_index'] = args.StandardSave({'index': index})
      meta = dict(extra, round=round, digest=digest((server_state, index)))
      items['server_state'] = args.StandardSave({'state': server_state})
      items['meta'] = args.JsonSave(meta)
      self._manager.save(round, args=args.Composite(**items))
    except Exception as error:
      raise WriteError(_write_message('checkpoint', round, error)) from error

  def wait(self) -> None:
    """Waits for a checkpoint being written; raises WriteError if it failed."""
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise WriteError(_write_message('checkpoint', None, error)) from error

  def restore(
    self, server_state: PyTree, client_states: ClientStates | None
  ) -> Restored | None:
    """Restores the newest checkpoint that can be read.

    An unreadable one is named in a warning and moved to
    workdir/unreadable_checkpoints, so its round can be saved again.

    Args:
      server_state: a freshly initialised state, for structure and placement.
      client_states: the empty bank on this workdir, or None.

    Returns:
      What was saved, or None without a readable checkpoint.
    """
    stateful = client_states is not None
    for step, loaded in self._readable(server_state, stateful):
      index, state, meta = loaded
      if client_states is not None:
        indices = {s: self._index(s) for s in self._manager.all_steps()}
        indices[step] = index
        client_states = client_states.restore(index, indices)
      return Restored(step, state, client_states, meta)
    return None

  def _readable(
    self, server_state: PyTree, stateful: bool
  ) -> Iterator[tuple[int, Any]]:
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        yield step, self._load(step, server_state, stateful)
      except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else repr(error)
        _LOG.warning(
          'Checkpoint %s is unreadable (%s); trying the one before.',
          self._path(step),
          reason,
        )
        self._set_aside(step)

  def _load(self, step: int, server_state: PyTree, stateful: bool) -> Any:
    args = self._ocp.args
    abstract = jax.tree.map(
      self._ocp.utils.to_shape_dtype_struct, {'state': server_state}
    )
    loaded = self._manager.restore(
      step,
      args=args.Composite(
        server_state=args.StandardRestore(abstract), meta=args.JsonRestore()
      ),
    )
    state, meta = loaded['server_state']['state'], loaded['meta']
    index = self._index(step) if stateful else None
    if digest((state, index)) != meta['digest']:
      raise ValueError('its content does not match its digest')
    return index, state, meta

  def _index(self, step: int) -> np.ndarray:
    args = self._ocp.args
    loaded = self._manager.restore(
      step, args=args.Composite(client_index=args.StandardRestore())
    )
    return np.asarray(loaded['client_index']['index'], np.int64)

  def _path(self, step: int) -> pathlib.Path:
    return self._workdir / 'checkpoints' / str(step)

  def _set_aside(self, step: int) -> None:
    self._manager.close()
    aside = self._workdir / 'unreadable_checkpoints'
    aside.mkdir(exist_ok=True)
    number = len(list(aside.glob(f'{step}.*')))
    self._path(step).rename(aside / f'{step}.{number}')
    self._manager = self._open()

  def close(self) -> None:
    """Finishes pending writes; raises WriteError if one failed."""
    self.wait()
    self._manager.close()


def _write_message(what: str, round: int | None, error: Exception) -> str:
  of = '' if round is None else f' of round {round}'
  text = str(error).splitlines()[0][:300] if str(error) else repr(error)
  return f'Could not write the {what}{of}: {text}'
