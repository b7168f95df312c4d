"""`python watched.py [--late-gloo] SCRIPT …`: run a script with a time limit.

After DEADLINE seconds every thread's stack is printed and the process ends; under torchrun on
each rank. With --late-gloo, gloo's threads hold a tensor for a while after its
all_reduce is done, as they may on a busy machine.
"""

import faulthandler
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

DEADLINE = 120
LATE_GLOO = "--late-gloo"

all_reduce = dist.all_reduce


def late_all_reduce(*args: Any, **options: Any) -> None:
    future = all_reduce(*args, **options, async_op=True).get_future()
    future.then(lambda _: time.sleep(1))  # by gloo's thread, which has the tensor meanwhile
    future.wait()


def run(arguments: list[str]) -> None:
    """Run a script in this process, as Python does, under the time limit."""
    faulthandler.dump_traceback_later(DEADLINE)
    signal.alarm(DEADLINE + 10)  # also ends a process whose interpreter is locked
    if arguments[0] == LATE_GLOO:
        dist.all_reduce = late_all_reduce
        del arguments[0]
    sys.argv[:] = arguments
    sys.path[0] = str(Path(arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    run(sys.argv[1:])
