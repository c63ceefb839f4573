"""Runs many command lines of `mcore_rl.train` after importing it once: `python fork_driver.py`.

Reads {"model", "cases"} as JSON from stdin, runs each case's {"name", "argv"} in a forked child,
and writes {name: {"code", "stdout", "stderr"}} to stdout. The model is loaded once before, so that
what the checks of the inputs import is there. The children end as the command does, by `os._exit`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import mcore_rl.train
from mcore_rl.loop import on_policy  # noqa: F401
from mcore_rl.run import folder as run_folder  # noqa: F401
from mcore_rl.run import inputs


def run(argv):
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        child = os.fork()
        if child == 0:
            for number, file in enumerate(files, start=1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
            try:
                mcore_rl.train.main(argv)
                os._exit(0)
            except SystemExit as end:
                os._exit(end.code if isinstance(end.code, int) else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return {"code": code, "stdout": files[0].read_text(), "stderr": files[1].read_text()}


def main():
    asked = json.load(sys.stdin)
    inputs.load_hf_config(asked["model"])
    inputs.load_tokenizer(asked["model"])
    results = {case["name"]: run(case["argv"]) for case in asked["cases"]}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
