"""A small classifier that is trained in place on a labelled training set: its features measure images of that set."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger(__name__)

SIDE, WIDTH = 32, 64  # pixels of its input, features
STEPS, BATCH, LEARNING_RATE = 600, 64, 2e-3
VERSION = 1  # of the network and its training: another one is not read from the cache
SHIFT = 2  # pixels by which training images are moved at random


class SmallClassifier(nn.Module):
    """Three strided convolutions on 32x32 pixels: images (B, 3, 32, 32) in [-1, 1] -> logits (B, n_classes)."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        widths = (3, WIDTH // 2, WIDTH, WIDTH)
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU())
            for a, b in itertools.pairwise(widths)
        ]
        self.body, self.neck = nn.Sequential(*blocks), nn.Linear(WIDTH * (SIDE // 8) ** 2, WIDTH)
        self.head = nn.Linear(WIDTH, n_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> (B, 64), normalized: distances then have one scale for all sets."""
        return F.layer_norm(F.silu(self.neck(self.body(x).flatten(1))), (WIDTH,))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def reduced(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, 32, 32) in [-1, 1]."""
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return x if x.shape[2:] == (SIDE, SIDE) else F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)


def train_classifier(
    images: Tensor, labels: Tensor, n_classes: int, seed: int = 0, steps: int = STEPS, progress: bool = True
) -> Mapping[str, Tensor]:
    """Weights of a SmallClassifier after `steps` of AdamW on images (N, 3, 32, 32) in [-1, 1] of labels (N,)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallClassifier(n_classes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
        loss = torch.zeros(())
        for _ in tqdm(range(steps), desc="classifier", unit="step", disable=not progress):
            chosen = torch.randint(len(images), (min(BATCH, len(images)),))
            loss = F.cross_entropy(model(_shifted(images[chosen])), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    logger.info("classifier: %d classes, %d images, %d steps, loss %.3f", n_classes, len(images), steps, loss.item())
    return {key: value.detach() for key, value in model.state_dict().items()}


def _shifted(x: Tensor) -> Tensor:
    """The images (B, 3, H, W), all moved by the same random number of pixels."""
    dy, dx = (int(torch.randint(2 * SHIFT + 1, ())) for _ in range(2))
    padded = F.pad(x, (SHIFT,) * 4, mode="replicate")
    return padded[:, :, dy : dy + x.shape[2], dx : dx + x.shape[3]]
