"""Advice on --lanes for a workload on this machine.

  python -m benchmarks.lanes --workload=W4 --lanes=1,2,4,8

Trains the same rounds with every number of lanes in turn and prints the median
time a batch of each; take the fastest if it is faster than 1.05 times the rule
of `core.make_layout`. The manifest keeps the number that a run had.
"""

import argparse
import json
import statistics
import time


def main() -> None:
  """Prints one line of JSON for each number of lanes, and the advice."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.lanes')
  parser.add_argument('--workload', default='W2')
  parser.add_argument('--cohort', type=int, default=0)
  parser.add_argument('--lanes', default='1,2,4,8')
  parser.add_argument('--rounds', type=int, default=7)
  given = parser.parse_args()

  from benchmarks import workloads
  from benchmarks.contestants import make_ours, use_one_device_per_core

  use_one_device_per_core()
  import jax

  from fedjax_ext import core

  data = workloads.make_data(given.workload, cohort=given.cohort)
  rule = core.make_layout().lanes
  numbers = sorted({rule, *map(int, given.lanes.split(','))})
  contestants = {n: make_ours(data, lanes=n) for n in numbers}
  seconds: dict[int, list[float]] = {n: [] for n in numbers}
  for round in range(1, given.rounds + 4):
    for number, (algorithm, state, make_cohort) in contestants.items():
      cohort = make_cohort(round)
      cohort.prepare('train')
      begun = time.perf_counter()
      jax.block_until_ready(algorithm.apply(state, None, cohort))
      took = time.perf_counter() - begun
      if round > 3:
        seconds[number].append(1e6 * took / data.num_batches(round))
  cost = {n: statistics.median(s) for n, s in seconds.items()}
  for number, microseconds in cost.items():
    line = {'lanes': number, 'microseconds_per_batch': microseconds}
    print(json.dumps(line | {'over_rule': cost[number] / cost[rule]}))
  best = min(cost, key=cost.get)
  better = cost[best] * 1.05 < cost[rule]
  print(f'advice: --lanes={best}' if better else f'advice: the rule, {rule}')


if __name__ == '__main__':
  main()
