"""Downloads of published data sets: resumed, verified, never half in place.

Usage:
  python -m fedjax_ext.data.download federated_emnist --data_dir=DIR

The bytes arrive in PATH.partial, which a later call continues where the server
can (RFC 9110, Range with If-Range); a complete file is renamed to PATH, and its
SHA-256 kept in PATH.sha256 (as `sha256sum` writes it), by which later calls
verify the file. Processes that want the same file wait for the first of them.
"""

import argparse
import contextlib
import errno
import hashlib
import http.client
import logging
import lzma
import os
import pathlib
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, BinaryIO

from fedjax_ext.core import validate
from fedjax_ext.data.published import DATASETS, dataset_paths

_LOG = logging.getLogger(__name__)
_BLOCK = 1 << 20  # bytes
_TIMEOUT = 60.0  # seconds without a byte
_ATTEMPTS = 6  # in a row that get no further
_PAUSE = 1.0  # seconds before the second attempt; doubles


def download_dataset(
  name: str, data_dir: str | pathlib.Path
) -> dict[str, pathlib.Path]:
  """Downloads what is missing of a data set, and verifies what is there.

  Args:
    name: a key of `DATASETS`.
    data_dir: folder of the files, made if absent.

  Returns:
    {file name: path}.

  Raises:
    InvalidInput: see `download`.
  """
  validate.one_of('data set', name, DATASETS)
  folder = pathlib.Path(data_dir)
  for file in DATASETS[name]:
    path = folder / file.name
    if file.url.endswith('.lzma'):
      if not _verified(path, ''):
        archive = path.with_name(f'{path.name}.lzma')
        download(
          file.url, archive, sha256=file.sha256, num_bytes=file.num_bytes
        )
        decompress(archive, path)
    else:
      download(file.url, path, sha256=file.sha256, num_bytes=file.num_bytes)
  return dataset_paths(name, data_dir)


def download(
  url: str, path: str | pathlib.Path, *, sha256: str = '', num_bytes: int = 0
) -> pathlib.Path:
  """Downloads a file unless it is there, continuing what was begun.

  Args:
    url: where it is.
    path: where it goes; its folder is made.
    sha256: expected checksum (hex); '' takes that of PATH.sha256, if any.
    num_bytes: expected size, 0 if unknown.

  Returns:
    The path of the complete, verified file.

  Raises:
    InvalidInput: the server has no such file, cannot be reached, or sent
      something else than expected, or the disk is full.
  """
  path = pathlib.Path(path)
  with _locked(path):
    if _verified(path, sha256):
      return path
    partial = path.with_name(f'{path.name}.partial')
    _fetch(url, partial)
    got_bytes = partial.stat().st_size
    _keep_if(
      partial,
      num_bytes in (0, got_bytes),
      f'Expected {num_bytes} bytes at {url}, got {got_bytes}.',
    )
    got = _sha256(partial)
    _keep_if(
      partial,
      sha256.lower() in ('', got),
      f'Expected SHA-256 {sha256} of {url}, got {got}.',
    )
    _put_in_place(partial, path, got)
    return path


def decompress(archive: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
  """Decompresses an .lzma or .xz file, then removes it; memory is constant.

  Raises:
    InvalidInput: the archive is broken, or the disk is full.
  """
  with _locked(path):
    if _verified(path, ''):
      return path
    _LOG.info('Decompressing %s.', archive)
    partial = path.with_name(f'{path.name}.partial')
    digest = hashlib.sha256()
    try:
      with lzma.open(archive) as source, open(partial, 'wb') as target:
        while block := source.read(_BLOCK):
          digest.update(block)
          target.write(block)
    except (lzma.LZMAError, EOFError) as error:
      partial.unlink(missing_ok=True)
      raise validate.InvalidInput(
        f'Expected an intact LZMA file at {archive}: {error}'
      ) from error
    except OSError as error:
      partial.unlink(missing_ok=True)
      raise _unwritten(partial, error) from error
    _put_in_place(partial, path, digest.hexdigest())
    archive.unlink(missing_ok=True)
    return path


def _keep_if(partial: pathlib.Path, right: bool, message: str) -> None:
  if not right:
    partial.unlink(missing_ok=True)
    _validator_file(partial).unlink(missing_ok=True)
  validate.check(right, message)


def _put_in_place(
  partial: pathlib.Path, path: pathlib.Path, digest: str
) -> None:
  with open(partial, 'rb+') as file:
    os.fsync(file.fileno())
  os.replace(partial, path)
  _validator_file(partial).unlink(missing_ok=True)
  _digest_file(path).write_text(f'{digest}  {path.name}\n')


def _digest_file(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f'{path.name}.sha256')


def _validator_file(partial: pathlib.Path) -> pathlib.Path:
  return partial.with_name(f'{partial.name}.validator')


def _verified(path: pathlib.Path, sha256: str) -> bool:
  """Whether the file is there; checked by what is known about it."""
  if not path.exists():
    return False
  kept = _digest_file(path)
  words = kept.read_text().split() if not sha256 and kept.exists() else []
  expected = sha256.lower() or (words[0] if words else '')
  if expected:
    got = _sha256(path)
    validate.check(
      got == expected,
      f'Expected SHA-256 {expected} of {path}, got {got}; remove the file (and '
      f'{kept.name}) to download it again.',
    )
  return True


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  """Holds PATH.lock, among processes and threads; freed if a process dies."""
  try:
    import fcntl
  except ImportError:  # not a POSIX system: nobody waits
    yield
    return
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f'{path.name}.lock')
    descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT, 0o644)
  except OSError as error:
    if not path.exists():
      raise _unwritten(path, error) from error
    yield  # the file is there, in a folder for reading only
    return
  with open(descriptor, 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      _LOG.info('Waiting for another process that makes %s.', path)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


class _DroppedError(Exception):
  """The connection ended early, or the server asks to come back."""


def _fetch(url: str, partial: pathlib.Path) -> None:
  """Fills PARTIAL, over several connections if need be."""
  attempt, most = 0, 0
  while True:
    try:
      _fetch_once(url, partial)
      return
    except _DroppedError as error:
      now = partial.stat().st_size if partial.exists() else 0
      attempt = 1 if now > most else attempt + 1
      most = max(now, most)
      if attempt >= _ATTEMPTS:
        raise validate.InvalidInput(
          f'Expected to download {url}: {error}; got {now} bytes, and the '
          'same call continues.'
        ) from error
      pause = _PAUSE * 2 ** (attempt - 1)
      _LOG.warning('%s: %s; again in %.0f s.', url, error, pause)
      time.sleep(pause)


def _fetch_once(url: str, partial: pathlib.Path) -> None:
  """One connection: what is missing of PARTIAL, or all if it has changed."""
  have, validator = _begun(partial)
  headers = {'Accept-Encoding': 'identity'}
  if have:
    headers |= {'Range': f'bytes={have}-', 'If-Range': validator}
  try:
    response = urllib.request.urlopen(
      urllib.request.Request(url, headers=headers), timeout=_TIMEOUT
    )
  except urllib.error.HTTPError as error:
    with error:
      if error.code == 416:  # nothing after `have`: complete, or changed
        total = re.fullmatch(
          r'bytes \*/(\d+)', error.headers.get('Content-Range') or ''
        )
        if total and int(total[1]) == have:
          return
        partial.unlink(missing_ok=True)
        raise _DroppedError('the file has changed') from error
      if error.code in (408, 429) or error.code >= 500:
        raise _DroppedError(f'HTTP {error.code} {error.reason}') from error
    raise validate.InvalidInput(
      f'Expected a file at {url}, got HTTP {error.code} {error.reason}.'
    ) from error
  except (OSError, http.client.HTTPException) as error:  # URLError, timeouts
    raise _DroppedError(str(getattr(error, 'reason', error))) from error
  except ValueError as error:
    raise validate.InvalidInput(f'Expected a URL, got {url!r}.') from error
  with response:
    _receive(response, partial, have)


def _begun(partial: pathlib.Path) -> tuple[int, str]:
  """Bytes that can be continued, and the validator that says of what."""
  kept = _validator_file(partial)
  if not partial.exists() or not kept.exists():
    return 0, ''
  return partial.stat().st_size, kept.read_text().strip()


def _receive(response: Any, partial: pathlib.Path, have: int) -> None:
  given = response.headers.get('Content-Range') or ''
  start = re.match(r'bytes (\d+)-', given)
  if response.status != 206 or not have or not start or int(start[1]) != have:
    if response.status == 206:
      partial.unlink(missing_ok=True)
      raise _DroppedError(f'the server sent another range, {given!r}')
    have = 0
  length = response.headers.get('Content-Length')
  total = have + int(length) if length else None
  try:
    if not have:
      _start_anew(partial, response.headers)
    _check_space(partial, (total or 0) - have)
    with open(partial, 'ab') as file, _progress(partial, have, total) as told:
      _copy(response, file, told)
  except OSError as error:
    raise _unwritten(partial, error) from error
  got = partial.stat().st_size
  if total is not None and got != total:
    raise _DroppedError(f'the connection ended after {got} of {total} bytes')


def _start_anew(partial: pathlib.Path, headers: Any) -> None:
  etag = headers.get('ETag') or ''
  weak = not etag or etag.startswith('W/')  # not valid in If-Range
  validator = headers.get('Last-Modified') if weak else etag
  kept = _validator_file(partial)
  kept.unlink(missing_ok=True)
  partial.write_bytes(b'')
  if validator:
    kept.write_text(validator)


def _check_space(partial: pathlib.Path, needed: int) -> None:
  free = shutil.disk_usage(partial.parent).free
  validate.check(
    needed <= free,
    f'Expected {needed} bytes free in {partial.parent}, got {free}.',
  )


def _copy(response: Any, file: BinaryIO, told: Any) -> None:
  while True:
    try:
      block = response.read(_BLOCK)
    except (OSError, http.client.HTTPException) as error:
      raise _DroppedError(
        f'the connection broke: {error or type(error).__name__}'
      ) from error
    if not block:
      return
    file.write(block)
    told(len(block))


def _unwritten(path: pathlib.Path, error: OSError) -> validate.InvalidInput:
  full = error.errno in (errno.ENOSPC, errno.EDQUOT)
  why = 'the disk is full' if full else str(error)
  return validate.InvalidInput(f'Expected to write {path}: {why}')


@contextlib.contextmanager
def _progress(
  path: pathlib.Path, have: int, total: int | None
) -> Iterator[Any]:
  """A function to be told of bytes: a bar on a terminal, else log lines."""
  name = path.name.removesuffix('.partial')
  bar = None
  if sys.stderr.isatty():
    with contextlib.suppress(ImportError):
      import tqdm

      bar = tqdm.tqdm(
        desc=name, initial=have, total=total, unit='B', unit_scale=True
      )
  done, last = have, time.monotonic()

  def told(count: int) -> None:
    nonlocal done, last
    done += count
    if bar is not None:
      bar.update(count)
    elif time.monotonic() - last >= 5:
      last = time.monotonic()
      of = f' of {total / 1e6:.0f}' if total else ''
      _LOG.info('%s: %.0f%s MB', name, done / 1e6, of)

  try:
    yield told
  finally:
    if bar is not None:
      bar.close()


def main(args: list[str] | None = None) -> None:
  """Downloads a data set by name and prints its files and checksums."""
  parser = argparse.ArgumentParser(prog='python -m fedjax_ext.data.download')
  parser.add_argument('dataset', choices=sorted(DATASETS))
  parser.add_argument('--data_dir', required=True, help='folder of the files')
  given = parser.parse_args(args)
  logging.basicConfig(level=logging.INFO, format='%(message)s')
  try:
    paths = download_dataset(given.dataset, given.data_dir)
  except validate.InvalidInput as error:
    sys.exit(str(error))
  for path in paths.values():
    kept = _digest_file(path)
    known = kept.read_text().split()[0] if kept.exists() else _sha256(path)
    print(f'{known}  {path}')


if __name__ == '__main__':
  main()
