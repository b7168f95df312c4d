"""Domain mixup against its definition: every implementation gives the same bits."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor

import synface_kernels as sk
import synface_kernels.numpy as skn
from synface_kernels._load import cpu_isas
from synface_kernels.ops.domain_mixup import reference
from tests.helpers.cpu import cpu

ROOT = Path(__file__).parents[2]
U8, F32, BF16, F16, F64 = torch.uint8, torch.float32, torch.bfloat16, torch.float16, torch.float64
FORMATS = (torch.contiguous_format, torch.channels_last)
OPS = torch.ops.synface_kernels


def images(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    if dtype == U8:
        return torch.randint(0, 256, shape, generator=rng, dtype=U8)
    return torch.rand(shape, generator=rng, dtype=F64).to(dtype)


def pair(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return images(shape, dtype, rng), images(shape, dtype, rng)


def plain(s: Tensor, r: Tensor, psi: Tensor, mean: float, std: float) -> Tensor:
    """Mix uint8 NHWC images into normalized NCHW by the formula, in float64."""
    share = psi.double().view(-1, 1, 1, 1)
    mixed = (share * (s.double() / 255) + (1 - share) * (r.double() / 255)).permute(0, 3, 1, 2)
    return (mixed - mean) / std


# ---- the definition ------------------------------------------------------------------------------


def test_definition_is_the_formula() -> None:
    s, r = pair((4, 9, 7, 3), U8)
    psi = torch.tensor([0.0, 0.05, 0.5, 1.0])
    got = sk.domain_mixup(s, r, psi, mean=0.4, std=0.3, dtype=F64, impl="reference")
    torch.testing.assert_close(got, plain(s, r, psi, 0.4, 0.3), rtol=0, atol=1e-14)


def test_definition_flips_and_layouts() -> None:
    s, r = pair((3, 5, 4, 3), F64)
    flip = torch.tensor([[True, False, True], [False, True, True]])
    flipped = [torch.stack([x.flip(1) if f else x for x, f in zip(side, flags, strict=True)])
               for side, flags in zip((s, r), flip, strict=True)]  # fmt: skip
    expected = sk.domain_mixup(*flipped, 0.3, impl="reference")
    for given in (flip, (flip[0], flip[1])):
        assert torch.equal(sk.domain_mixup(s, r, 0.3, flip=given, impl="reference"), expected)
    planar = [x.permute(0, 3, 1, 2).contiguous() for x in (s, r)]
    got = sk.domain_mixup(*planar, 0.3, flip=flip, layout="NCHW", impl="reference")
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("dtype", "bits"), [(BF16, 8), (F16, 11)])
def test_round_once(dtype: torch.dtype, bits: int) -> None:
    tie, above = 1 + 2.0**-bits, 1 + 2.0 ** (1 - bits)
    x = torch.tensor(
        [tie + 2.0**-40, tie - 2.0**-40, tie, -tie - 2.0**-40, 0.0, 1e300, float("nan")], dtype=F64
    )
    got = reference.round_once(x, dtype)
    assert got[:6].tolist() == [above, 1.0, 1.0, -above, 0.0, float("inf")]
    assert got[6].isnan()


# ---- implementations -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", cpu_isas())
@pytest.mark.parametrize("source", [U8, F32, BF16, F16, F64])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_cpu_gives_the_definitions_bits(name: str, source: Any, dtype: Any) -> None:
    shapes = ((3, 112, 112, 3), (2, 7, 5, 3), (2, 9, 33, 1), (1, 5, 65, 5), (2, 1, 1, 3),
              (1, 2, 2, 300), (1, 1, 3000, 3))  # fmt: skip
    for index, shape in enumerate(shapes):
        for layout in ("NHWC", "NCHW"):
            for memory_format in FORMATS:
                b, h, w, c = shape
                sized = shape if layout == "NHWC" else (b, c, h, w)
                s, r = pair(sized, source, seed=index)
                rng = torch.Generator().manual_seed(index)
                psi = torch.rand(b, generator=rng)
                flip = torch.rand(2, b, generator=rng) < 0.5 if index % 2 else None
                even = index == 0
                mean = 0.5 if even else [0.4 + 0.01 * (i % 9) for i in range(c)]
                std = 0.5 if even else [0.2 + 0.01 * (i % 7) for i in range(c)]
                options: dict[str, Any] = {
                    "mean": mean, "std": std, "flip": flip, "layout": layout, "dtype": dtype,
                    "memory_format": memory_format,
                }  # fmt: skip
                expected = sk.domain_mixup(s, r, psi, impl="reference", **options)
                with cpu(name):
                    got = sk.domain_mixup(s, r, psi, impl="cpu", **options)
                assert torch.equal(got, expected), (shape, layout, memory_format)
                assert got.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("name", cpu_isas())
@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.0, 1.0), (0.485, 0.229), (0.0, 1 / 255)])
def test_every_pair_of_bytes_is_exact(name: str, mean: float, std: float) -> None:
    """256 × 256 pairs under each of SynFace's 21 ψ."""
    byte = torch.arange(256, dtype=U8)
    s = byte[:, None].expand(256, 256).reshape(1, 256, 256, 1).repeat(21, 1, 1, 1)
    r = byte[None, :].expand(256, 256).reshape(1, 256, 256, 1).repeat(21, 1, 1, 1)
    psi = torch.arange(21, dtype=F64) / 20
    exact = sk.domain_mixup(s, r, psi, mean=mean, std=std, dtype=F64, impl="reference")
    torch.testing.assert_close(exact, plain(s, r, psi, mean, std), rtol=4e-16, atol=4e-15 / std)
    for dtype in (F32, BF16, F16):
        with cpu(name):
            got = sk.domain_mixup(s, r, psi, mean=mean, std=std, dtype=dtype, impl="cpu")
        if dtype == F32:
            assert torch.equal(got, exact.float())
            continue
        # Correctly rounded: no neighbor is nearer, and a tie goes to the even one.
        error = (got.double() - exact).abs()
        for way in (torch.inf, -torch.inf):
            neighbor = torch.nextafter(got, torch.full_like(got, way)).double()
            other = (neighbor - exact).abs()
            even = (got.view(torch.int16) & 1) == 0
            assert ((error < other) | ((error == other) & even)).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    s, r = pair((9, 40, 44, 3), F32)
    psi = torch.rand(9, generator=torch.Generator().manual_seed(1))
    flip = torch.arange(18).view(2, 9) % 3 == 0
    gradient = torch.randn(9, 3, 40, 44, generator=torch.Generator().manual_seed(2)).to(dtype)
    results = []
    for count in (1, 2, 3, 5):
        for name in cpu_isas():
            with cpu(name, count):
                leaves = [t.clone().requires_grad_() for t in (s, r, psi)]
                out = sk.domain_mixup(*leaves, flip=flip, dtype=dtype, impl="cpu")
                out.backward(gradient)
                results.append([out, *(leaf.grad for leaf in leaves)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("name", cpu_isas())
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_estimates_do_not_show(name: str, dtype: torch.dtype) -> None:
    """Results computed in float32, where that suffices, have float64's bits."""
    rng = torch.Generator().manual_seed(3)
    s, r = pair((16, 64, 67, 3), U8)
    s[8:12] = r[8:12]  # then the result does not depend on ψ
    s[12:] = 255 - r[12:]  # mid-grayscale at ψ = ½: results of 0 and about 0
    for share in (None, 0.5, 1e-300, 2.0**-17, 1 - 2.0**-53):
        psi = torch.rand(16, generator=rng, dtype=F64) if share is None else share
        for mean, std in (
            (0.5, 0.5),
            (0.0, 1 / 255),  # at ψ = ½ sums of bytes, halved: many ties
            (1 / 255, 2.0**-9),
            ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            (0.5, [100.0, 1.0, 1e-4]),  # subnormal float16
            (0.0, [1 / 65_280, 1e-5, 1.0]),  # the greatest float16, infinite ones
            ([0.0, 1.0, 0.5], [1e-30, 1e30, 3.0]),  # too far off for estimates
            ([-0.1, 0.5, 1.2], 0.5),
            (1e200, 1e-200),
        ):
            options: dict[str, Any] = {"mean": mean, "std": std, "dtype": dtype}
            expected = sk.domain_mixup(s, r, psi, impl="reference", **options)
            for memory_format in FORMATS:
                options["memory_format"] = memory_format
                with cpu(name):
                    got = sk.domain_mixup(s, r, psi, impl="cpu", **options).contiguous()
                bits = torch.int32 if dtype == F32 else torch.int16
                assert torch.equal(got.view(bits), expected.view(bits)), (psi, mean)


@pytest.mark.parametrize("name", cpu_isas())
def test_writes_into_views_at_any_address(name: str) -> None:
    s, r = pair((2, 31, 33, 3), U8)
    for dtype in (F32, BF16):
        expected = sk.domain_mixup(s, r, 0.3, dtype=dtype, impl="reference")
        for offset in range(1, 8):
            memory = torch.full((expected.numel() + 16,), 7.0, dtype=dtype)
            out = memory[offset : offset + expected.numel()].view(expected.shape)
            with cpu(name):
                sk.domain_mixup(s, r, 0.3, dtype=dtype, out=out, impl="cpu")
            assert torch.equal(out, expected)
            assert (memory[:offset] == 7).all()
            assert (memory[offset + expected.numel() :] == 7).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_large_results(dtype: torch.dtype) -> None:
    """Results of 8 MiB and more are stored past the caches where they are aligned."""
    size = 2**23 // dtype.itemsize
    for height, width in ((64, 64), (33, 31), (6, 8)):  # the last one with a rest of 16 pixels
        batch = size // (3 * height * width) + 1
        s, r = pair((batch, height, width, 3), U8)
        psi = torch.rand(batch, generator=torch.Generator().manual_seed(1))
        planar = [x.permute(0, 3, 1, 2).contiguous() for x in (s, r)]
        expected = sk.domain_mixup(s, r, psi, dtype=dtype, impl="reference")
        for offset, memory_format in itertools.product((0, 8), FORMATS):
            memory = torch.empty(expected.numel() + 8, dtype=dtype)
            out = torch.as_strided(
                memory,
                expected.shape,
                torch.empty_like(expected, device="meta", memory_format=memory_format).stride(),
                offset,
            )
            for images, layout in (((s, r), "NHWC"), (planar, "NCHW")):
                memory.fill_(7)
                sk.domain_mixup(
                    *images, psi, dtype=dtype, memory_format=memory_format, layout=layout,
                    out=out, impl="cpu",
                )  # fmt: skip
                assert torch.equal(out, expected)
                assert (memory[:offset] == 7).all()
                assert (memory[offset + expected.numel() :] == 7).all()


@hypothesis.given(st.data())
def test_any_shape_and_strides(data: st.DataObject) -> None:
    b, h, w, c = (data.draw(st.integers(low, high)) for low, high in
                  ((0, 3), (0, 40), (0, 70), (1, 6)))  # fmt: skip
    hypothesis.assume(c in (1, 3, 4) or h not in (1, 3, 4))  # else taken for the other layout
    source = data.draw(st.sampled_from([U8, F32, BF16]))
    dtype = data.draw(st.sampled_from([F32, BF16, F16, F64]))
    order = data.draw(st.permutations(range(4)))
    step = data.draw(st.integers(1, 2))
    inverse = [order.index(i) for i in range(4)]

    def strided(x: Tensor) -> Tensor:
        """Return the same values in other memory: dimensions permuted, rows perhaps with gaps."""
        wide = x.new_zeros((*(x.shape[i] for i in order[:3]), step * x.shape[order[3]]))
        view = wide[..., ::step].permute(inverse)
        view.copy_(x)
        return view

    seed = data.draw(st.integers(0, 99))
    s, r = pair((b, h, w, c), source, seed)
    rng = torch.Generator().manual_seed(seed + 1)
    shares = [0.0, 1.0, 0.3, torch.rand(b, generator=rng), torch.tensor(0.7)]
    psi = data.draw(st.sampled_from(shares))
    flip = torch.rand(2, b, generator=rng) < 0.5 if data.draw(st.booleans()) else None
    options: dict[str, Any] = {
        "flip": flip,
        "dtype": dtype,
        "memory_format": data.draw(st.sampled_from(FORMATS)),
    }
    expected = sk.domain_mixup(s, r, psi, impl="reference", **options)
    other = strided(r) if data.draw(st.booleans()) else r
    assert torch.equal(sk.domain_mixup(strided(s), other, psi, impl="cpu", **options), expected)


@pytest.mark.parametrize(
    "shape", [(0, 4, 4, 3), (2, 0, 5, 3), (2, 5, 0, 3), (2, 0, 0, 1), (0,) * 4]
)
def test_empty(shape: tuple[int, ...]) -> None:
    b, h, w, c = shape
    for impl, source, memory_format in itertools.product(("cpu", "reference"), (U8, F32), FORMATS):
        s = torch.zeros(shape, dtype=source, requires_grad=source == F32)
        psi = torch.full((b,), 0.5, requires_grad=True)
        flip = torch.ones(2, b, dtype=torch.bool)
        mixed = sk.domain_mixup(s, s, psi, flip=flip, memory_format=memory_format, impl=impl)
        assert mixed.shape == (b, c, h, w)
        mixed.sum().backward()
        assert torch.equal(psi.grad, torch.zeros(b))
        assert s.grad is None if source == U8 else s.grad.shape == shape
        if h or w:
            swapped = s.permute(0, 3, 1, 2).contiguous()
            assert sk.domain_mixup(swapped, swapped, 0.5, layout="NCHW").shape == (b, c, h, w)
        with torch.no_grad():
            out = torch.empty(b, c, h, w)
            assert sk.domain_mixup(s, s, psi, out=out, impl=impl) is out
    assert skn.domain_mixup(np.zeros(shape, np.uint8), np.zeros(shape, np.uint8), 0.5).shape == (
        b, c, h, w,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(4, 3, 112, 112), (2, 1, 8, 6), (1, 4, 6, 5)])
def test_images_of_the_other_layout(shape: tuple[int, ...]) -> None:
    """Images with 1, 3 or 4 channels only in the other layout are refused, unless it is given."""
    planar = torch.rand(shape)
    images = planar.permute(0, 2, 3, 1).contiguous()
    expected = sk.domain_mixup(images, images, 0.5)
    assert torch.equal(sk.domain_mixup(planar, planar, 0.5, layout="NCHW"), expected)
    for mix, x in ((sk.domain_mixup, planar), (skn.domain_mixup, planar.numpy())):
        with pytest.raises(ValueError, match=f'{shape[3]} channels.*give layout="NCHW"'):
            mix(x, x, 0.5)
    layers = torch.rand(2, 512, 4, 4)  # an explicit layout is not questioned
    assert sk.domain_mixup(layers, layers, 0.5, layout="NCHW").shape == (2, 512, 4, 4)
    many = torch.rand(2, 16, 8, 6)  # neither layout has 1, 3 or 4 channels
    assert sk.domain_mixup(many, many, 0.5).shape == (2, 6, 16, 8)
    assert sk.domain_mixup(many, many, 0.5, layout="NCHW").shape == (2, 16, 8, 6)


def test_out() -> None:
    s, r = pair((5, 12, 11, 3), U8)
    for dtype in (F32, BF16):
        for memory_format in FORMATS:
            expected = sk.domain_mixup(s, r, 0.4, dtype=dtype, memory_format=memory_format)
            out = torch.full_like(expected, torch.nan)
            got = sk.domain_mixup(s, r, 0.4, dtype=dtype, memory_format=memory_format, out=out)
            assert got is out
            assert torch.equal(out, expected)


def test_numpy_gives_the_same_bits() -> None:
    s, r = pair((3, 7, 5, 3), U8)
    flip = torch.tensor([[True, False, True], [False, True, True]])
    for source in (U8, F32):
        x, y = (t if source == U8 else t.float() / 255 for t in (s, r))
        for dtype in (F32, F16, BF16):
            expected = sk.domain_mixup(x, y, 0.35, mean=(0.4, 0.5, 0.6), flip=flip, dtype=dtype)
            name: Any = str(dtype).removeprefix("torch.")
            for layout in ("NCHW", "NHWC"):
                got = skn.domain_mixup(
                    x.numpy(), y.numpy(), 0.35, mean=(0.4, 0.5, 0.6), dtype=name,
                    flip=(flip[0].numpy(), flip[1].numpy()), out_layout=layout,  # type: ignore[arg-type]
                )  # fmt: skip
                tensor = torch.from_numpy(got.view(np.int16) if dtype == BF16 else got)
                tensor = tensor.view(BF16) if dtype == BF16 else tensor
                assert torch.equal(tensor if layout == "NCHW" else tensor.permute(0, 3, 1, 2),
                                   expected)  # fmt: skip


def test_numpy_needs_no_torch() -> None:
    code = (
        "import sys, numpy as np, synface_kernels.numpy as skn\n"
        "x = np.zeros((1, 4, 4, 3), np.uint8)\n"
        "assert (skn.domain_mixup(x, x, 0.5) == -1).all()\n"
        "assert 'torch' not in sys.modules\n"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})


def test_numpy_bad_input() -> None:
    x = np.zeros((2, 4, 4, 3), np.uint8)
    for options, message in (
        ({"real": x[:1]}, "real must be like synthetic"),
        ({"psi": 1.5}, "psi must be in"),
        ({"psi": np.zeros(3)}, "psi must be one number"),
        ({"std": 0.0}, "std must be > 0"),
        ({"mean": (1, 2)}, "mean must be one finite number or C = 3"),
        ({"dtype": "float64"}, "dtype must be"),
        ({"out": np.zeros((2, 3, 4, 4))}, "out must be float32"),
        ({"flip": (np.zeros(2), None)}, r"flip\[0\] must be bool"),
        ({"flip": (None,)}, "flip must be a pair"),
        ({"flip": np.array(True)}, "flip must be a pair"),
    ):
        arguments: dict[str, Any] = {"synthetic": x, "real": x, "psi": 0.5} | options
        with pytest.raises(ValueError, match=message):
            skn.domain_mixup(**arguments)
    with pytest.raises(TypeError, match=r"flip must be None or a pair .* got bool"):
        skn.domain_mixup(x, x, 0.5, flip=True)  # type: ignore[arg-type]
    for name in ("psi", "mean", "std"):
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            skn.domain_mixup(**({"synthetic": x, "real": x, "psi": 0.5} | {name: "0.5"}))
    memory = np.zeros(3 * 96, np.float32)
    out, psi = memory[:96].reshape(1, 3, 4, 8), memory.view(np.float64)[:1]
    images = np.zeros((1, 4, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="out must not share memory with psi"):
        skn.domain_mixup(images, images, psi, out=out)


# ---- gradients and registrations -----------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_gradcheck(impl: str, memory_format: torch.memory_format, layout: Any) -> None:
    shape = (2, 3, 5, 3) if layout == "NHWC" else (2, 3, 3, 5)
    s, r = pair(shape, F64)
    flip = torch.tensor([[True, False], [True, True]])

    def run(s: Tensor, r: Tensor, psi: Tensor) -> Tensor:
        return sk.domain_mixup(
            s, r, psi, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], flip=flip, layout=layout,
            dtype=F64, memory_format=memory_format, impl=impl,
        )  # fmt: skip

    for psi in (torch.tensor([0.3, 0.6], dtype=F64), torch.tensor(0.4, dtype=F64)):
        inputs = [t.clone().requires_grad_() for t in (s, r, psi)]
        assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("source", [F32, BF16, F16])
def test_gradients_are_the_definitions_bits(source: torch.dtype) -> None:
    for layout in ("NHWC", "NCHW"):
        s, r = pair((3, 30, 31, 3) if layout == "NHWC" else (3, 3, 30, 31), source)
        psi = torch.rand(3, dtype=F64)
        gradient = torch.randn(3, 3, 30, 31).to(memory_format=torch.channels_last)
        flip = torch.tensor([[True, False, True], [False, True, True]])
        grads = []
        for impl in ("cpu", "reference"):
            leaves = [t.clone().requires_grad_() for t in (s, r, psi)]
            out = sk.domain_mixup(*leaves, std=[0.2, 0.3, 0.4], flip=flip, layout=layout, impl=impl)
            out.backward(gradient)
            grads.append([leaf.grad for leaf in leaves])
        assert torch.equal(grads[0][0], grads[1][0])
        assert torch.equal(grads[0][1], grads[1][1])
        torch.testing.assert_close(grads[0][2], grads[1][2], rtol=1e-12, atol=1e-10)


def test_only_psi_learns_from_bytes() -> None:
    s, r = pair((2, 6, 6, 3), U8)
    psi = torch.tensor(0.5, dtype=F64, requires_grad=True)
    sk.domain_mixup(s, r, psi, dtype=F64).sum().backward()
    expected = (s.double() - r.double()).sum() / 255 / 0.5
    torch.testing.assert_close(psi.grad, expected)


@pytest.mark.slow
def test_opcheck() -> None:
    psi = torch.tensor([0.3, 0.6], dtype=F64, requires_grad=True)
    flip = torch.tensor([True, False])
    for source in (U8, F32):
        s, r = (t.permute(0, 3, 1, 2) for t in pair((2, 5, 4, 3), source))
        if source == F32:
            s, r = s.detach().requires_grad_(), r.detach().requires_grad_()
        constants = ([0.5] * 3, [0.5] * 3, flip, None)
        for channels_last in (False, True):
            torch.library.opcheck(
                OPS.domain_mixup_forward, (s, r, psi, *constants, BF16, channels_last, "cpu")
            )
        with torch.no_grad():
            arguments = (s.detach(), r.detach(), psi.detach(), *constants)
            torch.library.opcheck(
                OPS.domain_mixup_out, (*arguments, torch.empty(2, 3, 5, 4), "cpu")
            )
            gradient = torch.randn(2, 3, 5, 4)
            torch.library.opcheck(
                OPS.domain_mixup_backward,
                (gradient, *arguments, source == F32, False, True, "cpu"),
            )


def test_compiles_to_one_graph() -> None:
    s, r = pair((2, 8, 8, 3), F32)
    psi = torch.tensor([0.3, 0.6])

    def run(s: Tensor, r: Tensor, psi: Tensor) -> Tensor:
        x = sk.domain_mixup(s, r, psi, flip=(psi > 0.5, None), memory_format=torch.channels_last)
        return (x * x).mean() + sk.identity_mixup(s.flatten(1), r.flatten(1), psi).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (run, compiled):
        leaves = [t.clone().requires_grad_() for t in (s, r, psi)]
        function(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    for got, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, expected)

    def into(s: Tensor, r: Tensor, out: Tensor) -> Tensor:
        return sk.domain_mixup(s, r, 0.3, out=out) + 1

    out = torch.empty(2, 3, 8, 8)
    got = torch.compile(into, fullgraph=True, backend="aot_eager")(s, r, out)
    assert torch.equal(out, sk.domain_mixup(s, r, 0.3))
    assert torch.equal(got, out + 1)


def test_compiles_with_dynamic_shapes_and_numbers() -> None:
    def run(x: Tensor, mean: float) -> Tensor:
        return sk.domain_mixup(x, x.flip(0), 0.3, mean=mean, layout="NCHW")

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (5, 7, 9):
        x = torch.rand(size, 3, size, size + 1)
        torch.testing.assert_close(compiled(x, size / 10), run(x, size / 10))


# ---- bad input -----------------------------------------------------------------------------------

X = torch.zeros(2, 4, 5, 3, dtype=U8)
SHARED = torch.zeros(2 * 4 * 5 * 3, dtype=F32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"real": X[:1]}, ValueError, r"real must be of the shape.*got real uint8 \(1, 4, 5, 3\)"),
        ({"real": X.float()}, ValueError, "real must be of the shape, dtype"),
        ({"real": X.to("meta")}, ValueError, "device"),
        ({"synthetic": X.int()}, ValueError, "synthetic must be uint8, float32.*got int32"),
        ({"synthetic": X[0]}, ValueError, r"synthetic must be .*\(4, 5, 3\)"),
        ({"synthetic": [1]}, TypeError, "synthetic must be a tensor, got list"),
        ({"psi": 1.01}, ValueError, r"psi must be in \[0, 1\], got 1.01"),
        ({"psi": float("nan")}, ValueError, r"psi must be in \[0, 1\], got nan"),
        ({"psi": torch.tensor([0.5, -0.25])}, ValueError, "got -0.25 in row 1"),
        ({"psi": torch.tensor([torch.nan, 0.5])}, ValueError, "got nan in row 0"),
        ({"psi": torch.tensor(torch.inf)}, ValueError, "psi must be .*got inf"),
        ({"psi": torch.zeros(3)}, ValueError, r"psi must be .*B = 2.*got float32 \(3,\)"),
        ({"psi": torch.tensor([0, 1])}, ValueError, "psi must be floating point"),
        ({"psi": "0.5"}, TypeError, "psi must be a number or a tensor, got str"),
        ({"std": 0.0}, ValueError, "std must be > 0, got 0.0"),
        ({"std": (0.5, -1, 0.5)}, ValueError, "std must be > 0"),
        ({"std": float("nan")}, ValueError, "std must be finite"),
        ({"mean": (0.5, 0.5)}, ValueError, "mean must be one number or C = 3, got 2"),
        ({"mean": "half"}, TypeError, "mean must be a number"),
        ({"layout": "HWC"}, ValueError, "layout must be 'NHWC' or 'NCHW', got 'HWC'"),
        ({"dtype": torch.int32}, ValueError, "dtype must be float32"),
        ({"dtype": "float32"}, TypeError, "dtype must be a torch.dtype, got str"),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format must be"),
        ({"flip": torch.zeros(2, 2)}, ValueError, "flip_synthetic must be bool"),
        ({"flip": torch.zeros(3, 2).bool()}, ValueError, "flip must be a pair"),
        ({"flip": (None, torch.zeros(3).bool())}, ValueError, "flip_real must be bool.*B = 2"),
        ({"flip": torch.tensor(True)}, ValueError, r"flip must be a pair .* got bool \(\)"),
        ({"flip": True}, TypeError, "flip must be"),
        ({"out": torch.zeros(2, 4, 5, 3)}, ValueError, r"out must be float32 \(2, 3, 4, 5\)"),
        ({"out": torch.zeros(2, 3, 4, 5, dtype=BF16)}, ValueError, "got bfloat16"),
        ({"out": torch.zeros(2, 4, 5, 3).permute(0, 3, 1, 2)}, ValueError, "contiguous"),
        ({"out": [0]}, TypeError, "out must be a tensor"),
        ({"out": torch.zeros(2, 3, 4, 5, requires_grad=True)}, ValueError, "autograd"),
        ({"synthetic": SHARED.view(2, 4, 5, 3), "real": X.float(), "out": SHARED.view(2, 3, 4, 5)},
         ValueError, "out must not share memory with synthetic"),
        ({"synthetic": X.float(), "real": SHARED.view(2, 4, 5, 3), "out": SHARED.view(2, 3, 4, 5)},
         ValueError, "out must not share memory with real"),
        ({"impl": "gpu"}, ValueError, "impl must be one of"),
        ({"impl": "cuda"}, RuntimeError, "impl='cuda' of domain_mixup cannot run here"),
        ({"impl": "triton"}, RuntimeError, "impl='triton' of domain_mixup cannot run here"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    if change.get("impl") == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets its kernels here")
    with pytest.raises(error, match=message):
        sk.domain_mixup(**({"synthetic": X, "real": X, "psi": 0.5} | change))


# ---- identity mixup ------------------------------------------------------------------------------


def test_identity_mixup() -> None:
    a, b = torch.randn(3, 7, dtype=F64), torch.randn(3, 7, dtype=F64)
    phi = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    expected = phi[:, None] * a + (1 - phi)[:, None] * b
    assert torch.equal(sk.identity_mixup(a, b, phi), expected)
    torch.testing.assert_close(sk.identity_mixup(a, b, 0.25), 0.25 * a + 0.75 * b)
    inner = torch.tensor([0.2, 0.3, 0.9], dtype=F64)
    inputs = [t.clone().requires_grad_() for t in (a, b, inner)]
    assert torch.autograd.gradcheck(sk.identity_mixup, inputs)
    assert sk.identity_mixup(a.bfloat16(), b.bfloat16(), 0.5).dtype == BF16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha1": torch.zeros(3)}, ValueError, r"alpha1 must be floating point \(B, D\)"),
        ({"alpha2": torch.zeros(2, 5)}, ValueError, "alpha2 must be like alpha1"),
        ({"alpha2": None}, TypeError, "alpha2 must be a tensor, got NoneType"),
        ({"phi": -0.1}, ValueError, r"phi must be in \[0, 1\], got -0.1"),
        ({"phi": torch.tensor([0.1, 2.0])}, ValueError, "got 2 in row 1"),
        ({"phi": torch.zeros(3)}, ValueError, "phi must be .*B = 2"),
    ],
)
def test_identity_mixup_bad_input(change: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        sk.identity_mixup(**({"alpha1": torch.zeros(2, 4), "alpha2": torch.zeros(2, 4), "phi": 0.5}
                             | change))  # fmt: skip
