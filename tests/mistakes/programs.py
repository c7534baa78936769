"""Programs with a mistake: what they share, the table of them, and the check of the message.

A program takes `u`, which holds what is right in it. The message has what was given and what to
write, in one paragraph, and is the last of what Python prints.
"""

import types

import flax.linen as nn
import numpy as np
import optax
import pytest
import small
from flax import nnx
from flax.training.train_state import TrainState
from small import TX, X

import zerojax as zj

Y = np.zeros(16, np.int32)
BATCH = {"x": X, "y": Y}
LINEN = nn.Dense(16)


def loss_fn(params, batch):
    logits = batch["x"] @ params["w"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return zj.Loss(losses.sum(), losses.size)


def mean(params, batch):
    return (batch["x"] @ params["w"]).mean()


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, x):
        return self.dense(x)


def create():
    return TrainState.create(apply_fn=None, params=small.weights(), tx=TX)


def right():
    """Returns policies, states and steps that fit together."""
    zero = small.zero()

    @zero.jit
    def own_step(state, batch):
        value, grads = zero.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), value

    return types.SimpleNamespace(
        zero=zero, state=zero.init(small.weights, TX), step=zero.train_step(loss_fn, TX),
        evaluate=zero.eval_step(loss_fn), own_state=zero.create(create), own_step=own_step,
        other=small.zero(4))


class Table(dict):
    """Mistakes by name: the program, and the class and words of the error that it gets."""

    def add(self, kind, *words):
        def decorator(program):
            self[program.__name__] = program, kind, words
            return program

        return decorator


def check(u, program, kind, words):
    """Runs a program and checks its message; the states of `u` stay usable."""
    with pytest.raises(kind) as caught:
        program(u)
    error = caught.value
    text = "\n".join([str(error), *getattr(error, "__notes__", [])])
    assert [word for word in words if word not in text] == [], text
    assert "JAX_TRACEBACK_FILTERING" not in text, "jax's note is below the message"
    ours = kind.__module__.startswith("zerojax")
    assert isinstance(error, zj.ZeroError) == ours
    assert not ours or "\n" not in str(error)
    assert not any(x.is_deleted() for state in (u.state, u.own_state)
                   for x in (state.step, *state.params.values()))
