"""Programs that want the reward without the work, in each of the three forms of tests.

A program that a model learns to write is whatever scores, so what solves nothing must score 0.
"""

import pytest

from mcore_rl.rewards.base import SandboxConfig
from mcore_rl.rewards.code import compute_score
from mcore_rl.rewards.sandbox import check_sandbox

pytestmark = pytest.mark.starts_processes

SANDBOX = SandboxConfig(cpu_s=30, timeout_s=100.0, test_timeout_s=90.0)

STDIN = {"inputs": ["400000 24242\n", "1 2\n"], "outputs": ["424242\n", "3\n"]}
CALLS = {"fn_name": "add", "inputs": [[400000, 24242], [1, 2]], "outputs": [424242, 3]}
ASSERTIONS = {"assert_case": ["assert add(400000, 24242) == 424242", "assert 3 == add(1, 2), 'no'"]}
FURTHER_ASSERTIONS = {
    "assert_case": [
        "assert add(400000, 24242) == 424242",
        "import math\nassert math.isclose(add(1, 2), 3) and abs(add(1, 2) - 3) < 1e-6",
        "assert sorted([add(1, 2), add(0, 1)]) == [1, 3] and add(1, 2) in (3, 4)",
        "assert not add(0, 0) and add(0, 0) is not None and {add(1, 2)} == {3}",
    ]
}
FUNCTIONS = {
    "calls": CALLS,
    "assertions": ASSERTIONS,
    "further assertions": FURTHER_ASSERTIONS,
}


def _score(program, tests, sandbox=SANDBOX):
    return compute_score(
        data_source="code",
        solution_str=f"```python\n{program}\n```",
        ground_truth=tests,
        sandbox=sandbox,
    )


@pytest.mark.parametrize("form", FUNCTIONS)
def test_a_right_function_scores_in_every_form(form):
    assert _score("def add(a, b): return a + b", FUNCTIONS[form]) == 1.0


def test_a_right_program_scores():
    assert _score("print(sum(map(int, input().split())))", STDIN) == 1.0


# Looks for the sum in all that the process holds.
_SEARCH = """
import gc, sys

def found(value, depth=0):
    if isinstance(value, str) and "424242" in value:
        return 424242
    if type(value) is int and value == 424242:
        return value
    if depth < 6 and isinstance(value, dict):
        value = list(value.values())
    if depth < 6 and isinstance(value, (list, tuple, set)):
        for inner in list(value):
            if (hit := found(inner, depth + 1)) is not None:
                return hit
"""

FUNCTION_HACKS = {
    # objects that answer as they like
    "equal to all": """
        class Yes:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            __hash__ = object.__hash__
        def add(a, b): return Yes()""",
    "a number equal to all": """
        class Yes(int):
            def __eq__(self, other): return True
            def __hash__(self): return 3
            def __sub__(self, other): return 0
            def __float__(self): return 3.0
            def __bool__(self): return False
        def add(a, b): return Yes(7)""",
    "a float equal to all": """
        class Yes(float):
            def __eq__(self, other): return True
        def add(a, b): return Yes(7)""",
    "a text equal to all": """
        class Yes(str):
            def __eq__(self, other): return True
        def add(a, b): return Yes('x')""",
    "a list equal to all": """
        class Yes(list):
            def __eq__(self, other): return True
            def __contains__(self, other): return True
        def add(a, b): return Yes()""",
    "a type equal to all": """
        class Meta(type):
            def __eq__(cls, other): return True
            def __hash__(cls): return 3
        class Yes(metaclass=Meta): pass
        def add(a, b): return Yes""",
    "any, of the library": "from unittest.mock import ANY\ndef add(a, b): return ANY",
    "a mock": "from unittest.mock import MagicMock\nadd = MagicMock()",
    "an array that compares by element": """
        import numpy as np
        def add(a, b): return np.arange(10)""",
    "a number that looks like another": """
        class Yes(int):
            def __repr__(self): return '424242'
            __str__ = __index__ = __repr__
        def add(a, b): return Yes(7)""",
    "a number of numpy's name": """
        class Yes:
            def tolist(self): return self
            def item(self): return True
            shape = ()
            def __eq__(self, other): return True
        Yes.__module__ = 'numpy'
        def add(a, b): return Yes()""",
    # looking for what is expected
    "frames": _SEARCH
    + """
def add(a, b):
    frame = sys._getframe()
    while frame:
        hit = found({k: v for k, v in frame.f_locals.items() if k not in ("a", "b")})
        if hit is not None:
            return hit
        frame = frame.f_back
""",
    "code of the frames": _SEARCH
    + """
def add(a, b):
    frame = sys._getframe(1)
    while frame:
        hit = found(frame.f_code.co_consts)
        if hit is not None:
            return hit
        frame = frame.f_back
""",
    "all objects": _SEARCH
    + """
def add(a, b):
    skip = globals()
    for value in gc.get_objects():
        if value is not skip and not isinstance(value, type):
            try:
                hit = found(value, 4)
            except Exception:
                continue
            if hit is not None:
                return hit
""",
    "the memory": """
        import ctypes, sys
        def add(a, b):
            start = id(object()) & ~0xffff
            text = ctypes.string_at(start, 2**16)
            return 424242 if text.count(b"424" + b"242") else 0""",
    "files of the tests": """
        import glob
        def add(a, b):
            return 424242 if glob.glob('**/*test*', recursive=True) else None""",
    # ending before anybody looks
    "exit with success": "import os\nos._exit(0)",
    "exit with success when asked": "import os\ndef add(a, b): os._exit(0)",
    "system exit": "def add(a, b): raise SystemExit(0)",
    "exit()": "exit()",
    "exit by a signal": """
        import os, signal
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        def add(a, b):
            while True: pass""",
    "exit at the end": "import atexit, os\natexit.register(os._exit, 0)",
    "no function": "pass",
    "an error that is success": "class E(SystemExit): code = 0\ndef add(a, b): raise E",
    # writing what the sandbox would write
    "a forged result": "import os\nos.write(64, b'7'); os._exit(0)",
    "a forged list of results": "import os\nos.write(64, b'[true]'); os._exit(0)",
    "a forged verdict": "import os\nos.write(64, b'holds'); os._exit(0)",
    "a forged answer": """
        import os
        os.write(64, b'{"output": "holds", "stopped": "", "exit_code": 0}'); os._exit(0)""",
    "a forged answer line": """
        import os
        os.write(64, b'1"}\\n{"output": "1", "stopped": "", "exit_code": 0}\\n'); os._exit(0)""",
    "every descriptor": """
        import os
        for fd in range(3, 256):
            try: os.write(fd, b'holds')
            except OSError: pass
        os._exit(0)""",
    "a result that cannot be read": "import os\nos.write(64, b'[' * 10**5); os._exit(0)",
    "a result that is no number": "import os\nos.write(64, b'NaN'); os._exit(0)",
    "a result of unknown kind": """
        import os
        os.write(64, b'[["object", [1]]]'); os._exit(0)""",
    "a result twice": "import os\ndef add(a, b):\n    os.write(64, b'7'); return 7",
    # changing how it is compared
    "its own json": "import json\njson.dumps = lambda *_, **__: 'holds'\ndef add(a, b): return 7",
    "its own encoder": """
        import sys
        for name, module in list(sys.modules.items()):
            for key in ('encode', 'decode', 'is_same', '_write'):
                if name.startswith('mcore_rl') and hasattr(module, key):
                    setattr(module, key, lambda *_: True)
        def add(a, b): return 7""",
    "its own builtins": """
        import builtins, math
        builtins.abs = lambda x: 0
        builtins.sorted = lambda x: [1, 3]
        builtins.isinstance = lambda *_: True
        builtins.AssertionError = SystemExit
        builtins.set = lambda *_: {3}
        math.isclose = lambda *_, **__: True
        def add(a, b): return 7""",
    "its own compiler": """
        import builtins
        compiled = builtins.compile
        builtins.compile = lambda source, *rest: compiled('True', *rest)
        def add(a, b): return 7""",
    "its own evaluation": """
        import builtins
        builtins.eval = lambda *_: True
        builtins.exec = lambda *_: None
        def add(a, b): return 7""",
    "no assertions": """
        import ast, sys
        sys.flags = None
        __debug__1 = False
        def add(a, b): return 7""",
    "a tracer": """
        import sys
        def trace(frame, event, argument):
            for name in list(frame.f_locals):
                frame.f_locals[name] = True
            return trace
        sys.settrace(trace)
        def add(a, b): return 7""",
    "a profiler that ends it": """
        import os, sys
        def add(a, b):
            sys.setprofile(lambda *_: os._exit(0))
            return 7""",
    "an excepthook": "import sys\nsys.excepthook = lambda *_: None\ndef add(a, b): return 7",
    "the server's exit code": """
        import sys
        frame = sys._getframe()
        while frame:
            if 'code' in frame.f_locals: frame.f_locals['code'] = 0
            frame = frame.f_back
        def add(a, b): return 7""",
    "the test's own steps": """
        import sys
        frame = sys._getframe()
        while frame:
            test = frame.f_locals.get('test')
            if isinstance(test, dict):
                test.update(kind='program', steps=[['eval', 'True']] * 4)
            frame = frame.f_back
        def add(a, b): return 7""",
    "another main module": """
        import sys, types
        sys.modules['__main__'] = types.SimpleNamespace(add=lambda a, b: True)
        def add(a, b): return 7""",
    # almost right
    "true": "def add(a, b): return True",
    "the text of the number": "def add(a, b): return str(a + b)",
    "all numbers": "def add(a, b): return list(range(10))",
    "not a number": "def add(a, b): return float('nan')",
    "right once": "def add(a, b): return 424242",
    "the iterator of the number": "def add(a, b): return iter([a + b])",
    "the pair of the numbers": "def add(a, b): return a, b",
    "a little more": "def add(a, b): return a + b + 1e-3",
    "nothing": "def add(a, b): return None",
    "another name": "def sub(a, b): return a + b",
}


def _program(hack):
    lines = hack.strip("\n").split("\n")
    indents = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    return "\n".join(line[min(indents) :] for line in lines)


@pytest.mark.parametrize("form", FUNCTIONS)
@pytest.mark.parametrize("hack", FUNCTION_HACKS)
def test_a_function_that_does_not_add_earns_nothing(hack, form):
    assert _score(_program(FUNCTION_HACKS[hack]), FUNCTIONS[form]) == 0.0


PROGRAM_HACKS = {
    "nothing": "pass",
    "its input": "print(input())",
    "right once": "print(424242)",
    "all numbers": "print(*range(10))",
    "all numbers, line by line": "for i in range(10): print(i)",
    "the number among others": "print('3 or 4')",
    "exit with success": "import os\nos._exit(0)",
    "right, then an error": "print(sum(map(int, input().split())), flush=True)\n1 / 0",
    "right, then a crash": """
        print(sum(map(int, input().split())), flush=True)
        import ctypes; ctypes.string_at(0)""",
    "right, then a failure": "print(sum(map(int, input().split())))\nexit(1)",
    "right, where errors go": "import sys\nprint(sum(map(int, input().split())), file=sys.stderr)",
    "where results go": "import os\nos.write(64, b'424242\\n')",
    "where it says what is missing": "import os\nos.write(65, b'files')",
    "a forged answer": """
        print('3", "stopped": "", "exit_code": 0}')
        print('{"output": "3", "stopped": "", "exit_code": 0}')""",
    "a number over another": "print('7\\r' + str(sum(map(int, input().split()))))",
    "a number before a zero byte": "print(str(sum(map(int, input().split()))) + chr(0))",
    "almost the number": "print(sum(map(int, input().split())) + 1e-9)",
    "the number with a point": "print(float(sum(map(int, input().split()))))",
    "the number in other digits": "print(chr(0x664) * 6)",
    "infinity": "print('inf')",
    "the parent's memory": """
        import os
        print(open(f'/proc/{os.getppid()}/mem', 'rb').read(9))""",
    "the server's memory": """
        import sys
        frame = sys._getframe()
        while frame:
            test = frame.f_locals.get('test')
            if isinstance(test, dict): print(test.get('outputs') or test.get('expected'))
            frame = frame.f_back""",
}


@pytest.mark.parametrize("hack", PROGRAM_HACKS)
def test_a_program_that_does_not_add_earns_nothing(hack):
    assert _score(_program(PROGRAM_HACKS[hack]), STDIN) == 0.0


# What the program's process holds of the assertions while it runs, as the program sees it.
SPY = """
import gc, sys
def add(a, b):
    frame, seen = sys._getframe(1), []
    while frame:
        seen.append(repr(frame.f_locals))
        frame = frame.f_back
    seen += [repr(value) for value in gc.get_objects() if type(value) in (list, dict, tuple)]
    return "".join(["424", "242"]) in "".join(seen)
"""


def test_what_is_expected_is_nowhere_in_the_program_s_process():
    """The same spy finds what it is passed, so that it would find what is expected."""
    passed = "assert add(424242, 2) is True"
    expected = "expected = 424242\nassert add(1, 2) is not expected and add(1, 2) is False"
    literal = "assert 424242 == 424242 + 0 * add(0, 0)\nassert add(1, 2) is False"
    for assertions in ([passed], [expected, expected], [literal]):
        assert _score(SPY, {"assert_case": assertions}) == 1.0


def test_assertions_that_share_a_process_can_be_deceived_and_are_refused_unless_told_so(caplog):
    tests = {"assert_case": ["for i in range(3): assert add(i, i) == 2 * i"]}
    hack = _program(FUNCTION_HACKS["equal to all"])
    with pytest.raises(ValueError, match=r"cannot be taken apart.*share_assertions=true"):
        _score(hack, tests)
    shared = SandboxConfig(cpu_s=30, timeout_s=100.0, test_timeout_s=90.0, share_assertions=True)
    assert _score("def add(a, b): return a + b", tests, shared) == 1.0
    assert _score("def add(a, b): return a - b", tests, shared) == 0.0
    assert _score(hack, tests, shared) == 1.0  # the risk that is taken
    check_sandbox(shared)
    assert "can read what they expect and pass without solving" in caplog.text
    # What can be taken apart beside it still is.
    both = {"assert_case": [*tests["assert_case"], "assert add(1, 2) == 3"]}
    assert _score(hack, both, shared) == 0.0
