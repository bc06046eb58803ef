"""Checkpoints of a run: orbax, asynchronous, verified, with fallback.

Layout under the workdir: checkpoints/<round>/ by orbax, client_states/ with the
rows of the `ClientStates` bank. A checkpoint holds the server state, the bank's
index and a digest by which an unreadable or altered one is recognised; the rows
themselves are not covered by it.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_ext.core import ClientStates, InvalidInput
from fedjax_ext.training import processes

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
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    leaf = np.asarray(leaf)
    sha.update(f'{leaf.dtype.str}{leaf.shape}'.encode())
    sha.update(np.ascontiguousarray(leaf).tobytes())
  return sha.hexdigest()


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(self, workdir: pathlib.Path, *, keep: int = 2):
    """Opens or makes workdir/checkpoints.

    Orbax takes seconds to import: a thread does that while a new run compiles.

    Args:
      workdir: the run's folder.
      keep: how many to keep, at least 2: a fallback must remain while the
        newest is being written.
    """
    if keep < 2:
      raise InvalidInput(f'Expected keep_checkpoints >= 2, got {keep}.')
    self._workdir = workdir
    self._keep = keep
    self._is_new = not self._path(0).parent.is_dir()
    self._begin_to_open()

  def _begin_to_open(self) -> None:
    thread = concurrent.futures.ThreadPoolExecutor(1)
    self._opening = thread.submit(self._open)
    # Processes meet while they open, which no thread may do beside us.
    thread.shutdown(wait=jax.process_count() > 1)

  @property
  def _manager(self) -> Any:
    return self._opening.result()

  @property
  def _ocp(self) -> Any:
    import orbax.checkpoint as ocp

    return ocp

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
    self._is_new = False
    try:
      items, index = {}, None
      if client_states is not None:
        client_states.keep(set(self._manager.all_steps()))
        index = client_states.snapshot(round)
        items['client_index'] = args.StandardSave({'index': index})
      meta = dict(extra, round=round)
      meta['digest'] = _checkpoint_digest(server_state, index, meta)
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

    An unreadable one before it is named in a warning and moved to
    workdir/unreadable_checkpoints, so its round can be saved again.

    Args:
      server_state: a freshly initialised state, for structure and placement.
      client_states: the empty bank on this workdir, or None.

    Returns:
      What was saved, or None without a checkpoint.

    Raises:
      InvalidInput: there are checkpoints and none can be read.
    """
    if self._is_new:
      return None
    unreadable: dict[int, Exception] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        state, meta = self._load(step, server_state, client_states)
        failed = None
      except Exception as error:
        failed = error
      if processes.largest(failed is not None):
        unreadable[step] = failed or ValueError('another process cannot')
        continue
      for bad, error in unreadable.items():
        self._set_aside(bad, error)
      if client_states is not None:
        indices = self._indices(client_states)
        client_states = client_states.restore(indices[step], indices)
      return Restored(step, state, client_states, meta)
    if unreadable:  # touch nothing: it may be the program, not the files
      reasons = '; '.join(f'{n}: {_reason(e)}' for n, e in unreadable.items())
      raise InvalidInput(
        f'Expected a readable checkpoint in {self._path(0).parent}, got '
        f'{reasons}. Use a fresh --workdir to start again.'
      )
    return None

  def _indices(self, client_states: ClientStates) -> dict[int, np.ndarray]:
    """Indices of all checkpoints; one without a usable index is set aside."""
    indices = {}
    for step in self._manager.all_steps():
      try:
        indices[step] = self._index(step, client_states)
        failed = None
      except Exception as error:
        failed = error
      if processes.largest(failed is not None):
        indices.pop(step, None)
        self._set_aside(step, failed or ValueError('another process cannot'))
    return indices

  def _load(
    self, step: int, server_state: PyTree, client_states: ClientStates | None
  ) -> tuple[PyTree, dict[str, Any]]:
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
    state, meta = loaded['server_state']['state'], dict(loaded['meta'])
    stored = meta.pop('digest')
    index = None if client_states is None else self._index(step, client_states)
    if _checkpoint_digest(state, index, meta) != stored:
      raise ValueError('its content does not match its digest')
    return state, meta

  def _index(self, step: int, client_states: ClientStates) -> np.ndarray:
    args = self._ocp.args
    loaded = self._manager.restore(
      step, args=args.Composite(client_index=args.StandardRestore())
    )
    index = np.asarray(loaded['client_index']['index'], np.int64)
    client_states.check_index(index)
    return index

  def _path(self, step: int) -> pathlib.Path:
    return self._workdir / 'checkpoints' / str(step)

  def _set_aside(self, step: int, error: Exception) -> None:
    """Names an unreadable checkpoint and moves it out of the way."""
    _LOG.warning(
      'Checkpoint %s is unreadable (%s); using the one before.',
      self._path(step),
      _reason(error),
    )
    self._manager.close()
    if processes.is_first():
      aside = self._workdir / 'unreadable_checkpoints'
      aside.mkdir(exist_ok=True)
      number = len(list(aside.glob(f'{step}.*')))
      self._path(step).rename(aside / f'{step}.{number}')
    processes.wait_for_all(f'checkpoint {step} set aside')
    self._begin_to_open()
    self._opening.result()

  def abandon(self) -> None:
    """Finishes what is being written while another error is on its way."""
    try:
      self.close()
    except WriteError as error:
      _LOG.debug('%s', error)

  def close(self) -> None:
    """Finishes pending writes; raises WriteError if one failed."""
    try:
      self.wait()
    finally:
      with contextlib.suppress(Exception):  # `wait` has said what went wrong
        self._manager.close()


def _checkpoint_digest(
  state: PyTree, index: np.ndarray | None, meta: dict[str, Any]
) -> str:
  text = json.dumps(meta, sort_keys=True)
  return digest((state, index, np.frombuffer(text.encode(), np.uint8)))


def _write_message(what: str, round: int | None, error: Exception) -> str:
  of = '' if round is None else f' of round {round}'
  return f'Could not write the {what}{of}: {_reason(error)}'


def _reason(error: Exception) -> str:
  return str(error).splitlines()[0][:200] if str(error) else repr(error)
