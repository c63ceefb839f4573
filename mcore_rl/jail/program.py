"""The process of one test: gives up all rights, runs the program, and returns its result.

Kinds of tests: "program" (its output is standard output), "call" (the result of a function),
"values" (what expressions are worth, as plain data), "verdict" (whether assertions about plain data
hold, without any program), "assertions" (whether assertions hold that the program can see).
"""

from __future__ import annotations

import atexit
import builtins
import json
import os
import site
import sys
import types

from mcore_rl.jail.confinement import die_with_parent, restrict

_OUTPUT, _MISSING = 64, 65
"""Descriptors out of the way of a program's own."""


def be_the_program(
    job: dict, test: dict, folder: str, stdin: int, output: int, missing: int, server: int
) -> int:
    """Give up all rights, run the program on the test and return its exit code.

    Does not run it where protections are missing, and writes their names to `missing`.
    """
    die_with_parent(server)
    is_program = test["kind"] == "program"
    _connect(stdin, output, missing, is_program)
    os.chdir(folder)
    sys.path[:] = [path for path in sys.path if path != job["package_root"]]
    sys.path += job["site_packages"]
    sys.argv = ["program.py"]
    site.setquit()  # exit() and quit(), which an interpreter without `site` lacks
    lacking = restrict(job["limits"], folder, job["site_packages"])
    refused = [name for name in lacking if name not in job["allow_missing"]]
    os.write(_MISSING, " ".join(refused).encode())
    os.close(_MISSING)
    if refused:
        return 1
    if not is_program:
        _execute(job["source"], test)
        return 0
    os.close(_OUTPUT)
    code = 0
    try:
        _load(job["source"])
    except SystemExit as error:
        code = 0 if error.code in (None, 0) else 1
    _end_as_an_interpreter_does()
    return code


def _connect(stdin: int, output: int, missing: int, is_program: bool) -> None:
    """Keep the descriptors of a program and the two of this module, and close all others."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(stdin, 0)
    os.dup2(output if is_program else null, 1)
    os.dup2(null, 2)
    os.dup2(output, _OUTPUT)
    os.dup2(missing, _MISSING)
    os.closerange(3, _OUTPUT)
    os.closerange(_MISSING + 1, 256)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115


def _load(source: str) -> types.ModuleType:
    """Run the program as the main module and return that."""
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    exec(compile(source, "program.py", "exec"), module.__dict__)
    return module


def _end_as_an_interpreter_does() -> None:
    """Wait for the program's threads, run what it registered, write what it has not yet."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.__stdout__):
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()


def _execute(source: str, test: dict) -> None:
    """Run the program, if the test has one, and then the test."""
    if test["kind"] == "verdict":
        from mcore_rl.jail.plain_data import decode, is_same

        names = {f"_value_{i}": decode(value) for i, value in enumerate(test["values"])}
        exec(compile(test["code"], "tests.py", "exec"), {"_is_same": is_same, **names})
        _write(b"holds")
        return
    module = _load(source)
    if test["kind"] == "call":
        holder = module.Solution() if hasattr(module, "Solution") else module
        result = getattr(holder, test["function"])(*test["arguments"])
        _write(json.dumps(result, default=_plain).encode())
    elif test["kind"] == "values":
        from mcore_rl.jail.plain_data import encode

        values = []
        for mode, code in test["steps"]:
            value = eval(compile(code, "tests.py", mode), module.__dict__)
            if mode == "eval":
                values.append(encode(value))
        _write(json.dumps(values).encode())
    elif test["kind"] == "assertions":
        exec(compile(test["assertions"], "tests.py", "exec"), module.__dict__)
        _write(test["token"].encode())


def _plain(value: object) -> object:
    """Return numbers and arrays of numpy as JSON knows them."""
    if type(value).__module__ == "numpy":
        return value.tolist()  # pyright: ignore[reportAttributeAccessIssue]
    raise TypeError(f"{type(value).__name__} is no JSON")


def _write(content: bytes) -> None:
    with os.fdopen(_OUTPUT, "wb") as file:
        file.write(content)
