"""Where the package could run what a file or a socket says: each place, with what guards it.

Read from the source. A new unpickling, a new reader of JSON, or a switch that lets a model bring
code of its own fails here until it has a guard, which is then named below.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mcore_rl"

LIST = "an unpickler that admits the classes of a list"
WEIGHTS_ONLY = "weights_only: torch's unpickler of tensors"
PARENT = "a socket pair of this process and the one that started it; no other has an end"
CHANNEL = "from the processes of the same run: over the channel, which drops strangers unread"
BYTES = "bytes of a socket of ZeroMQ, which unpickles nothing"
TENSOR = "a tensor that is there, filled"
NO_PICKLES = "allow_pickle=False: numpy reads numbers alone"
RANKS = "from the processes of the same run, over their process group"

UNPICKLING = {
    ("checkpoint_metadata", "_MetadataUnpickler"): LIST,
    ("torch_dist.format", "_TensorPickle"): LIST,
    ("megatron.checkpoint", "dist.all_gather_object"): RANKS,
    ("megatron.checkpoint", "dist.gather_object"): RANKS,
    ("torch_dist.source", "torch.load"): WEIGHTS_ONLY,
    ("rewards.worker", "pickle.loads"): PARENT,
    ("weight_sync.export", "dist.all_gather_object"): RANKS,
    ("rollout.vllm_engine", "dist.all_gather_object"): RANKS,
    ("megatron.parallel", "dist.all_gather_object"): RANKS,
    ("frames", "pickle.loads"): CHANNEL,
    ("launch.channel", "socket.recv"): BYTES,
    ("rollout.hosts.process", "socket.recv"): BYTES,
    ("weight_sync.export", "dist.recv"): TENSOR,
    ("loop.journal", "np.load"): NO_PICKLES,
}
"""(module, what is called or subclassed) -> guard."""

UNGUARDED = {
    *("get_default_load_sharded_strategy", "load_common_state_dict", "load_plain_tensors"),
    *("FileSystemReader", "load_state_dict_from_keys"),
}
"""What reads `.metadata` or `common.pt` as it comes, in Megatron and torch."""

OWN = "of a process that this one started, or of the file that it wrote before"
JSON = {
    "foreign_json": "the one reader of what comes from elsewhere",
    "jail.server": OWN,
    "launch.channel": "headers of messages; one of a stranger is dropped, whatever it raises",
    "rewards.sandbox": OWN,
    "rewards.pool": OWN,
    "doctor.children": OWN,
    "verify.layouts": OWN,
    "verify.layout_run": OWN,
    "verify.model_run": OWN,
    "rollout.fake_engine": "of a model that `load_hf_config` has read",
    "rewards.code": "within a reward's process, where whatever is raised is an answer",
}
"""Modules that call `json.load` or `json.loads`, and whose text it is."""

# Names by which Python code turns bytes into objects that may call, in any library that we use.
UNPICKLERS = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler", "cPickle.loads"),
    *("marshal.load", "marshal.loads", "shelve.open", "dill.load", "dill.loads"),
    *("cloudpickle.load", "cloudpickle.loads", "joblib.load", "pandas.read_pickle"),
    *("torch.load", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load"),
    *(
        "np.load",
        "numpy.load",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "jsonpickle.decode",
    ),
}
OBJECT_COLLECTIVES = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("recv_object_list", "all_gather_object_list"),
}
OF_CONNECTIONS = {"recv", "recv_pyobj", "recv_serialized"}
"""Methods that unpickle what a connection of multiprocessing or a socket of ZeroMQ brings."""


def modules(folder: Path = PACKAGE) -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(folder.rglob("*.py")):
        name = ".".join(file.relative_to(folder).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(file.read_text(encoding="utf-8"))


def is_unpickling(name: str) -> bool:
    last = name.rpartition(".")[2]
    return name in UNPICKLERS or last in OBJECT_COLLECTIVES or last in OF_CONNECTIONS


def found_in(tree: ast.Module) -> Iterator[str]:
    """Yield what unpickles: calls by their dotted name, names that are imported, subclasses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and is_unpickling(ast.unparse(node.func)):
            yield ast.unparse(node.func)
        elif isinstance(node, ast.ClassDef):
            if any("Unpickler" in ast.unparse(base) for base in node.bases):
                yield node.name
        elif isinstance(node, ast.ImportFrom):
            yield from (
                f"{node.module}.{alias.name}"
                for alias in node.names
                if is_unpickling(f"{node.module}.{alias.name}")
            )


def test_every_unpickling_is_listed_with_its_guard():
    found = {(name, what) for name, tree in modules() for what in found_in(tree)}
    assert found == set(UNPICKLING)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle\npickle.loads(x)", ["pickle.loads"]),
        ("from pickle import loads", ["pickle.loads"]),
        ("import torch\ntorch.load(f)", ["torch.load"]),
        ("np.load(f, allow_pickle=True)", ["np.load"]),
        ("socket.recv_pyobj()", ["socket.recv_pyobj"]),
        ("self.connection.recv()", ["self.connection.recv"]),
        ("connection.recv_bytes()", []),
        ("class A(pickle.Unpickler): pass", ["A"]),
        ("json.loads(x)", []),
    ],
)
def test_the_search_sees_an_unpickling(source, found):
    assert list(found_in(ast.parse(source))) == found


def test_tensors_are_loaded_as_weights_only():
    """Said at each call: torch has an environment variable that turns its default."""
    for folder in ("mcore_rl", "tools", "examples", "benchmarks"):
        for name, tree in modules(ROOT / folder):
            for call in calls(tree):
                if ast.unparse(call.func) == "torch.load":
                    said = {k.arg: ast.unparse(k.value) for k in call.keywords}
                    assert said.get("weights_only") == "True", (folder, name)


def calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_no_loader_of_megatron_or_torch_is_called():
    """They read `.metadata` or `common.pt` as it comes."""
    for name, tree in modules():
        for call in calls(tree):
            called = ast.unparse(call.func)
            assert called != "dist_checkpointing.load", name
            assert called.rpartition(".")[2] not in UNGUARDED, name


def test_json_from_elsewhere_has_one_reader():
    found = {
        name
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.load", "json.loads")
    }
    assert found == set(JSON)


def test_no_model_s_code_is_run():
    """transformers asks at the terminal where nothing is said, so each loader says no."""
    loaders = []
    for folder in ("mcore_rl", "tools", "examples", "benchmarks"):
        for name, tree in modules(ROOT / folder):
            for text in trust_said_in(tree):
                assert text == "False", (folder, name)
            loaders += [
                "trust_remote_code" in [keyword.arg for keyword in call.keywords]
                for call in calls(tree)
                if folder == "mcore_rl" and ast.unparse(call.func).startswith("Auto")
            ]
    assert loaders == [True] * 5


def trust_said_in(tree: ast.Module) -> Iterator[str]:
    """Yield what `trust_remote_code` is, as an argument or in a dictionary of arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            yield ast.unparse(node.value)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                    yield ast.unparse(value)
