"""Compiles, without a GPU, the kernels that the launchers of ops would launch.

Records the launches of each op's steps (`launch` of aot_<op>.py, and the ledger's cases) on meta
tensors, and compiles each for the given architectures, with the signature, divisibility and
configuration that it would have there. Prints one JSON object per line: the op, the kernel, its
configuration, and what the compiler says of it. With `--write`, benchmarks/compiled.json, which
docs/gpu.md shows, gets the rows of these ops and this Triton.

    python tests/triton/aot.py margin_cross_entropy 80 90 100
    python tests/triton/aot.py --write
"""

from __future__ import annotations

import hashlib
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

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from benchmarks import compiled, predict  # noqa: E402
from benchmarks.cases import cases  # noqa: E402
from benchmarks.devices import DEVICES  # noqa: E402
from benchmarks.launches import Launch, Recorder, as_on_gpu  # noqa: E402

OPS = sorted(file.stem.removeprefix("aot_") for file in HERE.glob("aot_*.py"))
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# Constants of which one value is compiled: they bound loops, and registers hardly depend on them.
SIZES = {"SIZE_X", "SIZE_Y", "TILES"}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


class Variant:
    """A kernel with what the compiler is to know of its arguments."""

    def __init__(self, launch: Launch) -> None:
        assert launch.call is not None
        self.launch = launch
        self.kernel, args, config = launch.call
        self.options = {k: v for k, v in config.items() if k in OPTIONS}
        constants = {k: v for k, v in config.items() if k not in OPTIONS}
        self.signature: dict[str, str] = {}
        self.constants: dict[str, Any] = {}
        self.attributes: dict[tuple[int, ...], Any] = {}
        for i, name in enumerate(self.kernel.arg_names):
            value = constants[name] if name in constants else args[i]
            specialized = not self.kernel.params[i].do_not_specialize
            if name in constants or (specialized and isinstance(value, int) and value == 1):
                self.signature[name] = "constexpr"
                self.constants[name] = value
                continue
            if isinstance(value, torch.Tensor):
                self.signature[name] = POINTERS[value.dtype]
                multiple = value.storage_offset() * value.element_size() % 16 == 0
            elif isinstance(value, int):
                self.signature[name] = "i32" if value < 2**31 else "i64"
                multiple = value % 16 == 0
            else:
                self.signature[name], multiple = "fp32", False
            if multiple and specialized:
                self.attributes[(i,)] = [["tt.divisibility", 16]]

    def key(self) -> str:
        constants = {k: v for k, v in self.constants.items() if k not in SIZES}
        return repr((self.launch.name, self.options, self.signature, constants))

    def source(self, capability: int) -> tuple[ASTSource, GPUTarget]:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return source, GPUTarget("cuda", capability, 32)

    def digest(self, capability: int) -> str:
        """Return a digest of what the compiler is given: its input's Triton IR, and the options."""
        source, target = self.source(capability)
        backend = make_backend(target)
        options = backend.parse_options(dict(self.options))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        module = source.make_ir(
            target,
            options,
            backend.get_codegen_implementation(options),
            backend.get_module_map(),
            context,
        )
        stages: dict[str, Any] = {}
        backend.add_stages(stages, options, source.language)
        text = stages["ttir"](module, {}).str_nodebug()  # without the places in source files
        given = f"{sorted(self.options.items())} {text}"
        return hashlib.sha256(given.encode()).hexdigest()[:16]

    def row(self, capability: int) -> tuple[str, str, str, int]:
        """Return the row that this is a variant of, as `compiled.KEY` names it."""
        return *compiled.key(self.launch), capability

    def compile(self, capability: int) -> dict[str, Any]:
        source, target = self.source(capability)
        made = triton.compile(source, target=target, options=self.options)
        ptx = made.asm["ptx"]
        return {
            **dict(zip(compiled.KEY, self.row(capability), strict=True)),
            "digest": self.digest(capability),
            "config": {k: str(v) for k, v in self.constants.items()} | self.options,
            "instructions": sorted(
                set(re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx))
            ),
            "dots": dots(made.asm["ttir"]),
            "fused": {k: ptx.count(f"fma.rn.{k}") for k in ("f32", "f64")},
            "warps": made.metadata.num_warps,
            "shared": made.metadata.shared,
            **resources(made.asm["cubin"]),
        }


def dots(ttir: str) -> list[str]:
    """Return the rows, the factors' dtype and the precision of each `tl.dot`."""
    found = re.findall(r"tt\.dot ([^:\n]*) : tensor<(\d+)x\d+x(\w+)>", ttir)
    return sorted(
        {f"{rows} {dtype} {'tf32' if 'tf32' in how else 'ieee'}" for how, rows, dtype in found}
    )


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


def variants(op: str, capability: int) -> Iterable[Variant]:
    """Yield the distinct launches of an op's cases on such a device.

    Of those that differ in what is known to be a multiple of 16 alone, the two extremes.
    """
    gpu = DEVICES["H100"]
    recorder = Recorder()
    with as_on_gpu(recorder, capability, gpu.multiprocessors):
        import_module(f"aot_{op}").launch()
    launches = list(recorder.launches)
    for case in (case for case in cases("gpu") if case.op == op):
        recorder = predict.recorded(case, capability, gpu.multiprocessors)
        launches += recorder.launches
    distinct: dict[str, list[Variant]] = {}
    for launch in launches:
        if launch.is_triton:
            variant = Variant(launch)
            distinct.setdefault(variant.key(), []).append(variant)
    for same in distinct.values():
        same.sort(key=lambda variant: len(variant.attributes))
        yield same[0]
        if len(same[-1].attributes) > len(same[0].attributes):
            yield same[-1]


def reports(ops: Iterable[str], capabilities: Iterable[int]) -> Iterable[dict[str, Any]]:
    for op, capability in product(ops, capabilities):
        for variant in variants(op, capability):
            yield {"op": op, **variant.compile(capability)}


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--write"]
    ops = [word for word in words if not word.isdecimal()] or OPS
    capabilities = [int(word) for word in words if word.isdecimal()] or [*compiled.INSTRUCTIONS]
    found = []
    for report in reports(ops, capabilities):
        print(json.dumps(report), flush=True)
        found.append(report)
    if "--write" in sys.argv:
        if capabilities != [*compiled.INSTRUCTIONS]:
            sys.exit("--write takes all architectures: name none")
        compiled.save(triton.__version__, ops, compiled.rows(found))
