r"""Speed on one accelerator: cohorts, number formats, share of the floor.

  python -m benchmarks.accelerator --workload=W1 --cohorts=100,1000,10000 \
    --compute_dtypes=float32,bfloat16 --lanes=8,32,128 --json=FILE
  python -m benchmarks.accelerator --workload=cifar10 --rounds=1500

For every setting: examples a second, the share of the floor's (plain SGD of the
same model in one scan, full batches of all lanes together: B * lanes examples
a step) and the most device memory. 'cifar10' is the shape of pfl-research's
benchmark: 1,000 users of 50 images, 50 a round, batches of 10, one epoch, a
small CNN. Everything runs on CPU, too, where --cohorts=100 takes a minute.
"""

import argparse
import json
import pathlib
import statistics
import time
from typing import Any


def main() -> None:
  """Prints a line of JSON for each setting; writes them to --json."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.accelerator')
  parser.add_argument('--workload', default='W1')
  parser.add_argument('--cohorts', default='100,1000,10000')
  parser.add_argument('--compute_dtypes', default='float32,bfloat16')
  parser.add_argument('--lanes', default='0', help='0 is the rule')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--json', default='')
  given = parser.parse_args()
  results: list[dict[str, Any]] = []
  cohorts = '0' if given.workload == 'cifar10' else given.cohorts
  for dtype in given.compute_dtypes.split(','):
    for lanes in map(int, given.lanes.split(',')):
      for cohort in map(int, cohorts.split(',')):
        result = measure(given.workload, cohort, lanes, dtype, given.rounds)
        results.append(result)
        print(json.dumps(result), flush=True)
        if given.json:  # a command that is cut short leaves what it has
          pathlib.Path(given.json).write_text(json.dumps(results, indent=2))


def measure(
  workload: str, cohort: int, lanes: int, dtype: str, rounds: int
) -> dict[str, Any]:
  """One setting; plain values."""
  import jax

  from benchmarks import workloads
  from benchmarks.contestants import make_ours
  from fedjax_ext import core

  data = workloads.make_data(workload, cohort=cohort)
  algorithm, state, make_cohort = make_ours(
    data, lanes=lanes, compute_dtype=dtype
  )

  def prepare(round: int) -> core.Cohort:
    planned = make_cohort(round)
    planned.prepare('train')
    return planned

  seconds, examples, begun = [], [], time.perf_counter()
  for planned in core.prefetch(prepare, range(1, rounds + 4)):
    state, _, _ = algorithm.apply(state, None, planned)
    jax.block_until_ready(state)
    now = time.perf_counter()
    seconds.append(now - begun)
    examples.append(int(data.sizes[planned.clients].sum()))
    begun = now
  speed = statistics.median(
    e / s for e, s in zip(examples[3:], seconds[3:], strict=True)
  )
  lanes = lanes or core.make_layout().lanes
  floor = floor_speed(data, lanes * jax.device_count(), dtype)
  memory = jax.devices()[0].memory_stats() or {}
  return {
    'workload': workload,
    'cohort': data.workload.cohort,
    'lanes': lanes,
    'compute_dtype': dtype,
    'examples_per_second': round(speed),
    'share_of_floor': round(speed / floor, 3),
    'seconds_per_round': round(statistics.median(seconds[3:]), 4),
    'first_round_seconds': round(seconds[0], 2),
    'seconds_of_all_rounds': round(sum(seconds), 1),
    'peak_device_mib': round(memory.get('peak_bytes_in_use', 0) / 2**20),
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
  }


def floor_speed(data: Any, batches_together: int, dtype: str) -> float:
  """Examples a second of plain SGD on as many batches at once, a scalar."""
  import jax
  import jax.numpy as jnp

  from benchmarks.contestants import loss, make_model
  from fedjax_ext.models import with_compute_dtype

  model = make_model(data.workload.model)
  if dtype != 'float32':
    model = with_compute_dtype(model, dtype)
  size = data.workload.batch_size * batches_together
  steps = max(min(64, len(data.x) // size), 1)
  count = min(steps * size, len(data.x))
  size = count // steps
  cut = lambda z: jnp.asarray(z[:count]).reshape(steps, size, *z.shape[1:])
  batches = (cut(data.x), cut(data.y))
  mask = jnp.ones(size, bool)

  def step(params: Any, batch: Any) -> tuple[Any, None]:
    grads = jax.grad(lambda p: loss(model, p, *batch, mask))(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), None

  scan = jax.jit(lambda p, batches: jax.lax.scan(step, p, batches)[0])
  params = jax.jit(model.init)(jax.random.key(0))
  jax.block_until_ready(scan(params, batches))
  seconds = []
  for _ in range(5):
    begun = time.perf_counter()
    jax.block_until_ready(scan(params, batches))
    seconds.append(time.perf_counter() - begun)
  return steps * size / statistics.median(seconds)


if __name__ == '__main__':
  main()
