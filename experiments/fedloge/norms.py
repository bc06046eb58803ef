"""Norms of heads' class vectors against class frequency.

Under long-tailed data a head's class vectors grow with their classes' examples;
realignment (GLA-FR) rests on that.

Axis letters: C clients, Y classes.
"""

import csv
import io
import pathlib
from collections.abc import Mapping

import numpy as np

from fedjax_ext.core import ClientStates, Report
from fedjax_ext.models import params_of
from fedjax_ext.models.heads import class_norms
from fedjax_ext.training import processes
from fedjax_ext.training.plots import plot_head_norms
from fedjax_ext.training.writers import write_atomically


def report_norms(
  server_state,
  client_states: ClientStates | None,
  reports: Mapping[str, Report],
  *,
  counts: np.ndarray,
  own_heads: bool,
  workdir: pathlib.Path,
) -> dict[str, float]:
  """Writes head_norms.csv and head_norms.png of the last state.

  Args:
    server_state: with params, 'head' among them if there is a shared head.
    client_states: rows that are heads, if `own_heads`.
    reports: not used.
    counts: train examples of every client and class [C, Y].
    own_heads: whether clients have heads of their own.
    workdir: where to write.

  Returns:
    'head_norms/rank_correlation' (Spearman) of a shared head's norms with the
    classes' train examples; of own heads the mean norm over pairs of client and
    class, 'head_norms/own_present' with train examples and
    'head_norms/own_absent' without. What there is none of is left out.
  """
  frequency = counts.sum(0)
  params = params_of(getattr(server_state, 'params', {}))
  del reports
  columns, values = {'train_examples': frequency}, {}
  if isinstance(params, dict) and 'head' in params:
    columns['shared'] = np.asarray(class_norms(params['head']), np.float64)
    # Importing it takes longer than a small round.
    from scipy import stats

    values['rank_correlation'] = float(
      stats.spearmanr(frequency, columns['shared']).statistic
    )
  if own_heads:
    rows = client_states.gather(np.arange(len(counts)))
    own = np.linalg.norm(np.asarray(rows['kernel'], np.float64), axis=1)
    for name, who in (('present', counts > 0), ('absent', counts == 0)):
      columns[f'own_{name}'] = _mean(own, who, axis=0)
      values[f'own_{name}'] = float(_mean(own, who))
  if len(columns) > 1 and processes.is_first():
    _write(columns, workdir)
  return {
    f'head_norms/{name}': value
    for name, value in values.items()
    if np.isfinite(value)
  }


def _mean(x: np.ndarray, mask: np.ndarray, axis: int | None = None):
  """Mean of x [C, Y] over the mask, NaN where that is empty."""
  count = mask.sum(axis)
  return np.where(
    count > 0, (x * mask).sum(axis) / np.maximum(count, 1), np.nan
  )


def _write(columns: dict[str, np.ndarray], workdir: pathlib.Path) -> None:
  """One line for each class, and a picture."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['class', *columns])
  for y, line in enumerate(zip(*columns.values(), strict=True)):
    # Absent clients' or classes' cells are empty.
    writer.writerow([y, *('' if v != v else v for v in line)])
  write_atomically(workdir / 'head_norms.csv', text.getvalue())
  names = {
    'shared': 'shared head',
    'own_present': 'own heads, clients with the class',
    'own_absent': 'own heads, clients without it',
  }
  plot_head_norms(
    columns['train_examples'],
    {label: columns[name] for name, label in names.items() if name in columns},
    workdir / 'head_norms.png',
    title=workdir.name,
  )
