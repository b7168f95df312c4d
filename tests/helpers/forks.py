"""Scripts run in forks of a process that has imported torch, which takes seconds.

A fork ends as any process of Python does, by the interpreter's finalization; those of
multiprocessing leave it out. Several are the ranks of a group, with the variables and the store
that torchrun gives them.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from tests.helpers import watched

ROOT = Path(__file__).resolve().parents[2]
STREAMS = ("stdout", "stderr")


class Finished(NamedTuple):
    """The output of a script's forks, and the exit code of the first that failed."""

    returncode: int
    stdout: str
    stderr: str


class Forks:
    """A process that runs scripts in forks of itself.

    Args:
        process: runs this file.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, arguments: list[str], folder: Path, ranks: int = 0) -> Finished:
        """Run a script as watched.py does, and wait until each rank ends.

        Args:
            arguments: those of watched.py: the script and its own.
            folder: gets files with what the ranks print.
            ranks: how many; by default one process without a group.
        """
        request = {"arguments": arguments, "folder": str(folder), "ranks": ranks}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        codes = json.loads(self.process.stdout.readline())
        shown = [
            "".join((folder / f"{i}.{stream}").read_text() for i in range(len(codes)))
            for stream in STREAMS
        ]
        return Finished(next(filter(None, codes), 0), *shown)


@contextmanager
def forks(*imported: str) -> Iterator[Forks]:
    """Start the process, which ends with the context.

    Args:
        imported: modules that it imports besides torch, so that the scripts need not.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.forks", *imported],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Forks(process)


# ---- the process ---------------------------------------------------------------------------------


def start_store(ranks: int) -> tuple[int, int]:
    """Fork a process that has a group's store; return its id and the store's port."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # the store's threads are here alone: a process that has threads does not fork
        store = dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
        os.write(writing, b"%d" % store.port)
        while True:
            signal.pause()
    port = int(os.read(reading, 10))
    os.close(reading)
    os.close(writing)
    return child, port


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return those variables of torchrun that libraries read here."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    agent = {"TORCHELASTIC_RUN_ID": "none"}
    if port:
        agent["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return {name: str(value) for name, value in found.items()} | address | agent


def redirect(folder: str, rank: int) -> None:
    """Let this process print to files, and read nothing."""
    names = [os.devnull, *(f"{folder}/{rank}.{stream}" for stream in STREAMS)]
    for descriptor, name in enumerate(names):
        file = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(file, descriptor)
        os.close(file)


def serve() -> None:
    """Run the script of each request in forks; return in a fork that has run its script."""
    for line in sys.stdin:
        request = json.loads(line)
        ranks = request["ranks"]
        store, port = start_store(ranks) if ranks else (0, 0)
        children = []
        for rank in range(max(1, ranks)):
            child = os.fork()
            if child == 0:
                redirect(request["folder"], rank)
                if ranks:
                    os.environ.update(environment(rank, ranks, port))
                watched.run(request["arguments"])
                return
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if store:
            os.kill(store, signal.SIGKILL)
            os.waitpid(store, 0)
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # so that forks neither look through these modules nor copy them
    serve()
