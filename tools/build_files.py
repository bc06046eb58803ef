"""Rewrites the Bazel BUILD files from what the modules import.

Usage:
  python -m tools.build_files          # writes every BUILD
  python -m tools.build_files --check  # prints what differs, exit status 1
"""

import argparse
import ast
import graphlib
import pathlib
import posixpath
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tools import imports

# Import name -> the requirement's name in the hub `@pip`.
THIRD_PARTY = {
  'PIL': 'pillow',
  'absl': 'absl_py',
  'google': 'protobuf',
  'orbax': 'orbax_checkpoint',
  'sklearn': 'scikit_learn',
  'tensorboardX': 'tensorboardx',
}
SAME_NAME = """
  array_record chex flax grain hypothesis ipykernel ir_measures jax jaxlib
  matplotlib mkdocs ml_dtypes msgpack nbclient nbformat numpy optax optuna
  pytest scipy submitit tensorflow_datasets tqdm traitlets
"""
# Installed by hand where they are wanted; requirements.lock has none.
OPTIONAL = {'fedjax', 'pfl', 'torch', 'xmanager'}
THIRD_PARTY |= {name: name for name in SAME_NAME.split()}
HEADER = '# Made by `python -m tools.build_files`; do not edit.\n'

Rule = dict[str, str | list[str]]  # Attributes as buildifier orders them.


class BuildError(ValueError):
  """What keeps the BUILD files from being made, one line for each cause."""


def _target(path: str) -> tuple[str, str]:
  """The folder and the target name of a module's file."""
  folder, file = posixpath.split(path)
  stem = file.removesuffix('.py')
  return folder, posixpath.basename(folder) if stem == '__init__' else stem


def _labels(targets: Iterable[tuple[str, str]], folder: str) -> list[str]:
  """Labels as buildifier shortens and sorts them in that folder's BUILD."""
  labels = set()
  for where, name in targets:
    short = posixpath.basename(where) == name
    label = f'//{where}' if short else f'//{where}:{name}'
    labels.add(f':{name}' if where == folder else label)
  return sorted(labels, key=lambda s: (s[0] != ':', re.split('[:.]', s)))


def _kind(path: str, source: str) -> str:
  if path.endswith('_test.py'):
    return 'py_test'
  main = re.search(r'^if __name__ == .__main__.', source, re.MULTILINE)
  binary = main and path.startswith(('experiments/', 'launchers/'))
  return 'py_binary' if binary else 'py_library'


def _acts(path: pathlib.Path) -> bool:
  """Whether a package does something when a module of it is imported."""
  if path.name != '__init__.py':
    return False
  calls = (
    isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    for node in ast.parse(path.read_text()).body
  )
  return any(calls)


def _data_groups(files: Sequence[str]) -> dict[tuple[str, str], list[str]]:
  """Data files by the folder of their filegroup and its name."""
  folders = {posixpath.dirname(path) for path in files if path.endswith('.py')}
  groups = defaultdict(list)
  for path in files:
    top, suffix = path.split('/')[0], posixpath.splitext(path)[1]
    if top == 'experiments' and suffix in ('.flags', '.toml'):
      name = 'data_files'
    elif top == 'tests' and suffix not in ('.py', '.md', ''):
      name = 'golden_files'
    else:
      continue
    # The nearest folder up with Python files has the BUILD, if there is one.
    owner = folder = posixpath.dirname(path)
    while owner and owner not in folders:
      owner = posixpath.dirname(owner)
    relative = posixpath.relpath(path, owner or folder)
    groups[owner or folder, name].append(relative)
  return groups


def expected_rules(root: pathlib.Path) -> dict[str, dict[str, Rule]]:
  """Every target, by folder and name; BuildError for what has none."""
  files = imports.list_files(root)
  modules, groups = imports.modules_of(files), _data_groups(files)
  rules: dict[str, dict[str, Rule]] = defaultdict(dict)
  for (folder, name), paths in sorted(groups.items()):
    rules[folder][name] = {'kind': 'filegroup', 'srcs': paths}
  acting = [path for path in modules.values() if _acts(root / path)]
  errors, graph = [], {}
  for path in sorted(modules.values()):
    source = (root / path).read_text()
    tree = ast.parse(source, path)
    needs, pip = set(), set()
    for module, name in imports.imported_names(ast.walk(tree), path):
      top = module.partition('.')[0]
      if file := imports.file_of(module, name, modules):
        needs.add(file)
      elif top in THIRD_PARTY:
        pip.add(f'@pip//{THIRD_PARTY[top]}')
      elif top not in sys.stdlib_module_names | OPTIONAL:
        errors.append(f'{path}: unknown import {module}')
    needs |= {init for init in acting if path.startswith(init[:-11])}
    graph[path] = needs - {path}
    folder, name = _target(path)
    if name in rules[folder]:
      errors.append(f'{path}: a second target named {name}')
    kind = _kind(path, source)
    group = {'py_binary': 'data_files', 'py_test': 'golden_files'}.get(kind)
    # A test may read golden files of another folder; then it names them.
    data = [
      key
      for key, paths in groups.items()
      if key == (folder, group)
      or (key[1] == group and any(p.split('/')[-1] in source for p in paths))
    ]
    rule: Rule = {
      'kind': kind,
      'srcs': [posixpath.basename(path)],
      'data': _labels(data, folder),
      'deps': _labels(map(_target, graph[path]), folder) + sorted(pip),
    }
    rules[folder][name] = {key: value for key, value in rule.items() if value}
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:  # Python may run it, Bazel does not.
    errors.append('import cycle: ' + ' imports '.join(error.args[1][::-1]))
  if errors:
    raise BuildError('\n'.join(sorted(set(errors))))
  return rules


def _text(rules: Mapping[str, Rule]) -> str:
  text = HEADER
  if kinds := sorted({rule['kind'] for rule in rules.values()} - {'filegroup'}):
    symbols = ', '.join(f'"{kind}"' for kind in kinds)
    text += f'load("@rules_python//python:defs.bzl", {symbols})\n'
  text += '\npackage(default_visibility = ["//visibility:public"])\n'
  for name, rule in rules.items():
    text += f'\n{rule["kind"]}(\n    name = "{name}",\n'
    for key, values in list(rule.items())[1:]:
      lines = ''.join(f'\n        "{value}",' for value in values) + '\n    '
      inner = lines if values[1:] else f'"{values[0]}"'
      text += f'    {key} = [{inner}],\n'
    text += ')\n'
  return text


def expected_builds(root: pathlib.Path) -> dict[str, str]:
  """The text of every BUILD file, by its path."""
  rules = expected_rules(root)
  return {f'{folder}/BUILD': _text(rules[folder]) for folder in sorted(rules)}


def found_builds(root: pathlib.Path) -> dict[str, str]:
  """The text of the BUILD files there are, by path."""
  paths = [path for path in imports.list_files(root) if path.endswith('/BUILD')]
  return {path: (root / path).read_text() for path in paths}


def _read_rules(text: str) -> dict[str, dict[str, str]]:
  """The targets of a BUILD file; those made here are also Python syntax."""
  rules = {}
  for node in ast.parse(text).body:
    call = node.value if isinstance(node, ast.Expr) else None
    if isinstance(call, ast.Call):
      attrs = {k.arg or '': ast.unparse(k.value) for k in call.keywords}
      name = attrs.pop('name', '').strip("'")
      rules[name] = {'kind': ast.unparse(call.func), **attrs}
  return rules


def _compare(want: str, have: str) -> Iterator[str]:
  try:
    wanted, found = _read_rules(want), _read_rules(have)
  except SyntaxError:
    return
  for name in sorted(wanted.keys() | found.keys()):
    if name not in wanted or name not in found:
      yield f'{name}: ' + ('missing' if name in wanted else 'should not exist')
      continue
    new, old = wanted[name], found[name]
    for key in sorted(new.keys() | old.keys()):
      if new.get(key) != old.get(key):
        yield f'{name}: {key} should be {new.get(key, "absent")}'


def differences(root: pathlib.Path) -> list[str]:
  """One line for each way the BUILD files differ from the expected ones."""
  expected, found = expected_builds(root), found_builds(root)
  lines = [f'{path}: missing' for path in expected.keys() - found.keys()]
  lines += [
    f'{path}: should not exist' for path in found.keys() - expected.keys()
  ]
  for path in expected.keys() & found.keys():
    if expected[path] != found[path]:
      details = list(_compare(expected[path], found[path])) or ['text differs']
      lines += [f'{path}: {detail}' for detail in details]
  return sorted(lines)


def write(root: pathlib.Path) -> tuple[()]:
  """Writes every BUILD file and removes those of folders without targets."""
  expected = expected_builds(root)
  for path in found_builds(root).keys() - expected.keys():
    (root / path).unlink()
  for path, text in expected.items():
    (root / path).write_text(text)
  return ()


def main() -> int:
  """Writes or checks this repository's files; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--check', action='store_true', help='write nothing')
  root = pathlib.Path(__file__).resolve().parents[1]
  try:
    work = differences if parser.parse_args().check else write
    lines = work(root)
  except BuildError as error:
    lines = [str(error)]
  for line in lines:
    print(line)
  return int(bool(lines))


if __name__ == '__main__':
  sys.exit(main())
