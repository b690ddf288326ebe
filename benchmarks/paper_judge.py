"""Quality of the paper's runs, by the functions of ldm.evaluation: FID, precision, recall, recognition, PSNR, rFID."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper import BATCH, Samples, Study
from ldm.atomic import save_bytes
from ldm.checkpoint import open_weights
from ldm.config.model_info import ModelInfo
from ldm.evaluation.distances import frechet_distance, inside
from ldm.evaluation.evaluate import NEIGHBORS, Real, real_of_images, recognized
from ldm.evaluation.features import default_extractor, features_of, make_extractor, trained_classifier
from ldm.evaluation.first_stage import load_first_stage, psnr_interval, reconstruct
from ldm.evaluation.image_sets import ArrayImages, DatasetImages
from ldm.evaluation.plan import request_type
from ldm.evaluation.sampling import Sampling
from ldm.inference.pipeline import Pipeline, load_model
from ldm.inference.precision import choose_device
from ldm.inference.settings import Request
from ldm.output.images import png_bytes
from ldm.visualize import grid

REAL = 10_000  # images of each split, at most
COLUMNS, ROWS = 10, 2  # samples that are kept


class Judge:
    """Compares images with those of a study. The classifier of their classes is trained with a seed of its own."""

    def __init__(self, study: Study, cache: Path) -> None:
        self.study = study
        train, self.held_out = (
            DatasetImages(split, study.data[split], "image", [study.name, split], limit=REAL)
            for split in ("train", "validation")
        )
        if len(self.held_out) <= NEIGHBORS:
            advice = f"precision and recall need more than {NEIGHBORS}; add images, or a folder validation/"
            raise ValueError(f"--data {study.root}: {len(self.held_out)} of its images are held out; {advice}")

        def extractor(labels: np.ndarray | None) -> Any:
            if labels is not None:
                return trained_classifier(cache, train, labels)
            return make_extractor(default_extractor(None), None, choose_device("cpu"))

        self.real: Real = real_of_images(train, extractor, self.held_out, cache, BATCH)
        shuffled = np.random.default_rng(0).permutation(len(self.held_out))
        images = np.stack([self.held_out.image(int(k)) for k in shuffled[: study.count]])
        labels = [self.held_out.label(int(k)) for k in shuffled[: study.count]]
        sizes = {"training_images": len(study.data["train"]), "held_out_images": len(study.data["validation"])}
        self.facts: dict[str, Any] = {**sizes, "compared_with": len(train), "classes": study.n_classes}
        self.facts |= {"features": self.real.extractor.name, **self.quality(images, labels)}
        if self.real.accuracy is not None:
            self.facts["recognized"] = self.real.accuracy.value  # of all held-out images

    def quality(self, images: np.ndarray, labels: list[int | None]) -> dict[str, float]:
        """Values of images uint8 (N, H, W, 3) of classes (N,) against the training set."""
        real = self.real
        assert real.features is not None
        features = features_of(real.extractor, ArrayImages("samples", images), BATCH, progress=False)
        found = {"fid": frechet_distance(real.features, features)}
        found["precision"] = float(inside(features, real.features, NEIGHBORS, real.radii).double().mean())
        found["recall"] = float(inside(real.features, features, NEIGHBORS).double().mean())
        if real.classifier is not None:
            found["recognized"] = recognized(real.classifier, np.array(labels), features).value
        return found

    def diffusion(
        self, config: Mapping[str, Any], folder: Path, needed: Sequence[Samples], seed: int, shown: Path
    ) -> dict[str, Any]:
        """Values of each set of samples from the EMA weights of the checkpoints in `folder`, and what training took.

        The first samples of the last checkpoint at each scale are saved as `shown`-scale<scale>.png.
        """
        marks, loaded, values = json.loads((folder / "marks.json").read_text(encoding="utf-8")), {}, []
        for each in needed:
            if each.mark not in loaded:
                loaded[each.mark] = load_model({"model": config["model"]}, folder / f"{each.mark}.ckpt", "cpu", "full")
            began = time.process_time()
            images, labels = self.generate(loaded[each.mark], each, seed)
            spent = {"sampling_cpu_seconds": time.process_time() - began}
            if each == Samples(scale=each.scale):
                kept = grid(list(images[: COLUMNS * ROWS]), columns=COLUMNS, padding=0)
                save_bytes(shown.with_name(f"{shown.name}-scale{each.scale:g}.png"), png_bytes(kept))
            values.append({**asdict(each), **spent, **self.quality(images, labels)})
        model: Any = loaded[needed[0].mark].model
        parameters = sum(p.numel() for p in model.model.parameters())
        return {"marks": marks, "parameters": parameters, "samples": values}

    def generate(self, pipeline: Pipeline, samples: Samples, seed: int) -> tuple[np.ndarray, list[int | None]]:
        """Images uint8 (N, H, W, 3) and their classes (N,): of every class in turn, or of held-out captions."""
        request = request_of(samples, self.study, pipeline.info, seed)
        sampling = Sampling(request, pipeline.info, None if self.study.n_classes else self.held_out, BATCH)
        count = self.study.count
        parts = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
        images = [image for part in parts for image in sampling.generate(pipeline, part)]
        return np.stack(images), [sampling.label(index) for index in range(count)]

    def first_stage(self, model: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
        """PSNR in dB and rFID of reconstructed held-out images; of a codebook, the number of codes used."""
        stage = load_first_stage({"model": model}, open_weights(checkpoint), None, "cpu")
        found = reconstruct(stage, self.held_out, BATCH, "cpu", None)
        features = features_of(self.real.extractor, ArrayImages("reconstructions", found.images), BATCH, progress=False)
        assert self.real.held_out_features is not None
        rfid = frechet_distance(self.real.held_out_features, features)
        usage = found.latents.get("codebook_usage")
        codes = {} if usage is None else {"codes_used": round(usage * stage.n_codes)}
        return {"psnr": psnr_interval(found.errors["mse"]).value, "rfid": rfid, **codes}


def request_of(samples: Samples, study: Study, info: ModelInfo, seed: int) -> Request:
    """The checked request of samples of a model."""
    options: dict[str, Any] = {"sampler": samples.sampler, "steps": samples.steps, "scale": samples.scale}
    options |= {"eta": 0.0} if samples.sampler == "ddim" else {}
    # Also without dropout, where the config states no class that means "no class".
    options |= {"null_class": study.n_classes} if study.n_classes else {"prompt": "of the data"}
    return request_type(info)(seed=seed, **options).checked(info)
