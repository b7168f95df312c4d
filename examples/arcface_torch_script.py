"""The calls of insightface's arcface_torch training script, in its order, on gloo and the CPU.

In that script one import changes:

    from synface.heads import PartialFC as PartialFC_V2  # was: from partial_fc_v2 import …

One process: `python examples/arcface_torch_script.py`. Two: `torchrun --nproc_per_node 2 …`.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from synface.common.distributed import leave
from synface.data import embedded_faces, normalize
from synface.heads import PartialFC as PartialFC_V2
from synface.models.iresnet import IResNet
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

SIZE, DIM = 32, 64


@dataclass
class CombinedMarginLoss:
    """The parameters of insightface's class of this name; the script keeps that class."""

    s: float
    m1: float
    m2: float
    m3: float
    interclass_filtering_threshold: float = 0


def train(args: argparse.Namespace) -> list[float]:
    """Train in an initialized process group; return the mean loss of each epoch that was run."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same on all ranks
    faces = embedded_faces(images_per_identity=8, size=SIZE, identities=args.identities)
    dataset = TensorDataset(normalize(faces.images), faces.labels)
    sampler = DistributedSampler(dataset, ranks, rank)
    loader = DataLoader(dataset, 32 // ranks, sampler=sampler)

    network = IResNet((SIZE, SIZE), widths=(8, 16, 32), depths=(1, 1, 1), embedding_size=DIM)
    backbone = DistributedDataParallel(
        network, broadcast_buffers=False, bucket_cap_mb=16, find_unused_parameters=True
    )
    backbone.train()
    backbone._set_static_graph()

    margin_loss = CombinedMarginLoss(16, 1.0, 0.3, 0.0)
    module_partial_fc = PartialFC_V2(margin_loss, DIM, args.identities, args.sample_rate, args.fp16)
    if args.sample_rate < 1:  # as in insightface: all rows take decay and momentum
        module_partial_fc.sparse = False
    module_partial_fc.train()
    opt = torch.optim.SGD(
        [{"params": backbone.parameters()}, {"params": module_partial_fc.parameters()}],
        lr=0.05, momentum=0.9, weight_decay=5e-4,
    )  # fmt: skip
    lr_scheduler = torch.optim.lr_scheduler.PolynomialLR(opt, 10 * len(loader), power=2)

    path = Path(args.output or ".") / f"checkpoint_gpu_{rank}.pt"
    start = 0
    if args.resume:
        checkpoint = torch.load(path, weights_only=True)
        start = checkpoint["epoch"]
        backbone.module.load_state_dict(checkpoint["state_dict_backbone"])
        module_partial_fc.load_state_dict(checkpoint["state_dict_softmax_fc"])
        opt.load_state_dict(checkpoint["state_optimizer"])
        lr_scheduler.load_state_dict(checkpoint["state_lr_scheduler"])

    amp = torch.amp.GradScaler("cpu", growth_interval=100, enabled=args.fp16)
    means = []
    for epoch in range(start, args.epochs):
        sampler.set_epoch(epoch)
        total = 0.0
        for images, local_labels in loader:
            with torch.autocast("cpu", torch.float16, enabled=args.fp16):
                local_embeddings = backbone(images)
            loss = module_partial_fc(local_embeddings, local_labels)
            amp.scale(loss).backward()  # without fp16: loss.backward()
            amp.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
            amp.step(opt)  # without fp16: opt.step()
            amp.update()
            opt.zero_grad()
            lr_scheduler.step()
            total += loss.item()
        means.append(total / len(loader))
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {means[-1]:.3f}")
        if args.output:
            checkpoint = {
                "epoch": epoch + 1,
                "state_dict_backbone": backbone.module.state_dict(),
                "state_dict_softmax_fc": module_partial_fc.state_dict(),
                "state_optimizer": opt.state_dict(),
                "state_lr_scheduler": lr_scheduler.state_dict(),
            }
            torch.save(checkpoint, path)
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--identities", type=int, default=50)
    parser.add_argument("--sample-rate", type=float, default=1.0)
    parser.add_argument("--fp16", action="store_true")
    parser.add_argument("--output", type=Path, help="Folder of the checkpoints.")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    if "WORLD_SIZE" in os.environ:  # torchrun
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    train(args)
    leave()  # dist.destroy_process_group(), once all references to the group are freed


if __name__ == "__main__":
    main()
