import json
from dataclasses import replace

import pytest

from mcore_rl.errors import UserError
from mcore_rl.metrics import to_floats
from mcore_rl.rewards.base import CustomRewardConfig, RewardConfig, SandboxConfig
from mcore_rl.rewards.code import compute_score, read_tests
from mcore_rl.rewards.score import RewardScorer
from mcore_rl.types import SampleGroup
from tests.carriers import make_prompt, make_sample

pytestmark = pytest.mark.starts_processes

SANDBOX = SandboxConfig(timeout_s=20.0, test_timeout_s=15.0)
ADD = "a, b = map(int, input().split())\nprint(a + b)"
ADD_TESTS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
FUNCTION = "def add(a, b):\n    return a + b"
METHOD = "class Solution:\n    def add(self, a, b):\n        return a + b"


def _score(program, tests, fence="```python\n{}\n```"):
    return compute_score(
        data_source="code",
        solution_str=f"I think so:\n{fence.format(program)}\nDone.",
        ground_truth=tests,
        sandbox=SANDBOX,
    )


@pytest.mark.parametrize(
    ("program", "tests", "score"),
    [
        (ADD, ADD_TESTS, 1.0),
        (ADD, json.dumps(ADD_TESTS), 1.0),
        (ADD, {"inputs": ["1 2"], "outputs": ["3 \n\n"]}, 1.0),
        (ADD, {"inputs": ["1 2", "1 2"], "outputs": ["3", "4"]}, 0.0),
        (ADD, {"inputs": ["1 2"], "outputs": ["3\n3"]}, 0.0),
        ("print(3)\nprint(1 / 0)", {"inputs": [""], "outputs": ["3"]}, 0.0),
        (FUNCTION, {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}, 1.0),
        (METHOD, {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}, 1.0),
        (FUNCTION, {"fn_name": "add", "inputs": ["1\n2"], "outputs": ["3"]}, 1.0),
        (FUNCTION, {"fn_name": "add", "inputs": [[[1], [2]]], "outputs": [[1, 2]]}, 1.0),
        (FUNCTION, {"fn_name": "add", "inputs": [[1, 2]], "outputs": [4]}, 0.0),
        (FUNCTION, {"fn_name": "sum", "inputs": [[1, 2]], "outputs": [3]}, 0.0),
        (FUNCTION, {"assert_case": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}, 1.0),
        (FUNCTION, {"assert_case": ["assert add(1, 2) == 3", "assert add(0, 0) == 1"]}, 0.0),
    ],
)
def test_a_program_scores_one_if_it_passes_every_test(program, tests, score):
    assert _score(program, tests) == score


# Program's output, what is expected, score; both may differ as judges of contests allow.
OUTPUTS = [
    ("3", "3 \n\n", 1.0),
    ("3\n4", ["3", "4"], 1.0),
    ("3\n4", ["3\n", "4\n"], 1.0),
    ("3\n4", ["3", "5"], 0.0),
    ("3\n4", [3, 4], 1.0),
    ("3", 3, 1.0),
    ("3\r\n4\r\n", "3\n4\n", 1.0),
    ("3 4", "3\n4", 0.0),
    ("0.3333333333", "0.333333", 1.0),
    ("0.33333", "0.333333", 0.0),
    ("1000000.4", "1000000.0", 1.0),  # relative
    ("0", "0.0000001", 1.0),  # absolute
    ("x 0.50 y", "x 0.5 y", 1.0),
    ("x 0.50 z", "x 0.5 y", 0.0),
    ("5", "5.0", 1.0),
    ("5.0", "5", 0.0),  # an integer is expected
    ("1e3", "1000.0", 1.0),
    ("05", "5", 0.0),
    ("nan", "0.5", 0.0),
    ("inf", "1e999", 0.0),
    ("2e999", "1e999", 0.0),
    ("0_5.0", "5.0", 0.0),
    ("True", "1", 0.0),
    ("yes", "Yes", 0.0),
    ("1" * 10**6 + "x", "0.5", 0.0),
]


@pytest.mark.parametrize(("output", "expected", "score"), OUTPUTS)
def test_outputs_are_compared_as_judges_do(output, expected, score):
    tests = {"inputs": [""], "outputs": [expected]}
    program = "import sys\nsys.stdout.write(sys.stdin.read())"
    tests["inputs"] = [output]
    assert _score(program, tests) == score


@pytest.mark.parametrize(
    ("result", "expected", "score"),
    [
        ("0.1 + 0.2", 0.3, 1.0),
        ("[(0.1 + 0.2,)]", [[0.3]], 1.0),
        ("0.31", 0.3, 0.0),
        ("3.0", 3, 1.0),
        ("3.0000001", 3, 0.0),
        ("True", 1, 0.0),
        ("1", True, 0.0),
        ("True", True, 1.0),
        ("[0]", [False], 0.0),
        ("None", None, 1.0),
        ("(1, 2)", [1, 2], 1.0),
        ("'3'", 3, 0.0),
        ("{1: 2}", {"1": 2}, 1.0),
        ("__import__('numpy').int64(3)", 3, 1.0),
        ("__import__('numpy').arange(3)", [0, 1, 2], 1.0),
        ("{1}", [1], 0.0),
    ],
)
def test_results_are_compared_by_type_and_value(result, expected, score):
    tests = {"fn_name": "f", "inputs": [[]], "outputs": [expected]}
    assert _score(f"def f():\n    return {result}", tests) == score


def test_an_input_may_be_a_list_of_lines():
    for lines in (["1 2", "3 4"], ["1 2\n", "3 4\r\n"], ("1 2", "3 4")):
        tests = {"inputs": [lines], "outputs": ["3\n7"]}
        assert _score("for _ in range(2): print(sum(map(int, input().split())))", tests) == 1.0


@pytest.mark.parametrize("response", ["", "print(3)", "```python\n```", "```python", "`" * 9_999])
def test_a_response_without_a_program_that_works_scores_zero(response):
    tests = {"inputs": [""], "outputs": ["3"]}
    score = compute_score(
        data_source="code", solution_str=response, ground_truth=tests, sandbox=SANDBOX
    )
    assert score == 0.0


@pytest.mark.parametrize(
    "program", ["import os; os.write(64, b'3'); os._exit(0)", "import os; os._exit(0)"]
)
def test_a_program_that_ends_before_its_function_is_called_earns_nothing(program):
    """The first writes a right result where results go; no program knows the right one."""
    assert _score(program, {"fn_name": "add", "inputs": [[1, 2]], "outputs": [4]}) == 0.0
    assert _score(program, {"assert_case": ["assert add(1, 2) == 4"]}) == 0.0
    assert _score(program, {"fn_name": "add", "inputs": [[1, 2]], "outputs": [None]}) == 0.0


@pytest.mark.parametrize(
    ("ground_truth", "problem"),
    [
        ("5", "no mapping"),
        ({}, "has no tests"),
        ({"inputs": [], "outputs": []}, "has no tests"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ("{", "Expecting property name"),
        ({"fn_name": "f", "inputs": ["x"], "outputs": ["1"]}, "Expecting value"),
        ({"inputs": [None], "outputs": ["1"]}, "None for an input or output"),
        ({"inputs": ["1"], "outputs": [{"a": 1}]}, "for an input or output"),
        ({"assert_case": ["assert f("]}, "is no Python"),
        ({"assert_case": ["assert f(1) == 1", "assert f(1) == f(2)"]}, "f\\(2\\).*taken apart"),
    ],
)
def test_a_row_without_tests_is_an_error(ground_truth, problem):
    with pytest.raises(ValueError, match=problem):
        read_tests(ground_truth, SANDBOX)


def test_a_run_goes_on_after_programs_that_misbehave():
    programs = {
        ADD: 1.0,
        "while True: pass": 0.0,
        "x = bytearray(10 * 2**30)": 0.0,
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass": 0.0,
        "while True: print('x' * 10**6)": 0.0,
        "import os; os.kill(os.getppid(), 9)": 0.0,
        "import socket; socket.create_connection(('127.0.0.1', 80))": 0.0,
        f"{ADD} # again": 1.0,
    }
    prompt = make_prompt(
        uid="train.parquet:0",
        token_ids=[1],
        text="add",
        data_source="code_generation",
        ground_truth=ADD_TESTS,
    )
    samples = [
        make_sample(
            prompt=prompt,
            index=index,
            token_ids=[1, 2],
            loss_mask=[False, True],
            rollout_logprobs=[0.0, -1.0],
            finish_reason="stop",
            response_text=f"```python\n{program}\n```",
        )
        for index, program in enumerate(programs)
    ]
    sandbox = SandboxConfig(cpu_s=1, test_timeout_s=8.0)
    scorer = RewardScorer(RewardConfig(num_workers=2, sandbox=sandbox), CustomRewardConfig())
    scorer.check([prompt])
    scored, metrics = scorer.score([SampleGroup(prompt=prompt, samples=samples)])
    assert [sample.reward for sample in scored[0].samples] == list(programs.values())
    assert to_floats(metrics)["reward/num_errors"] == 0


def test_all_tests_together_have_a_limit_too():
    tests = {"inputs": [""] * 20, "outputs": ["3"] * 20}
    score = compute_score(
        data_source="code",
        solution_str="```python\nimport time\ntime.sleep(0.3)\nprint(3)\n```",
        ground_truth=tests,
        sandbox=SandboxConfig(timeout_s=1.0),
    )
    assert score == 0.0


def test_programs_get_less_time_than_their_reward():
    scorer = RewardScorer(RewardConfig(num_workers=1, timeout_s=20.0), CustomRewardConfig())
    words = make_prompt(uid="w:0", token_ids=[1], text="", data_source="gsm8k", ground_truth="1")
    scorer.check([words])
    with pytest.raises(UserError, match=r"reward\.sandbox\.timeout_s=20\.0 must be less than"):
        scorer.check([words, replace(words, data_source="code")])
