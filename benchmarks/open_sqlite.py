"""Seconds and memory to open an SQLite file of many clients, and to read some.

Usage:
  python -m benchmarks.open_sqlite --clients=100000
"""

import argparse
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fedjax_ext.data.sqlite import load_sqlite, write_sqlite


def _clients(
  count: int, examples: int
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
  """Images that do not compress, of 1 to 2 * examples - 1 examples each."""
  rng = np.random.default_rng(0)
  for c in range(count):
    n = int(rng.integers(1, 2 * examples))
    image = rng.integers(0, 256, (n, 14, 14, 1), np.uint8)
    yield (
      f'client{c:08d}',
      {'image': image, 'label': rng.integers(0, 10, n, np.int32)},
    )


def _anonymous_mb() -> float:
  """Memory of this process that no file backs, in MB."""
  status = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(r'RssAnon:\s+(\d+) kB', status)[1]) / 1e3


def _evict(path: pathlib.Path) -> None:
  """Drops the file from the page cache, as after a reboot."""
  fd = os.open(path, os.O_RDONLY)
  os.fsync(fd)
  os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
  os.close(fd)


def _timed(what: str, function: Callable[[], Any]) -> Any:
  before, start = _anonymous_mb(), time.perf_counter()
  result = function()
  seconds = time.perf_counter() - start
  grown = _anonymous_mb() - before
  print(f'{what:<44} {seconds:8.3f} s  {grown:8.1f} MB more RssAnon')
  return result


def main() -> None:
  """Writes a file, opens it cold, warm and by its index, reads cohorts."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--clients', type=int, default=100_000)
  parser.add_argument('--examples', type=int, default=20, help='mean, each')
  parser.add_argument('--cohort', type=int, default=100)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'train.sqlite')
    index = path.with_name(f'{path.name}.index.npz')
    _timed(
      'write', lambda: write_sqlite(path, _clients(args.clients, args.examples))
    )
    print(f'{args.clients} clients in {path.stat().st_size / 1e6:.0f} MB')
    load = lambda: load_sqlite(data_dir=folder, file=path.name, num_classes=10)
    _timed('warm-up: open', load)
    index.unlink(missing_ok=True)
    _timed('first open, file in the page cache', load)
    index.unlink(missing_ok=True)
    _evict(path)
    _timed('first open, file on disk only', load)
    _evict(path)
    columns = _timed('later open, file on disk only', load)
    first, count = columns.client.segments['train']
    rng = np.random.default_rng(1)
    for _ in range(3):
      cohort = rng.choice(args.clients, args.cohort, replace=False)
      rows = np.concatenate([first[c] + np.arange(count[c]) for c in cohort])
      read = lambda: [columns.features[n][rows] for n in ('image', 'label')]
      _timed(f'read {args.cohort} clients, {len(rows)} examples', read)


if __name__ == '__main__':
  main()
