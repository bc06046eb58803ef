"""What competes on a workload: this project, the floor, FedJAX.

A contestant is built once for a workload and then runs rounds; it is started
as a process of its own, which reads a round's number on each line of its
standard input and answers with a line of JSON:

  python -m benchmarks.contestants ours --workload=W2

- ours: federated averaging, fresh shuffles every round, ragged clients.
- floor: plain centralised SGD of the same model over as many full batches as
  the round has, in one jitted scan; nothing federated.
- floor_loop: the same as a Python loop over one jitted step.
- fedjax: FedJAX's federated averaging with flax's layers.
- fedjax_our_layers: the same with this project's layers.

Axis letters: B examples in a batch, S steps.
"""

import argparse
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any

_BEGUN = time.perf_counter()
_RATE = 0.1
PyTree = Any
Round = Callable[[int], None]


def _model(name: str, plain: bool) -> Any:
  """The workload's model, of this project's layers or flax's ('plain')."""
  import jax.numpy as jnp

  from benchmarks import workloads
  from fedjax_ext.models import from_module, make_model

  images = dict(input_shape=(28, 28, 1))
  tokens = dict(
    input_shape=(workloads.LENGTH,), num_classes=workloads.VOCABULARY
  )
  if plain and name in ('cnn', 'lstm'):
    from benchmarks import plain_models

    if name == 'cnn':
      return from_module(plain_models.CNN(62), (28, 28, 1))
    return from_module(
      plain_models.LSTM(workloads.VOCABULARY), (workloads.LENGTH,), jnp.int32
    )
  return {
    'cnn': lambda: make_model('emnist_cnn', num_classes=62, **images),
    'softmax': lambda: make_model(
      'softmax_regression', num_classes=10, **images
    ),
    'mlp': lambda: make_model('mlp', num_classes=10, **images),
    'lstm': lambda: make_model('char_lstm', **tokens),
  }[name]()


def _loss(model: Any, params: PyTree, x: Any, y: Any, mask: Any) -> Any:
  """Mean cross-entropy of the real examples, over all tokens of text."""
  import jax.numpy as jnp
  import optax

  logits, _ = model.train(params, x, None, mask)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
  losses = losses.reshape(len(losses), -1).mean(-1)
  return jnp.where(mask, losses, 0).sum() / jnp.maximum(mask.sum(), 1)


def ours(data: Any) -> Round:
  """This project's federated averaging; plans are part of the round."""
  import jax
  import numpy as np
  import optax

  from fedjax_ext import core
  from fedjax_ext.algorithms import fed_avg
  from fedjax_ext.data import from_segments
  from fedjax_ext.losses import Task

  model = _model(data.workload.model, plain=False)
  task = Task(
    model.init,
    lambda params, batch: _loss(
      model, params, batch.data['x'], batch.data['y'], batch.mask
    ),
    lambda params, batch: {},
  )
  layout = core.make_layout()
  algorithm = fed_avg(
    task,
    client_optimizer=optax.sgd(_RATE),
    server_optimizer=optax.sgd(1.0),
    layout=layout,
    phase=core.Phase(batch_size=data.workload.batch_size),
  )
  federated = from_segments(
    {'x': data.x, 'y': data.y},
    data.starts,
    data.sizes,
    client_ids=np.arange(len(data.sizes)),
  )
  features = core.place_features(federated.features, layout)
  state = layout.replicate(algorithm.init(jax.random.key(0)))

  def run(round: int) -> None:
    nonlocal state
    cohort = core.make_cohort(
      data.cohort(round),
      round=round,
      seed=0,
      specs=algorithm.plans,
      data={'train': federated},
      features=features,
      layout=layout,
    )
    state, _, _ = algorithm.apply(state, None, cohort)
    jax.block_until_ready(state)

  return run


def floor(data: Any, *, loop: bool = False) -> Round:
  """Centralised SGD over resident batches, in a scan or a loop."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  model = _model(data.workload.model, plain=False)
  size = data.workload.batch_size
  mask = jnp.ones(size, bool)
  gradient = jax.grad(lambda p, x, y: _loss(model, p, x, y, mask))

  def step(params: PyTree, batch: PyTree) -> tuple[PyTree, None]:
    grads = gradient(params, *batch)
    return jax.tree.map(lambda p, g: p - _RATE * g, params, grads), None

  scan = jax.jit(lambda p, batches: jax.lax.scan(step, p, batches)[0])
  one = jax.jit(lambda p, batch: step(p, batch)[0], donate_argnums=0)
  params = jax.jit(model.init)(jax.random.key(0))
  # Every round's batches are cut from one stretch that is on the device.
  most = max(data.num_batches(r) for r in range(64))
  rows = np.random.default_rng(1).integers(0, len(data.x), most * size)
  x = data.x[rows].reshape(most, size, *data.x.shape[1:])
  y = data.y[rows].reshape(most, size, *data.y.shape[1:])
  batches = jax.device_put((x, y))
  each = [jax.tree.map(lambda z: z[i], batches) for i in range(most * loop)]

  def run(round: int) -> None:
    nonlocal params
    # A round of other than `most` batches would compile again.
    if loop:
      for batch in each:
        params = one(params, batch)
    else:
      params = scan(params, batches)
    jax.block_until_ready(params)

  run.batches = most
  return run


def fedjax(data: Any, *, plain: bool = True) -> Round:
  """FedJAX's own federated averaging, shuffling, last batches filled."""
  import jax
  import jax.numpy as jnp

  if not hasattr(jax, 'tree_map'):
    jax.tree_map = jax.tree_util.tree_map  # FedJAX 0.0.17 still calls it
  import fedjax as library
  from fedjax.algorithms import fed_avg

  model = _model(data.workload.model, plain=plain)
  mask = jnp.ones(data.workload.batch_size, bool)

  def gradient(params: PyTree, batch: dict, key: Any) -> PyTree:
    del key
    return jax.grad(
      lambda p: _loss(model, p, batch['x'], batch['y'], mask[: len(batch['x'])])
    )(params)

  clients = {
    c: {'x': data.x[a : a + n], 'y': data.y[a : a + n]}
    for c, (a, n) in enumerate(zip(data.starts, data.sizes, strict=True))
  }
  federated = library.InMemoryFederatedData(clients)
  algorithm = fed_avg.federated_averaging(
    gradient,
    library.optimizers.sgd(_RATE),
    library.optimizers.sgd(1.0),
    library.ShuffleRepeatBatchHParams(
      batch_size=data.workload.batch_size, num_epochs=1, seed=0
    ),
  )
  state = algorithm.init(jax.jit(model.init)(jax.random.key(0)))

  def run(round: int) -> None:
    nonlocal state
    numbers = data.cohort(round).tolist()
    keys = jax.random.split(jax.random.PRNGKey(round), len(numbers))
    cohort = [
      (number, dataset, keys[i])
      for i, (number, dataset) in enumerate(federated.get_clients(numbers))
    ]
    state, _ = algorithm.apply(state, cohort)
    jax.block_until_ready(state.params)

  return run


CONTESTANTS: dict[str, Callable[[Any], Round]] = {
  'ours': ours,
  'floor': floor,
  'floor_loop': lambda data: floor(data, loop=True),
  'fedjax': fedjax,
  'fedjax_our_layers': lambda data: fedjax(data, plain=False),
}


def peak_memory_mib() -> float:
  """The most memory that this process has held so far (VmHWM), a scalar."""
  status = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(r'VmHWM:\s+(\d+) kB', status)[1]) / 1024


def main() -> None:
  """Answers a line of JSON for each round's number on standard input."""
  parser = argparse.ArgumentParser()
  parser.add_argument('name', choices=sorted(CONTESTANTS))
  parser.add_argument('--workload', required=True)
  parser.add_argument('--population', type=int, default=0)
  given = parser.parse_args()
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # whatever libraries print goes to standard error

  import jax

  if given.name == 'ours':
    cores = len(os.sched_getaffinity(0))
    jax.config.update('jax_num_cpu_devices', cores)
  from benchmarks import workloads

  data = workloads.make_data(given.workload, population=given.population)
  run = CONTESTANTS[given.name](data)
  for line in sys.stdin:
    round = int(line)
    begun = time.perf_counter()
    run(round)
    now = time.perf_counter()
    answer = {
      'seconds': now - begun,
      'batches': getattr(run, 'batches', data.num_batches(round)),
      'examples': int(data.sizes[data.cohort(round)].sum()),
      'since_start': now - _BEGUN,
      'peak_mib': peak_memory_mib(),
      'jax': jax.__version__,
      'device': jax.devices()[0].device_kind,
    }
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == '__main__':
  main()
