r"""Seconds from starting a binary to the end of its first round, cold and warm.

  python -m benchmarks.start_up \
    --flagfile=experiments/fed_avg/flags/digits.flags

Cold: an empty compilation cache; warm: the one that the cold run filled. More
flags of experiments.fed_avg.run may follow. The first row of metrics.jsonl
marks the end of the first round, which has no evaluation; the run ends there.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time


def seconds_to_first_round(workdir: pathlib.Path, flags: list[str]) -> float:
  """Starts the binary; seconds (a scalar) until its first row is there."""
  begun = time.perf_counter()
  process = subprocess.Popen(
    [sys.executable, '-m', 'experiments.fed_avg.run', f'--workdir={workdir}']
    + [*flags, '--num_rounds=2', '--eval_every=2'],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  metrics = workdir / 'metrics.jsonl'
  while not (metrics.exists() and metrics.stat().st_size):
    if process.poll() is not None:
      sys.exit(f'The run failed: {process.stderr.read()}')
    time.sleep(0.01)
  seconds = time.perf_counter() - begun
  process.kill()
  process.communicate()
  return seconds


def main() -> None:
  """Prints JSON: median seconds of each start and warm / cold."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.start_up')
  parser.add_argument('--repeats', type=int, default=3)
  given, flags = parser.parse_known_args()
  cold, warm = [], []
  for _ in range(given.repeats):
    with tempfile.TemporaryDirectory() as folder:
      root = pathlib.Path(folder)
      more = [*flags, f'--compilation_cache={root / "cache"}']
      cold.append(seconds_to_first_round(root / 'cold', more))
      warm.append(seconds_to_first_round(root / 'warm', more))
  result = {
    'cold_seconds': round(statistics.median(cold), 2),
    'warm_seconds': round(statistics.median(warm), 2),
    'warm_over_cold': round(
      statistics.median(w / c for w, c in zip(warm, cold, strict=True)),
      3,
    ),
    'flags': flags,
  }
  print(json.dumps(result, indent=2))


if __name__ == '__main__':
  main()
