"""Random numbers depend on the place in the run."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from ldm import rng
from ldm.callbacks import StepSeed
from ldm.data.datamodule import DataModuleFromConfig
from ldm.rng import Purpose
from tests.callbacks.fit import fit
from tests.toys import Images, Toy


def test_random_numbers_depend_on_the_place_alone():
    class Place:
        def __init__(self, rank, epoch):
            self.global_rank, self.current_epoch = rank, epoch
            self.strategy = SimpleNamespace(root_device=torch.device("cpu"))

    def draw(seed, rank, epoch, batch):
        StepSeed(seed).on_train_batch_start(Place(rank, epoch), None, None, batch)
        return float(torch.rand((), dtype=torch.float64)), random.random(), np.random.rand()

    places = [(seed, rank, epoch, batch) for seed in (0, 1) for rank in (0, 1) for epoch in (0, 1) for batch in (0, 1)]
    numbers = [draw(*place) for place in places]
    assert len(set(numbers)) == len(places) and len({n[0] for n in numbers}) == len(places)
    assert [draw(*place) for place in reversed(places)] == numbers[::-1]


def test_a_step_on_the_cpu_seeds_no_other_device(tmp_path, monkeypatch):
    """Seeding a device that was never used queues a call with its stack, which takes a millisecond."""
    seeded = []
    fit(tmp_path, [StepSeed(1)], Toy(), max_steps=1, limit_val_batches=0)  # what a first step loads
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    fit(tmp_path, [StepSeed(1)], Toy(), max_steps=2, limit_val_batches=0)
    assert seeded == []


def test_every_validation_sees_the_same_noise(tmp_path):
    seen = []

    class Noise(Toy):
        def validation_step(self, batch, batch_idx):
            seen.append(float(torch.rand(())))

    fit(tmp_path, [StepSeed(1)], Noise(), max_epochs=2, num_sanity_val_steps=0)
    assert seen[:2] == seen[2:] and seen[0] != seen[1]


def fitted(model, batch_size, epochs=2):
    model.learning_rate = 1e-3
    data = DataModuleFromConfig(batch_size, train={}, validation={}, num_workers=0)
    data.datasets = {"train": Images(7), "validation": Images(3)}
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[StepSeed(1)], num_sanity_val_steps=0, **off)
    trainer.fit(model, datamodule=data)
    return model


class Noisy(Toy):
    """Remembers the noise of each sample."""

    def __init__(self):
        super().__init__()
        self.noise = {"train": {}, "validation": {}}

    def remember(self, split, batch):
        place = self.current_epoch if split == "train" else 0
        for index, number in zip(batch["index"].tolist(), rng.uniform(len(batch["index"]), Purpose.NOISE, rng.CPU)):
            self.noise[split].setdefault((place, index), set()).add(float(number))

    def training_step(self, batch, batch_idx):
        self.remember("train", batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.remember("validation", batch)


def test_the_noise_of_a_sample_depends_on_the_epoch_and_its_index_alone():
    small, large = fitted(Noisy(), 2).noise, fitted(Noisy(), 5).noise
    assert small == large and len(small["train"]) == 14 and len(small["validation"]) == 3
    numbers = [number for of_split in small.values() for numbers in of_split.values() for number in numbers]
    assert len(set(numbers)) == len(numbers) == 17  # validation uses the same in every epoch


def test_between_batches_and_after_an_error_models_use_the_global_generators():
    class Watch(Noisy):
        def on_train_batch_end(self, *args):
            assert rng.current_samples() is None

        on_validation_batch_end = on_train_batch_end

    class Fails(Watch):
        def training_step(self, batch, batch_idx):
            raise ValueError("bad batch")

    fitted(Watch(), 2, epochs=1)
    with pytest.raises(ValueError, match="bad batch"):
        fitted(Fails(), 2)
    assert rng.current_samples() is None
