import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from mcore_rl.errors import RunError, UserError
from mcore_rl.rewards.base import CustomRewardConfig, RewardConfig
from mcore_rl.rewards.pool import RewardPool
from mcore_rl.rewards.worker import RewardCall

SIGNATURE = "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"


@pytest.fixture
def make_pool(tmp_path):
    """Return a function that makes a pool around a custom function of the given body."""

    def make(body, **options):
        path = tmp_path / "reward.py"
        path.write_text(
            f"import os, subprocess, sys, time\n{SIGNATURE}{textwrap.indent(body, '    ')}\n"
        )
        return RewardPool(RewardConfig(**options), CustomRewardConfig(path=str(path)))

    return make


def _call(response="a", function=None):
    arguments = {"data_source": "gsm8k", "ground_truth": "5", "extra_info": None}
    return RewardCall(function=function, arguments={**arguments, "solution_str": response})


def _scores(pool, *responses):
    outcomes = dict(pool.run([_call(response) for response in responses]))
    return [outcomes[position].score for position in range(len(responses))]


def _has_ended(pid):
    """Whether a process is gone, or a zombie that only init has left to collect."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _wait_until_ended(pid):
    until = time.monotonic() + 20
    while not _has_ended(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return _has_ended(pid)


def test_outcomes_carry_the_position_of_their_call(make_pool):
    pool = make_pool("time.sleep(0.1 * (solution_str == 'aaa'))\nreturn len(solution_str)")
    assert _scores(pool, "aaa", "a", "aa", "", "aaaa") == [3, 1, 2, 0, 4]


def test_calls_run_side_by_side(make_pool, tmp_path):
    """Each of two calls waits for the other's file, so one after another would never end."""
    body = f"""
        here, there = [os.path.join({str(tmp_path)!r}, name) for name in solution_str.split()]
        open(here, "w").close()
        while not os.path.exists(there):
            time.sleep(0.01)
        return 1
    """
    pool = make_pool(textwrap.dedent(body), num_workers=2)
    assert _scores(pool, "x y", "y x") == [1, 1]


def test_a_process_serves_many_calls_and_is_replaced_when_it_dies_idle(make_pool):
    pool = make_pool("return os.getpid()", num_workers=1)
    first, again = _scores(pool, "a", "a")
    assert first == again
    os.kill(int(first), signal.SIGKILL)
    assert _wait_until_ended(int(first))
    assert _scores(pool, "a")[0] != first


def test_a_process_imports_neither_torch_nor_transformers(make_pool):
    """With every reward of the package loaded, as a call of any of them does."""
    body = "import mcore_rl.rewards\nreturn len({'torch', 'transformers'} & set(sys.modules))"
    assert _scores(make_pool(body), "a") == [0]


def test_what_a_function_started_ends_with_it(make_pool, tmp_path):
    pid_file = tmp_path / "pid"
    body = f"""
        child = subprocess.Popen(["sleep", "600"])
        with open({str(pid_file)!r}, "w") as file:
            file.write(str(child.pid))
        if solution_str == "hangs":
            child.wait()
        os._exit(0)
    """
    # Long enough that the process has started its child before it is killed, on a busy machine.
    for response, limit_s, reason in (
        ("hangs", 15.0, "TimeLimitExceeded"),
        ("ends", None, "exit code 0"),
    ):
        pool = make_pool(textwrap.dedent(body), timeout_s=limit_s)
        [(_, outcome)] = pool.run([_call(response)])
        assert reason in (outcome.error or "")
        assert _wait_until_ended(int(pid_file.read_text()))


def test_a_process_that_dies_while_another_answers_loses_no_call(make_pool, tmp_path):
    """It is found dead when the next call is handed out, before its connection is looked at."""
    body = f"""
        if solution_str == "quick":
            return 1
        while not os.path.exists({str(tmp_path / "may die")!r}):
            time.sleep(0.01)
        os._exit(3)
    """
    pool = make_pool(textwrap.dedent(body), num_workers=2)
    outcomes = pool.run([_call("dies"), _call("quick"), _call("quick")])
    assert next(outcomes)[1].score == 1
    [dying] = [worker for worker in pool._workers if worker.position == 0]
    (tmp_path / "may die").touch()
    assert _wait_until_ended(dying.process.pid)
    rest = dict(outcomes)
    assert rest[0].error == "the process ended (exit code 3)"
    assert rest[2].score == 1


def test_a_death_is_seen_although_a_fork_holds_the_connection(make_pool):
    """There is no time limit that would end the wait."""
    body = """
        if os.fork() == 0:
            time.sleep(600)
        os._exit(3)
    """
    pool = make_pool(textwrap.dedent(body), num_workers=1, timeout_s=None)
    [(_, outcome)] = pool.run([_call()])
    assert outcome.error == "the process ended (exit code 3)"


def test_a_process_that_dies_before_it_is_ready_is_an_error(make_pool, tmp_path):
    pool = make_pool("return 1")
    with (tmp_path / "reward.py").open("a") as file:
        file.write("os._exit(4)\n")
    with pytest.raises(RunError, match=r"did not start \(the process ended \(exit code 4\)\)"):
        list(pool.run([_call(), _call()]))


def test_stopping_early_leaves_no_call_running(make_pool, tmp_path):
    body = f"""
        if solution_str == "quick":
            return 1
        with open(os.path.join({str(tmp_path)!r}, "pid"), "w") as file:
            file.write(str(os.getpid()))
        os.rename({str(tmp_path / "pid")!r}, {str(tmp_path / "started")!r})
        time.sleep(600)
    """
    pool = make_pool(textwrap.dedent(body), num_workers=2)
    outcomes = pool.run([_call("slow"), _call("quick")])
    assert next(outcomes)[0] == 1
    outcomes.close()
    started = tmp_path / "started"
    assert not started.exists() or _wait_until_ended(int(started.read_text()))
    assert _scores(pool, "quick") == [1]


def _start_program(tmp_path, first_line="pass"):
    """Start a program that scores once with the function of `make_pool` and prints the outcome."""
    program = f"""
        {first_line}
        from mcore_rl.rewards.base import CustomRewardConfig, RewardConfig
        from mcore_rl.rewards.pool import RewardPool
        from mcore_rl.rewards.worker import RewardCall
        arguments = dict(data_source="", solution_str="", ground_truth="", extra_info=None)
        custom = CustomRewardConfig(path={str(tmp_path / "reward.py")!r})
        pool = RewardPool(RewardConfig(num_workers=1), custom)
        [(_, outcome)] = pool.run([RewardCall(function=None, arguments=arguments)])
        print(outcome.score, outcome.error)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_no_process_outlives_a_program_that_is_killed(make_pool, tmp_path):
    """Neither the one that scores nor the copy that it forked."""
    body = """
        from mcore_rl.rewards.forked import call_forked
        def hang():
            print(os.getpid(), flush=True)
            time.sleep(600)
        print(os.getpid(), flush=True)
        call_forked(hang, cpu_s=600, limit_s=600, memory_bytes=2**33)
    """
    make_pool(textwrap.dedent(body))
    with _start_program(tmp_path) as process:
        assert process.stdout is not None
        worker, fork = int(process.stdout.readline()), int(process.stdout.readline())
        process.kill()
    assert _wait_until_ended(worker)
    assert _wait_until_ended(fork)


def test_a_lower_limit_of_the_system_holds_instead_of_that_of_the_configuration(
    make_pool, tmp_path
):
    """As under `ulimit -d`, which nobody without privileges can raise again."""
    make_pool("import resource\nreturn resource.getrlimit(resource.RLIMIT_DATA)[1] / 2**20")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**29, 3 * 2**29))"
    with _start_program(tmp_path, limit) as process:
        assert process.communicate()[0] == "1536.0 None\n"


def test_closing_ends_the_processes(make_pool):
    pool = make_pool("return os.getpid()", num_workers=1)
    [pid] = _scores(pool, "a")
    pool.close()
    assert _has_ended(int(pid))


def test_a_custom_function_that_cannot_be_loaded_is_named_before_the_first_call(make_pool):
    pool = make_pool("return 1\n1 / 0 if")
    with pytest.raises(UserError, match=r"custom_reward_function\.path=.*SyntaxError"):
        pool.start()
