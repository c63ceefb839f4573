"""The root files: errors that cross processes, registries, metrics that merge exactly, names of a
model's files."""

from __future__ import annotations

import itertools
import math
import pickle
import statistics
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl import cli, errors, metrics, tolerances
from mcore_rl.dtypes import BYTES, DTYPES, torch_dtype
from mcore_rl.errors import RunError, UserError, closest_hint, require, require_one_of
from mcore_rl.metrics import (
    Metric,
    deviation,
    masked_max,
    masked_mean,
    masked_min,
    masked_sizes,
    maximum,
    mean,
    merge,
    minimum,
    of_one_update,
    share,
    to_floats,
    to_host,
    total,
)
from mcore_rl.model_files import TIKTOKEN_FILES, VOCABULARY_FILES, has_tokenizer, model_files
from mcore_rl.registry import Registry
from mcore_rl.types import Layout

RUN_ERRORS = [
    RunError,
    errors.WorkerLostError,
    errors.EngineLostError,
    errors.HangError,
    errors.OffloadError,
    errors.RolloutError,
    errors.WeightSyncError,
    errors.CheckpointError,
]


@pytest.mark.parametrize("kind", RUN_ERRORS)
def test_a_run_error_crosses_processes_with_rank_role_and_step(kind):
    error = kind("the pipe broke", rank=3, role="actor", step=17)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.message, copy.rank, copy.role, copy.step) == ("the pipe broke", 3, "actor", 17)
    assert str(copy) == str(error) == "[role actor, rank 3, step 17] the pipe broke"


def test_every_run_error_of_the_module_is_among_those_tested():
    found = [x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, RunError)]
    assert set(found) == set(RUN_ERRORS)


def test_a_run_error_shows_only_what_is_known_of_its_place():
    assert str(RunError("x")) == "x"
    assert str(RunError("x", step=0)) == "[step 0] x"
    assert str(RunError("x", rank=0, role="rollout")) == "[role rollout, rank 0] x"


def test_a_user_error_crosses_processes():
    copy = pickle.loads(pickle.dumps(UserError("a.b=1 must be > 1.")))
    assert type(copy) is UserError
    assert str(copy) == "a.b=1 must be > 1."


def test_require_names_key_value_rule_and_way_out():
    require(True, "a.b", 0, "must be > 0")
    with pytest.raises(UserError, match=r"^a\.b='x' must be > 0\. Try 1\.$"):
        require(False, "a.b", "x", "must be > 0", "Try 1.")


def test_require_one_of_lists_the_allowed_and_names_the_closest():
    require_one_of("a.b", "linear", ("linear", "cosine"))
    with pytest.raises(
        UserError, match=r"^a\.b='cosin' is not one of linear, cosine\. Did you mean 'cosine'\?$"
    ):
        require_one_of("a.b", "cosin", ("linear", "cosine"))


def test_no_hint_is_given_when_nothing_is_close():
    assert closest_hint("zzz", ["grpo", "gpg"]) == ""


def test_a_registry_returns_what_was_registered_and_lists_names_in_order():
    registry: Registry = Registry("reward", "data_source")

    @registry.register("b")
    def second() -> int:
        return 2

    first = registry.add("a", object())
    assert registry.get("b") is second
    assert registry.get("a") is first
    assert registry.names() == list(registry) == ["a", "b"]
    assert "a" in registry
    assert "c" not in registry


def test_a_registry_takes_an_entry_twice_but_no_second_entry_of_the_name():
    registry: Registry = Registry("reward", "data_source")
    entry = registry.add("a", object())
    assert registry.add("a", entry) is entry  # a module that is imported again
    with pytest.raises(ValueError, match="reward 'a' is registered twice"):
        registry.add("a", object())
    assert registry.get("a") is entry


def test_a_registry_miss_names_key_closest_entry_and_all_entries():
    registry: Registry = Registry("policy loss", "actor.policy_loss.loss_mode")
    registry.add("geo_mean", 1)
    registry.add("vanilla", 2)
    with pytest.raises(UserError) as caught:
        registry.get("geomean")
    assert str(caught.value) == (
        "actor.policy_loss.loss_mode='geomean': there is no such policy loss. "
        "Did you mean 'geo_mean'? Registered: geo_mean, vanilla."
    )


# Merging: items are integers, so that sums are exact in float64 and equality can be demanded.
ITEMS = st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=12)


@st.composite
def split_items(draw):
    """Draw items, and the same items cut into consecutive parts, some of them empty."""
    items = draw(ITEMS)
    cuts = sorted(draw(st.lists(st.integers(0, len(items)), max_size=4)))
    edges = [0, *cuts, len(items)]
    return items, [items[a:b] for a, b in itertools.pairwise(edges)]


def describe(part: list[int]) -> metrics.Metrics:
    """Return what a micro-batch that holds `part` reports: tensors, as a device would."""
    values = torch.tensor(part, dtype=torch.float64)
    every = torch.ones(len(part), dtype=torch.bool)
    return {
        "x/mean": Metric(values.sum(), "mean", torch.tensor(float(len(part)))),
        "x/sum": total(values.sum()),
        "x/max": masked_max(values, every),
        "x/min": masked_min(values, every),
    }


@given(split_items())
@settings(deadline=None, max_examples=60)
def test_merged_metrics_do_not_depend_on_how_the_items_were_split(drawn):
    """Also proves that a part without items changes nothing."""
    items, parts = drawn
    expected = {
        "x/mean": sum(items) / len(items),
        "x/sum": sum(items),
        "x/max": max(items),
        "x/min": min(items),
    }
    assert to_floats(merge(map(describe, parts))) == expected


@given(split_items())
@settings(deadline=None, max_examples=60)
def test_a_deviation_is_that_of_all_items_however_they_were_split(drawn):
    """Also through the copy to the host, and where parts are empty."""
    items, parts = drawn
    merged = merge(to_host({"x/std": deviation(part)}) for part in parts)
    # Sums of squares of numbers of up to a million in float64.
    assert to_floats(merged)["x/std"] == pytest.approx(statistics.pstdev(items), rel=1e-9, abs=1e-9)


def test_parts_without_deviation_of_their_own_deviate_together():
    """As batches that are all wrong and all right."""
    assert to_floats(merge([{"k": deviation([0.0] * 4)}, {"k": deviation([1.0] * 4)}])) == {
        "k": 0.5
    }
    assert to_floats({"k": deviation([])}) == {}


@given(ITEMS, ITEMS, ITEMS)
@settings(deadline=None, max_examples=40)
def test_merging_is_associative_also_across_the_copy_to_the_host(a, b, c):
    a, b, c = describe(a), describe(b), describe(c)
    left = merge([to_host(merge([a, b])), to_host(c)])
    right = merge([a, to_host(merge([to_host(b), c]))])
    assert to_floats(left) == to_floats(right)


def test_means_are_weighted_by_what_they_average():
    merged = merge([{"k": mean(1.0, 3)}, {"k": mean(5.0, 1)}])
    assert to_floats(merged) == {"k": 2.0}


def test_a_mean_over_nothing_and_an_extreme_of_nothing_are_left_out():
    nothing = torch.zeros(2, dtype=torch.bool)
    values = torch.tensor([1.0, 2.0])
    empty = {
        "mean": masked_mean(values, nothing),
        "max": masked_max(values, nothing),
        "min": masked_min(values, nothing),
        "kept": total(0.0),
    }
    assert to_floats(empty) == {"kept": 0.0}
    assert to_floats(merge([empty, {"max": maximum(-3.0), "min": minimum(4.0)}])) == {
        "kept": 0.0,
        "max": -3.0,
        "min": 4.0,
    }


def test_masked_statistics_ignore_what_is_masked_even_if_it_is_not_a_number():
    values = torch.tensor([math.nan, 3.0, 1.0, math.inf])
    mask = torch.tensor([False, True, True, False])
    numbers = to_floats(
        {
            "mean": masked_mean(values, mask),
            "max": masked_max(values, mask),
            "min": masked_min(values, mask),
        }
    )
    assert numbers == {"mean": 2.0, "max": 3.0, "min": 1.0}


@given(
    st.lists(st.tuples(st.floats(width=32), st.booleans()), max_size=50),
)
def test_masked_sizes_are_to_the_last_bit_those_computed_one_by_one(rows):
    values = torch.tensor([value for value, _ in rows], dtype=torch.float32)
    mask = torch.tensor([is_kept for _, is_kept in rows], dtype=torch.bool)
    kept = values.clone()
    expected = {
        "x/mean": masked_mean(values, mask),
        "x/abs_mean": masked_mean(values.abs(), mask),
        "x/max": masked_max(values, mask),
    }
    found = masked_sizes("x", values, mask)
    assert repr(to_host(found)) == repr(to_host(expected))  # in which NaN is NaN
    assert torch.equal(values.nan_to_num(), kept.nan_to_num()), "the values stay"


def test_what_is_not_finite_is_shown():
    """An overflow must not look like a statistic over nothing."""
    numbers = to_floats({"mean": mean(math.nan), "max": maximum(math.nan)})
    assert math.isnan(numbers["mean"])
    assert math.isnan(numbers["max"])
    infinite = {"max": maximum(math.inf), "min": minimum(-math.inf), "mean": mean(-math.inf)}
    assert to_floats(infinite) == {"max": math.inf, "min": -math.inf, "mean": -math.inf}


@pytest.mark.parametrize("numbers", [(math.nan, 1.0), (1.0, math.nan)])
@pytest.mark.parametrize("kind", [maximum, minimum])
def test_a_nan_survives_the_merging_of_extremes_in_either_order(kind, numbers):
    merged = merge({"k": kind(number)} for number in numbers)
    assert math.isnan(to_floats(merged)["k"])


def test_metrics_of_one_key_must_reduce_alike():
    with pytest.raises(AssertionError, match="k: reduced by sum and by max"):
        merge([{"k": total(1.0)}, {"k": maximum(1.0)}])


def test_the_copy_to_the_host_keeps_values_weights_and_rules():
    moved = to_host({"a": Metric(torch.tensor(6.0), "mean", torch.tensor(3.0)), "b": maximum(2.0)})
    assert moved == {"a": Metric(6.0, "mean", 3.0), "b": Metric(2.0, "max")}
    assert all(isinstance(m.value, float) and isinstance(m.weight, float) for m in moved.values())


def test_shares_add_up_within_an_update_and_are_averaged_over_updates():
    updates = [merge([{"loss": share(0.25)}, {"loss": share(0.5)}]), {"loss": share(0.25)}]
    assert [to_floats(update) for update in updates] == [{"loss": 0.75}, {"loss": 0.25}]
    assert to_floats(merge(map(of_one_update, updates))) == {"loss": 0.5}


@pytest.mark.parametrize("name", [*VOCABULARY_FILES, *TIKTOKEN_FILES])
def test_a_vocabulary_goes_with_the_model_whether_or_not_transformers_can_load_it(tmp_path, name):
    (tmp_path / name).touch()
    assert has_tokenizer(tmp_path) == (name not in TIKTOKEN_FILES)
    assert model_files(tmp_path) == [tmp_path / name]


@pytest.mark.parametrize("command", ["--help", "verify", "report"])
@pytest.mark.starts_processes
def test_the_commands_are_run_as_a_module_too(command):
    """Without a main part the module would do nothing and end with 0."""
    done = subprocess.run(
        [sys.executable, "-m", "mcore_rl.cli", *[command] * (command != "--help"), "--help"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: mcore-rl")


def test_a_command_that_there_is_not_names_the_closest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mcore-rl", "verfy", "model"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: 'verfy' is not a command. Did you mean 'verify'?\n"


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (Layout(), ""),
        (Layout(dp=8), ""),
        (Layout(tp=2, etp=2, pp=2, vpp=2, cp=2), "tp2pp2vpp2cp2"),
        (Layout(tp=4, pp=2, ep=8, etp=1, dp=8), "tp4pp2ep8etp1"),
    ],
)
def test_a_layout_has_the_name_that_verify_reads(layout, name):
    assert layout.name == name


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_is_torch_s_of_that_name_and_has_a_tolerance(name):
    assert str(torch_dtype(name)) == f"torch.{name}"
    assert torch_dtype(name).itemsize == BYTES[name]
    assert tolerances.AFTER_SYNC[name] >= tolerances.FLOAT32
