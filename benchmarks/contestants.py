"""What competes on a workload: this project, the floor, FedJAX.

  python -m benchmarks.contestants ours --workload=W2

Started by `rounds`, see `protocol`. pfl-research is in `pfl_research`.

- ours: federated averaging, fresh shuffles every round, ragged clients, plans
  prefetched as the training loop does; a round ends when the next is planned.
- floor: plain centralised SGD of the same model over full batches that are on
  the device, nothing federated: one jitted scan or a loop over one jitted step,
  convolutions in blocks or whole, whichever is fastest.
- fedjax: FedJAX's federated averaging with flax's layers.
- fedjax_our_layers: the same with this project's layers.

Axis letters: B examples in a batch.
"""

import argparse
import functools
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks.protocol import Answer, Server

_RATE = 0.1
PyTree = Any
# Trains a round; the floor returns the batches that it took, others None.
Round = Callable[[int], int | None]


def make_model(name: str, *, plain: bool = False) -> Any:
  """The workload's model, of this project's layers or flax's ('plain')."""
  import jax.numpy as jnp

  from benchmarks import workloads
  from fedjax_ext.models import from_module
  from fedjax_ext.models import make_model as make

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
    'cnn': lambda: make('emnist_cnn', num_classes=62, **images),
    'softmax': lambda: make('softmax_regression', num_classes=10, **images),
    'mlp': lambda: make('mlp', num_classes=10, **images),
    'cifar': lambda: make(
      'group_norm_cnn', input_shape=(32, 32, 3), num_classes=10
    ),
    'lstm': lambda: make('char_lstm', **tokens),
  }[name]()


def loss(model: Any, params: PyTree, x: Any, y: Any, mask: Any) -> Any:
  """Mean cross-entropy of the real examples [B], over all tokens of text."""
  import jax.numpy as jnp
  import optax

  logits, _ = model.train(params, x, None, mask)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
  losses = losses.reshape(len(losses), -1).mean(-1)
  return jnp.where(mask, losses, 0).sum() / jnp.maximum(mask.sum(), 1)


def make_task(model: Any) -> Any:
  """A Task of `loss`, without metrics."""
  from fedjax_ext.losses import Task

  return Task(
    model.init,
    lambda params, batch: loss(
      model, params, batch.data['x'], batch.data['y'], batch.mask
    ),
    lambda params, batch: {},
  )


def make_ours(
  data: Any, *, lanes: int = 0, compute_dtype: str = 'float32'
) -> tuple[Any, Any, Callable[[int], Any]]:
  """This project's federated averaging on a workload.

  Returns:
    The algorithm, its first server state, and round number -> Cohort.
  """
  import jax
  import numpy as np
  import optax

  from fedjax_ext import core
  from fedjax_ext.algorithms import fed_avg
  from fedjax_ext.data import from_segments
  from fedjax_ext.models import with_compute_dtype

  layout = core.make_layout(lanes=lanes)
  model = make_model(data.workload.model)
  if compute_dtype != 'float32':
    model = with_compute_dtype(model, compute_dtype)
  algorithm = fed_avg(
    make_task(model),
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
  state = layout.replicate(jax.jit(algorithm.init)(jax.random.key(0)))

  def make_cohort(round: int) -> core.Cohort:
    return core.make_cohort(
      data.cohort(round),
      round=round,
      seed=0,
      specs=algorithm.plans,
      data={'train': federated},
      features=features,
      layout=layout,
    )

  return algorithm, state, make_cohort


def ours(data: Any) -> Round:
  """This project's federated averaging."""
  import jax

  from fedjax_ext.core import Cohort, prefetch

  algorithm, state, make_cohort = make_ours(data)
  planning = threading.Lock()

  def prepare(round: int) -> Cohort:
    with planning:
      cohort = make_cohort(round)
      cohort.prepare('train')
      return cohort

  cohorts = prefetch(prepare, range(1, 10_000))

  def run(round: int) -> None:
    nonlocal state
    cohort = next(cohorts)
    assert cohort.round == round, (cohort.round, round)
    state, _, _ = algorithm.apply(state, None, cohort)
    jax.block_until_ready(state)
    with planning:  # the next round's plan is this round's work
      pass

  run.close = cohorts.close
  return run


def floor(data: Any) -> Round:
  """Centralised SGD over resident batches, in a scan or a loop."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from fedjax_ext.models import layers

  model = make_model(data.workload.model)
  size = data.workload.batch_size
  mask = jnp.ones(size, bool)
  gradient = jax.grad(lambda p, x, y: loss(model, p, x, y, mask))

  def step(params: PyTree, batch: PyTree) -> tuple[PyTree, None]:
    grads = gradient(params, *batch)
    return jax.tree.map(lambda p, g: p - _RATE * g, params, grads), None

  params = jax.jit(model.init)(jax.random.key(0))
  # One number of batches for all rounds: another would compile again.
  count = int(np.median([data.num_batches(r) for r in range(1, 64)]))
  rows = np.random.default_rng(1).integers(0, len(data.x), count * size)
  x = data.x[rows].reshape(count, size, *data.x.shape[1:])
  y = data.y[rows].reshape(count, size, *data.y.shape[1:])
  batches = jax.device_put((x, y))
  each = [jax.tree.map(lambda z: z[i], batches) for i in range(count)]
  seconds: dict[Any, float] = {}
  names: dict[Any, str] = {}

  def in_scan() -> Callable[[PyTree], PyTree]:
    scan = jax.jit(lambda p, batches: jax.lax.scan(step, p, batches)[0])
    return lambda params: scan(params, batches)

  def in_loop() -> Callable[[PyTree], PyTree]:
    one = jax.jit(lambda p, batch: step(p, batch)[0], donate_argnums=0)
    return lambda params: functools.reduce(one, each, params)

  def run(round: int) -> int:
    nonlocal params
    del round
    blocks = layers.BLOCK_BYTES
    convolves = data.workload.model in ('cnn', 'cifar')
    for limit in () if seconds else (blocks, np.inf)[: 1 + convolves]:
      layers.BLOCK_BYTES = limit  # read where the model is traced
      for make in (in_scan, in_loop):
        way = make()
        for _ in range(2):  # the first compiles
          begun = time.perf_counter()
          params = jax.block_until_ready(way(params))
          seconds[way] = time.perf_counter() - begun
        names[way] = f'{make.__name__}, blocks of {limit} bytes'
    layers.BLOCK_BYTES = blocks
    way = min(seconds, key=seconds.get)
    run.variant = names[way]
    params = jax.block_until_ready(way(params))
    return count

  return run


def fedjax(data: Any, *, plain: bool = True) -> Round:
  """FedJAX's own federated averaging, shuffling, last batches filled."""
  import jax
  import jax.numpy as jnp

  if not hasattr(jax, 'tree_map'):
    jax.tree_map = jax.tree_util.tree_map  # FedJAX 0.0.17 still calls it
  import fedjax as library
  from fedjax.algorithms import fed_avg

  model = make_model(data.workload.model, plain=plain)
  mask = jnp.ones(data.workload.batch_size, bool)

  def gradient(params: PyTree, batch: dict, key: Any) -> PyTree:
    del key
    return jax.grad(
      lambda p: loss(model, p, batch['x'], batch['y'], mask[: len(batch['x'])])
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
  'fedjax': fedjax,
  'fedjax_our_layers': lambda data: fedjax(data, plain=False),
}


def use_one_device_per_core() -> None:
  """What the binaries do on CPU; before jax has started."""
  import jax

  cores = len(os.sched_getaffinity(0))
  jax.config.update('jax_num_cpu_devices', cores)


def main() -> None:
  """Serves rounds of one contestant."""
  parser = argparse.ArgumentParser()
  parser.add_argument('name', choices=sorted(CONTESTANTS))
  parser.add_argument('--workload', required=True)
  parser.add_argument('--population', type=int, default=0)
  parser.add_argument('--cohort', type=int, default=0)
  parser.add_argument('--core', type=int, help='use only this core')
  parser.add_argument('--coordinator_address', default='')
  parser.add_argument('--num_processes', type=int, default=1)
  parser.add_argument('--process_id', type=int, default=0)
  given = parser.parse_args()
  server = Server()
  if given.core is not None:
    os.sched_setaffinity(0, {given.core})

  import jax

  if given.name == 'ours':
    use_one_device_per_core()
  if given.coordinator_address:
    jax.distributed.initialize(
      given.coordinator_address, given.num_processes, given.process_id
    )
  compiles: list[float] = []

  def note(name: str, seconds: float, **more: Any) -> None:
    if name.endswith('backend_compile_duration'):
      compiles.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(note)
  from benchmarks import workloads

  data = workloads.make_data(
    given.workload, population=given.population, cohort=given.cohort
  )
  run = CONTESTANTS[given.name](data)

  def timed(round: int) -> Answer:
    compiles.clear()
    begun = time.perf_counter()
    batches = run(round)
    seconds = time.perf_counter() - begun
    size = data.workload.batch_size
    return Answer(
      seconds,
      batches or data.num_batches(round),
      batches * size if batches else int(data.sizes[data.cohort(round)].sum()),
      compiles=len(compiles),
      compile_seconds=sum(compiles),
      about={
        'jax': jax.__version__,
        'device': jax.devices()[0].device_kind,
        'variant': getattr(run, 'variant', given.name),
      },
    )

  server.serve(timed)
  getattr(run, 'close', lambda: None)()


if __name__ == '__main__':
  main()
