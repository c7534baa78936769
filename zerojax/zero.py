"""`Zero`: a policy with verbs. What each does is in the files below; here is how they are called."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.core import meta
from jax.sharding import AbstractMesh, NamedSharding

from zerojax import trees
from zerojax.data import batch as batches
from zerojax.errors import ModelError, PolicyError
from zerojax.gather import models
from zerojax.layout import padded, placement, report, rules, scanned
from zerojax.layout.report import Layout
from zerojax.layout.rules import Leaf, Placement
from zerojax.plan import plan
from zerojax.plan.demand import Demand
from zerojax.plan.plan import Plan
from zerojax.policy import Policy
from zerojax.processes import agreement, fingerprint
from zerojax.train import donation, optimizer, transforms
from zerojax.train import state as states
from zerojax.train.jitted import Jitted
from zerojax.train.loss_scale import LossScale
from zerojax.train.state import TrainState
from zerojax.train.step import EvalStep, TrainStep


def _nnx_names(state) -> dict[int, str]:
    """The paths of an NNX state's parameters, by their place among its leaves."""
    flat = jax.tree.leaves_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {i: trees.path_of(path) for i, (path, x) in enumerate(flat) if isinstance(x, nnx.Param)}


def _shapes(state):
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state) if abstract else jax.eval_shape(lambda: state)


def _shaped(build, shardings, *args):
    shape = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return padded.mapped(shape, jax.eval_shape(build, *args), shardings)


def _jitted(build, shardings):
    return jax.jit(build, out_shardings=shardings)


class Zero(Policy):
    """ZeRO as a sharding policy over a mesh (Rajbhandari et al. 2020, arXiv 1910.02054).

    Args:
      mesh: a `jax.sharding.Mesh` whose axes are of type Auto; `zj.make_mesh()` builds one.
      stage: what is whole, and when, within a step. At rest, stages 1 to 3 keep the same shards.
        0: everything always whole; 1: parameters gathered once a step, gradients reduced once a step;
        2: gradients reduced where they arise; 3: parameters gathered where the model reads them.
      precision: dtypes, see `Precision`.
      axis: the mesh axis or axes that one copy of the state is spread over.
      replica_axis: the axis of copies (hybrid sharding); "replica" if the mesh has one.
      gradients: "global", one loss over the whole batch (any model); "per_device", each device differentiates its part
        (exact when the loss is a sum over examples: `zj.Loss`. A bare mean becomes the mean of the devices' means, as
        in DDP). None: per device when the loss function returns a `Loss`, the model has no floating state (as batch
        statistics), and nothing in the loss's program stands against it: convolutions, shard_map or constraints over
        ZeRO's axes, cond, while_loop, callbacks, closed-over arrays of the batch's length.
      rules: regex for a parameter's whole path, as "blocks/.*/kernel", to the spec it shall have.
      min_shard: leaves of fewer elements stay whole.
      uneven: "pad": a parameter none of whose dimensions divides is kept, by `init`, with rows of zeros at its end (`zj.Padded`),
        sharded to within one row; the model sees its own shape, and so do numpy, checkpoints and exports. None: it stays whole.
        An optimizer that would see the padding is refused. With one loss its gradient is reduced whole.

    Raises:
      PolicyError: any of these that can't be, or can't be together.

    >>> import jax.numpy as jnp, optax, zerojax as zj
    >>> zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:2]), stage=3, min_shard=1)
    >>> state = zero.init(lambda: {"w": jnp.ones((4, 2))}, optax.sgd(0.1))
    >>> state.params["w"].sharding.spec
    P('data',)
    >>> step = zero.train_step(lambda params, x: (x @ params["w"]).mean(), optax.sgd(0.1))
    >>> state, metrics = step(state, jnp.ones((8, 4)))
    >>> float(metrics["loss"])
    4.0
    """

    def init(self, init_fn: Callable, tx, *args, trainable: Any = None, rng: jax.Array | None = None) -> TrainState:
        """A training state, born sharded: `init_fn(*args)` and `tx.init` run under jit with sharded results.

        Over GPUs that are not there, it is as `abstract`.

        Args:
          init_fn: returns a pytree of parameters, linen's dict of variables, or an NNX module; or is one that is there.
          tx: an optax transform.
          *args: arrays for `init_fn`.
          trainable: which parameters are trained: None, all; a regex for their whole paths, as "lora/.*"; a function of
            (path, array); or, of an NNX module, a filter, as `nnx.LoRAParam`. The others are frozen: sharded and gathered alike,
            of the dtype they came in, without gradient or optimizer state. `tx` sees None in their places.
          rng: the key that steps draw from; None derives one from the first key in `args`, else key(0).

        Raises:
          ModelError: `init_fn` returned no floating array, or a parameter that is not floating.
          LayoutError: a rule does not fit its leaf, or matches none; nothing is trained.
        """
        init_fn, args = states.given(self, init_fn, tx, args)
        state = self._born(lambda: self._planned(init_fn, tx, args, trainable, rng), *args)
        if not isinstance(self.mesh, AbstractMesh):  # a plan says it of the others
            states.warn_of_whole(self, state)
        return state

    def abstract(self, init_fn: Callable, tx, *args, trainable: Any = None, rng: jax.Array | None = None) -> TrainState:
        """What `init` would return, as `ShapeDtypeStruct`s with shardings; nothing is allocated."""
        init_fn, args = states.given(self, init_fn, tx, args)
        build, shardings = self._planned(init_fn, tx, args, trainable, rng)
        return _shaped(build, shardings, *args)

    def _born(self, plan, *args):
        """What `plan()`, a function and the shardings of its results, makes of `args`."""
        if isinstance(self.mesh, AbstractMesh):
            return _shaped(*plan(), *args)
        fields = lambda planned: {
            "state": fingerprint.shapes(_shaped(*planned, *args)), "arguments": fingerprint.values(args),
            "program": fingerprint.of_program(_jitted(*planned), *args)}
        return _jitted(*agreement.before(self, "zero.init", plan, fields))(*args)

    def _planned(self, init_fn, tx, args, trainable, rng):
        build = states.builder(self, *states.survey(self, init_fn, args, trainable), init_fn, tx, rng)
        abstract = jax.eval_shape(build, *args)
        optimizer.check_padding(tx, abstract.trained)
        return build, states.shardings(self, abstract)

    def create(self, make: Callable[[], Any]) -> Any:
        """`make()`, born sharded: any training state of your own, as flax's `TrainState`.

        Its parameters are what it holds as `params`; what has a parameter's path ending and shape lies as it does.
        """
        return self._born(lambda: (make, self._placed(make)))

    def _placed(self, make):
        """A sharding for each leaf of what `make` makes."""
        abstract = jax.eval_shape(make)
        params, places = self._ruled(abstract, scanned.stacked(jax.make_jaxpr(make)()))
        paths = [leaf.path for leaf in params.values()]
        rules.check_patterns("rule", self.rules, paths)
        rules.check_patterns("Precision.keep", dict(self.precision.keep), paths)
        rules.check_axes(list(params.values()), self.mesh.axis_names)
        return jax.tree.structure(abstract).unflatten([rules.sharding(self.mesh, p.spec) for p in places])

    def _ruled(self, state, scanned=None) -> tuple[dict[int, Leaf], list[Placement]]:
        """The parameters of an abstract state of the user's own, by their place among its leaves; and where the policy wants
        each leaf."""
        bases = models.named_axes(state)
        state = meta.unbox(state)  # of `nn.with_partitioning`'s boxes: their names are read, their arrays are the leaves
        leaves = placement.describe(state, bases, scanned)
        names = {i: name for i, leaf in enumerate(leaves) if (name := placement.param_name(leaf.path))} or _nnx_names(state)
        params = {i: dataclasses.replace(leaves[i], path=name) for i, name in names.items()}
        ruled = placement.place_state(self, list(params.values()), state)
        return params, [placement.fitting(self, rule, x) for rule, x in zip(ruled, jax.tree.leaves(state), strict=True)]

    def gathered(self, fn: Callable, argnums: int | Sequence[int] = 0) -> Callable:
        """`fn`, with the parameters in those arguments gathered where it reads them, as the stage says.

        For evaluation, sampling, teachers, several models in a step; also for `jax.grad`, which then sees one loss over the
        whole batch: its gradients are sharded, reduced in the compute dtype, and may be differentiated again in reverse mode.
        Call it within `zero.jit` (or `jax.jit`).

        Args:
          fn: of any arguments; is given parameters whole, as arrays in the compute dtype.
          argnums: which arguments hold parameters: a pytree of arrays, an NNX module, or what `init` returned, of which `fn`
            is given the model. Variables that `fn` changes in an NNX module are changed in the one given, but for its
            `Param`s.

        >>> import jax.numpy as jnp, zerojax as zj
        >>> zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:2]), min_shard=1)
        >>> predict = zero.jit(zero.gathered(lambda params, x: x @ params["w"]), donate=False)
        >>> predict({"w": jnp.ones((4, 2))}, jnp.ones((2, 4))).tolist()
        [[4.0, 4.0], [4.0, 4.0]]
        """
        return transforms.gathered(self, fn, argnums)

    def value_and_grad(self, loss_fn: Callable, *, accumulate: int = 1, has_aux: bool = False,
                       batch_argnums: int | Sequence[int] = 1, scale: LossScale | None = None, trainable: Any = None) -> Callable:
        """As `jax.value_and_grad` by the first argument, with parameters gathered and gradients reduced as the stage says.

        Args:
          loss_fn: `loss_fn(params, batch, ...)`; returns a floating scalar, the mean, or `zj.Loss(total, weight)`, whose mean
            is differentiated. `params` is a pytree of arrays, an NNX module, or what `init` returned, of which it is given
            the model. Keys among the other arguments differ between microbatches and devices' parts.
          accumulate: microbatches; examples a, a + accumulate, ... form microbatch a.
          has_aux: it returns (that, aux): of a batch that is split, arrays of examples; or a `Loss`, whose sums over the whole
            batch are then the aux.
          batch_argnums: arguments whose arrays are split by their first dimension.
          scale: a `zj.LossScale`, for float16; the gradients come back without it.
          trainable: which parameters have gradients, as for `init`; a teacher or backbone is read alike. The
            transform is then to be given the trained alone (docs/recipes.md, "Freezing and LoRA"): flax's `apply_gradients` takes
            no None.

        Returns:
          a function with the arguments of `loss_fn` that returns (value, gradients), or ((value, aux), gradients). Gradients
          have the tree, dtypes and shardings of the parameters, None in place of frozen ones; an NNX module's are an `nnx.State`,
          as of `nnx.grad`.

        Raises:
          BatchError, LossError, PolicyError: as `train_step`.

        >>> import jax.numpy as jnp, zerojax as zj
        >>> zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:2]), min_shard=1)
        >>> loss = lambda params, x: zj.Loss((x @ params["w"]).sum(), x.shape[0])
        >>> step = zero.jit(lambda state, x: zero.value_and_grad(loss)(state["params"], x), donate=False)
        >>> value, grads = step({"params": {"w": jnp.ones((4, 2))}}, jnp.ones((2, 4)))
        >>> float(value), grads["w"].sharding.spec
        (8.0, P('data',))
        """
        return transforms.value_and_grad(self, loss_fn, accumulate=accumulate, has_aux=has_aux, batch_argnums=batch_argnums,
                                         scale=scale, trainable=trainable)

    def jit(self, fn: Callable | None = None, *, donate: bool = True, batch_argnums: int | Sequence[int] | Mapping[int, Any] = 1,
            static_argnames=(), compiler_options: dict | None = None):
        """`jax.jit` for `fn(state, batch, ...)`: shardings follow the state, the batch is split over devices.

        Args:
          fn: a state in what it returns is placed where the one given was.
          donate: the state's memory is reused; write False for functions that do not return it, as evaluation.
          batch_argnums: arguments that are batches, also by name: their arrays are split by their first dimension, scalars are
            not. A dict says how: {1: P("data"), 2: {"nodes": P("data"), "globals": P()}}; () splits none.
          static_argnames, compiler_options: as jit's; static arguments are given by name.

        Warns:
          of parameters that `fn` multiplies without `gathered` or `value_and_grad`.
        """
        options = {"donate_argnums": (0,) if donate else (), "static_argnames": static_argnames,
                   "compiler_options": compiler_options, "batch_argnums": batch_argnums}
        return functools.partial(Jitted, self, **options) if fn is None else Jitted(self, fn, **options)

    def train_step(self, loss_fn: Callable, tx, *, accumulate: int = 1, clip_norm: float | None = None,
                   max_skipped: int | None = 50, compiler_options: dict | None = None) -> TrainStep:
        """A jitted `step(state, batch) -> (state, metrics)`; the state is donated.

        Args:
          loss_fn: `loss_fn(model, batch)` or `loss_fn(model, batch, rng)`; `model` is what `init_fn` returned, the batch is
            whole (or a device's part). The key goes to a parameter named `rng`, or to a third one without a default.
            Returns a floating scalar, the mean; or `zj.Loss(total, weight)`.
          tx: the optax transform that `init` was given.
          accumulate: microbatches; examples a, a + accumulate, ... form microbatch a.
          clip_norm: gradients of a larger global norm are scaled to it.
          max_skipped: so many steps in a row that are not finite raise, at most two calls late; None never raises.
          compiler_options: for XLA, as jit's.

        Returns:
          metrics are device scalars: `loss`, `grad_norm` (before clipping), `param_norm` (of the update tried), `weight`,
          `skipped` (in a row), `loss_scale` (float16), `aux` (over the weight). Reading one waits for the step; read the last's.

        Raises:
          BatchError: a batch that does not divide by devices x accumulate.
          LossError: a loss that is no floating scalar.
          PolicyError: a wish that the way to differentiate can't fulfil.
          NonFiniteError: see `max_skipped`.
        """
        return TrainStep(self, loss_fn, tx, accumulate=accumulate, clip_norm=clip_norm, max_skipped=max_skipped,
                         compiler_options=compiler_options)

    def eval_step(self, loss_fn: Callable, *, compiler_options: dict | None = None) -> EvalStep:
        """A jitted `evaluate(state, batch) -> metrics` (`loss`, `weight`, `aux`) under the same policy; changes nothing.

        `loss_fn` is as for `train_step`; model state that it returns is dropped.
        """
        return EvalStep(self, loss_fn, compiler_options)

    def move(self, state: Any, other: "Zero") -> Any:
        """A state as another policy lays it out: another stage, mesh or number of devices. Every value stays as it is.

        Args:
          state: of this policy. Both are there until it is let go. Of one of your own (`create`), rules are by shape alone: which
            dimension a scan slices is known when it is made, not here. Where that matters write rules, or restore into `create`'s.
          other: its parameters' dtype is the same; a float16 policy begins with a loss scale of its own.

        Raises:
          PolicyError: parameters of another dtype, or devices that are not there.
        """
        ours, theirs = self.precision.params, other.precision.params
        if (ours, self.precision.keep) != (theirs, other.precision.keep):
            raise PolicyError(f"move changes where a state lies, not its dtype, but from {ours} parameters to {theirs}; write the "
                              "same Precision(params=...), or save and restore with cast=True.")
        donation.check_alive("move", state)
        if isinstance(other.mesh, AbstractMesh):
            raise PolicyError("move to GPUs that are not there; take a mesh of devices: zj.make_mesh().")
        if isinstance(state, TrainState):
            return states.moved(other, states.scaled(other, state))
        shardings = [rules.sharding(other.mesh, p.spec) for p in other._ruled(_shapes(state))[1]]
        return jax.device_put(state, jax.tree.structure(state).unflatten(shardings))

    def layout(self, state: Any) -> Layout:
        """Who holds what: prints as a table of leaves with shape, spec, bytes per device, and why one is whole."""
        return report.of(self, state, self._places(state))

    def _places(self, state) -> list[Placement]:
        if isinstance(state, TrainState):
            return jax.tree.leaves(states.lying(self, state), is_leaf=lambda x: isinstance(x, Placement))
        _, ruled = self._ruled(_shapes(state))
        return [placement.placed(self, rule, getattr(x, "sharding", None), x)
                for rule, x in zip(ruled, jax.tree.leaves(state), strict=True)]

    def plan(self, fn: Callable, state: Any, *args: Any, accumulate: int = 1, compiler_options: dict | None = None,
             cache: bool = True, **kwargs: Any) -> Plan:
        """What a jitted function of your own needs and moves, also one that zerojax had no hand in: memory, collectives, time.

        Steps of `train_step` and functions under `zero.jit` have a `plan` of their own, which says the same.

        Args:
          fn: `jax.jit`ted, of `state` and `args`.
          state: with the parameters as its `params`; arrays or `ShapeDtypeStruct`s with shardings.
          *args, **kwargs: arrays or shapes. Those without a sharding are split over the batch's devices where they divide.
          accumulate: microbatches in `fn`.
          compiler_options: those of `fn`.
          cache: whether the answer for the same program is looked up, and kept, on disk.

        Raises:
          ModelError: `state` has no params.
          CompileError: the compiler failed, with its last lines.
        """
        batches.check_mesh(self, (state, args, kwargs))
        if isinstance(fn, TrainStep):
            return fn.plan(state, *args, cache=cache)
        fn = fn.of(state, *args, **kwargs) if isinstance(fn, Jitted) else fn
        if not hasattr(fn, "trace"):
            raise ModelError(f"zero.plan takes a jitted function, not {fn!r}; write zero.plan(jax.jit(fn), state, ...).")
        leaves, places = self._params(state)
        if not leaves:
            raise ModelError(f"zero.plan was given a state ({type(state).__name__}) without params; ZeRO is about parameters: "
                             "give a state with an attribute or key `params`.")
        demand = Demand(self, leaves, places, accumulate, False)
        args, kwargs = batches.placed(self, args), batches.placed(self, kwargs)
        return plan.make(demand, self.layout(state), batches.local_bytes((args, kwargs)), fn, (state, *args), kwargs,
                         compiler_options or {}, cache=cache)

    def _params(self, state) -> tuple[tuple[Leaf, ...], tuple[Placement, ...]]:
        """Of a state: its parameters, and where they lie."""
        if isinstance(state, TrainState):
            return states.read(self, state)
        params, _ = self._ruled(_shapes(state))
        places = self._places(state)
        return tuple(params.values()), tuple(places[i] for i in params)

    def share(self) -> tuple[int, int]:
        """Which share of every batch this process brings to `feed`, and of how many: (0, 1) for one process.

        Processes whose devices hold the same examples (tensor parallelism between them) bring the same share.

        >>> import zerojax as zj
        >>> zj.Zero(zj.make_mesh()).share()
        (0, 1)

        Raises:
          BatchError: the mesh has no device of this process.
        """
        return batches.share(self)

    def batch_sharding(self) -> NamedSharding:
        """Of a batch: its first dimension over every device."""
        return batches.sharding(self)
