"""Checks an experiment's flag files in a process that knows its flags alone.

  python -m tests.experiments.check_flag_files fed_avg

Prints one line for each mistake; every experiment defines flags of the same
names, so one process cannot import two.
"""

import importlib
import pathlib
import sys

from absl import flags

from fedjax_ext import core, data
from fedjax_ext.models import MODELS, dual_encoder
from fedjax_ext.training import calls, data_flags
from fedjax_ext.training import flags as shared

NAMED = {
  'data_source': data.SOURCES,
  'server_data_source': data.SOURCES,
  'server_data': data.SERVER_DATA,
  'data_partition': data.PARTITIONERS,
  'data_skew': data.SKEWS,
  'eval': data.SPLITTERS,
  'model': {**MODELS, 'dual_encoder': dual_encoder},
}
GIVEN = (*data_flags.GIVEN, *shared.GIVEN_MODEL, *data_flags.GIVEN_PARTITION)


def mistake(name: str, value: str) -> str:
  """What is wrong with one flag, or ''."""
  if name not in flags.FLAGS:
    return f'unknown flag --{name}'
  named = []
  if name == 'data_preprocess':
    named = [(text, data.PREPROCESS) for text in value.split('+')]
  elif name in NAMED and (name, value) != ('data_partition', 'client'):
    named = [(value, NAMED[name])]
  else:
    try:
      flags.FLAGS[name].parser.parse(value or 'true')
    except ValueError as error:
      return f'--{name}={value}: {error}'
  for text, registry in named:
    try:
      function = calls.resolve(name, text, registry)
      settings = calls.arguments(name, text, function)
    except core.InvalidInput as error:
      return str(error)
    left = set(calls.missing(function, settings)) - set(GIVEN)
    if left:
      return f'--{name}={text} lacks {sorted(left)}'
  return ''


def main() -> None:
  """Prints the mistakes of all flag files of the experiment."""
  run = importlib.import_module(f'experiments.{sys.argv[1]}.run')
  folder = pathlib.Path(run.__file__).parent / 'flags'
  paths = sorted(folder.glob('*.flags'))
  print(f'{len(paths)} flag files', file=sys.stderr)
  for path in paths:
    lines = path.read_text().splitlines()
    header = '\n'.join(line for line in lines if line.startswith('#'))
    if f'flags/{path.name}' not in header.replace('\\\n', ''):
      print(f'{path.name}: no command in its first lines')
    for line in lines:
      if not line or line.startswith('#'):
        continue
      name, _, value = line.removeprefix('--').partition('=')
      said = mistake(name, value) if line.startswith('--') else 'no flag'
      if said:
        print(f'{path.name}: {line}: {said}')


if __name__ == '__main__':
  main()
