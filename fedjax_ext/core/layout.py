"""How a round is laid out over devices, lanes and waves.

With many processes (`jax.distributed`) every one of them runs the same program
with the same plans, and feeds its own devices; arrays span all of them.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_ext.core import validate

PyTree = Any

CLIENTS = 'clients'  # the mesh axis

# Lanes per device. On CPU one lane is within 11 % of the best lane count on
# every workload measured and keeps convolutions ungrouped. The rule for
# accelerators has not been measured yet; `--lanes` overrides it.
LANES_BY_PLATFORM = {'cpu': 1}
LANES_ELSEWHERE = 32


class Layout(NamedTuple):
  """Devices, lanes and waves; fixed for a run and kept in its manifest.

  Attributes:
    mesh: one axis, 'clients', over the D devices.
    lanes: L, clients that train side by side on one device (vmap).
    wave_clients: a round runs in waves of at most this many clients; None
      runs the whole cohort as one wave.
  """

  mesh: Mesh
  lanes: int = 1
  wave_clients: int | None = None

  @property
  def num_devices(self) -> int:
    """D, a scalar."""
    return self.mesh.devices.size

  @property
  def local(self) -> np.ndarray:
    """bool [D]: the devices of this process."""
    mine = jax.process_index()
    return np.array([d.process_index == mine for d in self.mesh.devices.flat])

  def replicate(self, tree: PyTree) -> PyTree:
    """Places every leaf of a pytree, whole, on each device; once."""
    return self._put(tree, P())

  def shard(self, tree: PyTree) -> PyTree:
    """Splits the leading axis of every leaf of a pytree over the devices.

    With many processes each only copies the part of its own devices.
    """
    return self._put(tree, P(CLIENTS))

  def sum_devices(self, tree: PyTree) -> PyTree:
    """Sums every leaf [...] over the devices, inside a shard_map.

    On CPU in the order of the devices, whatever processes they belong to: a
    run's bits do not depend on how many processes it has. Elsewhere by `psum`,
    which needs no memory for all devices' leaves.
    """
    if self.mesh.devices.flat[0].platform != 'cpu':
      return jax.lax.psum(tree, CLIENTS)
    gathered = jax.lax.all_gather(tree, CLIENTS)
    return jax.tree.map(lambda x: x.sum(0, dtype=x.dtype), gathered)

  def _put(self, tree: PyTree, spec: P) -> PyTree:
    sharding = NamedSharding(self.mesh, spec)
    if jax.process_count() == 1:
      return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: _feed(x, sharding), tree)

  def describe(self) -> dict[str, Any]:
    """The layout as plain values ({name: scalar}), for the manifest."""
    return {
      'platform': self.mesh.devices.flat[0].platform,
      'num_devices': self.num_devices,
      'lanes': self.lanes,
      'wave_clients': self.wave_clients,
    }


def _feed(x: Any, sharding: NamedSharding) -> jax.Array:
  """This process's part of an array that spans processes."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return jax.jit(lambda y: y, out_shardings=sharding)(x)
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    data = _feed(jax.random.key_data(x), sharding)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])


def to_host(tree: PyTree) -> PyTree:
  """Every leaf [...] as numpy, whole in every process."""

  def fetch(x: Any) -> np.ndarray:
    whole = not isinstance(x, jax.Array) or x.is_fully_addressable
    if whole or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(fetch, tree)


def make_layout(
  *,
  num_devices: int | None = None,
  lanes: int | None = None,
  wave_clients: int | None = None,
) -> Layout:
  """Chooses a layout: all devices, and lanes by a rule per platform.

  The rule never looks at timings or free memory, since lanes and waves change
  the order of sums and with it the last bits of a result.

  Args:
    num_devices: D, the first so many devices; None or 0 takes all.
    lanes: L per device; None or 0 applies the platform's rule.
    wave_clients: largest number of clients in a wave; None or 0 for one wave.

  Raises:
    InvalidInput: a number is negative or there are fewer devices.
  """
  for name, value in (
    ('num_devices', num_devices),
    ('lanes', lanes),
    ('wave_clients', wave_clients),
  ):
    validate.at_least(name, value or 0, 0)
  devices = jax.devices()
  validate.check(
    (num_devices or 0) <= len(devices),
    f'Expected num_devices <= {len(devices)} (the {devices[0].platform} '
    f'devices that jax sees), got num_devices={num_devices}.',
  )
  validate.check(
    jax.process_count() == 1 or (num_devices or 0) in (0, len(devices)),
    f'Expected all {len(devices)} devices of {jax.process_count()} processes, '
    f'got num_devices={num_devices}.',
  )
  devices = devices[: num_devices or None]
  lanes = lanes or LANES_BY_PLATFORM.get(devices[0].platform, LANES_ELSEWHERE)
  return Layout(
    Mesh(np.array(devices), (CLIENTS,)), lanes, wave_clients or None
  )


def bucket(size: int) -> int:
  """Rounds a scalar size up to 2^k or 3 * 2^(k-1).

  Padded shapes taken from this sequence waste at most a third and let a run of
  ragged rounds share a handful of compiled programs.
  """
  if size <= 2:
    return max(size, 1)
  power = 1 << int(size - 1).bit_length()
  return power * 3 // 4 if size <= power * 3 // 4 else power
