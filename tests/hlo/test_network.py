"""The time of collectives by size and group, with values computed by hand."""

import pytest

from zerojax.hlo import network
from zerojax.hlo.collectives import Collective
from zerojax.hlo.program import Shape
from zerojax.hlo.speed import Speed

SPEED = Speed(flops=lambda dtype: 1.0, bandwidth=1.0, link=450e9, network=50e9, per_host=8,
              links=1.0)
GIB = 2**30


def takes(kind, elements, group):
    found = Collective("c", kind, (Shape("f32", (elements,)),), (tuple(group),), 1, True, "main",
                       "")
    return network.transfer(SPEED, found)


def test_a_large_gather_has_the_whole_bandwidth_and_a_step_for_each_member():
    made = takes("all-gather", GIB // 4, range(8))
    assert made.occupied == pytest.approx(7 / 8 * GIB / 450e9)
    assert made.latency == pytest.approx((8.4 + 7 * 3.4) * 1e-6)
    assert made.link == "link"


def test_a_small_reduction_is_a_ring_in_a_host_and_a_tree_over_many():
    within, between = takes("all-reduce", 8, range(8)), takes("all-reduce", 8, range(512))
    assert within.latency == pytest.approx((3.6 + 14 * 0.47) * 1e-6)
    assert between.latency == pytest.approx((4.4 + 2 * (7 * 0.52 + 6 * 5.0)) * 1e-6)
    assert within.occupied < 1e-8 and between.occupied < 1e-7


def test_a_gather_over_many_hosts_goes_around_all_of_them():
    made = takes("all-gather", 4 * GIB, range(64))
    assert made.latency == pytest.approx((8.4 + 56 * 3.4 + 7 * 9.6) * 1e-6)
    assert made.link == "network"


def test_between_hosts_a_group_has_the_networks_of_its_members_in_a_host():
    one_each, all_of_each = range(0, 64, 8), range(64)
    slow, fast = (takes("reduce-scatter", GIB, group).occupied for group in (one_each, all_of_each))
    assert slow == pytest.approx(7 / 8 * 4 * GIB / 50e9)
    assert fast == pytest.approx(63 / 64 * 4 * GIB / (8 * 50e9))


def test_a_permute_is_one_step():
    assert takes("collective-permute", GIB, (0, 1)).latency == pytest.approx((8.4 + 3.4) * 1e-6)
    assert takes("collective-permute", GIB, (0, 8)).latency == pytest.approx((8.4 + 9.6) * 1e-6)


def test_a_permutation_takes_as_long_as_its_slowest_pair():
    pairs = tuple((i, (i + 1) % 64) for i in range(64))
    found = Collective("c", "collective-permute", (Shape("f32", (GIB // 4,)),), pairs, 1, True,
                       "main", "")
    assert network.transfer(SPEED, found).occupied == pytest.approx(GIB / 50e9)


def test_a_ring_of_one_gpu_in_each_host_has_steps_between_hosts_only():
    made = takes("all-gather", GIB // 4, range(0, 64, 8))
    assert made.latency == pytest.approx((8.4 + 7 * 9.6) * 1e-6)
    assert made.occupied == pytest.approx(7 / 8 * GIB / 50e9)


def test_an_all_to_all_leaves_the_host_on_the_network_card_of_each_device():
    """The devices of a ring share all cards of a host."""
    exchange, ring = takes("all-to-all", GIB // 4, range(64)), takes("reduce-scatter", GIB // 4,
                                                                     range(64))
    assert exchange.link == ring.link == "network"
    assert exchange.occupied == pytest.approx(56 / 64 * GIB / 50e9)
    assert ring.occupied == pytest.approx(63 / 64 * GIB / 400e9)
