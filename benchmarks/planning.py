"""What planning a large round costs beside training it.

  python -m benchmarks.planning --workload=W2 --cohort=10000

Plans and trains the same rounds in turn: seconds of the plan alone, of the
round alone (the plan is there already), and of a round whose successor is
planned in a thread meanwhile, as the training loop does.
"""

import argparse
import json
import statistics
import time


def main() -> None:
  """Prints one line of JSON."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.planning')
  parser.add_argument('--workload', default='W2')
  parser.add_argument('--cohort', type=int, default=10_000)
  parser.add_argument('--rounds', type=int, default=9)
  given = parser.parse_args()

  from benchmarks import workloads
  from benchmarks.contestants import make_ours, use_one_device_per_core

  use_one_device_per_core()
  import jax

  from fedjax_ext.core import prefetch

  data = workloads.make_data(given.workload, cohort=given.cohort)
  algorithm, state, make_cohort = make_ours(data)
  rounds = range(1, given.rounds + 3)

  def prepare(round: int):
    cohort = make_cohort(round)
    cohort.prepare('train')
    return cohort

  planning, alone, together = [], [], []
  ahead = prefetch(prepare, rounds)
  for round in rounds:
    begun = time.perf_counter()
    cohort = make_cohort(round)
    cohort.plans('train')
    planning.append(time.perf_counter() - begun)
    cohort.prepare('train')
    begun = time.perf_counter()
    jax.block_until_ready(algorithm.apply(state, None, cohort))
    alone.append(time.perf_counter() - begun)
    cohort = next(ahead)  # and its successor begins to be planned
    begun = time.perf_counter()
    jax.block_until_ready(algorithm.apply(state, None, cohort))
    together.append(time.perf_counter() - begun)
  ahead.close()
  middle = lambda seconds: statistics.median(seconds[2:])
  print(
    json.dumps(
      {
        'workload': given.workload,
        'cohort': given.cohort,
        'plan_seconds': round_(middle(planning)),
        'round_seconds': round_(middle(alone)),
        'plan_over_round': round_(
          middle([p / a for p, a in zip(planning, alone, strict=True)])
        ),
        'round_with_prefetch_over_round': round_(
          middle([t / a for t, a in zip(together, alone, strict=True)])
        ),
      }
    )
  )


def round_(seconds: float) -> float:
  """Four digits of a scalar."""
  return round(seconds, 4)


if __name__ == '__main__':
  main()
