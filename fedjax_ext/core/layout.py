"""How a round is laid out over devices, lanes and waves."""

from typing import Any, NamedTuple

import jax
import numpy as np
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

  def replicate(self, tree: PyTree) -> PyTree:
    """Places every leaf of a pytree, whole, on each device; once."""
    return jax.device_put(tree, NamedSharding(self.mesh, P()))

  def shard(self, tree: PyTree) -> PyTree:
    """Splits the leading axis of every leaf of a pytree over the devices."""
    return jax.device_put(tree, NamedSharding(self.mesh, P(CLIENTS)))

  def describe(self) -> dict[str, Any]:
    """The layout as plain values ({name: scalar}), for the manifest."""
    return {
      'platform': self.mesh.devices.flat[0].platform,
      'num_devices': self.num_devices,
      'lanes': self.lanes,
      'wave_clients': self.wave_clients,
    }


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
