"""Writes a table's results for a paper in LaTeX. Pure functions."""

from launchers import report as report_lib
from launchers import summary

_ESCAPES = str.maketrans(
  {
    '\\': r'\textbackslash{}',
    '&': r'\&',
    '%': r'\%',
    '$': r'\$',
    '#': r'\#',
    '_': r'\_',
    '{': r'\{',
    '}': r'\}',
    '~': r'\textasciitilde{}',
    '^': r'\textasciicircum{}',
    '±': r'$\pm$',
  }
)


def table(report: report_lib.Report) -> str:
  """Writes table.tex: a `table` environment that needs the booktabs package.

  Rows and columns are those of table.md, a published number stands in brackets
  beside its measured one.

  Args:
    report: what to show.

  Returns:
    The text, with the launcher's command as its first line.
  """
  spec = report.spec
  groups = {
    (group.row, group.dataset): group
    for group in summary.summarise(spec, report.results)
  }
  datasets = list(dict.fromkeys(dataset for _, dataset in groups))
  lines = []
  for row in spec.rows:
    shown = [escape(row.name)]
    for dataset in datasets:
      group = groups.get((row.name, dataset))
      published = row.published.get(dataset) if group else None
      cell = summary.show(group, decimals=spec.decimals) if group else ''
      cell += f' [{published.value:g}]' if published else ''
      shown.append(escape(cell))
    lines.append(' & '.join(shown) + r' \\')
  header = ' & '.join(['', *map(escape, datasets)]) + r' \\'
  seeds = ', '.join(map(str, report.plan.seeds))
  caption = escape(
    f'{spec.title}. Mean ± standard deviation over n seeds (seeds {seeds}) of '
    f'{spec.metric}, {report.plan.preset} scale; in brackets what '
    'the paper printed.'
  )
  return '\n'.join(
    [
      f'% {report.command}',
      r'\begin{table}',
      r'\centering',
      rf'\begin{{tabular}}{{l{"r" * len(datasets)}}}',
      r'\toprule',
      header,
      r'\midrule',
      *lines,
      r'\bottomrule',
      r'\end{tabular}',
      rf'\caption{{{caption}}}',
      r'\end{table}',
      '',
    ]
  )


def escape(text: str) -> str:
  """Writes a text so that LaTeX prints it as it stands."""
  return text.translate(_ESCAPES)
