"""`make gpu-training`: the training layer on a GPU, and a memory check, in five minutes.

It comes after `make gpu-evidence`, which measures the ops. It runs the GPU tests of `synface`, its
commands as a user types them, and some GPU tests of every op under NVIDIA's compute-sanitizer, and
writes benchmarks/results/training/<device>.json. Every step has a time limit, every result is
written as it comes, and what fails leaves the rest to be measured: the exit status says at the end
whether all went well. `--dry` does the same on the CPU with tiny settings, where compute-sanitizer
is left out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from . import evidence, table
from .process import RESULTS, ROOT, run_limited
from .pytest_results import without_folders
from .verify import GPU_TESTS, run_gpu_tests, run_tests
from .worker import Worker

FOLDER = RESULTS / "training"
TESTS = GPU_TESTS / "training"
BUDGET_SECONDS, DRY_SECONDS = 300.0, 1200.0
TEST_SECONDS, SANITIZER_SECONDS = 60.0, 60.0
LINES_MAX = 12  # of a command's last lines, or of the sanitizer's first ones, that are kept
SANITIZER = "compute-sanitizer"
SANITIZED = "agree_bitwise"  # tests of every op that run its kernels and nothing else
FAULT = 99  # exit status of compute-sanitizer where it found something


class Command(NamedTuple):
    """A command of `synface`; in its words ``{folder}`` is where the commands' files are.

    Attributes:
        seconds: its time limit.
        tells: what the lines that tell its result have in them.
        written: the JSON file that it leaves there, whose content is kept; "" for none.
    """

    words: str
    seconds: float
    tells: str
    written: str = ""

    def arguments(self, folder: Path) -> list[str]:
        """Return the arguments of ``python -m synface``."""
        return self.words.format(folder=folder).split()

    @property
    def title(self) -> str:
        """The command without its folder, as results name it."""
        return "synface " + self.words.replace("{folder}/", "")


def commands(dry: bool) -> list[Command]:
    """Return the commands in the order in which they run; later ones read files of earlier ones."""
    on, size = ("cpu", "16x16") if dry else ("cuda", "112x112")
    workers = max(1, len(os.sched_getaffinity(0)) - 2)  # of 16 cores, two are left to training

    def either(tiny: str, usual: str) -> str:
        return tiny if dry else usual

    speed = f"bench training --device {on} --output {{folder}}/speed " + either(
        "--backbone iresnet --size 16x16 --batch-size 8 --identities 200 --workers 1 "
        "--embedding-size 8 --classes 100,200 --seconds 0",
        "--backbone iresnet50 --batch-size 512 --precision bfloat16 --identities 100k "
        f"--classes 100k,1m --memory 8192 --workers {workers} --seconds 45",
    )
    many = f"pack --device {on} --output {{folder}}/many.safetensors --objective lse " + either(
        "--count 400 --dim 16 --steps 50", "--count 50000 --dim 512 --steps 500"
    )
    few = f"pack --device {on} --output {{folder}}/identities.safetensors --dim 64 " + either(
        "--count 12 --steps 20", "--count 500"
    )
    draw = (
        f"synthesize --device {on} --packed {{folder}}/identities.safetensors --size {size} "
        f"--output {{folder}}/faces --images-per-identity {either('4', '10')}"
    )
    learn = (
        f"train --device {on} --data {{folder}}/faces --output {{folder}}/run --size {size} "
    ) + either(
        "--epochs 1 --batch-size 8 --embedding-size 8 --holdout 4",
        "--epochs 2 --batch-size 128 --backbone iresnet18 --precision bfloat16 --holdout 50",
    )
    return [
        Command(speed, 110, "images/s", "speed/training-speed.json"),
        Command(many, 60, "lse:"),
        Command(few, 60, "orbit:"),
        Command(draw, 60, "images of each"),
        Command(learn, 60, "ROC-AUC: trained"),
        Command(
            f"eval {{folder}}/run --device {on} --output {{folder}}/verified", 40,
            "ROC-AUC: trained",
        ),
    ]  # fmt: skip


def main() -> None:
    args = evidence.parser(__doc__).parse_args()
    run = Run(
        args.dry,
        evidence.output_of(args, "gpu-training", FOLDER),
        args.seconds or (DRY_SECONDS if args.dry else BUDGET_SECONDS),
    )
    run.build()
    run.describe()
    run.test()
    first, *others = range(len(run.todo))
    run.command(first)  # the rate of training
    run.sanitize()
    for number in others:
        run.command(number)
    run.finish()


class Run(evidence.Evidence):
    """A run of the training layer's tests and commands."""

    def __init__(self, dry: bool, output: Path, budget: float) -> None:
        super().__init__("gpu-training", dry, output, budget)
        self.todo = commands(dry)
        self.folder = tempfile.TemporaryDirectory()
        unreached = {"not_measured": "not reached"}
        self.result |= {
            "tests": unreached,
            "sanitizer": unreached,
            "commands": [{"command": each.title, **unreached} for each in self.todo],
        }
        output.parent.mkdir(parents=True, exist_ok=True)

    def keep(self, name: str, found: dict[str, Any], why: str | None) -> None:
        """Keep a result, and why it is not what it should be."""
        self.result[name] = found
        self._report(name, found, why)

    def _report(self, name: str, found: dict[str, Any], why: str | None) -> None:
        print(f"{name}: {found}", flush=True)
        if why:
            self.problems.append(f"{name}: {why}")
        self.save()

    def describe(self) -> None:
        """Describe the machine."""
        with Worker("cpu" if self.dry else "cuda") as worker:
            found = worker.run("machine", 60)
        self.keep("machine", found, found.get("not_measured"))

    def test(self) -> None:
        """Run the training layer's GPU tests."""
        seconds = self.left() if self.dry else min(TEST_SECONDS, self.left())
        found = run_gpu_tests(seconds, folder=TESTS, interpreted=self.dry)["training"]
        why = found.problem or (f"{found.failed} tests failed" if found.failed else None)
        self.keep("tests", found.summary(), why if found.passed else why or "none passed")

    def sanitize(self) -> None:
        """Run GPU tests of every op under compute-sanitizer."""
        if self.dry:
            found = {"not_measured": "a CPU has no compute-sanitizer"}
            self.keep("sanitizer", found, None)
            return
        found = sanitize(min(SANITIZER_SECONDS, self.left()))
        self.keep("sanitizer", found, found.get("not_measured") or found.get("problem"))

    def command(self, number: int) -> None:
        """Run a command, as long as there is time for it."""
        command = self.todo[number]
        found = {"command": command.title, **self._run(command)}
        self.result["commands"][number] = found
        self._report(command.title, found, found.get("not_measured") or found.get("problem"))

    def _run(self, command: Command) -> dict[str, Any]:
        seconds, folder = self.left(), Path(self.folder.name)
        if seconds <= 0:
            return {"not_measured": "no time was left"}
        if not self.dry:
            seconds = min(command.seconds, seconds)
        said, began = folder / "said.txt", time.monotonic()
        with said.open("wb") as out:
            problem = run_limited(
                [sys.executable, "-m", "synface", *command.arguments(folder)],
                seconds,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        lines = _lines(said.read_text(errors="replace").splitlines())
        telling = [line for line in lines if command.tells in line]
        if problem is None and not telling:
            problem = f"it printed no line with {command.tells!r}"
        found: dict[str, Any] = {
            "seconds": round(time.monotonic() - began, 1),
            "tells": telling,
            "printed": lines[-LINES_MAX:],
        }
        if command.written and (folder / command.written).exists():
            found["result"] = json.loads((folder / command.written).read_text())
        return found if problem is None else {**found, "problem": problem}


def sanitize(seconds: float) -> dict[str, Any]:
    """Return the outcome of some GPU tests of every op under compute-sanitizer's memory check.

    Each tensor then has an allocation of its own, past whose end an access is noticed. Tests that
    ran before the time was over count.
    """
    tool = shutil.which(SANITIZER)
    if tool is None:
        return {"not_measured": f"{SANITIZER} is not on PATH"}
    arguments = ["-k", SANITIZED, "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    with tempfile.TemporaryFile("w+") as printed:
        outcome = run_tests(
            [*map(str, sorted(GPU_TESTS.glob("test_gpu_*.py"))), *arguments],
            seconds,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            under=[tool, "--tool", "memcheck", "--error-exitcode", str(FAULT)],
            stdout=printed,
        )
        printed.seek(0)
        lines = [line for line in printed if line.startswith("=========")]
    found = {"tool": f"{SANITIZER} --tool memcheck", **outcome.summary()}
    if outcome.problem and outcome.problem.endswith(f"status {FAULT}"):
        found["problem"] = "it found faults, see reports"
    elif outcome.failed and not outcome.problem:
        found["problem"] = f"{outcome.failed} tests failed"
    return found | {"reports": _lines(lines[:LINES_MAX])}


def _lines(lines: Iterable[str]) -> list[str]:
    """Return lines that can be published: without folders, and without a line's blank rest."""
    return [line for line in (without_folders(line).rstrip() for line in lines) if line]


# ---- the page of results -------------------------------------------------------------------------


def results() -> dict[str, dict[str, Any]]:
    """Return the committed results by their file's name without suffix."""
    paths = sorted(path for path in FOLDER.glob("*.json") if path.stem != "dry-run")
    found = {path.stem: json.loads(path.read_text()) for path in paths}
    return {name: each for name, each in found.items() if "not_measured" not in each["machine"]}


def section() -> str:
    """Return the text on the training layer of the page of all results."""
    parts = [
        "`make gpu-training` runs the training layer's GPU tests, commands as a user types them, "
        "and GPU tests of every op under NVIDIA's compute-sanitizer."
    ]
    for result in results().values():
        machine = result["machine"]
        parts.append(
            f"**{table.name_of(machine)}**; torch {machine['torch']}, {result['date']}, "
            f"`{result['command']}`."
        )
        rows = [["", "result"], ["GPU tests of `synface`", _verdict(result["tests"])]]
        rows.append(["GPU tests of the ops under a memory check", _verdict(result["sanitizer"])])
        parts.append(table.markdown(rows))
        rows = [["command", "seconds, with its start", "what it tells"]]
        for each in result["commands"]:
            why = each.get("not_measured") or each.get("problem")
            tells = f"not measured: {why}" if why else "; ".join(each["tells"])
            rows.append([f"`{each['command']}`", f"{each.get('seconds', '')}", tells])
        parts.append(table.markdown(rows))
    if len(parts) == 1:
        parts.append("On a GPU: not measured.")
    return "\n\n".join(parts)


def _verdict(found: dict[str, Any]) -> str:
    if "passed" not in found:
        return f"not measured: {found['not_measured']}"
    counts = ", ".join(f"{found[kind]} {kind}" for kind in ("passed", "skipped", "failed"))
    return counts + (f"; {found['problem']}" if found.get("problem") else "")


if __name__ == "__main__":
    main()
