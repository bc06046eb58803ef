"""What a table is made of, and how Markdown tables are laid out."""

import dataclasses
from collections.abc import Sequence

from launchers import grid, tuning
from launchers import results as results_lib
from launchers import spec as spec_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """All that a table shows.

  Attributes:
    spec: the table.
    plan: what was run.
    results: every reported cell's result.
    tuning_cells: the tuning runs.
    choices: what tuning found.
    command: the launcher's own command line.
    not_run: data sets that none of the collected cells is about.
  """

  spec: spec_lib.TableSpec
  plan: grid.Plan
  results: Sequence[results_lib.Result]
  tuning_cells: Sequence[grid.Cell]
  choices: Sequence[tuning.Choice]
  command: str
  not_run: tuple[str, ...] = ()


def layout(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """Lays out a Markdown table."""

  def line(cells: Sequence[str]) -> str:
    escaped = (cell.replace('|', '\\|').replace('\n', ' ') for cell in cells)
    return f'| {" | ".join(escaped)} |'

  rule = ['---'] * len(header)
  return '\n'.join([line(header), line(rule), *map(line, lines)])
