"""The bank of client states: rows, handles, and checkpoints that survive."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import pathlib
import subprocess
import sys
import tempfile
import textwrap
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_ext import core

NUM_CLIENTS = 12
REPOSITORY = pathlib.Path(__file__).parents[2]


def init_client(key, number):
  """A nested row with leaves of several dtypes, one of them empty."""
  return {
    'params': {'w': jax.random.normal(key, (2, 3)), 'b': (number * 2.0,)},
    'seen': number % 2 == 0,
    'steps': number + 1,
    'draw': jax.random.bits(key, (4,), jnp.uint8),
    'nothing': jnp.zeros((0, 5)),
  }


def make_bank(directory=None, *, init=init_client, num_clients=NUM_CLIENTS):
  return core.make_client_states(
    init, num_clients=num_clients, key=jax.random.key(7), directory=directory
  )


def first_rows(clients, init=init_client):
  """Rows of clients [K'] made one by one."""
  one = jax.jit(lambda c: init(jax.random.fold_in(jax.random.key(7), c), c))
  rows = [one(jnp.int32(c)) for c in clients]
  return jax.tree.map(lambda *x: np.stack(x), *rows)


def filled(clients, value):
  """Rows of clients [K'] that can be told from all others by `value`."""
  count = len(clients)
  return {
    'params': {
      'w': np.full((count, 2, 3), value, np.float32),
      'b': (np.asarray(clients, np.float32) + value,),
    },
    'seen': np.asarray(clients) % 3 == value % 3,
    'steps': np.arange(count, dtype=np.int32) * value,
    'draw': np.full((count, 4), value % 256, np.uint8),
    'nothing': np.zeros((count, 0, 5), np.float32),
  }


def pick(rows, at):
  return jax.tree.map(lambda x: np.asarray(x)[at], rows)


def assert_same(a, b):
  """Equal structure, dtypes and bits."""
  kinds = lambda t: jax.tree.map(lambda x: (x.shape, str(x.dtype)), t)
  assert kinds(a) == kinds(b), (kinds(a), kinds(b))
  jax.tree.map(np.testing.assert_array_equal, a, b)


@contextlib.contextmanager
def storage(kind):
  """A directory for the rows, or None for memory."""
  if kind == 'memory':
    yield None
  else:
    with tempfile.TemporaryDirectory() as directory:
      yield pathlib.Path(directory) / 'client_states'


class RowsTest(parameterized.TestCase):
  """Gather and scatter."""

  @parameterized.parameters('memory', 'directory')
  def test_rows_are_made_when_they_are_first_read(self, kind):
    with storage(kind) as directory:
      bank = make_bank(directory)
      self.assertEqual(bank.num_clients, NUM_CLIENTS)
      self.assertTrue((bank.index == -1).all())
      clients = np.array([7, 0, 11])
      rows = bank.gather(clients)
      assert_same(rows, first_rows(clients))
      self.assertFalse((rows['params']['w'][0] == rows['params']['w'][1]).any())
      # Reading writes nothing, and the same rows come in any other company.
      self.assertTrue((bank.index == -1).all())
      assert_same(
        pick(bank.gather(np.arange(NUM_CLIENTS)), clients), bank.gather(clients)
      )

  @parameterized.parameters('memory', 'directory')
  def test_written_and_unwritten_rows_mix(self, kind):
    with storage(kind) as directory:
      bank = make_bank(directory)
      some = np.array([5, 2, 9])
      bank = bank.scatter(some, filled(some, 3))
      rows = bank.gather(np.array([2, 4, 5, 9, 1]))
      assert_same(pick(rows, [2, 0, 3]), filled(some, 3))
      assert_same(pick(rows, [1, 4]), first_rows([4, 1]))

  def test_one_program_makes_any_number_of_rows(self):
    traced = []

    def counted(key, number):
      traced.append(number)
      return init_client(key, number)

    bank = make_bank(init=counted)
    before = len(traced)
    for clients in ([3], [0, 1, 2], range(NUM_CLIENTS)):
      assert_same(bank.gather(np.array(clients)), first_rows(clients))
    self.assertEqual(len(traced) - before, 1)

  @parameterized.parameters('memory', 'directory')
  def test_scatter_returns_the_next_handle(self, kind):
    with storage(kind) as directory:
      first = make_bank(directory)
      everybody = np.arange(NUM_CLIENTS)
      second = first.scatter(everybody, filled(everybody, 1))
      before = second.index.copy()
      some = np.array([3, 8])
      third = second.scatter(some, filled(some, 2))
      np.testing.assert_array_equal(first.index, -1)
      np.testing.assert_array_equal(second.index, before)
      others = np.setdiff1d(everybody, some)
      np.testing.assert_array_equal(third.index[others], before[others])
      assert_same(pick(third.gather(everybody), some), filled(some, 2))
      assert_same(third.gather(others), pick(filled(everybody, 1), others))
      self.assertLen(set(third.index.tolist()), NUM_CLIENTS)

  def test_gathered_rows_are_copies(self):
    bank = make_bank()
    some = np.array([1, 2])
    bank = bank.scatter(some, filled(some, 1))
    rows = bank.gather(some)
    bank = bank.scatter(some, filled(some, 2))
    bank.scatter(some, filled(some, 3))
    assert_same(rows, filled(some, 1))
    rows['steps'][:] = -1
    self.assertFalse((make_bank().gather(some)['steps'] == -1).any())

  def test_minus_one_pads(self):
    bank = make_bank()
    clients = np.array([4, -1, 6, -1], np.int32)
    bank = bank.scatter(clients, filled(clients, 5))
    self.assertEqual(np.flatnonzero(bank.index >= 0).tolist(), [4, 6])
    rows = bank.gather(clients)
    assert_same(pick(rows, [0, 2]), pick(filled(clients, 5), [0, 2]))
    assert_same(pick(rows, [1, 3]), first_rows([0, 0]))  # reads as client 0
    same = bank.scatter(np.array([-1, -1]), filled([-1, -1], 9))
    np.testing.assert_array_equal(same.index, bank.index)

  def test_no_clients(self):
    bank = make_bank()
    none = np.array([], np.int64)
    rows = bank.gather(none)
    self.assertEqual(rows['params']['w'].shape, (0, 2, 3))
    bank = bank.scatter(none, rows)
    self.assertTrue((bank.index == -1).all())

  def test_device_arrays_are_accepted(self):
    bank = make_bank()
    some = np.array([0, 3])
    bank = bank.scatter(
      jnp.asarray(some), jax.tree.map(jnp.asarray, filled(some, 4))
    )
    assert_same(bank.gather(jnp.asarray(some)), filled(some, 4))

  @parameterized.parameters('memory', 'directory')
  def test_the_bank_grows(self, kind):
    """Twice past its first capacity; old rows move along."""
    with storage(kind) as directory:
      bank = make_bank(directory, num_clients=400)
      for value, clients in enumerate(np.split(np.arange(400), 8), 1):
        bank = bank.scatter(clients, filled(clients, value))
      for value, clients in enumerate(np.split(np.arange(400), 8), 1):
        assert_same(bank.gather(clients), filled(clients, value))
      self.assertLen(set(bank.index.tolist()), 400)
      if directory is not None:
        self.assertGreaterEqual(_capacity(directory), 400)
        self.assertLess(_capacity(directory), 1.05 * 400)

  @parameterized.parameters('memory', 'directory')
  def test_a_row_of_one_bare_leaf(self, kind):
    with storage(kind) as directory:
      bank = make_bank(directory, init=lambda key, number: number * 1.5)
      bank = bank.scatter(np.array([2]), np.array([40.0], np.float32))
      self.assertEqual(
        bank.gather(np.array([1, 2, 3])).tolist(), [1.5, 40, 4.5]
      )

  @parameterized.parameters('memory', 'directory')
  def test_rows_without_a_single_byte(self, kind):
    with storage(kind) as directory:
      bank = make_bank(directory, init=lambda key, number: jnp.zeros((3, 0)))
      bank = bank.scatter(np.array([2, 5]), np.zeros((2, 3, 0), np.float32))
      self.assertEqual(bank.gather(np.array([5, 0])).shape, (2, 3, 0))
      index = bank.snapshot(1)
      again = make_bank(directory, init=lambda key, number: jnp.zeros((3, 0)))
      again = (bank if directory is None else again).restore(index, {1: index})
      self.assertEqual(again.gather(np.array([2])).shape, (1, 3, 0))

  def test_num_clients_must_be_positive(self):
    with self.assertRaisesRegex(core.InvalidInput, 'num_clients >= 1'):
      make_bank(num_clients=0)


def _capacity(directory):
  """Rows that the file of the first leaf (uint8 [4]) has room for."""
  return (directory / 'rows_0.bin').stat().st_size // 4


class CheckpointTest(parameterized.TestCase):
  @parameterized.parameters('memory', 'directory')
  def test_kept_rows_outlive_later_writes(self, kind):
    with storage(kind) as directory:
      bank = make_bank(directory)
      everybody = np.arange(NUM_CLIENTS)
      kept = {}
      for value in range(1, 7):
        some = everybody[value % 3 :: 2]
        bank = bank.scatter(some, filled(some, value))
        if value % 2:
          kept[value] = (bank.snapshot(value), bank.gather(everybody))
      for index, rows in kept.values():
        at = dataclasses.replace(bank, index=index)
        assert_same(at.gather(everybody), rows)

  @parameterized.parameters('memory', 'directory')
  def test_restore_goes_back(self, kind):
    with storage(kind) as directory:
      bank = make_bank(directory)
      some = np.array([1, 5, 8])
      bank = bank.scatter(some, filled(some, 1))
      first = bank.snapshot(10).copy()
      bank = bank.scatter(some[:2], filled(some[:2], 2))
      second = bank.snapshot(20).copy()
      bank = bank.scatter(some, filled(some, 3))
      checkpoints = {10: first, 20: second}
      if directory is not None:
        bank = make_bank(directory)  # as after SIGKILL: nothing was closed
      bank = bank.restore(second, checkpoints)
      assert_same(bank.gather(some[:2]), filled(some[:2], 2))
      assert_same(bank.gather(some[2:]), pick(filled(some, 1), [2]))
      assert_same(bank.gather(np.array([0])), first_rows([0]))
      for value in range(4, 9):
        bank = bank.scatter(some, filled(some, value))
      bank = bank.restore(first, checkpoints)
      assert_same(bank.gather(some), filled(some, 1))

  @parameterized.parameters('memory', 'directory')
  def test_freed_slots_are_used_again_over_200_rounds(self, kind):
    """Half of 48 clients a round, a checkpoint every 5th, a kill every 40th."""
    num_clients, rng = 48, np.random.default_rng(0)
    init = lambda key, number: {'v': number * 0}
    with storage(kind) as directory:
      bank = make_bank(directory, init=init, num_clients=num_clients)
      model, indices, highest = {}, {}, 0
      for round in range(1, 201):
        some = rng.permutation(num_clients)[:24]
        bank = bank.scatter(some, {'v': some.astype(np.int32) + 100 * round})
        model |= {int(c): int(c) + 100 * round for c in some}
        highest = max(highest, int(bank.index.max()))
        if round % 5 == 0:
          bank.keep(set(list(indices)[-1:]))
          indices = dict(list(indices.items())[-1:])
          indices[round] = bank.snapshot(round).copy()
        if round % 40 == 0 and directory is not None:
          bank = make_bank(directory, init=init, num_clients=num_clients)
          bank = bank.restore(indices[round], indices)
        if round % 20 == 0:
          clients = np.array(sorted(model))
          self.assertEqual(
            bank.gather(clients)['v'].tolist(), [model[c] for c in clients]
          )
      # Live rows, two checkpoints and what one round writes.
      self.assertLess(highest, 1.5 * (3 * num_clients + 24))

  def test_a_checkpoint_saved_twice_frees_its_first_rows(self):
    bank = make_bank(init=lambda key, number: number)
    some = np.arange(NUM_CLIENTS)
    highest = 0
    for value in range(50):
      bank = bank.scatter(some, np.full(NUM_CLIENTS, value, np.int32))
      index = bank.snapshot(1)
      highest = max(highest, int(index.max()))
    self.assertLess(highest, 100)
    bank = bank.scatter(some, np.zeros(NUM_CLIENTS, np.int32))
    at = dataclasses.replace(bank, index=index)
    self.assertEqual(at.gather(some).tolist(), [49] * NUM_CLIENTS)

  def test_a_fresh_run_in_an_old_directory_uses_its_room(self):
    with storage('directory') as directory:
      everybody = np.arange(NUM_CLIENTS)
      bank = make_bank(directory).scatter(everybody, filled(everybody, 1))
      bank.snapshot(1)
      room = _capacity(directory)
      fresh = make_bank(directory)
      fresh.keep({})
      for value in range(2, 9):
        fresh = fresh.scatter(everybody, filled(everybody, value))
      assert_same(fresh.gather(everybody), filled(everybody, 8))
      self.assertEqual(_capacity(directory), room)

  def test_opening_a_directory_alone_overwrites_nothing(self):
    with storage('directory') as directory:
      everybody = np.arange(NUM_CLIENTS)
      bank = make_bank(directory).scatter(everybody, filled(everybody, 1))
      index = bank.snapshot(1)
      other = make_bank(directory)  # neither restored nor told what to keep
      other.scatter(everybody, filled(everybody, 2))
      again = make_bank(directory).restore(index, {1: index})
      assert_same(again.gather(everybody), filled(everybody, 1))

  @parameterized.named_parameters(
    ('clients', np.full(NUM_CLIENTS + 1, -1), '13 clients'),
    ('slots', np.r_[np.full(NUM_CLIENTS - 1, -1), 64], 'slot 64'),
    ('shape', np.full((NUM_CLIENTS, 1), -1), '12 clients'),
  )
  def test_an_index_that_does_not_fit(self, index, message):
    bank = make_bank()
    some = np.array([1, 2])
    bank = bank.scatter(some, filled(some, 1))
    with self.assertRaisesRegex(core.InvalidInput, message):
      bank.restore(index, {})
    assert_same(bank.gather(some), filled(some, 1))

  def test_another_checkpoint_that_does_not_fit(self):
    bank = make_bank()
    good = bank.snapshot(1)
    with self.assertRaisesRegex(core.InvalidInput, 'slot 1000'):
      bank.restore(good, {1: good, 2: np.full(NUM_CLIENTS, 1000)})

  def test_rows_lost_from_the_directory(self):
    with storage('directory') as directory:
      some = np.array([1, 2])
      bank = make_bank(directory).scatter(some, filled(some, 1))
      index = bank.snapshot(1)
      (directory / 'rows_0.bin').unlink()
      with self.assertRaisesRegex(core.InvalidInput, '0 stored rows'):
        make_bank(directory).restore(index, {1: index})


class Model:
  """What the bank should do, as plain dicts {client: value}."""

  def __init__(self):
    self.current = {}
    self.kept = {}  # checkpoint -> dict, the newest two
    self.indices = {}


CLIENTS = 5
operations = st.one_of(
  st.tuples(
    st.just('scatter'),
    st.lists(st.integers(0, CLIENTS - 1), unique=True, min_size=1),
  ),
  st.tuples(st.just('snapshot'), st.just(0)),
  st.tuples(st.just('restore'), st.integers(0, 1)),
  st.tuples(st.just('forget'), st.integers(0, 1)),
)


class AgainstModelTest(parameterized.TestCase):
  """Random sequences, with every kept checkpoint read after every step."""

  def make(self, directory):
    return make_bank(
      directory,
      init=lambda key, number: {'a': -1 - number, 'b': jnp.zeros(2)},
      num_clients=CLIENTS,
    )

  def rows(self, clients, value):
    return {
      'a': np.asarray(clients, np.int32) + 10 * value,
      'b': np.full((len(clients), 2), value, np.float32),
    }

  def check_rows(self, bank, expected):
    clients = np.array(sorted(expected), np.int64)
    written = np.flatnonzero(bank.index >= 0)
    self.assertEqual(written.tolist(), clients.tolist())
    values = [expected[c] for c in clients]
    rows = bank.gather(clients)
    self.assertEqual(
      rows['a'].tolist(),
      [int(c) + 10 * v for c, v in zip(clients, values, strict=True)],
    )
    self.assertEqual(rows['b'].tolist(), [[v, v] for v in values])

  def play(self, sequence, directory):
    bank, model = self.make(directory), Model()
    for time, (kind, what) in enumerate(sequence, 1):
      if kind == 'scatter':
        bank = bank.scatter(np.array(what), self.rows(what, time))
        model.current |= {c: time for c in what}
      elif kind == 'snapshot':
        for old in sorted(model.kept)[:-1]:
          del model.kept[old], model.indices[old]
        bank.keep(set(model.kept))
        model.indices[time] = bank.snapshot(time).copy()
        model.kept[time] = dict(model.current)
      elif kind == 'restore' and model.kept:
        number = sorted(model.kept)[what % len(model.kept)]
        if directory is not None:
          bank = self.make(directory)
        bank = bank.restore(model.indices[number], dict(model.indices))
        model.current = dict(model.kept[number])
      elif kind == 'forget' and model.kept:
        number = sorted(model.kept)[what % len(model.kept)]
        del model.kept[number], model.indices[number]
        bank.keep(set(model.kept))
      self.check_rows(bank, model.current)
      for number, rows in model.kept.items():
        at = dataclasses.replace(bank, index=model.indices[number])
        self.check_rows(at, rows)
    self.assertEqual(
      bank.gather(np.arange(CLIENTS))['a'].tolist(),
      [
        c + 10 * model.current[c] if c in model.current else -1 - c
        for c in range(CLIENTS)
      ],
    )

  @parameterized.parameters('memory', 'directory')
  @settings(max_examples=25, deadline=None)
  @given(sequence=st.lists(operations, max_size=25))
  def test_any_sequence(self, kind, sequence):
    with storage(kind) as directory:
      self.play(sequence, directory)

  @parameterized.product(kind=('memory', 'directory'), seed=(0, 1, 2))
  def test_long_sequences(self, kind, seed):
    rng = np.random.default_rng(seed)
    kinds = rng.choice(
      ['scatter', 'snapshot', 'restore', 'forget'],
      300,
      p=[0.6, 0.2, 0.15, 0.05],
    )
    sequence = [
      (k, rng.permutation(CLIENTS)[: rng.integers(1, CLIENTS + 1)].tolist())
      if k == 'scatter'
      else (k, int(rng.integers(2)))
      for k in kinds
    ]
    with storage(kind) as directory:
      self.play(sequence, directory)
      if directory is not None:
        size = (directory / 'rows_0.bin').stat().st_size // 4
        self.assertLess(size, 200)


# Runs in a process of its own, since a limit on file sizes or SIGKILL would
# hit the test's too. Two leaves, so that one file may grow and the other not.
PRELUDE = """
import os, resource, signal, sys
import jax, jax.numpy as jnp, numpy as np
from fedjax_ext import core

def make():
  return core.make_client_states(
    lambda key, number: {'a': number, 'b': jnp.zeros(256)},
    num_clients=1000, key=jax.random.key(0), directory=sys.argv[1])

def rows(clients, value):
  return {'a': np.asarray(clients, np.int32) + value,
          'b': np.full((len(clients), 256), value, np.float32)}

def check(bank, clients, value):
  got, expected = bank.gather(clients), rows(clients, value)
  assert all((got[k] == expected[k]).all() for k in expected), (got, expected)

few, many = np.arange(10), np.arange(1000)
bank = make().scatter(few, rows(few, 1))
"""
FULL_DISK = """
index = bank.snapshot(1)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
for _ in range(3):
  try:
    bank.scatter(many, rows(many, 2))
    raise AssertionError('the disk was not full')
  except OSError as error:
    print('error:', error)
  check(bank, few, 1)
# What fits into the room there is still works.
for value in range(3, 9):
  bank = bank.scatter(few, rows(few, value))
  check(bank, few, value)
check(make().restore(index, {1: index}), few, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
bank = bank.scatter(many, rows(many, 10))
check(bank, many, 10)
check(make().restore(index, {1: index}), few, 1)
print('whole')
"""
KILLED = """
np.save(sys.argv[1] + '.npy', bank.snapshot(1))
some = np.arange(5, 300)
bank = bank.scatter(some, rows(some, 2))  # after the last checkpoint
os.kill(os.getpid(), signal.SIGKILL)
"""


class DiskTest(absltest.TestCase):
  def run_script(self, body, directory):
    environment = dict(
      os.environ, PYTHONPATH=str(REPOSITORY), JAX_PLATFORMS='cpu'
    )
    environment.pop('XLA_FLAGS', None)
    return subprocess.run(
      [sys.executable, '-c', textwrap.dedent(PRELUDE + body), str(directory)],
      capture_output=True,
      text=True,
      timeout=120,
      env=environment,
      check=False,
    )

  def test_a_full_disk_leaves_old_rows_whole(self):
    with storage('directory') as directory:
      done = self.run_script(FULL_DISK, directory)
      self.assertEqual(done.returncode, 0, done.stderr)
      self.assertEqual(done.stdout.count('error:'), 3)
      self.assertIn('whole', done.stdout)

  def test_rows_of_the_last_checkpoint_survive_sigkill(self):
    with storage('directory') as directory:
      done = self.run_script(KILLED, directory)
      self.assertEqual(done.returncode, -9, done.stderr)
      index = np.load(f'{directory}.npy')
      bank = core.make_client_states(
        lambda key, number: {'a': number, 'b': jnp.zeros(256)},
        num_clients=1000,
        key=jax.random.key(0),
        directory=directory,
      ).restore(index, {1: index})
      rows = bank.gather(np.arange(20))
      expected = np.arange(20) + (np.arange(20) < 10)
      self.assertEqual(rows['a'].tolist(), expected.tolist())
      self.assertEqual(rows['b'][:, 7].tolist(), [1] * 10 + [0] * 10)

  def test_file_systems_without_fallocate(self):
    """There the C library writes every block, and not to an append-only file.

    See the notes of posix_fallocate(3): EBADF with O_APPEND or O_WRONLY.
    """

    def fallocate(descriptor, offset, length):
      flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
      if flags & os.O_APPEND or flags & os.O_ACCMODE != os.O_RDWR:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
      if os.fstat(descriptor).st_size < offset + length:
        os.ftruncate(descriptor, offset + length)

    some = np.arange(NUM_CLIENTS)
    with (
      storage('directory') as directory,
      mock.patch.object(os, 'posix_fallocate', fallocate),
    ):
      bank = make_bank(directory).scatter(some, filled(some, 1))
      assert_same(bank.gather(some), filled(some, 1))


class HandleTest(absltest.TestCase):
  def test_a_second_scatter_of_one_handle_is_refused(self):
    states = make_bank(init=lambda key, number: jnp.float32(0))
    states.scatter(np.array([1]), np.ones(1, np.float32))
    with self.assertRaisesRegex(
      core.InvalidInput, 'newest ClientStates handle'
    ):
      states.scatter(np.array([1]), np.ones(1, np.float32))


if __name__ == '__main__':
  absltest.main()
