"""The run manifest: what a workdir was made by, and whether it still is.

manifest.json holds flags, seeds, data fingerprint, layout, versions, device,
git commit and wall time. A workdir is continued only by the same run.
"""

import importlib.metadata
import json
import logging
import pathlib
import platform
import subprocess
from typing import Any

import jax

from fedjax_ext.core import InvalidInput
from fedjax_ext.training.writers import write_atomically

_LOG = logging.getLogger(__name__)

Manifest = dict[str, Any]

# A difference here changes results and is refused; elsewhere it is logged.
BINDING = ('flags', 'data', 'layout')
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def git_commit() -> str:
  """The commit of the checkout, '+dirty' after local changes, or 'unknown'."""
  here = pathlib.Path(__file__).parent
  try:
    run = lambda *args: subprocess.run(
      ['git', *args], cwd=here, capture_output=True, text=True, check=True
    ).stdout.strip()
    commit = run('rev-parse', 'HEAD')
    changed = run('status', '--porcelain', '--untracked-files=no')
    return commit + ('+dirty' if changed else '')
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'


def make_manifest(
  *, flags: dict[str, Any], data: str, layout: dict[str, Any]
) -> Manifest:
  """Describes this run.

  Args:
    flags: all flags that define the run, seeds among them, by name.
    data: fingerprint of the data.
    layout: `Layout.describe()`.
  """
  device = jax.devices()[0]
  versions = {'python': platform.python_version()}
  for name in PACKAGES:
    versions[name] = importlib.metadata.version(name)
  return {
    'flags': json.loads(json.dumps(flags)),
    'data': data,
    'layout': layout,
    'versions': versions,
    'device': f'{device.device_kind} ({platform.machine()})',
    'commit': git_commit(),
    'wall_seconds': 0.0,
  }


def differences(old: Any, new: Any, name: str = '') -> list[str]:
  """Where two nested dicts differ: 'flags.seed: 1 in the workdir, now 2'."""
  if isinstance(old, dict) and isinstance(new, dict):
    return [
      line
      for key in sorted(old.keys() | new.keys())
      for line in differences(
        old.get(key), new.get(key), f'{name}.{key}' if name else key
      )
    ]
  return [] if old == new else [f'{name}: {old} in the workdir, now {new}']


def open_workdir(workdir: pathlib.Path, manifest: Manifest) -> Manifest:
  """Makes a workdir, or checks that it belongs to this run.

  A workdir without a checkpoint belongs to nobody: a run that failed before its
  first one may be corrected there.

  Returns:
    The manifest to go on with; its 'wall_seconds' (a scalar) counts earlier
    starts too.

  Raises:
    InvalidInput: the manifest there disagrees; the message says in what.
    OSError: the workdir cannot be written.
  """
  path = workdir / 'manifest.json'
  saved = workdir / 'checkpoints'
  begun = saved.is_dir() and any(p.name.isdigit() for p in saved.iterdir())
  if path.exists() and begun:
    try:
      old = json.loads(path.read_text())
    except json.JSONDecodeError as error:
      raise InvalidInput(f'Expected JSON in {path}: {error}') from error
    if not isinstance(old, dict):
      raise InvalidInput(f'Expected a JSON object in {path}, got {old!r:.80}.')
    pick = lambda m, binding: {
      k: v
      for k, v in m.items()
      if (k in BINDING) == binding and k != 'wall_seconds'
    }
    wrong = differences(pick(old, True), pick(manifest, True))
    if wrong:
      raise InvalidInput(
        f'The workdir {workdir} holds another run; use a fresh --workdir or '
        f'the same flags. Different: {"; ".join(wrong)}.'
      )
    for line in differences(pick(old, False), pick(manifest, False)):
      _LOG.warning('Resuming under other conditions: %s.', line)
    return dict(manifest, wall_seconds=old.get('wall_seconds', 0.0))
  workdir.mkdir(parents=True, exist_ok=True)
  write_manifest(workdir, manifest)
  return manifest


def write_manifest(workdir: pathlib.Path, manifest: Manifest) -> None:
  """Writes manifest.json ({name: scalar or dict}) atomically."""
  write_atomically(
    workdir / 'manifest.json', json.dumps(manifest, indent=2) + '\n'
  )
