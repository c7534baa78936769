"""The usual mistakes of a new user with states, meshes, settings and swapped arguments.

See `programs`. `test_errors.py`, `train/test_input_errors.py` and `train/test_donation.py` check
further ones.
"""

import jax
import optax
import pytest
import small
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from programs import BATCH, LINEN, TX, Net, Table, X, check, create, loss_fn, mean, right

import zerojax as zj

MISTAKES = Table()
mistake = MISTAKES.add


@pytest.fixture(scope="module")
def u():
    return right()


# 4: a foreign state


@mistake(zj.ModelError, "a flax.training.train_state.TrainState as its state",
         "zero.init(model.init, tx, jax.random.key(0), x)", "a step of your own under zero.jit")
def a_state_of_flax(u):
    u.step(create(), BATCH)


@mistake(zj.ModelError, "a dict as its state", "zero.init(model, tx)")
def parameters_for_a_state(u):
    u.evaluate(small.weights(), BATCH)


@mistake(zj.ModelError, "Net as its state", "zero.init(model, tx)")
def a_module_for_a_state(u):
    u.step(Net(nnx.Rngs(0)), BATCH)


@mistake(zj.ModelError, "state on 4 devices", "has 8 devices", "state = old.move(state, new)")
def a_state_of_another_mesh(u):
    u.step(u.other.init(small.weights, TX), BATCH)


@mistake(zj.ModelError, "zero.jit was given a state on 4 devices", "old.move(state, new)")
def an_own_state_of_another_mesh(u):
    u.own_step(u.other.create(create), BATCH)


@mistake(zj.ModelError, "float16", "no loss scale", "state = old.move(state, new)")
def a_state_without_loss_scale(u):
    half = small.zero(precision=zj.Precision(compute="float16"))
    half.train_step(loss_fn, TX)(u.state, BATCH)


@mistake(zj.ModelError, "parameter w is kept in float32", "bfloat16", "cast=True")
def a_state_of_another_dtype(u):
    half = small.zero(precision=zj.Precision(params="bfloat16"))
    half.train_step(loss_fn, TX)(u.state, BATCH)


@mistake(zj.ModelError, "state of shapes", "zero.abstract", "zero.init", "step.plan")
def a_state_of_shapes(u):
    u.step(u.zero.abstract(small.weights, TX), BATCH)


@mistake(zj.ModelError, "a whole training state", "flax.training.train_state.TrainState",
         "zero.value_and_grad(loss)(state.params, batch)")
def a_whole_state_is_differentiated(u):
    u.zero.value_and_grad(lambda state, batch: loss_fn(state.params, batch))(create(), BATCH)


@mistake(zj.PolicyError, "move was given", "zero.Zero", "moved = zero.move(state, other)")
def move_with_swapped_arguments(u):
    u.zero.move(u.other, u.state)


@mistake(zj.StateError, "zero.gathered was given a state whose memory", "Continue with the state")
def parameters_of_an_old_state(u):
    params = u.zero.create(create).params
    params["w"].delete()
    u.zero.gathered(mean)(params, BATCH)


# 5: another optimizer


@mistake(zj.ModelError, "state has no optimizer state", "step needs ScaleByAdamState", "0/mu/w",
         "zero.train_step(loss_fn, tx)")
def another_optimizer(u):
    u.zero.train_step(loss_fn, optax.adam(1e-3))(u.state, BATCH)


# 7 and 8: meshes and axes

EXPLICIT = ("jax.set_mesh", "{'data': 8} (axes of type Explicit)", "jax.set_mesh(zero.mesh)")


def _explicit():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,),
                         devices=jax.devices()[:8])


@mistake(zj.PolicyError, "zero.init was called under", *EXPLICIT)
def init_under_an_explicit_mesh(u):
    with jax.set_mesh(_explicit()):
        u.zero.init(small.weights, TX)


@mistake(zj.PolicyError, "train_step was called under", *EXPLICIT)
def a_step_under_an_explicit_mesh(u):
    with jax.set_mesh(_explicit()):
        u.step(u.state, BATCH)


@mistake(zj.PolicyError, "zero.create was called under", "{'data': 4}", "{'data': 8}")
def create_under_another_mesh(u):
    with jax.set_mesh(u.other.mesh):
        u.zero.create(create)


@mistake(zj.PolicyError, "zero.value_and_grad was called under", *EXPLICIT)
def value_and_grad_under_an_explicit_mesh(u):
    with jax.set_mesh(_explicit()):
        u.zero.value_and_grad(mean)(small.weights(), BATCH)


@mistake(zj.PolicyError, "('data',)", "['dp']", "zj.make_mesh()", "Zero(mesh, axis=('data',))")
def an_unknown_axis(u):
    zj.Zero(u.zero.mesh, axis="dp")


@mistake(zj.PolicyError, "replica_axis='dp'", "('data',)", "zj.make_mesh(replica=2)")
def an_unknown_replica_axis(u):
    zj.Zero(u.zero.mesh, replica_axis="dp")


@mistake(zj.PolicyError, "axis=0", "('data',)")
def the_number_of_an_axis(u):
    zj.Zero(u.zero.mesh, axis=0)


@mistake(zj.PolicyError, "batch_argnums={1:", "['dp']", "jax.P('data')")
def an_unknown_axis_for_the_batch(u):
    u.zero.jit(lambda state, batch: state, batch_argnums={1: P("dp")})


@mistake(zj.PolicyError, "devices=8", "jax.devices()[:8]")
def a_number_for_devices(u):
    zj.make_mesh(devices=8)


# 11: settings that are no numbers


@mistake(zj.PolicyError, "clip_norm='1.0'", "positive norm")
def a_norm_in_quotes(u):
    u.zero.train_step(loss_fn, TX, clip_norm="1.0")


@mistake(zj.PolicyError, "max_skipped='5'", "1 or more, or None")
def a_number_of_steps_in_quotes(u):
    u.zero.train_step(loss_fn, TX, max_skipped="5")


# 12: swapped arguments


@mistake(zj.ModelError, "wrong order", "state, metrics = step(state, batch)")
def the_batch_first(u):
    u.step(BATCH, u.state)


@mistake(zj.ModelError, "wrong order", "metrics = evaluate(state, batch)")
def the_batch_of_an_evaluation_first(u):
    u.evaluate(BATCH, u.state)


@mistake(zj.BatchError, "batch.params['w'] has 8", "first argument", "batch as the second")
def the_batch_of_an_own_step_first(u):
    u.own_step(BATCH, u.own_state.replace(params={"w": X[:8], "v": X}))


@mistake(zj.ModelError, "a tuple as its state", "state, metrics = step(state, batch)")
def the_metrics_with_the_state(u):
    u.step((u.state, {"loss": 1.0}), BATCH)


@mistake(zj.ModelError, "a dict as its state", "state, metrics = step(state, batch)")
def the_metrics_for_the_state(u):
    u.step({"loss": X[0, 0], "weight": X[0, 0]}, BATCH)


@mistake(zj.ModelError, "zero.init was given the optimizer as its first argument",
         "zero.init(model.init, tx, jax.random.key(0), x)")
def the_optimizer_first(u):
    u.zero.init(TX, LINEN.init, jax.random.key(0), X)


@mistake(zj.ModelError, "an array key<fry>[] as its second argument", "optax.adamw(1e-3)")
def no_optimizer(u):
    u.zero.init(LINEN.init, jax.random.key(0), X)


@mistake(zj.ModelError, "optimizer as its first argument", "zero.train_step(loss_fn, tx)")
def the_loss_second(u):
    u.zero.train_step(TX, loss_fn)


@mistake(zj.ModelError, "the function optax.adamw itself", "tx = optax.adamw(1e-3)")
def an_optimizer_that_was_not_called(u):
    u.zero.train_step(loss_fn, optax.adamw)


def swapped_loss_fn(batch, params):
    return loss_fn(params, batch)


@mistake(KeyError, "zerojax called swapped_loss_fn(model, batch)", "model is {'w': ",
         "batch is {'x': ", "change the loss or the batch")
def a_loss_with_the_batch_first(u):
    u.zero.train_step(swapped_loss_fn, TX)(u.state, BATCH)


@mistake(KeyError, "zerojax called swapped_loss_fn(batch, params)", "batch is {'w': ")
def a_loss_of_an_own_loop_with_the_batch_first(u):
    u.zero.value_and_grad(swapped_loss_fn)(small.weights(), BATCH)


@mistake(TypeError, "zerojax called <lambda>(model, batch)", "model is {'w': float32[8,16]}")
def a_loss_of_the_batch_alone(u):
    u.zero.train_step(lambda batch: 0.0, TX)(u.state, BATCH)


@mistake(zj.ModelError, "a zerojax.train.state.TrainState, not a jitted function",
         "zero.plan(jax.jit(fn), state, batch)")
def plan_with_the_state_first(u):
    u.zero.plan(u.state, u.step, BATCH)


# 13 and 14: a model or parameters for a function


@mistake(zj.ModelError, "linen module (Dense), which holds no parameters",
         "zero.init(model.init, tx, jax.random.key(0), x)")
def a_linen_module(u):
    u.zero.init(LINEN, TX, jax.random.key(0), X)


@mistake(TypeError, "zerojax called Net()", "zero.init(lambda: Net(nnx.Rngs(0)), tx)")
def an_nnx_class(u):
    u.zero.init(Net, TX)


@mistake(TypeError, "zerojax called Dense.init()", "after tx")
def init_without_its_arguments(u):
    u.zero.abstract(LINEN.init, TX)


@mistake(zj.ModelError, "a dict and arguments for it", "zero.init(model, tx)")
def parameters_with_arguments(u):
    u.zero.init(small.weights(), TX, jax.random.key(0), X)


@mistake(zj.ModelError, "given a str", "no function and holds no arrays", "zero.init(model, tx)")
def a_name_for_a_model(u):
    u.zero.init("model", TX)


@mistake(zj.ModelError, "flax.training.train_state.TrainState, not a function",
         "zero.create(create)")
def create_with_a_state(u):
    u.zero.create(create())


@mistake(zj.LossError, "a flax.linen.linear.Dense in place of the loss function",
         "calls model.apply(variables, x)", "zero.train_step(loss_fn, tx)")
def a_model_for_a_loss(u):
    u.zero.train_step(LINEN, TX)


@mistake(zj.LossError, "a dict in place of the loss function", "zero.eval_step(loss_fn)")
def parameters_for_a_loss(u):
    u.zero.eval_step(small.weights())


@mistake(zj.LossError, "Net in place of the loss function", "calls model(x)")
def a_module_for_a_loss(u):
    u.zero.value_and_grad(Net(nnx.Rngs(0)))


@mistake(zj.ModelError, "a dict, not a function", "zero.gathered(fn)(params, ...)")
def gathered_parameters(u):
    u.zero.gathered(small.weights())


@mistake(zj.ModelError, "a dict, not a function", "zero.jit(fn)")
def a_jitted_state(u):
    u.zero.jit(small.weights())


@mistake(zj.RecipeError, "a dict as its init_fn", "lambda: model.init(jax.random.key(0), x)")
def a_recipe_of_parameters(u):
    zj.Recipe(small.weights(), loss_fn, TX, BATCH)


# 15 and 16: precision and mesh


@mistake(zj.PolicyError, "precision='bf16'", 'zj.Precision(compute="bfloat16")')
def a_precision_by_name(u):
    zj.Zero(u.zero.mesh, precision="bf16")


@mistake(zj.PolicyError, "params='bf16'", 'zj.Precision(compute="bfloat16"), which keeps')
def a_dtype_for_a_precision(u):
    zj.Precision("bf16")


@mistake(zj.PolicyError, "compute='fp16'", 'zj.Precision(compute="float16")')
def a_short_name_of_a_dtype(u):
    zj.Precision(compute="fp16")


@mistake(zj.PolicyError, "compute=16", "bfloat16, float16, float32, float64")
def a_number_of_bits(u):
    zj.Precision(compute=16)


@mistake(zj.PolicyError, "mesh=None", "zj.Zero(zj.make_mesh(), stage=2)")
def no_mesh(u):
    zj.Zero(stage=2)


@mistake(zj.PolicyError, "mesh=2", "zj.Zero(zj.make_mesh(), stage=2)")
def the_stage_for_the_mesh(u):
    zj.Zero(2)


@mistake(zj.PolicyError, "mesh=a list", "zj.make_mesh(devices=devices)")
def devices_for_the_mesh(u):
    zj.Zero(jax.devices())


@mistake(zj.PolicyError, "mesh='h200:8x8'", "zj.make_mesh(topology='h200:8x8')")
def a_topology_for_the_mesh(u):
    zj.Zero("h200:8x8")


@pytest.mark.parametrize("name", MISTAKES)
def test_one_message_says_what_was_given_and_what_to_write(name, u):
    check(u, *MISTAKES[name])
