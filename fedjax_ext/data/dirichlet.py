"""Partitioners by Dirichlet draws: label skew of several kinds.

As in partition.py, each is `f(label [N], *, num_clients, seed, **settings) ->
owner int64 [N]`.

Axis letters: N examples, C clients, Y classes.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.core.plans import ramp
from fedjax_ext.data.draws import (
  apportion,
  check_alpha,
  check_sizes,
  dirichlet_draw,
  log_gammas,
  rows_by_class,
  softmax,
)

_BLOCK = 2**20  # Numbers drawn at a time.


def dirichlet_partition(
  label: np.ndarray,
  *,
  num_clients: int,
  alpha: float = 0.5,
  min_examples: int = 1,
  seed: int,
) -> np.ndarray:
  """Splits each class over clients by a Dirichlet(alpha) draw.

  Client shares of class y: p_y ~ Dirichlet(alpha * 1_C), turned into counts by
  apportionment. Clients below `min_examples` then take examples from the
  largest clients, out of those clients' most frequent classes. Yurochkin et
  al., "Bayesian nonparametric federated learning of neural networks", 2019,
  https://arxiv.org/abs/1905.12022, redraw until all clients are large enough,
  which need not end.

  Args:
    label: int [N].
    num_clients: C.
    alpha: concentration; small values give few classes to a client.
    min_examples: every client gets at least so many.
    seed: seed of the draw.

  Returns:
    Owners int64 [N].

  Raises:
    InvalidInput: alpha <= 0, or fewer than C * min_examples examples.
  """
  label = np.asarray(label)
  check_alpha(alpha)
  check_sizes(len(label), num_clients, min_examples)
  rng = np.random.default_rng(seed)
  classes, label = np.unique(label, return_inverse=True)
  counts = np.zeros((num_clients, len(classes)), np.int64)
  for y, size in enumerate(np.bincount(label, minlength=len(classes))):
    counts[:, y] = apportion(dirichlet_draw(rng, alpha, num_clients), int(size))
  _raise_minimum(counts, min_examples)
  owner = np.empty(len(label), np.int64)
  for y in range(len(classes)):
    rows = rng.permutation(np.flatnonzero(label == y))
    owner[rows] = np.repeat(np.arange(num_clients), counts[:, y])
  return owner


def dirichlet_client_partition(
  label: np.ndarray,
  *,
  num_clients: int,
  alpha: float = 0.5,
  sizes: Literal['equal', 'natural'] = 'equal',
  client: np.ndarray | None = None,
  seed: int,
) -> np.ndarray:
  """Draws each client's class mix from a Dirichlet.

  Class mix of client c: q_c ~ Dirichlet(alpha * prior), with prior [Y] the
  class shares of all examples. Clients take turns, in a fresh random order each
  time around: each draws a class from q_c and gets a random example of it.
  Where a class has run out, q_c is renormalised over the classes that are left.
  So all mixes bend alike, not those of the clients served last. Rotation is
  that of Yuan et al., 2022, https://arxiv.org/abs/2110.14216.

  Hsu, Qi and Brown, "Measuring the effects of non-identical data distribution
  for federated visual classification", 2019, https://arxiv.org/abs/1909.06335.

  Args:
    label: int [N].
    num_clients: C.
    alpha: concentration; small values give few classes to a client.
    sizes: 'equal', client c has floor((N + C - 1 - c) / C) examples; or
      'natural', it has as many as the c-th of C natural clients.
    client: the natural clients [N], for their sizes.
    seed: seed of the draw.

  Returns:
    Owners int64 [N].

  Raises:
    InvalidInput: alpha <= 0, num_clients < 1, or no C natural clients.
  """
  label = np.asarray(label)
  check_alpha(alpha)
  check_sizes(len(label), num_clients, 0)
  rng = np.random.default_rng(seed)
  classes, label = np.unique(label, return_inverse=True)
  pool = np.bincount(label, minlength=len(classes))
  prior = pool / max(len(label), 1)
  logs = log_gammas(rng, alpha * prior, (num_clients, len(classes)))
  wanted = _client_sizes(len(label), num_clients, sizes, client)
  return _by_mixes(rng, logs, wanted, label, pool)


def coarse_fine_dirichlet_partition(
  label: np.ndarray,
  *,
  num_clients: int,
  coarse_alpha: float = 10.0,
  fine_alpha: float = 1000.0,
  coarse_column: str = 'coarse',
  sizes: Literal['equal', 'natural'] = 'equal',
  features: Mapping[str, np.ndarray],
  client: np.ndarray | None = None,
  seed: int,
) -> np.ndarray:
  """Draws each client's mix of superclasses, and of the classes in each.

  Client c has class y of superclass s with probability

    q_c[s] * r_c,s[y],  q_c ~ Dirichlet(coarse_alpha * prior of superclasses),
    r_c,s ~ Dirichlet(fine_alpha * prior of the classes within s)

  and examples are drawn as in `dirichlet_client_partition`. Yuan et al., "What
  do we mean by generalization in federated learning?", 2022,
  https://arxiv.org/abs/2110.14216 (CIFAR-100: 100 clients, 10 and 1000).

  Args:
    label: int [N]; a class has examples of one superclass only.
    num_clients: C.
    coarse_alpha: concentration over superclasses.
    fine_alpha: concentration over the classes of a superclass.
    coarse_column: the integer column [N] of superclasses.
    sizes: as in `dirichlet_client_partition`.
    features: columns {name: [N, ...]}.
    client: the natural clients [N], for their sizes.
    seed: seed of the draw.

  Returns:
    Owners int64 [N].

  Raises:
    InvalidInput: a concentration <= 0, no such column, or a class in two
      superclasses.
  """
  label = np.asarray(label)
  check_alpha(coarse_alpha, 'coarse_alpha')
  check_alpha(fine_alpha, 'fine_alpha')
  check_sizes(len(label), num_clients, 0)
  validate.check(
    coarse_column in features,
    f'Expected a column {coarse_column!r} of superclasses, got '
    f'{sorted(features)}.',
  )
  classes, first, label = np.unique(
    label, return_index=True, return_inverse=True
  )
  coarse_labels, coarse = np.unique(
    np.asarray(features[coarse_column]), return_inverse=True
  )
  of_class = coarse[first]  # [Y]
  validate.check(
    np.array_equal(of_class[label], coarse),
    f'Expected each class in one superclass of column {coarse_column!r}.',
  )
  rng = np.random.default_rng(seed)
  pool = np.bincount(label, minlength=len(classes))
  coarse_pool = np.bincount(coarse, minlength=len(coarse_labels))
  shape = (num_clients, len(coarse_labels))
  coarse_logs = log_gammas(
    rng, coarse_alpha * coarse_pool / max(len(label), 1), shape
  )
  logs = log_gammas(
    rng,
    fine_alpha * pool / coarse_pool[of_class],
    (num_clients, len(classes)),
  )
  for s in range(len(coarse_labels)):
    within = of_class == s
    logs[:, within] = (
      np.log(softmax(logs[:, within]) + 1e-300) + coarse_logs[:, s, None]
    )
  wanted = _client_sizes(len(label), num_clients, sizes, client)
  return _by_mixes(rng, logs, wanted, label, pool)


def multinomial_dirichlet_partition(
  label: np.ndarray,
  *,
  num_clients: int,
  alpha: float = 0.5,
  legacy: bool = False,
  seed: int,
) -> np.ndarray:
  """Every example of a class goes to a client of its own draw.

    p_y ~ Dirichlet(alpha * 1_C),  owner of each example of class y ~ p_y

  Client sizes have no minimum; clients without a class are common. So does the
  official code of Xiao et al., "FedLoGe: joint local and generic federated
  learning under long-tailed data", 2024, https://arxiv.org/abs/2401.08977.

  Args:
    label: int [N].
    num_clients: C.
    alpha: concentration.
    legacy: draws as that code does, bit for bit, from numpy's legacy generator
      (there the seed is 3407).
    seed: of the draws.

  Returns:
    Owners int64 [N].

  Raises:
    InvalidInput: alpha <= 0 or num_clients < 1.
  """
  label = np.asarray(label)
  check_alpha(alpha)
  check_sizes(len(label), num_clients, 0)
  classes = np.unique(label)
  rng = np.random.RandomState(seed) if legacy else np.random.default_rng(seed)
  if legacy:  # drawn there, and not used
    rng.binomial(1, 1, size=(num_clients, len(classes)))
  owner = np.empty(len(label), np.int64)
  for y in classes:
    rows = np.flatnonzero(label == y)
    shares = rng.dirichlet([alpha] * num_clients)
    owner[rows] = rng.choice(num_clients, size=len(rows), p=shares)
  return owner


def _client_sizes(
  num_examples: int, num_clients: int, sizes: str, client: np.ndarray | None
) -> np.ndarray:
  """How many examples each client gets, int64 [C]; they sum to N."""
  validate.one_of('sizes', sizes, ('equal', 'natural'))
  if sizes == 'equal':
    return num_examples // num_clients + (
      np.arange(num_clients) < num_examples % num_clients
    )
  validate.check(
    client is not None,
    'Expected natural clients for sizes=natural, got none.',
  )
  counts = np.unique(client, return_counts=True)[1]
  validate.check(
    len(counts) == num_clients,
    f'Expected num_clients={len(counts)}, as many as there are natural '
    f'clients, for sizes=natural, got num_clients={num_clients}.',
  )
  return counts.astype(np.int64)


def _by_mixes(
  rng: np.random.Generator,
  logs: np.ndarray,
  sizes: np.ndarray,
  label: np.ndarray,
  pool: np.ndarray,
) -> np.ndarray:
  """Owners int64 [N] of labels [N] by class mixes [C, Y] and sizes [C]."""
  counts = _fill(rng, logs, sizes, pool)
  owner = np.empty(len(label), np.int64)
  owner[rows_by_class(rng, label)] = np.repeat(
    np.tile(np.arange(len(sizes)), len(pool)), counts.T.reshape(-1)
  )
  return owner


def _fill(
  rng: np.random.Generator,
  logs: np.ndarray,
  sizes: np.ndarray,
  pool: np.ndarray,
) -> np.ndarray:
  """Draws sizes [C] places from class pools [Y]; both sum to N.

  Clients are visited in rotation, in a fresh random order each time around,
  until they are full; each visit draws a class from the client's mix over the
  classes that are left. Visits are drawn in blocks, which end where a class
  runs out.

  Args:
    rng: generator of the draws.
    logs: [C, Y], logarithms of class shares, up to a constant for each client.
    sizes: int64 [C].
    pool: int64 [Y].

  Returns:
    Counts int64 [C, Y], with row sums `sizes` and column sums `pool`.
  """
  visitor = np.repeat(np.arange(len(sizes)), sizes)
  turn = ramp(np.asarray(sizes))
  visitor = visitor[np.lexsort((rng.random(len(visitor)), turn))]
  counts = np.zeros(logs.shape, np.int64)
  pool = np.array(pool)
  block, first = max(1, _BLOCK // max(len(pool), 1)), 0
  while first < len(visitor):
    clients = visitor[first : first + block]
    left = np.flatnonzero(pool)
    steps = np.cumsum(softmax(logs[np.ix_(clients, left)]), axis=1)
    level = rng.random((len(clients), 1)) * steps[:, -1:]
    y = left[(level >= steps[:, :-1]).sum(1)]
    # Where a class is drawn once more than it has examples, the block ends.
    taken = np.zeros(len(y), np.int64)
    order = np.argsort(y, kind='stable')
    taken[order] = ramp(np.bincount(y, minlength=len(pool)))
    over = np.flatnonzero(taken >= pool[y])
    end = over[0] if len(over) else len(y)
    np.add.at(counts, (clients[:end], y[:end]), 1)
    pool -= np.bincount(y[:end], minlength=len(pool))
    first += end
  return counts


def _raise_minimum(counts: np.ndarray, minimum: int) -> None:
  """Moves examples in counts [C, Y], in place, until each row sums to it."""
  sizes = counts.sum(1)
  for poor in np.flatnonzero(sizes < minimum).tolist():
    while sizes[poor] < minimum:
      rich = int(sizes.argmax())
      y = int(counts[rich].argmax())
      counts[rich, y] -= 1
      counts[poor, y] += 1
      sizes[rich] -= 1
      sizes[poor] += 1
