"""Parts of the population, what is measured on them, and what they share.

A part is a set of clients and the examples they have in a split, for instance
"participating clients, validation". Parts may overlap; the examples that the
same parts name are a piece, and each piece is scored once.

Axis letters: C clients, K' clients of a part or piece, N examples of a split.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.core.plans import ClientRows, rows_of

PERCENTILES = (5, 25, 50, 75, 95)


class Part(NamedTuple):
  """What is reported under one name.

  Attributes:
    clients: client numbers int64 [K'].
    split: the split they are evaluated on.
    only: bool [N], which examples of the split (by position) count; None for
      all.
  """

  clients: np.ndarray
  split: str
  only: np.ndarray | None = None


class Rows(NamedTuple):
  """A plain `ClientRows`: offsets int64 [C+1], rows int64 [N]."""

  offsets: np.ndarray
  rows: np.ndarray


class Piece(NamedTuple):
  """Examples of one split that the same parts name.

  Attributes:
    clients: numbers int64 [K'], ascending.
    view: the clients' examples, and perhaps those of others.
  """

  clients: np.ndarray
  view: ClientRows

  def sizes(self, clients: np.ndarray) -> np.ndarray:
    """Examples of each client [K'], int64 [K']."""
    offsets = self.view.offsets
    return np.asarray(offsets[clients + 1] - offsets[clients])

  def alone(self) -> Rows:
    """The view without other clients' examples."""
    rows, owner = rows_of(self.view, self.clients)
    counts = np.zeros(len(self.view.offsets), np.int64)
    counts[self.clients + 1] = np.bincount(owner, minlength=len(self.clients))
    return Rows(np.cumsum(counts), rows)


# {metric: (sum [K'], weight [K'])} over the clients of a piece.
Scores = Mapping[str, tuple[np.ndarray, np.ndarray]]


class PartReport(NamedTuple):
  """What was measured on one part, client by client.

  Attributes:
    clients: client numbers int64 [K'], those with at least one example.
    examples: number of examples int64 [K'].
    sums: {name: [K']}, sum of value * weight.
    weights: {name: [K']}, sum of weights (examples, or tokens).
  """

  clients: np.ndarray
  examples: np.ndarray
  sums: dict[str, np.ndarray]
  weights: dict[str, np.ndarray]

  def summary(self) -> dict[str, float]:
    """{'<metric>/<statistic>': scalar} and the counts.

    'pooled' weighs every example (or token) alike. The others are over each
    client's own mean: 'mean' weighs clients alike, 'weighted_mean' weighs them
    by examples, 'variance' is that of the clients at hand (divided by K'), and
    'p5' to 'p95' are percentiles over clients by the nearest rule: of n sorted
    values the one at round((n - 1) q / 100), so that each is some client's.
    'p50' is the median. Yuan et al., "What do we mean by generalization in
    federated learning?", 2022, https://arxiv.org/abs/2110.14216, call these
    wavg (weighted_mean), avg, var, med and pct5 to pct95.
    """
    result = {
      'clients': len(self.clients),
      'examples': int(self.examples.sum()),
    }
    for name, sums in self.sums.items():
      weights = self.weights[name]
      some = weights > 0
      if not some.any():
        continue
      values = sums[some] / weights[some]
      examples = self.examples[some]
      result[f'{name}/pooled'] = float(sums.sum() / weights.sum())
      result[f'{name}/mean'] = float(values.mean())
      result[f'{name}/weighted_mean'] = float(
        (values * examples).sum() / examples.sum()
      )
      result[f'{name}/variance'] = float(values.var())
      for p in PERCENTILES:
        result[f'{name}/p{p}'] = float(
          np.percentile(values, p, method='nearest')
        )
    return result


Report = dict[str, PartReport]


def summarize_report(report: Report) -> dict[str, float]:
  """Flattens a report to {'<part>/<metric>/<statistic>': scalar}."""
  return {
    f'{part}/{name}': value
    for part, one in report.items()
    for name, value in one.summary().items()
  }


def cut(
  data: Mapping[str, ClientRows], parts: Mapping[str, Part]
) -> tuple[list[Piece], dict[str, list[int]]]:
  """Cuts the examples of parts into pieces that no two have in common.

  Args:
    data: splits by name.
    parts: by name.

  Returns:
    (pieces, {part: the numbers of its pieces}).

  Raises:
    InvalidInput: a part names an unknown split or client, its mask does not fit
      the split, or the splits are of different populations.
  """
  for name, part in parts.items():
    _check(name, part, data)
  counts = {p.split: len(data[p.split].offsets) - 1 for p in parts.values()}
  validate.check(
    len(set(counts.values())) <= 1,
    f'Expected one number of clients in all splits, got {counts}.',
  )
  pieces: list[Piece] = []
  of_part: dict[str, list[int]] = {name: [] for name in parts}
  for split in sorted({part.split for part in parts.values()}):
    named = {n: part for n, part in parts.items() if part.split == split}
    for names, view in _common(data[split], named):
      for name in names:
        of_part[name].append(len(pieces))
      clients = np.concatenate([named[name].clients for name in names])
      pieces.append(Piece(np.unique(clients), view))
  return pieces, of_part


def _check(name: str, part: Part, data: Mapping[str, ClientRows]) -> None:
  validate.one_of('split', part.split, list(data))
  view = data[part.split]
  low = np.min(part.clients, initial=0)
  high = np.max(part.clients, initial=0)
  population = len(view.offsets) - 1
  validate.check(
    low >= 0 and high < population,
    f'Expected client numbers in 0..{population - 1}, got {low}..{high}.',
  )
  if part.only is not None:
    size = int(view.offsets[-1])
    shape, dtype = np.shape(part.only), np.asarray(part.only).dtype
    validate.check(
      shape == (size,) and dtype == np.dtype(bool),
      f'Expected a mask bool [{size}] of split {part.split!r} in part '
      f'{name!r}, got {dtype} {list(shape)}.',
    )


def _common(
  view: ClientRows, parts: Mapping[str, Part]
) -> Iterator[tuple[list[str], ClientRows]]:
  """The parts of a split that name the same examples, and those examples."""
  if all(part.only is None for part in parts.values()):
    yield list(parts), view
    return
  masked = [name for name, part in parts.items() if part.only is not None]
  whole = [name for name, part in parts.items() if part.only is None]
  validate.check(
    len(masked) < 64,
    f'Expected less than 64 parts with a mask over a split, got {len(masked)}.',
  )
  # Bit i says whether the i-th masked part has the example.
  kind = np.zeros(int(view.offsets[-1]), np.uint64)
  for i, name in enumerate(masked):
    kind |= np.asarray(parts[name].only).astype(np.uint64) << np.uint64(i)
  found = np.union1d(kind, np.uint64(0))
  for number in found.tolist():
    names = whole + [n for i, n in enumerate(masked) if number >> i & 1]
    if names:
      yield names, _filter(view, kind == np.uint64(number))
  named = int(np.bitwise_or.reduce(found))
  empty = [name for i, name in enumerate(masked) if not named >> i & 1]
  if empty:
    yield empty, _filter(view, np.zeros(len(kind), bool))


def _filter(view: ClientRows, keep: np.ndarray) -> Rows:
  """The positions of a view where the mask bool [N] is True."""
  offsets = np.concatenate([[0], np.cumsum(keep)])[view.offsets]
  return Rows(offsets, np.asarray(view.rows)[keep])


def examples_of(part: Part, data: Mapping[str, ClientRows]) -> Piece:
  """What a part is about: its clients and, mask applied, their examples."""
  view = data[part.split]
  if part.only is not None:
    view = _filter(view, np.asarray(part.only))
  return Piece(np.unique(part.clients), view)


def report_on(
  part: Part, pieces: Sequence[Piece], scores: Sequence[Scores]
) -> PartReport:
  """Puts a part together from its pieces and what they scored."""
  clients = np.asarray(part.clients)
  sizes = sum(
    (piece.sizes(clients) for piece in pieces), np.zeros(len(clients), np.int64)
  )
  chosen = clients[sizes > 0]
  sums: dict[str, np.ndarray] = {}
  weights: dict[str, np.ndarray] = {}
  for piece, scored in zip(pieces, scores, strict=True):
    at = np.searchsorted(piece.clients, chosen)
    for name, (s, w) in scored.items():
      sums[name] = s[at] + sums.get(name, 0)
      weights[name] = w[at] + weights.get(name, 0)
  return PartReport(chosen, sizes[sizes > 0], sums, weights)
