"""Row optimizers against torch's dense optimizers."""

import io
import math

import pytest
import torch
from synface.optim.rows import RowAdamW, RowSGD

import synface_kernels as sk

C, D, STEPS = 40, 6, 12

DENSE = {
    "sgd": (RowSGD, torch.optim.SGD, {"lr": 0.1}),
    "momentum": (RowSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
    "nesterov": (
        RowSGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True},
    ),
    "adamw": (RowAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def parameter(dtype=torch.float64, shape=(C, D)):
    return torch.nn.Parameter(torch.randn(shape, generator=generator(0), dtype=dtype))


def gradient(step, dtype=torch.float64, shape=(C, D)):
    """Return a sparse gradient of some rows, uncoalesced: some rows occur twice."""
    rows = torch.randint(shape[0], (8,), generator=generator(1000 + step))
    values = torch.randn(len(rows), *shape[1:], generator=generator(step), dtype=dtype)
    return torch.sparse_coo_tensor(rows[None], values, shape, check_invariants=True)


def run(optimizer, weight, steps=range(STEPS)):
    for step in steps:
        weight.grad = gradient(step, weight.dtype, weight.shape)
        optimizer.step()


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("shape", [(C, D), (C, 3, D)])
def test_sparse_steps_are_a_dense_optimizers_steps(name, shape):
    ours, theirs, settings = DENSE[name]
    weight, expected = parameter(shape=shape), parameter(shape=shape)
    optimizer, dense = ours([weight], **settings), theirs([expected], **settings)
    for step in range(STEPS):
        weight.grad = gradient(step, shape=shape)
        expected.grad = gradient(step, shape=shape).to_dense()
        optimizer.step()
        dense.step()
    optimizer.catch_up()
    torch.testing.assert_close(weight, expected, rtol=1e-10, atol=1e-12)
    before = weight.clone()
    optimizer.catch_up()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", DENSE)
def test_dense_gradients_are_all_rows(name):
    ours, theirs, settings = DENSE[name]
    weight, expected = parameter(), parameter()
    optimizer, dense = ours([weight], **settings), theirs([expected], **settings)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(each, STEPS) for each in (optimizer, dense)
    ]
    for step in range(STEPS):
        weight.grad = gradient(step).to_dense()
        expected.grad = weight.grad.clone()
        for each in (optimizer, dense, *schedules):
            each.step()
    torch.testing.assert_close(weight, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", DENSE)
def test_without_catch_up_other_rows_stay(name):
    ours, _, settings = DENSE[name]
    weight = parameter()
    optimizer = ours([weight], **settings, catch_up=False)
    run(optimizer, weight, range(3))
    before = weight.detach().clone()
    weight.grad = gradient(3)
    optimizer.step()
    optimizer.catch_up()
    touched = torch.zeros(C, dtype=torch.bool)
    touched[weight.grad.coalesce().indices()[0]] = True
    assert ((weight == before).all(1) == ~touched).all()
    assert "last_step" not in optimizer.state[weight]


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_bfloat16_resumes_bitwise_the_same(name, state_dtype):
    ours, _, settings = DENSE[name]
    settings = settings | {"seed": 7, "state_dtype": state_dtype}
    whole, part = parameter(torch.bfloat16), parameter(torch.bfloat16)
    run(ours([whole], **settings), whole)
    first = ours([part], **settings)
    run(first, part, range(5))
    state = saved(first)
    resumed = parameter(torch.bfloat16)
    resumed.data.copy_(part.data)
    optimizer = ours([resumed], **settings)
    optimizer.load_state_dict(state)
    for key, value in first.state[part].items():
        assert optimizer.state[resumed][key].dtype == value.dtype
        assert torch.equal(optimizer.state[resumed][key], value)
    run(first, part, range(5, STEPS))  # the one that was saved shares nothing with the other
    run(optimizer, resumed, range(5, STEPS))
    assert torch.equal(resumed, whole)
    assert torch.equal(part, whole)


def test_rounding_at_random_has_a_seed_for_each_parameter():
    def steps(seed, copies=1):
        weights = [parameter(torch.bfloat16) for _ in range(copies)]
        optimizer = RowSGD(weights, 1e-3, seed=seed)
        for step in range(STEPS):
            for weight in weights:
                weight.grad = gradient(step, torch.bfloat16)
            optimizer.step()
        return weights

    (one,), (two,), (other,) = steps(1), steps(1), steps(2)
    first, second = steps(1, 2)
    nearest = steps(None)[0]
    assert torch.equal(one, two)
    assert torch.equal(one, first)
    assert len({w.detach().float().numpy().tobytes() for w in (one, other, second, nearest)}) == 4


def test_random_rounding_keeps_what_rounding_to_nearest_loses():
    moved = []
    for seed in (None, 3):
        weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = RowSGD([weight], 1e-4, seed=seed)
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved.append(1 - weight.double().mean().item())
    assert moved[0] == 0
    # 4096 weights, 100 steps of 1e-4, spacing 2^-8 below one
    assert moved[1] == pytest.approx(1e-2, rel=0.1)


def test_several_groups_and_parameters_without_gradient():
    weights = [parameter(), parameter(), parameter()]
    optimizer = RowSGD(
        [{"params": weights[:1], "lr": 0.5}, {"params": weights[1:]}], lr=0.1, momentum=0.9
    )
    for weight in weights[:2]:
        weight.grad = gradient(0)
    optimizer.step()
    optimizer.catch_up()
    start = parameter()
    torch.testing.assert_close(weights[0] - start, 5 * (weights[1] - start))
    assert torch.equal(weights[2], start)
    assert weights[2] not in optimizer.state
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # adds initial_lr to the groups
    other = RowSGD([{"params": weights[:1]}, {"params": weights[1:]}])  # without momentum
    other.load_state_dict(saved(optimizer))
    assert "momentum_buffer" in other.state[weights[0]]
    assert other.param_groups[0]["lr"] == 0.5
    assert other.param_groups[1]["momentum"] == 0.9


def test_the_closure_is_called_with_gradients_on():
    weight = parameter()
    optimizer = RowAdamW([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, r"have rows, .* got float32 \(3,\)", lambda: RowSGD([torch.zeros(3)])),
        (ValueError, "contiguous", lambda: RowSGD([torch.zeros(3, 4).T])),
        (ValueError, "needs a seed", lambda: RowAdamW([parameter()], state_dtype=torch.bfloat16)),
        (ValueError, "state_dtype must be", lambda: RowSGD([parameter()], state_dtype=torch.int8)),
        (ValueError, "seed must be at least 0, got -1", lambda: RowSGD([parameter()], seed=-1)),
        (TypeError, "seed must be an integer", lambda: RowSGD([parameter()], seed=0.5)),
        (ValueError, "float64, .* got float16", lambda: RowSGD([parameter(torch.float16)])),
        (ValueError, "lr must be finite and ≥ 0, got -1", lambda: RowSGD([parameter()], -1)),
        (ValueError, "lr must be .* got nan", lambda: RowAdamW([parameter()], math.nan)),
        (TypeError, "lr must be a number, got NoneType", lambda: RowSGD([parameter()], None)),
        (ValueError, "momentum must be .* got -1", lambda: RowSGD([parameter()], momentum=-1)),
        (TypeError, "momentum must be .* got str", lambda: RowSGD([parameter()], momentum="a")),
        (ValueError, "nesterov needs momentum", lambda: RowSGD([parameter()], nesterov=True)),
        (TypeError, "nesterov must be a bool", lambda: RowSGD([parameter()], nesterov=1)),
        (TypeError, "catch_up must be a bool", lambda: RowSGD([parameter()], catch_up=3)),
        (ValueError, "betas must be in", lambda: RowAdamW([parameter()], betas=(1.0, 0.9))),
        (ValueError, "eps must be .* got -1", lambda: RowAdamW([parameter()], eps=-1)),
        (ValueError, "impl must be one of .*'foo'", lambda: RowSGD([parameter()], impl="foo")),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(error, message, make):
    with pytest.raises(error, match=message):
        make()


def test_a_group_with_settings_that_make_no_sense_is_not_added():
    optimizer = RowAdamW([parameter()], lr=torch.tensor(0.1), impl="triton")  # moves to a GPU later
    for wrong, message in (
        ({"lr": -1}, "lr must be"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"state_dtype": torch.bfloat16}, "needs a seed"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [parameter()]} | wrong)
    assert len(optimizer.param_groups) == 1


def test_gradients_and_rates_that_do_not_fit():
    weight = parameter()
    before = weight.detach().clone()
    optimizer = RowSGD([weight])
    optimizer.param_groups[0]["lr"] = -1.0
    weight.grad = gradient(0)
    with pytest.raises(ValueError, match=r"lr must be finite and ≥ 0, got -1.0"):
        optimizer.step()
    weight.grad = torch.ones(C, D, dtype=torch.float64).to_sparse()
    with pytest.raises(ValueError, match="sparse along its first dimension alone"):
        RowSGD([weight]).step()
    assert torch.equal(weight, before)
    optimizer.catch_up()  # no step was taken: nothing to catch up with
    assert torch.equal(weight, before)


def test_states_of_others_are_refused_and_nothing_is_loaded():
    weight = parameter()
    optimizer = RowSGD([weight], momentum=0.9)
    run(optimizer, weight, range(2))
    state = {name: value.clone() for name, value in optimizer.state[weight].items()}

    def refused(message, state_dict):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state_dict)
        for name, value in state.items():
            assert torch.equal(optimizer.state[weight][name], value)

    adamw = RowAdamW([weight])
    run(adamw, weight, range(1))
    refused("another optimizer: its groups lack .*momentum", adamw.state_dict())
    theirs = torch.optim.SGD([weight], momentum=0.9)
    refused("another optimizer: its groups lack .*catch_up", theirs.state_dict())
    changed = optimizer.state_dict()
    changed["state"] = {0: {"step": torch.tensor(1)}}
    refused("must hold .*momentum_buffer.*, got .*step", changed)
    small = parameter(shape=(C - 1, D))
    other = RowSGD([small], momentum=0.9)
    run(other, small, range(1))
    refused(r"last_step must be int64 \(40,\).* got int64 \(39,\)", other.state_dict())
    refused("different number of parameter groups", {"state": {}, "param_groups": []})
    two = RowSGD([weight, small], momentum=0.9)
    refused("doesn't match the size", two.state_dict())


def test_a_gradient_of_one_pass_is_not_looked_at(monkeypatch):
    """A look at its indices would wait for a GPU; the sum of two passes is coalesced."""
    weight, expected = parameter(torch.float32), parameter(torch.float32)
    ours, dense = RowSGD([weight], lr=0.1), torch.optim.SGD([expected], lr=0.1)
    x, target = torch.randn(4, D, generator=generator(1)), torch.arange(4)
    for count in (1, 2, 1):
        for optimizer in (ours, dense):
            optimizer.zero_grad()
        for start in range(count):
            ids = torch.arange(start, C, 3)
            sk.margin_cross_entropy(x, weight, target, class_ids=ids).backward()
            sk.margin_cross_entropy(x, expected[ids], target).backward()
        with monkeypatch.context() as patch:
            if count == 1:
                assert weight.grad.is_coalesced()
                patch.setattr(torch.Tensor, "diff", None)
                patch.setattr(torch.Tensor, "coalesce", None)
            ours.step()
        dense.step()
    ours.catch_up()
    torch.testing.assert_close(weight, expected)


def test_a_gradient_that_a_hook_replaced_is_looked_at():
    weight, expected = parameter(torch.float32), parameter(torch.float32)
    ours, dense = RowSGD([weight], lr=0.1), torch.optim.SGD([expected], lr=0.1)

    def twice(grad):
        rows, values = torch.cat([grad._indices()] * 2, 1), torch.cat([grad._values()] * 2)
        return torch.sparse_coo_tensor(rows, values, grad.shape, check_invariants=True)

    weight.register_hook(twice)
    ids = torch.arange(0, C, 3)
    x, target = torch.randn(4, D, generator=generator(1)), torch.arange(4)
    sk.margin_cross_entropy(x, weight, target, class_ids=ids).backward()
    (2 * sk.margin_cross_entropy(x, expected[ids], target)).backward()
    ours.step()
    dense.step()
    torch.testing.assert_close(weight, expected)


def test_optimizers_of_one_weight_share_its_hooks():
    weight = parameter(torch.float32)
    for _ in range(3):
        RowSGD([weight])
    assert len(weight._backward_hooks) == len(weight._post_accumulate_grad_hooks) == 1
