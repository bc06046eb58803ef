"""What the binaries of all experiments do, in one order.

Flags are checked, then files, then shapes, before an algorithm is compiled.
"""

from collections.abc import Callable, Mapping, Sequence

from fedjax_ext.core import FederatedAlgorithm, Layout, Sampler
from fedjax_ext.data import FederatedDataset, fingerprint, fingerprint_splits
from fedjax_ext.training import app, data_flags, seed_flags
from fedjax_ext.training import flags as shared
from fedjax_ext.training.loop import Finish, Result, train
from fedjax_ext.training.manifest import make_manifest


def dataset_from_flags() -> tuple[FederatedDataset, str]:
  """The dataset that the flags describe, and its fingerprint."""
  columns = data_flags.columns_from_flags()
  dataset = data_flags.dataset_from_flags(columns)
  return dataset, f'{fingerprint(columns)} {fingerprint_splits(dataset)}'


def run_experiment(
  module: str,
  *,
  make_algorithm: Callable[[FederatedDataset, Layout], FederatedAlgorithm],
  make_sampler: Callable[
    [FederatedDataset], Sampler
  ] = shared.sampler_from_flags,
  make_finish: Callable[[FederatedDataset], Finish] | None = None,
  make_dataset: Callable[[], tuple[FederatedDataset, str]] = dataset_from_flags,
  named: Mapping[str, Mapping[str, Callable]],
  said: Mapping[str, str],
  metrics: Sequence[str] = ('accuracy',),
  shown: str = 'accuracy',
) -> Result:
  """Checks everything, trains or resumes, prints the result.

  Args:
    module: `__name__` of the binary.
    make_algorithm: builds what runs, by the binary's own flags.
    make_sampler: builds what draws the cohorts.
    make_finish: builds what is said of the last state, see `loop.train`.
    make_dataset: builds what it runs on, with its fingerprint.
    named: {flag: functions known by name}, for `flags.flag_values`.
    said: see `app.print_result`, as is `metrics`.
    metrics: to print and to draw.
    shown: the metric of progress lines and of bands.png.
  """
  workdir = shared.workdir_from_flags()
  schedule = shared.schedule_from_flags()
  seeds = seed_flags.seeds_from_flags()
  # Before the data: a partition may compute (an autoencoder's embedding), and
  # machines have to be set up before anything does.
  layout = shared.layout_from_flags()
  dataset, data_digest = make_dataset()
  sampler = make_sampler(dataset)
  algorithm = make_algorithm(dataset, layout)
  result = train(
    algorithm,
    dataset,
    sampler=sampler,
    seeds=seeds,
    schedule=schedule,
    layout=layout,
    workdir=workdir,
    manifest=make_manifest(
      flags=shared.flag_values(module, named),
      data=data_digest,
      layout=layout.describe(),
    ),
    shown=shown,
    drawn=tuple(metrics),
    **({} if make_finish is None else {'finish': make_finish(dataset)}),
  )
  app.print_result(result, said, workdir=workdir, metrics=metrics)
  return result
