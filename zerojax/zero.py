"""`Zero`: a policy with methods. This file documents them; the wings below implement them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding

from zerojax import trees
from zerojax.data import batch as batches
from zerojax.errors import ModelError, message_last
from zerojax.layout.report import Layout
from zerojax.plan.plan import Plan
from zerojax.policy import Policy
from zerojax.processes import joining
from zerojax.train import creation, islands, matrices, planning, state_layout, transforms
from zerojax.train.islands import Islands
from zerojax.train.jitted import Jitted
from zerojax.train.loss_scale import LossScale
from zerojax.train.state import TrainState
from zerojax.train.step import EvalStep, TrainStep


class Zero(Policy):
    """ZeRO as a sharding policy over a mesh (Rajbhandari et al. 2020, arXiv 1910.02054).

    Args:
      mesh: a `jax.sharding.Mesh` whose axes are of type Auto; `zj.make_mesh()` builds one.
      stage: which arrays are whole, and when, within a step. Between steps, stages 1 to 3 keep
        the same shards. 0: everything is always whole. 1: parameters are gathered once per step,
        gradients are reduced once per step (with one loss over the batch: as in stage 2).
        2: gradients are reduced where they arise. 3: parameters are gathered where the model reads
        them.
      precision: the dtypes, see `Precision`.
      axis: the mesh axis or axes over which one copy of the state is sharded; None means "data",
        and "host" before it if the mesh has one.
      replica_axis: the axis of copies (hybrid sharding); "replica" if the mesh has one.
      secondary: the last of the axes, such as "data" on a mesh of hosts and devices: stage 3
        gathers a parameter over the other axes first, keeps the result for the backward pass of a
        rematerialized block, and gathers that over `secondary` (hpZ of ZeRO++, arXiv 2306.10209,
        section 3.2). None: one gather over all axes, and again in the backward pass.
      wire: the formats in which parameters and gradients travel, see `Wire`.
      gradients: "global": one loss over the whole batch, for any model. "per_device": each device
        differentiates its own part of the batch, which is exact when the loss is a sum over
        examples (`zj.Loss`); a bare mean becomes the mean of the devices' means, as in DDP.
        None: "per_device" when the loss function returns a `Loss`, the model has no floating state
        such as batch statistics, and the loss's program has no convolution, shard_map or
        constraint over ZeRO's axes, cond, while_loop, callback, or closed-over array of the
        batch's length; otherwise "global".
      rules: from a regex for a parameter's whole path, such as "blocks/.*/kernel", to its spec.
      min_shard: leaves with fewer elements stay whole.
      uneven: "pad": `init` keeps a parameter that has no divisible dimension as a `zj.Padded`,
        sharded, with rows of zeros at its end (fewer than there are devices); the model, numpy,
        checkpoints and exports see its own shape. An optimizer that would see the padding is
        refused, and with one loss over the batch, the parameter's gradient is reduced whole.
        None: it stays whole.

    Raises:
      PolicyError: an invalid argument, or a combination that cannot work.
      ClusterError: a launcher has started several processes, which `zj.initialize` has not joined.

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

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.mesh, AbstractMesh):  # simulated GPUs need no other process
            joining.check_joined()

    def init(self, init_fn: Callable, tx, *args, trainable: Any = None,
             rng: jax.Array | None = None) -> TrainState:
        """Creates a training state in shards: `init_fn(*args)` and `tx.init` run under jit.

        Over simulated GPUs, returns the same as `abstract`.

        Args:
          init_fn: a function that returns a pytree of parameters, linen's dict of variables, or an
            NNX module; or such a model itself, without `args`.
          tx: an optax transform.
          *args: arrays for `init_fn`.
          trainable: the parameters to train. None: all; a regex for whole paths, such as
            "lora/.*"; a function of (path, array); or, for an NNX module, a filter such as
            `nnx.LoRAParam`. The others are frozen: they are sharded and gathered too, keep the
            dtype from `init_fn`, and have no gradient or optimizer state; `tx` sees None instead.
          rng: the key from which steps draw; None derives one from the first key in `args`, or
            uses `jax.random.key(0)` if there is none.

        Raises:
          ModelError: `init_fn` returned no floating array, or a trained parameter is not floating.
          LayoutError: a rule does not fit its leaf or matches none, or no parameter is trained.
        """
        with message_last:
            init_fn, args = creation.given(self, init_fn, tx, args)
            state = creation.create(
                self, lambda: creation.maker(self, init_fn, tx, args, trainable, rng), *args)
        if not isinstance(self.mesh, AbstractMesh):  # a plan of the others shows it
            creation.warn_of_whole(self, state)
            creation.warn_of_wire(self, state)
        return state

    def abstract(self, init_fn: Callable, tx, *args, trainable: Any = None,
                 rng: jax.Array | None = None) -> TrainState:
        """Returns the state of `init` as `ShapeDtypeStruct`s with shardings; allocates nothing."""
        with message_last:
            init_fn, args = creation.given(self, init_fn, tx, args)
            return creation.maker(self, init_fn, tx, args, trainable, rng).abstract(*args)

    def create(self, make: Callable[[], Any]) -> Any:
        """Creates a training state of your own, such as `flax.training.TrainState`, in shards.

        `make` returns the state. The parameters are the leaves under the key or attribute `params`.
        A leaf with the shape of a parameter, whose path ends in the parameter's path, is sharded
        like the parameter.
        """
        with message_last:
            creation.check_own(self, make)
            return creation.create(self, lambda: creation.maker_of_own(self, make))

    def gathered(self, fn: Callable, argnums: int | Sequence[int] = 0) -> Callable:
        """Returns `fn` with parameters gathered where it reads them, according to the stage.

        Use it within `zero.jit` or `jax.jit`, for evaluation, sampling, teachers, or several models
        in one step. `jax.grad` can differentiate it, as one loss over the whole batch: gradients
        are sharded, are reduced in the compute dtype, and can be differentiated again in reverse
        mode.

        Args:
          fn: takes any arguments, and parameters as whole arrays in the compute dtype.
          argnums: the arguments that hold parameters: a pytree of arrays, an NNX module, or a state
            of `init`, from which `fn` gets the model. Variables that `fn` changes in an NNX module
            are changed in the given module too, except its `Param`s.

        Raises:
          PolicyError: at the call, if `argnums` is empty or names an argument that is not there.

        >>> import jax.numpy as jnp, zerojax as zj
        >>> zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:2]), min_shard=1)
        >>> predict = zero.jit(zero.gathered(lambda params, x: x @ params["w"]), donate=False)
        >>> predict({"w": jnp.ones((4, 2))}, jnp.ones((2, 4))).tolist()
        [[4.0, 4.0], [4.0, 4.0]]
        """
        return transforms.gathered(self, fn, argnums)

    def value_and_grad(self, loss_fn: Callable, *, accumulate: int = 1, has_aux: bool = False,
                       batch_argnums: int | Sequence[int] = 1, scale: LossScale | None = None,
                       trainable: Any = None) -> Callable:
        """Like `jax.value_and_grad`, but gathers and reduces according to the stage.

        Args:
          loss_fn: `loss_fn(params, batch, ...)`; returns a floating scalar, the mean, or
            `zj.Loss(total, weight)`, whose mean is differentiated. `params` is a pytree of arrays,
            an NNX module, or a state of `init`, from which `loss_fn` gets the model. Keys among the
            other arguments differ between microbatches, and between the devices' parts.
          accumulate: microbatches; examples a, a + accumulate, ... form microbatch a.
          has_aux: `loss_fn` returns (loss, aux), where aux holds arrays of examples if the batch is
            split; or it returns a `Loss`, and aux is that `Loss` summed over the whole batch.
          batch_argnums: the arguments whose arrays are split by their first dimension.
          scale: a `zj.LossScale`, for float16; the returned gradients are unscaled.
          trainable: the parameters that get gradients, as for `init`; `loss_fn` reads all of them.
            The optimizer must then be given the trained ones alone (see the recipe "Freezing and
            LoRA"): flax's `apply_gradients` does not accept None.

        Returns:
          a function with the arguments of `loss_fn` that returns (value, gradients), or
          ((value, aux), gradients). Gradients have the tree, dtypes and shardings of the
          parameters, with None in place of frozen ones; those of an NNX module are an `nnx.State`,
          as for `nnx.grad`.

        Raises:
          BatchError, LossError, PolicyError: as for `train_step`.

        >>> import jax.numpy as jnp, zerojax as zj
        >>> zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:2]), min_shard=1)
        >>> loss = lambda params, x: zj.Loss((x @ params["w"]).sum(), x.shape[0])
        >>> step = zero.jit(lambda state, x: zero.value_and_grad(loss)(state["params"], x),
        ...                 donate=False)
        >>> value, grads = step({"params": {"w": jnp.ones((4, 2))}}, jnp.ones((2, 4)))
        >>> float(value), grads["w"].sharding.spec
        (8.0, P('data',))
        """
        return transforms.value_and_grad(
            self, loss_fn, accumulate=accumulate, has_aux=has_aux, batch_argnums=batch_argnums,
            scale=scale, trainable=trainable)

    def jit(self, fn: Callable | None = None, *, donate: bool = True,
            batch_argnums: int | Sequence[int] | Mapping[int, Any] = 1, static_argnames=(),
            compiler_options: dict | None = None):
        """Jits `fn(state, batch, ...)`: shardings follow the state, the batch is split.

        Args:
          fn: the function. A state among its results keeps the shardings of the given state.
          donate: whether the state's memory is reused; write False for a function that does not
            return the state, such as an evaluation.
          batch_argnums: the arguments that are batches, also when passed by name. Their arrays are
            split by their first dimension; scalars are not. A dict gives specs instead:
            {1: P("data"), 2: {"nodes": P("data"), "globals": P()}}; () splits nothing.
          static_argnames, compiler_options: as in `jax.jit`; pass static arguments by name.

        Warns:
          if `fn` multiplies parameters without `gathered` or `value_and_grad`.
        """
        options = {"donate_argnums": (0,) if donate else (), "static_argnames": static_argnames,
                   "compiler_options": compiler_options, "batch_argnums": batch_argnums}
        if fn is None:
            return functools.partial(Jitted, self, **options)
        return Jitted(self, fn, **options)

    def train_step(self, loss_fn: Callable, tx, *, accumulate: int = 1,
                   clip_norm: float | None = None, max_skipped: int | None = 50,
                   compiler_options: dict | None = None) -> TrainStep:
        """Returns a jitted `step(state, batch) -> (state, metrics)`, which donates the state.

        Args:
          loss_fn: `loss_fn(model, batch)` or `loss_fn(model, batch, rng)`, where `model` is the
            result of `init_fn`, and the batch is a whole microbatch or one device's part of it. The
            key is passed to a parameter named `rng`, or to a third parameter without a default. The
            loss is a floating scalar, the mean, or `zj.Loss(total, weight)`.
          tx: the optax transform that was given to `init`.
          accumulate: microbatches; examples a, a + accumulate, ... form microbatch a.
          clip_norm: gradients with a larger global norm are scaled to this norm.
          max_skipped: this many consecutive non-finite steps raise `NonFiniteError`, up to two
            calls later; None never raises.
          compiler_options: options for XLA, as in `jax.jit`.

        Returns:
          the step. It is jitted already: within another function that jax traces, `max_skipped` is
          not checked, and the state's memory is not reused. Its metrics are device scalars: `loss`,
          `grad_norm` (before clipping), `param_norm` (after the update, also of a skipped one),
          `weight`, `skipped` (consecutive skipped steps), `loss_scale` (float16), `aux` (divided by
          the weight). Reading a metric waits for its step: read those of the previous step.

        Raises:
          BatchError: the number of examples is not divisible by devices x accumulate.
          LossError: the loss is not a floating scalar.
          PolicyError: the way to differentiate does not support a setting.
          NonFiniteError: see `max_skipped`.
        """
        return TrainStep(self, loss_fn, tx, accumulate=accumulate, clip_norm=clip_norm,
                         max_skipped=max_skipped, compiler_options=compiler_options)

    def eval_step(self, loss_fn: Callable, *, compiler_options: dict | None = None) -> EvalStep:
        """Returns a jitted `evaluate(state, batch) -> metrics` (`loss`, `weight`, `aux`).

        The state is not changed. `loss_fn` is the same as for `train_step`; model state in its
        result is dropped.
        """
        return EvalStep(self, loss_fn, compiler_options)

    def islands(self, n: int, *, every: int, outer: Any = None, axis: str = "island") -> Islands:
        """Returns `n` islands: groups of devices that train alone and average once in a round.

        Local SGD (Lin et al. 2018, arXiv 1808.07217) and DiLoCo (Douillard et al. 2023, arXiv
        2311.08105). Each island is a ZeRO group of its own over this policy's axes and takes its
        part of every batch. After every `every` steps, the islands' parameters are averaged; the
        state of `tx` stays each island's own.

        Args:
          n: the number of islands: the size of `axis`, or a multiple of it. Each group of devices
            then trains several, one after the other, and moves their examples between its devices.
          every: the number of steps from one average to the next.
          outer: None for the plain average, or an optax transform, which takes the mean move of a
            round (old parameters minus the mean of the new ones) as a gradient. DiLoCo uses
            `optax.sgd(0.7, momentum=0.9, nesterov=True)`.
          axis: the mesh axis over which the islands are split, none of ZeRO's own;
            `zj.make_mesh(islands=n)` has it.

        Raises:
          PolicyError: an invalid argument, or a mesh without the axis.

        >>> import jax.numpy as jnp, optax, zerojax as zj
        >>> mesh, tx = zj.make_mesh(islands=2, devices=jax.devices()[:2]), optax.sgd(0.1)
        >>> islands = zj.Zero(mesh).islands(2, every=3)
        >>> state = islands.init(lambda: {"w": jnp.float32(0)}, tx)
        >>> step = islands.train_step(lambda params, x: ((x - params["w"]) ** 2).mean(), tx)
        >>> for _ in range(4):  # three steps, an average and a step, with one example for each
        ...     state, metrics = step(state, jnp.array([1.0, 3.0]))
        >>> [f"{loss:.2f}" for loss in metrics["loss"]], f"{islands.average(state).params['w']:.2f}"
        (['0.00', '4.10'], '1.18')
        """
        return islands.of(self, n, every, outer, axis)

    def whole_matrices(self, tx: Any) -> Any:
        """Returns an optax transform that updates as `tx` does, but multiplies whole matrices.

        For `optax.contrib.muon`, Shampoo, SOAP and other transforms with products of matrices,
        which XLA would otherwise compute on shards, with a reduction after each product. Momenta
        stay on shards. Before its products, one all-to-all moves the mesh axis from a matrix's rows
        or columns to the stack of matrices, and one after them moves it back. Each device then
        computes whole matrices that no other device computes. A stack is the first dimension of
        layers that a scan has stacked, or is made of the matrices that `tx` treats alike. A matrix
        without others like it is gathered, and every device computes the same.

        Args:
          tx: an optax transform. Where it has no products (Adam, LAMB), nothing is moved.

        Returns:
          the transform, whose state has the tree and the layout of the state of `tx`. At stage 0 or
          with one device, `tx` itself.

        >>> import jax.numpy as jnp, optax, zerojax as zj
        >>> zero = zj.Zero(zj.make_mesh(devices=jax.devices()[:2]), min_shard=1)
        >>> tx = zero.whole_matrices(optax.contrib.muon(0.1))
        >>> state = zero.init(lambda: {"a": jnp.ones((16, 4)), "b": jnp.ones((16, 4))}, tx)
        >>> step = zero.train_step(lambda params, x: (x @ params["a"] @ params["b"].T).mean(), tx)
        >>> state, metrics = step(state, jnp.ones((8, 16)))
        >>> float(metrics["loss"])
        64.0
        """
        return matrices.whole_matrices(self, tx)

    def move(self, state: Any, other: "Zero") -> Any:
        """Returns a state with the layout of another policy: another stage, mesh or device count.

        Every value stays the same.

        Args:
          state: a state of this policy. Both states take memory until this one is released, but
            share the arrays that `other` leaves where they are: a step takes these from both. For
            a state of your own (`create`), `other` places leaves by shape and rules alone, because
            only `create` can see which dimension a scan slices. Where that matters, write rules, or
            restore a checkpoint into a state that `other` created.
          other: a policy with the same parameter dtypes. If only it computes in float16, the loss
            scale starts anew.

        Raises:
          PolicyError: `other` has other parameter dtypes, or no devices.
        """
        return state_layout.moved(self, state, other)

    def layout(self, state: Any) -> Layout:
        """Returns the placement of each leaf: shape, spec, bytes per device, and why it is whole.

        It prints as a table.
        """
        return state_layout.layout(self, state)

    def plan(self, fn: Callable, state: Any, *args: Any, accumulate: int = 1,
             compiler_options: dict | None = None, cache: bool = True, **kwargs: Any) -> Plan:
        """Returns the memory, collectives and time of a jitted function of your own.

        It need not use zerojax. Steps of `train_step` and functions under `zero.jit` have a `plan`
        method, which returns the same.

        Args:
          fn: a `jax.jit`ted function of `state`, `args` and `kwargs`.
          state: a state with the attribute or key `params`, of arrays or of `ShapeDtypeStruct`s
            with shardings.
          *args: arrays or shapes. Those without a sharding are split over the batch's devices
            where they divide.
          **kwargs: more of them, by name.
          accumulate: the number of microbatches in `fn`.
          compiler_options: those of `fn`.
          cache: whether the plan of the same program is looked up and kept on disk.

        Raises:
          ModelError: `state` has no params.
          PolicyError: `fn` already has the settings that were given.
          CompileError: the compiler failed; the text has its last lines.
        """
        if isinstance(fn, TrainStep):
            planning.check_settings("train_step", accumulate=accumulate > 1, kwargs=kwargs,
                                    compiler_options=compiler_options)
            return fn.plan(state, *args, cache=cache)
        if isinstance(fn, Jitted):
            planning.check_settings("jit", compiler_options=compiler_options)
            return fn.plan(state, *args, accumulate=accumulate, cache=cache, **kwargs)
        if not hasattr(fn, "trace"):
            raise ModelError(f"zero.plan was given {trees.kind(fn)}, not a jitted function; write "
                             "zero.plan(jax.jit(fn), state, batch), or step.plan(state, batch).")
        return planning.planned(self, fn, state, args, kwargs, accumulate=accumulate,
                                compiler_options=compiler_options, cache=cache)

    def share(self) -> tuple[int, int]:
        """Returns which share of every batch this process brings to `feed`, and of how many.

        It is (0, 1) for one process. Processes whose devices hold the same examples (tensor
        parallelism between them) bring the same share.

        >>> import zerojax as zj
        >>> zj.Zero(zj.make_mesh()).share()
        (0, 1)

        Raises:
          BatchError: the mesh has no device of this process.
        """
        return batches.share(self)

    def batch_sharding(self) -> NamedSharding:
        """Returns a batch's sharding: the first dimension is split over replicas and shards."""
        return batches.sharding(self)
