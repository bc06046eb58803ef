"""The BUILD files agree with the imports, and their generator is right."""

import pathlib
import tempfile

from absl.testing import absltest

from tools import build_files

ROOT = pathlib.Path(__file__).resolve().parents[2]
HINT = 'run: python -m tools.build_files'
RUN = """
from absl import app
from fedjax_ext.core import engine, for_each_client
if __name__ == '__main__':
  app.run(engine)
"""
TREE = {
  'fedjax_ext/__init__.py': '',
  'fedjax_ext/core/__init__.py': 'from fedjax_ext.core.engine import *',
  'fedjax_ext/core/engine.py': 'import os, jax.numpy\nfrom . import plans',
  'fedjax_ext/core/plans.py': 'def f():\n  import sklearn.svm, orbax',
  'experiments/fed_avg/run.py': RUN,
  'experiments/fed_avg/flags/table.flags': '--rounds=2',
  'tests/golden/make.py': 'import numpy as np',
  'tests/golden/means.npz': '',
  'tests/core/engine_test.py': 'import fedjax_ext.core.engine\n"means.npz"',
}


class RepositoryTest(absltest.TestCase):
  def test_build_files_are_up_to_date(self):
    self.assertEqual([], build_files.differences(ROOT), HINT)


class GeneratorTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    for path, text in TREE.items():
      self.put(path, text)
    build_files.write(self.root)

  def put(self, path: str, text: str) -> None:
    file = self.root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)

  def edit(self, path: str, old: str, new: str) -> None:
    self.assertIn(old, (self.root / path).read_text())
    self.put(path, (self.root / path).read_text().replace(old, new))

  def test_written_tree_has_no_differences(self):
    self.assertEqual([], build_files.differences(self.root))

  def test_text_of_a_build_file(self):
    builds = build_files.expected_builds(self.root)
    self.assertEqual(
      builds['experiments/fed_avg/BUILD'],
      '# Made by `python -m tools.build_files`; do not edit.\n'
      'load("@rules_python//python:defs.bzl", "py_binary")\n\n'
      'package(default_visibility = ["//visibility:public"])\n\n'
      'filegroup(\n'
      '    name = "data_files",\n'
      '    srcs = ["flags/table.flags"],\n'
      ')\n\n'
      'py_binary(\n'
      '    name = "run",\n'
      '    srcs = ["run.py"],\n'
      '    data = [":data_files"],\n'
      '    deps = [\n'
      '        "//fedjax_ext/core",\n'
      '        "//fedjax_ext/core:engine",\n'
      '        "@pip//absl_py",\n'
      '    ],\n'
      ')\n',
    )
    self.assertNotIn('experiments/fed_avg/flags/BUILD', builds)

  def test_rules(self):
    rules = build_files.expected_rules(self.root)
    core = rules['fedjax_ext/core']
    self.assertEqual(core['core']['deps'], [':engine'])
    self.assertEqual(core['engine']['deps'], [':plans', '@pip//jax'])
    self.assertEqual(
      core['plans']['deps'], ['@pip//orbax_checkpoint', '@pip//scikit_learn']
    )
    test = rules['tests/core']['engine_test']
    self.assertEqual(test['kind'], 'py_test')
    self.assertEqual(test['data'], ['//tests/golden:golden_files'])
    self.assertNotIn('deps', rules['fedjax_ext']['fedjax_ext'])

  def test_missing_dep(self):
    path = 'fedjax_ext/core/BUILD'
    self.edit(path, '        ":plans",\n', '')
    self.assertEqual(
      build_files.differences(self.root),
      [f"{path}: engine: deps should be [':plans', '@pip//jax']"],
    )

  def test_removed_and_added_modules(self):
    (self.root / 'tests/golden/make.py').unlink()
    (self.root / 'tests/golden/means.npz').unlink()
    self.edit('fedjax_ext/core/engine.py', 'from . import plans', '')
    (self.root / 'fedjax_ext/core/plans.py').unlink()
    self.put('fedjax_ext/core/lanes.py', '')
    self.put('tools/x.py', '')
    self.assertEqual(
      build_files.differences(self.root),
      [
        "fedjax_ext/core/BUILD: engine: deps should be ['@pip//jax']",
        'fedjax_ext/core/BUILD: lanes: missing',
        'fedjax_ext/core/BUILD: plans: should not exist',
        'tests/core/BUILD: engine_test: data should be absent',
        'tests/golden/BUILD: should not exist',
        'tools/BUILD: missing',
      ],
    )
    build_files.write(self.root)
    self.assertEqual([], build_files.differences(self.root))
    self.assertFalse((self.root / 'tests/golden/BUILD').exists())

  def test_edited_text(self):
    self.edit('fedjax_ext/BUILD', 'do not edit', 'edit')
    self.put('tests/core/BUILD', 'no starlark')
    self.assertEqual(
      build_files.differences(self.root),
      ['fedjax_ext/BUILD: text differs', 'tests/core/BUILD: text differs'],
    )

  def test_unknown_imports(self):
    self.put('tools/x.py', 'import keras.layers\nfrom fedjax_ext.cor import f')
    with self.assertRaises(build_files.BuildError) as raised:
      build_files.expected_builds(self.root)
    self.assertEqual(
      str(raised.exception),
      'tools/x.py: unknown import fedjax_ext.cor\n'
      'tools/x.py: unknown import keras.layers',
    )

  def test_import_cycle(self):
    self.put('fedjax_ext/core/plans.py', 'from fedjax_ext.core import engine')
    with self.assertRaisesRegex(build_files.BuildError, 'import cycle: .*plan'):
      build_files.expected_builds(self.root)

  def test_two_targets_of_one_name(self):
    self.put('fedjax_ext/core/core.py', '')
    with self.assertRaisesRegex(build_files.BuildError, 'second target named'):
      build_files.expected_builds(self.root)


if __name__ == '__main__':
  absltest.main()
