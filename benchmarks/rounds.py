"""Seconds per round against the floor, FedJAX and pfl-research.

  python -m benchmarks.rounds --workload=W2 --against=floor,fedjax --rounds=7

Each contestant runs in a process of its own and they take turns, round by
round (A B C A B C), so that whatever else the machine does hits all of them.
A ratio is the median over rounds of (their time a batch) / (our time a batch):
above 1 this project is faster. The first rounds, and any in which somebody
compiles, are left out; what compiling took is reported.

FedJAX is an optional extra: pip install fedjax_ext[fedjax], or name a Python
that has it with --fedjax_python; --pfl_python names one that has pfl-research.
"""

import argparse
import contextlib
import json
import pathlib
import platform
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.workloads import WORKLOADS

OTHERS = ('floor', 'fedjax', 'fedjax_our_layers', 'pfl', 'pfl2')
WARM_UP = 3


class Contestant:
  """One process; see `protocol`."""

  def __init__(self, name: str, given: argparse.Namespace, *more: str):
    """Starts it, with more arguments."""
    self.name = name
    family = name.removesuffix('2').split('_')[0]
    python = getattr(given, f'{family}_python', sys.executable)
    module = 'pfl_research' if family == 'pfl' else 'contestants'
    self._process = subprocess.Popen(
      [
        python,
        '-m',
        f'benchmarks.{module}',
        name,
        f'--workload={given.workload}',
        f'--population={given.population}',
        f'--cohort={given.cohort}',
        *more,
      ],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=None if given.verbose else subprocess.DEVNULL,
      text=True,
    )
    self.answers: list[dict[str, Any]] = []

  def begin(self, number: int) -> None:
    """Starts a round."""
    with contextlib.suppress(BrokenPipeError):  # `end` says it
      print(number, file=self._process.stdin, flush=True)

  def end(self, number: int) -> None:
    """Waits for the round and keeps its answer."""
    line = self._process.stdout.readline()
    if not line:
      sys.exit(f'{self.name} failed in round {number}; --verbose shows why.')
    self.answers.append(json.loads(line))

  def round(self, number: int) -> None:
    """Runs a round."""
    self.begin(number)
    self.end(number)

  def hang_up(self) -> None:
    """Says that there are no more rounds."""
    self._process.stdin.close()

  def close(self) -> None:
    """Ends the process."""
    self.hang_up()
    self._process.wait()

  def summary(self, timed: list[int]) -> dict[str, Any]:
    """{name: scalar} over the timed rounds."""
    answers = [self.answers[i] for i in timed]
    seconds = [a['seconds'] for a in answers]
    per_batch = [1e6 * a['seconds'] / a['batches'] for a in answers]
    first = self.answers[0]
    return {
      'seconds_per_round': round(statistics.median(seconds), 4),
      'microseconds_per_batch': round(statistics.median(per_batch), 1),
      'fastest_microseconds_per_batch': round(min(per_batch), 1),
      'examples_per_second': round(
        statistics.median(a['examples'] / a['seconds'] for a in answers)
      ),
      'first_round_seconds': round(first['seconds'], 2),
      'start_to_first_round_seconds': round(first['since_start'], 2),
      'programs_compiled': sum(a['compiles'] for a in self.answers),
      'compile_seconds': round(
        sum(a['compile_seconds'] for a in self.answers), 2
      ),
      'peak_mib': round(max(a['peak_mib'] for a in self.answers)),
    } | first['about']


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """What every contestant is told."""
  parser.add_argument('--workload', choices=tuple(WORKLOADS)[:4], default='W2')
  parser.add_argument('--rounds', type=int, default=7, help='timed, each')
  parser.add_argument('--population', type=int, default=0, help='0: its own')
  parser.add_argument('--cohort', type=int, default=0, help='0: its own')
  parser.add_argument('--verbose', action='store_true')


def main() -> None:
  """Prints a line for each contestant and the ratios; writes --json."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.rounds')
  add_arguments(parser)
  parser.add_argument('--against', default='floor', help=', '.join(OTHERS))
  parser.add_argument('--fedjax_python', default=sys.executable)
  parser.add_argument('--pfl_python', default=sys.executable)
  parser.add_argument('--json', default='', help='file to write')
  given = parser.parse_args()
  names = ['ours', *filter(None, given.against.split(','))]
  unknown = [n for n in names[1:] if n not in OTHERS]
  if unknown or given.rounds < 1:
    sys.exit(f'Expected --against of {OTHERS} and --rounds >= 1, got {unknown}')
  contestants = []
  for name in names:  # one after the other: each start is measured alone
    contestants.append(Contestant(name, given))
    contestants[-1].round(1)
  timed: list[int] = []
  for number in range(2, WARM_UP + 3 * given.rounds + 1):
    for contestant in contestants:
      contestant.round(number)
    if number > WARM_UP and not any(
      c.answers[-1]['compiles'] for c in contestants
    ):
      timed.append(number - 1)
    if len(timed) == given.rounds:
      break
  for contestant in contestants:
    contestant.close()
  result = report(given, contestants, timed)
  print(json.dumps(result, indent=2))
  if given.json:
    pathlib.Path(given.json).write_text(json.dumps(result, indent=2) + '\n')


def report(
  given: argparse.Namespace, contestants: list[Contestant], timed: list[int]
) -> dict[str, Any]:
  """Summaries and ratios over the rounds at places `timed`, plain values."""
  if not timed:
    sys.exit('Expected a round without compilation, got none.')
  mine = contestants[0]
  result: dict[str, Any] = {
    'workload': given.workload,
    'cohort': given.cohort or WORKLOADS[given.workload].cohort,
    'rounds': len(timed),
    'python': platform.python_version(),
    'contestants': {c.name: c.summary(timed) for c in contestants},
  }
  cost = lambda answer: answer['seconds'] / answer['batches']
  for other in contestants[1:]:
    ratios = [cost(other.answers[i]) / cost(mine.answers[i]) for i in timed]
    result[f'speedup_over_{other.name}'] = round(statistics.median(ratios), 3)
  return result


if __name__ == '__main__':
  main()
