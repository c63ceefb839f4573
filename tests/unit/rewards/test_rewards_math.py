r"""Equality of expressions is math-verify's; what is tested here is what we hand to it."""

import pytest

from mcore_rl.rewards import math as math_reward
from mcore_rl.rewards.base import CustomRewardConfig, RewardConfig
from mcore_rl.rewards.math import compute_score, is_equal
from mcore_rl.rewards.pool import RewardPool
from mcore_rl.rewards.worker import RewardCall


def _score(response, reference):
    return compute_score(data_source="math", solution_str=response, ground_truth=reference)


REWRITINGS = {
    "p - q": ["p-q", "-q + p", " p - q ", "$p - q$"],
    r"\frac{14}{3}": [r"\dfrac{14}{3}", r"\frac{28}{6}", r"14/3", r"\frac{14}{3}."],
    r"\left( 3, \frac{\pi}{2} \right)": [r"(3, \frac{\pi}{2})", r"\left(3,\dfrac{\pi}{2}\right)"],
    r"\text{Evelyn}": [r"\text{Evelyn }"],
    "58,500": ["58500", r"58{,}500"],
    r"90^\circ": ["90"],
    "x=5": ["5", "x = 5"],
    r"x \in [-2,7]": [r"[-2, 7]"],
    r"3\sqrt{13}": [r"\sqrt{117}"],
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}": [r"\begin{pmatrix}1\\2\end{pmatrix}"],
}


@pytest.mark.parametrize("reference", REWRITINGS)
def test_an_answer_equals_its_reference_however_it_is_written(reference, monkeypatch):
    # Beyond the limit a right answer is wrong, which on a very busy machine says nothing about it.
    monkeypatch.setattr(math_reward, "_LIMIT_S", 120.0)
    for answer in [reference, *REWRITINGS[reference]]:
        assert _score(f"So the answer is \\boxed{{{answer}}}.", reference) == 1.0, answer


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        (r"\boxed{p + q}", "p - q"),
        (r"\boxed{\frac{3}{14}}", r"\frac{14}{3}"),
        (r"\boxed{(\frac{\pi}{2}, 3)}", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\boxed{\text{Carla}}", r"\text{Evelyn}"),
        (r"\boxed{5} or \boxed{6}", "5"),
        ("5", "5"),
        (r"\frac{14}{3}", r"\frac{14}{3}"),
    ],
)
def test_another_answer_or_one_that_is_not_stated_earns_nothing(response, reference):
    assert _score(response, reference) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        r"\boxed{}",
        r"\boxed{",
        r"\boxed{\frac{1}}",
        r"\boxed{\left( 5}",
        r"\boxed{}}}}",
        r"\boxed{\begin{pmatrix} 5}",
        "\\boxed{\U0001f600\x00\u200b}",
        "\\boxed{\ud800}",
        r"\boxed{$}",
        r"\boxed{1/0}",
        "the answer is",
    ],
)
def test_malformed_answers_score_zero(answer):
    assert _score(answer, "5") == 0.0


@pytest.mark.parametrize(
    "answer", [r"9^{9^{9^{9}}}", "(" * 20_000 + "5" + ")" * 20_000, r"\int_0^1 e^{e^{x^x}} dx"]
)
def test_an_answer_that_no_simplifier_ends_on_is_wrong_after_the_limit(answer, monkeypatch):
    monkeypatch.setattr(math_reward, "_LIMIT_S", 0.5)
    assert _score(f"\\boxed{{{answer}}}", "5") == 0.0


def test_a_reference_that_cannot_be_parsed_is_compared_as_text():
    assert _score(r"\boxed{\frac{ 1}", r"\frac{1") == 0.0
    assert _score("the answer is \\frac{1", r"\frac{1") == 1.0
    assert not is_equal("5", "")


def test_a_comparison_makes_do_with_less_memory_than_its_own_limit():
    """The scoring process may have 1.5 GiB; what it forks must not ask for the usual 2 GiB."""
    pool = RewardPool(RewardConfig(num_workers=1, memory_gib=1.5), CustomRewardConfig())
    arguments = {"data_source": "math", "ground_truth": "0.5", "extra_info": None}
    arguments["solution_str"] = r"\boxed{\frac{1}{2}}"
    [(_, outcome)] = pool.run([RewardCall(function=compute_score, arguments=arguments)])
    pool.close()
    assert (outcome.score, outcome.error) == (1.0, None)
