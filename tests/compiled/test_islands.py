"""No collective of a step crosses islands, and an average sends one all-reduce of shards."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import optax
import pytest
import quick

import zerojax as zj

TX = optax.adam(1e-3)
BF16 = zj.Precision(compute="bfloat16")
PER_HOST = 8  # "h200:2x8": each island is one host
DILOCO = optax.sgd(0.7, momentum=0.9, nesterov=True)


class MLP(nn.Module):
    """[batch, 512] to [batch, 512], both matrices are sharded."""

    @nn.compact
    def __call__(self, x):
        for width in (2048, 512):
            x = nn.gelu(nn.Dense(width, use_bias=False, dtype=jnp.bfloat16)(x))
        return x


def mlp():
    model, x = MLP(), jax.ShapeDtypeStruct((1, 512), jnp.bfloat16)

    def loss(variables, x):
        return zj.Loss((model.apply(variables, x) ** 2).sum(), x.shape[0])

    return models.Case(model.init, loss, (jax.random.key(0), x),
                       lambda n: jax.ShapeDtypeStruct((64 * n, 512), jnp.bfloat16))


CASES = {"mlp": mlp, **models.CASES}
SPECS = [(case, stage, outer) for case in ("mlp", "scanned", "resnet", "nnx")
         for stage, outer in ((3, DILOCO), (1, None))]


def planned(case, stage, outer=None, loss=None, islands=2, **options):
    """Returns the plan of a step of islands on 2 hosts of 8 GPUs, and the state's shapes."""
    case = CASES[case]()
    zero = zj.Zero(zj.make_mesh(topology="h200:2x8", islands=2), stage, precision=BF16)
    islands = zero.islands(islands, every=100, outer=outer)
    state = islands.abstract(case.init, TX, *case.example)
    step = islands.train_step(loss or case.loss, TX, **options)
    return step.plan(state, case.batch(16 * options.get("accumulate", 1))), state


def hosts(groups):
    """Returns the sets of hosts that groups of devices belong to."""
    return {frozenset(device // PER_HOST for device in group) for group in groups}


@pytest.mark.parametrize("case, stage, outer", quick.some(SPECS, SPECS[0].__eq__))
def test_only_the_average_crosses_islands_and_sends_what_theory_says(case, stage, outer):
    plan, state = planned(case, stage, outer, accumulate=2)
    plan.check()
    groups = {c.name: hosts(c.groups) for c in plan.step.reading.collectives}
    assert len(groups) > 1 and set(map(frozenset, groups.values())) == {
        frozenset({frozenset({0}), frozenset({1})})}
    for c in plan.average.reading.collectives:
        assert (c.kind, {s.dtype for s in c.shapes}) == ("all-reduce", {"f32"})
        assert all(sorted(d % PER_HOST for d in g) == [g[0]] * 2 for g in c.groups)
    # 2 (n - 1) / n * 4 bytes for each parameter and statistic on a device, with n = 2
    averaged = jax.tree.leaves((state.islands.params, state.islands.model_state))
    expected = sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in averaged)
    assert plan.average.sent == pytest.approx(expected, rel=1e-3)
    assert plan.round_bytes == expected
    assert plan.sent == plan.step.sent + plan.average.sent / 100
    assert plan.fits and "average of 2 islands, every 100 steps" in " ".join(str(plan).split())


@pytest.mark.slow
def test_a_loss_that_crosses_islands_is_a_finding():
    case = mlp()

    def loss(variables, x):
        result = case.loss(variables, x)
        return result.replace(aux=jax.lax.pmean(result.total, "island"))

    plan, _ = planned("mlp", 3, loss=loss)
    with pytest.raises(zj.PlanError, match=r"over island.*it crosses islands, which should train"):
        plan.check()


@pytest.mark.slow
def test_several_islands_on_a_group_of_devices_average_before_they_send():
    plan, _ = planned("mlp", 3, islands=4)
    plan.check(allow=r"all-gather of bf16\[2,64,512\]")  # of examples, within a group
    assert plan.average.sent == planned("mlp", 3)[0].average.sent
