"""Checkpoints: same bits back, and a way out when the newest is damaged."""

import functools
import json
import logging
import pathlib
import shutil
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext import core
from fedjax_ext.training.checkpoints import Checkpoints, WriteError, digest

CLIENTS = np.arange(9)


def state(round: int) -> dict:
  """A server state with every kind of bits."""
  odd = [np.nan, -np.nan, np.inf, -0.0, 1e-45, 1 / 3]
  return {
    'layers': [jnp.asarray(odd) * 1.0, jnp.arange(40.0).reshape(8, 5) * round],
    'step': jnp.int32(round),
    'half': jnp.full((3,), round, jnp.bfloat16),
    'flag': jnp.asarray([True, False]),
  }


def make_bank(workdir: pathlib.Path) -> core.ClientStates:
  """The bank of a fresh process: rows {'v': [5], 'n': scalar}."""
  return core.make_client_states(
    lambda key, number: {'v': jax.random.normal(key, (5,)), 'n': number},
    num_clients=len(CLIENTS),
    key=jax.random.key(0),
    directory=workdir / 'client_states',
  )


def visit(bank: core.ClientStates, round: int) -> core.ClientStates:
  """Two clients take part in a round."""
  clients = np.array([round, round + 1])
  rows = bank.gather(clients)
  return bank.scatter(clients, jax.tree.map(lambda x: x + round, rows))


@functools.cache
def client_digests() -> dict[int, str]:
  """{round: digest of all rows}, without checkpoints and files."""
  bank, digests = make_bank_in_memory(), {}
  for round in range(1, 8):
    bank = visit(bank, round)
    digests[round] = digest(bank.gather(CLIENTS))
  return digests


def make_bank_in_memory() -> core.ClientStates:
  return core.make_client_states(
    lambda key, number: {'v': jax.random.normal(key, (5,)), 'n': number},
    num_clients=len(CLIENTS),
    key=jax.random.key(0),
  )


class TestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.workdir = pathlib.Path(self.enterContext(folder))

  def save(self, rounds, *, with_bank=True, keep=2):
    """A process that saves some rounds and ends."""
    checkpoints = Checkpoints(self.workdir, keep=keep)
    bank = make_bank(self.workdir) if with_bank else None
    self.assertIsNone(checkpoints.restore(state(0), bank))
    if bank is not None:
      bank.keep({})
    for round in range(1, max(rounds) + 1):
      if bank is not None:
        bank = visit(bank, round)
      if round in rounds:
        extra = {'examples_processed': 100 * round}
        checkpoints.save(round, state(round), bank, extra)
    checkpoints.close()

  def saved(self):
    names = [path.name for path in (self.workdir / 'checkpoints').iterdir()]
    return sorted(int(name) for name in names if name.isdigit())

  def restore(self, *, with_bank=True):
    """What a fresh process restores: the round, after checking all bits."""
    checkpoints = Checkpoints(self.workdir)
    bank = make_bank(self.workdir) if with_bank else None
    restored = checkpoints.restore(state(0), bank)
    checkpoints.close()
    if restored is None:
      return None
    self.assertEqual(
      digest(restored.server_state), digest(state(restored.round))
    )
    self.assertEqual(restored.extra['examples_processed'], 100 * restored.round)
    if with_bank:
      self.assertEqual(
        digest(restored.client_states.gather(CLIENTS)),
        client_digests()[restored.round],
      )
    else:
      self.assertIsNone(restored.client_states)
    return restored.round

  def restore_with_warning(self, damaged: int, **settings):
    """Restores; the damaged checkpoint is named and set aside."""
    path = self.workdir / 'checkpoints' / str(damaged)
    with self.assertLogs('fedjax_ext', logging.WARNING) as logs:
      round = self.restore(**settings)
    self.assertIn(str(path), '\n'.join(logs.output))
    self.assertFalse(path.exists())
    aside = self.workdir / 'unreadable_checkpoints' / f'{damaged}.0'
    self.assertTrue(aside.is_dir())
    return round


class CheckpointsTest(TestCase):
  @parameterized.parameters(True, False)
  def test_same_bits(self, with_bank):
    self.save([3], with_bank=with_bank)
    self.assertEqual(self.restore(with_bank=with_bank), 3)

  def test_types_and_placement_are_kept(self):
    self.save([1], with_bank=False)
    layout = core.make_layout(num_devices=4)
    template = layout.replicate(state(0))
    checkpoints = Checkpoints(self.workdir)
    restored = checkpoints.restore(template, None).server_state
    checkpoints.close()
    jax.tree.map(
      lambda new, old: self.assertEqual(
        (new.dtype, new.shape, new.sharding),
        (old.dtype, old.shape, old.sharding),
      ),
      restored,
      template,
    )

  def test_nothing_saved(self):
    self.assertIsNone(self.restore())

  @parameterized.parameters(2, 3)
  def test_keeps_the_newest(self, keep):
    self.save([1, 2, 4, 5, 7], keep=keep)
    self.assertEqual(self.saved(), [2, 4, 5, 7][-keep:])
    self.assertEqual(self.restore(), 7)

  @parameterized.parameters(-1, 0, 1)
  def test_refuses_to_keep_fewer_than_two(self, keep):
    with self.assertRaisesRegex(
      core.InvalidInput, f'Expected keep_checkpoints >= 2, got {keep}.'
    ):
      Checkpoints(self.workdir, keep=keep)

  def test_rows_of_later_rounds_do_not_touch_a_checkpoint(self):
    """As after a kill: rows were scattered on, but never saved."""
    self.save([2, 4])
    bank = make_bank(self.workdir)
    checkpoints = Checkpoints(self.workdir)
    bank = checkpoints.restore(state(0), bank).client_states
    for _ in range(3):
      for round in (4, 5, 6, 7):
        bank = visit(bank, round)
    checkpoints.close()
    self.assertEqual(self.restore(), 4)
    shutil.rmtree(self.workdir / 'checkpoints' / '4')
    self.assertEqual(self.restore(), 2)

  def test_unfinished_checkpoint_is_not_restored(self):
    self.save([2, 4])
    newest = self.workdir / 'checkpoints' / '4'
    newest.rename(newest.with_name('4.orbax-checkpoint-tmp'))
    self.assertEqual(self.restore(), 2)

  def test_failed_write_is_an_error_and_leaves_the_rest(self):
    self.save([2])
    checkpoints = Checkpoints(self.workdir)
    bank = checkpoints.restore(state(0), make_bank(self.workdir)).client_states
    with (
      mock.patch.object(
        checkpoints._manager, 'save', side_effect=OSError('disk full\nmore')
      ),
      self.assertRaisesRegex(
        WriteError, '^Could not write the checkpoint of round 3: disk full$'
      ),
    ):
      checkpoints.save(3, state(3), visit(bank, 3), {})
    checkpoints.close()
    self.assertEqual(self.restore(), 2)


def truncate(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(path: pathlib.Path) -> None:
  path.unlink()


def flip(path: pathlib.Path) -> None:
  raw = np.frombuffer(path.read_bytes(), np.uint8).copy()
  raw[len(raw) // 2] ^= 0x5A
  path.write_bytes(raw.tobytes())


DAMAGE = {'truncated': truncate, 'deleted': delete, 'flipped': flip}


class UnreadableTest(TestCase):
  def files(self, round: int, pattern: str) -> list[pathlib.Path]:
    """Files of a checkpoint that a restore reads."""
    folder = self.workdir / 'checkpoints' / str(round)
    found = [path for path in folder.glob(pattern) if path.is_file()]
    self.assertNotEmpty(found)
    return found

  @parameterized.product(
    damage=list(DAMAGE),
    pattern=('server_state/d/*', 'client_index/d/*', 'meta/metadata'),
  )
  def test_one_file(self, damage, pattern):
    self.save([2, 4])
    for path in self.files(4, pattern):
      DAMAGE[damage](path)
    self.assertEqual(self.restore_with_warning(4), 2)
    # The way is free for the same round again.
    self.assertEqual(self.restore(), 2)
    self.assertEqual(self.saved(), [2])

  @parameterized.parameters(*DAMAGE)
  def test_all_files(self, damage):
    self.save([2, 4], with_bank=False)
    for path in self.files(4, '**/*'):
      DAMAGE[damage](path)
    self.assertEqual(self.restore_with_warning(4, with_bank=False), 2)

  def test_saving_goes_on_after_it(self):
    self.save([2, 4])
    for path in self.files(4, 'server_state/d/*'):
      truncate(path)
    checkpoints = Checkpoints(self.workdir)
    with self.assertLogs('fedjax_ext', logging.WARNING):
      restored = checkpoints.restore(state(0), make_bank(self.workdir))
    bank = restored.client_states
    for round in range(restored.round + 1, 7):
      bank = visit(bank, round)
      extra = {'examples_processed': 100 * round}
      checkpoints.save(round, state(round), bank, extra)
    checkpoints.close()
    self.assertEqual(self.saved(), [5, 6])
    self.assertEqual(self.restore(), 6)

  def test_twice_the_same_round(self):
    self.save([2, 4], with_bank=False)
    for number in range(2):
      if number:
        checkpoints = Checkpoints(self.workdir)
        checkpoints.save(4, state(4), None, {'examples_processed': 400})
        checkpoints.close()
      truncate(self.files(4, 'meta/metadata')[0])
      with self.assertLogs('fedjax_ext', logging.WARNING):
        self.assertEqual(self.restore(with_bank=False), 2)
      aside = self.workdir / 'unreadable_checkpoints' / f'4.{number}'
      self.assertTrue(aside.is_dir())

  @parameterized.parameters('server_state/d/*', 'client_index/d/*', '**/*')
  def test_older_one(self, pattern):
    """The newest is good: what is wrong with the others must not stop it."""
    self.save([2, 4])
    for path in self.files(2, pattern):
      truncate(path)
    self.assertEqual(self.restore(), 4)

  def test_all_of_them(self):
    """Nothing is touched: a fresh start would throw the run away."""
    self.save([2, 4])
    for round in (2, 4):
      for path in self.files(round, '**/*'):
        path.write_bytes(b'')
    with self.assertRaisesRegex(
      core.InvalidInput, 'Expected a readable checkpoint in .* 4: .* 2: '
    ):
      self.restore()
    self.assertEqual(self.saved(), [2, 4])

  def test_changed_extra(self):
    """Also plain values are covered by the digest."""
    self.save([2, 4])
    (path,) = self.files(4, 'meta/metadata')
    meta = json.loads(path.read_text())
    self.assertEqual(meta['examples_processed'], 400)
    path.write_text(json.dumps(meta | {'examples_processed': 401}))
    self.assertEqual(self.restore_with_warning(4), 2)

  def test_client_rows_cut_off(self):
    """The rows of the newest are gone, those of the one before are there."""
    self.save([1, 4])
    for leaf, size in ((0, 4), (1, 20)):
      path = self.workdir / 'client_states' / f'rows_{leaf}.bin'
      path.write_bytes(path.read_bytes()[: 3 * size])
    self.assertEqual(self.restore_with_warning(4), 1)

  @parameterized.parameters(*DAMAGE)
  def test_state_alone_decides(self, damage):
    """Every file in turn: the newest or the one before, never other bits."""
    self.save([2, 4], with_bank=False)
    pristine = self.workdir.with_name(self.workdir.name + '_pristine')
    shutil.copytree(self.workdir, pristine)
    self.addCleanup(shutil.rmtree, pristine)
    rounds = set()
    for path in self.files(4, '**/*'):
      shutil.rmtree(self.workdir)
      shutil.copytree(pristine, self.workdir)
      if path.stat().st_size:
        DAMAGE[damage](path)
      rounds.add(self.restore(with_bank=False))
    self.assertEqual(rounds, {2, 4})


if __name__ == '__main__':
  absltest.main()
