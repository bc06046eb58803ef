"""FLAME: filter by direction, clip to the median norm, add noise.

Nguyen et al., "FLAME: taming backdoors in federated learning", 2022,
https://arxiv.org/abs/2101.02281.

Axis letters: K' client slots, some of them empty; P parameters.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_ext.core import collect, validate
from fedjax_ext.core.reducers import Collected, Reducer
from fedjax_ext.defenses.updates import as_rows, mean_of_rows


def largest_cluster(rows: np.ndarray, present: np.ndarray) -> np.ndarray:
  """Who is in the one cluster of more than half of the clients, bool [K'].

  HDBSCAN on cosine distances with min_cluster_size n // 2 + 1; everybody where
  it finds none. On the host, by scikit-learn.

  Args:
    rows: updates [K', P].
    present: bool [K'].
  """
  from sklearn.cluster import HDBSCAN

  who = np.flatnonzero(present)
  chosen = np.asarray(present, bool).copy()
  if len(who) < 3:
    return chosen
  unit = np.asarray(rows, np.float64)[who]
  unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
  away = np.clip(1 - unit @ unit.T, 0, 2)
  np.fill_diagonal(away, 0)
  labels = HDBSCAN(
    min_cluster_size=len(who) // 2 + 1,
    min_samples=1,
    allow_single_cluster=True,
    metric='precomputed',
    copy=True,
  ).fit_predict(away)
  if (labels == 0).any():
    chosen[who] = labels == 0
  return chosen


def flame(*, noise: float = 0.001) -> Reducer:
  """The uniform mean of clients in the largest cluster, clipped, with noise.

  Clipped to the median norm S of all clients; the noise is Gaussian with
  standard deviation noise * S.

  Args:
    noise: lambda >= 0.
  """
  validate.at_least('noise', noise, 0)

  def finish(acc: Collected, memory, clients, key):
    del clients
    rows, present = as_rows(acc.update), acc.weight > 0
    chosen = jax.pure_callback(
      largest_cluster,
      jax.ShapeDtypeStruct(present.shape, bool),
      rows,
      present,
    )
    norms = jnp.linalg.norm(rows, axis=1)
    bound = jnp.nanmedian(jnp.where(present, norms, jnp.nan))
    bound = jnp.where(present.any(), bound, 0)
    scale = jnp.minimum(1, bound / jnp.maximum(norms, 1e-12))
    clipped = jax.tree.map(
      lambda x: x * scale.reshape(-1, *[1] * (x.ndim - 1)), acc.update
    )
    mean = mean_of_rows(clipped, chosen.astype(scale.dtype))
    if not noise:
      return mean, memory
    leaves, tree = jax.tree.flatten(mean)
    keys = jax.random.split(key, len(leaves))
    noisy = [
      x + noise * bound * jax.random.normal(k, x.shape, x.dtype)
      for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy), memory

  return collect()._replace(finish=finish)
