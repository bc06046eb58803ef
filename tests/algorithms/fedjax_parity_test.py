"""FedAvg equals FedJAX 0.0.17's federated averaging, fed the same batches.

The numbers that FedJAX gave are in tests/golden (make_fedjax_golden.py there
makes them again); where FedJAX is installed, it is also run afresh.
"""

import importlib.util
import pathlib
import subprocess
import sys
import tempfile
import unittest

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from fedjax_ext import core, data
from fedjax_ext.algorithms import fed_avg
from fedjax_ext.losses import Task, masked_mean

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'fedjax_fed_avg.npz'


def load(path):
  with np.load(path) as file:
    return {name: file[name] for name in file.files}


def make_task(golden, model) -> Task:
  prefix = f'{model}/init/'
  init = {
    k[len(prefix) :]: v for k, v in golden.items() if k.startswith(prefix)
  }

  def logits(p, x):
    if model == 'softmax':
      return x @ p['w'] + p['b']
    return jax.nn.relu(x @ p['w1'] + p['b1']) @ p['w2'] + p['b2']

  def loss(params, batch):
    values = optax.softmax_cross_entropy_with_integer_labels(
      logits(params, batch.data['x']), batch.data['y']
    )
    return masked_mean(values, batch.mask)

  return Task(
    init=lambda key: jax.tree.map(jnp.asarray, init),
    loss=loss,
    metrics=lambda params, batch: {},
  )


def our_rounds(golden, model, batch_size, *, remainder='fill', **layout):
  """Params after each round, as FedJAX's golden file has them."""
  sizes = golden['sizes']
  federated = data.from_assignment(
    {'x': golden['x'], 'y': golden['y']},
    np.repeat(np.arange(len(sizes)), sizes),
    client_ids=np.arange(len(sizes)),
  )
  layout = core.make_layout(**layout)
  algorithm = fed_avg(
    make_task(golden, model),
    client_optimizer=optax.sgd(0.1),
    server_optimizer=optax.sgd(1.0, momentum=0.9),
    layout=layout,
    phase=core.Phase(
      epochs=2, batch_size=batch_size, shuffle=False, remainder=remainder
    ),
  )
  state = algorithm.init(jax.random.key(0))
  features = core.place_features(federated.features, layout)
  rounds = []
  for round, clients in enumerate(golden['cohorts'], 1):
    cohort = core.make_cohort(
      clients,
      round=round,
      seed=0,
      specs=algorithm.plans,
      data={'train': federated},
      features=features,
      layout=layout,
    )
    state, _, _ = algorithm.apply(state, None, cohort)
    rounds.append(jax.tree.map(np.asarray, state.params))
  return rounds


class FedjaxParityTest(parameterized.TestCase):
  def check(self, golden, model, batch_size, tolerance=2e-6, **options):
    for round, params in enumerate(
      our_rounds(golden, model, batch_size, **options)
    ):
      for name, value in params.items():
        np.testing.assert_allclose(
          value,
          golden[f'{model}/batch{batch_size}/{name}'][round],
          atol=tolerance,
        )

  @parameterized.product(
    model=['softmax', 'mlp'],
    batch_size=[4, 16],
    layout=[dict(num_devices=1), dict(num_devices=3, lanes=2)],
  )
  def test_golden(self, model, batch_size, layout):
    self.check(load(GOLDEN), model, batch_size, **layout)

  def test_golden_tells_fill_from_mask(self):
    with self.assertRaises(AssertionError):
      self.check(load(GOLDEN), 'mlp', 4, 1e-3, remainder='mask')

  @unittest.skipUnless(
    importlib.util.find_spec('fedjax'), 'fedjax is not installed'
  )
  def test_fedjax_itself(self):
    script = GOLDEN.parent / 'make_fedjax_golden.py'
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'fresh.npz'
      subprocess.run([sys.executable, script, path], check=True)
      for model in ('softmax', 'mlp'):
        self.check(load(path), model, 4)


if __name__ == '__main__':
  absltest.main()
