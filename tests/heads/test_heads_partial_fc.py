"""The drop-in for insightface's PartialFC_V2 against insightface's formulas."""

import math
import sys
import time
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from synface import checkpoint
from synface.heads import AdaFace, MarginHead, PartialFC
from synface.optim.centers import Centers, CentersConfig
from synface.optim.rows import RowAdamW, RowSGD
from torch.nn.functional import cross_entropy, normalize

import synface_kernels as sk
from tests.helpers.forked import finished, forked

N, D, C = 20, 8, 30


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def combined(s, m1, m2, m3, threshold=0):
    """Return an object with the attributes of insightface's CombinedMarginLoss."""
    return SimpleNamespace(s=s, m1=m1, m2=m2, m3=m3, interclass_filtering_threshold=threshold)


def batch(dtype=torch.float64, n=N):
    return torch.randn(n, D, dtype=dtype, requires_grad=True), torch.randint(C, (n,))


def insightface(x, weight, labels, margin):
    """Return insightface's mean loss (since 2022).

    For the gradient, a margin changes the target's cosine by a constant; a filtered negative has
    the constant cosine 0.
    """
    cosine = (normalize(x) @ normalize(weight).T).clamp(-1, 1)
    positive = torch.zeros_like(cosine, dtype=torch.bool).scatter(1, labels[:, None], True)
    if margin.interclass_filtering_threshold > 0:
        dirty = (cosine > margin.interclass_filtering_threshold) & ~positive
        cosine = torch.where(dirty, 0, cosine)
    if margin.m1 == 1 and margin.m3 == 0:
        shift = ((cosine.detach().acos() + margin.m2).cos() - cosine.detach()) * positive
    else:
        assert margin.m3 > 0
        shift = -margin.m3 * positive.to(cosine.dtype)
    return cross_entropy(margin.s * (cosine + shift), labels)


def exact(x, weight, labels, margin):
    """Return the mean loss of s·(cos(m1·θ + m2) − m3) below π, with its true gradient."""
    cosine = normalize(x) @ normalize(weight).T
    own = cosine.gather(1, labels[:, None])
    own = (margin.m1 * own.acos() + margin.m2).cos() - margin.m3
    return cross_entropy(margin.s * cosine.scatter(1, labels[:, None], own), labels)


def assert_equal(head, x, labels, expected):
    """Assert that a head and a function of (x, weight) have the same loss and gradients."""
    weight = head.weight.detach().clone().requires_grad_()
    loss, other = head(x, labels), expected(x, weight)
    torch.testing.assert_close(loss, other, rtol=1e-10, atol=1e-12)
    ours = torch.autograd.grad(loss, (x, head.weight))
    theirs = torch.autograd.grad(other, (x, weight))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.to_dense(), two, rtol=1e-8, atol=1e-10)


MARGINS = [(64.0, 1.0, 0.5, 0.0), (30.0, 1.0, 0.0, 0.4), (64, 1.0, 0.3, 0.2), (16.0, 1, 0, 0)]


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.01])
@pytest.mark.parametrize("numbers", MARGINS)
def test_insightfaces_convention(numbers, rate):
    margin = combined(*numbers)
    generator = torch.Generator().manual_seed(1)
    head = PartialFC(
        margin, D, C, rate, convention="insightface", generator=generator, dtype=torch.float64
    )
    x, labels = batch()
    same = torch.Generator().manual_seed(1)
    ids, indices = torch.arange(C), labels
    if rate < 1:
        ids, indices = sk.sample_classes(labels, C, max(1, int(rate * C)), same)
    assert_equal(head, x, labels, lambda x, w: insightface(x, w[ids], indices, margin))


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("numbers", MARGINS[:2])
def test_insightfaces_filter(numbers, rate):
    """Insightface sets filtered negatives' cosines to 0; by our convention they are left out."""
    margin = combined(*numbers, threshold=0.3)
    x, labels = batch()
    weight = torch.randn(C, D, dtype=torch.float64)
    ids, indices = torch.arange(C), labels
    if rate < 1:
        same = torch.Generator().manual_seed(1)
        ids, indices = sk.sample_classes(labels, C, int(rate * C), same)
    cosine = normalize(x) @ normalize(weight[ids]).T

    def head(convention):
        generator = torch.Generator().manual_seed(1)
        made = PartialFC(
            margin, D, C, rate, convention=convention, generator=generator, dtype=torch.float64
        )
        made.load_state_dict({"weight": weight})
        return made

    zero, drop = head("insightface"), head("synface")
    assert_equal(zero, x, labels, lambda x, w: insightface(x, w[ids], indices, margin))
    rows = drop(x, labels, reduction="none")
    for i, index in enumerate(indices.tolist()):
        keep = cosine[i] <= 0.3
        keep[index] = True
        assert not keep.all()
        left = weight[ids[keep]]
        own = keep[:index].sum()[None]
        alone = sk.margin_cross_entropy(x[i : i + 1], left, own, sk.CombinedMargin(*numbers))
        torch.testing.assert_close(rows[i], alone)


def test_thresholds_that_filter_nothing():
    for threshold in (0, -1, 1, 2.5):
        margin = PartialFC(combined(64, 1, 0.5, 0, threshold), D, C).margin
        assert margin.interclass_filter is None


@pytest.mark.parametrize(
    "numbers", [(16.0, 1.0, 0.2, 0.0), (16.0, 1.0, 0.2, 0.1), (16.0, 0.9, 0, 0)]
)
def test_our_convention_is_the_true_margin(numbers):
    margin = combined(*numbers)
    x, labels = batch()
    head = PartialFC(margin, D, C, dtype=torch.float64)
    with torch.no_grad():  # keep θ + m below π
        head.weight[labels] += 0.02 * x
    assert_equal(head, x, labels, lambda x, w: exact(x, w, labels, margin))


def test_margins_by_their_attributes():
    def margin(loss, **options):
        return PartialFC(loss, D, C, **options).margin

    for loss, numbers in (
        (combined(64, 1, 0.5, 0), (64, 1, 0.5, 0)),
        (combined(64, 1, 0.3, 0.2), (64, 1, 0.3, 0.2)),
        (SimpleNamespace(s=30.0, margin=0.4), (30, 1, 0.4, 0)),
        (SimpleNamespace(s=30.0, m=0.4), (30, 1, 0, 0.4)),
    ):
        ours = margin(loss)
        assert (ours.scale, ours.m1, ours.m2, ours.m3) == numbers
        assert ours.target_grad == "exact"
        assert ours.beyond_pi == "linear"
    theirs = margin(combined(64, 1, 0.5, 0), convention="insightface")
    assert (theirs.target_grad, theirs.beyond_pi) == ("straight_through", "none")
    silent = margin(combined(64, 1, 0.3, 0.2), convention="insightface")
    assert (silent.m2, silent.m3) == (0, 0.2)
    own = sk.ArcFace(32, 0.4)
    assert margin(own) is own


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_any_batch_without_a_process_group(rate):
    head = PartialFC(sk.ArcFace(), D, C, rate)
    for n in (N, 7, 1, 33):  # insightface asserts that batches are of one size
        x, labels = batch(torch.float32, n)
        loss = head(x, labels[:, None].int())
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()
    assert head(x[:0], labels[:0]) == 0
    some = labels.clone()
    some[3:] = -100
    loss, stats = head(x, some, return_stats=True)
    assert loss.isfinite()
    assert stats.top1.shape == (33,)
    rows = head(x, labels, reduction="none")
    assert rows.shape == (33,)


def test_mixed_labels_sample_all_their_classes():
    head = PartialFC(sk.ArcFace(), D, C, 0.01, dtype=torch.float64)
    x, labels = batch()
    pairs = torch.stack([labels, labels.flip(0)], 1)
    shares = torch.full((N, 2), 0.5, dtype=torch.float64)
    ids = labels.unique()
    indices = torch.searchsorted(ids, pairs)
    expected = sk.margin_cross_entropy(x, head.weight[ids], indices, target_weight=shares)
    torch.testing.assert_close(head(x, pairs, target_weight=shares), expected)


def test_an_ignored_class_is_no_index_of_another():
    head, centers = PartialFC(sk.ArcFace(), D, C, 0.01), Centers.create(CentersConfig(C, D))
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    x, labels = torch.randn(6, D), torch.tensor([11, 12, 3, 14, 15, 3])  # 15 becomes index 3
    ids = torch.tensor([11, 12, 14, 15])
    indices = torch.searchsorted(ids, labels).masked_fill(labels == 3, -100)
    options = {"ignore_index": 3, "reduction": "none"}
    for weight, losses in (
        (head.weight, head(x, labels, **options)),
        (head.weight, compiled(x, labels, **options)),
        (centers.weight, centers.loss(x, labels, num_sampled=1, **options)),
    ):
        expected = sk.margin_cross_entropy(x, weight[ids], indices, reduction="none")
        assert (losses == 0).tolist() == (labels == 3).tolist()
        torch.testing.assert_close(losses, expected)
    with pytest.raises(ValueError, match="got -100 at 0"):
        head(x, labels.masked_fill(labels == 11, -100), **options)


def test_a_sampled_steps_gradient_has_the_sampled_rows_alone():
    x, labels = batch(torch.float32)
    head = PartialFC(sk.ArcFace(), D, C, 0.7)
    dense = PartialFC(sk.ArcFace(), D, C, 0.7, sparse=False)
    dense.load_state_dict(head.state_dict())
    for each in (head, dense):
        torch.manual_seed(3)
        each(x, labels).backward()
    grad = head.weight.grad.coalesce()
    assert head.weight.grad.is_sparse
    assert grad.indices().shape == (1, 21)
    assert not dense.weight.grad.is_sparse
    assert torch.equal(grad.to_dense(), dense.weight.grad)
    whole = PartialFC(sk.ArcFace(), D, C)
    whole(x, labels).backward()
    assert not whole.weight.grad.is_sparse


OPTIMIZERS = {
    "SGD": (lambda p: torch.optim.SGD(p, 0.05), True),
    "SGD with momentum": (lambda p: torch.optim.SGD(p, 0.02, momentum=0.9), True),
    "SparseAdam": (lambda p: torch.optim.SparseAdam(p, 0.01), True),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, 0.05), True),
    "RowSGD": (lambda p: RowSGD(p, 0.02, 0.9, weight_decay=1e-3), True),
    "RowAdamW": (lambda p: RowAdamW(p, 0.01), True),
    "SGD with decay, dense": (lambda p: torch.optim.SGD(p, 0.02, 0.9, weight_decay=1e-3), False),
    "AdamW, dense": (lambda p: torch.optim.AdamW(p, 0.01), False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name):
    make, sparse = OPTIMIZERS[name]
    head = PartialFC(sk.ArcFace(16, 0.2), D, C, 0.8, sparse=sparse)
    optimizer = make(head.parameters())
    x, labels = (t.detach() for t in batch(torch.float32))

    def closure():
        torch.manual_seed(0)
        optimizer.zero_grad()
        loss = head(x, labels)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(25)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_rows_loss_is_not_clamped_as_theirs():
    """Insightface reports −log max(p, 1e-30) ≤ 69.0776, with the gradient of −log p."""
    head = PartialFC(combined(64, 1, 0.5, 0), D, C, convention="insightface").double()
    labels = torch.arange(4)
    x = -head.weight.detach()[labels]
    with torch.no_grad():
        x[:, 0] += 1e-3
    x.requires_grad_()
    expected = insightface(x, head.weight, labels, combined(64, 1, 0.5, 0))
    loss = head(x, labels)
    torch.testing.assert_close(loss, expected)
    theirs = -(-loss.detach()).exp().clamp_min(1e-30).log()
    assert theirs == pytest.approx(69.0776, abs=1e-4)
    assert loss > 90
    torch.testing.assert_close(
        torch.autograd.grad(loss, x), torch.autograd.grad(expected, x), rtol=1e-7, atol=1e-9
    )


REFUSING = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4),  # insightface's
    "Adagrad": lambda p: torch.optim.Adagrad(p, weight_decay=5e-4),
    "SGD with fused": lambda p: torch.optim.SGD(p, 0.1, fused=True),
    "Adagrad with fused": lambda p: torch.optim.Adagrad(p, fused=True),
    **{
        name: getattr(torch.optim, name)
        for name in ("Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop")
    },
}


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("name", REFUSING)
def test_optimizers_that_refuse_sparse_gradients_say_what_to_do(name, with_closure):
    head = PartialFC(combined(64, 1, 0.5, 0), D, C, 0.3)
    optimizer = REFUSING[name](head.parameters())
    before = head.weight.detach().clone()
    x, labels = (t.detach() for t in batch(torch.float32))

    def closure():
        optimizer.zero_grad()
        loss = head(x, labels)
        loss.backward()
        return loss

    def step():
        if not with_closure:
            closure()
        optimizer.step(*[closure] * with_closure)

    message = rf"{name}.* of PartialFC.*sparse=False .*synface.optim.RowSGD or RowAdamW"
    with pytest.raises(RuntimeError, match=message):
        step()
    assert torch.equal(head.weight, before)
    head.sparse = False
    step()
    assert not torch.equal(head.weight, before)


def test_optimizers_of_others_sparse_gradients_are_left_alone():
    head = PartialFC(sk.ArcFace(), D, C, 0.3)
    head(*batch(torch.float32)).backward()
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        torch.optim.AdamW(embedding.parameters()).step()


@pytest.mark.parametrize("kind", [MarginHead, AdaFace])
def test_other_heads_sampled_classes_have_dense_gradients_too(kind):
    x, target = torch.randn(4, D), torch.tensor([0, 1, 2, 1])
    ids = torch.tensor([3, 5, 20])
    grads = []
    for sparse in (True, False):
        torch.manual_seed(1)
        head = kind(D, C, sparse=sparse)
        head(x, target, class_ids=ids).backward()
        assert head.weight.grad.is_sparse == sparse
        grads.append(head.weight.grad.to_dense() if sparse else head.weight.grad)
    assert torch.equal(*grads)
    assert grads[0][ids].any(1).all()


def test_their_state_dict_loads():
    head = PartialFC(sk.ArcFace(), D, C)
    assert set(head.state_dict()) == {"weight"}
    head.load_state_dict({"weight": torch.ones(C, D)})
    assert (head.weight == 1).all()


def test_initial_centers_are_theirs():
    torch.manual_seed(4)
    head = PartialFC(sk.ArcFace(), D, C)
    torch.manual_seed(4)
    assert torch.equal(head.weight, torch.normal(0, 0.01, (C, D)))


def test_fp16_changes_nothing():
    x, labels = batch(torch.float16)
    torch.manual_seed(0)
    head = PartialFC(sk.ArcFace(), D, C, 1.0, True)
    loss = head(x, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, sk.margin_cross_entropy(x, head.weight, labels))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "num_classes must be at least 1", {"num_classes": 0}),
        (TypeError, "embedding_size must be an integer", {"embedding_size": "8"}),
        (ValueError, r"sample_rate must be in \(0, 1\], got 1.5", {"sample_rate": 1.5}),
        (ValueError, r"sample_rate must be in \(0, 1\], got -0.1", {"sample_rate": -0.1}),
        (ValueError, r"sample_rate must be in \(0, 1\], got 0", {"sample_rate": 0}),
        (ValueError, "convention must be", {"convention": "theirs"}),
        (TypeError, "margin_loss must be .* s and m .*got function", {"margin_loss": exact}),
        (ValueError, "an angle in radians", {"margin_loss": combined(64, 1, 28.6, 0)}),
        (ValueError, "loss.m3 must be finite", {"margin_loss": combined(64, 1, 0, math.nan)}),
        (TypeError, "margin_loss.s must be a number", {"margin_loss": combined("64", 1, 0, 0)}),
        (
            ValueError,
            "insightface has no margin for m1 = 1.35",
            {"margin_loss": combined(64, 1.35, 0, 0), "convention": "insightface"},
        ),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(error, message, change):
    arguments = {"margin_loss": sk.ArcFace(), "embedding_size": D, "num_classes": C}
    with pytest.raises(error, match=message):
        PartialFC(**(arguments | change))


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_bad_input(rate):
    head = PartialFC(sk.ArcFace(), D, C, rate)
    x, labels = batch(torch.float32)
    for wrong in (-1, C):
        bad = labels.clone()
        bad[3] = wrong
        with pytest.raises(ValueError, match=rf"target must be in \[0, {C}\).* got {wrong} "):
            head(x, bad)
    with pytest.raises(TypeError, match="target must be a tensor, got list"):
        head(x, labels.tolist())
    with pytest.raises(ValueError, match=r"target must be int64 .*got float32 \(20,\)"):
        head(x, labels.float())
    with pytest.raises(ValueError, match="N = 20"):
        head(x, labels[:3])
    with pytest.raises(ValueError, match="same D"):
        head(x[:, :3], labels)


# ---- the same bits again -------------------------------------------------------------------------


class Run:
    def __init__(self):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(16, 16)
        self.head = PartialFC(sk.ArcFace(), 16, 300, 0.2, dtype=torch.bfloat16)
        self.optimizers = [
            torch.optim.SGD(self.model.parameters(), 0.1, 0.9),
            RowSGD(self.head.parameters(), 0.1, 0.9, weight_decay=1e-3, seed=1),
        ]

    def step(self, step):
        torch.manual_seed(step)
        x, labels = torch.randn(24, 16), torch.randint(300, (24,))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.head(self.model(x), labels).backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def tensors(self):
        found = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        found["centers"] = self.head.weight.detach()
        for i, optimizer in enumerate(self.optimizers):
            for parameter, state in optimizer.state_dict()["state"].items():
                found |= {f"{i}.{parameter}.{k}": v for k, v in state.items()}
        return found

    def restore(self, tensors):
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.head.load_state_dict({"weight": tensors["centers"]})
        for i, optimizer in enumerate(self.optimizers):
            states = {}
            for key, value in tensors.items():
                if key.startswith(f"{i}."):
                    _, parameter, name = key.split(".")
                    states.setdefault(int(parameter), {})[name] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


def train_until_killed(folder):
    """Train, with a checkpoint after each step."""
    torch.set_num_threads(1)  # so small a model waits for threads
    run = Run()
    for step in count():
        run.step(step)
        checkpoint.save(folder, step + 1, run.tensors(), {"config": {}, "data": {}})


def resume_and_compare(folder):
    """Resume from the last checkpoint, and compare with training that never stopped."""
    torch.set_num_threads(1)
    tensors, state = checkpoint.load(checkpoint.find(folder))
    last = max(50, state["step"] + 5)
    resumed, whole = Run(), Run()
    resumed.restore(tensors)
    for step in range(state["step"], last):
        resumed.step(step)
    for step in range(last):
        whole.step(step)
    one, two = resumed.tensors(), whole.tensors()
    assert one.keys() == two.keys()
    assert one["centers"].dtype == torch.bfloat16
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        assert torch.equal(one[name], two[name]), name


def test_fifty_steps_twice_give_the_same_centers():
    one, two = Run(), Run()
    start = one.head.weight.detach().clone()
    for run in (one, two):
        for step in range(50):
            run.step(step)
    assert torch.equal(one.head.weight, two.head.weight)
    assert not torch.equal(one.head.weight, start)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.slow
def test_kill_9_and_resume_give_the_same_centers(tmp_path):
    folder, shown = tmp_path / "run", tmp_path / "shown"
    with forked(shown, train_until_killed, folder) as child:
        deadline = time.monotonic() + 120
        while not (found := checkpoint.checkpoints(folder)) or int(found[-1].name[5:]) < 10:
            assert child.is_alive(), shown.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        child.kill()
        child.join()
    code, text = finished(shown, resume_and_compare, folder)
    assert code == 0, text


def test_a_dense_gradient_under_torch_func():
    """Dense gradients under torch.func are plain torch's, also for a stack of heads by vmap."""
    x, labels = torch.randn(6, D), torch.arange(6)
    weights = torch.randn(2, C, D)
    classes = torch.arange(C - 2)
    found = []
    for sparse in (False, True):
        head = MarginHead(D, C, sparse=sparse)

        def loss(weight, head=head):
            return torch.func.functional_call(
                head, {"weight": weight}, (x, labels), {"class_ids": classes}
            )

        for weight in weights:
            weight = weight.clone().requires_grad_()
            found.append(torch.func.grad(loss)(weight))
        if not sparse:
            found.append(torch.func.vmap(torch.func.grad(loss))(weights.clone().requires_grad_()))
    expected = weights.clone().requires_grad_()
    for weight in expected:
        sk.margin_cross_entropy(x, weight[classes], labels, sk.ArcFace()).backward()
    for got in (torch.stack(found[:2]), found[2], torch.stack(found[3:])):
        torch.testing.assert_close(got.to_dense(), expected.grad)
