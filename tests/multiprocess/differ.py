"""Two processes that are about to run different programs, case by case; each prints the error."""

import functools

import jax
import numpy as np
import optax

import zerojax as zj

SGD = optax.sgd(0.1)
rows = np.ones((8, 4), np.float32)
compiled = []  # of the case that runs


def init(key, width=16):
    return {"w": jax.random.normal(key, (4, width))}


def loss(params, x):
    return zj.Loss((x @ params["w"]).sum(), x.shape[0])


def other_loss(params, x):
    return zj.Loss((x @ params["w"]).sum() * 2, x.shape[0])


def scaled_loss(scale):
    """Returns a loss whose code is the same for every scale."""
    return lambda params, x: zj.Loss(jax.numpy.tanh(x @ params["w"]).sum() * scale, x.shape[0])


def fed(zero):
    return next(iter(zj.feed([rows], zero)))


def born(zero, init=init, tx=SGD, seed=0):
    return zero.init(init, tx, jax.random.key(seed))


def step(zero, loss=loss, tx=SGD, **options):
    state = born(zero)
    compiled.clear()
    return zero.train_step(loss, tx, **options)(state, fed(zero))


def looped(zero, fn):
    state = born(zero)
    compiled.clear()
    return zero.jit(fn, donate=False)(state, fed(zero))


def cases(second):
    """Yields (name, call) of each case; on the second process, something differs."""
    zero = functools.partial(zj.Zero, zj.make_mesh(), min_shard=1)
    other = zj.Precision(compute="bfloat16" if second else None)
    other_mesh = zj.make_mesh(replica=2 if second else 1)
    devices = jax.devices()[::-1] if second else jax.devices()
    reordered = zj.make_mesh(devices=devices)
    wider = functools.partial(init, width=32 if second else 16)
    yield "stage", lambda: born(zero(1 if second else 3))
    yield "seed", lambda: born(zero(), seed=1 if second else 0)
    yield "model", lambda: born(zero(), wider)
    yield "precision", lambda: born(zero(precision=other))
    yield "mesh", lambda: born(zj.Zero(other_mesh, min_shard=1))
    yield "optimizer", lambda: born(zero(), tx=optax.adam(0.1) if second else SGD)
    yield "accumulate", lambda: step(zero(), accumulate=2 if second else 1)
    yield "loss", lambda: step(zero(), other_loss if second else loss)
    yield "code", lambda: step(zero(), scaled_loss(2.0 if second else 1.0))
    yield "rate", lambda: step(zero(), tx=optax.sgd(0.2 if second else 0.1))
    yield "loop", lambda: looped(zero(), lambda state, x: x * (2 if second else 1))
    yield "devices", lambda: born(zj.Zero(reordered, min_shard=1))
    yield "init fails", lambda: born(zero(), (lambda key: {}["wide"]) if second else init)
    yield "loss fails", lambda: step(zero(), (lambda params, x: params["v"]) if second else loss)
    state, batch = born(zero()), fed(zero())
    yield "evaluation", lambda: zero().eval_step(other_loss if second else loss)(state, batch)
    yield "call", lambda: (zero().train_step(loss, SGD)(state, batch) if second
                           else born(zero()))


def count(event, duration, **of):
    if event.endswith("backend_compile_duration"):
        compiled.append(of["fun_name"])


def run(name, call):
    compiled.clear()
    try:
        call()
        print(f"{name}: no error", flush=True)
    except (zj.ClusterError, KeyError) as error:
        text = " ".join(f"{'KeyError: ' * isinstance(error, KeyError)}{error}".split())
        ours = [fun for fun in compiled if "words_to_all" not in fun]
        print(f"{name}: compiled {ours}: {text}", flush=True)


def main():
    zj.initialize()
    step(zj.Zero(zj.make_mesh(), min_shard=1))  # compiles the program that carries words
    jax.monitoring.register_event_duration_secs_listener(count)
    for name, call in cases(second=jax.process_index() == 1):
        run(name, call)


if __name__ == "__main__":
    main()
