"""Lightning on one or several devices, over which the classes are sharded."""

import argparse
from typing import Any

import pytorch_lightning as pl
import torch
from synface.data import embedded_faces, normalize
from synface.heads import PartialFC
from synface.models.iresnet import IResNet
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import synface_kernels as sk

SIZE, DIM = 32, 64


class FaceRecognizer(pl.LightningModule):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = IResNet(
            (SIZE, SIZE), widths=(8, 16, 32), depths=(1, 1, 1), embedding_size=DIM
        )

    def configure_model(self) -> None:
        # Not in __init__: the head reads this rank's classes from the process group.
        if not hasattr(self, "head"):
            self.head = PartialFC(sk.ArcFace(scale=16.0, margin=0.3), DIM, self.num_classes)
            # Each rank's centers are its own: DDP must neither copy nor average them.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                self, ["head.weight"]
            )

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        loss = self.head(self.backbone(images), labels)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        loss = float(self.trainer.callback_metrics["loss"])
        self.print(f"epoch {self.current_epoch + 1}: loss {loss:.3f}")

    def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
        # Only the backbone's: the head's norm differs from rank to rank.
        torch.nn.utils.clip_grad_norm_(self.backbone.parameters(), 5.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--identities", type=int, default=50)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    args = parser.parse_args()
    pl.seed_everything(0, verbose=False)

    faces = embedded_faces(images_per_identity=8, size=SIZE, identities=args.identities)
    dataset = TensorDataset(normalize(faces.images), faces.labels)
    trainer = pl.Trainer(
        accelerator="cpu", devices=args.devices, precision=args.precision, max_epochs=args.epochs,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(FaceRecognizer(args.identities), DataLoader(dataset, batch_size=32, shuffle=True))


if __name__ == "__main__":
    main()
