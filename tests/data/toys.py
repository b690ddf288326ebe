"""Tiny datasets, and a model that remembers which samples it was trained on."""

import hashlib

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import Dataset

from ldm.data.base import Txt2ImgIterableBaseDataset

LENGTH = 10


class Numbers(Dataset):
    """Samples with their index and a random number."""

    built = 0

    def __init__(self, length: int = LENGTH, class_names=None):
        self.length, self.class_names = length, class_names
        Numbers.built += 1

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"index": index, "draw": torch.rand(())}


class NumberStream(Txt2ImgIterableBaseDataset):
    """The same as a stream, in another order in every epoch."""

    def __iter__(self):
        for i in self.valid_ids:
            yield {
                "index": (i + self.epoch) % LENGTH,
                "draw": torch.tensor(hash((self.seed, self.epoch, i)) % 1000 / 1000),
            }


class Recorder(pl.LightningModule):
    """A linear model; `seen` holds a hash of every batch it was trained on."""

    def __init__(self, stop_after: int | None = None):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.stop_after = stop_after
        self.seen: list[str] = []
        self.validated: list[str] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(digest(batch))
        return self.layer(batch["draw"][:, None].float()).mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(digest(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def digest(batch) -> str:
    text = repr([(key, value.tolist()) for key, value in sorted(batch.items())])
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
