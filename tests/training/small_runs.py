"""Small runs of the training loop, and what makes two runs the same."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import optax

from fedjax_ext import algorithms, core, data
from fedjax_ext.losses import classification_task
from fedjax_ext.models import make_model
from fedjax_ext.training import loop
from fedjax_ext.training.checkpoints import digest
from fedjax_ext.training.manifest import make_manifest

NUM_CLIENTS = 6
SCHEDULE = dict(num_rounds=6, eval_every=2, checkpoint_every=2)


@functools.cache
def dataset() -> data.FederatedDataset:
  """120 images [120, 4, 4, 1] of 3 classes on 6 clients."""
  rng = np.random.default_rng(0)
  label = rng.integers(0, 3, 120).astype(np.int32)
  image = rng.standard_normal((120, 4, 4, 1)).astype(np.float32)
  image[:, 0, 0, 0] += label
  columns = data.make_columns('small', {'image': image, 'label': label})
  return data.make_dataset(
    columns, partition=data.iid_partition, num_clients=NUM_CLIENTS
  )


@functools.cache
def layout() -> core.Layout:
  """Two devices."""
  return core.make_layout(num_devices=2, lanes=1)


@functools.cache
def algorithm(
  name: str = 'scaffold', *, learning_rate: float = 0.1
) -> core.FederatedAlgorithm:
  """'scaffold' or 'fed_avg', compiled once for all tests."""
  model = make_model('softmax_regression', input_shape=(4, 4, 1), num_classes=3)
  task = classification_task(model)
  common = dict(layout=layout(), phase=core.Phase(batch_size=5))
  if name == 'scaffold':
    return algorithms.scaffold(
      task,
      client_learning_rate=learning_rate,
      num_clients=NUM_CLIENTS,
      **common,
    )
  return algorithms.fed_avg(
    task,
    client_optimizer=optax.sgd(learning_rate),
    server_optimizer=optax.sgd(1.0),
    **common,
  )


def during(
  one: core.FederatedAlgorithm, round: int, act: Callable[[], Any]
) -> core.FederatedAlgorithm:
  """An algorithm that also acts in the middle of a round."""

  def apply(server_state, client_states, cohort):
    result = one.apply(server_state, client_states, cohort)
    if cohort.round == round:
      act()
    return result

  return one._replace(apply=apply)


def train(
  workdir: pathlib.Path, one: core.FederatedAlgorithm, **schedule: Any
) -> loop.Result:
  """Trains or resumes in a workdir."""
  return loop.train(
    one,
    dataset(),
    sampler=core.uniform_sampler(dataset().participating, cohort_size=3),
    seeds=loop.Seeds(init=1, sampling=2, training=3),
    schedule=loop.Schedule(**(SCHEDULE | schedule)),
    layout=layout(),
    workdir=workdir,
    manifest=make_manifest(
      flags={'test': 1}, data='small', layout=layout().describe()
    ),
  )


def outcome(result: loop.Result, workdir: pathlib.Path) -> dict[str, Any]:
  """All that two runs of the same command must agree on."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  states = None
  if result.client_states is not None:
    states = digest(result.client_states.gather(np.arange(NUM_CLIENTS)))
  return {
    'state': digest(result.server_state),
    'client states': states,
    'rows': [without_time(json.loads(line)) for line in lines],
    'result rows': [without_time(row) for row in result.rows],
    'summary': without_time(json.loads((workdir / 'final.json').read_text())),
    'report': (workdir / 'report.json').read_text(),
  }


def without_time(row: dict[str, Any]) -> dict[str, Any]:
  """A metric row or final.json less what depends on the clock."""
  return {k: v for k, v in row.items() if k not in ('seconds', 'wall_seconds')}


def saved_rounds(workdir: pathlib.Path) -> list[int]:
  """Rounds with a finished checkpoint."""
  names = [path.name for path in (workdir / 'checkpoints').iterdir()]
  return sorted(int(name) for name in names if name.isdigit())
