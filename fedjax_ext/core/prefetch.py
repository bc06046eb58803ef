"""Prepares the next round in a thread while the devices run this one."""

import concurrent.futures
from collections.abc import Callable, Iterator

from fedjax_ext.core.cohort import Cohort


def prefetch(
  prepare: Callable[[int], Cohort], rounds: range, *, ahead: bool = True
) -> Iterator[Cohort]:
  """Yields prepared cohorts, one round ahead.

  Args:
    prepare: round number -> cohort, usually one whose `prepare` has planned it
      and put it on the devices; pure, so that a thread may run it early.
    rounds: numbers of the rounds.
    ahead: False prepares each round when it is asked for.
  """
  if not ahead or not len(rounds):
    yield from map(prepare, rounds)
    return
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    coming = pool.submit(prepare, rounds[0])
    for following in rounds[1:]:
      cohort = coming.result()
      coming = pool.submit(prepare, following)
      yield cohort
    yield coming.result()
