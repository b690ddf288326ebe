"""A model of a few parameters and images of a few pixels, with all state that training has to keep exact."""

import os
import signal
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import Dataset

CONFIG = {
    "model": {"base_learning_rate": 1e-3, "target": "tests.toys.Toy", "params": {"width": 3}},
    "data": {
        "target": "main.DataModuleFromConfig",
        "params": {
            "batch_size": 2,
            "num_workers": 0,
            "train": {"target": "tests.toys.Images"},
            "validation": {"target": "tests.toys.Images", "params": {"length": 4}},
        },
    },
    "lightning": {"trainer": {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False, "logger": False}},
}


class Images(Dataset):
    """`length` images (2, 2, 3) in [-1, 1], each augmented with noise that is new in every epoch."""

    def __init__(self, length: int = 8):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(index)) * 2 - 1
        return {"image": (image + 0.1 * torch.randn(2, 2, 3)).clamp(-1, 1), "index": index}


class Toy(pl.LightningModule):
    """Automatic optimization with Adam, a learning-rate schedule and EMA weights.

    at: {batch: what happens in that training step}, where batches count from 0: nan, error, or a signal's name, once or
        "twice".
    at_validation: {epoch: the same, in its second validation batch}.
    """

    def __init__(
        self,
        width: int = 3,
        monitor: str | None = "val/loss",
        at: Any = None,
        at_validation: dict | None = None,
        frozen: bool = False,
    ):
        super().__init__()
        self.net = nn.Linear(12, width)
        self.average = nn.Linear(12, width).requires_grad_(False)
        self.average.load_state_dict(self.net.state_dict())
        self.net.bias.requires_grad_(not frozen)
        self.monitor = monitor
        self.at, self.at_validation = ({int(k): v for k, v in (events or {}).items()} for events in (at, at_validation))
        self.learning_rate = None
        self.seen: list[tuple] = []

    def loss(self, batch):
        x = batch["image"].flatten(1)
        return (self.net(x + torch.randn_like(x)) ** 2).mean()

    def happen(self, what):
        if what == "error":
            raise RuntimeError("a bug in the model")
        if what and what.startswith("SIG"):
            for _ in range(2 if what.endswith(" twice") else 1):
                os.kill(os.getpid(), getattr(signal, what.removesuffix(" twice")))
                time.sleep(0.01)
        return what

    def event(self):
        return self.happen(self.at.get(self.trainer.fit_loop.epoch_loop.total_batch_idx))

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, tuple(batch["index"].tolist())))
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss * float("nan") if self.event() == "nan" else loss

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        for mean, new in zip(self.average.parameters(), self.net.parameters()):
            mean.lerp_(new.detach(), 0.1)

    def validation_step(self, batch, batch_idx):
        if batch_idx == 1 and not self.trainer.sanity_checking:
            self.happen(self.at_validation.get(self.current_epoch))
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.loss(batch))

    def configure_optimizers(self):
        trainable = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def log_images(self, batch, split="train", **kwargs):
        assert not self.net.training
        torch.manual_seed(len(self.seen))  # an observer may do anything to the generators
        return {"inputs": batch["image"].permute(0, 3, 1, 2), "film": torch.rand(1, 3, 2, 6) * 2 - 1}


class ToyGan(Toy):
    """Two optimizers under manual optimization, with its own accumulation; only the first one counts as a step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.critic = nn.Linear(3, 1)
        self.accumulate_grad_batches = 1
        self.gradient_clip_val = None

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, tuple(batch["index"].tolist())))
        generator, critic = self.optimizers()
        critic._on_before_step = critic._on_after_step = lambda: None
        last = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        x = batch["image"].flatten(1)
        for optimizer, sign in ((generator, 1.0), (critic, -1.0)):
            self.toggle_optimizer(optimizer)
            loss = sign * self.critic(self.net(x + torch.randn_like(x))).square().mean()
            self.manual_backward(loss * float("nan") if self.event() == "nan" else loss / self.accumulate_grad_batches)
            if last:
                optimizer.step()
                optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
        self.log("train/loss", loss.detach())

    @property
    def logging_step(self):
        return self.global_step

    def configure_optimizers(self):
        generator = torch.optim.Adam(self.net.parameters(), lr=self.learning_rate)
        return [generator, torch.optim.Adam(self.critic.parameters(), lr=self.learning_rate)]
