"""Pictures: the learning curves of a run, and who has which examples.

Axis letters: C clients, M rows, Y classes, I images, H height, W width, D
channels.
"""

import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.core.plans import ClientRows, rows_of

_MAX_BUBBLES = 50  # Rows or columns; beyond, a heat map is easier to read.
# Clients of a run that its picture shows: reading more would take long.
_MOST_DRAWN = 2_000
_MAX_NAMED = 200  # Clients; beyond, their order shows more than their names.
_MAX_IMAGES = 10
_MAX_INSIDE = 6  # Lines that a legend within a panel may name.
_MAX_PANELS = 8  # Metrics of curves.png, in rows of four.
_BANDS = ('p5', 'p25', 'p50', 'p75', 'p95', 'pooled')
_BLUE, _GREY = '#2b6cb0', '#8a8a8a'
_LOG = logging.getLogger(__name__)


def plot_curves(
  rows: Sequence[Mapping[str, Any]],
  path: pathlib.Path,
  *,
  title: str,
  metrics: Sequence[str] = (),
) -> bool:
  """Draws metrics over rounds: one panel a metric, one line a part.

  Args:
    rows: metric rows {'round', name: scalar}.
    path: the PNG to write.
    title: above the panels.
    metrics: which to draw beside the loss, as far as rows have them; all, if
      empty. The first eight panels are drawn.

  Returns:
    Whether a picture was written; not without matplotlib or rows.
  """
  every = _panels(rows, metrics)
  panels = dict(list(every.items())[:_MAX_PANELS])
  if len(panels) < len(every):
    _LOG.info('%s: %d of %d metrics.', path.name, len(panels), len(every))
  columns = min(len(panels), 4)
  height = 3.8 * -(-len(panels) // 4)
  figure = _make_figure((5 * max(1, columns), height), 'curves.png')
  if not panels or figure is None:
    return False
  grid = figure.subplots(-(-len(panels) // 4), columns, squeeze=False)
  axes = grid.ravel()[: len(panels)]
  for axis in grid.ravel()[len(panels) :]:
    axis.remove()
  labels = dict.fromkeys(n for lines in panels.values() for n in lines)
  looks = {
    label: {'color': f'C{i % 10}', 'linestyle': ('-', '--', ':')[i // 10 % 3]}
    for i, label in enumerate(labels)
  }
  for axis, (name, lines) in zip(axes, panels.items(), strict=True):
    for label, points in lines.items():
      rounds, values = zip(*points, strict=True)
      style = {'marker': '.'} if len(points) < 40 else {}
      axis.plot(
        rounds,
        values,
        label=label,
        linewidth=1.4,
        **looks[label],
        **style,
      )
    axis.set_xlabel('round')
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title(name)
    axis.grid(alpha=0.3)
    if len(labels) <= _MAX_INSIDE:
      axis.legend(fontsize='small', frameon=False)
  if len(labels) > _MAX_INSIDE:
    drawn = {line.get_label(): line for axis in axes for line in axis.lines}
    figure.legend(
      [drawn[label] for label in labels],
      labels,
      loc='outside right upper',
      fontsize='small',
      frameon=False,
    )
  figure.suptitle(title)
  _save(figure, path, dpi=120)
  return True


def plot_bands(
  rows: Sequence[Mapping[str, Any]],
  path: pathlib.Path,
  *,
  metric: str,
  title: str,
) -> bool:
  """Draws percentiles over clients against rounds, a panel for each part.

  Args:
    rows: metric rows {'round', '<part>/<metric>/p5': scalar, ...}.
    path: the PNG to write.
    metric: which.
    title: above the panels.

  Returns:
    Whether a picture was written; not without matplotlib, or where no part was
    evaluated in two rounds.
  """
  parts: dict[str, list[tuple[float, ...]]] = {}
  for row in rows:
    for name in row:
      part, _, rest = name.partition('/')
      if rest == f'{metric}/p5' and ':' not in part:
        points = [row.get(f'{part}/{metric}/{s}') for s in _BANDS]
        if all(isinstance(value, int | float) for value in points):
          parts.setdefault(part, []).append((row['round'], *points))
  parts = {part: points for part, points in parts.items() if len(points) > 1}
  if not parts:
    return False
  figure = _make_figure((3.6 * len(parts) + 0.8, 3.8), path.name)
  if figure is None:
    return False
  axes = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
  for i, (part, points) in enumerate(parts.items()):
    axis, colour = axes[i], f'C{i % 10}'
    rounds, low, lower, middle, upper, high, mean = zip(*points, strict=True)
    band = dict(color=colour, linewidth=0)
    axis.fill_between(rounds, low, high, alpha=0.15, label='5-95 %', **band)
    axis.fill_between(rounds, lower, upper, alpha=0.3, label='25-75 %', **band)
    axis.plot(rounds, middle, color=colour, label='median')
    axis.plot(rounds, mean, color='k', linewidth=1, ls='--', label='pooled')
    axis.set(xlabel='round', title=part)
    axis.grid(alpha=0.3)
    axis.legend(fontsize='small', frameon=False)
  axes[0].set_ylabel(f'{metric}, over clients')
  figure.suptitle(title)
  _save(figure, path, dpi=120)
  return True


def plot_head_norms(
  frequency: np.ndarray,
  norms: Mapping[str, np.ndarray],
  path: pathlib.Path,
  *,
  title: str,
) -> bool:
  """Draws norms of class vectors against the classes' examples, log-log.

  Args:
    frequency: examples of each class [Y].
    norms: {line: norms [Y]}; NaN is not drawn.
    path: the PNG to write.
    title: above the picture.

  Returns:
    Whether a picture was written; not without matplotlib.
  """
  figure = _make_figure((5.5, 4.0), path.name)
  if figure is None:
    return False
  axis, order = figure.subplots(), np.argsort(frequency)
  for name, values in norms.items():
    x, y = np.asarray(frequency)[order], np.asarray(values)[order]
    drawn = (x > 0) & (y > 0)
    axis.plot(x[drawn], y[drawn], marker='o', ms=4, lw=1, label=name)
  axis.set(
    xscale='log',
    yscale='log',
    xlabel='train examples of the class',
    ylabel='norm of the class vector',
  )
  axis.grid(alpha=0.3)
  axis.legend(fontsize='small', frameon=False)
  figure.suptitle(title)
  _save(figure, path, dpi=120)
  return True


def plot_heat_maps(
  shown: Mapping[str, Any], path: pathlib.Path, *, title: str
) -> bool:
  """Draws images and heat maps: a column for each image.

  Args:
    shown: {name: list of arrays [I, H, W] or [I, H, W, D]}, each a row; and
      {'NAME predicts': classes int [I]}, written above that name's first row.
    path: the PNG to write.
    title: above the picture.

  Returns:
    Whether a picture was written; not without matplotlib.
  """
  rows = [
    (name if len(arrays) == 1 else f'{name}, layer {i}', name, i, array)
    for name, arrays in shown.items()
    if isinstance(arrays, list)
    for i, array in enumerate(arrays)
  ]
  columns = len(rows[0][-1])
  figure = _make_figure((1.3 * columns + 1.5, 1.35 * len(rows)), path.name)
  if figure is None:
    return False
  axes = figure.subplots(len(rows), columns, squeeze=False)
  for line, (label, name, i, array) in zip(axes, rows, strict=True):
    predicted = shown.get(f'{name} predicts')
    for j, axis in enumerate(line):
      image = array[j]
      colours = (
        {}
        if image.ndim == 3 and image.shape[-1] > 1
        else {'cmap': ('gray' if predicted is None else 'inferno')}
      )
      axis.imshow(np.squeeze(image), interpolation='nearest', **colours)
      axis.set(xticks=[], yticks=[])
      if predicted is not None and i == 0:
        axis.set_title(f'as {predicted[j]}', fontsize='small', pad=2)
    line[0].set_ylabel(label.replace(', ', '\n'), fontsize='x-small')
  figure.suptitle(title, fontsize='medium')
  _save(figure, path, dpi=120)
  return True


def plot_participants(
  path: pathlib.Path,
  label: np.ndarray | None,
  train: ClientRows,
  participating: np.ndarray,
  *,
  title: str,
) -> bool:
  """Draws the classes of the clients that a run trains on; of 2,000 at most.

  Args:
    path: the PNG to write.
    label: int [M]; None, or labels that have to be decoded, draw nothing.
    train: the clients' train rows.
    participating: client numbers int64 [C'].
    title: above the picture.

  Returns:
    Whether a picture was written.
  """
  known = isinstance(label, np.ndarray)
  if not known or label.ndim != 1 or label.dtype.kind not in 'iu':
    return False
  every = -(-len(participating) // _MOST_DRAWN)
  if every > 1:
    participating = participating[::every]
    title += f' (one client of {every})'
  rows, owner = rows_of(train, participating)
  labels = np.asarray(label[rows])
  counts = np.zeros((len(participating), int(labels.max(initial=0)) + 1), int)
  np.add.at(counts, (owner, labels), 1)
  return plot_partition(path, counts, title=title, client_ids=participating)


def plot_partition(
  path: pathlib.Path,
  counts: np.ndarray,
  *,
  title: str,
  client_ids: Sequence[Any] | None = None,
  class_names: Sequence[Any] | None = None,
  images: np.ndarray | None = None,
) -> bool:
  """Draws how many examples of every class each client has.

  Clients side by side, classes above one another; on top the clients' sizes, to
  the right those of the classes. Up to 50 clients and classes are bubbles whose
  areas are the counts, more are a heat map. Beyond 200 clients are sorted by
  their largest class, and by its share.

  Args:
    path: the PNG to write.
    counts: int [C, Y].
    title: above the picture.
    client_ids: [C], default 0..C-1.
    class_names: [Y], default 0..Y-1.
    images: [I, H, W] or [I, H, W, D] with D = 1, 3 or 4, one of each of the
      first I <= C clients, to be drawn below (ten of them at most). Floats are
      taken as 0..1, or by their range if D = 1.

  Returns:
    Whether a picture was written; not without matplotlib.

  Raises:
    InvalidInput: the shapes do not fit together.
  """
  counts = np.asarray(counts)
  client_ids, class_names = _check_counts(counts, client_ids, class_names)
  if images is not None:
    images = _check_strip(np.asarray(images), len(counts))
  num_clients, num_classes = counts.shape
  label, first_ids = 'client', client_ids
  if num_clients > _MAX_NAMED:
    label = 'clients, sorted by largest class'
    counts, client_ids = _sort(counts), [*map(str, range(num_clients))]
  bubbles = max(counts.shape) <= _MAX_BUBBLES
  grid = np.clip(0.24 * num_classes, 1.6, 7.2 if bubbles else 4.5)
  width = float(np.clip(0.3 * num_clients, 4.0, 7.5)) + 2
  strip = 0.0 if images is None else min(0.9, (width - 2) / len(images)) + 0.3
  figure = _make_figure((width, grid + strip + 2), path.name)
  if figure is None:
    return False
  rows = [0.8, grid] + ([strip] if strip else [])
  spec = figure.add_gridspec(
    len(rows), 2, height_ratios=rows, width_ratios=[width - 2, 0.8]
  )
  main = figure.add_subplot(spec[1, 0])
  _draw_sizes(figure, spec, main, counts)
  draw = _draw_bubbles if bubbles else _draw_heat
  draw(figure, main, counts)
  _label_ticks(main.xaxis, client_ids, 25)
  _label_ticks(main.yaxis, class_names, int(grid / 0.17))
  if max(len(t.get_text()) for t in main.get_xticklabels()) > 2:
    main.tick_params(axis='x', labelrotation=90)
  main.set(xlabel=label, ylabel='class')
  if images is not None:
    _draw_strip(figure, spec[2, 0], images, first_ids)
  figure.suptitle(title, fontsize='medium')
  _save(figure, path, dpi=100)
  return True


def _check_counts(
  counts: np.ndarray,
  client_ids: Sequence[Any] | None,
  class_names: Sequence[Any] | None,
) -> tuple[list[str], list[str]]:
  """Checks counts [C, Y]; returns C names of clients and Y of classes."""
  validate.check(
    counts.ndim == 2 and counts.size > 0 and counts.min() >= 0,
    f'Expected counts >= 0 [C, Y], got shape {list(counts.shape)}.',
  )
  names = []
  for axis, (kind, given) in enumerate(
    (('client_ids', client_ids), ('class_names', class_names))
  ):
    given = range(counts.shape[axis]) if given is None else given
    validate.check(
      len(given) == counts.shape[axis],
      f'Expected {counts.shape[axis]} {kind}, got {len(given)}.',
    )
    names.append([str(name) for name in given])
  return names[0], names[1]


def _check_strip(images: np.ndarray, num_clients: int) -> np.ndarray:
  """Checks images of C clients; returns [I, H, W] or [I, H, W, 3 or 4]."""
  validate.check(
    (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4)))
    and 0 < len(images) <= num_clients,
    f'Expected images of 1..{num_clients} clients, [I, H, W] or [I, H, W, D] '
    f'with D = 1, 3 or 4, got shape {list(images.shape)}.',
  )
  if images.ndim == 4 and images.shape[3] == 1:
    images = images[..., 0]
  images = images[:_MAX_IMAGES]
  if images.ndim == 4 and images.dtype.kind == 'f':
    images = np.clip(images, 0, 1)
  return images


def _sort(counts: np.ndarray) -> np.ndarray:
  """Counts [C, Y] by largest class, then by the descending share of it."""
  share = counts.max(1) / np.maximum(1, counts.sum(1))
  return counts[np.lexsort((-share, counts.argmax(1)))]


def _draw_sizes(figure: Any, spec: Any, main: Any, counts: np.ndarray) -> None:
  """Bars of the row sums of counts [C, Y] on top, of column sums beside."""
  top = figure.add_subplot(spec[0, 0], sharex=main)
  side = figure.add_subplot(spec[1, 1], sharey=main)
  for axis, sizes, orientation in (
    (top, counts.sum(1), 'vertical'),
    (side, counts.sum(0), 'horizontal'),
  ):
    gap = 0.1 if len(sizes) <= _MAX_BUBBLES else 0.0
    edges = np.arange(len(sizes) + 1) - 0.5
    if gap:  # An empty step between bars.
      edges = np.stack([edges[:-1] + gap, edges[1:] - gap], 1).reshape(-1)
      sizes = np.stack([sizes, np.zeros_like(sizes)], 1).reshape(-1)[:-1]
    axis.stairs(sizes, edges, fill=True, orientation=orientation, color=_GREY)
    axis.spines[['top', 'right']].set_visible(False)
    axis.tick_params(labelsize='small')
  top.tick_params(axis='x', labelbottom=False, length=0)
  side.tick_params(axis='y', labelleft=False, length=0)
  top.set_ylim(0, max(1, counts.sum(1).max()) * 1.05)
  side.set_xlim(0, max(1, counts.sum(0).max()) * 1.05)
  top.set_ylabel('examples', fontsize='small')
  side.set_xlabel('examples', fontsize='small')
  side.locator_params(axis='x', nbins=2)
  top.locator_params(axis='y', nbins=3)


def _draw_bubbles(figure: Any, axis: Any, counts: np.ndarray) -> None:
  """Counts [C, Y] as areas, with a legend of three of them."""
  num_clients, num_classes = counts.shape
  axis.set(xlim=(-0.5, num_clients - 0.5), ylim=(-0.5, num_classes - 0.5))
  axis.set_axisbelow(True)
  axis.grid(alpha=0.25, linewidth=0.6)
  figure.draw_without_rendering()  # Settles how large a cell is.
  box = axis.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
  cell = 72 * min(box.width / num_clients, box.height / num_classes)
  most = max(1, int(counts.max()))
  widest = min(cell, 24)
  c, y = np.nonzero(counts)
  axis.scatter(
    c,
    y,
    s=counts[c, y] / most * widest**2,
    color=_BLUE,
    alpha=0.85,
    linewidths=0,
  )
  shown = sorted({_round_down(most * share) for share in (0.1, 0.4, 1.0)})
  handles = [
    axis.scatter([], [], s=n / most * widest**2, color=_BLUE, label=f'{n:,}')
    for n in shown
  ]
  figure.legend(
    handles=handles,
    loc='outside right upper',
    fontsize='small',
    frameon=False,
    title='count',
    title_fontsize='small',
    labelspacing=0.4 + widest / 20,  # in font sizes
    handletextpad=0.2 + widest / 25,
  )


def _round_down(value: float) -> int:
  """The largest 1, 2 or 5 times a power of ten <= value, at least 1."""
  power = 10 ** int(np.log10(max(1, value)))
  return max(m * power for m in (1, 2, 5) if m * power <= max(1, value))


def _draw_heat(figure: Any, axis: Any, counts: np.ndarray) -> None:
  """Counts [C, Y] as colours on a square-root scale, with a colour bar."""
  from matplotlib.colors import PowerNorm

  image = axis.imshow(
    counts.T,
    aspect='auto',
    origin='lower',
    cmap='Blues',
    norm=PowerNorm(0.5, vmin=0, vmax=max(1, counts.max())),
    interpolation='antialiased',
    interpolation_stage='data',
  )
  bar = figure.colorbar(image, ax=figure.axes, aspect=30, pad=0.01)
  bar.set_label('count', fontsize='small')
  bar.ax.tick_params(labelsize='small')


def _label_ticks(axis: Any, names: Sequence[str], most: int) -> None:
  """Names on at most so many ticks, at round distances."""
  step = next(
    m * 10**e
    for e in range(9)
    for m in (1, 2, 5)
    if len(names) <= m * 10**e * most
  )
  ticks = np.arange(0, len(names), step)
  axis.set_ticks(ticks, [names[i] for i in ticks], fontsize='small')


def _draw_strip(
  figure: Any, spec: Any, images: np.ndarray, client_ids: Sequence[str]
) -> None:
  """One image of each of the first clients, [I, H, W] or [I, H, W, D]."""
  inner = spec.subgridspec(1, len(images), wspace=0.05)
  for i, image in enumerate(images):
    axis = figure.add_subplot(inner[0, i])
    axis.imshow(image, cmap='gray', interpolation='nearest')
    axis.set(xticks=[], yticks=[])
    axis.set_title(client_ids[i], fontsize='small', pad=3)
    if not i:
      axis.set_ylabel('image', fontsize='small')


def _make_figure(size: tuple[float, float], name: str) -> Any:
  """A figure of that size in inches, or None without matplotlib."""
  try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
  except ImportError:
    _LOG.info('matplotlib is not installed: no %s.', name)
    return None
  figure = Figure(figsize=size, layout='constrained')
  FigureCanvasAgg(figure)
  return figure


def _save(figure: Any, path: pathlib.Path, *, dpi: int) -> None:
  """Writes the PNG so that no half of it is ever seen."""
  temporary = path.with_name(f'.{path.name}')
  figure.savefig(temporary, dpi=dpi, format='png')
  temporary.replace(path)


def _panels(
  rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]
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
        if not metrics or metric in ('loss', *metrics):
          add(metric, line, row['round'], value)
  first = ['loss', *metrics] if metrics else ['accuracy', 'loss']
  rank = lambda name: first.index(name) if name in first else len(first)
  order = sorted(panels, key=lambda name: (rank(name), name))
  return {name: panels[name] for name in order}
