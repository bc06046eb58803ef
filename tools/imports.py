"""Which files the repository's modules import, read from their text."""

import ast
import pathlib
import subprocess
from collections.abc import Iterable, Iterator, Mapping

ROOTS = ('benchmarks', 'experiments', 'fedjax_ext', 'launchers', 'tests')
ROOTS += ('tools',)


def list_files(root: pathlib.Path) -> list[str]:
  """Files under ROOTS that git has or would add (all, where git is absent)."""
  if (root / '.git').exists():
    command = 'git ls-files -z --cached --others --exclude-standard --'
    run = subprocess.run(
      [*command.split(), *ROOTS], cwd=root, check=True, capture_output=True
    )
    listed = run.stdout.decode().split('\0')
  else:
    found = [path for top in ROOTS for path in (root / top).rglob('*')]
    listed = [path.relative_to(root).as_posix() for path in found]
    listed = [path for path in listed if '__pycache__' not in path]
  return sorted(path for path in set(listed) if (root / path).is_file())


def imported_names(
  nodes: Iterable[ast.AST], path: str
) -> Iterator[tuple[str, str]]:
  """Yields (module, name) of each import; name is '' for `import module`."""
  for node in nodes:
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, ''
    elif isinstance(node, ast.ImportFrom):
      parts = path.split('/')[: -node.level] if node.level else []
      parts += [node.module] if node.module else []
      for alias in node.names:
        yield '.'.join(parts), alias.name
    elif isinstance(node, ast.Call) and node.args:
      called = ast.unparse(node.func).rpartition('.')[2]
      value = getattr(node.args[0], 'value', None)
      if called in ('import_module', 'importorskip') and isinstance(value, str):
        yield value, ''


def modules_of(files: Iterable[str]) -> dict[str, str]:
  """Dotted module names of the Python files; a package's is its folder's."""
  return {
    path.removesuffix('.py').removesuffix('/__init__').replace('/', '.'): path
    for path in files
    if path.endswith('.py')
  }


def file_of(module: str, name: str, modules: Mapping[str, str]) -> str:
  """The file `from module import name` needs, '' if no file provides it."""
  submodule = f'{module}.{name}' if name else module
  return modules.get(submodule) or modules.get(module, '')
