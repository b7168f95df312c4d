"""A plain torch loop that calls the ops: mixed faces, sampled classes, steps on sampled rows."""

import argparse

import torch
from synface.data import embedded_faces
from synface.models.iresnet import IResNet
from synface.optim.rows import RowSGD
from torch.utils.data import DataLoader, TensorDataset

import synface_kernels as sk

SIZE, DIM = 32, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--identities", type=int, default=50)
    parser.add_argument("--sample-rate", type=float, default=0.8)
    args = parser.parse_args()
    torch.manual_seed(0)

    faces = embedded_faces(images_per_identity=8, size=SIZE, identities=args.identities)
    loader = DataLoader(TensorDataset(faces.images, faces.labels), batch_size=32, shuffle=True)

    backbone = IResNet((SIZE, SIZE), widths=(8, 16, 32), depths=(1, 1, 1), embedding_size=DIM)
    centers = torch.nn.Parameter(0.01 * torch.randn(args.identities, DIM))
    optimizers = [
        torch.optim.SGD(backbone.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4),
        RowSGD([centers], lr=0.05, momentum=0.9, weight_decay=5e-4),
    ]
    margin = sk.ArcFace(scale=16.0, margin=0.3)
    num_sampled = max(1, int(args.sample_rate * args.identities))

    for epoch in range(1, args.epochs + 1):
        total = 0.0
        for images, labels in loader:  # (B, 32, 32, 1) uint8
            share = torch.distributions.Beta(0.2, 0.2).sample((len(images),))
            mixed = sk.domain_mixup(images, images.flip(0), share)  # (B, 1, 32, 32), normalized
            targets = torch.stack([labels, labels.flip(0)], dim=1)
            weights = torch.stack([share, 1 - share], dim=1)
            class_ids, targets = sk.sample_classes(targets, args.identities, num_sampled)
            loss = sk.margin_cross_entropy(
                backbone(mixed), centers, targets, margin,
                target_weight=weights, class_ids=class_ids,
            )  # fmt: skip
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item()
        print(f"epoch {epoch}: loss {total / len(loader):.3f}")


if __name__ == "__main__":
    main()
