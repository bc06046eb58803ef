"""BapFL: a backdoor in the encoder alone, for personal classifiers.

Clients who keep classifiers of their own still share the encoder. The attacker
keeps the classifier as it came and adds noise to it at every step, so that the
backdoor suits other classifiers too.

Ye, Chen, Wang, Li and Gao, "BapFL: you can backdoor personalized federated
learning", 2024, https://doi.org/10.1145/3649316. How large the noise is, and
when it is drawn, is ours: the source that was read says neither.
"""

from typing import Any

import jax

from fedjax_ext.algorithms.averaging import Sent
from fedjax_ext.attacks.backdoors import train_poisoned
from fedjax_ext.attacks.scenario import Scenario
from fedjax_ext.core import Batch, ClientProgram, validate
from fedjax_ext.models import params_of, with_params

PyTree = Any


def bapfl(
  scenario: Scenario, *, layer: str = 'Dense_1', noise: float = 0.1
) -> ClientProgram:
  """Local SGD of all layers but the classifier, which is noisy in the loss.

  Args:
    scenario: task, optimizer, trigger; params are a dictionary of layers.
    layer: the classifier's name.
    noise: standard deviation, relative to that of the layer's arrays.

  Raises:
    InvalidInput: there is no such layer, or noise < 0.
  """
  validate.at_least('noise', noise, 0)
  template = params_of(jax.eval_shape(scenario.task.init, jax.random.key(0)))
  validate.one_of('layer', layer, sorted(template))

  def loss(model: PyTree, batch: Batch) -> Any:
    params = params_of(model)
    leaves, tree = jax.tree.flatten(params[layer])
    keys = jax.random.split(jax.random.fold_in(batch.info.key, 2), len(leaves))
    noisy = [
      x + noise * x.std() * jax.random.normal(key, x.shape, x.dtype)
      for key, x in zip(keys, leaves, strict=True)
    ]
    params = {**params, layer: jax.tree.unflatten(tree, noisy)}
    return scenario.task.loss(with_params(model, params), batch)

  def hold(params: PyTree, sent: Sent, _, epoch_end: jax.Array) -> PyTree:
    del epoch_end
    return {**params, layer: params_of(sent.model)[layer]}

  noised = scenario._replace(task=scenario.task._replace(loss=loss))
  return train_poisoned(noised, hold=hold)
