"""Domain and identity mixup on a GPU, against their definitions. Run by `make gpu-evidence`."""

import pytest
import torch

import synface_kernels as sk
from tests.gpu.on_device import (
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    assert_no_host_sync,
    assert_same,
    compiled,
    needs_device,
    normal,
    on_another_device,
    peak_bytes,
    pick,
    replayed,
)

pytestmark = needs_device
U8 = torch.uint8
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
FACES = (3, *pick((112, 112), (11, 12)), 3)
# odd sizes; one channel; many; more than a block in a row
SHAPES = [(2, 7, 5, 3), (2, 9, 33, 1), (1, 2, 2, 300), (1, 1, 3000, 3)]


@pytest.fixture(params=["cuda", "triton"])
def impl(request):
    choice = sk.explain("domain_mixup", device=DEVICE)
    if request.param in choice.rejected:
        pytest.skip(choice.rejected[request.param])
    if request.param == "cuda" and DEVICE == "cpu":
        pytest.skip("needs a GPU")
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
    """256 × 256 pairs under each of SynFace's 21 ψ (in the interpreter every fifth byte)."""
    byte = torch.arange(0, 256, pick(1, 5), dtype=U8)
    n = len(byte)
    s = byte[:, None].expand(n, n).reshape(1, n, n, 1).repeat(21, 1, 1, 1)
    r = byte[None, :].expand(n, n).reshape(1, n, n, 1).repeat(21, 1, 1, 1)
    psi = torch.arange(21, dtype=F64) / 20
    for dtype in (F32, BF16, F16):
        expected = sk.domain_mixup(s, r, psi, dtype=dtype, impl="reference")
        got = sk.domain_mixup(*there(s, r, psi), dtype=dtype, impl=impl)
        assert torch.equal(got.cpu(), expected)


def test_auto_writes_into_out_without_more_memory():
    wanted = pick(("cuda", "triton"), ("cpu",))
    assert sk.explain("domain_mixup", device=DEVICE).impl in wanted
    b, h, w = pick((64, 112, 112), (2, 8, 8))
    s, r = there(*(torch.zeros(b, h, w, 3, dtype=U8) for _ in range(2)))
    out = torch.empty(b, 3, h, w, device=DEVICE)
    sk.domain_mixup(s, r, 0.3, out=out)  # the constants are cached
    assert peak_bytes(lambda: sk.domain_mixup(s, r, 0.3, out=out)) < 1 << 20


def batch(device=DEVICE):
    s, r = (images((2, 8, 8, 3), U8, torch.Generator().manual_seed(i)) for i in range(2))
    return s.to(device), r.to(device), torch.tensor([0.3, 0.6], device=device)


def check_compiled(impl):
    s, r, psi = batch()
    function = compiled(lambda s, r, psi: sk.domain_mixup(s, r, psi, impl=impl))
    assert torch.equal(function(s, r, psi), sk.domain_mixup(s, r, psi, impl=impl))


def test_compile_fullgraph(impl):
    check_compiled(impl)


def test_the_choice_of_an_implementation_is_compiled():
    check_compiled("auto")


def test_a_replayed_step_is_the_eager_one(impl):
    problem = there(*gradient_problem(F32, "NHWC"))
    expected = gradients(*problem, "NHWC", impl)
    assert_same(replayed(lambda: gradients(*problem, "NHWC", impl)), expected)
    s, r, psi = batch()

    def mixed():
        return [sk.domain_mixup(s, r, psi, std=[0.21, 0.31, 0.41], impl=impl)]

    assert_same(replayed(mixed), mixed())


def test_a_step_never_waits_for_the_gpu(impl):
    problem = there(*gradient_problem(F32, "NHWC"))
    assert_no_host_sync(lambda: gradients(*problem, "NHWC", impl))
    s, r, psi = batch()
    assert_no_host_sync(lambda: sk.domain_mixup(s, r, psi, impl=impl))
    assert_no_host_sync(lambda: sk.domain_mixup(s, r, 0.3, impl=impl))


def test_another_device(impl):
    on_another_device(lambda device: [sk.domain_mixup(*batch(device), impl=impl)])


@pytest.mark.parametrize("share", ["numbers", 0.3])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_identity_mixup(dtype, share):
    first, second = (normal(5, 512, seed=i, dtype=dtype).requires_grad_() for i in (1, 2))
    phi = torch.rand(5, device=DEVICE) if share == "numbers" else share

    def step():
        mixed = sk.identity_mixup(first, second, phi)
        return [mixed.detach(), *torch.autograd.grad(mixed.sum(), (first, second))]

    exact = phi.double()[:, None] if share == "numbers" else share
    expected = exact * first.double() + (1 - exact) * second.double()
    got, *grads = step()
    assert got.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    assert_same(step(), [got, *grads])
    assert_same(replayed(step), [got, *grads])
    assert_no_host_sync(step)
