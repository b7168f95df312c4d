"""torch's setting for the precision of float32 GEMMs."""

from __future__ import annotations

import torch


def may_split_bf16() -> bool:
    """Return whether a CPU may multiply float32 as bf16 splits.

    This is torch's own setting, which `torch.set_float32_matmul_precision` sets to "tf32" for
    "high" and to "bf16" for "medium".
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return matmul.fp32_precision in ("tf32", "bf16")


# torch.compiler.assume_constant_result without Dynamo's import, which takes a second. Graphs are
# recompiled where torch.set_float32_matmul_precision changes the setting.
may_split_bf16._dynamo_marked_constant = True  # type: ignore[attr-defined]
