"""Domain mixup beside its peers: interleaved in one process, medians, ratios to ours.

    python -m benchmarks.bench_domain_mixup [--rounds 21] [--batch 512] [--json FILE]

Bytes are those that no implementation can do without: both uint8 inputs read, the result written.
`copy_` is given twice: of a tensor of that many bytes, and of one of half as many (so that what it
reads and writes together is that many).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import synface_kernels as sk

HEIGHT = WIDTH = 112
PSI = 0.35


def plain(synthetic: Tensor, real: Tensor, dtype: torch.dtype, format: Any) -> Tensor:
    """What SynFace's pipeline does, on whole batches."""
    s = synthetic.permute(0, 3, 1, 2).float() / 255
    r = real.permute(0, 3, 1, 2).float() / 255
    mixed = PSI * s + (1 - PSI) * r
    return ((mixed - 0.5) / 0.5).to(dtype, memory_format=format)


def copy(bytes_moved: int) -> Callable[[], object]:
    source, target = (torch.ones(bytes_moved, dtype=torch.uint8) for _ in range(2))
    return lambda: target.copy_(source)


def steps(batch: int, dtype: torch.dtype, format: Any) -> tuple[int, dict[str, Callable]]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, HEIGHT, WIDTH, 3)
    s, r = (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in "sr")
    out = torch.zeros((batch, 3, HEIGHT, WIDTH), dtype=dtype).to(memory_format=format)
    options: dict[str, Any] = {"dtype": dtype, "memory_format": format}
    compiled = torch.compile(plain, dynamic=False)
    total = s.nbytes + r.nbytes + out.nbytes
    return total, {
        "ours": lambda: sk.domain_mixup(s, r, PSI, out=out, **options),
        "ours, fresh tensor": lambda: sk.domain_mixup(s, r, PSI, **options),
        "copy_ of as many bytes": copy(total),
        "copy_ moving as many bytes": copy(total // 2),
        "torch.compile": lambda: compiled(s, r, dtype, format),
        "eager torch": lambda: plain(s, r, dtype, format),
    }


def measure(candidates: dict[str, Callable], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each, and its median ratio to ours, round by round."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for step in candidates.values():
        step()
        step()
    names = list(candidates)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            candidates[name]()
            samples[name].append(time.perf_counter() - start)
    return {
        name: {
            "seconds": statistics.median(times),
            "least_seconds": min(times),
            "ratio": statistics.median(t / o for t, o in zip(times, samples["ours"], strict=True)),
        }
        for name, times in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Domain mixup beside its peers.")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for format in (torch.contiguous_format, torch.channels_last):
            total, candidates = steps(args.batch, dtype, format)
            name = f"{str(dtype)[6:]} {str(format)[6:]}"
            rows = measure(candidates, args.rounds)
            results.append({"case": name, "batch": args.batch, "bytes": total, "rows": rows})
            print(f"{name}, batch {args.batch}, {total / 1e6:.0f} MB")
            for peer, row in rows.items():
                print(
                    f"  {peer:28s} {1e3 * row['seconds']:8.2f} ms "
                    f"(least {1e3 * row['least_seconds']:7.2f})  {row['ratio']:6.2f} × ours"
                )
    print("microseconds per image, float32 contiguous, into out=:")
    for batch in (1, 4, 16, 64, 256, 1024, 4096):
        _, candidates = steps(batch, torch.float32, torch.contiguous_format)
        only = {"ours": candidates["ours"]}
        row = measure(only, args.rounds)["ours"]
        results.append({"case": "linear", "batch": batch, "seconds": row["seconds"]})
        print(f"  B={batch:5d}  {1e6 * row['seconds'] / batch:8.2f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
