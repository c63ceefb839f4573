"""Sends the actor's weights to the engines that this train worker feeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

from mcore_rl.metrics import to_host
from mcore_rl.rollout.hosts.process import RemoteSession
from mcore_rl.sockets import Address, address_towards
from mcore_rl.weight_sync.base import Link, NamedTensors, Sender, UpdateSession
from mcore_rl.weight_sync.digest import Manifest
from mcore_rl.weight_sync.export import AdapterExporter, WeightExporter
from mcore_rl.weight_sync.sync import Target, sync_weights
from mcore_rl.workers.roles import SentWeights, WeightSource


class WeightSourceWorker(WeightSource):
    """Owns the senders of one train worker.

    Args:
        exporter: of the actor's weights in this process.
        links: of the engines that it feeds, by their number.
        inside: session of the engine in this process, if there is one; every sync sends to it.
        bucket_bytes: most bytes that are sent at a time.
        senders: ranks that feed engines; only these get the gathered weights. None: all.
        adapters: exporter of the adapters, if engines take them in addition to the weights; then
            `exporter` is of the weights without them.
        tells: whether it returns the digests of what it has sent.
    """

    def __init__(
        self,
        exporter: WeightExporter,
        links: Mapping[int, Link],
        inside: UpdateSession | None,
        bucket_bytes: int,
        senders: AbstractSet[int] | None,
        adapters: AdapterExporter | None = None,
        tells: bool = False,
    ) -> None:
        self._adapters, self._tells = adapters, tells
        self._exporter, self._inside = exporter, inside
        self._bucket_bytes, self._sending_ranks = bucket_bytes, senders
        self._links = links
        self._senders: dict[int, Sender[Any]] = {}

    def send_weights(
        self, version: int, engines: Mapping[int, Address], with_digests: bool, with_base: bool
    ) -> SentWeights:
        """See `WeightSource`."""
        targets: dict[int, Target] = {}
        sessions: list[RemoteSession] = []
        for engine, link in self._links.items():
            if self._inside is not None:
                targets[engine] = Target(self._sender(link), self._inside)
            elif engine in engines:
                sessions.append(RemoteSession(engines[engine]))
                targets[engine] = Target(self._sender(link, engines[engine].host), sessions[-1])
        buckets = self._buckets(with_base)
        manifest = Manifest() if self._tells else None
        metrics = sync_weights(buckets, list(targets.values()), version, with_digests, manifest)
        for session in sessions:
            session.close()
        if self._inside is not None:
            for target in targets.values():
                if target.problem is not None:
                    raise target.problem
        problems = {n: t.problem for n, t in targets.items() if t.problem is not None}
        return SentWeights(to_host(metrics), problems, {} if manifest is None else manifest.texts())

    def _sender(self, link: Link, host: str | None = None) -> Sender[Any]:
        """Return the sender to an engine; `host` is its address, if it is reached over a
        network."""
        if link.engine not in self._senders:
            if host is not None:
                link = replace(link, address=address_towards(host))
            self._senders[link.engine] = link.open_sender()
        return self._senders[link.engine]

    def _buckets(self, with_base: bool) -> Iterator[NamedTensors]:
        if with_base or self._adapters is None:
            yield from self._exporter.buckets(self._bucket_bytes, self._sending_ranks)
        if self._adapters is not None:
            yield from self._adapters.buckets(self._bucket_bytes, self._sending_ranks)

    def close(self) -> None:
        """Free the senders."""
        for sender in self._senders.values():
            sender.close()
