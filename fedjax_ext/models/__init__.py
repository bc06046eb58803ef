"""Models: flax modules, their layers, and models by name."""

from fedjax_ext.models.classifiers import MLP, EmnistCNN, SoftmaxRegression
from fedjax_ext.models.cnn import GroupNormCNN, LeNet
from fedjax_ext.models.dual_encoder import DualEncoder, dual_encoder
from fedjax_ext.models.layers import (
  Conv,
  Norm,
  as_float_image,
  convolution,
  max_pool,
  overlapping_max_pool,
  patches,
)
from fedjax_ext.models.model import (
  Model,
  Variables,
  check_no_statistics,
  from_module,
  params_of,
  stats_of,
  tap,
  with_params,
)
from fedjax_ext.models.precision import rematerialised, with_compute_dtype
from fedjax_ext.models.recurrent import LSTM, LanguageLSTM, lstm
from fedjax_ext.models.registry import MODELS, make_model
from fedjax_ext.models.resnet import ResNet, ResNetFeatures, cifar_resnet
from fedjax_ext.models.transformer import TextTransformer, VisionTransformer

__all__ = [
  'LSTM',
  'MLP',
  'MODELS',
  'Conv',
  'DualEncoder',
  'EmnistCNN',
  'GroupNormCNN',
  'LanguageLSTM',
  'LeNet',
  'Model',
  'Norm',
  'ResNet',
  'ResNetFeatures',
  'SoftmaxRegression',
  'TextTransformer',
  'Variables',
  'VisionTransformer',
  'as_float_image',
  'check_no_statistics',
  'cifar_resnet',
  'convolution',
  'dual_encoder',
  'from_module',
  'lstm',
  'make_model',
  'max_pool',
  'overlapping_max_pool',
  'params_of',
  'patches',
  'rematerialised',
  'stats_of',
  'tap',
  'with_compute_dtype',
  'with_params',
]
