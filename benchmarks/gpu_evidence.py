"""`make gpu-evidence`: the tests and benchmarks that need a GPU, in seven minutes.

It builds with the Python, torch and compiler of the machine, runs each op's GPU tests, measures the
ceilings, every op's cases beside their peers, and the margin softmax's kernels, settings and
captured steps, and writes benchmarks/results/<device>.json. It downloads nothing. Every step has a
time limit, every result is written as it comes, and what fails leaves the rest to be measured: the
exit status says at the end whether all went well. Cases of an op whose tests did not pass are
measured last, and kept apart as ``unverified``. `--dry` does the same on the CPU, with tiny shapes,
the Triton kernels interpreted, and extensions that are built already.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from . import evidence, table
from .cases import CASES, Case, cases
from .process import GRACE_SECONDS, RESULTS
from .roofline import GEMM_CEILINGS
from .verify import GPU_TESTS, Outcome, run_gpu_tests
from .worker import Worker

BUDGET_SECONDS, DRY_SECONDS = 420.0, 2400.0
# The share of the budget that testing may take.
TEST_SHARE = 0.3
# The most that one measurement takes while others wait, and what is left to each of these.
MOST_SECONDS, LEAST_SECONDS = 40.0, 3.0
OPTIONAL = ["triton", "xdist", "pytorch_metric_learning", "liger_kernel", "cut_cross_entropy"]
MARGIN = "margin_cross_entropy"
# The workspaces of the margin softmax that are tried.
WORKSPACES_MIB = (16, 32, 64, 128, 256)
# Ops whose next step has other results: they write their inputs, or draw random numbers.
STATEFUL = ("row_update", "sample_classes")


class Job(NamedTuple):
    """One measurement: a task of `tasks.TASKS`, its arguments, and the list it is added to."""

    task: str
    case: Case
    kept_in: str
    arguments: dict[str, Any]

    @property
    def title(self) -> str:
        """The task and the case, for messages."""
        return f"{self.task} of {self.case.op}, {self.case.name}"


def main() -> None:
    options = evidence.parser(__doc__)
    options.add_argument("--tests", type=Path, default=GPU_TESTS, help="Folder of the GPU tests.")
    args = options.parse_args()
    run = Run(
        args.dry,
        evidence.output_of(args, "gpu-evidence", RESULTS),
        args.seconds or (DRY_SECONDS if args.dry else BUDGET_SECONDS),
    )
    run.build()
    run.test(args.tests)
    # The interpreter reads its variable when Triton is imported.
    environment = {"TRITON_INTERPRET": "1"} if args.dry else {}
    with Worker("cpu" if args.dry else "cuda", environment) as worker:
        run.measure(worker)
    run.finish()


class Run(evidence.Evidence):
    """A run of the ops' tests and benchmarks."""

    def __init__(self, dry: bool, output: Path, budget: float) -> None:
        super().__init__("gpu-evidence", dry, output, budget)
        self.outcomes: dict[str, Outcome] = {}
        self.result |= {
            "cannot_import": [name for name in OPTIONAL if not _importable(name)],
            "tests": {},
            "ceilings": {},
            "cases": [_unmeasured(case, "not reached") for case in _all_cases(dry)],
        }
        print(f"cannot be imported here: {', '.join(self.result['cannot_import']) or 'nothing'}")

    def test(self, folder: Path) -> None:
        """Run the GPU tests; the verdict is one for each op."""
        print("GPU tests", flush=True)

        def report(outcomes: dict[str, Outcome]) -> None:
            total = Outcome()
            for outcome in outcomes.values():
                total.add(outcome)
            by_op = {op: outcome.summary() for op, outcome in sorted(outcomes.items())}
            self.result["tests"] = {**total.summary(), "ops": by_op}
            del self.result["tests"]["failures"]  # each op has its own
            self.save()

        self.outcomes = run_gpu_tests(
            TEST_SHARE * self.budget, folder=folder, interpreted=self.dry, report=report
        )
        for op in sorted({*CASES, *self.outcomes}):
            outcome = self.outcomes.get(op, Outcome(problem="it has no GPU tests"))
            print(f"tests of {op}: {outcome.summary()}")
            if not self.verified(op):
                why = outcome.problem or f"{outcome.failed} of its tests failed"
                self.problems.append(f"{op}: {why if outcome.passed else f'{why}, none passed'}")

    def verified(self, op: str) -> bool:
        """Return whether the op's GPU tests passed, at least one of them."""
        outcome = self.outcomes.get(op, Outcome())
        return bool(outcome.passed) and not outcome.failed and not outcome.problem

    def measure(self, worker: Worker) -> None:
        """Measure the machine, the ceilings, and all jobs, those of verified ops first."""
        self.result["machine"] = worker.run("machine", 60)
        sizes = {"copy_bytes": 1_000_000, "size": 64} if self.dry else {}
        self.result["ceilings"] = worker.run("ceilings", 60, **sizes)
        print(f"ceilings: {self.result['ceilings']}")
        for name in ("machine", "ceilings"):
            if "not_measured" in self.result[name]:
                self.problems.append(f"{name}: {self.result[name]['not_measured']}")
        self.save()
        worker.run("warm_up", 60)
        todo = sorted(jobs(self.dry), key=lambda job: not self.verified(job.case.op))
        for number, job in enumerate(todo):
            seconds = allowance(self.left() - GRACE_SECONDS, len(todo) - number - 1)
            print(f"{job.title}: at most {seconds:.0f} s", flush=True)
            if seconds <= 0:
                measured = _unmeasured(job.case, "no time was left")
            else:
                measured = _unmeasured(job.case) | worker.run(job.task, seconds, **job.arguments)
            self.keep(job, measured)
            self.save()

    def keep(self, job: Job, measured: dict[str, Any]) -> None:
        """Put a measurement where it belongs, and print it."""
        if job.kept_in == "cases":
            _add_shares(measured, self.result["ceilings"])
            print(table.one_case(measured), flush=True)
            ours = next(iter(measured["peers"]), measured)
            why = ours.get("not_measured") or _failure(measured)
        else:
            del measured["peers"]
            print(f"{job.title}: {_short(measured)}", flush=True)
            why = _failure(measured)
            if measured.get("same_bits_as_eager") is False and job.case.op not in STATEFUL:
                why = "the replayed step's results are not those of the eager step"
        if not self.verified(job.case.op):
            self.result.setdefault("unverified", {}).setdefault(job.kept_in, []).append(measured)
            refused = _unmeasured(job.case, "the op's GPU tests did not pass; see unverified")
            measured = refused
        elif why:
            self.problems.append(f"{job.title}: {why}")
        if job.kept_in == "cases":
            place = _all_cases(self.dry).index(job.case)
            self.result["cases"][place] = measured
        elif self.verified(job.case.op):
            self.result.setdefault(job.kept_in, []).append(measured)


def allowance(left: float, waiting: int) -> float:
    """Return the seconds that a measurement may take when so many others wait.

    It may take all but a little for each of the others, up to a maximum, and at least its equal
    share; what it does not need, the others have.
    """
    share = left / (waiting + 1)
    return min(MOST_SECONDS, max(share, left - LEAST_SECONDS * waiting))


def jobs(dry: bool) -> list[Job]:
    """Return all measurements: each op's first case, the margin's kernels, then the rest."""
    suite = "dry" if dry else "gpu"
    rounds = 3 if dry else 20

    def job(task: str, case: Case, kept_in: str, **arguments: Any) -> Job:
        place = {"op": case.op, "suite": suite, "index": cases(suite, case.op).index(case)}
        return Job(task, case, kept_in, {**place, **arguments})

    firsts, *others = zip_longest(*(cases(suite, op) for op in CASES))
    found = [job("case", case, "cases", rounds=rounds) for case in firsts]
    small, large = _profiled(dry)
    for case in (small, large):
        repeats = {"rounds": 1, "steps": 1} if dry else {"rounds": 5, "steps": 3}
        found.append(job("profile", case, "profiles", **repeats))
    for case in (small, large):
        sizes = [1, 64] if dry else [*WORKSPACES_MIB]
        found.append(job("sweep", case, "sweeps", rounds=1 if dry else 7, workspaces_mib=sizes))
    for case in (small, large):
        if case.autocast is None:  # under it, cuBLAS computes float32 centers' gradient
            limits = {"rounds": 1, "most": 2} if dry else {"rounds": 7}
            found.append(job("blocks", case, "blocks", **limits))
    for case in (small, *firsts[1:]):
        found.append(job("replay", case, "replays", rounds=1 if dry else rounds))
    for row in others:
        found += [job("case", case, "cases", rounds=rounds) for case in row if case is not None]
    return found


def _profiled(dry: bool) -> list[Case]:
    """Return the margin softmax's cases whose kernels are looked at: a small batch and a large."""
    if dry:
        return cases("dry", MARGIN)[1:3]
    plain = [case for case in cases("gpu", MARGIN) if case.dtype == "bfloat16"]
    million = [case for case in plain if case.shape["C"] == 1_000_000]
    return [
        min(million, key=lambda case: case.shape["N"]),
        max(million, key=lambda case: case.shape["N"]),
    ]


def _all_cases(dry: bool) -> list[Case]:
    return cases("dry" if dry else "gpu")


def _unmeasured(case: Case, why: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"op": case.op, "name": case.name, "peers": []}
    return found if why is None else {**found, "not_measured": why}


def _failure(measured: dict[str, Any]) -> str | None:
    found = [measured[name] for name in ("not_measured", "problem") if name in measured]
    return "; ".join(found) or None


def _short(measured: dict[str, Any]) -> dict[str, Any]:
    return {k: v[:5] if isinstance(v, list) else v for k, v in measured.items()}


def _importable(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


def _add_shares(measured: dict[str, Any], ceilings: dict[str, Any]) -> None:
    """Add the share of each ceiling that a peer reaches, by the case's FLOPs and bytes.

    FLOPs are held against a GEMM of the case's dtype.
    """
    gemm = GEMM_CEILINGS.get(measured.get("gemm_dtype", ""))
    for row in measured["peers"]:
        for rate, ceiling, share in (
            ("tflop_per_second", gemm, "share_of_product"),
            ("gigabyte_per_second", "copy_gigabyte_per_second", "share_of_copy"),
        ):
            if row.get(rate) and ceiling in ceilings:
                row[share] = row[rate] / ceilings[ceiling]


if __name__ == "__main__":
    main()
