"""An engine in processes of its own, one for each receiver, that writes down what it loads."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace

from mcore_rl.errors import WeightSyncError
from mcore_rl.weight_sync.digest import Manifest
from mcore_rl.weight_sync.intake import Intake, refuse


def serve(connection, link):
    """Do what comes by the connection until it is closed."""
    kept = []
    intake = Intake(link, kept.extend)
    while True:
        try:
            what, argument = connection.recv()
        except EOFError:
            return
        try:
            answer = None
            if what == "begin":
                kept.clear()
                intake.begin(argument)
            elif what == "receive":
                intake.receive(argument)
            elif what == "finish":
                loaded = Manifest()  # of what it kept until now
                loaded.add(kept)
                refuse(intake.differences(argument) + argument.differences(loaded), 0)
                kept.clear()
                intake.end()
            elif what == "end":
                kept.clear()
                intake.end()
            connection.send((True, answer))
        except Exception as error:  # noqa: BLE001  travels to the test
            connection.send((False, str(error)))


class ProcessEngine:
    """An `UpdateSession` whose receivers are in processes of their own."""

    def __init__(self, link):
        self.weight_version = -1
        context = multiprocessing.get_context("spawn")
        self.processes, self.connections = [], []
        for receiver in range(link.num_receivers):
            here, there = context.Pipe()
            process = context.Process(
                target=serve, args=(there, replace(link, receiver=receiver)), daemon=True
            )
            process.start()
            there.close()
            self.processes.append(process)
            self.connections.append(here)
        self.pool = ThreadPoolExecutor(link.num_receivers)

    def ask(self, what, argument=None):
        def ask_one(connection):
            connection.send((what, argument))
            done, answer = connection.recv()
            if not done:
                raise WeightSyncError(answer)

        asked = [self.pool.submit(ask_one, connection) for connection in self.connections]
        for done in wait(asked, return_when=FIRST_EXCEPTION).done:
            done.result()

    def start_weight_update(self, version, with_digests=False):
        self.weight_version, self.coming = -1, version
        self.ask("begin", version)

    def update_weights(self, update):
        self.ask("receive", update)

    def finish_weight_update(self, manifest):
        self.ask("finish", manifest)
        self.weight_version = self.coming

    def abort_weight_update(self):
        if all(process.is_alive() for process in self.processes):
            self.ask("end")

    def close(self):
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(30)
        self.pool.shutdown()
