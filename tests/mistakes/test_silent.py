"""Mistakes whose program runs: the warning for each, at the user's line, and no false alarms."""

import types
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
import small
from flax import nnx
from programs import BATCH, TX, Net, X, loss_fn, mean

import zerojax as zj
from zerojax.train import means
from zerojax.train.skips import Skips


@pytest.fixture(scope="module")
def zero():
    return small.zero()


@pytest.fixture(scope="module")
def shapes(zero):
    return zero.abstract(small.weights, TX)


def warned(run):
    """Returns the texts of zerojax's warnings, all of which have a line of this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    texts = [str(w.message) for w in caught if "stay whole" not in str(w.message)]
    assert {w.filename for w in caught} <= {__file__}, texts
    return texts


def test_a_step_under_another_jit(zero, shapes):
    """The state's memory would not be reused, and nothing would count skipped steps."""
    text, = warned(lambda: jax.jit(zero.train_step(loss_fn, TX)).lower(shapes, BATCH))
    assert text.startswith("train_step(max_skipped=50): the step was called within another")
    assert "call step(state, batch) itself" in text and "max_skipped=None" in text


def test_several_steps_in_one_program_are_no_mistake(zero, shapes):
    step = zero.train_step(loss_fn, TX, max_skipped=None)
    epoch = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches), donate_argnums=0)
    batches = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), BATCH)
    assert warned(lambda: epoch.lower(shapes, batches)) == []


def test_a_learning_rate_of_nan(zero):
    """The third skipped step is noticed two calls later."""
    tx = optax.sgd(float("nan"))
    states, step = [zero.init(small.weights, tx)], zero.train_step(mean, tx, max_skipped=3)

    def run(steps):
        for _ in range(steps):
            states.append(step(states[-1], BATCH)[0])

    cause = "finite; look for a learning rate or a schedule that is nan"
    text, = warned(lambda: run(4))
    assert text.startswith("a training step was skipped") and cause in text
    with pytest.raises(zj.NonFiniteError, match=f"3 consecutive steps .* {cause}"):
        run(1)


def _metrics(loss=1.0, grad_norm=1.0, **more):
    values = {"loss": loss, "grad_norm": grad_norm, "skipped": 1, **more}
    return {name: jnp.asarray(x) for name, x in values.items()}


NAN = float("nan")
CAUSES = {
    "loss": (_metrics(NAN, NAN), ["the loss was nan; possible causes are bad data"]),
    "gradient": (_metrics(1.0, NAN), ["the loss was 1, but the norm of its gradient nan", "sqrt"]),
    "float16": (_metrics(NAN, NAN, loss_scale=1.0), []),  # as a rule, the scale is too high
    "none": (_metrics() | {"skipped": jnp.int32(0)}, []),
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_first_skipped_step_warns_of_its_cause(name):
    metrics, words = CAUSES[name]
    skips, state = Skips(50), types.SimpleNamespace(skipped=metrics["skipped"])
    for _ in range(2):
        skips.record(state, metrics)
    texts = warned(lambda: skips.check(state))
    assert len(texts) == bool(words) and all(word in texts[0] for word in words)


def test_a_learning_rate_of_0(zero, shapes):
    text, = warned(lambda: zero.train_step(mean, optax.sgd(0.0)).lower(shapes, BATCH))
    assert text.startswith("the optimizer moves no parameter") and "learning rate of 0" in text


def _outside():
    """Returns a loss that reads another module than the one that it is given."""
    outside = Net(nnx.Rngs(0))
    return lambda model, batch: outside(batch["x"]).mean()


@pytest.mark.parametrize("verb", ["train_step", "value_and_grad"])
def test_a_loss_of_a_model_from_outside(zero, verb):
    text, = warned({
        "train_step": lambda: zero.train_step(_outside(), TX).lower(
            zero.abstract(lambda: Net(nnx.Rngs(0)), TX), BATCH),
        "value_and_grad": lambda: jax.jit(zero.value_and_grad(_outside())).lower(
            small.weights(), BATCH),
    }[verb])
    assert text.startswith("the loss does not depend on any trained parameter")
    assert "first argument, not with a model or parameters from outside" in text


def squares(w, x):
    return jnp.square(x * w)


def penalty(w, y):
    return jnp.sum(w ** 2)


def one_less(y):
    return jnp.maximum((y > 0).sum(), 1)


TOTALS = {  # (a function of the parameter, the squares and the batch; whether it is a mean)
    "mean": (lambda w, y: y.mean(), True),
    "half a mean": (lambda w, y: 0.5 * y.mean(), True),
    "mean by len": (lambda w, y: y.sum() / len(y), True),
    "mean, by its reciprocal": (lambda w, y: y.sum() * (1 / y.size), True),
    "mean of means": (lambda w, y: y.mean(1).mean(), True),
    "minus a mean": (lambda w, y: -y.mean(), True),
    "mean and a penalty": (lambda w, y: y.mean() + 1e-4 * penalty(w, y), True),
    "two means": (lambda w, y: y.mean() - 0.1 * (y ** 2).mean(), True),
    "masked mean, at least 1": (lambda w, y: (y * (y > 0)).sum() / one_less(y), True),
    "mean times a parameter": (lambda w, y: w * y.mean(), True),
    "sum": (lambda w, y: y.sum(), False),
    "half a sum": (lambda w, y: y.sum() / 2, False),
    "sum and a mean": (lambda w, y: y.sum() + y.mean(), False),
    "sum of means": (lambda w, y: y.mean(1).sum(), False),
    "half the sum of the sums of columns": (lambda w, y: 0.5 * y.sum(0).sum(), False),
    "mean times rows": (lambda w, y: y.mean() * len(y), False),
    "mean times a sum of ones": (lambda w, y: y.mean() * jnp.ones(len(y)).sum(), False),
    "mean times rows and a penalty": (lambda w, y: len(y) * (y.mean() + penalty(w, y)), False),
    "sum by a sum of the parameters": (lambda w, y: y.sum() / jnp.full(3, w).sum(), False),
    "penalty": (penalty, False),
    "root of a mean": (lambda w, y: jnp.sqrt(y.mean()), False),  # not understood
}


@pytest.mark.parametrize("name", TOTALS)
def test_which_totals_are_means(name):
    total, expected = TOTALS[name]

    def sizes(rows):
        def loss(w, x):
            y = squares(w, x)
            return total(w, y), jnp.float32(y.shape[0])

        return means.sizes(jax.make_jaxpr(loss)(1.0, jnp.ones((rows, 3))), 1)

    small, large = sizes(4), sizes(8)
    assert (small.may_be_mean and small.is_mean(large)) == expected


def test_a_mean_among_the_sums_of_aux(zero, shapes):
    def loss(params, batch):
        right = (batch["x"] @ params["w"]).argmax(-1) == batch["y"]
        aux = {"right": right.sum(), "accuracy": right.mean()}
        return loss_fn(params, batch).replace(aux=aux)

    text, = warned(lambda: zero.train_step(loss, TX).lower(shapes, BATCH))
    assert text.startswith("Loss.aux['accuracy'] is a mean")
    assert "give the sum instead" in text


def test_parameters_that_a_plain_gradient_reads_in_shards(zero):
    state = zero.create(lambda: {"params": small.weights()})

    @zero.jit
    def step(state, batch):
        return jax.value_and_grad(mean)(state["params"], batch)

    text, = warned(lambda: step.lower(state, BATCH))
    assert "params/w are multiplied without having been gathered" in text
    assert "zero.value_and_grad(loss)(params, batch) in place of jax.value_and_grad" in text


def test_a_source_without_batches(zero):
    once = iter([X])
    list(once)
    text, = warned(lambda: list(zj.feed(once, zero)))
    assert "(a list_iterator) has no batch" in text and "an earlier loop may have taken" in text
    text, = warned(lambda: list(zj.feed([], zero)))
    assert "(a list) has no batch" in text and "smaller than a batch" in text


def test_a_source_at_its_end_is_no_mistake(zero):
    source = zj.Indexed(lambda i: X, 3)
    feed = zj.feed(source, zero)
    feed.set_state({"next": 3})
    assert warned(lambda: list(feed)) == []
    feed = zj.feed([X], zero)
    assert warned(lambda: [len(list(feed)) for _ in range(2)]) == []


def test_create_sees_globals_that_have_changed(zero):
    """A notebook runs the cell that defines `width` again, but not the one that defines `make`."""
    def make():
        return {"params": jnp.ones((width, 8))}

    for width in (8, 16):
        assert zero.create(make)["params"].shape == (width, 8)
