"""Memory of another process while it runs.

RssAnon and RssFile of /proc/PID/status: anonymous memory counts as used,
file-backed pages only fill what is free.
"""

import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any


def watch(command: list[str], **settings: Any) -> dict[str, float]:
  """Runs a command to its end; peaks in MiB and seconds, scalars.

  Args:
    command: as for subprocess.
    **settings: likewise.

  Returns:
    {'peak_anon_mib', 'peak_file_mib', 'seconds'}.
  """
  begun = time.monotonic()
  process = subprocess.Popen(command, **settings)
  peaks = {'RssAnon': 0, 'RssFile': 0}
  while process.poll() is None:
    for name, kib in status(process.pid):
      peaks[name] = max(peaks[name], kib)
    time.sleep(0.02)
  if process.returncode:
    sys.exit(f'Exit code {process.returncode} of {" ".join(command)}')
  return {
    'peak_anon_mib': round(peaks['RssAnon'] / 1024, 1),
    'peak_file_mib': round(peaks['RssFile'] / 1024, 1),
    'seconds': round(time.monotonic() - begun, 1),
  }


def status(pid: int) -> Iterator[tuple[str, int]]:
  """(RssAnon or RssFile, KiB) of a process; nothing once it has ended."""
  try:
    lines = pathlib.Path(f'/proc/{pid}/status').read_text().splitlines()
  except OSError:
    return
  for line in lines:
    name, _, value = line.partition(':')
    if name in ('RssAnon', 'RssFile'):
      yield name, int(value.split()[0])
