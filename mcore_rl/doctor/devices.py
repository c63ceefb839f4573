"""The CUDA side of the machine: driver, toolkit, NCCL, the devices. On a CPU build of torch none of
it is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from mcore_rl.doctor.rows import Row, Status, explained_by, not_needed
from mcore_rl.doctor.site import Site

_FREE_SHARE = 0.9
"""Of a device's memory that is free where nobody else uses it."""
_NVCC_LIMIT_S = 30.0


def driver(site: Site) -> list[Row]:
    """NVIDIA's driver, and whether torch can use the devices by it."""
    found = site.driver or "none"
    if site.cuda is None:
        return [not_needed("driver", found)]
    wanted = f"one that runs CUDA {site.cuda}"
    if not site.has_driver:
        fix = "install NVIDIA's driver, or the CPU build of torch (requirements/cpu.lock)"
        return [Row(name="driver", found=found, wanted=wanted, status=Status.FAULT, fix=fix)]
    if site.devices.values is None:
        found = f"{found}: {site.devices.failure}"
        fix = f"install a driver for CUDA {site.cuda}, or start the container with --gpus all"
        return [Row(name="driver", found=found, wanted=wanted, status=Status.FAULT, fix=fix)]
    return [Row(name="driver", found=found, wanted=wanted, must_match=found)]


def toolkit(site: Site) -> list[Row]:
    """CUDA's compiler, by which Apex, Transformer Engine and kernels of vLLM are built."""
    if site.cuda is None:
        return [not_needed("cuda-toolkit")]
    major = site.cuda.partition(".")[0]
    wanted = f"CUDA {major}, to build Apex or Transformer Engine"
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return [Row(name="cuda-toolkit", found="none", wanted=wanted, status=Status.ABSENT)]
    said = subprocess.run(
        [nvcc, "--version"], capture_output=True, text=True, timeout=_NVCC_LIMIT_S, check=False
    )
    release = re.search(r"release (\S+),", said.stdout)
    found = release[1] if release else said.stdout.strip() or said.stderr.strip()
    if found.partition(".")[0] == major:
        return [Row(name="cuda-toolkit", found=found, wanted=wanted, must_match=found)]
    fix = f"export PATH=/usr/local/cuda-{major}/bin:$PATH  # where CUDA {major} is"
    status = Status.WARNING
    return [
        Row(
            name="cuda-toolkit",
            found=found,
            wanted=wanted,
            status=status,
            fix=fix,
            must_match=found,
        )
    ]


def nccl(site: Site) -> list[Row]:
    """The NCCL that torch loads, against the one that it asks for."""
    if site.cuda is None:
        return [not_needed("nccl")]
    if site.devices.values is None:
        failure = site.devices.failure
        fix = explained_by("driver")
        return [Row(name="nccl", found=f"unknown: {failure}", status=Status.WARNING, fix=fix)]
    loaded = str(site.devices.values["nccl"])
    asked = [Requirement(text) for text in requires("torch") or ()]
    of_nccl = [r for r in asked if r.name.startswith("nvidia-nccl-")]
    if not of_nccl:  # a torch that was built with its own
        return [Row(name="nccl", found=loaded, must_match=loaded)]
    (requirement,) = of_nccl
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        installed = "none"
    found = f"{loaded}, installed {installed}"
    wanted = f"{requirement.name}{requirement.specifier}"
    if installed != "none" and requirement.specifier.contains(installed, prereleases=True):
        return [Row(name="nccl", found=found, wanted=wanted, must_match=found)]
    fix, status = f'pip install "{wanted}"', Status.FAULT
    return [Row(name="nccl", found=found, wanted=wanted, status=status, fix=fix, must_match=found)]


def devices(site: Site) -> list[Row]:
    """What each device is, whether torch has code for it, and whether it is free."""
    if site.cuda is None:
        return [not_needed("device")]
    if site.devices.values is None:
        fix = explained_by("driver")
        failure = site.devices.failure
        return [Row(name="device", found=failure, status=Status.FAULT, fix=fix)]
    kinds = site.devices.values["kinds"]
    rows = []
    for number, device in enumerate(site.devices.values["devices"]):
        free, total = device["free"] / 2**30, device["total"] / 2**30
        status, fix = Status.OK, ""
        if free < _FREE_SHARE * total:
            status, fix = Status.WARNING, "nvidia-smi  # shows who uses it"
        if not _has_code_for(device["kind"], kinds):
            status, fix = Status.FAULT, f"install a torch that is built for {device['kind']}"
        rows.append(
            Row(
                name=f"device cuda:{number}",
                found=f"{device['name']} ({device['kind']}), {free:.1f} of {total:.1f} GiB free",
                wanted=f"free, one of {' '.join(kinds)}",
                status=status,
                fix=fix,
                must_match=f"{device['name']}, {total:.1f} GiB",
            )
        )
    return rows


def _has_code_for(kind: str, kinds: list[str]) -> bool:
    """Whether code of one of `kinds` runs on a device of this kind: of the same major number and no
    later minor one, or what the driver compiles ("compute_90")."""
    number = int(kind.removeprefix("sm_"))
    for one in kinds:
        name, _, digits = one.partition("_")
        own = int(re.sub(r"\D", "", digits) or 0)
        is_same_major = own // 10 == number // 10
        if own <= number and (is_same_major or name == "compute"):
            return True
    return False
