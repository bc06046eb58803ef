"""Partitioners: who owns which example.

Each is `f(label [N], *, num_clients, seed, **settings) -> owner int64 [N]`,
gives each example to exactly one client, always terminates, and depends on its
arguments only. `PARTITIONERS` has them by name. Labels are any integers: their
order may matter, their values do not. A partitioner that takes `features` gets
the columns {name: [N, ...]}, one that takes `client` the natural clients [N].

Axis letters: N examples, C clients, Y classes.
"""

import types
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.core.plans import ramp
from fedjax_ext.data.semantic import semantic_partition

_BLOCK = 2**20  # Numbers drawn at a time.


def _check_sizes(
  num_examples: int, num_clients: int, min_examples: int
) -> None:
  validate.at_least('num_clients', num_clients, 1)
  validate.at_least('min_examples', min_examples, 0)
  validate.check(
    num_clients * min_examples <= num_examples,
    f'Expected num_clients * min_examples <= {num_examples} examples, got '
    f'num_clients={num_clients}, min_examples={min_examples}.',
  )


def apportion(shares: np.ndarray, total: int) -> np.ndarray:
  """Splits a total by shares [C] into whole counts [C], by largest remainder.

  Hamilton's method; ties go to the lower index. The counts sum to `total` and
  differ from shares * total / sum(shares) by less than 1.
  """
  shares = np.asarray(shares, np.float64)
  exact = shares / shares.sum() * total
  counts = np.floor(exact).astype(np.int64)
  left = total - counts.sum()
  order = np.argsort(-(exact - counts), kind='stable')
  counts[order[:left]] += 1
  return counts


def iid_partition(
  label: np.ndarray, *, num_clients: int, seed: int
) -> np.ndarray:
  """Deals shuffled examples out evenly; sizes differ by at most 1.

  Args:
    label: int [N]; only its length is used.
    num_clients: C.
    seed: seed of the shuffle.

  Returns:
    Owners int64 [N].

  Raises:
    InvalidInput: num_clients < 1.
  """
  num_examples = len(label)
  _check_sizes(num_examples, num_clients, 0)
  rng = np.random.default_rng(seed)
  owner = np.empty(num_examples, np.int64)
  owner[rng.permutation(num_examples)] = np.arange(num_examples) % num_clients
  return owner


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
  _check_alpha(alpha)
  _check_sizes(len(label), num_clients, min_examples)
  rng = np.random.default_rng(seed)
  classes, label = np.unique(label, return_inverse=True)
  counts = np.zeros((num_clients, len(classes)), np.int64)
  for y, size in enumerate(np.bincount(label, minlength=len(classes))):
    counts[:, y] = apportion(_dirichlet(rng, alpha, num_clients), int(size))
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
  _check_alpha(alpha)
  _check_sizes(len(label), num_clients, 0)
  rng = np.random.default_rng(seed)
  classes, label = np.unique(label, return_inverse=True)
  pool = np.bincount(label, minlength=len(classes))
  prior = pool / max(len(label), 1)
  logs = _log_gammas(rng, alpha * prior, (num_clients, len(classes)))
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
  _check_alpha(coarse_alpha, 'coarse_alpha')
  _check_alpha(fine_alpha, 'fine_alpha')
  _check_sizes(len(label), num_clients, 0)
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
  coarse_logs = _log_gammas(
    rng, coarse_alpha * coarse_pool / max(len(label), 1), shape
  )
  logs = _log_gammas(
    rng,
    fine_alpha * pool / coarse_pool[of_class],
    (num_clients, len(classes)),
  )
  for s in range(len(coarse_labels)):
    within = of_class == s
    logs[:, within] = (
      np.log(_softmax(logs[:, within]) + 1e-300) + coarse_logs[:, s, None]
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
  _check_alpha(alpha)
  _check_sizes(len(label), num_clients, 0)
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


def shards_partition(
  label: np.ndarray, *, num_clients: int, shards_per_client: int = 2, seed: int
) -> np.ndarray:
  """Sorts by label, cuts C * s shards and deals s random ones to each client.

  Shards differ by at most 1 in size, clients by at most s. A client has about
  s classes or fewer: a shard may reach over the border of two.

  McMahan, Moore, Ramage, Hampson and Aguera y Arcas, "Communication-efficient
  learning of deep networks from decentralized data", 2017,
  https://arxiv.org/abs/1602.05629.

  Args:
    label: int [N].
    num_clients: C.
    shards_per_client: s.
    seed: seed of the deal, and of the order of examples within a class.

  Returns:
    Owners int64 [N].

  Raises:
    InvalidInput: fewer than C * s examples, or num_clients or s < 1.
  """
  label = np.asarray(label)
  validate.at_least('num_clients', num_clients, 1)
  validate.at_least('shards_per_client', shards_per_client, 1)
  num_shards = num_clients * shards_per_client
  validate.check(
    num_shards <= len(label),
    f'Expected num_clients * shards_per_client <= {len(label)} examples, got '
    f'num_clients={num_clients}, shards_per_client={shards_per_client}.',
  )
  rng = np.random.default_rng(seed)
  shard = np.arange(len(label)) * num_shards // len(label)
  owner_of_shard = rng.permutation(num_shards) // shards_per_client
  owner = np.empty(len(label), np.int64)
  owner[_by_class(rng, label)] = owner_of_shard[shard]
  return owner


def quantity_partition(
  label: np.ndarray,
  *,
  num_clients: int,
  alpha: float = 0.5,
  min_examples: int = 1,
  seed: int,
) -> np.ndarray:
  """Skews the sizes only: every client has a random sample of the examples.

  Client shares p ~ Dirichlet(alpha * 1_C), turned into sizes by apportionment.
  Clients below `min_examples` then take from the largest ones.

  Li, Diao, Chen and He, "Federated learning on non-IID data silos: an
  experimental study", 2022, https://arxiv.org/abs/2102.02079, redraw until all
  clients are large enough (10 examples), which need not end.

  Args:
    label: int [N]; only its length is used.
    num_clients: C.
    alpha: concentration; small values give most examples to few clients.
    min_examples: every client gets at least so many.
    seed: seed of the draw.

  Returns:
    Owners int64 [N].

  Raises:
    InvalidInput: alpha <= 0, or fewer than C * min_examples examples.
  """
  _check_alpha(alpha)
  _check_sizes(len(label), num_clients, min_examples)
  rng = np.random.default_rng(seed)
  shares = _dirichlet(rng, alpha, num_clients)
  sizes = _at_least(apportion(shares, len(label)), min_examples)
  owner = np.empty(len(label), np.int64)
  owner[rng.permutation(len(label))] = np.repeat(np.arange(num_clients), sizes)
  return owner


def classes_partition(
  label: np.ndarray, *, num_clients: int, classes_per_client: int = 2, seed: int
) -> np.ndarray:
  """Gives every client examples of exactly k classes.

  A class is held by floor(C * k / Y) clients or one more, and its examples are
  divided equally among them (within 1). The one more goes to random classes
  among those with enough examples.

  Li, Diao, Chen and He, "Federated learning on non-IID data silos: an
  experimental study", 2022, https://arxiv.org/abs/2102.02079 (there #C = k,
  where a client draws its classes alone, so that a class may stay unheld).

  Args:
    label: int [N].
    num_clients: C.
    classes_per_client: k.
    seed: seed of the choice of classes and examples.

  Returns:
    Owners int64 [N].

  Raises:
    InvalidInput: k > Y, C * k < Y, or a class has fewer examples than holders.
  """
  label = np.asarray(label)
  classes, label = np.unique(label, return_inverse=True)
  pool = np.bincount(label, minlength=len(classes))
  _check_classes(classes, pool, num_clients, classes_per_client)
  rng = np.random.default_rng(seed)
  held = _deal_classes(rng, pool, num_clients, classes_per_client)
  holders = np.bincount(held.reshape(-1), minlength=len(classes))
  # Clients in the order of the classes that they hold, class by class.
  clients = np.argsort(held.reshape(-1), kind='stable') // classes_per_client
  rows = _by_class(rng, label)
  y = label[rows]
  place = np.arange(len(label)) - (np.cumsum(pool) - pool)[y]
  owner = np.empty(len(label), np.int64)
  owner[rows] = clients[(np.cumsum(holders) - holders)[y] + place % holders[y]]
  return owner


Partitioner = Callable[..., np.ndarray]

PARTITIONERS: Mapping[str, Partitioner] = types.MappingProxyType(
  {
    'iid': iid_partition,
    'dirichlet': dirichlet_partition,
    'dirichlet_client': dirichlet_client_partition,
    'coarse_fine_dirichlet': coarse_fine_dirichlet_partition,
    'multinomial_dirichlet': multinomial_dirichlet_partition,
    'shards': shards_partition,
    'quantity': quantity_partition,
    'classes': classes_partition,
    'semantic': semantic_partition,
  }
)


def class_counts(
  label: np.ndarray, owner: np.ndarray, *, num_clients: int, num_classes: int
) -> np.ndarray:
  """Counts every client's examples of every class.

  Args:
    label: int [N], in 0..Y-1.
    owner: int [N], in 0..C-1, or -1 for examples that nobody owns.
    num_clients: C.
    num_classes: Y.

  Returns:
    int64 [C, Y].

  Raises:
    InvalidInput: the lengths differ, or a label or an owner is out of range.
  """
  label, owner = np.asarray(label), np.asarray(owner)
  validate.check(
    label.shape == owner.shape,
    f'Expected {len(label)} owners, got {len(owner)}.',
  )
  for name, column, low, high in (
    ('label', label, 0, num_classes),
    ('owner', owner, -1, num_clients),
  ):
    validate.check(
      column.min(initial=0) >= low and column.max(initial=low) < high,
      f'Expected {name} in {low}..{high - 1}, got '
      f'{column.min(initial=0)}..{column.max(initial=low)}.',
    )
  owned = owner >= 0
  cell = owner[owned].astype(np.int64) * num_classes + label[owned]
  counts = np.bincount(cell, minlength=num_clients * num_classes)
  return counts.astype(np.int64).reshape(num_clients, num_classes)


def _check_alpha(alpha: float, name: str = 'alpha') -> None:
  validate.check(
    0 < alpha < np.inf, f'Expected 0 < {name} < infinity, got {name}={alpha}.'
  )


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
  owner[_by_class(rng, label)] = np.repeat(
    np.tile(np.arange(len(sizes)), len(pool)), counts.T.reshape(-1)
  )
  return owner


def _check_classes(
  classes: np.ndarray,
  pool: np.ndarray,
  num_clients: int,
  classes_per_client: int,
) -> None:
  """Checks that C clients can hold k of the classes [Y] with pools [Y]."""
  validate.at_least('num_clients', num_clients, 1)
  validate.between('classes_per_client', classes_per_client, 1, len(classes))
  got = f'num_clients={num_clients}, classes_per_client={classes_per_client}'
  slots = num_clients * classes_per_client
  validate.check(
    slots >= len(classes),
    f'Expected num_clients * classes_per_client >= {len(classes)} classes, got '
    f'{got}.',
  )
  fewest, more = divmod(slots, len(classes))
  order = np.argsort(pool, kind='stable')
  needs = np.full(len(classes), fewest)
  needs[len(classes) - more :] += 1  # at best, the largest classes need more
  short = np.flatnonzero(pool[order] < needs)
  if len(short):
    y = order[short[0]]
    validate.check(
      False,
      f'Expected at least {needs[short[0]]} examples of class {classes[y]}, '
      f'one for each client that holds it, got {pool[y]} with {got}.',
    )


def _deal_classes(
  rng: np.random.Generator, pool: np.ndarray, num_clients: int, k: int
) -> np.ndarray:
  """k distinct classes for each client, int64 [C, k].

  Clients take k places each of shuffled rounds through all Y classes, after a
  shorter round of the classes that one client more will hold. A client that
  reaches over two rounds takes from the second what it lacks.
  """
  num_classes = len(pool)
  fewest, more = divmod(num_clients * k, num_classes)
  ample = rng.permutation(np.flatnonzero(pool > fewest))
  rounds = [ample[:more]]
  length = more
  for _ in range(fewest):
    classes = rng.permutation(num_classes)
    if over := length % k:
      taken = np.isin(classes, rounds[-1][-over:])
      head = np.flatnonzero(~taken)[: k - over]
      rest = np.delete(classes, head)
      classes = np.concatenate([classes[head], rng.permutation(rest)])
    rounds.append(classes)
    length += num_classes
  return np.concatenate(rounds).astype(np.int64).reshape(num_clients, k)


def _by_class(rng: np.random.Generator, label: np.ndarray) -> np.ndarray:
  """Rows in ascending order of labels [N], in random order within one; [N]."""
  rows = rng.permutation(len(label))
  return rows[np.argsort(label[rows], kind='stable')]


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
    steps = np.cumsum(_softmax(logs[np.ix_(clients, left)]), axis=1)
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


def _softmax(logs: np.ndarray) -> np.ndarray:
  """Shares [C, Y] that sum to 1 over classes."""
  shares = np.exp(logs - logs.max(1, keepdims=True))
  return shares / shares.sum(1, keepdims=True)


def _log_gammas(
  rng: np.random.Generator, alpha: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
  """Logarithms of Gamma(alpha) draws; normalised, they are a Dirichlet draw.

  In log space, where a tiny alpha does not give 0/0:
  log Gamma(a) = log Gamma(a + 1) + log(U) / a in distribution.
  """
  alpha = np.maximum(alpha, 1e-300)  # log(U) / a stays finite
  logs = np.log(rng.gamma(alpha + 1, size=shape))
  return logs + np.log1p(-rng.random(shape)) / alpha


def _dirichlet(rng: np.random.Generator, alpha: float, size: int) -> np.ndarray:
  """A symmetric Dirichlet draw [size]."""
  logs = _log_gammas(rng, np.float64(alpha), (size,))
  shares = np.exp(logs - logs.max())
  return shares / shares.sum()


def _at_least(sizes: np.ndarray, minimum: int) -> np.ndarray:
  """Raises sizes [C] to the minimum and lowers the largest to a common level.

  As if each missing example was taken from the client that is largest then.
  """
  raised = np.maximum(sizes, minimum)
  extra = int(raised.sum() - sizes.sum())
  if not extra:
    return raised
  # Levels in descending order; at level order[i], i + 1 clients were lowered.
  order = np.argsort(-raised, kind='stable')
  largest = raised[order]
  total = np.cumsum(largest)
  count = np.arange(1, len(sizes) + 1)
  following = np.append(largest[1:], minimum)
  i = int(np.argmax(total - count * following >= extra))
  level, left = divmod(int(total[i]) - extra, i + 1)
  raised[order[: i + 1]] = level
  raised[order[:left]] += 1
  return raised


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
