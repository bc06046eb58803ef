"""pfl-research as a contestant: federated averaging of the workload's model.

  python -m benchmarks.pfl_research pfl --workload=W2

Started by `rounds` with --pfl_python, an environment that has `pfl` 0.6.0 and
torch (no jax). `pfl` is one process with a thread a core; `pfl2` is a process
of one thread a core, torch's gloo between them. pfl-research trains a client in
its stored order. Its loop decides when a round begins: a callback waits there
for the round's number.

Axis letters: B examples in a batch.
"""

import argparse
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks import workloads
from benchmarks.protocol import Answer, Server

_RATE = 0.1
NAMES = ('pfl', 'pfl2')


def make_net(name: str) -> Any:
  """The workload's model in torch, with the loss and metrics of pfl."""
  import torch
  from torch import nn
  from torch.nn import functional

  class Net(nn.Module):
    """Body and loss; y of text is [B, 80]."""

    def __init__(self, body: nn.Module):
      super().__init__()
      self.body = body

    def forward(self, x):
      """Maps a batch [B, ...] to logits."""
      return self.body(x)

    def loss(self, x, y, **unused):
      """Mean cross-entropy, a scalar."""
      z = self.body(x)
      return functional.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1))

    @torch.no_grad()
    def metrics(self, x, y, **unused):
      """The loss, for pfl's evaluation, which is not asked for."""
      from pfl.metrics import Weighted

      return {'loss': Weighted(float(self.loss(x, y)) * len(x), len(x))}

  class Language(nn.Module):
    """Embedding 8, LSTM 128, dense."""

    def __init__(self):
      super().__init__()
      self.embedding = nn.Embedding(workloads.VOCABULARY, 8)
      self.lstm = nn.LSTM(8, 128, batch_first=True)
      self.output = nn.Linear(128, workloads.VOCABULARY)

    def forward(self, x):
      return self.output(self.lstm(self.embedding(x))[0])

  bodies = {
    'softmax': lambda: nn.Linear(784, 10),
    'mlp': lambda: nn.Sequential(
      nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10)
    ),
    'cnn': lambda: nn.Sequential(
      nn.Unflatten(1, (1, 28, 28)),
      *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()),
      *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU()),
      nn.Linear(128, 62),
    ),
    'lstm': Language,
  }
  return Net(bodies[name]())


def main() -> None:
  """Serves rounds."""
  parser = argparse.ArgumentParser()
  parser.add_argument('name', choices=NAMES)
  parser.add_argument('--workload', required=True)
  parser.add_argument('--population', type=int, default=0)
  parser.add_argument('--cohort', type=int, default=0)
  given = parser.parse_args()
  cores = len(os.sched_getaffinity(0))
  if given.name == 'pfl2' and 'RANK' not in os.environ:
    launch = ['-m', 'torch.distributed.run', '--standalone']
    launch += [f'--nproc_per_node={cores}', '-m', 'benchmarks.pfl_research']
    environment = dict(os.environ, OMP_NUM_THREADS='1')
    command = [sys.executable, *launch, *sys.argv[1:]]
    sys.exit(subprocess.call(command, env=environment))
  rank = int(os.environ.get('RANK', 0))
  server = Server() if rank == 0 else None

  import importlib.metadata

  import numpy as np
  import torch
  from pfl.aggregate.simulate import SimulatedBackend
  from pfl.aggregate.weighting import WeightByDatapoints
  from pfl.algorithm.base import NNAlgorithmParams
  from pfl.algorithm.federated_averaging import FederatedAveraging
  from pfl.callback.base import TrainingProcessCallback
  from pfl.data.dataset import Dataset
  from pfl.data.federated_dataset import FederatedDataset
  from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
  from pfl.metrics import Metrics
  from pfl.model.pytorch import PyTorchModel

  torch.set_num_threads(cores if given.name == 'pfl' else 1)
  np.random.seed(0)
  torch.manual_seed(0)
  data = workloads.make_data(
    given.workload, population=given.population, cohort=given.cohort
  )
  size = data.workload.batch_size
  x = torch.from_numpy(data.x)
  x = x.long() if data.workload.model == 'lstm' else x.reshape(len(x), -1)
  y = torch.from_numpy(data.y.astype(np.int64))
  order = (c for r in range(1, 10_000) for c in data.cohort(r).tolist())

  def make_dataset(client: int) -> Dataset:
    start = int(data.starts[client])
    mine = slice(start, start + int(data.sizes[client]))
    return Dataset(raw_data=[x[mine], y[mine]], user_id=str(client))

  weights = {c: int(n) for c, n in enumerate(data.sizes)}
  train = FederatedDataset(
    make_dataset,
    lambda: next(order),
    user_id_to_weight=weights if given.name == 'pfl' else None,
  )
  net = make_net(data.workload.model)
  model = PyTorchModel(
    net,
    local_optimizer_create=lambda p, lr: torch.optim.SGD(list(p), lr=lr),
    central_optimizer=torch.optim.SGD(net.parameters(), 1.0),
  )

  class Rounds(TrainingProcessCallback):
    """Holds pfl's loop until the next number comes; answers after a round."""

    def __init__(self):
      self.numbers = server.rounds() if server else None
      self.round, self.begun = 0, 0.0

    def wait(self) -> bool:
      """Whether there is a next round; every process hears the same."""
      if server:
        self.round = next(self.numbers, -1)
      if given.name == 'pfl2':
        told = torch.tensor([self.round])
        torch.distributed.broadcast(told, 0)
        self.round = int(told)
      self.begun = time.perf_counter()
      return self.round >= 0

    def on_train_begin(self, *, model):
      self.wait()
      return Metrics()

    def after_central_iteration(
      self, aggregate_metrics, model, *, central_iteration
    ):
      seconds = time.perf_counter() - self.begun
      if server:
        about = {
          'pfl': importlib.metadata.version('pfl'),
          'torch': torch.__version__,
          'variant': given.name,
        }
        examples = int(data.sizes[data.cohort(self.round)].sum())
        batches = data.num_batches(self.round)
        server.answer(Answer(seconds, batches, examples, about=about))
      return not self.wait(), Metrics()

  FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
      central_num_iterations=10_000,
      evaluation_frequency=10**9,
      train_cohort_size=data.workload.cohort,
      val_cohort_size=0,
    ),
    backend=SimulatedBackend(
      training_data=train, val_data=train, postprocessors=[WeightByDatapoints()]
    ),
    model=model,
    model_train_params=NNTrainHyperParams(
      local_batch_size=size, local_num_epochs=1, local_learning_rate=_RATE
    ),
    model_eval_params=NNEvalHyperParams(local_batch_size=None),
    callbacks=[Rounds()],
    send_metrics_to_platform=False,
  )


if __name__ == '__main__':
  main()
