import dataclasses
import logging
import math
from typing import Any

import pytest
from omegaconf import OmegaConf

from mcore_rl.errors import UserError
from mcore_rl.metrics import merge, to_floats
from mcore_rl.rewards.base import CustomRewardConfig, RewardConfig
from mcore_rl.rewards.score import RewardScorer
from mcore_rl.types import SampleGroup
from tests.carriers import make_prompt, make_sample

pytestmark = pytest.mark.starts_processes


def _group(*responses, data_source="arithmetic", ground_truth="5"):
    prompt = make_prompt(
        uid="train.parquet:3",
        token_ids=[1],
        text="2+3=",
        data_source=data_source,
        ground_truth=ground_truth,
        extra_info={"bonus": 10},
    )
    samples = [
        make_sample(
            prompt=prompt,
            index=index,
            token_ids=[1, 2],
            loss_mask=[False, True],
            rollout_logprobs=[0.0, -1.0],
            finish_reason="stop",
            response_text=response,
        )
        for index, response in enumerate(responses)
    ]
    return SampleGroup(prompt=prompt, samples=samples)


def _prompts(*data_sources):
    return [
        dataclasses.replace(_group().prompt, uid=f"train.parquet:{i}", data_source=data_source)
        for i, data_source in enumerate(data_sources)
    ]


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
        return RewardScorer(RewardConfig(num_workers=1, **options), custom)

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
            "reward/timeout_frac": 0,
        }
    )


def test_the_answers_that_responses_state_go_with_the_samples():
    """By the rewards that read one; the same number is the same answer."""
    groups = [
        _group("2+3=5", "5.0", "no idea"),
        _group("#### 1,000", data_source="gsm8k"),
        _group(r"\boxed{\frac12}", data_source="math"),
        _group("Answer: (B)", data_source="classification"),
        _group("Answer: Paris", data_source="math_dapo"),
    ]
    scored, _ = RewardScorer(RewardConfig(), CustomRewardConfig()).score(groups)
    answers = [[sample.answer for sample in group.samples] for group in scored]
    assert answers == [["5", "5", ""], ["1000"], ["1/2"], ["b"], ["Paris"]]
    assert [sample.reward_metrics for sample in scored[0].samples] == [{}, {}, {}]


@pytest.mark.parametrize(
    ("returned", "answer"),
    [
        ("1.0", None),
        ("{'score': 1.0}", None),
        ("{'score': 1.0, 'pred': ' 5'}", " 5"),
        ("{'score': 1.0, 'pred': 5}", "5"),
        ("{'score': 1.0, 'pred': None}", ""),
        ("{'score': 1.0, 'pred': [1, 2]}", "[1, 2]"),
    ],
)
def test_a_function_of_the_user_s_own_gives_answers_by_verl_s_name(make_scorer, returned, answer):
    scored, metrics = make_scorer(f"return {returned}").score([_group("a")])
    assert scored[0].samples[0].answer == answer
    assert "reward/pred/mean" not in metrics


def test_a_data_source_without_a_reward_is_refused_before_the_run():
    scorer = RewardScorer(RewardConfig(), CustomRewardConfig())
    scorer.check(_prompts("gsm8k", "arithmetic", "exact_number", "openai/gsm8k"))
    with pytest.raises(
        UserError,
        match=r"^train\.parquet:1: data_source='gsm8'.*Did you mean 'gsm8k'.*arithmetic.*custom_",
    ):
        scorer.check(_prompts("gsm8k", "gsm8", "gsm8k", "gsm9"))


VERL = {
    "openai/gsm8k": ("#### 5", 1.0, 0.0),
    "lighteval/MATH": (r"\boxed{5}", 1.0, 0.0),
    "DigitalLearningGmbH/MATH-lighteval": (r"\boxed{5}", 1.0, 0.0),
    "HuggingFaceH4/MATH-500": (r"\boxed{5}", 1.0, 0.0),
    "numina_olympiads": (r"\boxed{5}", 1.0, 0.0),
    "math_dapo": ("Answer: 5", 1.0, -1.0),
    "math_dapo_reasoning": ("Answer: 5", 1.0, -1.0),
    "HuggingFaceH4/aime_2024": (r"\boxed{5}", 1.0, -1.0),
    "aime": ("Answer: 5", 1.0, -1.0),
    "aime25": (r"Answer: \boxed{5}", 1.0, -1.0),
}
"""Names in verl's prepared data: a right response, and what a right and a wrong one score."""


@pytest.mark.parametrize("data_source", VERL)
def test_the_data_sources_of_verl_s_prepared_data_are_scored(data_source):
    right, if_right, if_wrong = VERL[data_source]
    scorer = RewardScorer(RewardConfig(num_workers=1), CustomRewardConfig())
    scorer.check(_prompts(data_source))
    (scored,), _ = scorer.score([_group(right, "no idea", data_source=data_source)])
    assert _rewards([scored]) == [if_right, if_wrong]
    if if_wrong < 0:
        assert [sample.reward_metrics for sample in scored.samples] == [{"acc": 1.0}, {"acc": 0.0}]


@pytest.mark.parametrize(
    ("data_sources", "name", "lacking"),
    [
        (["gsm8k", "math"], "exact_match", "gsm8k"),
        (["qa"], "exact_match", None),
        (["qa", "trivia"], "exact_match", "trivia"),
        (["math_dapo"], "acc", None),
        (["aime_2026"], "accuracy", "aime_2026"),
        (["piecewise_continuity"], "values", None),  # its annotation does not tell
    ],
)
def test_what_a_reward_gives_beside_the_score_is_known_before_the_run(data_sources, name, lacking):
    scorer = RewardScorer(RewardConfig(), CustomRewardConfig())
    assert scorer.lacks(name, _prompts(*data_sources)) == lacking


def test_what_a_custom_function_gives_is_not_known_before_the_run(make_scorer):
    assert make_scorer("return 1").lacks("quality", _prompts("gsm8k")) is None


def test_a_custom_function_scores_every_data_source_with_all_arguments(make_scorer):
    scorer = make_scorer("return len(solution_str) + int(ground_truth) + extra_info['bonus']")
    scorer.check(_prompts("anything"))
    scored, _ = scorer.score([_group("ab", "abc", data_source="anything")])
    assert _rewards(scored) == [17.0, 18.0]


@pytest.mark.parametrize(
    ("value", "score"),
    [
        ("0.5", 0.5),
        ("{'score': 0.5}", 0.5),
        ("np.float16(0.5)", 0.5),
        ("np.float32(0.5)", 0.5),
        ("np.float64(0.5)", 0.5),
        ("np.array(0.5)", 0.5),
        ("{'score': np.bool_(True)}", 1.0),
        ("np.bool_(False)", 0.0),
        ("np.int64(2)", 2.0),
        ("decimal.Decimal('0.5')", 0.5),
        ("fractions.Fraction(1, 2)", 0.5),
    ],
)
def test_a_score_is_a_number_or_a_mapping_with_one(make_scorer, value, score):
    """Also for the further numbers."""
    body = f"import decimal, fractions\nreturn {value}"
    scored, _ = make_scorer(body).score([_group("a")])
    assert _rewards(scored) == [score]
    assert type(_rewards(scored)[0]) is float
    if "score" not in value:
        also = body.replace("return ", "return {'score': 0, 'acc': ") + "}"
        scored, _ = make_scorer(also).score([_group("a")])
        assert scored[0].samples[0].reward_metrics == {"acc": score}


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


def test_a_number_that_is_none_is_left_out_of_its_mean_and_named(make_scorer, caplog):
    """It does not hide the others, of its own samples or of the rest."""
    scorer = make_scorer(
        "bad = {'nan': math.nan, 'inf': -math.inf}.get(solution_str)\n"
        "return {'score': 1, 'acc': len(solution_str) if bad is None else bad, 'right': True}"
    )
    with caplog.at_level(logging.WARNING):
        scored, metrics = scorer.score([_group("a", "nan", "bbb", "inf")])
    assert to_floats(metrics)["reward/acc/mean"] == 2.0
    assert to_floats(metrics)["reward/right/mean"] == 1.0
    assert [sample.reward_metrics.get("acc") for sample in scored[0].samples] == [1, None, 3, None]
    assert "number 'acc' is NaN or infinite for 2 of 4 samples" in caplog.text
    assert "first train.parquet:3 sample 1" in caplog.text


@pytest.mark.parametrize("name", ["baseline", "response_tokens"])
def test_a_number_that_bears_the_name_of_a_metric_of_every_run_is_refused(make_scorer, name):
    scorer = make_scorer(f"return {{'score': 1, {name!r}: 2}}")
    with pytest.raises(UserError, match=f"the number '{name}', which names a metric of every run"):
        scorer.score([_group("a")])


def test_the_deviation_of_rewards_is_that_of_all_however_they_were_batched(make_scorer):
    scorer = make_scorer("return len(solution_str)")
    parts = [scorer.score([_group(*responses)])[1] for responses in (["a", "a"], ["bb"], [])]
    whole = scorer.score([_group("a", "a", "bb")])[1]
    assert to_floats(merge(parts))["reward/std"] == pytest.approx(math.sqrt(2 / 9), rel=1e-12)
    assert to_floats(whole)["reward/std"] == pytest.approx(math.sqrt(2 / 9), rel=1e-12)


def test_a_batch_function_gets_all_responses_at_once(make_scorer, tmp_path):
    """Lists by verl's names, in order; a result for each."""
    scorer = make_scorer("")
    (tmp_path / "reward.py").write_text(
        "def compute_score(data_sources, solution_strs, ground_truths, extra_infos, scale=1):\n"
        "    assert (data_sources[0], ground_truths[0]) == ('arithmetic', '5')\n"
        "    assert extra_infos[0] == {'bonus': 10}\n"
        "    total = sum(map(len, solution_strs))\n"
        "    n = len(data_sources)\n"
        "    return [{'score': len(text) / total, 'n': n} for text in solution_strs]\n"
    )
    scored, metrics = scorer.score([_group("a", "bb"), _group("c", "dddd")])
    assert _rewards(scored) == [1 / 8, 2 / 8, 1 / 8, 4 / 8]
    assert to_floats(metrics)["reward/n/mean"] == 4
    scored, _ = scorer.score([_group("a")])
    assert _rewards(scored) == [1.0]


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        ("[1]", "ValueError: 1 scores for 2 responses"),
        ("1", "TypeError: 'int' object is not iterable"),
        ("{'score': [1, 2]}", "TypeError: a batch function returns a list"),
        ("[1, None]", "TypeError: it returned None, not a number"),
    ],
)
def test_a_batch_function_that_returns_something_else_is_named(
    make_scorer, tmp_path, result, problem
):
    scorer = make_scorer("")
    (tmp_path / "reward.py").write_text(f"def compute_score(solution_strs, **o): return {result}\n")
    with pytest.raises(UserError, match=f"failed on train.parquet:3 sample . .{problem}"):
        scorer.score([_group("a", "b")])


@pytest.mark.parametrize(("most", "stops"), [(0.5, False), (0.49, True)])
def test_too_many_failures_are_an_error_also_where_failures_score_zero(make_scorer, most, stops):
    body = "return 1 / (len(solution_str) - 1)"
    scorer = make_scorer(body, on_error="zero", max_failed_frac=most)
    scored, _ = scorer.score([_group("a", "bb", "a", "cc")])
    assert [sample.reward_status for sample in scored[0].samples] == ["failed", "scored"] * 2
    if not stops:
        return scorer.check_failures(scored)
    with pytest.raises(UserError) as caught:
        scorer.check_failures(scored)
    assert str(caught.value).startswith(
        "reward.max_failed_frac=0.49 is exceeded: the reward failed on 2 of 4 responses of "
        "validation, 0 of them by taking too long."
    )


# What a function does with the response of that name, and what is said about it.
FAILURES = {
    "raises": ("1 / 0", "ZeroDivisionError: division by zero"),
    "raises on two lines": ("raise ValueError('a\\nb')", "ValueError: a b"),
    "returns None": ("return None", "returned None, not a number"),
    "returns text": ("return '1'", "returned '1', not a number"),
    "returns NaN": ("return math.nan", "not a finite number"),
    "returns inf": ("return math.inf", "not a finite number"),
    "no score": ("return {'acc': 1}", "without 'score'.*'acc'"),
    "hangs": ("time.sleep(60)", "TimeLimitExceeded: no result after 2 s"),
    "hangs and catches what interrupts it": (
        "while True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        pass",
        "TimeLimitExceeded",
    ),
    "hangs in a call into C": ("re.match('(a+)+$', 'a' * 60 + 'b')", "TimeLimitExceeded"),
    "hangs awaiting": ("return asyncio.sleep(60)", "TimeLimitExceeded"),
    "ends its process": ("os._exit(3)", "the process ended .exit code 3"),
    "asks to end its process": ("sys.exit('enough')", "SystemExit: enough"),
    "crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "the process ended .SIGSEGV"),
    "eats memory": ("return len(bytearray(2**31))", "MemoryError"),
    "recurses": ("return compute_score(*arguments)", "RecursionError"),
}


@pytest.fixture(scope="module")
def failing_reward(tmp_path_factory):
    """Return the section of a function that fails as the response says."""
    path = tmp_path_factory.mktemp("failing") / "reward.py"
    lines = [
        "import asyncio, math, os, re, signal, sys, time",
        "def compute_score(data_source, solution_str, ground_truth, extra_info):",
        "    arguments = data_source, solution_str, ground_truth, extra_info",
    ]
    for name, (body, _) in FAILURES.items():
        lines += [f"    if solution_str == {name!r}:"]
        lines += [f"        {line}" for line in body.splitlines()]
    path.write_text("\n".join([*lines, "    return 1", ""]))
    return CustomRewardConfig(path=str(path))


# What hangs is given up after 2 s. What ends by itself must not be, on a busy machine, so it never
# shares a scorer with what hangs.
HANGING = [name for name in FAILURES if name.startswith("hangs")]
ENDING = [name for name in FAILURES if name not in HANGING]
HANGING_LIMITS: dict[str, Any] = {"timeout_s": 2.0, "memory_gib": 0.5}
ENDING_LIMITS: dict[str, Any] = {"timeout_s": 60.0, "memory_gib": 0.5}


@pytest.fixture(scope="module")
def hanging_scorer(failing_reward):
    return RewardScorer(RewardConfig(num_workers=1, **HANGING_LIMITS), failing_reward)


@pytest.fixture(scope="module")
def ending_scorer(failing_reward):
    return RewardScorer(RewardConfig(num_workers=1, **ENDING_LIMITS), failing_reward)


def assert_stops_the_run(scorer, responses, failing):
    """One of the responses fails; the line names it, by its position, and says why."""
    sample, problem = responses.index(failing), FAILURES[failing][1]
    where = rf"'arithmetic' failed on train\.parquet:3 sample {sample} "
    with pytest.raises(UserError, match=f"{where}.*{problem}.*reward\\.on_error=zero") as caught:
        scorer.score([_group(*responses)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ENDING)
def test_a_failing_reward_stops_the_run_with_one_line_that_names_the_sample(ending_scorer, name):
    """The scorer serves all of these cases, so it also survives each of them."""
    assert_stops_the_run(ending_scorer, ["good", name, "good"], name)


@pytest.mark.parametrize("name", HANGING)
def test_a_reward_that_hangs_stops_the_run_with_one_line_that_names_the_sample(
    hanging_scorer, name
):
    """The scorer serves all of these cases, so it also survives each of them."""
    assert_stops_the_run(hanging_scorer, [name], name)


def assert_score_zero(custom, caplog, failing, good, limits):
    """Failing responses score 0 and are counted, those between them are not touched."""
    scorer = RewardScorer(RewardConfig(num_workers=2, on_error="zero", **limits), custom)
    responses = [response for name in failing for response in (name, *good)]
    with caplog.at_level(logging.WARNING):
        scored, metrics = scorer.score([_group(*responses)])
    assert _rewards(scored) == [0.0, *[1.0] * len(good)] * len(failing)
    numbers = to_floats(metrics)
    assert numbers["reward/num_errors"] == len(failing)
    assert numbers["reward/failed_frac"] == pytest.approx(len(failing) / len(responses))
    num_timeouts = len(failing) if failing is HANGING else 0
    assert numbers["reward/timeout_frac"] == pytest.approx(num_timeouts / len(responses))
    assert f"{len(failing)} samples scored 0 because the reward of 'arithmetic'" in caplog.text


def test_failing_rewards_score_zero_and_are_counted_when_asked(failing_reward, caplog):
    assert_score_zero(failing_reward, caplog, ENDING, ["good"], ENDING_LIMITS)


def test_hanging_rewards_score_zero_and_are_counted_when_asked(failing_reward, caplog):
    assert_score_zero(failing_reward, caplog, HANGING, [], HANGING_LIMITS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_s": 0}, r"reward\.timeout_s=0 must be > 0"),
        ({"memory_gib": -1.0}, r"reward\.memory_gib=-1\.0 must be > 0"),
        ({"num_workers": 0}, r"reward\.num_workers=0 must be at least 1"),
        ({"max_concurrency": 0}, r"reward\.max_concurrency=0 must be at least 1"),
        (
            {"max_failed_frac": 1.5, "on_error": "zero"},
            r"reward\.max_failed_frac=1\.5 must lie in \(0, 1\]",
        ),
        ({"max_failed_frac": 0.3}, r"max_failed_frac=0\.3 is not read with reward\.on_error=raise"),
        ({"on_error": "zer"}, r"reward\.on_error='zer' .*Did you mean 'zero'"),
    ],
)
def test_a_wrong_setting_names_its_key(options, message):
    with pytest.raises(UserError, match=message):
        RewardConfig(**options)


def test_the_configs_are_hydra_structured_configs():
    assert OmegaConf.to_object(OmegaConf.structured(RewardConfig)) == RewardConfig()
    assert OmegaConf.to_object(OmegaConf.structured(CustomRewardConfig)) == CustomRewardConfig()
