"""Run the compiled kernels under GCC's sanitizers.

    python tools/sanitize.py                     # all of the following
    python tools/sanitize.py planted             # faults that the sanitizers must report
    python tools/sanitize.py threads             # kernels on std::thread, by ThreadSanitizer
    python tools/sanitize.py leaks               # the same by AddressSanitizer, with its leak check
    python tools/sanitize.py tests [OPTION]...   # the ops' tests, by AddressSanitizer and UBSan

Everything is built below build/sanitize, so the installed extension stays as it is. The exit status
is not 0 if a sanitizer reports a fault, a test fails, or a planted fault goes unnoticed. MAX_JOBS
limits the number of compilers at once.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
PLANTED = ROOT / "tests" / "sanitize"
COMMON = ("-fno-omit-frame-pointer", "-O1", "-g1")
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", *COMMON)
THREAD = ("-fsanitize=thread", *COMMON)
# What setup.py compiles the kernels with, but for its -O3.
KERNELS = (
    *("-std=c++20", "-fopenmp-simd", "-ffp-contract=off", "-fno-trapping-math"),
    *("-fno-math-errno", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}"),
)

# Tests that call the CPU kernels and the bindings, with every instruction set, edge shapes, wrong
# arguments, and the memory of results.
TESTS = (
    "tests/ops/test_raw_ops.py",
    "tests/ops/test_domain_mixup.py",
    "tests/ops/test_hypersphere_repulsion.py",
    "tests/ops/test_hypersphere_repulsion_bf16.py",
    "tests/ops/test_hypersphere_repulsion_bf16_energies.py",
    "tests/ops/test_hypersphere_repulsion_input.py",
    "tests/ops/test_long_rows.py",
    "tests/ops/test_margin_cross_entropy.py",
    "tests/ops/test_margin_cross_entropy_bf16.py",
    "tests/ops/test_margin_cross_entropy_corners.py",
    "tests/ops/test_margin_cross_entropy_high.py",
    "tests/ops/test_margin_cross_entropy_numpy.py",
    "tests/ops/test_margin_cross_entropy_options.py",
    "tests/ops/test_margin_cross_entropy_update.py",
    "tests/ops/test_nearest_neighbors_ties.py",
    "tests/ops/test_row_update.py",
    "tests/ops/test_sample_classes.py",
    "tests/test_numpy.py",
    "tests/test_result_memory.py",
)
# Tests that run no further C++ of this library: graph compilers, torch's checks of registrations,
# and Triton. Those of peak memory measure the sanitizer's, and one knows the order in which
# vectorized code, of -O3, adds float64.
LEFT_OUT = "not (compile or opcheck or inductor or triton or gradcheck or peak or memory_of"
LEFT_OUT += " or (near_ties_are_decided_in_double and dtype3))"


class Fault(NamedTuple):
    """A planted fault: the flags that its file is compiled with, and words of the report."""

    file: str
    flags: Sequence[str]
    report: str


FAULTS = (
    Fault("out_of_bounds.cpp", ADDRESS, "AddressSanitizer: heap-buffer-overflow"),
    Fault("shift.cpp", ADDRESS, "runtime error: shift exponent 32"),
    Fault("leak.cpp", ADDRESS, "LeakSanitizer: detected memory leaks"),
    Fault("race.cpp", THREAD, "ThreadSanitizer: data race"),
)


def compiler() -> str:
    """Return the C++ compiler: CXX, or g++."""
    return os.environ.get("CXX", "g++")


def run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
    """Run a command in the root; exit with its status if that is not 0."""
    words = [*map(str, command)]
    print("+", shlex.join(words), flush=True)
    done = subprocess.run(words, cwd=ROOT, env=os.environ | dict(environment or {}))
    if done.returncode:
        sys.exit(done.returncode if done.returncode > 0 else 1)


def options(leaks: bool) -> dict[str, str]:
    """Return the sanitizers' settings.

    Args:
        leaks: whether memory that is lost at exit is a fault. Not in Python's own processes:
            Python and torch never free their globals.
    """
    return {
        # An allocation that fails returns null, as the system's does, for torch to report.
        "ASAN_OPTIONS": f"detect_leaks={int(leaks)}:allocator_may_return_null=1"
        ":max_allocation_size_mb=4096",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }


def fixed_addresses() -> list[str]:
    """Return a command that runs another at fixed addresses, which ThreadSanitizer may need."""
    command = ["setarch", "--addr-no-randomize"]
    if shutil.which(command[0]) is None:
        return []
    tried = subprocess.run([*command, "true"], capture_output=True)
    return command if tried.returncode == 0 else []


def report_of(fault: Fault, folder: Path) -> tuple[int, str]:
    """Compile and run a planted fault; return its exit status and what it wrote to stderr."""
    program = folder / Path(fault.file).stem
    run([compiler(), *KERNELS, *fault.flags, PLANTED / fault.file, "-o", program, "-pthread"])
    command = [*(fixed_addresses() if fault.flags is THREAD else []), str(program)]
    environment = os.environ | options(leaks=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


def planted() -> None:
    """Exit with 1 unless each planted fault is reported and ends its program with an error."""
    BUILD.mkdir(parents=True, exist_ok=True)
    for fault in FAULTS:
        status, text = report_of(fault, BUILD)
        if status == 0 or fault.report not in text:
            sys.exit(f"{fault.file} must be reported ({fault.report}), got status {status}: {text}")
        print(f"{fault.file}: reported, exit status {status}", flush=True)


def driver(name: str, flags: Sequence[str]) -> Path:
    """Build tests/sanitize/kernels.cpp with all CPU kernels, as far as that is out of date."""
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*sorted(ROOT.glob("csrc/*/cpu.cpp")), ROOT / "csrc" / "simd" / "isa.cpp"]
    sources.append(PLANTED / "kernels.cpp")
    inputs = (*ROOT.glob("csrc/*/*"), sources[-1], Path(__file__))
    newest = max(file.stat().st_mtime for file in inputs)
    objects = [folder / f"{source.parent.name}-{source.stem}.o" for source in sources]

    def compiled(pair: tuple[Path, Path]) -> None:
        source, made = pair
        if not made.exists() or made.stat().st_mtime < newest:
            run([compiler(), *KERNELS, *flags, "-c", source, "-o", made])

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(compiled, zip(sources, objects, strict=True)))
    program = folder / "kernels"
    run([compiler(), *flags, *objects, "-o", program, "-pthread"])
    return program


def threads() -> None:
    """Run the kernels on several threads under ThreadSanitizer."""
    run([*fixed_addresses(), driver("threads", THREAD)], options(leaks=False))


def leaks() -> None:
    """Run the same under AddressSanitizer and UndefinedBehaviorSanitizer, with the leak check."""
    run([driver("leaks", ADDRESS)], options(leaks=True))


def extension() -> Path:
    """Build the extensions with the sanitizers; return a folder to import them from."""
    wrapper, library = BUILD / "c++", BUILD / "library"
    BUILD.mkdir(parents=True, exist_ok=True)
    # The last of contradictory flags counts, so these follow setup.py's.
    flags = shlex.join(ADDRESS)
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(compiler())} "$@" {flags}\n')
    wrapper.chmod(0o755)
    run(
        [
            *(sys.executable, "setup.py", "build_ext"),
            *("--build-lib", library, "--build-temp", BUILD / "objects"),
        ],
        {"CC": str(wrapper), "CXX": str(wrapper), "SYNFACE_CUDA": "0"},
    )
    package = library / "synface_kernels"
    for source in (ROOT / "synface_kernels").iterdir():
        link = package / source.name
        if source.suffix != ".so" and source.name != "__pycache__" and not link.exists():
            link.symlink_to(source)
    return library


def library(name: str) -> str | None:
    """Return the path of one of the compiler's libraries, or None if it is not installed."""
    found = subprocess.check_output([compiler(), f"-print-file-name={name}"], text=True).strip()
    return found if os.path.isabs(found) else None


def preloaded(names: Iterable[str]) -> str:
    """Return the paths of the compiler's libraries, as LD_PRELOAD takes them."""
    paths = []
    for name in names:
        found = library(name)
        if found is None:
            sys.exit(f"{compiler()} has no {name}: install its sanitizers")
        paths.append(found)
    return " ".join(paths)


def tests(arguments: Sequence[str]) -> None:
    """Run the ops' tests on the sanitized extensions."""
    library = extension()
    environment = options(leaks=False) | {
        # Python is not linked with them. libstdc++ must be there when they start, or they would
        # not know of the exceptions that it throws.
        "LD_PRELOAD": preloaded(["libasan.so", "libubsan.so", "libstdc++.so"]),
        "PYTHONPATH": os.pathsep.join(map(str, (library, ROOT, ROOT / "python"))),
        "PYTHONMALLOC": "malloc",  # Python's own pools would hide the ends of arrays
    }
    loaded = "from synface_kernels import _load; import torch; print(*torch.ops.loaded_libraries)"
    found = subprocess.check_output(
        [sys.executable, "-c", loaded], cwd=BUILD, env=os.environ | environment, text=True
    )
    if not re.search(re.escape(str(library)), found):
        sys.exit(f"the sanitized extension must be loaded, got {found}")
    run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-n", "auto", "--dist", "worksteal", "--pairs", "all"),
            *("-o", f"pythonpath={library} .", "-k", LEFT_OUT),
            *(arguments or TESTS),
        ],
        environment,
    )


def main(arguments: Sequence[str]) -> None:
    steps = {"planted": planted, "threads": threads, "leaks": leaks}
    if not arguments:
        for step in steps.values():
            step()
        tests(())
    elif arguments[0] == "tests":
        tests(arguments[1:])
    elif len(arguments) == 1 and arguments[0] in steps:
        steps[arguments[0]]()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
