"""Flags of a command: help by what they are about, one line for a bad one."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import flags

# Packages whose flags `--help` lists; `--helpfull` has those of all others.
_OURS = ('fedjax_ext.', 'launchers.')


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses absl flags; a bad one ends with one line and exit code 2.

  For `absl.app.run`, whose own parser prints several lines and exits with 1,
  which a shell cannot tell from a run that failed. `--help` prints the flags by
  what they are about and ends with exit code 0; `--helpfull` adds those of absl
  itself.

  Args:
    argv: the program's name and its arguments.

  Returns:
    What is left of argv; anything beyond the program's name is refused.
  """
  asked = {word.lstrip('-') for word in argv[1:] if word.startswith('-')}
  if asked & {'help', 'h', 'helpfull'}:
    print(_help(full='helpfull' in asked))
    sys.exit(0)
  try:
    rest = flags.FLAGS(list(argv))
    if len(rest) > 1:
      raise flags.Error(
        f'Unexpected argument {rest[1]!r}; flags start with --.'
      )
    return rest
  except flags.Error as error:
    fail(2, ' '.join(str(error).split()))


def fail(code: int, message: str) -> NoReturn:
  """Ends the program with 'error: message' on stderr and an exit code."""
  print(f'error: {message}', file=sys.stderr, flush=True)
  sys.exit(code)


def _help(*, full: bool) -> str:
  """The program's docstring, then its flags under what each module is about."""
  main = sys.modules['__main__']
  sections = [(main.__doc__ or '').strip()]
  names = flags.FLAGS.flags_by_module_dict()
  for name in sorted(names, key=lambda name: name != sys.argv[0]):
    module = sys.modules.get(name)
    if name == sys.argv[0]:
      title = 'Flags of this command.'
    elif name.startswith(_OURS) and module is not None:
      title = (module.__doc__ or name).strip().splitlines()[0]
    elif full:
      title = f'{name}.'
    else:
      continue
    _, _, listed = flags.FLAGS.module_help(name).strip().partition('\n')
    sections.append(f'{title}\n{listed}')
  return '\n\n'.join(sections)
