import logging
import math
import signal
import threading
import time

import pytest
from omegaconf import OmegaConf

from mcore_rl.errors import UserError
from mcore_rl.metrics import to_floats
from mcore_rl.rewards.base import CustomRewardConfig, RewardConfig
from mcore_rl.rewards.score import RewardScorer
from mcore_rl.rewards.time_limit import TimeLimitExceeded, time_limit
from mcore_rl.types import Prompt, Sample, SampleGroup


def _group(*responses, data_source="arithmetic", ground_truth="5"):
    prompt = Prompt(
        uid="train.parquet:3",
        token_ids=[1],
        text="2+3=",
        data_source=data_source,
        ground_truth=ground_truth,
        extra_info={"bonus": 10},
    )
    samples = [
        Sample(
            prompt=prompt,
            index=index,
            token_ids=[1, 2],
            loss_mask=[False, True],
            rollout_logprobs=[0.0, -1.0],
            finish_reason="stop",
            weight_version=0,
            response_text=response,
        )
        for index, response in enumerate(responses)
    ]
    return SampleGroup(prompt=prompt, samples=samples)


@pytest.fixture
def make_scorer(tmp_path):
    """Return a function that makes a scorer with a custom reward of the given body."""

    def make(body, prefix="", **options):
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        (tmp_path / "reward.py").write_text(
            "import asyncio, math, time\nimport numpy as np\n"
            f"{prefix}def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
            f"{lines}\n"
        )
        custom = CustomRewardConfig(path=str(tmp_path / "reward.py"))
        return RewardScorer(RewardConfig(**options), custom)

    return make


def _rewards(groups):
    return [sample.reward for group in groups for sample in group.samples]


def test_each_data_source_is_scored_by_its_own_reward():
    groups = [
        _group("2+3=5", "6"),
        _group("#### 5", "5", data_source="gsm8k"),
        _group("#### 5", data_source="openai/gsm8k"),
    ]
    scored, metrics = RewardScorer(RewardConfig(), CustomRewardConfig()).score(groups)
    assert _rewards(scored) == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert _rewards(groups) == [0.0] * 5, "the input is not changed"
    assert to_floats(metrics) == pytest.approx(
        {
            "reward/mean": 3 / 5,
            "reward/std": math.sqrt(3 / 5 * 2 / 5),
            "reward/num_errors": 0,
            "reward/failed_frac": 0,
        }
    )


def test_a_data_source_without_a_reward_is_refused_before_the_run():
    scorer = RewardScorer(RewardConfig(), CustomRewardConfig())
    scorer.check(["gsm8k", "arithmetic", "exact_number", "openai/gsm8k"])
    with pytest.raises(
        UserError, match=r"data_source='gsm8'.*Did you mean 'gsm8k'.*arithmetic.*custom_reward"
    ):
        scorer.check(["gsm8k", "gsm8"])


def test_a_custom_function_scores_every_data_source_with_all_arguments(make_scorer):
    scorer = make_scorer("return len(solution_str) + int(ground_truth) + extra_info['bonus']")
    scorer.check(["anything"])
    scored, _ = scorer.score([_group("ab", "abc", data_source="anything")])
    assert _rewards(scored) == [17.0, 18.0]


@pytest.mark.parametrize(
    "value", ["0.5", "{'score': 0.5}", "np.float32(0.5)", "np.float64(0.5)", "{'score': 1} and 0.5"]
)
def test_a_score_is_a_number_or_a_mapping_with_one(make_scorer, value):
    scored, _ = make_scorer(f"return {value}").score([_group("a")])
    assert _rewards(scored) == [0.5]
    assert type(_rewards(scored)[0]) is float


def test_an_async_function_is_awaited(make_scorer):
    scorer = make_scorer("await asyncio.sleep(0)\nreturn True", prefix="async ")
    scored, _ = scorer.score([_group("a")])
    assert _rewards(scored) == [1.0]


def test_further_numbers_are_logged_by_name_over_the_samples_that_have_them(make_scorer):
    scorer = make_scorer(
        "n = len(solution_str)\n"
        "return {'score': n, 'right': n > 1, 'pred': solution_str, **({'odd': n} if n % 2 else {})}"
    )
    scored, metrics = scorer.score([_group("a", "bb", "ccc")])
    assert [sample.reward_metrics for sample in scored[0].samples] == [
        {"right": 0.0, "odd": 1.0},
        {"right": 1.0},
        {"right": 1.0, "odd": 3.0},
    ]
    numbers = to_floats(metrics)
    assert numbers["reward/right/mean"] == pytest.approx(2 / 3)
    assert numbers["reward/odd/mean"] == 2.0
    assert "reward/pred/mean" not in numbers


FAILURES = {
    "raises": ("return 1 / (len(solution_str) - 2)", "ZeroDivisionError: division by zero"),
    "raises on two lines": (
        "if solution_str == 'bb':\n    raise ValueError('a\\nb')\nreturn 1",
        "ValueError: a b",
    ),
    "returns None": ("return None if solution_str == 'bb' else 1", "returned None, not a number"),
    "returns text": ("return '1' if solution_str == 'bb' else 1", "returned '1', not a number"),
    "returns NaN": ("return math.nan if solution_str == 'bb' else 1", "not a finite number"),
    "returns inf": ("return math.inf if solution_str == 'bb' else 1", "not a finite number"),
    "no score": ("return {'acc': 1} if solution_str == 'bb' else 1", "without 'score'.*'acc'"),
    "hangs": (
        "while solution_str == 'bb':\n    time.sleep(0.001)\nreturn 1",
        r"TimeLimitExceeded: no result after 0\.2 s",
    ),
    "hangs and catches its own errors": (
        "while solution_str == 'bb':\n"
        "    try:\n        time.sleep(0.001)\n    except Exception:\n        pass\n"
        "return 1",
        "TimeLimitExceeded",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_reward_stops_the_run_with_one_line_that_names_the_sample(make_scorer, name):
    body, problem = FAILURES[name]
    scorer = make_scorer(body, timeout_s=0.2)
    match = rf"'arithmetic' failed on train\.parquet:3 sample 1 .*{problem}.*reward\.on_error=zero"
    with pytest.raises(UserError, match=match) as caught:
        scorer.score([_group("a", "bb", "ccc")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_reward_scores_zero_and_is_counted_when_asked(make_scorer, caplog, name):
    body, _ = FAILURES[name]
    scorer = make_scorer(body, timeout_s=0.2, on_error="zero")
    with caplog.at_level(logging.WARNING):
        scored, metrics = scorer.score([_group("ccc", "bb", "ccc")])
    assert _rewards(scored) == [1.0, 0.0, 1.0]
    numbers = to_floats(metrics)
    assert numbers["reward/num_errors"] == 1
    assert numbers["reward/failed_frac"] == pytest.approx(1 / 3)
    assert "1 samples scored 0" in caplog.text


def test_an_async_function_that_hangs_is_interrupted(make_scorer):
    scorer = make_scorer("await asyncio.sleep(60)", prefix="async ", timeout_s=0.1)
    with pytest.raises(UserError, match="TimeLimitExceeded"):
        scorer.score([_group("a")])


def _in_thread(function):
    caught = []

    def run():
        try:
            caught.append(function())
        except UserError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return caught[0]


@pytest.mark.parametrize("on_error", ["raise", "zero"])
def test_a_limit_that_cannot_be_enforced_is_refused(make_scorer, on_error):
    scorer = make_scorer("return 1", on_error=on_error)
    error = _in_thread(lambda: scorer.score([_group("a")]))
    assert isinstance(error, UserError)
    assert str(error).startswith("reward.timeout_s=10.0 can be enforced in the main thread only")


def test_without_a_limit_any_thread_scores(make_scorer):
    scorer = make_scorer("return 1", timeout_s=None)
    scored, _ = _in_thread(lambda: scorer.score([_group("a")]))
    assert _rewards(scored) == [1.0]


def test_a_limit_leaves_an_outer_timer_and_its_handler_running():
    rung = []
    outer_handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    outer_timer = signal.setitimer(signal.ITIMER_REAL, 0.15)
    try:
        with pytest.raises(TimeLimitExceeded), time_limit(0.05, "key"):
            time.sleep(5)
        assert not rung
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < left <= 0.1
        time.sleep(0.3)
        assert rung == [True]
    finally:
        signal.signal(signal.SIGALRM, outer_handler)
        signal.setitimer(signal.ITIMER_REAL, *outer_timer)


def test_a_block_within_its_limit_is_not_interrupted_later():
    with time_limit(0.05, "key"):
        pass
    time.sleep(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_s": 0}, r"reward\.timeout_s=0 must be > 0"),
        ({"on_error": "zer"}, r"reward\.on_error='zer' .*Did you mean 'zero'"),
    ],
)
def test_a_wrong_setting_names_its_key(options, message):
    with pytest.raises(UserError, match=message):
        RewardConfig(**options)


def test_the_configs_are_hydra_structured_configs():
    assert OmegaConf.to_object(OmegaConf.structured(RewardConfig)) == RewardConfig()
    assert OmegaConf.to_object(OmegaConf.structured(CustomRewardConfig)) == CustomRewardConfig()
