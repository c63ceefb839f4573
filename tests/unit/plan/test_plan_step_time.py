"""Step times against closed forms of small cases, and in the direction in which layouts differ."""

from dataclasses import replace

import pytest

from mcore_rl.plan.parameters import StageParameters
from mcore_rl.plan.step_time import (
    BANDWIDTH_SHARE,
    COLLECTIVE_S,
    COMPUTE_SHARE,
    LINK_SHARE,
    Model,
    Speeds,
    Trainer,
    Work,
    decode_time,
    forward_time,
    sync_time,
    train_time,
    update_time,
)
from mcore_rl.types import Layout

ARCH = {
    "num_layers": 4,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_query_groups": 2,
    "kv_channels": 4,
}
DENSE = Model(arch=ARCH, total=1_000_000, experts=0, vocab=100_000)
EXPERTS = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_layer_freq": [0, 1, 1, 1]}
MOE = Model(arch=ARCH | EXPERTS, total=1_000_000, experts=800_000, vocab=100_000)
WORK = Work.of([10, 20], [5, 15, 20, 40], updates=2)
# One operation, byte, ... a second.
ONE = Speeds(
    tflops=1e-12 / COMPUTE_SHARE,
    memory_tb_s=1e-12 / BANDWIDTH_SHARE,
    link_gb_s=1e-9 / LINK_SHARE,
    network_gb_s=1e-10 / LINK_SHARE,
    host_gb_s=1e-9 / LINK_SHARE,
)


def trainer(layout, **other):
    given = {
        "devices_per_node": 8,
        "stages": [StageParameters(layers=(0,), dense=600, experts=300, frozen=0)] * layout.pp,
        "optimizer_bytes": 70,
        "budget": 1000,
        "recomputes": False,
        "adapters_only": False,
        "dtype": "bfloat16",
    }
    return Trainer(layout=layout, **(given | other))


def test_the_work_of_a_step_is_that_of_its_samples():
    lengths = [15, 25, 40, 60]
    assert (WORK.tokens, WORK.squares) == (sum(lengths), sum(n * n for n in lengths))
    assert (WORK.samples, WORK.longest, WORK.longest_response, WORK.mean) == (4, 60, 40, 35)


def test_a_forward_pass_is_two_operations_per_weight_and_causal_attention():
    # Scores and values: 2 x 2 x heads x 4 x n^2 / 2 in each of 4 layers.
    attention = 4 * 2 * 2 * 4 * WORK.squares
    flops = 2 * 900_000 * WORK.tokens + attention
    assert forward_time(DENSE, WORK, ONE, trainer(Layout())) == pytest.approx(flops)
    # Of the experts two of eight: 100,000 of attention and router, 200,000 of experts.
    flops = 2 * 300_000 * WORK.tokens + attention
    assert forward_time(MOE, WORK, ONE, trainer(Layout())) == pytest.approx(flops)


def test_training_is_three_products_four_with_recomputation_two_with_adapters():
    forward = forward_time(DENSE, WORK, ONE, trainer(Layout()))
    of_updates = WORK.updates * 2 * 70

    def products(**how):
        return (train_time(DENSE, WORK, ONE, trainer(Layout(), **how)) - of_updates) / forward

    assert products() == pytest.approx(3)
    assert products(recomputes=True) == pytest.approx(4)
    assert products(adapters_only=True) == pytest.approx(2)


def test_a_pipeline_waits_as_long_as_it_fills():
    alone = forward_time(DENSE, WORK, ONE, trainer(Layout()))
    layout = Layout(pp=4)
    one = forward_time(DENSE, WORK, ONE, trainer(layout, budget=1000))
    assert one == pytest.approx(alone / 4 * (1 + 3))
    seven = forward_time(DENSE, WORK, ONE, trainer(layout, budget=20))
    assert seven == pytest.approx(alone / 4 * (1 + 3 / 7))
    interleaved = forward_time(DENSE, WORK, ONE, trainer(replace(layout, vpp=2), budget=20))
    assert interleaved == pytest.approx(alone / 4 * (1 + 3 / 14))


def test_tensor_parallel_ranks_gather_and_scatter_twice_a_layer():
    found = forward_time(DENSE, WORK, ONE, trainer(Layout(tp=2)))
    alone = forward_time(DENSE, WORK, ONE, trainer(Layout()))
    exchange = 4 * 4 * WORK.tokens * 8 * 2 / 2
    assert found == pytest.approx(alone / 2 + exchange)
    far = forward_time(DENSE, WORK, ONE, trainer(Layout(tp=2), devices_per_node=1))
    assert far == pytest.approx(alone / 2 + 10 * exchange)


def test_rows_of_experts_go_there_and_back_over_the_network_where_the_group_is_larger():
    layout = Layout(dp=4, ep=4)
    alone = forward_time(MOE, WORK, ONE, trainer(replace(layout, ep=1)))
    rows = WORK.tokens / 4 * 2 * 8 * 2 * 3  # topk, hidden, bytes, layers
    sent = 2 * rows * 3 / 4
    near = forward_time(MOE, WORK, ONE, trainer(layout))
    assert near == pytest.approx(alone + sent)
    half = forward_time(MOE, WORK, ONE, trainer(layout, devices_per_node=2))
    assert half == pytest.approx(alone + sent / 2 + 10 * sent / 2)


def test_an_update_reduces_gradients_and_gathers_weights_of_what_has_copies():
    layout = Layout(dp=4, ep=2)
    found = update_time(ONE, trainer(layout))
    assert found == pytest.approx((600 * 3 / 4 + 300 * 1 / 2) * (4 + 2) + 2 * 70)
    assert update_time(ONE, trainer(Layout())) == 2 * 70


def test_decoding_reads_weights_and_caches_once_a_round():
    # Compute is no limit: 1e6 operations a second.
    speeds = replace(ONE, tflops=ONE.tflops * 1e12)

    def seconds(model=DENSE, **how):
        given = {"engine": 1, "num_engines": 1, "sequences": 2, "kv_bytes": 3, "dtype": "bfloat16"}
        return decode_time(model, WORK, speeds, **(given | how))

    # 4 samples of 20 tokens, 2 at a time: 40 rounds, as many as the longest takes.
    cache = 2 * (15 + 20 / 2) * 3
    assert seconds() == pytest.approx(40 * (2 * 900_000 + cache), rel=1e-6)
    assert seconds(sequences=1) == pytest.approx(80 * (2 * 900_000 + cache / 2), rel=1e-6)
    # Two sequences that pick two of eight experts each leave (3/4)^2 of them unread.
    read = 100_000 + 800_000 * (1 - (3 / 4) ** 2)
    assert seconds(MOE) == pytest.approx(40 * (2 * read + cache), rel=1e-6)
    exchange = 2 * 4 * (2 * 1 / 2 * 2 * 8 * 2 + COLLECTIVE_S)
    assert seconds(engine=2) == pytest.approx(40 * (900_000 + cache + exchange), rel=1e-6)


def test_weights_travel_once_more_to_engines_elsewhere():
    layout = Layout(tp=2)
    near = sync_time(DENSE, ONE, trainer(layout), is_apart=False, dtype="bfloat16")
    assert near == pytest.approx(2_000_000)
    far = sync_time(DENSE, ONE, trainer(layout), is_apart=True, dtype="bfloat16")
    assert far == pytest.approx(2_000_000 + 20_000_000)
