"""Two processes that are about to run different programs, one thing after the other; each prints the error, and goes on."""

import functools
import sys

import jax
import numpy as np
import optax

import zerojax as zj

rows = np.ones((8, 4), np.float32)
compiled = []


def init(key, width=16):
    return {"w": jax.random.normal(key, (4, width))}


def loss(params, x):
    return zj.Loss((x @ params["w"]).sum(), x.shape[0])


def other_loss(params, x):
    return zj.Loss((x @ params["w"]).sum() * 2, x.shape[0])


def of_model(scale):
    return lambda params, x: zj.Loss(jax.numpy.tanh(x @ params["w"]).sum() * scale, x.shape[0])


def fed(zero):
    return next(iter(zj.feed([rows], zero)))


def step(zero, loss=loss, tx=None, **options):
    tx, made = tx or optax.sgd(0.1), zero.init(init, optax.sgd(0.1), jax.random.key(0))
    compiled.clear()
    return zero.train_step(loss, tx, **options)(made, fed(zero))


def looped(zero, fn):
    made = zero.init(init, optax.sgd(0.1), jax.random.key(0))
    compiled.clear()
    return zero.jit(fn, donate=False)(made, fed(zero))


def cases(second, mesh):
    """What differs on the second process, by name."""
    zero = functools.partial(zj.Zero, mesh, min_shard=1)
    yield "stage", lambda: zero(1 if second else 3).init(init, optax.sgd(0.1), jax.random.key(0))
    yield "seed", lambda: zero().init(init, optax.sgd(0.1), jax.random.key(1 if second else 0))
    yield "model", lambda: zero().init(functools.partial(init, width=32 if second else 16), optax.sgd(0.1), jax.random.key(0))
    yield "precision", lambda: zero(precision=zj.Precision(compute="bfloat16" if second else None)).init(
        init, optax.sgd(0.1), jax.random.key(0))
    other_mesh = zj.make_mesh(replica=2 if second else 1)
    yield "mesh", lambda: zj.Zero(other_mesh, min_shard=1).init(init, optax.sgd(0.1), jax.random.key(0))
    yield "optimizer", lambda: zero().init(init, optax.adam(0.1) if second else optax.sgd(0.1), jax.random.key(0))
    yield "accumulate", lambda: step(zero(), accumulate=2 if second else 1)
    yield "loss", lambda: step(zero(), other_loss if second else loss)
    yield "code", lambda: step(zero(), of_model(2.0 if second else 1.0))
    yield "rate", lambda: step(zero(), tx=optax.sgd(0.2 if second else 0.1))
    yield "loop", lambda: looped(zero(), lambda state, x: x * (2 if second else 1))
    devices = jax.devices()[::-1] if second else jax.devices()
    yield "devices", lambda: zj.Zero(zj.make_mesh(devices=devices), min_shard=1).init(init, optax.sgd(0.1), jax.random.key(0))
    yield "init fails", lambda: zero().init((lambda: {}["wide"]) if second else (lambda: init(jax.random.key(0))), optax.sgd(0.1))
    yield "loss fails", lambda: step(zero(), (lambda params, x: params["v"]) if second else loss)
    made, batch = zero().init(init, optax.sgd(0.1), jax.random.key(0)), fed(zero())
    yield "evaluation", lambda: zero().eval_step(other_loss if second else loss)(made, batch)
    yield "call", lambda: (zero().train_step(loss, optax.sgd(0.1))(made, batch) if second
                           else zero().init(init, optax.sgd(0.1), jax.random.key(0)))


def main():
    zj.initialize()
    second, mesh = jax.process_index() == 1, zj.make_mesh()
    step(zj.Zero(mesh, min_shard=1))  # compiles what carries words between processes
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **of: compiled.append(of) if event.endswith("jaxpr_to_mlir_module_duration") else None)
    for name, run in cases(second, mesh):
        compiled.clear()
        try:
            run()
            print(f"{name}: no error", flush=True)
        except (zj.ClusterError, KeyError) as error:
            text = " ".join(f"{'KeyError: ' * isinstance(error, KeyError)}{error}".split())
            ours = [of["fun_name"] for of in compiled if "words_to_all" not in of["fun_name"]]
            print(f"{name}: compiled {ours}: {text}", flush=True)
    print("end", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
