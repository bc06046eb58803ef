"""A fingerprint of the code that a cell ran on."""

import hashlib
import pathlib

# What people edit after a run, or what tools make: no run reads it.
_IGNORED_NAMES = {'BUILD', 'BUILD.bazel'}
_IGNORED_SUFFIXES = {'.md', '.ipynb', '.pyc', '.toml'}


def code_digest(root: pathlib.Path, folder: pathlib.Path) -> str:
  """Hashes the files that an experiment's results depend on.

  These are fedjax_ext/, the experiment's own folder and the files that lie
  beside that folder (what experiments share). Left out are documents,
  notebooks, build files, hidden files and tables (.toml), whose flags are in
  each cell's command; in flag files the comments do not count, so that the
  measured numbers can be written there.

  Args:
    root: the repository root.
    folder: the experiment's folder.

  Returns:
    16 hexadecimal digits, equal for equal contents on any machine.
  """
  paths = [*_tree(root / 'fedjax_ext'), *_tree(folder)]
  paths += [path for path in folder.parent.glob('*') if _counts(path)]
  digest = hashlib.sha256()
  for path in sorted(paths):
    contents = path.read_bytes()
    if path.suffix == '.flags':
      contents = _without_comments(contents)
    name = path.relative_to(root).as_posix()
    digest.update(f'{name}\0{len(contents)}\0'.encode())
    digest.update(contents)
  return digest.hexdigest()[:16]


def _tree(folder: pathlib.Path) -> list[pathlib.Path]:
  """Lists the files under a folder that count."""
  found = []
  for path in folder.glob('*'):
    if path.name.startswith('.') or path.name == '__pycache__':
      continue
    if path.is_dir():
      found += _tree(path)
    elif _counts(path):
      found.append(path)
  return found


def _counts(path: pathlib.Path) -> bool:
  return (
    path.is_file()
    and not path.name.startswith('.')
    and not path.name.endswith('~')
    and path.name not in _IGNORED_NAMES
    and path.suffix not in _IGNORED_SUFFIXES
  )


def _without_comments(contents: bytes) -> bytes:
  lines = (line.strip() for line in contents.splitlines())
  kept = (line for line in lines if line and not line.startswith((b'#', b'//')))
  return b'\n'.join(kept)
