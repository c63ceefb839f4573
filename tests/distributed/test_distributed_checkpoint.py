"""Training goes on from a checkpoint as if it had not stopped, in the same or another layout."""

import math
import re

import pytest
import torch

from mcore_rl.checkpoint_metadata import read_metadata
from mcore_rl.data.packing import SequenceCount
from mcore_rl.megatron.config import OptimConfig
from mcore_rl.torch_dist.source import TorchDistSource
from tests import actor_cases, checkpoint_cases, poison
from tests.actor_inputs import (
    EP2,
    ETP1,
    LORA,
    LORA_OF_EXPERTS,
    PP2,
    TP2,
    VPP2,
    actor_spec,
    layout_id,
    policy_objective,
    random_sequences,
)
from tests.tiny_models import save_tiny_checkpoint

# An epsilon of the size of gradients: the update depends on both moments and is not so sensitive to
# gradients near 0 that rounding shows. The rate differs in every step.
OPTIM = OptimConfig(lr=0.05, eps=0.01, lr_warmup_steps=8)
OBJECTIVE = policy_objective("vanilla", entropy_coeff=0.01)
ADAPTERS = {"lora": LORA}
CUT = SequenceCount(num_sequences=3)


def steps(seeds):
    """Return the commands of one step for each seed."""
    return [
        command
        for seed in seeds
        for command in (("begin_step",), ("update", random_sequences(seed), OBJECTIVE))
    ]


@pytest.fixture
def continued(processes, tiny_checkpoint, tmp_path):
    """Return a function: train three steps in one layout, begin a checkpoint, train two more there
    before it is ended, and train the same two in fresh workers of another layout that load it (and
    save a copy of what they loaded).

    It returns what every rank of the first and of the second had after loading or saving and after
    each of the two steps: (metrics, weights, Adam's state).
    """

    def run(name, saved_in, loaded_in):
        folder, copy = tmp_path / "saved", tmp_path / "copy"
        folder.mkdir()
        copy.mkdir()
        runs = []
        for (world_size, megatron), first in (
            (saved_in, [*steps(range(3)), ("begin_save", str(folder))]),
            (loaded_in, [("load", str(folder)), ("begin_save", str(copy))]),
        ):
            spec = actor_spec(tiny_checkpoint(name), optim=OPTIM, **megatron)
            script = [*first, *steps((3, 4)), ("end_save",)]
            by_rank = processes.run(actor_cases.run_script, world_size, spec, script, CUT)
            at = len(first) - 1
            runs.append([[answers[at], answers[at + 2], answers[at + 4]] for answers in by_rank])
        return runs

    return run


@pytest.mark.parametrize(
    ("name", "world_size", "megatron"),
    [
        ("qwen3", 1, {}),
        ("qwen3", 2, {"use_distributed_optimizer": False}),
        ("qwen2_tied", 2, VPP2),
        ("qwen3_moe", 2, EP2),
        ("qwen3_moe", 2, TP2 | ETP1),
        ("qwen3_moe", 2, EP2 | {"dtype": "bfloat16"}),  # masters in float32
        ("qwen3_moe", 2, EP2 | {"dtype": "bfloat16", "lora": LORA}),
        ("qwen3_moe", 1, {"lora": LORA_OF_EXPERTS}),  # the optimizer of all else is empty
    ],
    ids=layout_id,
)
def test_the_same_layout_goes_on_bit_by_bit(continued, name, world_size, megatron):
    """Weights, moments, step counters, learning rate and metrics, on every rank."""
    saved, loaded = continued(name, (world_size, megatron), (world_size, megatron))
    for rank in range(world_size):
        for expected, found in zip(saved[rank], loaded[rank], strict=True):
            metrics, weights, (counters, moments) = found
            assert metrics == expected[0]
            assert weights.keys() == expected[1].keys()
            assert all(torch.equal(weights[key], expected[1][key]) for key in weights)
            assert counters == expected[2][0]
            assert len(moments) == len(expected[2][1]) > 0
            assert all(map(torch.equal, moments, expected[2][1]))
        assert [metrics["actor/lr"] for metrics, *_ in loaded[rank][1:]] == pytest.approx(
            [0.05 * 4 / 8, 0.05 * 5 / 8], rel=1e-6
        )


def real(key, tensors):
    """Return a tensor without the rows of the vocabulary (61) that tensor parallelism adds."""
    has_padding = "word_embeddings" in key or "output_layer" in key
    return tensors[key][:61] if has_padding else tensors[key]


@pytest.mark.parametrize(
    ("name", "saved_in", "loaded_in"),
    [
        ("qwen3", (2, TP2), (1, {})),
        ("qwen2_tied", (2, PP2), (2, TP2)),
        ("qwen2_tied", (2, VPP2), (1, {})),
        ("qwen3_moe", (2, TP2 | ETP1), (2, EP2)),
        ("qwen3_moe", (1, {}), (2, TP2)),
        ("qwen3_moe", (4, EP2), (2, TP2)),
        ("qwen2_tied", (2, TP2), (4, PP2)),
        ("qwen2_moe", (2, TP2 | EP2 | ETP1 | ADAPTERS), (1, ADAPTERS)),
        ("qwen2_moe", (1, ADAPTERS), (2, PP2 | ADAPTERS)),
    ],
)
def test_another_layout_goes_on_alike(continued, processes, tmp_path, name, saved_in, loaded_in):
    """Weights and moments bit by bit after loading; metrics and weights of two more steps up to
    rounding.

    With tied embeddings on two stages the optimizer's state lies in several padded buckets, which
    Megatron-Core 0.16.1 alone would save wrongly.
    """
    saved, loaded = continued(name, saved_in, loaded_in)
    folders = (tmp_path / "saved" / "actor", tmp_path / "copy" / "actor")
    written, copied = (
        processes.run(actor_cases.checkpoint_tensors, 1, folder)[0] for folder in folders
    )
    assert written.keys() == copied.keys()
    assert sum("exp_avg" in key for key in written) > 0
    assert [key for key in written if not torch.equal(real(key, written), real(key, copied))] == []
    at_save, *expected_steps = saved[0]
    for rank in loaded:
        after_load, *found_steps = rank
        assert all(torch.equal(after_load[1][key], at_save[1][key]) for key in at_save[1])
        for (metrics, weights, _), (expected, expected_weights, _) in zip(
            found_steps, expected_steps, strict=True
        ):
            assert metrics["actor/lr"] == expected["actor/lr"]
            # float32 sums in another order; observed 3.1e-7 (gradient norm), 3e-8 (loss), and
            # 1.6e-7 of the largest weight of a tensor.
            for key in ("actor/loss", "actor/grad_norm"):
                assert metrics[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-6)
            for key, weight in expected_weights.items():
                difference = (weights[key] - weight).abs().max() / weight.abs().max()
                assert difference <= 1e-6, key


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory):
    """Return a mixture of experts large enough that the padding of buffers hardly counts."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 96, "vocab_size": 512}
    save_tiny_checkpoint("qwen3_moe", folder, **sizes)
    return folder


@pytest.mark.parametrize(
    "megatron",
    [
        {"dtype": "bfloat16"},
        EP2,
        {"use_distributed_optimizer": False},
        TP2 | ETP1,
    ],
    ids=layout_id,
)
def test_ranks_copy_and_write_alike_and_gather_nothing(
    processes, wide_checkpoint, tmp_path, megatron
):
    """On four ranks. Each number of the checkpoint is copied once and by one rank, so memory is
    what is written, whatever the number of data-parallel ranks."""
    spec = actor_spec(wide_checkpoint, **megatron)
    by_rank = processes.run(checkpoint_cases.save_counting, 4, spec, str(tmp_path))
    source = TorchDistSource(tmp_path)
    stored = [(source.shape(key), source.dtype(key)) for key in source.tensor_keys()]
    copied = [of_rank for of_rank, _ in by_rank]
    assert sum(copied) == sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored)
    # Ranges of a buffer are equal with the padding that is not written: observed 1.0004. Norms and
    # routers, which tensor-parallel ranks have alike, are written by the first of them: 1.007.
    is_cut = "tensor_model_parallel_size" in megatron
    assert max(copied) <= (1.01 if is_cut else 1.001) * min(copied)
    for of_rank, in_file in by_rank:
        assert of_rank < in_file < 1.1 * of_rank  # what torch.save adds to each tensor: up to 1.055


@pytest.mark.parametrize(
    ("name", "world_size", "megatron"),
    [
        ("qwen3_moe", 2, EP2 | {"dtype": "bfloat16"}),
        ("qwen3", 2, {"use_distributed_optimizer": False, "dtype": "bfloat16"}),
    ],
    ids=layout_id,
)
def test_what_megatron_saved_by_itself_is_loaded(
    processes, tiny_checkpoint, tmp_path, name, world_size, megatron
):
    """As checkpoints were written before: gathered, by the first of the data-parallel ranks."""
    spec = actor_spec(tiny_checkpoint(name), optim=OPTIM, **megatron)
    folder = tmp_path / "actor"
    folder.mkdir()
    saved = processes.run(checkpoint_cases.save_by_megatron, world_size, spec, str(folder))
    found = processes.run(checkpoint_cases.loaded, world_size, spec, tmp_path)
    for (weights, (counters, moments)), (old_weights, (old_counters, old_moments)) in zip(
        found, saved, strict=True
    ):
        assert all(torch.equal(weights[key], old_weights[key]) for key in old_weights)
        assert counters == old_counters == [1] * len(counters)
        assert len(moments) == len(old_moments) > 0
        assert all(map(torch.equal, moments, old_moments))


def test_moments_are_the_checkpoint_s_and_rates_the_configuration_s(
    processes, tiny_checkpoint, tmp_path
):
    """A run that goes on from another's checkpoint may have another rate, decay or length."""
    other = OptimConfig(lr=0.02, eps=0.1, weight_decay=0.3, lr_decay_style="linear")
    folder = tiny_checkpoint("qwen3")
    script = [*steps(range(3)), ("begin_save", str(tmp_path)), ("end_save",)]
    [saved] = processes.run(actor_cases.run_script, 1, actor_spec(folder, optim=OPTIM), script, CUT)
    script = [("load", str(tmp_path)), *steps((3,))]
    [loaded] = processes.run(
        actor_cases.run_script, 1, actor_spec(folder, optim=other), script, CUT
    )
    (_, weights, (counters, moments)), (_, old_weights, (old_counters, old_moments)) = (
        loaded[0],
        saved[-1],
    )
    assert counters == old_counters == [3] * len(counters)
    assert all(map(torch.equal, moments, old_moments))
    assert all(torch.equal(weights[key], old_weights[key]) for key in old_weights)
    # The fourth of the ten steps of a linear decay from 0.02.
    assert loaded[-1][0]["actor/lr"] == pytest.approx(0.02 * (1 - 3 / 10), rel=1e-6)


def test_a_rank_that_cannot_write_is_named_and_the_checkpoint_before_stays(
    processes, tiny_checkpoint, tmp_path
):
    """A real limit on the size of files; with tensor parallelism every rank writes its shards."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    spec = actor_spec(tiny_checkpoint("qwen3"), **TP2)
    said = processes.run(actor_cases.failure_to_save, 2, spec, tmp_path, 4096)
    assert (
        said
        == [
            f"[role worker, actor.save, rank 1] {tmp_path}/second/actor cannot be written: "
            "OSError: [Errno 27] File too large"
        ]
        * 2
    )
    assert not (tmp_path / "second" / "actor" / "metadata.json").exists()
    tensors = processes.run(actor_cases.checkpoint_tensors, 1, tmp_path / "first" / "actor")[0]
    assert tensors


@pytest.mark.parametrize(
    ("part", "reason"),
    [("optimizer", "it has no optimizer.state.exp_avg."), ("schedule", "'schedule'")],
)
def test_a_checkpoint_without_optimizer_or_schedule_is_refused(
    processes, tiny_checkpoint, tmp_path, part, reason
):
    spec = actor_spec(tiny_checkpoint("qwen3"))
    folder = tmp_path / "actor"
    folder.mkdir()
    processes.run(actor_cases.save_without, 1, spec, folder, part)
    [said] = processes.run(actor_cases.failure_to_load, 1, spec, tmp_path)
    assert said.startswith(f"{folder} cannot be read: ")
    assert reason in said


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (
            "qwen3_one_group",
            "linear_qkv.weight is (2, 96, 32) there and (2, 128, 32) in this model",
        ),
        ("qwen3_moe", "it has no decoder.layers.mlp.linear_fc1"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    processes, tiny_checkpoint, tmp_path, other, reason
):
    script = [("begin_save", str(tmp_path)), ("end_save",)]
    processes.run(actor_cases.run_script, 1, actor_spec(tiny_checkpoint(other)), script, CUT)
    spec = actor_spec(tiny_checkpoint("qwen3"))
    [said] = processes.run(actor_cases.failure_to_load, 1, spec, tmp_path)
    assert said.startswith(f"{tmp_path}/actor cannot be read: ")
    assert reason in said
    assert "\n" not in said
    assert len(said) < 600


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("qwen3", "use_distributed_optimizer", False),
        ("qwen3_moe", "moe_router_freeze", True),
    ],
)
def test_an_optimizer_of_another_kind_is_one_line_that_names_the_option(
    processes, tiny_checkpoint, tmp_path, name, option, value
):
    """Megatron answers with lists of the keys that it misses."""
    script = [*steps(range(1)), ("begin_save", str(tmp_path)), ("end_save",)]
    folder = tiny_checkpoint(name)
    processes.run(actor_cases.run_script, 1, actor_spec(folder), script, CUT)
    changed = actor_spec(folder, **{option: value})
    [said] = processes.run(actor_cases.failure_to_load, 1, changed, tmp_path)
    assert said == (
        f"actor.megatron.{option}={value} is not what the checkpoint {tmp_path}/actor was saved "
        f"with, {not value}. Use the same, or another run folder."
    )


def put_in_front_of_the_metadata(folder, called):
    file = folder / ".metadata"
    file.write_bytes(poison.in_front_of(file.read_bytes(), called))
    return r"/\.metadata is refused, and nothing in it was run: it asks for posix\.mkdir, "


def put_in_place_of_the_common_state(folder, called):
    torch.save(poison.MakesFolder(called), folder / "common.pt")
    return r"/common\.pt is refused, and nothing in it was run: it asks for posix\.mkdir, "


def put_in_place_of_a_tensor(folder, called):
    """Its place in the file and its length stay."""
    index = next(iter(read_metadata(folder).storage_data))
    poison.put_in_place_of(folder, index, called)
    return r" is refused, and nothing in it was run: it asks for posix\.mkdir, "


@pytest.mark.parametrize(
    "put",
    [
        put_in_front_of_the_metadata,
        put_in_place_of_the_common_state,
        put_in_place_of_a_tensor,
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_poisoned_checkpoint_is_refused_in_one_line_and_nothing_is_run(
    processes, tiny_checkpoint, tmp_path, world_size, put
):
    spec = actor_spec(tiny_checkpoint("qwen3"))
    script = [("begin_save", str(tmp_path)), ("end_save",)]
    processes.run(actor_cases.run_script, world_size, spec, script, CUT)
    expected = put(tmp_path / "actor", tmp_path / "called")
    for said in processes.run(actor_cases.failure_to_load, world_size, spec, tmp_path):
        assert re.search(expected, said)
        assert "\n" not in said
        assert len(said) < 600
    assert not (tmp_path / "called").exists()
