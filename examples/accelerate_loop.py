"""A loop under Accelerate: the head is one more module to prepare.

One process: `python examples/accelerate_loop.py`. Several, each with a copy of all centres:
`torchrun --nproc_per_node 2 examples/accelerate_loop.py`.
"""

import argparse

import torch
from accelerate import Accelerator
from synface.backbone import IResNet
from synface.data import embedded_faces, normalise
from synface.heads import MarginHead
from torch.utils.data import DataLoader, TensorDataset

import synface_kernels as sk

SIZE, DIM = 32, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--identities", type=int, default=50)
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    args = parser.parse_args()
    torch.manual_seed(0)

    faces = embedded_faces(images_per_identity=8, size=SIZE, identities=args.identities)
    dataset = TensorDataset(normalise(faces.images), faces.labels)
    backbone = IResNet((SIZE, SIZE), widths=(8, 16, 32), depths=(1, 1, 1), embedding_size=DIM)
    head = MarginHead(DIM, args.identities, sk.ArcFace(scale=16.0, margin=0.3))
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)

    accelerator = Accelerator(cpu=True, mixed_precision=args.mixed_precision)
    backbone, head, optimizer, loader = accelerator.prepare(
        backbone, head, optimizer, DataLoader(dataset, batch_size=32, shuffle=True)
    )
    for epoch in range(1, args.epochs + 1):
        losses = []
        for images, labels in loader:
            loss, stats = head(backbone(images), labels, return_stats=True)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            losses.append(torch.stack([loss.detach(), stats.top1.float().mean()]))
        loss, accuracy = accelerator.reduce(torch.stack(losses).mean(0), "mean").tolist()
        accelerator.print(f"epoch {epoch}: loss {loss:.3f}, training accuracy {accuracy:.0%}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
