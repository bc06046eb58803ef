"""The engine's contract, with small hand-written programs."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext import core
from fedjax_ext.core import Batch, Client, ClientOutput, ClientProgram
from tests.problems import SIZES, make_problem, x64

LAYOUTS = (
  dict(num_devices=1, lanes=1),
  dict(num_devices=1, lanes=4),
  dict(num_devices=4, lanes=3),
  dict(num_devices=8, lanes=1, wave_clients=5),
)
EVERYBODY = np.arange(len(SIZES))
PHASES = (core.Phase(epochs=2, batch_size=4), core.Phase(batch_size=4))


class Shell:
  """Plans only, as make_cohort wants them."""

  def __init__(self, phases=PHASES):
    self.plans = {'work': core.PlanSpec(phases)}


def _or_zero(row):
  return jnp.float32(0) if isinstance(row, tuple) else row


def recorder() -> ClientProgram:
  """Sums what it sees; its result says whether everything arrived."""

  def init(shared, client, key):
    del key
    return {
      'sum': shared * 0.0,
      'rows': jnp.int32(0),
      'steps': jnp.int32(0),
      'phases': jnp.zeros(2, jnp.int32),
      'epochs_ended': jnp.int32(0),
      'old': _or_zero(client.state),
      'input': _or_zero(client.inputs),
    }

  def step(shared, state, batch: Batch):
    real = jnp.where(batch.mask, batch.data['image'].sum((1, 2, 3)), 0)
    return state | {
      'sum': state['sum'] + real.sum(),
      'rows': state['rows'] + batch.mask.sum(dtype=jnp.int32),
      'steps': state['steps'] + 1,
      'phases': state['phases'].at[batch.info.phase].add(1),
      'epochs_ended': state['epochs_ended'] + batch.info.epoch_end,
    }

  def final(shared, client: Client, state):
    return ClientOutput(
      {'number': client.number, **state},
      client.num_examples,
      metrics={'rows': (state['rows'], jnp.float32(1))},
    )

  return ClientProgram(init, step, final)


class EngineTest(parameterized.TestCase):
  def run_round(self, program, reducer, layout, clients=EVERYBODY, **kwargs):
    problem = kwargs.pop('problem', None) or make_problem()
    debug = kwargs.pop('debug', False)
    layout = core.make_layout(**layout)
    cohort = problem.cohort(Shell(), clients, layout)
    run = core.for_each_client(program, reducer, layout=layout, debug=debug)
    return run(jnp.float32(0), cohort, 'work', **kwargs)

  @parameterized.parameters(*LAYOUTS)
  def test_every_client_sees_exactly_its_batches(self, **layout):
    problem = make_problem()
    output, _ = self.run_round(recorder(), core.collect(), layout)
    (got, weights), _ = core.finish(core.collect(), output)
    slots = np.flatnonzero(output.clients >= 0)
    self.assertEqual(sorted(output.clients[slots].tolist()), EVERYBODY.tolist())
    for slot in slots:
      client = int(output.clients[slot])
      size = SIZES[client]
      images = problem.federated.client(client)['image']
      steps = -(-size // 4)
      self.assertEqual(got['number'][slot], client)
      self.assertEqual(weights[slot], size)
      self.assertEqual(got['rows'][slot], 3 * size)
      self.assertEqual(got['phases'][slot].tolist(), [2 * steps, steps])
      self.assertEqual(got['epochs_ended'][slot], 3 if size else 0)
      np.testing.assert_allclose(
        got['sum'][slot], 3 * images.sum(), rtol=1e-4, atol=1e-3
      )

  @parameterized.parameters('collect', 'total')
  def test_more_waves_compile_one_program_more(self, reducer):
    """The one that joins what they return; not one for each wave."""
    compiled = []

    def note(name, seconds, **more):
      if name.endswith('backend_compile_duration'):
        compiled.append(name)

    def programs(clients):
      compiled.clear()
      cohort = problem.cohort(Shell(), EVERYBODY[:clients], layout)
      run(jnp.float32(0), cohort, 'work')
      return len(compiled)

    problem = make_problem()
    layout = core.make_layout(num_devices=1, lanes=1, wave_clients=2)
    run = core.for_each_client(
      recorder(), getattr(core, reducer)(), layout=layout
    )
    jax.monitoring.register_event_duration_secs_listener(note)
    programs(4)
    programs(6)  # plans of these sizes have other shapes
    first = programs(16)
    self.assertLessEqual(first, 2)
    self.assertEqual(programs(16), 0)

  @parameterized.parameters(*LAYOUTS)
  def test_debug_path_agrees(self, **layout):
    inputs = jnp.arange(len(EVERYBODY), dtype=jnp.float32)
    outputs = [
      self.run_round(
        self.stateful(),
        core.collect(),
        layout,
        states=self.states(),
        inputs=inputs,
        debug=debug,
      )
      for debug in (False, True)
    ]
    (fast, fast_states), (slow, slow_states) = outputs
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
      (fast.acc, fast.metrics, fast.diagnostics),
      (slow.acc, slow.metrics, slow.diagnostics),
    )
    np.testing.assert_allclose(
      fast_states.gather(EVERYBODY), slow_states.gather(EVERYBODY), rtol=1e-5
    )

  def states(self):
    return core.make_client_states(
      lambda key, number: number.astype(jnp.float32) * 100,
      num_clients=len(SIZES),
      key=jax.random.key(0),
    )

  def stateful(self):
    program = recorder()

    def final(shared, client, state):
      output = program.final(shared, client, state)
      return output._replace(state=client.state + 1.0)

    return program._replace(final=final)

  @parameterized.parameters(*LAYOUTS)
  def test_states_and_inputs_reach_their_client(self, **layout):
    clients = np.array([4, 1, 8, 5, 3])
    inputs = jnp.asarray(sorted(clients), jnp.float32) * 7
    before = self.states()
    states = before
    for expected in (0, 1):
      output, states = self.run_round(
        self.stateful(),
        core.collect(),
        layout,
        clients,
        states=states,
        inputs=inputs,
      )
      for slot in np.flatnonzero(output.clients >= 0):
        number = output.clients[slot]
        self.assertEqual(
          output.acc.update['old'][slot], number * 100 + expected
        )
        self.assertEqual(output.acc.update['input'][slot], number * 7)
    np.testing.assert_array_equal(
      states.gather(EVERYBODY),
      EVERYBODY * 100 + 2.0 * np.isin(EVERYBODY, clients),
    )
    np.testing.assert_array_equal(before.gather(EVERYBODY), EVERYBODY * 100)

  def test_a_program_may_read_rows_without_writing_them(self):
    states = self.states()
    _, after = self.run_round(
      recorder(), core.total(), LAYOUTS[1], states=states
    )
    self.assertIs(after, states)

  @parameterized.parameters(*LAYOUTS)
  def test_non_finite_client_is_dropped_and_keeps_its_row(self, **layout):
    bad = 8

    def final(shared, client, state):
      output = self.stateful().final(shared, client, state)
      nan = jnp.where(client.number == bad, jnp.nan, 0.0)
      update = output.update | {'sum': output.update['sum'] + nan}
      return output._replace(
        update={'sum': update['sum']},
        metrics={'x': (output.update['sum'] + nan, jnp.float32(1))},
      )

    program = self.stateful()._replace(final=final)
    reducer = core.weighted_mean()
    output, states = self.run_round(
      program, reducer, layout, states=self.states()
    )
    without, _ = self.run_round(
      program,
      reducer,
      layout,
      EVERYBODY[bad != EVERYBODY],
      states=self.states(),
    )
    np.testing.assert_allclose(
      core.finish(reducer, output)[0]['sum'],
      core.finish(reducer, without)[0]['sum'],
      rtol=1e-5,
    )
    summary = core.summarize(output)
    self.assertEqual(summary['clients_dropped'], 1)
    self.assertEqual(summary['clients'], len(SIZES))
    self.assertTrue(np.isfinite(summary['x']))
    rows = states.gather(EVERYBODY)
    np.testing.assert_array_equal(rows, EVERYBODY * 100 + (bad != EVERYBODY))

  def test_masked_rows_change_nothing_bit_for_bit(self):
    """The same clients with a batch size that leaves more padding."""
    problem = make_problem()
    layout = core.make_layout(num_devices=1)
    results = []
    for junk in (0.0, 1e6):
      image = problem.federated.features['image'].copy()
      # Rows of a client that is not in the cohort: only padding could see them.
      image[problem.federated.client_rows(8)] = junk
      other = problem._replace(federated=_with_image(problem, image))
      cohort = other.cohort(Shell(), [0, 1, 5, 9], layout)
      run = core.for_each_client(recorder(), core.total(), layout=layout)
      results.append(run(jnp.float32(0), cohort, 'work')[0].acc)
    jax.tree.map(np.testing.assert_array_equal, *results)

  def test_keys_differ_by_round_client_and_step_not_by_layout(self):
    def step(shared, state, batch):
      draw = jax.random.uniform(batch.info.key)
      return state | {'sum': state['sum'] + draw}

    program = recorder()._replace(step=step)
    sums = []
    for layout in LAYOUTS:
      output, _ = self.run_round(program, core.collect(), layout)
      order = np.argsort(output.clients)
      order = order[output.clients[order] >= 0]
      sums.append(np.asarray(output.acc.update['sum'])[order])
    for other in sums[1:]:
      np.testing.assert_allclose(sums[0], other, rtol=1e-6)
    self.assertLen(set(sums[0][[0, 1, 2, 4]].tolist()), 4)

  def test_per_client_metrics_come_in_client_order(self):
    output, _ = self.run_round(
      recorder(), core.total(), LAYOUTS[3], np.array([8, 0, 4])
    )
    clients, metrics = core.per_client(output)
    self.assertEqual(clients.tolist(), [0, 4, 8])
    rows, weights = metrics['rows']
    self.assertEqual(rows.tolist(), [15, 60, 99])
    self.assertEqual(weights.tolist(), [1, 1, 1])

  def test_combine_equals_one_call(self):
    reducer = core.by_key(number=core.total(), sum=core.collect())
    program = recorder()
    program = program._replace(
      final=lambda *args: (
        lambda o: o._replace(update={k: o.update[k] for k in ('number', 'sum')})
      )(recorder().final(*args))
    )
    layout = dict(num_devices=2, lanes=2)
    whole, _ = self.run_round(program, reducer, layout)
    a, _ = self.run_round(program, reducer, layout, EVERYBODY[:6])
    b, _ = self.run_round(program, reducer, layout, EVERYBODY[6:])
    both = core.combine(reducer, a, b)
    (total_a, _), (total_b, _) = whole.acc['number'], both.acc['number']
    np.testing.assert_allclose(total_a, total_b, rtol=1e-6)
    pick = lambda o: {
      int(c): float(o.acc['sum'].update[i])
      for i, c in enumerate(o.clients)
      if c >= 0
    }
    self.assertEqual(pick(whole).keys(), pick(both).keys())
    for client, value in pick(whole).items():
      self.assertAlmostEqual(value, pick(both)[client], places=3)

  def test_select_keeps_batches_and_keys(self):
    problem = make_problem()
    layout = core.make_layout(num_devices=2)
    cohort = problem.cohort(Shell(), EVERYBODY, layout)
    run = core.for_each_client(recorder(), core.collect(), layout=layout)
    some = cohort.select(cohort.clients % 3 == 0)
    output, _ = run(jnp.float32(0), some, 'work')
    clients, metrics = core.per_client(output)
    self.assertEqual(clients.tolist(), [c for c in EVERYBODY if c % 3 == 0])
    self.assertEqual(
      metrics['rows'][0].tolist(), [3 * SIZES[c] for c in clients]
    )

  def test_empty_cohort(self):
    output, _ = self.run_round(
      recorder(), core.weighted_mean(), LAYOUTS[2], np.array([], int)
    )
    mean, _ = core.finish(core.weighted_mean(), output)
    self.assertEqual(mean['sum'], 0)
    self.assertEqual(core.summarize(output)['clients'], 0)

  def test_vectors_of_a_client_have_no_summary(self):
    def final(shared, state, client):
      output = recorder().final(shared, state, client)
      return output._replace(metrics={'x': (jnp.ones(2), jnp.float32(1))})

    program = recorder()._replace(final=final)
    output, _ = self.run_round(program, core.collect(), LAYOUTS[2], EVERYBODY)
    with self.assertRaisesRegex(
      core.InvalidInput, r"metric 'x' for each client, got shape \[2\]"
    ):
      core.summarize(output)

  def test_run_one_equals_the_engine(self):
    problem = make_problem()
    rows = problem.federated.client_rows(2)  # 9 examples
    pad = np.concatenate([rows, rows[[8, 8, 8]]]).reshape(3, 4)
    output = core.run_one(
      recorder(),
      jnp.float32(0),
      Client(jnp.int32(2), jnp.int32(9)),
      jax.random.key(0),
      {k: x[pad] for k, x in problem.federated.features.items()},
      jnp.arange(12).reshape(3, 4) < 9,
    )
    self.assertEqual(output.update['rows'], 9)
    self.assertEqual(output.update['epochs_ended'], 1)
    np.testing.assert_allclose(
      output.update['sum'],
      problem.federated.client(2)['image'].sum(),
      rtol=1e-4,
    )

  def test_recurrent_model_with_constant_carry(self):
    """The reason for check_vma=False at the engine's shard_map."""

    def step(shared, state, batch):
      x = batch.data['image'][:, :, 0, 0]
      carry, _ = jax.lax.scan(
        lambda c, xi: (jnp.tanh(c + xi), None), jnp.zeros(4), x.T
      )
      return state | {
        'sum': state['sum'] + jnp.where(batch.mask, carry, 0).sum()
      }

    output, _ = self.run_round(
      recorder()._replace(step=step), core.total(), LAYOUTS[2]
    )
    self.assertTrue(np.isfinite(output.acc[0]['sum']))


class ErrorTest(parameterized.TestCase):
  def run_with(self, **changes):
    problem = make_problem()
    layout = core.make_layout(num_devices=1)
    kwargs = {k: changes.pop(k) for k in ('states', 'inputs') if k in changes}
    debug = changes.pop('debug', False)
    program = recorder()._replace(**changes)
    run = core.for_each_client(
      program, core.total(), layout=layout, debug=debug
    )
    cohort = problem.cohort(Shell(), [0, 4], layout)
    return run(jnp.float32(0), cohort, 'work', **kwargs)

  def test_step_that_changes_its_state(self):
    with self.assertRaisesRegex(core.InvalidInput, 'keep the structure'):
      self.run_with(step=lambda shared, state, batch: {'sum': state['sum']})
    with self.assertRaisesRegex(
      core.InvalidInput, r"keep float32\[\] at state\['sum'\], got float32\[4\]"
    ):
      self.run_with(
        step=lambda shared, state, batch: (
          state | {'sum': state['sum'] + batch.mask.astype(jnp.float32)}
        )
      )

  def test_state_without_bank(self):
    with self.assertRaisesRegex(core.InvalidInput, 'Expected states='):
      self.run_with(
        final=lambda shared, client, state: ClientOutput(
          (), jnp.float32(1), state=state['sum']
        )
      )

  def test_another_state_than_the_row(self):
    states = core.make_client_states(
      lambda key, number: jnp.zeros(3), num_clients=19, key=jax.random.key(0)
    )
    with self.assertRaisesRegex(core.InvalidInput, 'like its row'):
      self.run_with(
        init=lambda shared, client, key: recorder().init(
          shared, client._replace(state=()), key
        ),
        final=lambda shared, client, state: ClientOutput(
          (), jnp.float32(1), state=jnp.zeros(2)
        ),
        states=states,
      )

  def test_inputs_of_another_length(self):
    with self.assertRaisesRegex(core.InvalidInput, 'leading axis K=2'):
      self.run_with(inputs=jnp.zeros(3))

  def test_unknown_plan(self):
    layout = core.make_layout(num_devices=1)
    cohort = make_problem().cohort(Shell(), [0], layout)
    with self.assertRaisesRegex(core.InvalidInput, 'plan to be one of work'):
      cohort.plans('train')

  @parameterized.parameters('init', 'step', 'final')
  def test_debug_names_stage_client_and_batch(self, stage):
    def fail(*args):
      raise ZeroDivisionError('here')

    with self.assertRaises(core.ClientError) as caught:
      self.run_with(debug=True, **{stage: fail})
    error = caught.exception
    self.assertEqual((error.stage, error.client), (stage, 0))
    self.assertIsInstance(error.__cause__, ZeroDivisionError)
    self.assertIn(f'{stage} of client 0 failed', str(error))
    if stage == 'step':
      own = make_problem().federated.client_rows(0)
      self.assertTrue(set(error.batch.tolist()) <= set(own.tolist()))

  def test_debug_says_when_a_state_turns_non_finite(self):
    with self.assertLogs('fedjax_ext.core.debug', 'WARNING') as logs:
      output, _ = self.run_with(
        debug=True,
        step=lambda shared, state, batch: (
          state
          | {
            'sum': state['sum'] / (1 - batch.info.step),
            'steps': state['steps'] + 1,
          }
        ),
      )
    self.assertIn('not finite after step 1', logs.output[0])
    self.assertTrue(output.diagnostics['dropped'].any())


class Float64Test(absltest.TestCase):
  def test_the_engine_keeps_float64(self):
    with x64():
      problem = make_problem(float64=True)
      layout = core.make_layout(num_devices=2, lanes=2)
      run = core.for_each_client(recorder(), core.total(), layout=layout)
      cohort = problem.cohort(Shell(), EVERYBODY, layout)
      output, _ = run(jnp.float64(0), cohort, 'work')
      self.assertEqual(output.acc[0]['sum'].dtype, jnp.float64)
      weights = np.array(SIZES, np.float64)
      sums = [3 * problem.federated.client(c)['image'].sum() for c in EVERYBODY]
      np.testing.assert_allclose(
        output.acc[0]['sum'], (weights * sums).sum(), rtol=1e-12
      )


def _with_image(problem, image):
  import dataclasses

  return dataclasses.replace(
    problem.federated,
    features=dict(problem.federated.features, image=image),
  )


if __name__ == '__main__':
  absltest.main()
