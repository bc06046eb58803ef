"""Learning curves of a run as a picture."""

import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

_LOG = logging.getLogger(__name__)


def plot_curves(
  rows: Sequence[Mapping[str, Any]], path: pathlib.Path, *, title: str
) -> bool:
  """Draws metrics over rounds: one panel a metric, one line a part.

  Args:
    rows: metric rows {'round', name: scalar}.
    path: the PNG to write.
    title: above the panels.

  Returns:
    Whether a picture was written; not without matplotlib or rows.
  """
  try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
  except ImportError:
    _LOG.info('matplotlib is not installed: no curves.png.')
    return False
  panels = _panels(rows)
  if not panels:
    return False
  figure = Figure(figsize=(5 * len(panels), 3.8), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  labels = dict.fromkeys(n for lines in panels.values() for n in lines)
  colours = {label: f'C{i % 10}' for i, label in enumerate(labels)}
  for axis, (name, lines) in zip(axes, panels.items(), strict=True):
    for label, points in lines.items():
      rounds, values = zip(*points, strict=True)
      style = {'marker': '.'} if len(points) < 40 else {}
      axis.plot(
        rounds,
        values,
        label=label,
        color=colours[label],
        linewidth=1.4,
        **style,
      )
    axis.set_xlabel('round')
    axis.set_title(name)
    axis.grid(alpha=0.3)
    axis.legend(fontsize='small', frameon=False)
  figure.suptitle(title)
  temporary = path.with_name(f'.{path.name}')
  figure.savefig(temporary, dpi=120, format='png')
  temporary.replace(path)
  return True


def _panels(
  rows: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, list[tuple[int, float]]]]:
  """{panel: {line: [(round, value)]}} of what people look at first."""
  panels: dict[str, dict[str, list[tuple[int, float]]]] = {}

  def add(panel: str, line: str, round: int, value: Any) -> None:
    if isinstance(value, int | float):
      panels.setdefault(panel, {}).setdefault(line, []).append((round, value))

  for row in rows:
    for name, value in row.items():
      part, _, rest = name.rpartition('/')
      if name == 'train_loss':
        add('loss', 'local training', row['round'], value)
      elif rest == 'pooled':
        line, _, metric = part.rpartition('/')
        add(metric, line, row['round'], value)
  order = sorted(panels, key=lambda name: (name != 'accuracy', name))
  return {name: panels[name] for name in order}
