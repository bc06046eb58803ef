"""Semantic partitions: clients whose examples of a class look alike.

Examples are embedded, each class is cut into clusters by a Gaussian mixture,
and every client gets one cluster of each class: those that are near to each
other, or random ones. Clients then differ in what their examples look like and
not in their labels, as natural ones do.

Yuan, Morningstar, Ning and Singhal, "What do we mean by generalization in
federated learning?", 2022, https://arxiv.org/abs/2110.14216, section 4.

Axis letters: N examples, C clients, D features, Y classes.
"""

import itertools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.data.embeddings import (
  embed,
  principal_components,
  scikit_learn,
)

_LOG = logging.getLogger(__name__)
_FEW = 10  # Images of a class per client below which clusters mean little.


class Gaussians(NamedTuple):
  """C Gaussians of D features.

  Attributes:
    means: float64 [C, D].
    covariances: float64 [C, D, D], or the variances [C, D] of diagonal ones.
  """

  means: np.ndarray
  covariances: np.ndarray


def semantic_partition(
  label: np.ndarray,
  *,
  num_clients: int,
  embedding: str = 'identity',
  components: int = 32,
  covariance: Literal['full', 'diag'] = 'full',
  matching: Literal['kl', 'random'] = 'kl',
  start: Literal['kmeans', 'random'] = 'kmeans',
  regularisation: float = 1e-4,
  iterations: int = 100,
  feature: str = 'image',
  features: Mapping[str, np.ndarray],
  seed: int,
) -> np.ndarray:
  """Gives every client one cluster of each class.

  Embedding, centred, and its first principal components; for each class a
  mixture of C Gaussians, fitted on at most 10,000 of its examples, each example
  going to its most likely one; then clusters are matched class by class, see
  `match_clusters`. A class with fewer than C examples has as many clusters as
  examples.

  Args:
    label: int [N].
    num_clients: C; a client whose clusters are all empty gets nothing.
    embedding: one of `embeddings.EMBEDDINGS`, or MODULE.FUNCTION: a pretrained
      encoder, arrays in, arrays out.
    components: principal components of the embedding; 0 takes it as it is.
    covariance: 'full' or 'diag'.
    matching: 'kl', clusters that are near together; or 'random'.
    start: of the mixtures, k-means or random responsibilities.
    regularisation: added to variances; more of it where clusters are small.
    iterations: of expectation-maximisation at most; tolerance 1e-3.
    feature: the column to embed.
    features: columns {name: [N, ...]}.
    seed: seed of everything.

  Returns:
    Owners int64 [N].

  Raises:
    InvalidInput: no such column, or a setting out of range.
  """
  validate.at_least('num_clients', num_clients, 1)
  validate.one_of('covariance', covariance, ('full', 'diag'))
  validate.one_of('matching', matching, ('kl', 'random'))
  validate.one_of('start', start, ('kmeans', 'random'))
  validate.above('regularisation', regularisation, 0)
  validate.at_least('iterations', iterations, 1)
  validate.at_least('components', components, 0)
  validate.check(
    feature in features,
    f'Expected a column {feature!r} to embed, got {sorted(features)}.',
  )
  label = np.asarray(label)
  validate.check(len(label) > 0, 'Expected examples to partition, got none.')
  classes, sizes = np.unique(label, return_counts=True)
  _warn_of_few(classes, sizes, num_clients)
  seeds = np.random.SeedSequence(seed).generate_state(3 + len(classes))
  x = embed(embedding, np.asarray(features[feature]), seed=int(seeds[0]))
  if components:
    x = principal_components(x, components=components, seed=int(seeds[1]))
  else:
    x = x - x.mean(0)
  _LOG.info('Semantic partition: %d x %d embedded.', *x.shape)
  clusters, members = [], []
  for i, y in enumerate(classes):
    rows = np.flatnonzero(label == y)
    gaussians, cluster = fit_clusters(
      x[rows],
      num_clusters=num_clients,
      covariance=covariance,
      start=start,
      regularisation=regularisation,
      iterations=iterations,
      seed=int(seeds[3 + i]),
    )
    clusters.append(gaussians)
    members.append((rows, cluster))
    _LOG.info(
      'Semantic partition: class %s, %d of %d, %d examples in %d clusters.',
      y,
      i + 1,
      len(classes),
      len(rows),
      len(np.unique(cluster)),
    )
  client = match_clusters(clusters, matching=matching, seed=int(seeds[2]))
  owner = np.empty(len(label), np.int64)
  for i, (rows, cluster) in enumerate(members):
    owner[rows] = client[i][cluster]
  return owner


def fit_clusters(
  x: np.ndarray,
  *,
  num_clusters: int,
  covariance: str = 'full',
  start: str = 'kmeans',
  regularisation: float = 1e-4,
  iterations: int = 100,
  most: int = 10_000,
  seed: int,
) -> tuple[Gaussians, np.ndarray]:
  """Fits a mixture and assigns every example to its most likely Gaussian.

  Args:
    x: float [N, D] of one class.
    num_clusters: C; beyond N, the Gaussians that are left are that of all x
      and have no examples.
    covariance: 'full' or 'diag'.
    start: 'kmeans' or 'random'.
    regularisation: added to variances.
    iterations: at most.
    most: the mixture is fitted on a random choice of at most so many.
    seed: of that choice and of the start.

  Returns:
    The Gaussians, and clusters int64 [N].
  """
  rng = np.random.default_rng(seed)
  x = np.asarray(x, np.float64)
  rows = np.sort(rng.permutation(len(x))[:most])
  count = min(num_clusters, len(rows))
  if count == 1:  # scikit-learn wants two
    means, covariances = _one_gaussian(x, covariance, regularisation)
    cluster = np.zeros(len(x), np.int64)
  else:
    mixture = scikit_learn('mixture').GaussianMixture(
      count,
      covariance_type=covariance,
      reg_covar=regularisation,
      max_iter=iterations,
      init_params=start,
      random_state=seed % 2**32,
    )
    too_few = scikit_learn('exceptions').ConvergenceWarning
    try:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore', too_few)
        mixture.fit(x[rows])
    except ValueError as error:
      raise validate.InvalidInput(
        f'Expected {count} Gaussians to fit {len(rows)} examples of '
        f'{x.shape[1]} features; raise regularisation={regularisation}, lower '
        f'components or use covariance=diag ({str(error).split(".")[0]}).'
      ) from error
    means, covariances = mixture.means_, mixture.covariances_
    cluster = mixture.predict(x).astype(np.int64)
  left = num_clusters - count
  if left:
    rest = _one_gaussian(x, covariance, regularisation)
    means, covariances = (
      np.concatenate([own, np.repeat(one, left, axis=0)])
      for own, one in zip((means, covariances), rest, strict=True)
    )
  return Gaussians(means, covariances), cluster


def _one_gaussian(
  x: np.ndarray, covariance: str, regularisation: float
) -> tuple[np.ndarray, np.ndarray]:
  """Mean [1, D] and covariance [1, D, D] or variances [1, D] of x [N, D]."""
  mean = x.mean(0)
  centred = x - mean
  if covariance == 'diag':
    spread = (centred**2).mean(0) + regularisation
  else:
    spread = centred.T @ centred / len(x) + regularisation * np.eye(x.shape[1])
  return mean[None], spread[None]


def kl_divergences(a: Gaussians, b: Gaussians) -> np.ndarray:
  """KL(a_i || b_j) of every pair, float64 [C, C'].

    KL(N(m, S) || N(n, T)) = 1/2 (tr(T^-1 S) + (n - m)' T^-1 (n - m) - D
                                  + ln det T - ln det S)

  By Cholesky factors; memory is that of the Gaussians.

  Args:
    a: C Gaussians.
    b: C' Gaussians, full or diagonal like a.

  Raises:
    InvalidInput: a covariance is not positive definite.
  """
  features = a.means.shape[1]
  if a.covariances.ndim == 2:
    for one in (a, b):
      validate.check(
        (one.covariances > 0).all(), 'Expected variances > 0 in clusters.'
      )
    precision = 1 / b.covariances
    trace = a.covariances @ precision.T
    distance = (
      a.means**2 @ precision.T
      - 2 * a.means @ (b.means * precision).T
      + (b.means**2 * precision).sum(1)
    )
    log_a, log_b = (np.log(one.covariances).sum(1) for one in (a, b))
  else:
    try:
      factor_a, factor_b = (np.linalg.cholesky(g.covariances) for g in (a, b))
    except np.linalg.LinAlgError as error:
      raise validate.InvalidInput(
        'Expected positive definite covariances of clusters; raise '
        f'regularisation, lower components or use covariance=diag ({error}).'
      ) from error
    eye = np.broadcast_to(np.eye(features), factor_b.shape)
    inverse = np.linalg.solve(factor_b, eye)  # of the factors
    flat = lambda x: x.reshape(len(x), -1)
    precision = np.swapaxes(inverse, 1, 2) @ inverse
    trace = flat(a.covariances) @ flat(precision).T
    distance = np.stack(
      [
        (((a.means - mean) @ one.T) ** 2).sum(1)
        for mean, one in zip(b.means, inverse, strict=True)
      ],
      axis=1,
    )
    log_a, log_b = (
      2 * np.log(np.diagonal(f, axis1=1, axis2=2)).sum(1)
      for f in (factor_a, factor_b)
    )
  return (trace + distance - features + log_b - log_a[:, None]) / 2


def match_clusters(
  clusters: Sequence[Gaussians],
  *,
  matching: str = 'kl',
  order: Sequence[int] | None = None,
  cost: Callable[[Gaussians, Gaussians], np.ndarray] = kl_divergences,
  seed: int = 0,
) -> np.ndarray:
  """Which client gets which cluster of each class.

  Progressive: clusters of a first class are the clients; each further class is
  matched to the one matched before it, at the least sum of costs. The optimum
  over all classes at once is a multi-partite matching, which is hard.

  Args:
    clusters: C Gaussians of each class.
    matching: 'kl', or 'random' for random matches.
    order: the classes in the order of matching; None is a random one.
    cost: (matched, new) -> float [C, C].
    seed: seed of the order or of the random matches.

  Returns:
    The client of every cluster, int64 [Y, C]; each row is a permutation.
  """
  from scipy.optimize import linear_sum_assignment

  rng = np.random.default_rng(seed)
  count = len(clusters[0].means)
  if matching == 'random':
    return np.stack([rng.permutation(count) for _ in clusters])
  order = rng.permutation(len(clusters)) if order is None else order
  client = np.zeros((len(clusters), count), np.int64)
  client[order[0]] = np.arange(count)
  for current, new in itertools.pairwise(order):
    rows, columns = linear_sum_assignment(
      cost(clusters[current], clusters[new])
    )
    client[new][columns] = client[current][rows]
  return client


def _warn_of_few(
  classes: np.ndarray, sizes: np.ndarray, num_clients: int
) -> None:
  """Names classes [Y] with fewer than ten examples (sizes [Y]) a client."""
  few = sizes < _FEW * num_clients
  if few.any():
    named = ', '.join(
      f'{y} ({n / num_clients:.1f})'
      for y, n in zip(classes[few], sizes[few], strict=True)
    )
    _LOG.warning(
      'Labels with fewer than %d examples per client: %s. Their clusters are '
      'small; fewer clients or components, or covariance=diag, help.',
      _FEW,
      named,
    )
