import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

import mcore_rl.rewards.pool as pool_module
from mcore_rl.errors import RunError, StoppedError, UserError
from mcore_rl.rewards.base import CustomRewardConfig, RewardConfig
from mcore_rl.rewards.pool import RewardPool
from mcore_rl.rewards.worker import RewardCall

pytestmark = pytest.mark.starts_processes

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
    # Long enough that the process has started its child before it is killed, on a busy machine; it
    # counts from when the process is ready.
    for response, limit_s, reason in (
        ("hangs", 5.0, "TimeLimitExceeded"),
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
    [dying] = [worker for worker in pool._workers if 0 in worker.tasks]
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


@pytest.mark.timeout(60)  # a wait for the process would last ten minutes
def test_a_process_that_closes_its_connection_and_lives_on_is_killed(make_pool):
    """There is no time limit that would end it."""
    pool = make_pool("os.closerange(3, 1000)\ntime.sleep(600)", num_workers=1, timeout_s=None)
    [(_, outcome)] = pool.run([_call()])
    assert outcome.error == "the process ended (SIGKILL)"


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


@pytest.fixture
def make_async_pool(tmp_path):
    """Return a function that makes a pool around an async function of the given body."""

    def make(body, before="", **options):
        path = tmp_path / "reward.py"
        body = textwrap.indent(textwrap.dedent(body), "    ")
        path.write_text(f"import asyncio, os, sys, time\n{before}\nasync {SIGNATURE}{body}\n")
        return RewardPool(RewardConfig(**options), CustomRewardConfig(path=str(path)))

    return make


BARRIER = """
WAITING = []
async def meet(number):
    WAITING.append(1)
    while len(WAITING) < number:
        await asyncio.sleep(0.01)
"""


def test_async_calls_run_side_by_side_in_one_process(make_async_pool):
    """Each waits until all sixteen are there, so one after another would never end."""
    pool = make_async_pool("await meet(16)\nreturn os.getpid()", BARRIER, num_workers=1)
    assert len(set(_scores(pool, *"abcdefghijklmnop"))) == 1


def test_no_more_async_calls_run_than_are_allowed(make_async_pool):
    body = """
        RUNNING.append(1)
        most = len(RUNNING)
        await asyncio.sleep(0.05)
        RUNNING.pop()
        return most
    """
    pool = make_async_pool(body, "RUNNING = []", num_workers=1, max_concurrency=3)
    assert max(_scores(pool, *"abcdefghij")) == 3


def test_a_process_has_one_event_loop_for_its_life(make_async_pool):
    """What was made on it in the first call, a lock or a session, serves the later ones."""
    body = """
        loops.add(asyncio.get_running_loop())
        return len(loops)
    """
    pool = make_async_pool(body, "loops = set()", num_workers=1)
    assert [_scores(pool, response) for response in "abc"] == [[1], [1], [1]]


def test_an_async_call_that_takes_too_long_is_cancelled_and_the_others_are_not(make_async_pool):
    body = """
        if solution_str == "hangs":
            await asyncio.sleep(600)
        if solution_str == "gives up by itself":
            raise TimeoutError("the judge")
        return os.getpid()
    """
    pool = make_async_pool(body, num_workers=1, timeout_s=3.0)
    responses = ["a", "hangs", "gives up by itself", "b"]
    outcomes = dict(pool.run([_call(response) for response in responses]))
    assert (outcomes[1].error, outcomes[1].timed_out) == (
        "TimeLimitExceeded: no result after 3 s",
        True,
    )
    assert (outcomes[2].error, outcomes[2].timed_out) == ("TimeoutError: the judge", False)
    [again] = _scores(pool, "c")
    assert outcomes[0].score == outcomes[3].score == again  # the process is the same


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("os._exit(3)", r"the process ended (exit code 3)"),
        ("time.sleep(600)", "TimeLimitExceeded: no result after 1 s"),
    ],
)
def test_of_async_calls_in_a_process_that_ends_only_the_one_at_fault_fails(
    make_async_pool, monkeypatch, fault, reason
):
    monkeypatch.setattr(pool_module, "_GRACE_S", 1.0)
    body = f"""
        await asyncio.sleep(0.1)
        if solution_str == "bad":
            {fault}
        return 1
    """
    pool = make_async_pool(body, num_workers=1, timeout_s=1.0)
    outcomes = dict(pool.run([_call(response) for response in ("a", "b", "bad", "c", "d")]))
    assert [outcomes[i].score for i in range(5)] == [1, 1, 0, 1, 1]
    assert [outcomes[i].error for i in range(5)] == [None, None, reason, None, None]


def test_an_event_loop_that_takes_no_calls_does_not_stop_the_program(make_async_pool, monkeypatch):
    """More is handed over than a connection holds while the function blocks its loop."""
    monkeypatch.setattr(pool_module, "_SEND_LIMIT_S", 1)
    monkeypatch.setattr(pool_module, "_GRACE_S", 0.0)
    body = """
        if solution_str == "blocks":
            time.sleep(600)
        return len(solution_str)
    """
    pool = make_async_pool(body, num_workers=1, timeout_s=5.0)
    calls = [_call("blocks"), *[_call("x" * 200_000)] * 8]
    outcomes = dict(pool.run(calls))
    assert [outcomes[i].score for i in range(9)] == [0, *[200_000] * 8]
    assert outcomes[0].timed_out


def test_a_plain_function_may_run_an_event_loop_of_its_own(make_pool):
    body = """
        import asyncio
        async def judge():
            return len(solution_str)
        return asyncio.run(judge())
    """
    assert _scores(make_pool(textwrap.dedent(body), num_workers=1), "a", "bb") == [1, 2]


def test_calls_that_are_interrupted_are_given_up_with_their_processes(make_pool, tmp_path):
    pool = make_pool(
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(3600)"
    )
    pool.start()

    def interrupt():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        pool.interrupt()

    threading.Thread(target=interrupt).start()
    with pytest.raises(StoppedError):
        _scores(pool, "a")
    assert _wait_until_ended(int((tmp_path / "pid").read_text()))
    with pytest.raises(StoppedError):  # for good
        _scores(pool, "a")
