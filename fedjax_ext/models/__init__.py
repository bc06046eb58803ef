"""Models: flax modules and their layers."""

from fedjax_ext.models.classifiers import (
  MLP,
  MODELS,
  EmnistCNN,
  Model,
  SoftmaxRegression,
  from_module,
  make_model,
)
from fedjax_ext.models.layers import Conv, as_float_image, max_pool, patches

__all__ = [
  'MLP',
  'MODELS',
  'Conv',
  'EmnistCNN',
  'Model',
  'SoftmaxRegression',
  'as_float_image',
  'from_module',
  'make_model',
  'max_pool',
  'patches',
]
