"""Flags of how a run uses its machine: devices, processes, compiled programs.

None of them says what is computed, but for the layout, which the manifest
binds. Everything here happens before jax starts.
"""

import logging
import os
import pathlib

import jax
from absl import flags

from fedjax_ext.core import Layout, make_layout, validate
from fedjax_ext.training import processes

FLAGS = flags.FLAGS
_LOG = logging.getLogger(__name__)
CACHE = '~/.cache/fedjax_ext'

flags.DEFINE_integer(
  'num_devices',
  0,
  'Devices to use, of all processes together; 0 takes all (on CPU: one for '
  'each core).',
)
flags.DEFINE_integer(
  'lanes', 0, 'Lanes per device; 0 is the rule per platform.'
)
flags.DEFINE_integer(
  'wave_clients', 0, 'Clients in a wave of a round; 0 runs them as one wave.'
)
flags.DEFINE_string(
  'compilation_cache',
  CACHE,
  'Folder of compiled programs, so that a second start does not compile again; '
  'empty for none. The environment variable JAX_COMPILATION_CACHE_DIR, if set, '
  'is used instead of the default.',
)
flags.DEFINE_string(
  'coordinator_address',
  '',
  'Many processes: HOST:PORT of process 0, the same in each of them; "auto" '
  'asks the cluster (Slurm, TPU pods). Empty: one process.',
)
flags.DEFINE_integer(
  'num_processes',
  1,
  'Many processes: how many; "auto" knows, but needs it with --num_devices on '
  'CPU.',
)
flags.DEFINE_integer(
  'process_id', 0, 'Many processes: which one this is, from 0.'
)
# What changes no result: devices, lanes and waves are bound as the layout.
UNBOUND = (
  'num_devices',
  'lanes',
  'wave_clients',
  'compilation_cache',
  'coordinator_address',
  'num_processes',
  'process_id',
)


def layout_from_flags(cohort_size: int) -> Layout:
  """Starts jax as the flags say; devices, lanes and waves.

  Args:
    cohort_size: K, clients in a round; more CPU devices would idle.
  """
  use_compilation_cache()
  _use_all_cpus(cohort_size)
  _join_processes()
  return make_layout(
    num_devices=FLAGS.num_devices,
    lanes=FLAGS.lanes,
    wave_clients=FLAGS.wave_clients,
  )


def use_compilation_cache() -> None:
  """Keeps compiled programs in a folder, also those that compile fast.

  A folder that cannot be written is no error: the run only starts slower.
  """
  given = FLAGS['compilation_cache'].present
  folder = FLAGS.compilation_cache
  if not given:
    folder = os.environ.get('JAX_COMPILATION_CACHE_DIR', folder)
  if not folder:
    jax.config.update('jax_enable_compilation_cache', False)
    return
  path = pathlib.Path(folder).expanduser()
  try:
    if '://' not in folder:
      path.mkdir(parents=True, exist_ok=True)
      folder = str(path)
  except OSError as error:
    _LOG.warning('No compilation cache: %s.', error)
    return
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def _use_all_cpus(cohort_size: int) -> None:
  """Makes one CPU device for each core this process may use.

  On CPU two devices of one core each beat one device with two threads by 1.1 to
  1.65 times. Does nothing once jax has started, or where XLA_FLAGS already says
  how many; an accelerator, if there is one, is used regardless.
  """
  if 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  cores = (
    len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1
  )
  processes = FLAGS.num_processes
  validate.at_least('num_processes', processes, 1)
  validate.at_least('num_devices', FLAGS.num_devices, 0)
  validate.check(
    FLAGS.num_devices % processes == 0,
    f'Expected a multiple of num_processes={processes}, got '
    f'num_devices={FLAGS.num_devices}.',
  )
  share = -(-max(cohort_size, 1) // processes)
  devices = FLAGS.num_devices // processes or min(cores, share)
  try:
    jax.config.update('jax_num_cpu_devices', devices)
  except RuntimeError:  # jax is already running, e.g. in a notebook
    return


def _join_processes() -> None:
  """Connects this process to the others, if the flags say that there are."""
  address, count, number = (
    FLAGS.coordinator_address,
    FLAGS.num_processes,
    FLAGS.process_id,
  )
  if address == 'auto':
    jax.distributed.initialize()
  elif address:
    validate.check(
      ':' in address,
      f'Expected HOST:PORT, got coordinator_address={address}.',
    )
    validate.between('process_id', number, 0, count - 1)
    jax.distributed.initialize(address, count, number)
  else:
    validate.check(
      count == 1,
      f'Expected --coordinator_address with num_processes={count}, got none.',
    )
    return
  if not processes.is_first():  # it would say the same again
    logging.getLogger('fedjax_ext').setLevel(logging.WARNING)
