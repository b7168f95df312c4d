"""A training loop under Accelerate, which prepares the head like any other module.

One process: `python examples/accelerate_loop.py`. Several, each with a copy of all centers:
`torchrun --nproc_per_node 2 examples/accelerate_loop.py`; `--shard` distributes the centers.
"""

import argparse

import torch
from accelerate import Accelerator
from synface.common.distributed import leave
from synface.data import embedded_faces, normalize
from synface.heads import MarginHead, PartialFC
from synface.models.iresnet import IResNet
from torch.utils.data import DataLoader, TensorDataset

import synface_kernels as sk

SIZE, DIM = 32, 64


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    torch.manual_seed(0)
    faces = embedded_faces(images_per_identity=8, size=SIZE, identities=args.identities)
    dataset = TensorDataset(normalize(faces.images), faces.labels)
    backbone = IResNet((SIZE, SIZE), widths=(8, 16, 32), depths=(1, 1, 1), embedding_size=DIM)
    margin = sk.ArcFace(scale=16.0, margin=0.3)
    if args.shard:
        head = PartialFC(margin, DIM, args.identities).to(accelerator.device)
    else:
        head = MarginHead(DIM, args.identities, margin)
    optimizer = torch.optim.SGD(
        [*backbone.parameters(), *head.parameters()], lr=0.05, momentum=0.9, weight_decay=5e-4
    )
    backbone, optimizer, loader = accelerator.prepare(
        backbone, optimizer, DataLoader(dataset, batch_size=32, shuffle=True)
    )
    if not args.shard:
        head = accelerator.prepare(head)
    for epoch in range(1, args.epochs + 1):
        losses = []
        for images, labels in loader:
            optimizer.zero_grad()
            loss, stats = head(backbone(images), labels, return_stats=True)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(backbone.parameters(), 5.0)
            optimizer.step()
            losses.append(torch.stack([loss.detach(), stats.top1.float().mean()]))
        loss, accuracy = accelerator.reduce(torch.stack(losses).mean(0), "mean").tolist()
        accelerator.print(f"epoch {epoch}: loss {loss:.3f}, training accuracy {accuracy:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--identities", type=int, default=50)
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--shard", action="store_true")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=True, mixed_precision=args.mixed_precision)
    train(args, accelerator)
    accelerator.free_memory()
    leave()  # after DDP is freed; end_training alone may deadlock with gloo's threads
    accelerator.end_training()


if __name__ == "__main__":
    main()
