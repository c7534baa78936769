"""The usual mistakes of a new user with batches, feeds and losses; see `programs`.

`test_errors.py` and `data/test_batches.py` check further ones.
"""

import types

import jax
import numpy as np
import pytest
import small
from programs import BATCH, TX, Table, X, Y, check, loss_fn, mean, right

import zerojax as zj

MISTAKES = Table()
mistake = MISTAKES.add


@pytest.fixture(scope="module")
def u():
    return right()


# 1: the batch

MISSING = ("'y'", "zerojax called loss_fn(", "w': float32[8,16]", "batch is {'x': float32[16,8]}",
           "keys, shapes or dtypes")


@mistake(KeyError, *MISSING)
def a_key_is_missing(u):
    u.step(u.state, {"x": X})


@mistake(KeyError, *MISSING)
def a_key_is_missing_in_an_evaluation(u):
    u.evaluate(u.state, {"x": X})


@mistake(KeyError, *MISSING)
def a_key_is_missing_in_an_own_loop(u):
    u.own_step(u.own_state, {"x": X})


@mistake(TypeError, "zerojax called loss_fn(model, batch)", "batch is (float32[16,8], int32[16])")
def a_tuple_in_place_of_a_dict(u):
    u.step(u.state, (X, Y))


@mistake(TypeError, "(8,)", "(4,)", "zerojax called loss_fn", "'x': float32[16,4]")
def another_width(u):
    u.step(u.state, {"x": X[:, :4], "y": Y})


@mistake(TypeError, "got float32", "zerojax called loss_fn", "'y': float32[16]")
def labels_of_another_dtype(u):
    u.step(u.state, {"x": X, "y": Y.astype(np.float32)})


@mistake(zj.BatchError, "batch['x'] has 12 examples", "over 8 devices;", "give batches of 8",
         "zj.feed(batches, zero, pad=True)")
def rows_that_do_not_divide_in_an_own_loop(u):
    u.own_step(u.own_state, {"x": X[:12], "y": Y[:12]})


@mistake(zj.BatchError, "batch['x'] has 16", "batch['y'] has 8", "first dimension",
         "close over arrays of other lengths")
def other_numbers_of_rows(u):
    u.step(u.state, {"x": X, "y": Y[:8]})


@mistake(zj.BatchError, "batch['t'] has no dimension", "np.full(n, value)")
def a_scalar(u):
    u.step(u.state, {**BATCH, "t": 0.5})


@mistake(zj.BatchError, "batch['y'] has no dimension", "images[:8] in place of images[0]")
def one_example(u):
    u.step(u.state, {"x": X[0], "y": Y[0]})


@mistake(zj.BatchError, "batch['y'][0] has no dimension", "np.asarray(batch['y'])")
def labels_in_a_list(u):
    u.step(u.state, {"x": X, "y": Y.tolist()})


@mistake(zj.BatchError, "batch is a shape", "step.plan")
def shapes_for_a_batch(u):
    u.step(u.state, jax.ShapeDtypeStruct(X.shape, X.dtype))


# 2: accumulate


@mistake(zj.BatchError, "8 devices x 3 microbatches = 24", "write accumulate=1 or 2, or",
         "batches of 24")
def microbatches_that_do_not_divide(u):
    u.zero.train_step(loss_fn, TX, accumulate=3)(u.state, BATCH)


@mistake(zj.BatchError, "batch['x'] has 16", "= 24", "write accumulate=1 or 2, or")
def microbatches_that_do_not_divide_in_an_own_loop(u):
    u.zero.value_and_grad(loss_fn, accumulate=3)(small.weights(), BATCH)


# 3: no feed

PLACED = ("batch['x'] is on device 0 alone", "8 devices", "np.asarray(x)",
          "zj.feed([batch], zero)")


@mistake(zj.BatchError, *PLACED)
def a_batch_on_one_device(u):
    u.step(u.state, jax.device_put(BATCH, jax.devices()[0]))


@mistake(zj.BatchError, *PLACED)
def a_batch_on_one_device_in_an_own_loop(u):
    u.own_step(u.own_state, jax.device_put(BATCH, jax.devices()[0]))


@mistake(zj.BatchError, "batch['x'] is on 4 devices", "8 devices", "zj.feed([batch], zero)")
def a_batch_of_another_mesh(u):
    u.evaluate(u.state, next(zj.feed([BATCH], u.other)))


# 9 and 10: what the loss returns


@mistake(zj.LossError, "the loss is None", "return losses.mean()")
def no_return(u):
    u.zero.train_step(lambda params, batch: None, TX)(u.state, BATCH)


@mistake(zj.LossError, "a tuple, (float32[], {'accuracy': float32[]})",
         "zj.Loss(losses.sum(), losses.size, aux={...})", "correct.sum()", "has_aux=True")
def a_loss_and_aux(u):
    u.zero.train_step(lambda p, b: (mean(p, b), {"accuracy": mean(p, b)}), TX)(u.state, BATCH)


@mistake(zj.LossError, "a tuple, (float32[], float32[])", "has_aux=True")
def a_loss_and_aux_without_has_aux(u):
    u.zero.value_and_grad(lambda p, b: (mean(p, b), mean(p, b)))(small.weights(), BATCH)


@mistake(zj.LossError, "has_aux=True", "returned float32[]", "leave has_aux out")
def has_aux_without_aux(u):
    u.zero.value_and_grad(mean, has_aux=True)(small.weights(), BATCH)


# 20: feed


@mistake(zj.BatchError, "generator function batches", "zj.feed(batches(), zero)")
def feed_with_a_generator_function(u):
    def batches():
        yield BATCH

    zj.feed(batches, u.zero)


@mistake(zj.BatchError, "a function, which is not an iterable", "zj.Indexed(make_batch, steps)")
def feed_with_a_function(u):
    zj.feed(lambda i: BATCH, u.zero)


@mistake(zj.BatchError, "a list as its second argument", "zj.feed(batches, zero)")
def feed_with_swapped_arguments(u):
    zj.feed(u.zero, [BATCH])


@mistake(zj.BatchError, "an array float32[16,8], not a function", "zj.Indexed(make_batch, stop)")
def indexed_with_an_array(u):
    zj.Indexed(X)


@mistake(TypeError, "zerojax called <lambda>(0)", "the number of a batch")
def indexed_with_a_function_of_nothing(u):
    next(zj.feed(zj.Indexed(lambda: BATCH), u.zero))


@mistake(zj.BatchError, "for batch in batches: state, metrics = step(state, batch)")
def a_step_with_a_feed(u):
    u.step(u.state, zj.feed([BATCH], u.zero))


@mistake(zj.BatchError, "does not look into it", "dict(batch)")
def a_mapping_that_jax_does_not_know(u):
    u.step(u.state, types.MappingProxyType(BATCH))


@pytest.mark.parametrize("name", MISTAKES)
def test_one_message_says_what_was_given_and_what_to_write(name, u):
    check(u, *MISTAKES[name])
