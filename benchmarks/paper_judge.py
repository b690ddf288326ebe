"""Quality of the paper's runs: FID, precision and recall on a classifier's features, recognition, PSNR and rFID."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.paper import NULL_CLASS, Sampling
from ldm.atomic import save_bytes
from ldm.checkpoint.load import load_weights
from ldm.config.instantiate import instantiate_from_config
from ldm.data.digits import Digits
from ldm.data.image import to_array
from ldm.evaluation.distances import frechet_distance, precision_recall
from ldm.evaluation.metrics import DigitClassifier, psnr
from ldm.inference.pipeline import load_model
from ldm.inference.requests import ClassConditionalRequest
from ldm.inference.tasks.class_conditional import generate_samples

EPOCHS, NEIGHBORS = 15, 3
ROWS = 2  # samples of each digit that are kept


class Judge:
    """Compares images with the digits. Its classifier is trained on the training set with a seed of its own."""

    def __init__(self, size: int, samples: int, batch: int) -> None:
        self.n_samples, self.batch = samples, batch
        self.train, self.held_out = Digits("train", size), Digits("held_out", size)
        self.reader = DigitClassifier(self.train.images, self.train.labels)
        self.network = train_classifier(_tensor(self.train.images), torch.from_numpy(self.train.labels))
        self.real, self.unseen = self.features(self.train.images), self.features(self.held_out.images)

    @torch.no_grad()
    def features(self, images: np.ndarray) -> Tensor:
        """The classifier's last hidden layer, (N, H, W, 3) -> (N, 64)."""
        return self.network[:-1](_tensor(images))

    def quality(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Values of generated images (N, H, W, 3) of classes (N,) against the training set."""
        features = self.features(images)
        precision, recall = precision_recall(self.real, features, NEIGHBORS)
        fid = frechet_distance(self.real, features)
        recognized = self.reader.accuracy(images, labels)
        return {"fid": fid, "precision": precision, "recall": recall, "recognized": recognized}

    def diffusion(
        self, config: Mapping[str, Any], folder: Path, samplings: Sequence[Sampling], seed: int, shown: Path
    ) -> dict[str, Any]:
        """Values of each sampling from the EMA weights of the checkpoints in `folder`, and what the training took.

        The first samples of each digit by the last checkpoint, sampled plainly, go to the file `shown`.
        """
        marks, loaded, values = json.loads((folder / "marks.json").read_text(encoding="utf-8")), {}, []
        for each in samplings:
            if each.mark not in loaded:
                loaded[each.mark] = load_model({"model": config["model"]}, folder / f"{each.mark}.ckpt", "cpu", "full")
            began = time.process_time()
            images, labels = self.generate(loaded[each.mark], each, seed)
            spent = {"sampling_cpu_seconds": time.process_time() - began}
            if each == Sampling():
                _save_row(shown, images[: NULL_CLASS * ROWS])
            values.append({**asdict(each), **spent, **self.quality(images, labels)})
        model: Any = loaded[samplings[0].mark].model
        parameters = sum(p.numel() for p in model.model.parameters())
        return {"marks": marks, "parameters": parameters, "samplings": values}

    def generate(self, pipeline: Any, sampling: Sampling, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, H, W, 3) in [-1, 1] and their classes (N,), every digit equally often."""
        options: dict[str, Any] = {"eta": 0.0} if sampling.sampler == "ddim" else {}
        request = ClassConditionalRequest(
            sampler=sampling.sampler, steps=sampling.steps, scale=sampling.scale, n_samples=self.n_samples,
            batch_size=self.batch, seed=seed, classes=tuple(range(NULL_CLASS)), null_class=NULL_CLASS, **options,
        )  # fmt: skip
        generated = list(generate_samples(pipeline, request, progress=False))
        return np.stack([to_array(each.image) for each in generated]), np.array([e.info["class"] for e in generated])

    @torch.no_grad()
    def first_stage(self, model: Mapping[str, Any], checkpoint: Path) -> dict[str, float]:
        """PSNR in dB, rFID and recognition of reconstructed held-out scans; of a codebook, the number of codes used."""
        stage = instantiate_from_config(model).eval()
        load_weights(stage, checkpoint)
        images, codes = self.held_out.images, {}
        parts = _tensor(images).split(self.batch)
        if hasattr(stage, "quantize"):
            outputs = [stage(part)[0] for part in parts]
            codes = {"codes_used": len(torch.cat([stage.encode(part)[2][2].flatten() for part in parts]).unique())}
        else:
            outputs = [stage(part, sample_posterior=False)[0] for part in parts]
        decoded = torch.cat(outputs).clamp(-1, 1).permute(0, 2, 3, 1).numpy()
        values = {"psnr": psnr(decoded, images), "rfid": frechet_distance(self.unseen, self.features(decoded))}
        return {**values, "recognized": self.reader.accuracy(decoded, self.held_out.labels), **codes}


def train_classifier(x: Tensor, labels: Tensor) -> nn.Sequential:
    """A small convolutional classifier of digits x (N, 3, 32, 32); its last layer but one has 64 features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.SiLU()]
        network = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(64), nn.SiLU(), nn.Linear(64, 10))
        network(x[:1])
        optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(x[rows]), labels[rows]).backward()
                optimizer.step()
    return network.eval()


def _tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()  # (N, 3, H, W)


def _save_row(path: Path, images: np.ndarray) -> None:
    """Save images (N, H, W, 3) in [-1, 1] side by side, NULL_CLASS in a row."""
    rows = [np.concatenate(list(images[k : k + NULL_CLASS]), axis=1) for k in range(0, len(images), NULL_CLASS)]
    content = BytesIO()
    Image.fromarray(np.rint((np.concatenate(rows).mean(axis=-1) + 1) * 127.5).astype(np.uint8)).save(
        content, "PNG", optimize=True
    )
    save_bytes(path, content.getvalue())
