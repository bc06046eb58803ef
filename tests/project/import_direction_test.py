"""Imports point one way, and `import fedjax_ext` loads nothing heavy."""

import ast
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from absl.testing import absltest, parameterized

from tools import imports

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Subpackage of fedjax_ext -> the others that it may import, as in
# docs/architecture.md. The top modules and training may import every one.
LAYERS = {
  'core': set(),
  'data': {'core'},
  'models': {'core'},
  'losses': {'core', 'models'},
  'algorithms': {'core', 'losses', 'models'},
  'defenses': {'algorithms', 'core', 'losses', 'models'},
  'attacks': {'algorithms', 'core', 'defenses', 'losses', 'models'},
}
# Folder -> what no file in it may import.
FORBIDDEN = {
  'experiments': {'benchmarks', 'launchers', 'tests'},
  'fedjax_ext': {'benchmarks', 'experiments', 'launchers', 'tests', 'tools'},
  'launchers': {'experiments', 'fedjax_ext', 'jax', 'jaxlib'},
}
READ_FLAGS = ('experiments/', 'fedjax_ext/training/', 'launchers/', 'tests/')
OPTIONAL = ('tensorflow', 'tensorflow_datasets', 'tensorboardX', 'matplotlib')
OPTIONAL += ('sklearn', 'tqdm')
# Imports a package and all in it; prints who is first to load a given module.
PROBE = """
import importlib, pkgutil, sys
package, *unwanted = sys.argv[1:]
path = importlib.import_module(package).__path__
found = pkgutil.walk_packages(path, package + '.')
for name in (package, *(info.name for info in found)):
  importlib.import_module(name)
  for module in [m for m in unwanted if m in sys.modules]:
    unwanted.remove(module)
    print(name, 'loads', module)
"""


def module_level(tree: ast.AST) -> Iterator[ast.AST]:
  """Yields the nodes that run on import: all but the bodies of functions."""
  yield tree
  for node in ast.iter_child_nodes(tree):
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      yield from module_level(node)


def _allowed(path: str, target: list[str]) -> bool:
  top, *folders = path.split('/')[:-1]
  if target[:2] == ['absl', 'flags'] and not path.startswith(READ_FLAGS):
    return False
  if target[0] in FORBIDDEN.get(top, ()):
    return False
  if top != 'fedjax_ext' or target[0] != 'fedjax_ext':
    return True
  if not folders or folders[0] == 'training':
    return True
  return len(target) > 1 and target[1] in LAYERS[folders[0]] | {folders[0]}


def violations(root: pathlib.Path) -> list[str]:
  """One line for each import in the tree that points the wrong way."""
  lines = []
  for path in imports.modules_of(imports.list_files(root)).values():
    parts = path.split('/')
    layered = parts[0] == 'fedjax_ext' and len(parts) > 2
    if layered and parts[1] not in {*LAYERS, 'training'}:
      lines.append(f'{path}: LAYERS has no {parts[1]}')
      continue
    tree = ast.parse((root / path).read_text(), path)
    launches = parts[0] == 'launchers'
    nodes = module_level(tree) if launches else ast.walk(tree)
    for module, name in imports.imported_names(nodes, path):
      target = f'{module}.{name}' if name else module
      if not _allowed(path, target.split('.')):
        lines.append(f'{path}: imports {target}')
  return sorted(lines)


class ImportDirectionTest(parameterized.TestCase):
  def test_imports_point_one_way(self):
    self.assertEqual([], violations(ROOT))

  @parameterized.parameters(
    ('fedjax_ext/core/a.py', 'def f():\n  import fedjax_ext.data.store'),
    ('fedjax_ext/core/a.py', 'from ..models import cnn'),
    ('fedjax_ext/core/a.py', 'import fedjax_ext'),
    ('fedjax_ext/data/a.py', 'from fedjax_ext import losses'),
    ('fedjax_ext/algorithms/a.py', 'from fedjax_ext.training import loop'),
    ('fedjax_ext/training/a.py', 'from experiments.fed_avg import run'),
    ('fedjax_ext/__init__.py', 'import tests.helpers'),
    ('fedjax_ext/other/a.py', ''),
    ('experiments/fed_avg/run.py', 'from launchers import spec'),
    ('launchers/a.py', 'try:\n  import jax.numpy as jnp\nexcept E:\n  pass'),
    ('launchers/a.py', 'from fedjax_ext.core import engine'),
    ('fedjax_ext/core/a.py', 'from absl import app, flags'),
    ('benchmarks/a.py', 'import absl.flags'),
  )
  def test_violation_is_caught(self, path: str, text: str):
    self.assertLen(self._violations(path, text), 1)

  @parameterized.parameters(
    ('fedjax_ext/core/a.py', 'from fedjax_ext.core import b, validate'),
    ('fedjax_ext/core/a.py', 'from . import b\nfrom absl import logging'),
    ('fedjax_ext/algorithms/a.py', 'from fedjax_ext import core, losses'),
    ('fedjax_ext/training/a.py', 'import fedjax_ext.data, absl.flags'),
    ('fedjax_ext/__init__.py', 'from fedjax_ext.data import store'),
    ('launchers/a.py', 'from absl import flags\ndef f():\n  import jax'),
    ('experiments/fed_avg/run.py', 'from fedjax_ext.core import engine'),
  )
  def test_rest_is_allowed(self, path: str, text: str):
    self.assertEmpty(self._violations(path, text))

  def _violations(self, path: str, text: str) -> list[str]:
    root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    (root / path).parent.mkdir(parents=True)
    (root / path).write_text(text)
    return violations(root)


class LoadedModulesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('fedjax_ext', OPTIONAL), ('launchers', ('jax', 'fedjax_ext'))
  )
  def test_import_does_not_load(self, package: str, unwanted: tuple[str, ...]):
    self.assertEqual('', self._probe(ROOT, package, *unwanted))

  def test_load_is_caught(self):
    root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    (root / 'p' / 'q').mkdir(parents=True)
    for path in ('p/__init__.py', 'p/q/__init__.py', 'heavy.py'):
      (root / path).touch()
    (root / 'p/q/a.py').write_text('import heavy')
    self.assertEqual(
      'p.q.a loads heavy\n', self._probe(root, 'p', 'light', 'heavy')
    )

  def _probe(self, root: pathlib.Path, *args: str) -> str:
    run = subprocess.run(
      [sys.executable, '-c', PROBE, *args],
      cwd=root,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      capture_output=True,
      text=True,
    )
    self.assertEqual(run.returncode, 0, run.stderr)
    return run.stdout


if __name__ == '__main__':
  absltest.main()
