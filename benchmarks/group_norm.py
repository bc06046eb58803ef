"""GroupNorm CNNs as they are, and with each thing that speeds them up undone.

  taskset -c 0 python -m benchmarks.group_norm

The CNNs of FedLoGe's small table, batch 32, on one core, which is what taskset
leaves; made-up images of 28x28x1 and 32x32x3. A training step (loss, gradient,
SGD) and an evaluation step, 20 in a compiled loop; all variants take turns,
medians. The variants: flax's own group normalisation; patches of thin images
made like any others; and both.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

STEPS = 20
BATCH = 32
SHAPES = {
  '28x28x1': ((28, 28, 1), (8, 16, 64)),
  '32x32x3': ((32, 32, 3), (8, 32, 128)),
}


def main() -> None:
  """Prints one line of JSON: milliseconds a step, and ratios to `ours`."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.group_norm')
  parser.add_argument('--turns', type=int, default=15)
  given = parser.parse_args()
  result = {}
  for name, (shape, widths) in SHAPES.items():
    loops = {}
    for variant, changes in variants().items():
      with contextlib.ExitStack() as stack:
        for change in changes:
          stack.enter_context(change())
        loops[variant] = compiled(shape, widths)
    for kind in ('train', 'evaluate'):
      times = {variant: [] for variant in loops}
      for _ in range(given.turns):
        for variant, runs in loops.items():
          times[variant].append(seconds(runs[kind]))
      medians = {v: statistics.median(t) for v, t in times.items()}
      ours = medians.pop('ours')
      result[f'{name}_{kind}_ours_ms'] = round(1e3 * ours / STEPS, 2)
      for variant, other in medians.items():
        result[f'{name}_{kind}_ours / {variant}'] = round(ours / other, 3)
  print(json.dumps(result))


def variants() -> dict[str, tuple[Callable[[], Any], ...]]:
  """What is undone in each variant, as makers of context managers."""
  from flax import linen as nn

  from fedjax_ext.models import layers

  def flax_layer(groups: int) -> nn.Module:
    return nn.GroupNorm(groups, epsilon=1e-5, name='GroupNorm_0')

  norm = lambda: mock.patch.object(layers, 'GroupNorm', flax_layer)
  thin = lambda: mock.patch.object(layers, 'THIN', 0)
  return {
    'ours': (),
    'flax norm': (norm,),
    'patches of thin images': (thin,),
    'both': (norm, thin),
  }


def seconds(run: Callable[[], Any]) -> float:
  """How long one call takes."""
  begun = time.perf_counter()
  run()
  return time.perf_counter() - begun


def compiled(shape: tuple[int, ...], widths: tuple[int, ...]) -> dict:
  """Compiled loops of one model, each run once: {'train': f, 'evaluate': f}."""
  import jax
  import optax

  from fedjax_ext.models import GroupNormCNN

  model = GroupNormCNN(10, widths, 4, 'mean')
  key = jax.random.key(0)
  x = jax.random.normal(key, (STEPS, BATCH, *shape))
  y = jax.random.randint(key, (STEPS, BATCH), 0, 10)
  params = model.init(key, x[0])

  def loss(params, x, y):
    logits = model.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  def train(params, batch):
    gradient = jax.grad(loss)(params, *batch)
    return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient), None

  def evaluate(total, batch):
    return total + loss(params, *batch), None

  loops = {
    'train': jax.jit(lambda: jax.lax.scan(train, params, (x, y))[0]),
    'evaluate': jax.jit(lambda: jax.lax.scan(evaluate, 0.0, (x, y))[0]),
  }
  runs = {
    kind: lambda f=f: jax.block_until_ready(f()) for kind, f in loops.items()
  }
  for run in runs.values():
    run()
  return runs


if __name__ == '__main__':
  main()
