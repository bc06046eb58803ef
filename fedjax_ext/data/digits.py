"""The embedded default: scikit-learn's handwritten digits, no download."""

import numpy as np

from fedjax_ext.core import validate
from fedjax_ext.data.columns import Columns, make_columns


def load_digits() -> Columns:
  """1,797 images 8x8 of 10 digits: `image` float32 [1797, 8, 8, 1] in [0, 1].

  Alpaydin and Kaynak, "Optical recognition of handwritten digits", 1998,
  https://doi.org/10.24432/C50P49 (its test part, as scikit-learn ships it).
  """
  try:
    from sklearn import datasets
  except ImportError as error:
    raise validate.InvalidInput(
      'Expected scikit-learn for the digits; pip install scikit-learn.'
    ) from error
  digits = datasets.load_digits()
  image = (digits.images / 16).astype(np.float32)[..., None]
  return make_columns(
    'digits', {'image': image, 'label': digits.target.astype(np.int32)}
  )
