"""The notebooks are clean and alike; the slow tests execute them."""

import copy
import json
import re

import pytest
from absl.testing import absltest, parameterized

from tools import notebooks

EXPECTED = (
  'bdpfl',
  'fedloge',
  'mixed_fl',
  'participation_gap',
  'quick_start',
  'retrieval',
  'write_an_algorithm',
)
COLAB = (
  'https://colab.research.google.com/github/fedjax-ext/fedjax_ext/blob/main/'
  'notebooks/{}.ipynb'
)
MACHINE_PATH = re.compile(r'/(tmp|root|home|work|Users)/')
MAX_BYTES = 250_000
STREAM = {'output_type': 'stream', 'name': 'stderr', 'text': 'a warning'}
FIGURE = {
  'output_type': 'display_data',
  'data': {'image/png': 'iVBORw0=', 'text/plain': '<Figure>'},
  'metadata': {'needs_background': 'light'},
}


def read(name: str) -> notebooks.Notebook:
  return json.loads((notebooks.FOLDER / f'{name}.ipynb').read_text())


def source(cell: dict) -> str:
  return ''.join(cell['source'])


def code_cells(notebook: notebooks.Notebook) -> list[dict]:
  return [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']


class NotebookTest(parameterized.TestCase):
  def test_all_are_there(self):
    self.assertEqual(list(EXPECTED), notebooks.names())

  @parameterized.parameters(*EXPECTED)
  def test_first_cell_has_title_and_badge(self, name: str):
    first = read(name)['cells'][0]
    self.assertEqual(first['cell_type'], 'markdown')
    self.assertRegex(source(first), r'^# \S')
    self.assertIn(f']({COLAB.format(name)})', source(first))

  @parameterized.parameters(*EXPECTED)
  def test_second_cell_is_the_same_setup(self, name: str):
    second = read(name)['cells'][1]
    self.assertEqual(second['cell_type'], 'code')
    self.assertEqual(source(second), source(read(EXPECTED[0])['cells'][1]))
    self.assertIn('--branch=v0.1.0', source(second))
    self.assertEmpty(second['outputs'])

  @parameterized.parameters(*EXPECTED)
  def test_lines_are_short(self, name: str):
    for cell in read(name)['cells']:
      is_code = cell['cell_type'] == 'code'
      for line in source(cell).splitlines():
        # Links and rows of tables cannot be broken.
        if is_code or not ('://' in line or line.startswith('|')):
          self.assertLessEqual(len(line), 80, line)

  @parameterized.parameters(*EXPECTED)
  def test_was_executed_without_an_error(self, name: str):
    cells = code_cells(read(name))
    self.assertEqual(
      [cell['execution_count'] for cell in cells],
      list(range(1, len(cells) + 1)),
    )
    outputs = [output for cell in cells for output in cell['outputs']]
    self.assertNotIn('error', {output['output_type'] for output in outputs})
    self.assertTrue(any('image/png' in o.get('data', {}) for o in outputs))

  @parameterized.parameters(*EXPECTED)
  def test_says_nothing_of_a_machine(self, name: str):
    notebook = read(name)
    for cell in notebook['cells']:
      self.assertNotRegex(source(cell), MACHINE_PATH)
    for cell in code_cells(notebook):
      for output in cell['outputs']:
        shown = dict(output.get('data', {}), text=output.get('text', ''))
        for kind, text in shown.items():
          if not kind.startswith('image/'):
            self.assertNotRegex(''.join(text), MACHINE_PATH)

  @parameterized.parameters(*EXPECTED)
  def test_is_clean_and_small(self, name: str):
    notebook = read(name)
    self.assertEqual(notebook['metadata'], notebooks.METADATA)
    self.assertEqual(notebook, notebooks.cleaned(copy.deepcopy(notebook)))
    path = notebooks.FOLDER / f'{name}.ipynb'
    self.assertLess(path.stat().st_size, MAX_BYTES)

  @parameterized.parameters(*EXPECTED)
  def test_links_lead_somewhere(self, name: str):
    text = '\n'.join(source(cell) for cell in read(name)['cells'])
    main = r'https://github\.com/fedjax-ext/fedjax_ext/blob/main/([\w./-]+)'
    for path in re.findall(main, text):
      self.assertTrue((notebooks.ROOT / path).exists(), path)
    for path in re.findall(r'\]\((\w+\.ipynb)\)', text):
      self.assertTrue((notebooks.FOLDER / path).exists(), path)


class CleanedTest(absltest.TestCase):
  def test_what_differs_by_machine_goes(self):
    cell = {
      'cell_type': 'code',
      'metadata': {'execution': {'iopub.execute_input': 'now'}},
      'source': ['1'],
      'outputs': [dict(STREAM), copy.deepcopy(FIGURE)],
    }
    notebook = notebooks.cleaned({'cells': [cell], 'metadata': {'widgets': 1}})
    self.assertEqual(notebook['metadata'], notebooks.METADATA)
    self.assertEqual(cell['metadata'], {})
    (figure,) = cell['outputs']
    self.assertEqual(list(figure['data']), ['image/png'])
    self.assertEqual(figure['metadata'], {})

  def test_an_unknown_name_is_one_line(self):
    with self.assertRaisesRegex(notebooks.NotebookError, 'no_such: expected'):
      notebooks.execute('no_such')


@pytest.mark.slow
class ExecutionTest(parameterized.TestCase):
  @parameterized.parameters(*EXPECTED)
  def test_runs_from_top_to_bottom(self, name: str):
    pytest.importorskip('nbclient')
    pytest.importorskip('ipykernel')
    notebooks.execute(name)


if __name__ == '__main__':
  absltest.main()
