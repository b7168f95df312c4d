"""Domain mixup on a GPU, against its definition on the CPU. Run by `make gpu-evidence`."""

import pytest
import torch

import synface_kernels as sk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DEVICE = "cuda"
U8, F32, BF16, F16, F64 = torch.uint8, torch.float32, torch.bfloat16, torch.float16, torch.float64
# Triton compiles a kernel for nearly every combination, so only some are tried.
TYPES = [
    (U8, F32),
    (U8, BF16),
    (U8, F16),
    (U8, F64),
    (F32, F32),
    (BF16, BF16),
    (F16, F16),
    (F64, F32),
]
FACES = (3, 112, 112, 3)
# odd sizes; one channel; many; more than a block in a row
SHAPES = [(2, 7, 5, 3), (2, 9, 33, 1), (1, 2, 2, 300), (1, 1, 3000, 3)]


@pytest.fixture(params=["cuda", "triton"])
def impl(request):
    choice = sk.explain("domain_mixup", device=DEVICE)
    if request.param in choice.rejected:
        pytest.skip(choice.rejected[request.param])
    return request.param


def images(shape, dtype, rng):
    if dtype == U8:
        return torch.randint(0, 256, shape, generator=rng, dtype=U8)
    return torch.rand(shape, generator=rng, dtype=F64).to(dtype)


def there(*tensors):
    return [t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize(
    ("shape", "source", "dtype"),
    [(FACES, *types) for types in TYPES] + [(shape, U8, BF16) for shape in SHAPES],
    ids=str,
)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gives_the_definitions_bits(impl, shape, source, dtype, layout, memory_format):
    b, h, w, c = shape
    rng = torch.Generator().manual_seed(b + h + w + c)
    sized = shape if layout == "NHWC" else (b, c, h, w)
    s, r = images(sized, source, rng), images(sized, source, rng)
    psi = torch.rand(b, generator=rng)
    flip = torch.rand(2, b, generator=rng) < 0.5
    options = {
        "mean": [0.4 + 0.01 * (i % 9) for i in range(c)],
        "std": [0.2 + 0.01 * (i % 7) for i in range(c)],
        "layout": layout,
        "dtype": dtype,
        "memory_format": memory_format,
    }
    expected = sk.domain_mixup(s, r, psi, flip=flip, impl="reference", **options)
    x_s, x_r, share, flags = there(s, r, psi, flip)
    got = sk.domain_mixup(x_s, x_r, share, flip=flags, impl=impl, **options)
    assert torch.equal(got.cpu(), expected)
    assert got.is_contiguous(memory_format=memory_format)
    out = torch.full_like(got, torch.nan)
    sk.domain_mixup(x_s, x_r, share, flip=flags, impl=impl, out=out, **options)
    assert torch.equal(out, got)


def gradients(s, r, psi, flip, gradient, layout, impl):
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in (s, r, psi)]
    out = sk.domain_mixup(*leaves, std=[0.2, 0.3, 0.4], flip=flip, layout=layout, impl=impl)
    out.backward(gradient)
    return [leaf.grad for leaf in leaves]


def gradient_problem(source, layout):
    rng = torch.Generator().manual_seed(0)
    shape = (3, 30, 31, 3) if layout == "NHWC" else (3, 3, 30, 31)
    s, r = images(shape, source, rng), images(shape, source, rng)
    psi = torch.rand(3, generator=rng, dtype=F64)
    flip = torch.tensor([[True, False, True], [False, True, True]])
    return s, r, psi, flip, torch.randn(3, 3, 30, 31, generator=rng)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("source", [U8, F32, BF16, F16, F64])
def test_gradients(impl, source, layout):
    problem = gradient_problem(source, layout)
    expected = gradients(*problem, layout, "reference")
    got = gradients(*there(*problem), layout, impl)
    for mine, theirs in zip(got[:2], expected[:2], strict=True):
        if source == U8:
            assert mine is None
        else:
            assert torch.equal(mine.cpu(), theirs)
    torch.testing.assert_close(got[2].cpu(), expected[2], rtol=1e-12, atol=1e-10)


def test_two_runs_agree_bitwise(impl):
    problem = there(*gradient_problem(F32, "NHWC"))
    first = gradients(*problem, "NHWC", impl)
    for mine, theirs in zip(gradients(*problem, "NHWC", impl), first, strict=True):
        assert torch.equal(mine, theirs)


def test_every_pair_of_bytes(impl):
    """256 × 256 pairs under each of SynFace's 21 ψ."""
    byte = torch.arange(256, dtype=U8)
    s = byte[:, None].expand(256, 256).reshape(1, 256, 256, 1).repeat(21, 1, 1, 1)
    r = byte[None, :].expand(256, 256).reshape(1, 256, 256, 1).repeat(21, 1, 1, 1)
    psi = torch.arange(21, dtype=F64) / 20
    for dtype in (F32, BF16, F16):
        expected = sk.domain_mixup(s, r, psi, dtype=dtype, impl="reference")
        got = sk.domain_mixup(*there(s, r, psi), dtype=dtype, impl=impl)
        assert torch.equal(got.cpu(), expected)


def test_auto_writes_into_out_without_more_memory():
    assert sk.explain("domain_mixup", device=DEVICE).impl in ("cuda", "triton")
    s, r = there(*(torch.zeros(64, 112, 112, 3, dtype=U8) for _ in range(2)))
    out = torch.empty(64, 3, 112, 112, device=DEVICE)
    sk.domain_mixup(s, r, 0.3, out=out)  # the constants are cached
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sk.domain_mixup(s, r, 0.3, out=out)
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


def test_compile_fullgraph():
    s, r = there(*(images((2, 8, 8, 3), U8, torch.Generator().manual_seed(i)) for i in range(2)))
    psi = torch.tensor([0.3, 0.6], device=DEVICE)
    compiled = torch.compile(lambda: sk.domain_mixup(s, r, psi), fullgraph=True)
    assert torch.equal(compiled(), sk.domain_mixup(s, r, psi))
