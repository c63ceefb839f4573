"""Who may import what: the walls between the packages, read from the source.

A package may import what its row names, and itself. Imports inside functions count too: a wall is
a wall whenever it is crossed. Names loaded by string (plug-ins, wandb) are not seen.
"""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcore_rl.algorithms.objective import ObjectiveConfig, resolve_objective
from mcore_rl.algorithms.objectives import CriticObjective, PolicyObjective, SftObjective

PACKAGE = Path(__file__).parents[2] / "mcore_rl"

ROOT_FILES = (
    "types",
    "registry",
    "dtypes",
    "errors",
    "metrics",
    "lazy_torch",
    "durable_files",
    "model_files",
    "frames",
    "plugins",
    "progress",
    "hub",
    "checkpoint_metadata",
    "printable",
    "foreign_json",
    "model_code",
    "options",
    "segments",
    "tolerances",
    "processes",
    "sockets",
    "stores",
    "interruption",
)

# Of mcore_rl, beside the package itself and the root files. A name with a dot is one module.
MAY_IMPORT = {
    "types": (),
    "dtypes": (),
    "errors": (),
    "registry": (),
    "options": (),
    "segments": (),
    "tolerances": (),
    "processes": (),
    "sockets": (),
    "stores": (),
    "interruption": (),
    "metrics": (),
    "lazy_torch": (),
    "durable_files": (),
    "hub": (),
    "model_files": (),
    "model_code": (),
    "frames": (),
    "plugins": (),
    "progress": (),
    "checkpoint_metadata": (),
    "printable": (),
    "foreign_json": (),
    "algorithms": (),
    "data": (),
    "jail": (),
    "rewards": ("jail",),
    "observability": (),
    "models": (),
    "rollout": ("weight_sync.base", "weight_sync.digest", "weight_sync.intake"),
    "torch_dist": ("models.mappings",),
    "megatron": ("models", "data.batch", "torch_dist"),
    "weight_sync": (),
    # Only the sections that belong to components, and the types they are made of.
    "config": (
        "algorithms.advantages.base",
        "algorithms.aggregate",
        "algorithms.objective",
        "data.packing",
        "data.prompts",
        "megatron.config",
        "megatron.overrides",
        "rewards.base",
        "rollout.base",
        "weight_sync.base",
    ),
    "cluster": ("data.packing", "rollout.base", "workers.roles"),
    "workers": (
        "cluster.placement",
        "megatron",
        "models",
        "data.batch",
        "data.chat",
        "rollout",
        "weight_sync",
    ),
    # What the doctor knows of failures, for the last words of a run.
    "launch": ("cluster", "workers", "observability.log_setup", "rollout", "doctor.symptoms"),
    # A run from its configuration.
    "run": (
        "algorithms.filter_groups",
        "cluster",
        "config",
        "data",
        "launch",
        "loop.checkpoints",
        "loop.inputs",
        "megatron.overrides",
        "models.layout",
        "models.lora",
        "models.rope",
        "models.spec",
        "models.value_head",
        "observability",
        "rewards.score",
        "rollout.base",
        "workers",
    ),
    "loop": ("algorithms", "config", "data", "cluster", "observability", "rewards", "rollout.base"),
    # Reads what a run reads before it starts, and counts with the entries of models. Its command is
    # the training command without a run.
    "plan": (
        "cluster.memory",
        "cluster.phases",
        "cluster.placement",
        "config",
        "data",
        "launch.libraries",
        "megatron.config",
        "models",
        "observability.jsonl",
        "observability.log_setup",
        "observability.run_folder",
        "rollout.base",
        "rollout.fake_engine",
        "run.inputs",
        "train",
    ),
    "train": (
        "cluster.memory",
        "plan",
        "config",
        "launch.group",
        "loop",
        "observability.report",
        "observability.results",
        "observability.run_folder",
        "run",
    ),
    "replay": (
        "config",
        "data.chat",
        "launch.ending",
        "launch.group",
        "loop",
        "observability.run_folder",
        "run",
    ),
    # The training command without what only training needs.
    "eval": ("config", "run", "train"),
    "sft": ("config", "launch.group", "loop", "run"),
    "report": ("observability.report",),
    "logs": ("observability.log_view",),
    # Imports of checks: they run as the commands do and read what these wrote.
    "verify": (
        "algorithms.objective",
        "algorithms.objectives",
        "config",
        "cluster",
        "data.chat",
        "data.vocabulary",
        "launch",
        "models.layout",
        "models.reference",
        "models.rope",
        "models.safetensors_io",
        "models.spec",
        "rollout.base",
        "run",
    ),
    # Its probes do in small what a run does.
    "doctor": (
        "launch.libraries",
        "launch.ray",
        "launch.torchrun",
        "megatron",
        "models.reference",
        "models.safetensors_io",
        "models.spec",
        "rewards.base",
        "rewards.sandbox",
        "rollout",
        "verify.processes",
        "weight_sync.base",
        "weight_sync.sync",
    ),
    # A model is built for --verify alone.
    "convert": (
        "data.vocabulary",
        "megatron",
        "models",
        "observability.log_setup",
        "observability.run_folder",
        "torch_dist",
    ),
    "cli": (),
}

# What single modules may import beyond their package's row.
EXCEPTIONS = {"weight_sync.export": ("megatron.parallel", "models.mappings")}

# Distributions that only some modules may import; torch and numpy are free.
LIBRARY_OWNERS = {
    "vllm": ("rollout.vllm_", "weight_sync.ipc", "weight_sync.nccl"),
    "megatron": ("megatron.",),
    "hydra": ("config.",),
    "yaml": ("config.", "observability.run_folder"),
    "omegaconf": ("config.", "convert.convert", "observability.", "run.folder"),
    "transformers": (
        "data.chat",
        "data.prompts",
        "data.vocabulary",
        "models.",
        "megatron.",
        "plan.",
        "run.",
        "convert.",
        "verify.",
        "doctor.probe",
    ),
    "huggingface_hub": ("hub.", "models."),
    "safetensors": ("models.", "weight_sync.disk", "rollout.fake_engine"),
    "pyarrow": ("data.", "observability.results"),
    "jinja2": ("data.chat",),
    "math_verify": ("rewards.math",),
    "sympy": ("rewards.math",),
    "rich": ("observability.", "convert.", "doctor.table"),
    "packaging": ("megatron.versions", "doctor.devices", "doctor.versions"),
    "blake3": ("weight_sync.digest",),
    "aiohttp": ("rollout.hosts.server",),
    "pydantic": ("rollout.vllm_",),
    "psutil": ("sockets", "rollout.hosts.process", "doctor.network", "doctor.system"),
    "ray": ("launch.ray",),
    "zmq": ("launch.channel", "rollout.hosts.process", "sockets"),
    "torch": ("",),
    "numpy": ("",),
}


def modules() -> dict[str, ast.Module]:
    """Return the syntax trees of the package by name, without the leading `mcore_rl.`."""
    trees = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        trees[name.removesuffix(".__init__")] = ast.parse(file.read_text(encoding="utf-8"))
    return trees


MODULES = modules()


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield every module that is imported anywhere in a file, in full."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = full.removeprefix("mcore_rl.") in MODULES
                yield full if node.module.startswith("mcore_rl") and is_module else node.module


def is_within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def test_every_package_has_a_row():
    packages = {name.split(".")[0] for name in MODULES} - {"__init__"}
    assert packages == set(MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_its_row_allows(package):
    crossings = []
    for name, tree in MODULES.items():
        if name.split(".")[0] != package:
            continue
        allowed = (*ROOT_FILES, package, *MAY_IMPORT[package], *EXCEPTIONS.get(name, ()))
        for imported in imports(tree):
            if not imported.startswith("mcore_rl."):
                continue
            if not is_within(imported.removeprefix("mcore_rl."), allowed):
                crossings.append(f"{name} imports {imported}")
    assert crossings == []


def test_libraries_are_imported_by_their_owners_only():
    strangers = []
    for name, tree in MODULES.items():
        for imported in imports(tree):
            library = imported.split(".")[0]
            if library in sys.stdlib_module_names or library == "mcore_rl":
                continue
            if not f"{name}.".startswith(LIBRARY_OWNERS.get(library, ())):
                strangers.append(f"{name} imports {imported}")
    assert strangers == []


def test_nothing_prints_but_the_last_words_of_a_process():
    """Programs write results with sys.stdout.write; a worker's last words go to stderr."""
    prints = []
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "print"
            ):
                to_stderr = any(
                    keyword.arg == "file" and ast.unparse(keyword.value) == "sys.stderr"
                    for keyword in node.keywords
                )
                if name != "launch.torchrun" or not to_stderr:
                    prints.append(f"{name}:{node.lineno}")
    assert prints == []


def loaded_modules(code: str) -> set[str]:
    """Return the names in sys.modules after `code` ran in a fresh process."""
    script = f"{code}\nimport sys\nsys.stdout.write(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stdout.split())


@pytest.mark.starts_processes
def test_importing_the_package_loads_no_torch():
    loaded = loaded_modules("import mcore_rl, mcore_rl.cli, mcore_rl.errors")
    assert "mcore_rl.errors" in loaded
    assert not loaded & {"torch", "numpy", "hydra", "transformers", "vllm"}
    assert "torch" not in loaded_modules("import mcore_rl.types")


@pytest.mark.starts_processes
def test_a_configuration_composes_without_torch_megatron_vllm_and_transformers():
    """The seconds these imports take would stand between a typing error and its message."""
    loaded = loaded_modules(
        "from mcore_rl.config.checks import check_run\n"
        "from mcore_rl.config.compose import compose_config, parse_command_line, to_yaml\n"
        "from mcore_rl.config.run import RunConfig\n"
        "argv = ['--config-name', 'gmpo', 'model.path=m', 'data.train_files=d']\n"
        "config = compose_config(RunConfig, parse_command_line('p', 'd', argv))\n"
        "check_run(config)\n"
        "to_yaml(config)\n"
        "import mcore_rl.train, mcore_rl.sft\n"
    )
    assert "mcore_rl.config.run" in loaded
    others = {"megatron.core", "vllm", "transformers", "pyarrow", "rich"}
    assert not loaded & {"torch", *others}


@pytest.mark.starts_processes
def test_a_worker_reads_an_objective_without_the_loop(tmp_path):
    """What travels to the workers brings along the mathematics and nothing of the controller."""
    objectives = [
        PolicyObjective(resolve_objective(ObjectiveConfig.of("geo_mean"), 16), log_entropy=True),
        CriticObjective(0.5, "token-mean", 16.0),
        SftObjective(),
    ]
    file = tmp_path / "objectives"
    file.write_bytes(pickle.dumps(objectives))
    loaded = loaded_modules(
        "import pickle, pathlib\n"
        f"objectives = pickle.loads(pathlib.Path({str(file)!r}).read_bytes())\n"
        "assert objectives[0].spec.options.low == 0.4\n"
    )
    packages = {name.split(".")[1] for name in loaded if name.startswith("mcore_rl.")}
    assert "algorithms" in packages
    assert packages <= {"algorithms", *ROOT_FILES}
    assert not loaded & {"hydra", "omegaconf", "transformers", "megatron.core", "vllm"}
