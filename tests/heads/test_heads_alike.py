"""All heads treat labels, initialization on the meta device and the default device alike."""

import pytest
import torch
import torch.distributed as dist
from synface.heads import (
    AdaFace,
    ArcFaceLoss,
    CosFaceLoss,
    MagFace,
    MarginHead,
    PartialFC,
    ShardedMarginHead,
    SubCenterArcFaceLoss,
)
from synface.optim.centers import Centers, CentersConfig
from synface.optim.rows import RowAdamW, RowSGD

import synface_kernels as sk

N, D, C = 9, 8, 12

HEADS = {
    "MarginHead": lambda **o: MarginHead(D, C, init_std=0.3, **o),
    "MarginHead, sub-centers": lambda **o: MarginHead(D, C, sub_centers=2, **o),
    "AdaFace": lambda **o: AdaFace(D, C, **o),
    "MagFace": lambda **o: MagFace(D, C, l_a=1.0, **o),
    "PartialFC": lambda **o: PartialFC(sk.ArcFace(), D, C, 0.7, **o),
    "ShardedMarginHead": lambda **o: ShardedMarginHead(D, C, seed=3, init_std=0.3, **o),
    "ArcFaceLoss": lambda **o: ArcFaceLoss(C, D, **o),
    "CosFaceLoss": lambda **o: CosFaceLoss(
        C, D, weight_init_func=torch.nn.init.xavier_normal_, **o
    ),
    "SubCenterArcFaceLoss": lambda **o: SubCenterArcFaceLoss(C, D, **o),
}
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint64)


@pytest.fixture(autouse=True, scope="module")
def _group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made(name, seed=0, **options):
    torch.manual_seed(seed)
    return HEADS[name](**options)


def loss_of(head, x, labels, **options):
    torch.manual_seed(1)  # draws a partial head's classes
    return head(x, labels, **options)


@pytest.mark.parametrize("name", HEADS)
def test_labels_of_any_integer_dtype_and_as_a_column(name):
    head, x, labels = made(name).eval(), torch.randn(N, D), torch.randint(0, C, (N,))
    expected = loss_of(head, x, labels)
    for dtype in INTEGERS:
        assert torch.equal(loss_of(head, x, labels.to(dtype)), expected)
        assert torch.equal(loss_of(head, x, labels.to(dtype)[:, None]), expected)
    for wrong in (labels.float(), labels > 3):
        with pytest.raises(ValueError, match="target must be int64"):
            head(x, wrong)
    with pytest.raises(ValueError, match=r"target must be in \[0, .* got 250"):
        head(x, (labels * 0 + 250).to(torch.uint8))


@pytest.mark.parametrize("name", ["MarginHead", "AdaFace", "MagFace", "PartialFC"])
def test_a_column_with_weights_is_a_label_a_row(name):
    head, x, labels = made(name).eval(), torch.randn(N, D), torch.randint(0, C, (N,))
    column = labels.to(torch.int32)[:, None]
    loss, stats = loss_of(head, x, column, target_weight=torch.ones(N, 1), return_stats=True)
    torch.testing.assert_close(loss, loss_of(head, x, labels))
    assert stats.target_cosine.shape == (N, 1)
    _, stats = loss_of(head, x, column, return_stats=True)
    assert stats.target_cosine.shape == (N,)


def test_centers_in_files_take_the_heads_labels():
    centers, x, labels = Centers.create(CentersConfig(C, D)), torch.randn(N, D), torch.arange(N)
    expected = centers.loss(x, labels, num_sampled=C)
    for given in (labels.to(torch.int32), labels[:, None]):
        assert torch.equal(centers.loss(x, given, num_sampled=C), expected)


@pytest.mark.parametrize("name", HEADS)
def test_made_on_meta_and_then_initialized(name):
    expected = made(name).state_dict()
    ways = (lambda: made(name, device="meta"), lambda: made_within(torch.device("meta"), name))
    for way in ways[name.endswith("Loss") :]:  # those have no argument for it
        head = way()
        assert all(value.is_meta for value in head.state_dict().values())
        head.to_empty(device="cpu")
        with torch.no_grad():
            for value in head.state_dict().values():
                value.fill_(float("nan"))
        torch.manual_seed(0)
        head.reset_parameters()
        assert head.state_dict().keys() == expected.keys()
        for key, value in head.state_dict().items():
            assert torch.equal(value, expected[key]), key
            assert value.dtype == expected[key].dtype


def made_within(device, name):
    with device:
        return made(name)


def test_adafaces_statistics_begin_anew_with_its_centers():
    head = made("AdaFace")
    head(torch.randn(N, D), torch.randint(0, C, (N,)))
    assert head.norm_mean != 20
    head.reset_parameters()
    assert (head.norm_mean, head.norm_std) == (20, 100)


OPTIMIZED = [
    (name, optimizer)
    for name in (*HEADS, "random rounding")
    for optimizer in (RowSGD, RowAdamW, "fused")
    if not (name.endswith("Loss") and optimizer == "fused")  # those have no step_in_backward
]


@pytest.mark.parametrize(("name", "optimizer"), OPTIMIZED)
def test_what_has_a_device_ignores_the_default_one(name, optimizer):
    """The meta device stands for CUDA: a tensor on the default device fails beside CPU tensors."""
    low = {"dtype": torch.bfloat16} if name == "random rounding" else {}
    name = name if name in HEADS else "PartialFC"
    head = made(name, **low)
    x, labels = torch.randn(N, D, requires_grad=True), torch.randint(0, C, (N,))
    kind = RowSGD if optimizer == "fused" else optimizer
    options = {"momentum": 0.9} if kind is RowSGD else {}
    for impl in ("cpu", "reference") if name != "ShardedMarginHead" else ("cpu",):
        head.impl = "auto" if impl == "cpu" else impl
        results = []
        start = {key: value.clone() for key, value in head.state_dict().items()}
        for device in ("cpu", "meta"):
            head.load_state_dict(start)
            torch.set_default_device(device)
            try:
                steps = kind(head.parameters(), 0.1, seed=3, impl=impl, **options)
                if optimizer == "fused":
                    head.step_in_backward(steps)
                for _ in range(2):
                    steps.zero_grad()
                    generator = torch.Generator("cpu").manual_seed(0)
                    if name == "PartialFC":
                        head.generator = generator
                    head(x, labels).backward()
                    steps.step()
                state = steps.state_dict()
                state["state"][0]["step"] = int(state["state"][0]["step"])
                steps = kind(head.parameters(), 0.1, seed=3, impl=impl, **options)
                steps.load_state_dict(state)
                steps.catch_up()
            finally:
                torch.set_default_device(None)
            assert steps.state[head.weight]["step"].device.type == "cpu"
            results.append(head.weight.detach().clone())
            x.grad = None
        assert not torch.equal(results[0], start["weight"])
        assert torch.equal(*results)
