import sys

import pytest

from mcore_rl.errors import UserError
from mcore_rl.rewards.base import CustomRewardConfig
from mcore_rl.rewards.custom import load_custom_reward

GOOD = (
    "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 2.5\n"
)


@pytest.fixture(autouse=True)
def paths_are_put_back(monkeypatch):
    """A reward file adds its folder to them, for good."""
    monkeypatch.setattr(sys, "path", list(sys.path))


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
    custom = _load(tmp_path / "reward.py", name=name)
    assert custom is not None
    assert (custom.is_async, custom.is_batch) == (False, False)
    result = custom.function(data_source="", solution_str="", ground_truth="", extra_info=None)
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
    custom = _load(tmp_path / "reward.py", reward_kwargs={"scale": 10})
    assert custom is not None
    arguments = {"data_source": "", "solution_str": "abc", "ground_truth": "", "extra_info": None}
    assert custom.function(**arguments) == 31


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


@pytest.mark.parametrize(
    ("source", "is_async", "is_batch"),
    [
        ("async def compute_score(**one): ...\n", True, False),
        ("def compute_score(data_sources, solution_strs, ground_truths, extra_infos): ...\n", 0, 1),
        ("async def compute_score(solution_strs, **others): ...\n", True, True),
        (
            "class Judge:\n    async def __call__(self, **one): ...\ncompute_score = Judge()\n",
            True,
            False,
        ),
    ],
)
def test_what_kind_of_function_it_is_shows_in_its_signature(tmp_path, source, is_async, is_batch):
    (tmp_path / "reward.py").write_text(source)
    custom = _load(tmp_path / "reward.py", reward_kwargs={})
    assert custom is not None
    assert (custom.is_async, custom.is_batch) == (is_async, is_batch)


def test_a_batch_function_that_lacks_an_argument_is_refused(tmp_path):
    (tmp_path / "reward.py").write_text("def compute_score(solution_strs, ground_truths): ...\n")
    problem = r"unexpected keyword argument 'data_sources'.*for all responses at once as `def comp"
    with pytest.raises(UserError, match=problem):
        _load(tmp_path / "reward.py")


def test_a_file_imports_what_lies_beside_it_also_when_the_function_is_called(tmp_path):
    (tmp_path / "beside_a_reward.py").write_text("BONUS = 2\n")
    (tmp_path / "beside_it_too.py").write_text("BONUS = 3\n")
    (tmp_path / "reward.py").write_text(
        "import beside_a_reward\ndef compute_score(**one):\n    import beside_it_too\n"
        "    return beside_a_reward.BONUS + beside_it_too.BONUS\n"
    )
    custom = _load(tmp_path / "reward.py")
    assert custom is not None
    sample = dict.fromkeys(("data_source", "solution_str", "ground_truth", "extra_info"))
    assert custom.function(**sample) == 5
    (tmp_path / "reward.py").write_text("import no_such_module\n")
    with pytest.raises(UserError, match=r"Install it, or put it beside the file\.$"):
        _load(tmp_path / "reward.py")
