"""The margin softmax on a GPU, against its definition in float64. Run by `make gpu-evidence`."""

import pytest
import torch

import synface_kernels as sk
from synface_kernels.testing import assert_as_exact_as_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
COMBINED = sk.CombinedMargin(64.0, 0.9, 0.4, 0.15)


def run(x, w, target, t, upstream, dtype, impl):
    x, w = (v.to("cuda", dtype).requires_grad_() for v in (x, w))
    target, t, upstream = (None if v is None else v.to("cuda") for v in (target, t, upstream))
    loss = sk.margin_cross_entropy(
        x, w, target, COMBINED, target_weight=t, reduction="none", impl=impl
    )
    return loss.detach(), *torch.autograd.grad(loss, (x, w), upstream.to(loss.dtype))


def problem(n, c, d, k, dtype):
    g = torch.Generator().manual_seed(n + c + d + k)
    x = torch.randn(n, d, generator=g).to(dtype).double()
    w = torch.randn(c, d, generator=g).to(dtype).double()
    target = torch.randint(0, c, (n, k), generator=g)
    t = torch.rand(n, k, generator=g, dtype=torch.float64).softmax(1) if k > 1 else None
    return x, w, target if k > 1 else target[:, 0], t, torch.rand(n, generator=g).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("d", [8, 129, 512])
@pytest.mark.parametrize("c", [1, 1000, 70_001])
def test_matches_float64(c, d, k, dtype):
    for n in (1, 64, 300):
        case = problem(n, c, d, k, dtype)
        exact = run(*case, torch.float64, "reference")
        plain = run(*case, dtype, "reference")
        actual = run(*case, dtype, "triton")
        ulp = torch.finfo(torch.float32).eps * COMBINED.scale
        atol = [2 * ulp] + [4 * ulp / v.norm(dim=1).min().item() for v in case[:2]]
        for name, *results, tol in zip(
            ("loss", "grad_input", "grad_weight"), actual, exact, plain, atol, strict=True
        ):
            assert_as_exact_as_torch(*results, atol=tol, name=f"{name}, N={n}")


def test_forward_without_gradients_agrees():
    x, w, target, _, _ = (
        v.cuda() if v is not None else v for v in problem(64, 5000, 512, 1, torch.float32)
    )
    x, w = x.float(), w.float()
    fused = sk.margin_cross_entropy(x, w, target, reduction="none")
    tiled = sk.margin_cross_entropy(x.requires_grad_(), w, target, reduction="none")
    torch.testing.assert_close(fused, tiled, rtol=1e-5, atol=1e-4)


def test_two_runs_agree_bitwise():
    case = problem(256, 40_000, 256, 2, torch.bfloat16)
    first = run(*case, torch.bfloat16, "triton")
    for a, b in zip(run(*case, torch.bfloat16, "triton"), first, strict=True):
        assert torch.equal(a, b)


def test_auto_takes_triton_and_peak_memory_is_the_gradients_and_128_mib():
    assert sk.explain(sk.margin_cross_entropy, device="cuda").impl == "triton"
    n, c, d = 2048, 200_000, 256  # N×C in float32 would be 1.5 GiB
    x = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(c, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, c, (n,), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sk.margin_cross_entropy(x, w, target).backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= (n + c) * d * 2 + (128 << 20)


def test_compile_fullgraph():
    x, w, target, _, _ = (
        v.cuda() if v is not None else v for v in problem(32, 500, 64, 1, torch.float32)
    )
    x, w = x.float().requires_grad_(), w.float().requires_grad_()
    compiled = torch.compile(lambda: sk.margin_cross_entropy(x, w, target), fullgraph=True)
    torch.testing.assert_close(compiled(), sk.margin_cross_entropy(x, w, target))
