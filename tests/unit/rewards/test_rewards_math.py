r"""Equality of expressions is math-verify's; what is tested here is what we hand to it."""

from typing import Any

import pytest

from mcore_rl.rewards import math as math_reward
from mcore_rl.rewards.base import CustomRewardConfig, RewardConfig
from mcore_rl.rewards.math import compute_score
from mcore_rl.rewards.math_equal import is_equal
from mcore_rl.rewards.pool import RewardPool
from mcore_rl.rewards.worker import RewardCall


def _score(response, reference):
    scored: Any = compute_score(data_source="math", solution_str=response, ground_truth=reference)
    return scored["score"]


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
@pytest.mark.starts_processes
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
@pytest.mark.starts_processes
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
@pytest.mark.starts_processes
def test_malformed_answers_score_zero(answer):
    assert _score(answer, "5") == 0.0


@pytest.mark.parametrize(
    "answer", [r"9^{9^{9^{9}}}", "(" * 20_000 + "5" + ")" * 20_000, r"\int_0^1 e^{e^{x^x}} dx"]
)
@pytest.mark.starts_processes
def test_an_answer_that_no_simplifier_ends_on_is_wrong_after_the_limit(answer, monkeypatch):
    monkeypatch.setattr(math_reward, "_LIMIT_S", 0.5)
    assert _score(f"\\boxed{{{answer}}}", "5") == 0.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{0.50}", "1/2"),
        (r"\boxed{\dfrac{1}{2}}", "1/2"),
        (r"\boxed{\left( 3, \dfrac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})"),
        (r"\boxed{(3,\frac{\pi}{2})}", r"(3,\frac{\pi}{2})"),
        (r"\boxed{}", None),
        ("I cannot say.", None),
    ],
)
@pytest.mark.starts_processes
def test_an_answer_is_one_however_its_number_or_its_sizes_are_written(response, answer):
    scored: Any = compute_score("math", response, "1")
    assert scored["pred"] == answer


def test_a_reference_that_cannot_be_parsed_is_compared_as_text():
    assert _score(r"\boxed{\frac{ 1}", r"\frac{1") == 0.0
    assert _score("the answer is \\frac{1", r"\frac{1") == 1.0
    assert not is_equal("5", "")


@pytest.mark.starts_processes
def test_a_comparison_makes_do_with_less_memory_than_its_own_limit():
    """The scoring process may have 1.5 GiB; what it forks must not ask for the usual 2 GiB."""
    pool = RewardPool(RewardConfig(num_workers=1, memory_gib=1.5), CustomRewardConfig())
    arguments = {"data_source": "math", "ground_truth": "0.5", "extra_info": None}
    arguments["solution_str"] = r"\boxed{\frac{1}{2}}"
    [(_, outcome)] = pool.run([RewardCall(function=compute_score, arguments=arguments)])
    pool.close()
    assert (outcome.score, outcome.error) == (1.0, None)


EQUAL = [
    ("10", r"10\%"), (r"10\%", "10"), ("10%", "10"), ("10", "10%"), ("50 percent", "50"),
    ("0.1", r"10\%"), (r"10\%", "0.1"), ("12.5\\%", "12.5"), (r"\frac{1}{2}\%", r"\frac{1}{2}"),
    (r"\frac{1}{2}\%", r"\frac{1}{200}"), ("1 1/2", r"\frac{3}{2}"), (r"1\frac{1}{2}", "3/2"),
    ("3/2", "1 1/2"), (r"x = 1 1/2", "3/2"), ("1,000", "1000"), (r"1\,000", "1000"),
    ("1 000", "1000"), (r"x = 1\,000", "1000"), ("1{,}000", "1000"), (r"5\text{ cm}", "5"),
    (r"5\ \text{cm}^2", "5"), ("2e5", "200000"), ("4.5e33", r"4.5 \times 10^{33}"),
    ("2 million", "2000000"), ("0.333333", r"\frac{1}{3}"), ("1.41421356", r"\sqrt{2}"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\frac{2006!}{2004!}", r"2006 \cdot 2005"),
    (r"\sqrt{2}\sqrt{3}", r"\sqrt{6}"), ("12 or 13", "13, 12"), ("x = 1/2006!", "1/2006!"),
]  # fmt: skip
APART = [
    ("1/2006!", "1/2004!"), ("10^{-20}", "10^{-21}"), ("e^{-50}", "e^{-60}"),
    (r"\frac{x}{2006!}", r"\frac{x}{2004!}"), (r"\{10^{-20}, 1\}", r"\{10^{-21}, 1\}"),
    ("[10^{-20}, 1]", "[10^{-21}, 1]"), ("1.0e-20", "2.0e-20"), ("0.00000001", "0.00000002"),
    ("1 1/2", "1"), ("1 1/2", "11/2"), ("1 000", "0"), ("3 4", "12"), (r"10\%", "1"),
    (r"10\%", r"0.1\%"), ("2e5", "2"), ("2 million", "2"), ("12 or 13", "13"), ("1.0000001", "1"),
    ("0.33", r"\frac{1}{3}"), ("100!", "100! + 1"), ("x = 1/2006!", "1/2004!"),
    ("1/2006!", "x = 1/2004!"), ("x = 1/2006!", "x = 1/2004!"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), EQUAL)
@pytest.mark.starts_processes
def test_percent_mixed_numbers_thousands_units_and_powers_of_ten(answer, reference, monkeypatch):
    monkeypatch.setattr(math_reward, "_LIMIT_S", 120.0)
    assert _score(f"\\boxed{{{answer}}}", reference) == 1.0


@pytest.mark.parametrize(("answer", "reference"), APART)
@pytest.mark.starts_processes
def test_what_rounding_or_juxtaposition_made_equal_is_not(answer, reference, monkeypatch):
    monkeypatch.setattr(math_reward, "_LIMIT_S", 120.0)
    assert _score(f"\\boxed{{{answer}}}", reference) == 0.0


def test_plain_numbers_and_equal_texts_need_no_parser_and_outcomes_are_remembered(monkeypatch):
    calls = []

    def count(function, *arguments, **limits):
        calls.append(arguments)
        return True

    monkeypatch.setattr(math_reward, "call_forked", count)
    for answer, reference in [
        ("7", "8"),
        ("7.0", "7"),
        (r"7\%", "7"),
        ("x+1", "x + 1"),
        ("1/2", "0.5"),
    ]:
        _score(f"\\boxed{{{answer}}}", reference)
    assert _score(r"\boxed{\dfrac{x}{2}}", r"\frac{x}{2}") == 1.0
    assert calls == []
    for _ in range(3):
        assert _score(r"\boxed{y + 1}", "1 + y") == 1.0
    assert calls == [("y + 1", "1 + y")]
    assert _score("\\boxed{y" + " + 1" * 1_000 + "}", "1 + y") == 0.0  # too long to be parsed
    assert len(calls) == 1
