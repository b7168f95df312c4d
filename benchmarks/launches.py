"""A recorder of what an op launches on a GPU, for a machine that has none.

Ops run on meta tensors, which have shapes and no data, through their own public functions,
launchers and autograd. Kernels are not launched but recorded, with their grids, arguments and
constants; so are the GEMMs and the other operators of torch.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from synface_kernels import _select

# Preferred implementations on a GPU; domain_mixup has one in CUDA too, with the same traffic.
_ON_GPU = {"sample_classes": "torch"}
# Operators that allocate, or look at a tensor, and launch nothing.
_FREE = {
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "alias",
    "detach",
}
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


class Region(NamedTuple):
    """The memory that a launch may touch of one tensor.

    Attributes:
        storage: a number for each allocation. start: the first byte in it. span: bytes from the
            first element to the last. nbytes: bytes of the distinct elements.
        shape, dtype: the tensor's.
    """

    storage: int
    start: int
    span: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Launch:
    """One kernel, GEMM, or other operator of torch.

    Attributes:
        name: "op.kernel", "torch.mm", "torch.where", …
        arguments: by parameter: a `Region` for a tensor, numbers, and compile-time constants. A
            torch operator's tensors are "in0", "in1", … and "out0", ….
        grid: programs by axis; () for torch's.
        options: num_warps, num_stages and the like.
        call: the kernel and its arguments, for a compiler; None for torch's.
    """

    name: str
    arguments: dict[str, Any]
    grid: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    call: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = field(default=None, compare=False)

    def __getitem__(self, name: str) -> Any:
        """Return an argument."""
        return self.arguments[name]

    @property
    def is_triton(self) -> bool:
        """True for a Triton kernel."""
        return self.call is not None

    @property
    def programs(self) -> int:
        """The number of programs of the grid."""
        return int(torch.Size(self.grid).numel())


class Recorder(TorchDispatchMode):
    """Records the launches of what runs within it, in order.

    Attributes:
        launches: the launches so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._storages: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no two storages have one address

    def region(self, tensor: Tensor) -> Region:
        """Describe a tensor's memory."""
        storage, item = tensor.untyped_storage(), tensor.element_size()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = len(self._storages)
            self._alive.append(storage)
        distinct, span = 1, 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            distinct *= size if stride else 1
            span += (size - 1) * stride
        if tensor.numel() == 0:
            distinct = span = 0
        start = int(tensor.storage_offset()) * item
        return Region(
            self._storages[key],
            start,
            span * item,
            distinct * item,
            tuple(tensor.shape),
            tensor.dtype,
        )

    def add_kernel(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **config: Any) -> None:
        """Record a kernel in place of `JITFunction.run`."""
        names = kernel.arg_names
        given = dict(zip(names, args, strict=False)) | {k: config[k] for k in names if k in config}
        known = {k: self.region(v) if isinstance(v, Tensor) else v for k, v in given.items()}
        op = kernel.fn.__module__.split(".")[-2]
        options = {k: v for k, v in config.items() if k not in names}
        self.launches.append(
            Launch(f"{op}.{kernel.__name__}", known, tuple(grid), options, (kernel, args, config))
        )

    def add_gemm(self, a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
        """Record a GEMM in place of `ops._triton.mm`, of which meta tensors have no 16-bit one."""
        given = (out, a, b) if accumulate else (a, b)
        known: dict[str, Any] = {f"in{i}": self.region(t) for i, t in enumerate(given)}
        known["out0"] = self.region(out)
        self.launches.append(Launch("torch.addmm" if accumulate else "torch.mm", known))
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "synface_kernels":
            with self:
                return func.redispatch(_CUDA, *args, **kwargs)
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name not in _FREE:
            self._add_operator(name, func, args, kwargs, result)
        return result

    def _add_operator(self, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = list(_tensors([*args, *kwargs.values()]))
        if any(tensor.device.type != "meta" for tensor in given):
            return  # the host's own arithmetic
        old = {tensor.untyped_storage()._cdata for tensor in given}
        writes = any(
            r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns
        )
        returned = list(_tensors([result]))
        is_view = returned and all(t.untyped_storage()._cdata in old for t in returned)
        if is_view and not writes:
            return
        if not returned and not given:
            return
        known: dict[str, Any] = {f"in{i}": self.region(t) for i, t in enumerate(given)}
        known |= {f"out{i}": self.region(t) for i, t in enumerate(returned)}
        self.launches.append(Launch(f"torch.{name.strip('_')}", known))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the strided tensors among values and lists of them; of sparse ones, their parts."""
    for value in values:
        if isinstance(value, Tensor) and value.layout == torch.strided:
            yield value
        elif isinstance(value, Tensor):
            yield from (value._indices(), value._values())
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@contextmanager
def as_on_gpu(
    recorder: Recorder,
    capability: int,
    multiprocessors: int,
    autocast: torch.dtype | None = None,
) -> Iterator[None]:
    """Record kernels instead of launching them, and take meta tensors for those of a GPU.

    Args:
        capability: ten times the compute capability. multiprocessors: the GPU's.
        autocast: the dtype of autocast, of which there is none for meta tensors.

    Raises:
        RuntimeError: where Triton interprets its kernels.
    """
    if _select.interpreting():
        raise RuntimeError("launches are recorded without TRITON_INTERPRET=1 only")
    from triton.runtime import JITFunction

    def run(kernel: Any, *args: Any, **config: Any) -> None:
        recorder.add_kernel(kernel, *args, **config)

    registry = {op: {_ON_GPU.get(op, "triton"): _select.always} for op in _select.ops()}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(_select._REGISTRY, registry))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        chip = (capability, multiprocessors)
        for module, name, value in _stand_ins(recorder, chip, autocast):
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(recorder)
        yield


def _stand_ins(
    recorder: Recorder, chip: tuple[int, int], autocast: torch.dtype | None
) -> Iterator[tuple[Any, str, Any]]:
    """Yield (module, name, value) of what asks torch about a GPU or autocast, or calls cuBLAS."""
    from synface_kernels import _autocast, ops
    from synface_kernels.ops import _triton

    gpu = _triton.Chip(*chip)
    chip_of, gemm_dtype, mm = _triton.chip_of, _autocast.gemm_dtype, _triton.mm
    yield torch, "autocast", lambda *args, **kwargs: nullcontext()
    # All are imported first: one that is imported later would keep the stand-ins.
    names = [found.name for found in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}.")]
    for module in [import_module(name) for name in names]:
        if getattr(module, "chip_of", None) is chip_of:
            yield module, "chip_of", lambda device: gpu
        if getattr(module, "gemm_dtype", None) is gemm_dtype:
            yield module, "gemm_dtype", lambda tensor: autocast
        if getattr(module, "mm", None) is mm:
            yield module, "mm", recorder.add_gemm
