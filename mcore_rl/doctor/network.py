"""The names and interfaces by which the processes of a run find one another."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable

from mcore_rl.doctor.rows import Row, Status
from mcore_rl.doctor.site import Site

_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_DEFAULT_PORT = 29500
"""torchrun's default, unless MASTER_PORT names another."""
_STEERING = ("CUDA_", "GLOO_", "NCCL_", "TORCH_NCCL_")
"""Beginnings of the variables that steer collectives and devices; none holds a secret."""


def host_name(site: Site) -> list[Row]:
    """Whether the machine's name is an address that others can reach: gloo and NCCL's bootstrap
    listen at it where no interface is named."""
    name = socket.gethostname()
    several = site.is_several and not os.environ.get("GLOO_SOCKET_IFNAME")
    wanted = "an address that other nodes reach" if several else "an address"
    own = _reachable_addresses()
    address = next(iter(own.values()), "ADDRESS")
    fix = f'echo "{address} {name}" >> /etc/hosts  # in place of the line that has it'
    try:
        found = sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)})
    except OSError as error:
        text = f"{name} is not known: {error.strerror}"
        status = Status.FAULT if several else Status.WARNING
        return [Row(name="host-name", found=text, wanted=wanted, status=status, fix=fix)]
    text = f"{name} is {', '.join(found)}"
    if all(_is_loopback(one) for one in found):
        if several:
            fix = f"export GLOO_SOCKET_IFNAME={next(iter(own), 'INTERFACE')}  # or: {fix}"
            return [Row(name="host-name", found=text, wanted=wanted, status=Status.FAULT, fix=fix)]
        if any(one.startswith("127.") and one != "127.0.0.1" for one in found):
            # Debian writes it into /etc/hosts; nothing else is at that address.
            return [
                Row(
                    name="host-name",
                    found=text,
                    wanted="an address of an interface; other nodes reach none of these",
                    status=Status.WARNING,
                    fix=fix,
                )
            ]
    return [Row(name="host-name", found=text, wanted=wanted)]


def interfaces(site: Site) -> list[Row]:
    """The interfaces that have addresses, and those that are named for collectives."""
    own = _reachable_addresses()
    text = ", ".join(f"{name} {address}" for name, address in own.items()) or "loopback only"
    names = [name for _, name in socket.if_nameindex()]
    for variable in _INTERFACE_VARIABLES:
        value = os.environ.get(variable, "")
        if missing := _missing_interfaces(value, names):
            found = f"{variable}={value}: there is no {', '.join(missing)}; there is {text}"
            best = next(iter(own), "lo")
            fix = f"export {variable}={best}"
            wanted = "one that there is"
            return [
                Row(name="interfaces", found=found, wanted=wanted, status=Status.FAULT, fix=fix)
            ]
    if site.is_several and not own:
        fix = "ip link set INTERFACE up  # ip addr shows them"
        wanted = "one that other nodes reach"
        return [Row(name="interfaces", found=text, wanted=wanted, status=Status.FAULT, fix=fix)]
    return [Row(name="interfaces", found=text)]


def port(site: Site) -> list[Row]:
    """Whether the port is free at which torchrun's processes would meet here."""
    if site.node is not None:
        found = f"torchrun listens at {site.node.master}:{site.node.port}"
        return [Row(name="port", found=found)]
    number = int(os.environ.get("MASTER_PORT", _DEFAULT_PORT))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
        except OSError as error:
            found = f"{number}: {error.strerror}"
            fix = f"torchrun --master-port {_free_port()} ...  # ss -ltnp shows who has {number}"
            return [Row(name="port", found=found, wanted="free", status=Status.WARNING, fix=fix)]
    return [Row(name="port", found=f"{number}, free", wanted="free, for torchrun")]


def environment(site: Site) -> list[Row]:
    """The variables that steer collectives and devices, which all nodes must share."""
    found = {k: v for k, v in sorted(os.environ.items()) if k.startswith(_STEERING)}
    text = " ".join(f"{name}={value}" for name, value in found.items()) or "none set"
    return [Row(name="environment", found=text, must_match=text)]


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _reachable_addresses() -> dict[str, str]:
    """Return the IPv4 address, or another where there is none, of each interface that is up and not
    the loopback."""
    import psutil  # it may be missing

    states, found = psutil.net_if_stats(), {}
    for name, addresses in psutil.net_if_addrs().items():
        usable = [
            a.address
            for family in (socket.AF_INET, socket.AF_INET6)
            for a in addresses
            if a.family == family and not _is_loopback(a.address)
        ]
        if usable and name in states and states[name].isup:
            found[name] = usable[0]
    return found


def _missing_interfaces(value: str, names: Iterable[str]) -> list[str]:
    """Return the interfaces of a list that do not exist. NCCL accepts prefixes of names, "=" before
    exact names, and "^" before names to exclude."""
    if value.startswith("^"):
        return []
    known = list(names)
    wanted = [part for part in value.removeprefix("=").split(",") if part]
    return [part for part in wanted if not any(name.startswith(part) for name in known)]


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
