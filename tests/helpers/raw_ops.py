"""Calls of the registered ops with randomly wrong arguments: raw_ops.py SEED COUNT [PREFIX].

Runs in a process of its own, since a missing check may end it by a signal. Each call starts from
arguments that fit together, of which up to three are then changed. Prints a line of JSON: for each
op the numbers of calls that returned and that raised, and the number of each kind of error. Only
ops whose names begin with PREFIX are called. With `-v` each call is named before it is made.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from synface_kernels import _import_all

_import_all()
OPS = torch.ops.synface_kernels
MEMORY = 4 << 30
OPTIONS = {
    "scale": 16.0, "limit": float("inf"), "needs_input_grad": True, "needs_cosine_sum": True,
    "needs_weight_grad": True, "workspace": 4096, "halves": False, "gemm_dtype": None,
    "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "dampening": 0.0, "nesterov": False,
    "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 3, "seed": None, "rule": "sgd",
    "numbers": [0.1, 0.9, 0.1, 0.0, 0.0], "kind": "riesz", "a": 2.0, "power": 1, "r_min": 1e-3,
    "needs_x_grad": True, "needs_y_grad": True, "split_bf16": False, "k": 2,
    "num_classes": 20, "num_sampled": 9, "ignore_index": -100, "mean": [127.5] * 3,
    "std": [127.5] * 3, "needs_synthetic_grad": True, "needs_real_grad": True,
    "needs_psi_grad": True, "dtype": torch.float32, "channels_last": False, "name": "x",
    "size": [3, 4], "impl": "cpu",
}  # fmt: skip
INTEGERS = [-(2**63), -(2**31), -2, -1, 0, 1, 2, 7, 2**31, 2**40, 2**62, 2**63 - 1]
NUMBERS = [0.0, -1.0, 0.5, 1e300, 1e-300, float("nan"), float("inf"), -float("inf")]
DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int32,
    torch.int64, torch.bool, torch.complex64,
]  # fmt: skip
SIZES = [-1, 0, 1, 3, 1000, 2**40]


def margin_arguments(draw: random.Random) -> dict[str, Any]:
    """Return tensors of the margin softmax: inputs, results of a forward pass, and gradients."""
    n, d, c = draw.choice([1, 5, 17]), draw.choice([1, 8, 16]), draw.choice([1, 6, 33])
    centers = draw.choice([(c, d), (c, d), (c, 2, d)])
    dtype = draw.choice(DTYPES[:4])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    class_ids = torch.arange(0, c, 2) if draw.random() < 0.3 else None
    used = c if class_ids is None else len(class_ids)
    found: dict[str, Any] = {
        "input": torch.randn(n, d).to(dtype),
        "weight": torch.randn(centers).to(dtype),
        "class_ids": class_ids,
        "labels": torch.randint(-1, used, (n, 2)),
        "negative_lse": torch.randn(n, dtype=torch.float64),
        "mean_center": torch.randn(n, d, dtype=wide),
        "center_sum": torch.randn(d, dtype=torch.float64),
        "kept": torch.rand(0, n, dtype=wide),
        "saved": torch.rand((used, *centers[1:])).to(dtype),
        "grad_negative_lse": torch.randn(n, dtype=torch.float64),
        "grad_target_cosine": torch.randn(n, 2, dtype=torch.float64),
        "grad_cosine_sum": torch.randn(n, dtype=torch.float64),
        "states": [torch.zeros(c, d * (len(centers) - 1)).to(wide)],
        "last_step": draw.choice([None, torch.zeros(c, dtype=torch.int64)]),
        "target": torch.randint(0, c, (n, 2)),
        "target_weight": torch.rand(n, 2),
        "m1": None,
        "m2": torch.rand(n),
        "m3": draw.choice([None, torch.rand(n)]),
        "num_classes": c,
        "workspace": draw.choice([-1, 0, 4096]),
    }
    if draw.random() < 0.5:
        found |= {"rule": "adamw", "numbers": [0.1, 0.9, 0.999, 1e-8, 0.1]}
        found["states"] = found["states"] * 2
    return found


def mixup_arguments(draw: random.Random) -> dict[str, Any]:
    """Return tensors of a mixture of two batches of images."""
    shape = draw.choice([(2, 3, 8, 8), (1, 3, 5, 7), (3, 3, 1, 70)])
    images = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(2)]
    if draw.random() < 0.6:
        images = [image.float() for image in images]
    floating = images[0].is_floating_point()
    batch = shape[0]
    return {
        "synthetic": images[0],
        "real": images[1],
        "psi": torch.rand(batch, dtype=torch.float64),
        "affine": torch.full((3, 2), 127.5, dtype=torch.float64),
        "flip_synthetic": torch.rand(batch) < 0.5,
        "flip_real": None,
        "out": torch.empty(shape),
        "gradient": torch.randn(shape),
        "grad_synthetic": torch.empty(shape) if floating else None,
        "grad_real": torch.empty(shape) if floating else None,
        "grad_psi": torch.empty(batch, dtype=torch.float64),
        "needs_synthetic_grad": floating,
        "needs_real_grad": floating,
    }


def repulsion_arguments(draw: random.Random) -> dict[str, Any]:
    """Return points on the hypersphere, their neighbors and gradients."""
    n, d, dtype = draw.choice([5, 40]), draw.choice([1, 7, 16]), draw.choice(DTYPES[:4])
    x = torch.randn(n, d).to(dtype)
    return {
        "x": x,
        "y": draw.choice([None, torch.randn(9, d).to(dtype)]),
        "rows": x,
        "index": torch.randint(0, 5, (n, 2)),
        "grad_square": torch.randn(n, 2, dtype=torch.float64),
        "kind": draw.choice(["log_sum_exp", "riesz", "log", "hinge"]),
    }


def update_arguments(draw: random.Random) -> dict[str, Any]:
    """Return a weight, its optimizer's states, and the rows of a step."""
    c, d, dtype = draw.choice([4, 50]), draw.choice([1, 16]), draw.choice(DTYPES[:3])
    class_ids = torch.arange(0, c, 3)
    return {
        "weight": torch.randn(c, d).to(dtype),
        "row_grad": torch.randn(len(class_ids), d).to(dtype),
        "class_ids": class_ids,
        "momentum_buffer": torch.zeros(c, d, dtype=dtype),
        "exp_avg": torch.zeros(c, d, dtype=dtype),
        "exp_avg_sq": torch.zeros(c, d, dtype=dtype),
        "last_step": draw.choice([None, torch.zeros(c, dtype=torch.int32)]),
        "seed": draw.choice([None, 5]),
    }


def sampling_arguments(draw: random.Random) -> dict[str, Any]:
    """Return labels to sample classes for."""
    seed = torch.tensor(5) if draw.random() < 0.5 else 5
    return {"target": torch.randint(0, 20, (8,)), "seed": seed}


ARGUMENTS = {
    "margin_cross_entropy": margin_arguments,
    "domain_mixup": mixup_arguments,
    "hypersphere_repulsion": repulsion_arguments,
    "row_update": update_arguments,
    "sample_classes": sampling_arguments,
}


def names() -> list[str]:
    """Return every op that is registered, but for those of CUDA, which have no kernels here."""
    schemas = {schema.name for schema in torch._C._jit_get_all_schemas()}
    own = (name.partition("::")[2] for name in schemas if name.startswith("synface_kernels::"))
    return sorted(name for name in own if not name.endswith("_cuda"))


def wrong_tensor(tensor: torch.Tensor, others: list[torch.Tensor], draw: random.Random) -> Any:
    """Return a tensor that differs from this one in dtype, shape, strides, content or device."""
    kind = draw.randrange(11)
    if kind == 0:
        return tensor.to(draw.choice(DTYPES))
    if kind == 1 and tensor.dim():
        dim = draw.randrange(tensor.dim())
        return tensor.narrow(dim, 0, draw.randrange(tensor.shape[dim] + 1))
    if kind == 2:
        return torch.cat([tensor.flatten()] * 2).unflatten(0, (2, -1)) if tensor.numel() else tensor
    if kind == 3:
        return draw.choice([tensor.flatten(), tensor.unsqueeze(0), tensor.new_empty(())])
    if kind == 4 and tensor.dim():
        return tensor.transpose(0, -1)
    if kind == 5 and tensor.dim():
        return tensor[:1].expand(draw.choice([0, 1, 5, 2**40]), *tensor.shape[1:])
    if kind == 6 and tensor.dim():
        return torch.cat([tensor] * 2, -1)[..., ::2]
    if kind == 7:
        return tensor.to("meta")
    if kind == 8 and not tensor.is_floating_point() and tensor.dtype != torch.bool:
        changed, most = tensor.clone().flatten(), torch.iinfo(tensor.dtype)
        values = [value for value in INTEGERS if most.min <= value <= most.max]
        if changed.numel():
            changed[draw.randrange(changed.numel())] = draw.choice(values)
        return changed.view(tensor.shape)
    if kind == 8:
        return torch.full_like(tensor, draw.choice(NUMBERS) if tensor.is_floating_point() else 1)
    if kind == 9 and others:
        return draw.choice(others)
    return draw.choice([None, torch.empty(0), 3, tensor.to_sparse()])


def wrong(value: Any, others: list[torch.Tensor], draw: random.Random) -> Any:
    """Return something else than a sound argument."""
    if isinstance(value, torch.Tensor):
        return wrong_tensor(value, others, draw)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice(INTEGERS)
    if isinstance(value, float):
        return draw.choice(NUMBERS)
    if isinstance(value, str):
        return draw.choice(["", "cpu", "reference", "adamw", "sgd", "no such"])
    if isinstance(value, torch.dtype):
        return draw.choice(DTYPES)
    if isinstance(value, list):
        if value and draw.random() < 0.5:
            at = draw.randrange(len(value))
            kind = SIZES if isinstance(value[at], int) else None
            other = draw.choice(kind) if kind else wrong(value[at], others, draw)
            return [*value[:at], other, *value[at + 1 :]]
        return draw.choice([[], value * 2, value[:1]])
    return draw.choice([None, 5, torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.float16])


def arguments(name: str, draw: random.Random) -> dict[str, Any]:
    """Return arguments of an op, of which some are wrong."""
    op = getattr(OPS, name)
    make = next((f for prefix, f in ARGUMENTS.items() if name.startswith(prefix)), lambda _: {})
    sound = OPTIONS | make(draw)
    used = {argument.name: sound[argument.name] for argument in op.default._schema.arguments}
    tensors = [value for value in used.values() if isinstance(value, torch.Tensor)]
    for key in draw.sample(sorted(used), min(len(used), draw.choice([0, 1, 1, 1, 2, 3]))):
        with suppress(RuntimeError):  # no such tensor has its dtype, or fits into memory
            used[key] = wrong(used[key], tensors, draw)
    return used


def describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        return f"{value.dtype} {tuple(value.shape)} strides {value.stride()} {value.device}"
    return value


def limit_memory() -> None:
    """Limit this process to 4 GiB more, so that a huge argument is an error at once."""
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        return  # its shadow memory takes terabytes of addresses, and it has a limit of its own
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def main(seed: int, count: int, prefix: str, loud: bool) -> None:
    limit_memory()
    ops = [name for name in names() if name.startswith(prefix)]
    results = Counter[str]()
    outcomes = {name: [0, 0] for name in ops}
    for number in range(seed, seed + count):
        draw = random.Random(number)
        torch.manual_seed(number)
        name = ops[number % len(ops)]
        used = arguments(name, draw)
        if loud:
            described = {key: describe(value) for key, value in used.items()}
            print(number, name, described, flush=True)
        try:
            getattr(OPS, name)(**used)
            outcomes[name][0] += 1
        except Exception as error:
            outcomes[name][1] += 1
            results[type(error).__name__ if str(error) else "empty"] += 1
    print(json.dumps({"ops": outcomes, "errors": results}))


if __name__ == "__main__":
    torch.set_num_threads(2)
    words = [word for word in sys.argv[1:] if word != "-v"]
    main(int(words[0]), int(words[1]), "".join(words[2:]), "-v" in sys.argv)
