"""Calls into vLLM and Transformer Engine, ours and Megatron's, against the real signatures.

vLLM's are those of the version that is installed. `make contracts` puts the sources of the newest
versions that the project allows into `.contracts`, without what they depend on; where they are, the
same tests read them too. Nothing of the packages is imported.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.contracts import signatures
from tests.unit.contracts.signatures import Function, Sources, UnknownNameError, bind, signature_of

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "mcore_rl"
INSTALLED = Path(sysconfig.get_paths()["purelib"])
CONTRACTS = ROOT / ".contracts"
WITH_NEWEST = [INSTALLED, *([CONTRACTS] if CONTRACTS.is_dir() else [])]

ATTRIBUTES = {
    "self._llm": ("vllm.entrypoints.llm", "LLM"),
    "self._engine": ("vllm.v1.engine.llm_engine", "LLMEngine"),
}
"""What attributes of `rollout/vllm_engine.py` hold."""

OLD = ("ub_split_ag", "ub_split_rs", "ub_atomic_gemm_ag", "ub_atomic_gemm_rs")
"""Arguments that Megatron gives to versions of Transformer Engine before 1.5."""


def has(root: Path, package: str) -> bool:
    return (root / package / "__init__.py").is_file()


def of(package: str) -> list[Path]:
    """Return where sources of a package are."""
    return [root for root in WITH_NEWEST if has(root, package)]


def calls_of_ours(sources: Sources) -> Iterator[tuple[str, ast.Call, object]]:
    """Yield (place, call, what is called or why it cannot be found) of the package's calls into
    vLLM."""
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        names: dict[str, tuple[str, str]] = {}
        modules: dict[str, str] = {}
        attributes = ATTRIBUTES if file.name == "vllm_engine.py" else {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                for alias in node.names:
                    names[alias.asname or alias.name] = (node.module or "", alias.name)
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "vllm":
                        modules[alias.asname or alias.name] = alias.name
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                place = f"{file.relative_to(ROOT)}:{node.lineno}"
                try:
                    called = _called(sources, node.func, names, modules, attributes)
                except UnknownNameError as error:
                    called = error
                if called is not None:
                    yield place, node, called


def _called(sources, function, names, modules, attributes):
    """Return the signature that an expression has, None for what is not vLLM's."""
    if isinstance(function, ast.Name) and function.id in names:
        return sources.signature(sources.find(*names[function.id]))
    if not isinstance(function, ast.Attribute):
        return None
    owner, name = ast.unparse(function.value), function.attr
    if owner in modules:
        return sources.signature(sources.find(modules[owner], name))
    if owner in attributes:
        return signature_of(sources.method(sources.find(*attributes[owner]), name), drop=1)
    if owner in names:
        found = sources.find(*names[owner])
        if isinstance(found.node, ast.ClassDef):
            method = sources.method(found, name)
            return signature_of(method, drop=int(signatures.is_bound_to_class(method)))
    return None


def num_bound(calls) -> int:
    """Return how many calls there are, all of which bind to what they call."""
    unbound, number = [], 0
    for place, call, called in calls:
        number += 1
        try:
            if isinstance(called, UnknownNameError):
                raise TypeError(str(called))
            bind(called, call)
        except TypeError as error:
            unbound.append(f"{place}: {ast.unparse(call.func)}: {error}")
    assert unbound == []
    return number


@pytest.mark.parametrize("root", of("vllm"), ids=lambda root: root.name)
def test_our_calls_into_vllm_bind(root):
    assert num_bound(calls_of_ours(Sources(root))) >= 40


@pytest.mark.parametrize("root", of("vllm"), ids=lambda root: root.name)
def test_vllm_has_every_name_that_is_imported(root):
    sources, missing = Sources(root), []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                assert sources.has(node.module or ""), node.module
                bound = {
                    target.id
                    for statement in ast.walk(sources.tree(node.module or ""))
                    if isinstance(statement, ast.Assign | ast.AnnAssign)
                    for target in ast.walk(statement)
                    if isinstance(target, ast.Name)
                }
                for alias in node.names:
                    try:
                        sources.find(node.module or "", alias.name)
                    except UnknownNameError:
                        if alias.name not in bound:
                            missing.append(f"{node.module}.{alias.name}")
    assert missing == []


@pytest.mark.parametrize("root", of("vllm"), ids=lambda root: root.name)
def test_every_argument_of_an_engine_is_one_of_vllm(root):
    sources = Sources(root)
    engine = ast.parse((PACKAGE / "rollout" / "vllm_engine.py").read_text())
    given = set()
    for function in ast.walk(engine):
        if isinstance(function, Function) and function.name in ("__init__", "_lora_settings"):
            given |= _keys(function)
    assert len(given) > 20
    llm = sources.find("vllm.entrypoints.llm", "LLM")
    known = {*sources.signature(llm).parameters}
    known |= {*sources.fields(sources.find("vllm.engine.arg_utils", "EngineArgs"))}
    assert given - known == set()


def _keys(function: Function) -> set[str]:
    """Return the arguments of an engine that a function names: keys of `settings`, `chunking` and
    of what it returns."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.Return):
            targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
            owners = [t.value if isinstance(t, ast.Subscript) else t for t in targets]
            names = [getattr(owner, "id", "") for owner in owners]
            if isinstance(node, ast.Return) or {"settings", "chunking"} & {*names}:
                if isinstance(node.value, ast.Dict):
                    found |= {k.value for k in node.value.keys if isinstance(k, ast.Constant)}
                found |= {
                    t.slice.value
                    for t in targets
                    if isinstance(t, ast.Subscript) and isinstance(t.slice, ast.Constant)
                }
    return found


@pytest.mark.parametrize("root", of("vllm"), ids=lambda root: root.name)
def test_our_weight_transfer_is_one_of_vllm(root):
    """It implements what vLLM leaves open, and takes what vLLM hands to it."""
    sources = Sources(root)
    tree = ast.parse((PACKAGE / "rollout" / "vllm_worker.py").read_text())
    (ours,) = (
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "LinkedWeights"
    )
    methods = {node.name: node for node in ours.body if isinstance(node, Function)}
    base = sources.find("vllm.distributed.weight_transfer.base", "WeightTransferEngine")
    compared = 0
    for one in sources.mro(base):
        assert isinstance(one.node, ast.ClassDef)
        for theirs in one.node.body:
            if not isinstance(theirs, Function):
                continue
            if any("abstractmethod" in ast.unparse(x) for x in theirs.decorator_list):
                assert theirs.name in methods, theirs.name
            if theirs.name in methods:
                compared += 1
                names = [[*signature_of(x).parameters] for x in (theirs, methods[theirs.name])]
                assert names[0] == names[1], theirs.name
    assert compared >= 4


# ------------------------------------------------------------------ Megatron and Transformer Engine


_TE, _OWN = "te.pytorch.", "super().__init__"


def calls_of_megatron(megatron: Sources, engine: Sources) -> Iterator[tuple[str, ast.Call, object]]:
    """Yield (place, call, signature or why there is none) of calls of Megatron's layers."""
    module = "megatron.core.extensions.transformer_engine"
    for node in ast.walk(megatron.tree(module)):
        if isinstance(node, ast.ClassDef):
            bases = [name for base in node.bases if (name := ast.unparse(base)).startswith(_TE)]
            for name in bases:
                for call in ast.walk(node):
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == _OWN:
                        yield _of_engine(engine, f"{node.name}, {name}", call, name)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            is_class = name.startswith(_TE) and name.rpartition(".")[2][:1].isupper()
            if is_class:
                yield _of_engine(engine, f"{module}:{node.lineno}", node, name)


def _of_engine(engine: Sources, place: str, call: ast.Call, name: str):
    owner, _, attribute = name.replace("te.", "transformer_engine.", 1).rpartition(".")
    try:
        return place, call, engine.signature(engine.find(owner, attribute))
    except UnknownNameError as error:
        return place, call, error


MEGATRONS = of("megatron/core")


@pytest.mark.parametrize("root", MEGATRONS, ids=lambda root: root.name)
def test_megatrons_calls_into_transformer_engine_bind(root):
    if not has(CONTRACTS, "transformer_engine"):
        pytest.skip("Transformer Engine's sources are not here: make contracts")
    assert num_bound(calls_of_megatron(Sources(root), Sources(CONTRACTS))) >= 10


@pytest.mark.parametrize("root", MEGATRONS, ids=lambda root: root.name)
def test_what_megatron_adds_by_version_is_an_argument_of_some_layer(root):
    if not has(CONTRACTS, "transformer_engine"):
        pytest.skip("Transformer Engine's sources are not here: make contracts")
    engine = Sources(CONTRACTS)
    layers = ("Linear", "LayerNormLinear", "GroupedLinear", "DotProductAttention")
    known = {"fp8_dpa", "fp8_mha", "interval"}  # of the recipe of FP8
    for layer in layers:
        known |= {*engine.signature(engine.find("transformer_engine.pytorch", layer)).parameters}
    tree = Sources(root).tree("megatron.core.extensions.transformer_engine")
    given = {
        target.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Subscript)
        and ast.unparse(target.value) == "extra_kwargs"
        and isinstance(target.slice, ast.Constant)
    }
    assert len(given) > 15
    assert given - known - {*OLD} == set()


# ------------------------------------------------------------------ the reader itself


def test_the_reader_of_signatures_sees_what_does_not_fit(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text(
        'from .one import *\nfrom package.two import B as C\nLAZY = {"D": ".two:B"}\n'
    )
    (package / "one.py").write_text("def f(a, b=1, *, c): ...\n")
    (package / "two.py").write_text(
        "class A:\n    def __init__(self, x): ...\n"
        "    @classmethod\n    def make(cls, y): ...\n"
        "class B(A):\n    pass\n"
        "class F:\n    left: int\n    right: int = 0\n"
    )
    sources = Sources(tmp_path)

    def problem(name, text, module="package"):
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        try:
            bind(sources.signature(sources.find(module, name)), call)
        except TypeError as error:
            return str(error)
        return None

    assert problem("f", "f(1, c=2)") is None
    assert problem("f", "f(*x, **y)") is None
    assert "missing a required" in (problem("f", "f(1)") or "")
    assert "unexpected keyword" in (problem("f", "f(1, c=2, d=3)") or "")
    assert problem("C", "C(x=1)") is None
    assert "unexpected keyword" in (problem("D", "D(x=1, y=1)") or "")
    assert problem("F", "F(left=1, right=2)", "package.two") is None
    assert "unexpected keyword" in (problem("F", "F(middle=1)", "package.two") or "")
    with pytest.raises(UnknownNameError, match="package has no g"):
        sources.find("package", "g")
    method = sources.method(sources.find("package", "C"), "make")
    assert [*signature_of(method, drop=1).parameters] == ["y"]
    assert signatures.is_bound_to_class(method)
