"""A stand-in for a GPU: tensors that say they are on one, and a mode that notices where one waits.

Values are those of CPU tensors, so the branches that code takes for a GPU run and return results,
on a machine without one; Triton's kernels run in its interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from synface_kernels import _cuda

GPU = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="stand-in", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20,
    total_memory=80 << 30,
)  # fmt: skip
_MODES: list[StandInGpu] = []

# Ops whose result's shape, or value on the host, depends on a tensor's values.
_READS = {
    "_local_scalar_dense", "nonzero", "_unique", "_unique2", "unique_dim", "unique_consecutive",
    "masked_select", "equal", "_coalesce", "bincount", "histc", "is_nonzero",
}  # fmt: skip


class OnGpu(torch.Tensor):
    """A tensor of the stand-in; C++ takes it for one on the meta device, Python for a GPU's."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        shape: Any = inner.shape
        layout = {} if inner.layout != torch.strided else {"strides": inner.stride()}
        made = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=inner.dtype, device="meta", **layout
        )  # type: ignore[attr-defined]
        made.inner = inner
        return made

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    is_sparse = property(lambda self: self.inner.is_sparse)  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.inner!r})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def get_device(self) -> int:
        return 0

    def _indices(self) -> Tensor:
        return OnGpu(self.inner._indices())

    def _values(self) -> Tensor:
        return OnGpu(self.inner._values())

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, **({"dtype": self.dtype, "device": GPU} | kwargs))

    def tolist(self) -> list[Any]:
        _MODES[-1].note("tolist")
        return self.inner.tolist()

    def is_coalesced(self) -> bool:
        return self.inner.is_coalesced()

    def _coalesced_(self, coalesced: bool) -> Tensor:
        self.inner._coalesced_(coalesced)
        return self

    def coalesce(self) -> Tensor:
        _MODES[-1].note("coalesce")
        return OnGpu(self.inner.coalesce())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _MODES[-1].run(func, args, kwargs or {})


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnGpu) else value


def cpu(value: Any) -> Any:
    """Return the values of a stand-in's tensors, without being noticed."""
    return tree_map_only(OnGpu, lambda tensor: tensor.inner, value)


class _Devices(TorchFunctionMode):
    """Names the device by its index, which C++ would ask a GPU for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only((str, torch.device), _indexed, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def _created(make: Callable[..., Any], waits: bool) -> Callable[..., Any]:
    """Return a function that creates tensors, whose device C++ hides from dispatch modes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        elsewhere = device is None or torch.device(device).type != "cuda"
        if elsewhere and not any(isinstance(value, OnGpu) for value in args):
            return make(*args, **kwargs)
        if waits:
            _MODES[-1].note(f"{make.__name__}(…, device={device})")
        return OnGpu(make(*map(_inner, args), **(kwargs | {"device": "cpu"})))

    return call


def _indexed(value: Any) -> Any:
    return GPU if value in ("cuda", torch.device("cuda")) else value


class StandInGpu(TorchDispatchMode):
    """A mode under which ``device="cuda"`` makes tensors of the stand-in.

    Attributes:
        waits: for each operation that makes the host wait for a GPU, its name and place.
        uploads: for each copy from the host that no graph could capture, likewise.
        capturing: what `torch.cuda.is_current_stream_capturing` returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.uploads: list[str] = []
        self.capturing = False

    def note(self, what: str, upload: bool = False) -> None:
        """Record what would wait, or would copy from the host, and which code did it."""
        own = ("torch/", "tests/helpers/stand_in_gpu")
        frames = [f for f in traceback.extract_stack() if not any(o in f.filename for o in own)]
        place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"
        (self.uploads if upload else self.waits).append(f"{what} at {place}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = any(isinstance(tensor, OnGpu) for tensor in tensors)
        name = func.overloadpacket.__name__
        device = kwargs.get("device")
        wanted = None if device is None else torch.device(device).type
        if wanted == "meta" and (here or name in ("scalar_tensor", "zeros")):
            wanted = "cuda"  # C++ asks for the device that it takes the stand-in's for
        if func.namespace.startswith("synface"):
            if not here:
                return func(*args, **kwargs)
            keys = (DispatchKey.CUDA, DispatchKey.CompositeExplicitAutograd)
            with self:  # the implementation for GPUs, with stand-ins
                key = next(key for key in keys if func.has_kernel_for_dispatch_key(key))
                return func._op_dk(key, *args, **kwargs)
        if here:
            self._notice(func, name, args, kwargs, tensors, wanted)
        elif name == "_to_copy" and wanted == "cuda":
            self._upload(name, not kwargs.get("non_blocking"))
        if wanted == "cuda":
            kwargs = kwargs | {"device": torch.device("cpu")}
        plain_args, plain_kwargs = tree_map_only(OnGpu, _inner, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        if (here and wanted != "cpu" and name != "_local_scalar_dense") or wanted == "cuda":
            if name == "copy_" and not isinstance(args[0], OnGpu):
                return args[0]
            result = tree_map_only(Tensor, OnGpu, result)
            if here:
                return return_and_correct_aliasing(func, args, kwargs, result)
        return result

    def _upload(self, name: str, blocking: bool) -> None:
        self.note(f"{name} from the CPU", upload=True)
        if blocking:
            self.note(f"{name} from the CPU")

    def _notice(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], wanted: Any
    ) -> None:
        if name in _READS:
            self.note(name)
        elif name == "_to_copy" and wanted == "cpu":
            if not kwargs.get("non_blocking"):  # else torch pins the result
                self.note("_to_copy to the CPU")
        elif name == "copy_":
            if not isinstance(args[1], OnGpu):
                if args[1].dim():
                    blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
                    self._upload(name, blocking)
            elif not isinstance(args[0], OnGpu):
                self.note("copy_ to the CPU")  # no pinned memory here
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.note(f"{name} by a mask")
                elif index is not None and not isinstance(index, OnGpu):
                    self.note(f"{name} by indices on the CPU")
            if name != "index" and not isinstance(args[2], OnGpu):
                self.note(f"{name} of a number from the CPU")
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.note(name)
        else:
            for tensor in tensors:
                if (
                    not isinstance(tensor, OnGpu)
                    and tensor.dim()
                    and tensor.layout == torch.strided
                ):
                    raise RuntimeError(
                        f"{func} takes tensors on different devices: {tuple(tensor.shape)} is on "
                        "the CPU"
                    )

    def __enter__(self) -> StandInGpu:
        _MODES.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _MODES.pop()


class _Event:
    """A `torch.cuda.Event` of the stand-in, which is never behind."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.recorded, self.time = False, 0.0

    def record(self, stream: Any = None) -> None:
        self.recorded, self.time = True, time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        assert self.recorded
        return 1e3 * (end.time - self.time)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        assert self.recorded


def _interpreted(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return the interpreter's run(), given the values of the stand-in's tensors."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return run(self, *map(_inner, args), **{k: _inner(v) for k, v in kwargs.items()})

    return call


@contextmanager
def stand_in_gpu() -> Iterator[StandInGpu]:
    """Run the block with a stand-in for a GPU, as ``device="cuda"``."""
    mode = StandInGpu()
    stream = SimpleNamespace(cuda_stream=id(mode))
    functions: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "device_of": lambda tensor: nullcontext(),
        "get_device_properties": lambda device: PROPERTIES,
        "current_stream": lambda device=None: stream,
        "is_current_stream_capturing": lambda: mode.capturing,
        "Event": _Event,
        "synchronize": lambda device=None: mode.note("synchronize"),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
    }
    patches: list[Any] = [
        mock.patch.object(torch.cuda, name, function) for name, function in functions.items()
    ]
    patches.append(mock.patch.object(_cuda, "missing", return_value="a stand-in"))
    for name in ("tensor", "as_tensor", "scalar_tensor", "sparse_coo_tensor"):
        created = _created(getattr(torch, name), waits=name != "sparse_coo_tensor")
        patches.append(mock.patch.object(torch, name, created))
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        pass
    else:
        call = _interpreted(GridExecutor.__call__)
        patches.append(mock.patch.object(GridExecutor, "__call__", call))
    for patch in patches:
        patch.start()
    try:
        with mode, _Devices():
            yield mode
    finally:
        for patch in reversed(patches):
            patch.stop()
