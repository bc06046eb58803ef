"""Results do not depend on lanes, devices, client order, prefetch or states."""

import concurrent.futures

import jax
import numpy as np
import optax
from absl.testing import absltest, parameterized

from fedjax_ext import core
from fedjax_ext.algorithms import fed_avg, local_training, scaffold
from tests.problems import SIZES, make_problem, relative_error, x64

PHASE = core.Phase(epochs=2, batch_size=4)
COHORTS = ((0, 2, 3, 4, 5, 8, 9, 13), (1, 2, 4, 7, 8, 17), (0, 5, 6, 8, 18))


def make_algorithm(name, task, layout):
  if name == 'scaffold':
    return scaffold(
      task,
      client_learning_rate=0.1,
      num_clients=len(SIZES),
      layout=layout,
      phase=PHASE,
    )
  if name == 'local_training':
    return local_training(
      task, client_optimizer=optax.sgd(0.1), layout=layout, phase=PHASE
    )
  return fed_avg(
    task,
    client_optimizer=optax.sgd(0.1, momentum=0.9),
    server_optimizer=optax.adam(0.03),
    layout=layout,
    phase=PHASE,
  )


def run(
  name='fed_avg',
  model='mlp',
  *,
  float64=False,
  shuffle=None,
  prefetch=False,
  bank=False,
  **layout,
):
  """Three rounds; returns (server state, rows of all clients or None)."""
  problem = make_problem(model, float64=float64)
  layout = core.make_layout(**layout)
  algorithm = make_algorithm(name, problem.task, layout)
  state, states = algorithm.init(jax.random.key(0)), None
  if algorithm.init_client is not None:
    states = core.make_client_states(
      algorithm.init_client, num_clients=len(SIZES), key=jax.random.key(1)
    )
  elif bank:  # a bank that nobody reads
    states = core.make_client_states(
      lambda key, number: number, num_clients=len(SIZES), key=jax.random.key(1)
    )

  def prepare(round):
    clients = np.array(COHORTS[round - 1])
    if shuffle is not None:
      clients = np.random.default_rng([shuffle, round]).permutation(clients)
    cohort = problem.cohort(algorithm, clients, layout, round=round)
    cohort.plans('train')
    return cohort

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    ahead = [pool.submit(prepare, r) for r in (1, 2, 3)] if prefetch else None
    for round in (1, 2, 3):
      cohort = ahead[round - 1].result() if prefetch else prepare(round)
      state, states, _ = algorithm.apply(state, states, cohort)
  rows = None
  if algorithm.init_client is not None:
    rows = states.gather(np.arange(len(SIZES)))
  return jax.tree.map(np.asarray, state), rows


class InvarianceTest(parameterized.TestCase):
  @parameterized.parameters('fed_avg', 'scaffold', 'local_training')
  def test_lanes_and_devices_float64(self, name):
    with x64():
      expected = run(name, float64=True, num_devices=1, lanes=1)
      for devices, lanes in ((1, 4), (1, 16), (2, 1), (8, 1), (8, 4)):
        got = run(name, float64=True, num_devices=devices, lanes=lanes)
        self.assertLess(relative_error(got, expected), 1e-9, (devices, lanes))

  @parameterized.parameters('fed_avg', 'scaffold', 'local_training')
  def test_lanes_and_devices_float32(self, name):
    expected = run(name, num_devices=1, lanes=1)
    for devices, lanes in ((1, 4), (1, 16), (2, 1), (8, 1), (8, 4)):
      got = run(name, num_devices=devices, lanes=lanes)
      self.assertLess(relative_error(got, expected), 1e-5, (devices, lanes))

  def test_waves(self):
    with x64():
      expected = run('scaffold', float64=True, num_devices=2)
      got = run('scaffold', float64=True, num_devices=2, wave_clients=3)
      self.assertLess(relative_error(got, expected), 1e-9)

  @parameterized.parameters('fed_avg', 'scaffold')
  def test_same_bits(self, name):
    """Again, in another client order, with prefetch, with an unused bank."""
    layout = dict(num_devices=2, lanes=2)
    expected = run(name, **layout)
    for change in ({}, {'shuffle': 1}, {'prefetch': True}, {'bank': True}):
      got = run(name, **change, **layout)
      jax.tree.map(np.testing.assert_array_equal, got, expected)

  def test_another_seed_gives_another_result(self):
    a = run(shuffle=1, num_devices=1)
    problem = make_problem()
    layout = core.make_layout(num_devices=1)
    algorithm = make_algorithm('fed_avg', problem.task, layout)
    state = algorithm.init(jax.random.key(0))
    for round in (1, 2, 3):
      cohort = problem.cohort(
        algorithm, COHORTS[round - 1], layout, round=round, seed=4
      )
      state, _, _ = algorithm.apply(state, None, cohort)
    self.assertGreater(relative_error(state.params, a[0].params), 1e-4)


if __name__ == '__main__':
  absltest.main()
