"""Random numbers depend on the place in the run."""

import random

import numpy as np
import torch

from ldm.callbacks import StepSeed
from tests.callbacks.fit import fit
from tests.toys import Toy


def test_random_numbers_depend_on_the_place_alone():
    class Place:
        def __init__(self, rank, epoch):
            self.global_rank, self.current_epoch = rank, epoch

    def draw(seed, rank, epoch, batch):
        StepSeed(seed).on_train_batch_start(Place(rank, epoch), None, None, batch)
        return float(torch.rand((), dtype=torch.float64)), random.random(), np.random.rand()

    places = [(seed, rank, epoch, batch) for seed in (0, 1) for rank in (0, 1) for epoch in (0, 1) for batch in (0, 1)]
    numbers = [draw(*place) for place in places]
    assert len(set(numbers)) == len(places) and len({n[0] for n in numbers}) == len(places)
    assert [draw(*place) for place in reversed(places)] == numbers[::-1]


def test_every_validation_sees_the_same_noise(tmp_path):
    seen = []

    class Noise(Toy):
        def validation_step(self, batch, batch_idx):
            seen.append(float(torch.rand(())))

    fit(tmp_path, [StepSeed(1)], Noise(), max_epochs=2, num_sanity_val_steps=0)
    assert seen[:2] == seen[2:] and seen[0] != seen[1]
