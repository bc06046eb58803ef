"""Chooses tuned flag values, by validation figures alone."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from launchers import grid
from launchers import results as results_lib
from launchers import spec as spec_lib


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One point of a row's grid and its validation figure."""

  values: grid.Values
  measure: results_lib.Measure


@dataclasses.dataclass(frozen=True)
class Choice:
  """What tuning found for one row on one data set.

  Attributes:
    dataset: the column.
    row: the method.
    candidates: every point of the grid, in its order.
    chosen: the best point, or None where none can be named.
    reason: why none can be named; '' otherwise.
  """

  dataset: str
  row: str
  candidates: tuple[Candidate, ...]
  chosen: grid.Values | None
  reason: str


def choose_all(
  spec: spec_lib.TableSpec, results: Sequence[results_lib.Result]
) -> list[Choice]:
  """Chooses for every tuned row and data set.

  The best validation figure wins, of equal ones the first in the grid. A
  candidate that diverged is never chosen. Where a candidate failed, none is:
  the choice would rest on fewer candidates than the grid says.

  Args:
    spec: the table.
    results: the tuning runs, or those of them that have ended.

  Returns:
    One choice for each pair that appears in `results`.
  """
  if spec.tuning is None:
    return []
  groups: dict[tuple[str, str], list[Candidate]] = {}
  for result in results:
    figure = results_lib.measure_figure(spec, result, spec.tuning.metric)
    key = (result.cell.dataset, result.cell.row)
    groups.setdefault(key, []).append(Candidate(result.cell.values, figure))
  sizes = {row.name: len(grid.candidates(row)) for row in spec.rows}
  return [
    Choice(
      dataset,
      row,
      tuple(group),
      *choose(group, size=sizes[row], direction=spec.tuning.direction),
    )
    for (dataset, row), group in groups.items()
  ]


def choose(
  candidates: Sequence[Candidate], *, size: int, direction: str
) -> tuple[grid.Values | None, str]:
  """Chooses among the candidates of one row on one data set.

  Args:
    candidates: those that have ended.
    size: how many the grid has.
    direction: 'higher' or 'lower', whichever is better.

  Returns:
    The chosen values and '', or None and the reason.
  """
  failed = [c for c in candidates if c.measure.status == 'failed']
  if failed:
    return None, f'tuning failed: {failed[0].measure.reason}'
  if len(candidates) < size:
    return None, f'{len(candidates)} of {size} tuning runs have ended'
  finite = [c for c in candidates if c.measure.value is not None]
  if not finite:
    return None, 'tuning failed: every candidate diverged'
  sign = 1.0 if direction == 'higher' else -1.0
  return max(finite, key=lambda c: sign * c.measure.value).values, ''


def chosen_values(choices: Sequence[Choice]) -> grid.Choices:
  """Returns the chosen values by (data set, row)."""
  return {
    (choice.dataset, choice.row): choice.chosen
    for choice in choices
    if choice.chosen is not None
  }


def to_json(
  spec: spec_lib.TableSpec, choices: Sequence[Choice]
) -> dict[str, Any]:
  """Describes the tuning for tuning.json, with each candidate's figure."""
  tuning = spec.tuning
  assert tuning is not None
  return {
    'rule': f'best {tuning.metric} ({tuning.direction} is better)',
    'seed': tuning.seed,
    'flags': list(tuning.flags),
    'choices': [
      {
        'dataset': choice.dataset,
        'row': choice.row,
        'chosen': choice.chosen and dict(choice.chosen),
        'reason': choice.reason,
        'candidates': [
          {
            'values': dict(candidate.values),
            'status': candidate.measure.status,
            tuning.metric: candidate.measure.value,
          }
          for candidate in choice.candidates
        ],
      }
      for choice in choices
    ],
  }
