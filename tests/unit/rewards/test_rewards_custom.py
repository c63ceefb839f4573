import pytest

from mcore_rl.errors import UserError
from mcore_rl.rewards.base import CustomRewardConfig
from mcore_rl.rewards.custom import load_custom_reward

GOOD = (
    "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 2.5\n"
)


def _load(path, **options):
    return load_custom_reward(CustomRewardConfig(path=str(path), **options))


def test_no_path_means_no_custom_function():
    assert load_custom_reward(CustomRewardConfig()) is None


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (GOOD, "compute_score"),
        (GOOD.replace("compute_score", "mine"), "mine"),
        ("def compute_score(solution_str, **others):\n    return 2.5\n", "compute_score"),
        (
            "class Judge:\n    def __call__(self, **kw):\n        return 2.5\njudge = Judge()\n",
            "judge",
        ),
        (
            "from dataclasses import dataclass\n@dataclass\nclass C:\n    x: int = 1\n" + GOOD,
            "compute_score",
        ),
    ],
)
def test_a_function_is_loaded_by_name(tmp_path, source, name):
    (tmp_path / "reward.py").write_text(source)
    function = _load(tmp_path / "reward.py", name=name)
    assert function is not None
    result = function(data_source="", solution_str="", ground_truth="", extra_info=None)
    assert result == 2.5


@pytest.mark.parametrize(
    ("source", "name", "problem"),
    [
        ("import no_such_module\n", "compute_score", r"path=.*reward\.py.*ModuleNotFoundError"),
        ("def f(:\n", "compute_score", "fails to import .SyntaxError"),
        ("raise SystemError('a\\nb')\n", "compute_score", "SystemError: a b"),
        ("def compute_scores(): ...\n", "compute_score", "Did you mean 'compute_scores'"),
        ("x = 1\n", "compute_score", "is not defined .*Functions: none"),
        ("compute_score = 1\n", "compute_score", "is not a function"),
        ("def compute_score(text): ...\n", "compute_score", "does not take the arguments"),
        ("def compute_score(a, b, c, d): ...\n", "compute_score", "does not take the arguments"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_key(tmp_path, source, name, problem):
    (tmp_path / "reward.py").write_text(source)
    with pytest.raises(UserError, match=rf"custom_reward_function\..*{problem}") as caught:
        _load(tmp_path / "reward.py", name=name)
    assert "\n" not in str(caught.value)


def test_further_arguments_are_passed_by_name(tmp_path):
    (tmp_path / "reward.py").write_text(
        "def compute_score(solution_str, scale, offset=1, **others):\n"
        "    return scale * len(solution_str) + offset\n"
    )
    function = _load(tmp_path / "reward.py", reward_kwargs={"scale": 10})
    assert function is not None
    assert function(data_source="", solution_str="abc", ground_truth="", extra_info=None) == 31


@pytest.mark.parametrize(
    ("kwargs", "problem"),
    [
        ({}, r"reward_kwargs={} .missing a required argument: 'scale'"),
        ({"scale": 1, "scael": 2}, r"unexpected keyword argument 'scael'"),
        ({"scale": 1, "ground_truth": 2}, r"\['ground_truth'\] are arguments that the data gives"),
    ],
)
def test_further_arguments_that_do_not_fit_are_refused(tmp_path, kwargs, problem):
    source = GOOD.replace("extra_info=None", "extra_info=None, *, scale")
    (tmp_path / "reward.py").write_text(source)
    with pytest.raises(UserError, match=rf"custom_reward_function\..*{problem}"):
        _load(tmp_path / "reward.py", reward_kwargs=kwargs)


def test_a_missing_file_and_a_file_of_another_kind_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"custom_reward_function\.path=.* does not exist"):
        _load(tmp_path / "reward.py")
    (tmp_path / "reward.txt").write_text(GOOD)
    with pytest.raises(UserError, match=r"custom_reward_function\.path=.* is not a Python file"):
        _load(tmp_path / "reward.txt")


def test_a_name_without_a_path_is_refused():
    with pytest.raises(UserError, match=r"custom_reward_function\.name='mine' has no effect"):
        CustomRewardConfig(name="mine")
    with pytest.raises(UserError, match=r"reward_kwargs={'scale': 2} has no effect"):
        CustomRewardConfig(reward_kwargs={"scale": 2})
