"""Small computations by the libraries that a run computes with, each in processes of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from mcore_rl import tolerances
from mcore_rl.doctor import symptoms
from mcore_rl.doctor.children import Answer, ask_together
from mcore_rl.doctor.rows import Row, Status, explained_by
from mcore_rl.doctor.site import Site

_ALONE = 2
"""Processes of the all-reduce on the CPU of one machine."""


def all_reduce(site: Site) -> list[Row]:
    """Collectives: gloo between two processes of the machine, or one of each node; NCCL between all
    devices."""
    node = site.node
    num_nodes, number = (1, 0) if node is None else (node.count, node.number)
    beside, of_node = (_ALONE, 0) if node is None else (1, number)
    rows = [_reduced(site, "gloo", beside, beside * num_nodes, of_node)]
    if count := site.num_devices:
        rows.append(_reduced(site, "nccl", count, count * num_nodes, number * count))
    return rows


def forward(site: Site) -> list[Row]:
    """One layer by Megatron-Core on each device, against transformers on the CPU."""
    wanted = f"within {tolerances.FLOAT32:g} of transformers"
    rows = []
    for place, environment in site.places:
        name, answer = f"forward {place}".strip(), site.ask("forward", environment=environment)
        row = _row(name, answer, site, wanted)
        if answer.values is not None:
            difference = answer.values["difference"]
            is_close = difference <= tolerances.FLOAT32
            row = Row(
                name=name,
                found=f"log-probabilities differ by {difference:.1e} on {answer.values['device']}",
                wanted=wanted,
                status=Status.OK if is_close else Status.FAULT,
                fix=""
                if is_close
                else "mcore-rl verify model --model MODEL  # says in which layer",
                must_match="close" if is_close else "apart",
            )
        rows.append(row)
    return rows


def token(site: Site) -> list[Row]:
    """One token by vLLM on each device, after a sync of weights."""
    rows = []
    for place, environment in site.places:
        name, answer = f"token {place}".strip(), site.ask("token", environment=environment)
        row = _row(name, answer, site, "one token by vLLM")
        if answer.values is not None:
            drawn, logprob = answer.values["token"], answer.values["logprob"]
            found = f"token {drawn}, log-probability {logprob:.3f}"
            row = Row(name=name, found=found, wanted=row.wanted)
        rows.append(row)
    return rows


def _reduced(site: Site, backend: str, beside: int, world_size: int, first_rank: int) -> Row:
    """Return the row of one collective, of which `beside` ranks are processes of this machine."""
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        store = f"file:{Path(folder) / 'store'}"
        if site.node is not None:
            store = f"tcp:{site.node.master}:{site.node.port}:doctor/{backend}"
        ranks = range(first_rank, first_rank + beside)
        environments: list[Mapping[str, str]] = [
            {**site.interfaces, "CUDA_VISIBLE_DEVICES": site.device(place)}
            for place in range(beside)
        ]
        args = [(backend, store, rank, world_size) for rank in ranks]
        answers = ask_together("all_reduce", args, site.deadline_s, environments)
    wanted = f"the sum of {world_size} processes"
    failed = next((answer for answer in answers if answer.values is None), None)
    return _row(f"all-reduce {backend}", failed or answers[0], site, wanted, wanted)


def _row(name: str, answer: Answer, site: Site, wanted: str, found: str = "") -> Row:
    if answer.values is not None:
        return Row(name=name, found=found, wanted=wanted)
    fix = _fix(name, answer.failure, site)
    return Row(name=name, found=answer.failure, wanted=wanted, status=Status.FAULT, fix=fix)


def _fix(name: str, failure: str, site: Site) -> str:
    """Return how to fix a failure: see another line, or install the versions that were tested
    together."""
    line = symptoms.line_of(failure)
    if line and line != name.partition(" ")[0]:
        return explained_by(line)
    if site.cuda is None:
        return "pip install --no-deps --force-reinstall -r requirements/cpu.lock"
    return 'pip install --force-reinstall -e ".[cuda]"'
