"""Heads under activation checkpointing give the bits of a run without it, or an error."""

import copy
import pickle
from functools import partial

import pytest
import torch
from synface.heads import AdaFace, ArcFaceLoss, MagFace, MarginHead, PartialFC
from synface.optim.rows import RowAdamW, RowSGD
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import synface_kernels as sk

N, D, C = 12, 8, 60


def sampled(generator=True, **options):
    drawn = torch.Generator().manual_seed(1) if generator else None
    return PartialFC(sk.ArcFace(), D, C, 0.3, generator=drawn, **options)


HEADS = {
    "margin": lambda: MarginHead(D, C),
    "adaface": lambda: AdaFace(D, C, momentum=0.3),
    "magface": lambda: MagFace(D, C, l_a=1.0),
    "sampled": sampled,
    "sampled, dense": partial(sampled, sparse=False),
    "sampled, torch's generator": partial(sampled, generator=False),
    "metric learning": lambda: ArcFaceLoss(C, D),
}
OPTIMIZERS = {
    "sgd": lambda p: RowSGD(p, 0.1, momentum=0.9, weight_decay=1e-2, seed=3),
    "adamw": lambda p: RowAdamW(p, 1e-2, seed=3),
}
plain = lambda function, *inputs: function(*inputs)  # noqa: E731
reentrant = partial(checkpoint, use_reentrant=True)
unsaved = partial(checkpoint, use_reentrant=False)


def to_the_end(function, *inputs):
    with set_checkpoint_early_stop(False):
        return unsaved(function, *inputs)


WAYS = {
    "without hooks": reentrant,
    "with hooks": unsaved,
    "no early stop": to_the_end,
    "nested": lambda function, *inputs: unsaved(partial(unsaved, function), *inputs),
    "nested, reentrant inside": lambda f, *inputs: unsaved(partial(reentrant, f), *inputs),
    "nested, reentrant outside": lambda f, *inputs: reentrant(partial(unsaved, f), *inputs),
}


def train(name, run, optimizer="sgd", fused=False):
    """Return five steps' losses, gradients, weights, statistics and optimizer states."""
    torch.manual_seed(0)
    head, net = HEADS[name](), torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Dropout(0.3))
    steps = OPTIMIZERS[optimizer](head.parameters())
    if fused:
        head.step_in_backward(steps)
    found = []
    for step in range(5):
        torch.manual_seed(step)
        x, labels = torch.randn(N, D, requires_grad=True), torch.randint(0, C, (N,))
        loss = run(lambda x, labels: head(net(x), labels), x, labels)
        after = torch.rand(())  # the generator stands where it stood without checkpointing
        steps.zero_grad()
        net.zero_grad()
        loss.backward()
        steps.step()
        found += [loss.detach(), after, x.grad, *(p.grad for p in net.parameters())]
    states = steps.state_dict()["state"][0]
    return [*found, *head.state_dict().values(), *states.values()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", HEADS)
def test_a_checkpointed_head_trains_with_the_same_bits(name, way):
    expected, found = train(name, plain), train(name, WAYS[way])
    assert len(expected) == len(found)
    assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["margin", "adaface", "sampled"])
def test_a_checkpointed_fused_head_takes_one_step_a_batch(name, optimizer, way):
    expected = train(name, plain, optimizer, fused=True)
    found = train(name, WAYS[way], optimizer, fused=True)
    assert all(map(torch.equal, expected, found))


def test_torchs_generator_need_not_be_preserved():
    run = partial(unsaved, preserve_rng_state=False)
    head = sampled(generator=False)
    results = []
    for way in (plain, run):
        torch.manual_seed(0)
        x, labels = torch.randn(N, D, requires_grad=True), torch.randint(0, C, (N,))
        way(head, x, labels).backward()
        results.append(x.grad)
    assert torch.equal(*results)


@pytest.mark.parametrize("run", [reentrant, unsaved])
@pytest.mark.parametrize("name", ["adaface", "sampled"])
def test_two_forward_passes_before_a_backward_pass_are_an_error(name, run):
    head = HEADS[name]()
    labels = torch.randint(0, C, (N,))
    first, second = (torch.randn(N, D, requires_grad=True) for _ in range(2))
    loss = run(head, first, labels) + run(head, second, labels)
    with pytest.raises(RuntimeError, match=r"recomputed.*outside of torch.utils.checkpoint"):
        loss.backward()


def test_an_evaluation_between_the_passes_changes_nothing():
    heads = [HEADS["adaface"]() for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    x, labels = torch.randn(N, D, requires_grad=True), torch.randint(0, C, (N,))
    grads = []
    for head, run in zip(heads, (plain, unsaved), strict=True):
        loss = run(head.train(), x, labels)
        head.eval()(x * 2, labels)
        head.train()
        grads += torch.autograd.grad(loss, x)
    assert torch.equal(*grads)


def test_what_a_pass_settled_is_neither_copied_nor_pickled():
    head = HEADS["sampled"]()
    steps = OPTIMIZERS["sgd"](head.parameters())
    head.step_in_backward(steps)
    head(torch.randn(N, D), torch.randint(0, C, (N,)))
    assert set(head._last) == {"update", "sampled classes"}
    head.generator = None  # torch's generators cannot be pickled
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert other._last == {}


@pytest.mark.parametrize("run", [reentrant, unsaved])
@pytest.mark.slow
def test_a_compiled_head_is_recomputed_with_the_same_bits_or_not_at_all(run):
    torch.compiler.reset()
    x, labels = torch.randn(N, D, requires_grad=True), torch.randint(0, C, (N,))
    head = HEADS["adaface"]()
    loss = run(torch.compile(head, backend="aot_eager"), x, labels)
    mean = head.norm_mean.clone()
    with pytest.raises(RuntimeError, match="a compiled head would count this batch a second time"):
        loss.backward()
    assert torch.equal(head.norm_mean, mean)
    head = HEADS["sampled"]()
    loss = run(torch.compile(head, backend="aot_eager"), x, labels)
    state = head.generator.get_state()
    loss.backward()
    assert torch.equal(head.generator.get_state(), state)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_checkpoint_inside_a_compiled_function_is_not_counted_twice(backend):
    torch.compiler.reset()
    x, labels = torch.randn(N, D, requires_grad=True), torch.randint(0, C, (N,))
    head = HEADS["adaface"]()
    loss = torch.compile(lambda x: unsaved(head, x, labels), backend=backend)(x)
    with pytest.raises(RuntimeError, match=r"second time.*outside of the checkpointed function"):
        loss.backward()


@pytest.mark.parametrize("name", ["margin", "sampled"])
@pytest.mark.slow
def test_a_compiled_fused_head_takes_one_step_in_a_checkpoint(name):
    results = []
    for run in (plain, unsaved):
        torch.compiler.reset()
        torch.manual_seed(0)
        head = HEADS[name]()
        steps = OPTIMIZERS["sgd"](head.parameters())
        head.step_in_backward(steps)
        call = torch.compile(head, backend="aot_eager")
        for _ in range(2):
            x, labels = torch.randn(N, D, requires_grad=True), torch.randint(0, C, (N,))
            run(call, x, labels).backward()
        results.append(head.weight.clone())
        assert steps.state[head.weight]["step"] == 2
    assert torch.equal(*results)


@pytest.mark.parametrize("run", [reentrant, unsaved])
@pytest.mark.parametrize("name", ["adaface", "sampled"])
@pytest.mark.parametrize("between", [False, True])
def test_the_same_batch_twice_before_a_backward_pass_is_an_error(name, run, between):
    head = HEADS[name]()
    x, labels = torch.randn(N, D, requires_grad=True), torch.randint(0, C, (N,))
    first = run(head, x, labels)
    if between:
        run(head, 2 * x, labels)
    loss = first + run(head, x, labels)
    with pytest.raises(RuntimeError, match="two forward passes of the same batch"):
        loss.backward()


@pytest.mark.parametrize("run", [reentrant, unsaved])
@pytest.mark.parametrize("name", ["adaface", "sampled"])
def test_the_same_batch_at_each_step_is_none(name, run):
    results = []
    for way in (plain, run):
        torch.manual_seed(0)
        head = HEADS[name]()
        x, labels = torch.randn(N, D, requires_grad=True), torch.randint(0, C, (N,))
        for _ in range(3):
            loss = way(head, x, labels)
            loss.backward(retain_graph=way is plain)
        plain(head, x, labels).backward()
        results.append(x.grad)
    assert torch.equal(*results)


@pytest.mark.parametrize("change", [lambda x: x.flip(0), lambda x: x.flip(1)])
def test_the_order_of_a_batch_tells_it_apart(change):
    head, labels = HEADS["adaface"](), torch.zeros(N, dtype=torch.int64)
    x = torch.randn(N, D, requires_grad=True)
    loss = unsaved(head, x, labels)
    unsaved(head, change(x.detach()), labels)
    with pytest.raises(RuntimeError, match="for another batch than that of its last forward pass"):
        loss.backward()


def test_a_partial_heads_evaluation_between_the_passes_changes_nothing():
    results = []
    for run in (plain, unsaved):
        torch.manual_seed(0)
        head, labels = sampled(), torch.arange(N)
        x = torch.randn(N, D, requires_grad=True)
        loss = run(head, x, labels)
        with torch.no_grad():
            head.eval()(2 * x, labels)
        head.train()
        results.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*results)


def test_a_partial_head_in_evaluation_mode_is_recomputed_with_the_same_classes():
    results = []
    for run in (plain, unsaved):
        torch.manual_seed(0)
        head, x = sampled().eval(), torch.randn(N, D, requires_grad=True)
        results += torch.autograd.grad(run(head, x, torch.arange(N)), x)
    assert torch.equal(*results)


def test_a_recomputation_that_differs_names_its_causes():
    head, labels = HEADS["adaface"](), torch.arange(N)
    x = torch.randn(N, D, requires_grad=True)
    noisy = lambda x: head(torch.nn.functional.dropout(x), labels)  # noqa: E731
    loss = unsaved(noisy, x, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match=r"dropout and preserve_rng_state=False, or a hook"):
        loss.backward()


def test_passes_are_compared_on_the_device(monkeypatch):
    """No comparison synchronizes a GPU with Python."""
    head, labels = HEADS["adaface"](), torch.arange(N)
    x = torch.randn(N, D, requires_grad=True)
    loss = unsaved(head, x, labels)
    asserted, check = [], torch._assert_async
    monkeypatch.setattr(torch, "_assert_async", lambda *a: (asserted.append(a), check(*a)))
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("torch.equal waits"))
    loss.backward()
    assert [bool(condition) for condition, _ in asserted] == [True]


def test_ordinary_passes_compute_no_fingerprint(monkeypatch):
    monkeypatch.setattr("synface.heads.fused._fingerprint", lambda *_: pytest.fail("computed"))
    train("adaface", plain)
    train("sampled", plain, fused=True)


def test_pickles_without_what_came_later_load():
    head = HEADS["adaface"]()
    del head._last
    again = pickle.loads(pickle.dumps(head))
    assert again(torch.randn(N, D), torch.arange(N)).isfinite()
    loss = HEADS["metric learning"]()
    state = {k: v for k, v in loss.__dict__.items() if k != "_margin"}
    older = type(loss).__new__(type(loss))
    older.__setstate__(state | {"margin": sk.ArcFace(16.0, 0.3), "reducer": None, "distance": None})
    assert (older.scale, older.margin) == (16, 0.3)
    x, labels = torch.randn(N, D), torch.arange(N)
    torch.testing.assert_close(
        older(x, labels), sk.margin_cross_entropy(x, older.weight, labels, sk.ArcFace(16.0, 0.3))
    )
