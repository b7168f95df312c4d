"""pytorch-metric-learning's trainer, with ArcFaceLoss imported from synface.heads.

One process: `python examples/metric_learning_trainer.py`. Several, each with a copy of all centers:
`torchrun --nproc_per_node 2 examples/metric_learning_trainer.py`.
"""

import argparse

import torch
from pytorch_metric_learning.trainers import MetricLossOnly
from synface.common.distributed import Rank, joined
from synface.data import embedded_faces, normalize
from synface.heads import ArcFaceLoss
from synface.models.iresnet import IResNet
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler, TensorDataset

SIZE, DIM = 32, 64


def train(args: argparse.Namespace, rank: Rank) -> None:
    torch.manual_seed(0)
    faces = embedded_faces(images_per_identity=8, size=SIZE, identities=args.identities)
    dataset = TensorDataset(normalize(faces.images), faces.labels)
    trunk: torch.nn.Module = IResNet(
        (SIZE, SIZE), widths=(8, 16, 32), depths=(1, 1, 1), embedding_size=DIM
    )
    loss: torch.nn.Module = ArcFaceLoss(args.identities, DIM, margin=17.2, scale=16)  # degrees
    sampler = None
    if rank.ranks > 1:
        trunk, loss = DistributedDataParallel(trunk), DistributedDataParallel(loss)
        sampler = DistributedSampler(dataset)
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    losses: list[float] = []

    def end_of_iteration(trainer: MetricLossOnly) -> None:
        losses.append(trainer.losses["metric_loss"].item())

    def end_of_epoch(trainer: MetricLossOnly) -> None:
        if rank.leads:
            print(f"epoch {trainer.epoch}: loss {sum(losses) / len(losses):.3f}")
        if sampler:
            sampler.set_epoch(trainer.epoch)
        losses.clear()

    trainer = MetricLossOnly(
        models={"trunk": trunk},
        optimizers={
            "trunk_optimizer": torch.optim.SGD(trunk.parameters(), **options),
            "metric_loss_optimizer": torch.optim.SGD(loss.parameters(), **options),
        },
        batch_size=32 // rank.ranks,
        loss_funcs={"metric_loss": loss},
        dataset=dataset,
        sampler=sampler,
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
        end_of_iteration_hook=end_of_iteration,
        end_of_epoch_hook=end_of_epoch,
    )
    trainer.train(num_epochs=args.epochs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--identities", type=int, default=50)
    args = parser.parse_args()
    with joined("cpu") as rank:
        train(args, rank)


if __name__ == "__main__":
    main()
