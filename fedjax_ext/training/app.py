"""How a binary starts and ends: one clear line for whatever goes wrong.

Exit codes: 0 done; 1 a write failed; 2 bad flags, files or shapes; 128 + n
stopped by signal n after saving.
"""

import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence

from absl import app
from absl import logging as absl_logging

from fedjax_ext.core import (
  Generalization,
  InvalidInput,
  Report,
)
from fedjax_ext.core.generalization import (
  THREE_WAY,
  UNPARTICIPATING,
  VALIDATION,
  is_three_way,
)
from fedjax_ext.training import processes
from fedjax_ext.training.command_line import fail, parse_flags
from fedjax_ext.training.loop import Interrupted, Result


def run(main: Callable[[], None]) -> None:
  """Runs a binary's main under the exit codes above."""

  def guarded(argv: Sequence[str]) -> None:
    del argv
    _configure_logging()
    try:
      main()
    except InvalidInput as error:
      fail(2, str(error))
    except Interrupted as stop:
      fail(128 + stop.signal, str(stop))
    except KeyboardInterrupt:
      fail(130, 'Stopped by Ctrl-C; the last checkpoint restores.')
    except OSError as error:
      fail(1, f'{error} (the last checkpoint restores)')

  app.run(guarded, flags_parser=parse_flags)


def _configure_logging() -> None:
  """Shows this package's log lines; libraries speak up when they fail."""
  absl_logging.set_verbosity(absl_logging.FATAL)
  absl_logging.set_stderrthreshold('fatal')
  handler = logging.StreamHandler()
  handler.setFormatter(
    logging.Formatter('%(asctime)s %(message)s', datefmt='%H:%M:%S')
  )
  logger = logging.getLogger('fedjax_ext')
  logger.handlers = [handler]
  logger.setLevel(logging.INFO)
  logger.propagate = False


def print_result(
  result: Result,
  said: Mapping[str, str],
  *,
  workdir: pathlib.Path,
  metrics: Sequence[str] = ('accuracy',),
) -> None:
  """Prints one line for each predictor, part and metric, then the final line.

  Args:
    result: the finished run.
    said: what the final line says, as {name: metric of the main predictor}, for
      instance {'test_accuracy': 'test/accuracy/pooled'}; what the run does not
      have is left out.
    workdir: the run's folder.
    metrics: to print a line of for every part; those of no part are left out.

  Of many processes only the first prints.
  """
  if not processes.is_first():
    return
  columns = ('pooled', 'mean', 'p5', 'p25', 'p50', 'p75', 'p95')
  width = max(
    (len(f'{n} {p}') for n, r in result.reports.items() for p in r), default=0
  )
  parts = [one for report in result.reports.values() for one in report.values()]
  for metric in metrics:
    if parts and not any(metric in one.sums for one in parts):
      continue
    print(
      f'{metric} by predictor and part; pooled = every example (of text: '
      'token) alike, the rest over clients'
    )
    print(
      f'{"":{width}}  clients  examples  '
      + '  '.join(f'{c:>6}' for c in columns)
    )
    for predictor, report in result.reports.items():
      for part, one in report.items():
        summary = one.summary()
        values = '  '.join(
          f'{summary.get(f"{metric}/{c}", float("nan")):6.4f}' for c in columns
        )
        print(
          f'{predictor + " " + part:{width}}  {summary["clients"]:7d}  '
          f'{summary["examples"]:8d}  {values}'
        )
  measured = result.summary['metrics']
  for i, (predictor, report) in enumerate(result.reports.items()):
    if is_three_way(report):
      _print_gaps(f'{predictor}:' if i else '', report, measured, metrics)
  words = [
    f'{name}={measured[key]:.4f}'
    for name, key in said.items()
    if measured.get(key) is not None
  ]
  if result.summary['diverged']:
    words.append('diverged=true')
  print(
    ' '.join(['final:', f'round={result.round}', *words, f'workdir={workdir}']),
    flush=True,
  )


def _print_gaps(
  prefix: str,
  report: Report,
  measured: Mapping[str, float | None],
  metrics: Sequence[str],
) -> None:
  """Prints how a model does on fresh examples, and on fresh clients."""
  clients = {name: len(report[name].clients) for name in THREE_WAY}
  print(
    f'{prefix}gaps [95 % bootstrap over {clients[VALIDATION]} participating '
    f'and {clients[UNPARTICIPATING]} unparticipating clients], every example '
    'alike; positive = worse'
  )
  for metric in metrics:
    for name in Generalization._fields:
      key = f'{prefix}gap/{metric}/{name}'
      values = [measured.get(f'{key}{end}') for end in ('', '_low', '_high')]
      if None not in values:
        value, low, high = values
        print(
          f'  {metric} {name.replace("_", "-")} gap {value:+.4f} '
          f'[{low:+.4f}, {high:+.4f}]'
        )
