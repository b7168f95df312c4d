"""The drop-ins for pytorch-metric-learning's losses, beside the originals, in float64."""

import copy
import inspect
import math
import sys
from importlib.metadata import version

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from synface.heads import ArcFaceLoss, CosFaceLoss, SubCenterArcFaceLoss
from torch.nn.functional import normalize

import synface_kernels as sk

N, D, C = 20, 8, 11


class TheirSubCenters(losses.SubCenterArcFaceLoss):
    """PML 2.8's loss, with the reducer, regularizers and other options that it ignores."""

    def __init__(self, *, num_classes, embedding_size, sub_centers=3, margin=28.6, **options):
        size = num_classes * sub_centers, embedding_size
        losses.ArcFaceLoss.__init__(self, *size, margin=margin, **options)
        self.sub_centers, self.num_classes = sub_centers, num_classes


MENDED = tuple(map(int, version("pytorch-metric-learning").split(".")[:2])) >= (2, 9)
PAIRS = [
    (ArcFaceLoss, losses.ArcFaceLoss),
    (CosFaceLoss, losses.CosFaceLoss),
    (SubCenterArcFaceLoss, losses.SubCenterArcFaceLoss if MENDED else TheirSubCenters),
]


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def both(pair, **options):
    """Return our loss and PML's from the same seed."""
    made = []
    for kind in pair:
        torch.manual_seed(5)
        made.append(kind(num_classes=C, embedding_size=D, **options).double())
    return made


def batch(dtype=torch.float64):
    return torch.randn(N, D, dtype=dtype, requires_grad=True), torch.randint(C, (N,))


def assert_equal(ours, theirs, x, labels, *rest, rtol=1e-9):
    one, two = ours(x, labels, *rest), theirs(x, labels, *rest)
    torch.testing.assert_close(one, two, rtol=rtol, atol=1e-11)
    grads = torch.autograd.grad(one, (x, ours.weight))
    expected = torch.autograd.grad(two, (x, theirs.W))
    torch.testing.assert_close(grads[0], expected[0], rtol=1e-7, atol=1e-10)
    as_theirs = grads[1].reshape(-1, D).T
    torch.testing.assert_close(as_theirs, expected[1], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("options", [{}, {"margin": 0.2, "scale": 10}, {"scale": 1.0}])
def test_loss_and_gradients_are_theirs(pair, options):
    ours, theirs = both(pair, **options)
    torch.testing.assert_close(ours.W, theirs.W, rtol=0, atol=0)  # the same seed, the same centers
    for _ in range(3):
        x, labels = batch()
        assert_equal(ours, theirs, x, labels)
    torch.testing.assert_close(ours.get_logits(x), theirs.get_logits(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("margin", [28.6, 90.0, 130.0])
def test_past_pi_is_theirs(margin):
    ours, theirs = both(PAIRS[0], margin=margin, scale=8)
    x, labels = batch()
    with torch.no_grad():  # angles from a few degrees to nearly 180
        own = normalize(theirs.W.T[labels])
        away = torch.linspace(-0.999, 0.999, N, dtype=torch.float64)[:, None]
        x.copy_(away * own + (1 - away**2).sqrt() * normalize(x - (x * own).sum(1)[:, None] * own))
        angles = (normalize(x) * own).sum(1).acos()
    assert (angles + math.radians(margin) > math.pi).any()
    assert_equal(ours, theirs, x, labels)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    "options",
    [
        {"weight_regularizer": regularizers.LpRegularizer(), "weight_reg_weight": 0.3},
        {"embedding_regularizer": regularizers.LpRegularizer(p=1), "embedding_reg_weight": 0.1},
        {"weight_init_func": lambda w: torch.nn.init.uniform_(w, -1, 2)},
        {"reducer": reducers.ThresholdReducer(low=20)},
        {"reducer": reducers.ClassWeightedReducer(torch.linspace(0.1, 2, C))},
        {"distance": distances.CosineSimilarity()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(pair, options):
    ours, theirs = both(pair, **copy.deepcopy(options))
    x, labels = batch()
    # ClassWeightedReducer's weights are float32 in its sum
    assert_equal(ours, theirs, x, labels, rtol=1e-6 if "reducer" in options else 1e-9)


@pytest.mark.parametrize("miner", [miners.MultiSimilarityMiner(), miners.TripletMarginMiner()])
def test_miners_weights(miner):
    ours, theirs = both(PAIRS[0])
    x, labels = batch()
    found = miner(x.detach(), labels)
    assert any(len(part) for part in found)
    assert_equal(ours, theirs, x, labels, found)
    empty = tuple(part[:0] for part in found)
    assert_equal(ours, theirs, x, labels, empty)


def test_do_nothing_reducer():
    ours, theirs = both(PAIRS[1], reducer=reducers.DoNothingReducer())
    x, labels = batch()
    one, two = ours(x, labels)["loss"], theirs(x, labels)["loss"]
    torch.testing.assert_close(one["losses"], two["losses"])
    assert torch.equal(one["indices"], two["indices"])
    assert one["reduction_type"] == two["reduction_type"]


@pytest.mark.parametrize("pair", PAIRS)
def test_their_state_dict_loads(pair):
    _, theirs = both(pair)
    for wrap in (lambda m: m, lambda m: torch.nn.Sequential(m)):
        ours = pair[0](num_classes=C, embedding_size=D).double()
        outer, saved = wrap(ours), wrap(theirs).state_dict()
        outer.load_state_dict(saved)
        assert torch.equal(ours.W, theirs.W)
        assert ours.weight.is_contiguous()
        again = pair[0](num_classes=C, embedding_size=D).double()
        wrap(again).load_state_dict(outer.state_dict())
        assert torch.equal(again.weight, ours.weight)
    small = pair[0](num_classes=C - 1, embedding_size=D)
    with pytest.raises(ValueError, match=r"W must be of shape \(8, \d+\), got \(8, \d+\)"):
        small.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("pair", PAIRS)
def test_our_state_dict_as_theirs(pair):
    ours, theirs = both(pair)
    with torch.no_grad():
        ours.weight.normal_()
    theirs.load_state_dict({"W": ours.W})
    x, labels = batch()
    assert_equal(ours, theirs, x, labels)
    assert torch.equal(theirs.W, ours.W)
    assert theirs.W.data_ptr() != ours.W.data_ptr()


STEPPED = {  # as their users write it, for either loss
    "SGD": lambda loss: torch.optim.SGD([loss.W], 0.5, momentum=0.9, weight_decay=1e-2),
    "AdamW": lambda loss: torch.optim.AdamW([{"params": [loss.W]}], 0.1),
    "foreach": lambda loss: torch.optim.SGD([loss.W], 0.5, momentum=0.9, foreach=True),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("optimizer", STEPPED)
def test_an_optimizer_of_W_and_clipping_by_W(pair, optimizer):
    x, labels = batch()
    results = []
    for loss in both(pair, scale=16):
        steps = STEPPED[optimizer](loss)
        for set_to_none in (True, False, True):
            steps.zero_grad(set_to_none)
            loss(x.detach(), labels).backward()
            before = loss.W.grad.norm()
            norm = torch.nn.utils.clip_grad_norm_([loss.W], 0.05)
            torch.testing.assert_close(norm, before)
            torch.testing.assert_close(loss.W.grad.norm().item(), 0.05, rtol=1e-4, atol=0)
            steps.step()
        results.append((loss.W.detach(), steps.state_dict()["state"][0]))
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("pair", PAIRS)
def test_W_is_written_by_its_data_in_place_and_frozen(pair):
    ours, theirs = both(pair)
    x, labels = batch()
    values = torch.randn_like(theirs.W)
    for loss in (ours, theirs):
        loss.W.data = values.clone()
        with torch.no_grad():
            loss.W.mul_(2)[:, 0] = 1
        torch.nn.init.constant_(loss.W[:2, 1], 3)
    assert_equal(ours, theirs, x, labels)
    assert isinstance(ours.W, torch.nn.Parameter)
    assert torch.equal(copy.deepcopy(ours.W), theirs.W)
    for loss in (ours, theirs):
        loss.W.requires_grad_(False)
        loss(x, labels).backward()
        assert loss.W.grad is None
        loss.W.requires_grad = True
        loss(x, labels).backward()
    torch.testing.assert_close(ours.W.grad, theirs.W.grad)
    penalty = ours.W.square().sum()  # reading it is differentiable
    assert type(penalty) is torch.Tensor
    (grad,) = torch.autograd.grad(penalty, ours.weight)
    torch.testing.assert_close(grad, 2 * ours.weight)


def test_W_is_saved_as_a_parameter(tmp_path):
    ours, _ = both(PAIRS[0])
    torch.save({"W": ours.W}, tmp_path / "centers.pt")
    loaded = torch.load(tmp_path / "centers.pt", weights_only=True)["W"]
    assert type(loaded) is torch.nn.Parameter
    assert torch.equal(loaded, ours.W)


def test_what_W_cannot_be_names_the_weight():
    loss = ArcFaceLoss(C, D)
    with pytest.raises(AttributeError, match=r"W is a view of loss.weight, \(11, 8\)"):
        loss.W = torch.nn.Parameter(torch.zeros(D, C))
    with pytest.raises(ValueError, match=r"W.data must be a tensor of shape \(8, 11\)"):
        loss.W.data = torch.zeros(C, D)
    with pytest.raises(ValueError, match=r"as loss.weight is, got torch.float64.*loss.to"):
        loss.W.data = torch.zeros(D, C, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"register the hook on loss.weight"):
        loss.W.register_hook(print)
    steps = torch.optim.SGD([loss.W], 0.1)
    loss.double()(*batch()).backward()
    with pytest.raises(RuntimeError, match=r"W is stale: its loss moved.*loss.weight"):
        steps.step()


@pytest.mark.parametrize("pair", PAIRS)
def test_scale_and_margin_are_theirs_and_may_be_set(pair):
    ours, theirs = both(pair)
    x, labels = batch()
    assert (ours.scale, ours.num_classes) == (theirs.scale, theirs.num_classes) == (64, C)
    assert ours.margin == pytest.approx(theirs.margin, rel=1e-15)
    for loss in (ours, theirs):
        loss.margin, loss.scale = 0.2, 20
    assert_equal(ours, theirs, x, labels)
    torch.testing.assert_close(ours.get_logits(x), theirs.get_logits(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"m[23] is .* and must be between"):
        ours.margin = 28.6
    with pytest.raises(ValueError, match="scale must be finite and positive"):
        ours.scale = 0
    assert (ours.margin, ours.scale) == (0.2, 20)


def test_distance_and_reducer_are_theirs_and_may_be_set():
    ours, theirs = both(PAIRS[0])
    x, labels = batch()
    assert type(ours.distance) is type(theirs.distance)
    torch.testing.assert_close(ours.distance(x, x), theirs.distance(x, x))
    plain = ours(x, labels)
    assert type(ours.reducer) is type(theirs.reducer)
    torch.testing.assert_close(ours(x, labels), plain)
    for loss in (ours, theirs):
        loss.reducer = reducers.ThresholdReducer(low=20)
    assert_equal(ours, theirs, x, labels)
    ours.reducer = lambda losses, *_: losses["loss"]["losses"].sum()
    torch.testing.assert_close(ours(x, labels), N * plain)
    ours.reducer = None
    torch.testing.assert_close(ours(x, labels), plain, rtol=0, atol=0)
    with pytest.raises(ValueError, match="distance must be CosineSimilarity"):
        ours.distance = distances.LpDistance()


def test_reading_the_defaults_changes_nothing():
    ours, _ = both(PAIRS[0])
    x, labels = batch()
    labels[: N // 2] = -100
    expected, modules = ours(x, labels), list(ours.modules())
    assert type(ours.reducer) is reducers.MeanReducer
    assert type(ours.distance) is distances.CosineSimilarity
    inspect.getmembers(ours)
    assert list(ours.modules()) == modules
    assert torch.equal(ours(x, labels), expected)


def test_an_optimizer_of_W_and_the_weight_is_refused():
    ours, _ = both(PAIRS[0])
    x, labels = batch()
    before = ours.W.detach().clone()
    ours(x, labels).backward()
    for given in (
        [ours.W, *ours.parameters()],
        [{"params": [ours.W]}, {"params": ours.parameters()}],
        [{"params": [ours.W]}, {"params": [ours.W]}],
    ):
        with pytest.raises(RuntimeError, match="step the same centers more than once"):
            torch.optim.SGD(given, 0.1).step()
    with pytest.raises(RuntimeError, match=r"LBFGS flattens.*give it loss.weight"):
        torch.optim.LBFGS([ours.W]).step(lambda: ours(x, labels))
    assert torch.equal(ours.W, before)
    torch.optim.SGD([ours.W, ArcFaceLoss(C, D).W], 0.1).step()
    torch.testing.assert_close(ours.W.detach(), before - 0.1 * ours.W.grad)


def test_W_is_written_by_operators_in_place():
    ours, theirs = both(PAIRS[0])
    before = theirs.W.detach().clone()
    with torch.no_grad():
        ours.W += 1
        ours.W *= 2
    assert torch.equal(ours.W, (before + 1) * 2)
    with pytest.raises(TypeError, match=r"margin must be a number, in radians.*got CombinedMargin"):
        ours.margin = sk.CombinedMargin()


def test_without_their_package_their_defaults_are_named(monkeypatch):
    for module in ("distances", "reducers"):
        monkeypatch.setitem(sys.modules, f"pytorch_metric_learning.{module}", None)
    ours = ArcFaceLoss(C, D)
    assert not hasattr(ours, "reducer")
    inspect.getmembers(ours)
    with pytest.raises(AttributeError, match=r"MeanReducer.*install pytorch-metric-learning"):
        ours.reducer  # noqa: B018
    assert ours(torch.randn(N, D), torch.randint(C, (N,))).isfinite()


@pytest.mark.parametrize("pair", PAIRS)
def test_float64_embeddings_meet_a_default_loss_in_float64(pair):
    made = []
    for kind in pair:
        torch.manual_seed(5)
        made.append(kind(num_classes=C, embedding_size=D))
    ours, theirs = made
    x, labels = batch()
    assert ours(x, labels).dtype == torch.float64
    torch.testing.assert_close(ours(x, labels), theirs(x, labels), rtol=1e-9, atol=1e-11)
    loss = ours(x, labels)
    loss.backward()
    theirs(x.detach(), labels).backward()
    assert ours.weight.dtype == ours.weight.grad.dtype == torch.float32
    torch.testing.assert_close(ours.W.grad.double(), theirs.W.grad, rtol=1e-5, atol=1e-7)


def test_training_with_theirs_and_ours_goes_the_same_way():
    ours, theirs = both(PAIRS[0], scale=16)
    x, labels = batch()
    for loss in (ours, theirs):
        optimizer = torch.optim.SGD(loss.parameters(), lr=1.0, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            loss(x.detach(), labels).backward()
            optimizer.step()
    torch.testing.assert_close(ours.W, theirs.W, rtol=1e-8, atol=1e-10)


def test_outliers():
    ours, theirs = both(PAIRS[2])
    x, labels = batch()
    labels = labels % (C - 1)  # the last class has none
    rows, centers = ours.get_outliers(x, labels)
    expected, dominant = theirs.get_outliers(x, labels)
    assert 0 < len(rows) < N
    assert torch.equal(rows, expected)
    present = labels.unique()
    torch.testing.assert_close(centers[:, present], dominant[:, present])
    assert not centers[:, -1].any()
    rows = ours.get_outliers(x, labels, threshold=110, return_dominant_centers=False)
    assert torch.equal(rows, theirs.get_outliers(x, labels, threshold=110)[0])
    assert torch.equal(ours.get_outliers(x, labels.to(torch.uint8))[0], expected)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 11\)"):
        ours.get_outliers(x, labels + C)
    with pytest.raises(ValueError, match="same N"):
        ours.get_outliers(x, labels[:3])
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 180\], got 200"):
        ours.get_outliers(x, labels, 200)


@pytest.mark.parametrize("pair", PAIRS)
def test_where_theirs_is_not_finite_ours_is(pair):
    ours, theirs = both(pair)
    _, labels = batch()
    x = theirs.W.T.unflatten(0, (C, -1))[labels, 0].detach().clone().requires_grad_()
    if pair[0] is not CosFaceLoss:
        (grad,) = torch.autograd.grad(theirs(x, labels), x)
        assert grad.isnan().any()
    loss = ours(x, labels)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert ours.weight.grad.isfinite().all()


def test_bad_labels_are_errors_and_ignored_rows_do_not_count():
    ours, _ = both(PAIRS[0])
    x, labels = batch()
    for wrong in (-1, C):
        bad = labels.clone()
        bad[3] = wrong
        with pytest.raises(ValueError, match=rf"\[0, {C}\).* got {wrong} "):
            ours(x, bad)
    some = labels.clone()
    some[4:] = -100
    torch.testing.assert_close(ours(x, some), ours(x[:4], labels[:4]))


def test_centers_keep_their_dtype():
    ours = ArcFaceLoss(C, D)
    x, labels = batch(torch.float16)
    loss = ours(x, labels)
    loss.backward()
    assert loss.dtype == ours.weight.dtype == ours.weight.grad.dtype == torch.float32
    assert x.grad.dtype == torch.float16
    assert ours.get_logits(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "labels are required", lambda loss, x, y: loss(x)),
        (ValueError, "ref_emb and ref_labels are not", lambda loss, x, y: loss(x, y, None, x * 2)),
        (ValueError, r"int64 of shape \(N,\), got", lambda loss, x, y: loss(x, y.view(-1, 2))),
        (ValueError, r"with N = 20", lambda loss, x, y: loss(x, y[:3])),
        (ValueError, "target must be int64", lambda loss, x, y: loss(x, y.float())),
        (TypeError, "labels must be a tensor, got list", lambda loss, x, y: loss(x, y.tolist())),
        (ValueError, "must both be float64 or neither", lambda loss, x, y: loss(x.float(), y)),
        (ValueError, "3 .triplets. or 4 .pairs. tensors", lambda loss, x, y: loss(x, y, (y, y))),
        (ValueError, r"integers in \[0, 20\)", lambda loss, x, y: loss(x, y, (y, y, y + N))),
    ],
)  # fmt: skip
def test_bad_input(error, message, call):
    ours, _ = both(PAIRS[0])
    with pytest.raises(error, match=message):
        call(ours, *batch())


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "num_classes must be at least 1, got 0", {"num_classes": 0}),
        (TypeError, "embedding_size must be an integer", {"embedding_size": 8.0}),
        (ValueError, r"margin \(in degrees\) must be in \[-180, 180\], got 1000", {"margin": 1000}),
        (ValueError, "scale must be finite and positive", {"scale": 0}),
        (ValueError, "distance must be CosineSimilarity", {"distance": distances.LpDistance()}),
        (NotImplementedError, "collect_stats is not supported", {"collect_stats": True}),
        (TypeError, "unexpected keyword argument 'marginn'", {"marginn": 1}),
    ],
)
def test_settings_that_make_no_sense(error, message, arguments):
    with pytest.raises(error, match=message):
        ArcFaceLoss(**({"num_classes": C, "embedding_size": D} | arguments))
    with pytest.raises(ValueError, match="sub_centers must be at least 1, got 0"):
        SubCenterArcFaceLoss(C, D, sub_centers=0)
