"""A flags parser for `absl.app.run` that reports bad flags in one line."""

import sys
from collections.abc import Sequence

from absl import flags


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses the command line; a mistake ends in one line and exit code 2.

  absl's own parser prints several lines and exits with 1, which a shell cannot
  tell from a run that failed. `--help` and its relatives work as usual.

  Args:
    argv: the program's name followed by its arguments.

  Returns:
    The program's name alone: arguments that are no flags are refused.
  """
  try:
    rest = flags.FLAGS(list(argv))
  except flags.Error as error:
    _exit(' '.join(str(error).split()))
  if len(rest) > 1:
    _exit(f'unexpected argument {rest[1]!r}; flags start with --')
  return rest


def _exit(message: str) -> None:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(2)
