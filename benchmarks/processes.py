"""Throughput of two processes of one core each against one of one core.

  python -m benchmarks.processes --workload=W1

One run trains on core 0; the other is two processes, on cores 0 and 1, joined
by jax.distributed. They take turns, round by round, on the same cohorts.
"""

import argparse
import json
import os
import socket
import statistics
import sys

from benchmarks.rounds import WARM_UP, Contestant, add_arguments


def main() -> None:
  """Prints one line of JSON."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.processes')
  add_arguments(parser)
  given = parser.parse_args()
  cores = sorted(os.sched_getaffinity(0))[:2]
  if len(cores) < 2:
    sys.exit('Expected two cores, got one.')
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  one = [Contestant('ours', given, f'--core={cores[0]}')]
  two = [
    Contestant(
      'ours',
      given,
      f'--core={core}',
      f'--coordinator_address={address}',
      '--num_processes=2',
      f'--process_id={number}',
    )
    for number, core in enumerate(cores)
  ]
  ratios = []
  for number in range(1, WARM_UP + given.rounds + 1):
    for run in (one, two):
      for process in run:
        process.begin(number)
      for process in run:
        process.end(number)
    alone = one[0].answers[-1]['seconds']
    together = max(process.answers[-1]['seconds'] for process in two)
    if number > WARM_UP:
      ratios.append(alone / together)
  for process in one + two:  # all first: the last step is one that they share
    process.hang_up()
  for process in one + two:
    process.close()
  print(
    json.dumps(
      {
        'workload': given.workload,
        'rounds': given.rounds,
        'speedup_of_two_processes': round(statistics.median(ratios), 3),
        'each_round': [round(r, 3) for r in ratios],
      }
    )
  )


if __name__ == '__main__':
  main()
