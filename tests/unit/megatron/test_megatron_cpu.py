"""Megatron-Core on CPU: every name that `cpu.install` replaces does what Megatron needs of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mcore_rl.megatron.versions import TESTED
from tests.unit.megatron import cpu_cases as cases


@pytest.fixture
def on_cpu(processes):
    """Return a function: run a case in one process and return its result."""
    return lambda case, *args: processes.run(case, 1, *args)[0]


def test_a_second_install_changes_nothing(on_cpu):
    assert not any(on_cpu(cases.replaced_names))


@pytest.mark.starts_processes
def test_another_version_and_a_vanished_name_are_refused_before_and_by_name(tmp_path):
    """In a process of its own, since a refused install must have left torch as it was."""
    metadata = tmp_path / "megatron_core-0.99.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.99.0\n"
    )
    program = Path(cases.__file__).with_name("fresh_install.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "megatron-core 0.99.0 is not supported" in found["other_version"]
    assert ", ".join(TESTED) in found["other_version"]
    assert found["untouched"]
    assert "token_dispatcher.maybe_move_tensor_to_cpu is gone" in found["missing_name"]


@pytest.mark.starts_processes
def test_on_cuda_only_what_lacks_transformer_engine_is_repaired():
    """Megatron's router without it reads a name that its file does not define, and recomputation
    of a norm takes it to be there."""
    program = Path(cases.__file__).with_name("cuda_install.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {
        "untouched": True,
        "router_logits": [[1.5] * 4] * 2,
        "recomputes_in_fp8": False,
    }


def test_devices_streams_and_events_answer_for_the_cpu(on_cpu):
    device, event_is_done, cuda_is_there = on_cpu(cases.cuda_answers)
    assert device == "cpu"
    assert event_is_done
    assert not cuda_is_there


def test_literal_cuda_devices_of_four_modules_make_cpu_tensors(on_cpu):
    devices, other_names_are_torchs = on_cpu(cases.device_literals)
    assert devices == dict.fromkeys(("schedules", "moe_utils", "utils", "saver"), "cpu")
    assert other_names_are_torchs


def test_forks_go_on_with_their_own_random_numbers_and_leave_the_outer_ones(on_cpu):
    outer_alone, outer, inner, repeated = on_cpu(cases.draws_of_forks)
    assert outer == outer_alone
    assert inner[0] != inner[1]
    assert inner[0] + inner[1] == repeated
    assert inner[0] not in outer


def test_forks_nest_and_survive_exceptions(on_cpu):
    plain, interrupted = on_cpu(cases.nested_and_interrupted_forks)
    assert plain == interrupted
    assert len(set(plain)) == 3


def test_recomputation_draws_the_dropout_of_the_forward_pass_again(on_cpu):
    plain, recomputed = on_cpu(cases.recompute_with_dropout)
    assert plain == recomputed
    assert set(plain) == {0.0, 2.0}


def test_inside_the_mode_cuda_means_cpu_and_outside_it_does_not(on_cpu):
    inside, type_outside = on_cpu(cases.function_mode)
    assert inside == {
        "factory": "cpu",
        "index": "cpu",
        "to": "cpu",
        "same": True,
        "float": "torch.cuda.FloatTensor",
        "bfloat16": "torch.cuda.BFloat16Tensor",
        "cast": True,
        "cpu": "cpu",
    }
    assert type_outside == "torch.FloatTensor"


def test_adam_with_a_step_per_group_equals_torchs_adamw(on_cpu):
    ours, theirs, shape = on_cpu(cases.adam_states, 5)
    for mine, other in zip(ours, theirs, strict=True):
        # The same kernel or the same formula unfused; observed 6e-8.
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    assert shape == {"steps": [5, 5], "state": ["exp_avg", "exp_avg_sq"]}


def test_names_that_only_transformer_engine_or_cuda_would_set_are_there(on_cpu):
    assert on_cpu(cases.repaired_defects) == {
        "general_gemm": None,
        "fp8": False,
        "numbers": True,
        "tensor": True,
        "nothing": None,
        "adam": True,
    }


@pytest.mark.parametrize("sizes", [[1, 3], [4, 0]])
def test_unequal_parts_are_gathered_and_scattered(processes, sizes):
    parts, gathered, scattered = zip(
        *processes.run(cases.unequal_collectives, 2, sizes), strict=True
    )
    whole = torch.arange(sum(sizes) * 3).view(-1, 3).float() * 3  # 1 and 2 times, summed
    for rank in range(2):
        assert torch.equal(gathered[rank], torch.cat(parts))
        assert torch.equal(scattered[rank], whole.split(sizes)[rank])


def test_a_single_rank_keeps_its_buffers_without_a_collective(processes):
    ((gradients, parameters, by_group),) = processes.run(cases.buffers_of_a_step, 1)
    assert gradients.tolist() == parameters.tolist() == [0, 1, 2, 3]
    assert by_group == [False, False]


def test_two_ranks_sum_gradients_and_gather_parameters(processes):
    first, second = processes.run(cases.buffers_of_a_step, 2)
    assert [first[0].tolist(), second[0].tolist()] == [[1, 3], [5, 7]]
    for _, parameters, by_group in (first, second):
        assert parameters.tolist() == [0, 1, 2 * 2, 2 * 3]
        assert by_group == [True, True]
