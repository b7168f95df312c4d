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


if __name__ == "__main__":
    faulthandler.dump_traceback_later(DEADLINE)
    signal.alarm(DEADLINE + 10)  # also ends a process whose interpreter is locked
    if sys.argv[1] == LATE_GLOO:
        dist.all_reduce = late_all_reduce
        del sys.argv[1]
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
