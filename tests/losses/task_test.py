"""Tasks: masked rows count for nothing, in values and in gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from fedjax_ext.core import Batch, InvalidInput, StepInfo
from fedjax_ext.data import chain
from fedjax_ext.data.preprocess import random_crop, standardise
from fedjax_ext.losses import (
  Task,
  classification_task,
  masked_mean,
  next_token_task,
)
from fedjax_ext.models import make_model
from tests.problems import plain_loss, relative_error

MASK = np.array([True, True, True, False, False])


@functools.cache
def problem(name='mlp'):
  """A model of 8x8 images and 3 classes, its task and parameters; compiled."""
  settings = {'dropout': True} if name == 'emnist_cnn' else {}
  model = make_model(name, input_shape=(8, 8, 1), num_classes=3, **settings)
  task = Task(*map(jax.jit, classification_task(model)))
  return model, task, task.init(jax.random.key(0))


def batch(junk=0, mask=MASK, key=None):
  """Five rows; those beyond the mask differ by the seed `junk`."""
  rng = np.random.default_rng(0)
  image = rng.standard_normal((5, 8, 8, 1)).astype(np.float32)
  label = rng.integers(0, 3, 5).astype(np.int32)
  other = np.random.default_rng(100 + junk)
  rest = np.flatnonzero(~mask)
  image[rest] = 50 * other.standard_normal((len(rest), 8, 8, 1))
  label[rest] = other.integers(0, 3, len(rest))
  info = StepInfo(key, *map(jnp.int32, (0, 0, 0)), jnp.bool_(False))
  data = {'image': jnp.asarray(image), 'label': jnp.asarray(label)}
  return Batch(data, jnp.asarray(mask), info)


class MaskedMeanTest(parameterized.TestCase):
  @parameterized.parameters(np.nan, np.inf, -np.inf, 1e30)
  def test_masked_values_change_nothing(self, junk):
    """Nor do they in the gradient, which is 1/count at real places."""
    values = jnp.array([1.0, junk, 2.0, junk, 6.0])
    mask = jnp.array([True, False, True, False, True])
    mean, grad = jax.jit(jax.value_and_grad(masked_mean))(values, mask)
    self.assertEqual(float(mean), 3.0)
    third = np.float32(1) / 3
    np.testing.assert_allclose(grad, [third, 0, third, 0, third], rtol=1e-6)

  def test_gradient_through_a_function(self):
    """Also behind a function whose masked values are not finite."""
    x = jnp.array([1.0, 4.0, 1e30])
    mask = jnp.array([True, True, False])
    mean, grad = jax.value_and_grad(lambda x: masked_mean(x * x, mask))(x)
    self.assertEqual(float(mean), 8.5)
    np.testing.assert_array_equal(grad, [1, 4, 0])

  def test_nothing_is_real(self):
    """0, with a gradient of 0, rather than 0/0."""
    values, mask = jnp.array([np.nan, 2.0]), jnp.zeros(2, bool)
    mean, grad = jax.value_and_grad(masked_mean)(values, mask)
    self.assertEqual(float(mean), 0.0)
    np.testing.assert_array_equal(grad, [0, 0])

  def test_a_real_nan_is_seen(self):
    """Only masked places are forgiven."""
    mask = jnp.array([True, False])
    self.assertTrue(jnp.isnan(masked_mean(jnp.array([jnp.nan, 1.0]), mask)))


class ClassificationTaskTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 3, 5)
  def test_loss_is_the_mean_over_real_rows(self, count):
    """Value and gradient equal those of the real rows alone."""
    model, task, params = problem()
    b = batch(mask=np.arange(5) < count)
    got = jax.jit(jax.value_and_grad(task.loss))(params, b)
    expected = plain_loss(model)(
      params, b.data['image'][:count], b.data['label'][:count]
    )
    self.assertLess(relative_error(got, expected), 1e-5)

  def test_real_rows_anywhere(self):
    """The mask picks rows, wherever they stand."""
    model, task, params = problem()
    mask = np.array([False, True, False, True, True])
    b = batch(mask=mask)
    expected, _ = plain_loss(model)(
      params, b.data['image'][mask], b.data['label'][mask]
    )
    self.assertAlmostEqual(
      float(task.loss(params, b)), float(expected), places=5
    )

  @parameterized.parameters('softmax_regression', 'mlp', 'emnist_cnn')
  def test_junk_in_masked_rows_bit_for_bit(self, name):
    """Loss and gradient are the same bits whatever the masked rows hold."""
    _, task, params = problem(name)
    step = jax.jit(jax.value_and_grad(task.loss))
    key = jax.random.key(7)
    loss, grads = step(params, batch(0, key=key))
    for junk in (1, 2, 3):
      other = batch(junk, key=key)
      self.assertFalse(
        np.array_equal(batch(0).data['image'], other.data['image'])
      )
      again, other_grads = step(params, other)
      self.assertEqual(float(loss), float(again))
      jax.tree.map(np.testing.assert_array_equal, grads, other_grads)
    self.assertGreater(float(loss), 0)

  @parameterized.parameters(-1, 3, 2**30)
  def test_junk_labels_in_masked_rows(self, label):
    """A masked label may even be out of range."""
    _, task, params = problem()
    b = batch()
    step = jax.jit(jax.value_and_grad(task.loss))
    expected = step(params, b)
    b.data['label'] = b.data['label'].at[3:].set(label)
    jax.tree.map(np.testing.assert_array_equal, step(params, b), expected)

  def test_metrics(self):
    """Accuracy and cross-entropy of each row, weighted by the mask."""
    model, task, params = problem()
    b = batch()
    metrics = task.metrics(params, b)
    self.assertCountEqual(metrics, ['accuracy', 'loss'])
    logits = np.asarray(model.apply(params, b.data['image']), np.float64)
    label = np.asarray(b.data['label'])
    entropy = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))
    entropy += logits.max(1) - logits[np.arange(5), label]
    for name, expected in (
      ('accuracy', (logits.argmax(1) == label).astype(float)),
      ('loss', entropy),
    ):
      value, weight = metrics[name]
      self.assertEqual((value.shape, weight.shape), ((5,), (5,)))
      self.assertEqual((value.dtype, weight.dtype), (jnp.float32,) * 2)
      np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)
      np.testing.assert_array_equal(weight, MASK.astype(np.float32))
    self.assertAlmostEqual(
      float(task.loss(params, b)), entropy[MASK].mean(), places=4
    )

  def test_keys_are_for_training(self):
    """Dropout is on in the loss of a step with a key, never in metrics."""
    _, task, params = problem('emnist_cnn')
    one, two = (batch(key=jax.random.key(k)) for k in (0, 1))
    loss, metrics = task.loss, task.metrics
    self.assertNotEqual(float(loss(params, one)), float(loss(params, two)))
    self.assertEqual(float(loss(params, one)), float(loss(params, one)))
    jax.tree.map(
      np.testing.assert_array_equal, metrics(params, one), metrics(params, two)
    )

  def test_other_names(self):
    """Feature and label may go by any name."""
    model, task, params = problem()
    b = batch()
    renamed = b._replace(
      data={'pixels': b.data['image'], 'digit': b.data['label']}
    )
    other = classification_task(model, feature='pixels', label='digit')
    self.assertEqual(
      float(other.loss(params, renamed)), float(task.loss(params, b))
    )
    jax.tree.map(
      np.testing.assert_array_equal,
      other.metrics(params, renamed),
      task.metrics(params, b),
    )


class PreprocessedTest(absltest.TestCase):
  def test_steps_see_other_images_at_each_key_and_metrics_the_same(self):
    preprocess = chain(random_crop(padding=2), standardise())
    model, _, params = problem()
    task = classification_task(model, preprocess=preprocess)
    keys = [jax.random.key(k) for k in (0, 1)]
    losses = [float(task.loss(params, batch(key=k))) for k in keys]
    self.assertNotEqual(*losses)
    self.assertEqual(losses[0], float(task.loss(params, batch(key=keys[0]))))
    first, second = (task.metrics(params, batch(key=k)) for k in keys)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    plain = classification_task(model)
    ready = batch()
    ready.data['image'] = preprocess(None, ready.data['image'])
    jax.tree.map(
      np.testing.assert_array_equal, first, plain.metrics(params, ready)
    )


V = 9  # padding, beginning, end, five words, unknown


class TableModel:
  """Logits of the next token by the token before: a table [V, V]."""

  @staticmethod
  def init(key):
    return jax.random.normal(key, (V, V))

  @staticmethod
  def apply(table, tokens):
    return table[tokens]

  @staticmethod
  def train(table, tokens, key, mask):
    return table[tokens], ()


def tokens_batch(rows, mask=None):
  rows = np.array(rows, np.uint8)
  info = StepInfo(None, *map(jnp.int32, (0, 0, 0)), jnp.bool_(False))
  mask = np.ones(len(rows), bool) if mask is None else np.array(mask)
  return Batch({'tokens': jnp.asarray(rows)}, jnp.asarray(mask), info)


class NextTokenTaskTest(parameterized.TestCase):
  # Two sentences in rows of T + 1 = 6, the second cut; the third is masked.
  ROWS = [[1, 3, 4, 2, 0, 0], [1, 8, 5, 6, 7, 3], [4, 4, 4, 4, 4, 4]]
  MASK = [True, True, False]

  def expected(self, table):
    """Losses of the real targets of each row, in plain Python."""
    table = np.asarray(table, np.float64)
    log_p = table - np.log(np.exp(table).sum(-1, keepdims=True))
    return [
      [-log_p[a, b] for a, b in itertools.pairwise(row) if b != 0]
      for row, real in zip(self.ROWS, self.MASK, strict=True)
      if real
    ]

  def test_loss_per_token_and_per_example(self):
    table = TableModel.init(jax.random.key(0))
    batch = tokens_batch(self.ROWS, self.MASK)
    rows = self.expected(table)
    flat = [x for row in rows for x in row]
    for length, want in (
      (0, np.mean(flat)),
      (5, np.mean([sum(row) / 5 for row in rows])),
      (13.3, np.mean([sum(row) / 13.3 for row in rows])),
    ):
      task = next_token_task(TableModel, vocab_size=V, expected_length=length)
      np.testing.assert_allclose(task.loss(table, batch), want, rtol=1e-6)
    with self.assertRaisesRegex(InvalidInput, 'expected_length=-1'):
      next_token_task(TableModel, vocab_size=V, expected_length=-1)

  def test_metrics(self):
    """Weights count targets: without padding, for accuracy without end."""
    # Always predicts the padding, then word 4, then word 3.
    table = jnp.zeros((V, V)).at[:, 0].set(3.0).at[:, 4].set(2.0)
    table = table.at[:, 3].set(1.0)
    task = next_token_task(TableModel, vocab_size=V)
    metrics = task.metrics(table, tokens_batch(self.ROWS, self.MASK))
    accuracy, weight = metrics['accuracy']
    np.testing.assert_array_equal(weight, [2, 5, 0])
    np.testing.assert_array_equal(accuracy[:2], [0, 0])
    in_vocab, weight = metrics['accuracy_in_vocab']
    np.testing.assert_array_equal(weight, [2, 5, 0])
    np.testing.assert_allclose(in_vocab[:2], [0.5, 0])
    loss, weight = metrics['loss']
    np.testing.assert_array_equal(weight, [3, 5, 0])
    want = [np.mean(row) for row in self.expected(table)]
    np.testing.assert_allclose(loss[:2], want, rtol=1e-6)

  def test_an_unknown_word_is_never_guessed_in_vocab(self):
    table = jnp.zeros((V, V)).at[:, V - 1].set(5.0)
    task = next_token_task(TableModel, vocab_size=V)
    metrics = task.metrics(table, tokens_batch([[1, 8, 8, 8]]))
    self.assertEqual(float(metrics['accuracy'][0][0]), 1.0)
    self.assertEqual(float(metrics['accuracy_in_vocab'][0][0]), 0.0)

  @parameterized.parameters(0, 13.3)
  def test_masked_rows_change_nothing(self, length):
    table = TableModel.init(jax.random.key(1))
    task = next_token_task(TableModel, vocab_size=V, expected_length=length)
    gradient = jax.grad(task.loss)
    one = gradient(table, tokens_batch(self.ROWS, self.MASK))
    other = [*self.ROWS[:2], [0, 7, 2, 1, 3, 3]]
    two = gradient(table, tokens_batch(other, self.MASK))
    np.testing.assert_array_equal(one, two)


if __name__ == '__main__':
  absltest.main()
