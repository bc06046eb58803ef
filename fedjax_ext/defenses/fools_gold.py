"""FoolsGold: clients whose updates keep pointing the same way count less.

Fung, Yoon and Beschastnikh, "The limitations of federated learning in sybil
settings", 2020, https://www.usenix.org/conference/raid2020/presentation/fung;
constants as in the code of Xie et al., "DBA", 2020.

Axis letters: C clients, K' client slots, some of them empty; P parameters that
are compared.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_ext.core import collect, validate
from fedjax_ext.core.reducers import Collected, Reducer
from fedjax_ext.defenses.updates import as_rows, mean_of_rows

PyTree = Any


def fools_gold_weights(history: jax.Array, present: jax.Array) -> jax.Array:
  """Weights in [0, 1] of clients by how alike their histories are, [K'].

    v_i = max_{j != i} cs_ij;  cs_ij *= v_i / v_j where v_i < v_j  (pardon)
    w_i = clip(1 - max_j cs_ij, 0, 1) / max_i w_i,  1 -> 0.99
    w_i = clip(ln(w_i / (1 - w_i)) + 1/2, 0, 1)

  Args:
    history: sums of updates [K', P].
    present: bool [K'].
  """
  norms = jnp.linalg.norm(history, axis=1, keepdims=True)
  unit = history / jnp.maximum(norms, 1e-12)
  others = present & ~jnp.eye(len(history), dtype=bool)
  alike = jnp.where(others, unit @ unit.T, 0)
  # The code takes the identity off, so that the maximum is over zeros too.
  most = alike.max(1)
  ratio = most[:, None] / jnp.where(most > 0, most, 1)
  alike = jnp.where(most[:, None] < most, alike * ratio, alike)
  weights = jnp.clip(1 - alike.max(1), 0, 1) * present
  weights = weights / jnp.maximum(weights.max(), 1e-12)
  weights = jnp.where(weights == 1, 0.99, weights)
  safe = jnp.clip(weights, 1e-12, 0.99)
  weights = jnp.where(weights > 0, jnp.log(safe / (1 - safe)) + 0.5, -jnp.inf)
  return jnp.clip(weights, 0, 1) * present


def fools_gold(
  *, layers: tuple[str, ...] = (), remember: bool = True
) -> Reducer:
  """The mean weighted by `fools_gold_weights` times the clients' weights.

  Args:
    layers: compare the parameters of a layer alone, the first of these names
      that the model has, such as 'Dense_1'; () compares all. The paper takes
      the last layer.
    remember: compare sums over all rounds that a client took part in, [C, P];
      else the round's updates alone.

  Raises:
    InvalidInput: no parameter has that name.
  """

  def compared(updates: PyTree) -> jax.Array:
    named: dict[str, list] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(updates):
      for part in path:
        named.setdefault(str(getattr(part, 'key', part)), []).append(x)
    known = [name for name in layers if name in named]
    validate.check(
      bool(known) or not layers,
      f'Expected a model with one of the layers {list(layers)}, got one with '
      f'{sorted(named)}.',
    )
    chosen = named[known[0]] if layers else jax.tree.leaves(updates)
    return as_rows(chosen)

  def memory(template: PyTree, num_clients: int) -> PyTree:
    if not remember:
      return ()
    one = jax.tree.map(lambda t: jnp.zeros((1, *t.shape), t.dtype), template)
    return jnp.zeros((num_clients, compared(one).shape[1]))

  def finish(acc: Collected, past, clients, key):
    del key
    mine, present = compared(acc.update), acc.weight > 0
    if remember:
      mine = mine + past[clients]
      # Empty slots write nowhere.
      where = jnp.where(present, clients, len(past))
      past = past.at[where].set(mine, mode='drop')
    weights = fools_gold_weights(mine, present)
    return mean_of_rows(acc.update, weights * acc.weight), past

  return collect()._replace(finish=finish, memory=memory)
