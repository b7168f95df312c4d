"""PartialFC over the ranks of a process group gives what one process gives."""

import pytest
import torch
import torch.distributed as dist
from synface.heads import ArcFaceLoss, PartialFC, ShardedMarginHead
from synface.optim.rows import RowSGD
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import synface_kernels as sk
from tests.helpers.ranks import on_ranks

D, C, IN = 8, 29, 5
SIZES = (7, 0, 12, 3)  # of the ranks' batches
MARGIN = sk.ArcFace(16.0, 0.3)


def centers():
    return torch.randn(C, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def backbone():
    net = torch.nn.Linear(IN, D).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return net


def data(ranks):
    """Return each rank's batch of images and labels."""
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, IN, generator=g, dtype=torch.float64), torch.randint(C, (n,), generator=g))
        for n in SIZES[:ranks]
    ]


def make(rank, rate, **options):
    head = PartialFC(
        MARGIN, D, C, rate, generator=torch.Generator().manual_seed(rank), dtype=torch.float64,
        **options,
    )  # fmt: skip
    with torch.no_grad():
        head.weight.copy_(centers()[head.class_start :][: head.num_local])
    return head


def steps(rank, ranks):
    """Return centers, backbone and losses of two steps at each sampling rate, and errors.

    The backbone is under DDP; the errors are those of invalid input on one rank.
    """
    images, labels = data(ranks)[rank]
    results = []
    for rate in (1.0, 0.5):
        net, head = DistributedDataParallel(backbone()), make(rank, rate)
        optimizers = [
            torch.optim.SGD(net.parameters(), 0.1),
            RowSGD(head.parameters(), 0.1, momentum=0.9),
        ]
        losses = []
        for _ in range(2):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = head(net(images), labels[:, None].int())
            loss.backward()
            losses.append(loss.detach())
            for optimizer in optimizers:
                optimizer.step()
        results += [torch.stack(losses), net.module.weight.detach(), head.weight.detach()]
    return [*results, mistakes(rank)]


def mistakes(rank):
    found = []
    x = torch.randn(4, D, dtype=torch.float64)
    for wrong in (torch.full((4,), C), torch.ones(4), [0, 1, 2, 3], torch.tensor([0, 1])):
        for rate in (1.0, 0.5):
            labels = wrong if rank == 1 else torch.arange(4)
            try:
                make(rank, rate)(x, labels)
            except (ValueError, TypeError) as error:
                found.append(str(error))
    try:
        PartialFC(MARGIN, D, 1)
    except ValueError as error:
        found.append(str(error))
    return found


def one_process(ranks, rate):
    """Take the same steps in one process, on the classes that the ranks sample."""
    batches = data(ranks)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    net, weight = backbone(), centers().requires_grad_()
    generators = [torch.Generator().manual_seed(rank) for rank in range(ranks)]
    bounds = [C // ranks * r + min(r, C % ranks) for r in range(ranks + 1)]
    momentum = torch.zeros_like(weight)
    losses = []
    for _ in range(2):
        ids = torch.arange(C)
        if rate < 1:
            drawn = []
            for start, end, g in zip(bounds, bounds[1:], generators, strict=False):
                here = labels[(labels >= start) & (labels < end)] - start
                size = end - start
                drawn.append(sk.sample_classes(here, size, int(rate * size), g)[0] + start)
            ids = torch.cat(drawn)
            assert len(ids) < C
        weight.grad = None
        net.zero_grad()
        loss = sk.margin_cross_entropy(
            net(images), weight[ids], torch.searchsorted(ids, labels), MARGIN
        )
        loss.backward()
        losses.append(loss.detach())
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad
            momentum = 0.9 * momentum + weight.grad
            # rows that are not touched wait: RowSGD catches them up when they next are
            if rate < 1 and len(losses) == 2:
                rest = torch.ones(C, dtype=torch.bool)
                rest[ids] = False
                momentum[rest] = 0
            weight -= 0.1 * momentum
    return [torch.stack(losses), net.weight.detach(), weight.detach()]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one(ranks, tmp_path):
    results = on_ranks(ranks, steps, tmp_path)
    for at, rate in ((0, 1.0), (3, 0.5)):
        losses, net, weight = one_process(ranks, rate)
        for rank in results:
            torch.testing.assert_close(rank[at], losses, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(rank[at + 1], net, rtol=1e-10, atol=1e-12)
        got = torch.cat([rank[at + 2] for rank in results])
        torch.testing.assert_close(got, weight, rtol=1e-10, atol=1e-12)
    wrong = ("must be in [0, 29)", "target must be int64", "target must be a tensor", "N = 4")
    for rank in results:
        *found, few = rank[-1]
        assert found == results[0][-1][:-1]  # all ranks raise the same
        for at, message in enumerate(found):
            assert wrong[at // 2] in message, found
        assert "num_classes must be at least the number of ranks" in few


def alone(rank, ranks):
    """Train a backbone and a head in one module under DDP, in a process group of one."""
    head = make(0, 0.5)
    assert head.group is None
    module = torch.nn.ModuleDict({"net": backbone(), "head": head})

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = module

        def forward(self, images, labels):
            return self.parts["head"](self.parts["net"](images), labels)

    both = Both()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(both, ["parts.head.weight"])
    wrapped = DistributedDataParallel(both)
    loss = wrapped(*data(1)[0])
    loss.backward()
    assert head.weight.grad.is_sparse
    return loss.detach()


def test_a_group_of_one_is_none(tmp_path):
    (loss,) = on_ranks(1, alone, tmp_path)
    head = make(0, 0.5)
    images, labels = data(1)[0]
    torch.testing.assert_close(loss, head(backbone()(images), labels).detach())


def starts(rank, ranks):
    """Return a sharded head's initial state, and the gradients of a head wrapped in DDP."""
    torch.manual_seed(7)
    head = PartialFC(MARGIN, D, 10, group=dist.group.WORLD)
    whole = DistributedDataParallel(ArcFaceLoss(10, D))
    x, labels = torch.randn(ranks, 6, D), torch.randint(10, (ranks, 6))
    whole(x[rank], labels[rank]).backward()
    together = ArcFaceLoss(10, D)
    together.load_state_dict(whole.module.state_dict())
    together(x.flatten(0, 1), labels.flatten()).backward()
    grads = [each.weight.grad for each in (whole.module, together)]
    return [head.weight.detach(), head.class_start, head.num_local, repr(head), *grads]


def test_how_ranks_start_and_a_head_under_ddp(tmp_path):
    results = on_ranks(3, starts, tmp_path)
    assert [rank[1:3] for rank in results] == [[0, 4], [4, 3], [7, 3]]
    assert "rank 2 of 3" in results[2][3]
    rows = torch.cat([rank[0] for rank in results])
    assert len(rows.unique(dim=0)) == 10  # ranks of one seed do not start alike
    for rank in results:
        torch.testing.assert_close(rank[4], rank[5])


def checkpointed(rank, ranks):
    """Take three fused steps of a sampled and a sharded head, recomputed or not, then restart.

    Return weights, momenta, step counts and the embeddings' gradients.
    """
    images, labels = data(ranks)[rank]
    found = []
    for recompute in (None, False, True):
        heads = [make(rank, 0.5), ShardedMarginHead(D, C, MARGIN, dtype=torch.float64)]
        steps = [RowSGD(head.parameters(), 0.1, momentum=0.9) for head in heads]
        results = []
        for head, optimizer in zip(heads, steps, strict=True):
            head.step_in_backward(optimizer)
            x = backbone()(images).detach().requires_grad_()
            for _ in range(3):
                if recompute is None:
                    loss = head(x, labels)
                else:
                    loss = checkpoint(head, x, labels, use_reentrant=recompute)
                loss.backward()
            state = optimizer.state_dict()["state"][0]
            results += [head.weight.detach().clone(), x.grad, *state.values()]
        found.append(results)
    start = heads[1].weight.detach().clone()
    heads[1].reset_parameters()
    fresh = ShardedMarginHead(D, C, MARGIN, dtype=torch.float64).weight.detach()
    return [*found, torch.equal(heads[1].weight, fresh), torch.equal(start, fresh)]


def test_ranks_recompute_what_they_drew_and_stepped(tmp_path):
    for plain, unsaved, reentrant, restarted, unmoved in on_ranks(2, checkpointed, tmp_path):
        assert all(map(torch.equal, plain, unsaved))
        assert all(map(torch.equal, plain, reentrant))
        assert restarted
        assert not unmoved
