"""Seconds per round against the floor and against FedJAX.

  python -m benchmarks.rounds --workload=W2 --against=floor,fedjax --rounds=7

Each contestant runs in a process of its own and they take turns, round by
round (A B C A B C), so that whatever else the machine does hits all of them.
A ratio is the median over rounds of (their time a batch) / (our time a batch):
above 1 this project is faster. The first rounds compile and are left out.

FedJAX is an optional extra: pip install fedjax_ext[fedjax], or name a Python
that has it with --fedjax_python.
"""

import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.workloads import WORKLOADS

OTHERS = ('floor', 'floor_loop', 'fedjax', 'fedjax_our_layers')
WARM_UP = 3


class Contestant:
  """One process; see `contestants`."""

  def __init__(self, name: str, python: str, given: argparse.Namespace):
    """Starts it; `python` is the interpreter."""
    self.name = name
    self._process = subprocess.Popen(
      [
        python,
        '-m',
        'benchmarks.contestants',
        name,
        f'--workload={given.workload}',
        f'--population={given.population}',
      ],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=None if given.verbose else subprocess.DEVNULL,
      text=True,
    )
    self.answers: list[dict[str, Any]] = []

  def round(self, number: int) -> None:
    """Runs a round and keeps its answer."""
    print(number, file=self._process.stdin, flush=True)
    line = self._process.stdout.readline()
    if not line:
      sys.exit(f'{self.name} failed in round {number}; --verbose shows why.')
    self.answers.append(json.loads(line))

  def close(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    self._process.wait()

  def summary(self) -> dict[str, Any]:
    """{name: scalar} over the timed rounds."""
    timed = self.answers[WARM_UP:]
    seconds = [a['seconds'] for a in timed]
    first = self.answers[0]
    return {
      'seconds_per_round': round(statistics.median(seconds), 4),
      'microseconds_per_batch': round(
        1e6 * statistics.median(a['seconds'] / a['batches'] for a in timed), 1
      ),
      'examples_per_second': round(
        sum(a['examples'] for a in timed) / sum(seconds)
      ),
      'first_round_seconds': round(first['seconds'], 2),
      'compile_seconds': round(
        first['seconds'] - statistics.median(seconds), 2
      ),
      'start_to_first_round_seconds': round(first['since_start'], 2),
      'peak_mib': round(max(a['peak_mib'] for a in self.answers)),
    }


def main() -> None:
  """Prints a line for each contestant and the ratios; writes --json."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.rounds')
  parser.add_argument('--workload', choices=WORKLOADS, default='W2')
  parser.add_argument('--against', default='floor', help=', '.join(OTHERS))
  parser.add_argument('--rounds', type=int, default=7, help='timed, each')
  parser.add_argument('--population', type=int, default=0)
  parser.add_argument('--fedjax_python', default=sys.executable)
  parser.add_argument('--json', default='', help='file to write')
  parser.add_argument('--verbose', action='store_true')
  given = parser.parse_args()
  names = ['ours', *filter(None, given.against.split(','))]
  unknown = [n for n in names[1:] if n not in OTHERS]
  if unknown or given.rounds < 1:
    sys.exit(f'Expected --against of {OTHERS} and --rounds >= 1, got {unknown}')
  contestants = []
  for name in names:
    other = name.startswith('fedjax')
    python = given.fedjax_python if other else sys.executable
    contestants.append(Contestant(name, python, given))
  for number in range(1, WARM_UP + given.rounds + 1):
    for contestant in contestants:
      contestant.round(number)
  for contestant in contestants:
    contestant.close()
  result = report(given.workload, contestants)
  print(json.dumps(result, indent=2))
  if given.json:
    pathlib.Path(given.json).write_text(json.dumps(result, indent=2) + '\n')


def report(workload: str, contestants: list[Contestant]) -> dict[str, Any]:
  """Summaries and ratios, as plain values."""
  mine = contestants[0]
  result: dict[str, Any] = {
    'workload': workload,
    'rounds': len(mine.answers) - WARM_UP,
    'jax': mine.answers[0]['jax'],
    'device': mine.answers[0]['device'],
    'python': platform.python_version(),
    'contestants': {c.name: c.summary() for c in contestants},
  }
  cost = lambda answer: answer['seconds'] / answer['batches']
  for other in contestants[1:]:
    ratios = [
      cost(theirs) / cost(ours)
      for ours, theirs in zip(
        mine.answers[WARM_UP:], other.answers[WARM_UP:], strict=True
      )
    ]
    result[f'speedup_over_{other.name}'] = round(statistics.median(ratios), 3)
  return result


if __name__ == '__main__':
  main()
