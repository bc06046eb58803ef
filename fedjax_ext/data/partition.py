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

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.data.dirichlet import (
  coarse_fine_dirichlet_partition,
  dirichlet_client_partition,
  dirichlet_partition,
  multinomial_dirichlet_partition,
)
from fedjax_ext.data.draws import (
  apportion,
  check_alpha,
  check_sizes,
  dirichlet_draw,
  rows_by_class,
)
from fedjax_ext.data.federated_data import FederatedData
from fedjax_ext.data.semantic import semantic_partition


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
  check_sizes(num_examples, num_clients, 0)
  rng = np.random.default_rng(seed)
  owner = np.empty(num_examples, np.int64)
  owner[rng.permutation(num_examples)] = np.arange(num_examples) % num_clients
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
  owner[rows_by_class(rng, label)] = owner_of_shard[shard]
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
  check_alpha(alpha)
  check_sizes(len(label), num_clients, min_examples)
  rng = np.random.default_rng(seed)
  shares = dirichlet_draw(rng, alpha, num_clients)
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
  rows = rows_by_class(rng, label)
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


def count_classes(
  view: FederatedData, label: np.ndarray, *, num_classes: int
) -> np.ndarray:
  """Examples of every client and class in a view, int64 [C, Y].

  Args:
    view: of the columns' rows.
    label: int [M] of the columns.
    num_classes: Y.
  """
  return class_counts(
    np.asarray(label)[np.asarray(view.rows)],
    view.owners(),
    num_clients=view.num_clients,
    num_classes=num_classes,
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
