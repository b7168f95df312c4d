"""Compiles, without a GPU, the kernels that the launchers of ops would launch.

Runs the launchers on meta tensors (`launch` of aot_<op>.py) and compiles each launch for the given
architectures, with the signature, divisibility and configuration that it would have there. One JSON
object per line: the op, the kernel, its configuration, and what the compiler says of it; or all in
one Markdown table.

    python tests/triton/aot.py margin_cross_entropy 80 90 100
    python tests/triton/aot.py --table margin_cross_entropy 80 90 100
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

SIZES = ("num_warps", "num_stages")
OPTIONS = (*SIZES, "enable_fp_fusion")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


class Launch:
    """A kernel with what the compiler is to know of its arguments."""

    def __init__(self, kernel: Any, args: tuple[Any, ...], config: dict[str, Any]) -> None:
        self.kernel = kernel
        self.options = {k: v for k, v in config.items() if k in OPTIONS}
        constants = {k: v for k, v in config.items() if k not in OPTIONS}
        self.signature: dict[str, str] = {}
        self.constants: dict[str, Any] = {}
        self.attributes: dict[tuple[int, ...], Any] = {}
        for i, name in enumerate(kernel.arg_names):
            value = constants[name] if name in constants else args[i]
            special = not kernel.params[i].do_not_specialize
            if name in constants or (isinstance(value, int) and value == 1 and special):
                self.signature[name] = "constexpr"
                self.constants[name] = value
                continue
            if isinstance(value, torch.Tensor):
                self.signature[name] = POINTERS[value.dtype]
                multiple = value.storage_offset() * value.element_size() % 16 == 0
            elif isinstance(value, int):
                self.signature[name] = "i32" if value < 2**31 else "i64"
                multiple = value % 16 == 0 and special
            else:
                self.signature[name], multiple = "fp32", False
            if multiple:
                self.attributes[(i,)] = [["tt.divisibility", 16]]

    def key(self) -> str:
        return repr(
            (self.kernel.__name__, *(vars(self)[k] for k in sorted(vars(self)) if k != "kernel"))
        )

    def compile(self, capability: int) -> dict[str, Any]:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        compiled = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options=self.options
        )
        return {
            "kernel": self.kernel.__name__,
            "capability": capability,
            "config": {k: str(v) for k, v in self.constants.items()} | self.options,
            "pointers": sorted({v for v in self.signature.values() if v.startswith("*")}),
            "instructions": sorted(
                set(re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", compiled.asm["ptx"]))
            ),
            "fused": {k: compiled.asm["ptx"].count(f"fma.rn.{k}") for k in ("f32", "f64")},
            "shared": compiled.metadata.shared,
            **resources(compiled.asm["cubin"]),
        }


def resources(cubin: bytes) -> dict[str, int]:
    """Return the registers and stack bytes of a cubin's kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {
        key: int(re.search(rf"\b{name}:(\d+)", text)[1])  # type: ignore[index]
        for key, name in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))
    }


def launches(op: str, capability: int) -> Iterable[Launch]:
    """Return every distinct launch of an op's cases on such a device."""
    distinct: dict[str, Launch] = {}

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **config: Any) -> None:
        launch = Launch(kernel, args, config)
        distinct.setdefault(launch.key(), launch)

    with mock.patch.object(JITFunction, "run", record):
        import_module(f"aot_{op}").launch(capability)
    return distinct.values()


def table(reports: list[dict[str, Any]]) -> str:
    """Make a table of a line per kernel, dtypes, blocks and architecture: its variants' maxima."""
    lines: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for report in reports:
        config = report["config"]
        dtypes = ", ".join(p[1:] for p in report["pointers"] if p != "*i64")
        blocks = "×".join(str(v) for k, v in config.items() if k.startswith("BLOCK"))
        blocks += "".join(f", {config[k]} {k[4:]}" for k in SIZES if k in config)
        kernel, precision = report["kernel"].strip("_"), config.get("PRECISION", "")
        key = (kernel, f"{dtypes} {precision}".strip(), blocks, f"sm_{report['capability']}")
        lines.setdefault(key, []).append(report)
    text = [
        "| kernel | dtypes | blocks | for | instruction | registers | shared | stack |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, variants in sorted(lines.items()):
        instructions = ", ".join(sorted({i for v in variants for i in v["instructions"]}))
        most = [str(max(v[name] for v in variants)) for name in ("registers", "shared", "stack")]
        text.append("| " + " | ".join((*key, instructions or "–", *most)) + " |")
    return "\n".join(text)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--table"]
    ops = [word for word in words if not word.isdecimal()]
    reports = []
    for op, capability in product(ops, (int(word) for word in words if word.isdecimal())):
        for launch in launches(op, capability):
            reports.append({"op": op, **launch.compile(capability)})
            if "--table" not in sys.argv:
                print(json.dumps(reports[-1]), flush=True)
    if "--table" in sys.argv:
        print(table(reports))
