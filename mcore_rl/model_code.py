"""The code in a model's folder that its configuration names (`auto_map`).

It goes with a copy of the model and is never run here.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

from mcore_rl.foreign_json import parse_json
from mcore_rl.model_files import CONFIG_FILE, model_files

_NAME_CODE = (CONFIG_FILE, "tokenizer_config.json")


def copied_files(folder: str | Path) -> list[Path]:
    """Return the files for a copy of a model folder, without the weights, sorted: `model_files` and
    the code that they name."""
    code = {file for name in _NAME_CODE for file in _code_of(Path(folder) / name)}
    return sorted(code.union(model_files(folder)))


def without_missing_code(file: Path, text: str) -> str:
    """Return the text of a configuration without entries of `auto_map` whose code is not in its
    folder: a program that runs such code would look for it there. If nothing is missing, the text
    does not change."""
    if file.name not in _NAME_CODE:
        return text
    try:
        config = parse_json(text)
        named = config.get("auto_map") or {}
    except (ValueError, AttributeError):
        return text  # damaged: its reader reports that
    kept = {what: where for what, where in named.items() if _is_there(file, where)}
    if kept == named:
        return text
    del config["auto_map"]
    if kept:
        config["auto_map"] = kept
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _is_there(file: Path, where: object) -> bool:
    return all(module.is_file() for module in _modules(file, where))


def _modules(file: Path, where: object) -> Iterator[Path]:
    """Yield the files of an entry of `auto_map`: "module.Class", or a list of these and None. Those
    of another repository ("owner/name--module.Class") are not in the folder."""
    for name in where if isinstance(where, list) else [where]:
        if isinstance(name, str) and "--" not in name:
            yield file.with_name(f"{name.split('.')[0]}.py")


def _code_of(file: Path) -> set[Path]:
    """Return the modules that a configuration names, and those beside them that they import."""
    try:
        named = parse_json(file.read_text(encoding="utf-8")).get("auto_map") or {}
    except (OSError, ValueError, AttributeError):
        return set()  # not there, or damaged: its reader reports that
    coming = [module for where in named.values() for module in _modules(file, where)]
    found: set[Path] = set()
    while coming:
        module = coming.pop()
        if module not in found and module.is_file():
            found.add(module)
            coming += _imported(module)
    return found


def _imported(module: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(module.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return  # it goes along as it is
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                yield module.with_name(f"{name.split('.')[0]}.py")
