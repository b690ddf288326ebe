"""Train tiny models on several ranks: processes that exchange gradients with gloo, on the CPU."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch.utils.data import Dataset

from ldm.callbacks import ExactResume, LossBySNR, RunReport, StepSeed, StopOnNonFinite
from ldm.data.datamodule import DataModuleFromConfig
from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.models.diffusion.ddpm import DDPM
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.strategies import make_strategy
from ldm.util import instantiate_from_config
from tests.models.first_stages import DDCONFIG, loss_config, vq_config
from tests.tiny import UNET, text_model_config

ROOT = Path(__file__).parents[1]
CURVES = ("train/loss_step", "aeloss_step", "discloss_step", "train/d_weight", "train/perplexity")


class Images(Dataset):
    """Random images (16, 16, 3), flipped at random, with one of two captions."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.tanh(torch.randn(16, 16, 3, generator=torch.Generator().manual_seed(index)))
        image = image.flip(1) if torch.rand(()) < 0.5 else image
        return {"image": image, "caption": ("a digit", "a letter")[int(torch.randint(2, ()))], "index": index}


def latent_diffusion() -> pl.LightningModule:
    unet = {**UNET, "params": {**UNET["params"], "attention_resolutions": [], "channel_mult": [1]}}
    params = {"cond_dropout": 0.3, "scale_by_std": True, "scale_factor": 1.0, "untrained_first_stage": True}
    config = text_model_config(**params, unet_config=unet)
    return instantiate_from_config(OmegaConf.create(config).model)


MODELS = {
    "latent diffusion": latent_diffusion,
    "autoencoder": lambda: AutoencoderKL(DDCONFIG, loss_config(use_discriminator=False), embed_dim=2),
    "autoencoder with GAN": lambda: AutoencoderKL(DDCONFIG, loss_config(disc_start=2), embed_dim=2),
    "autoencoder with ActNorm": lambda: AutoencoderKL(DDCONFIG, loss_config(use_actnorm=True), embed_dim=2),
    "VQ with GAN": lambda: VQModel(**vq_config({"disc_start": 2}, batch_resize_range=[16, 32])),
}


class Record(pl.Callback):
    """Logged values of every optimizer step and validation, and (epoch, index) of this rank's training samples."""

    def __init__(self) -> None:
        super().__init__()
        self.curves: dict[str, list[float]] = {}
        self.samples: list[tuple[int, int]] = []
        self.validations: dict[str, list[float]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        samples = trainer.datamodule.training_samples()
        assert list(samples.indices) == batch["index"].tolist()
        self.samples += [(samples.epoch, index) for index in samples.indices if samples.weight]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        accumulated = getattr(pl_module, "accumulate_grad_batches", trainer.accumulate_grad_batches)
        if (batch_idx + 1) % accumulated == 0 or trainer.is_last_batch:
            for name in CURVES:
                if name in trainer.callback_metrics:
                    self.curves.setdefault(name, []).append(float(trainer.callback_metrics[name]))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val"):
                self.validations.setdefault(name, []).append(float(value))


def train(
    kind: str,
    batch_size: int,
    accumulate: int = 1,
    ranks: int = 1,
    steps: int = 20,
    length: int = 40,
    validation: int = 0,
    validate_every: int = 1,
    learning_rate: float = 1e-4,
    save: str | None = None,
    resume: str | None = None,
    strategy: str | None = None,
) -> dict[str, Any]:
    """Train to a number of optimizer steps -> {"curves", "samples", "validations"} of this rank.

    validate_every: epochs between validations. strategy: by default `ddp` if there are several ranks.
    """
    torch.manual_seed(0)
    model: Any = MODELS[kind]()
    model.learning_rate = learning_rate
    data = DataModuleFromConfig(batch_size, train={}, validation={}, num_workers=0)
    data.datasets, data.seed = {"train": Images(length), "validation": Images(max(validation, 1))}, 11
    options: dict[str, Any] = {}
    if model.automatic_optimization:
        options["accumulate_grad_batches"] = accumulate
    else:
        model.accumulate_grad_batches = accumulate
    if ranks > 1 or strategy:
        unused = "" if model.automatic_optimization else "_find_unused_parameters_true"
        options["strategy"] = make_strategy(strategy or f"ddp{unused}")
    record = Record()
    by_noise = [LossBySNR(samples=3, bin_width=4, timesteps_per_bin=1)] if isinstance(model, DDPM) else []
    place = tempfile.TemporaryDirectory()  # of the plots
    trainer = pl.Trainer(
        default_root_dir=place.name,
        accelerator="cpu",
        devices=ranks,
        max_steps=steps,
        limit_val_batches=1.0 if validation else 0,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=validate_every,
        callbacks=[StepSeed(11), ExactResume(), StopOnNonFinite(), RunReport(), *by_noise, record],
        inference_mode=False,
        plugins=[AtomicCheckpointIO()],
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        **options,
    )
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    if save:
        trainer.save_checkpoint(save)
    place.cleanup()
    return {"curves": record.curves, "samples": record.samples, "validations": record.validations}


def train_on(ranks: int, jobs: list[dict[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
    """Run jobs, arguments of `train`, on `ranks` new processes -> for each job the records of all ranks.

    The processes are forks, which share the memory of the imports; one that fails ends the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = [{**job, "ranks": ranks} for job in jobs]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_run_rank, args=(rank, ranks, jobs, folder, port)) for rank in range(ranks)]
    for process in processes:
        process.start()
    waiting = {process.sentinel: process for process in processes}
    while waiting:
        for sentinel in multiprocessing.connection.wait(list(waiting), timeout=1800) or list(waiting):
            process = waiting.pop(sentinel)
            process.join(timeout=1)
            if process.exitcode != 0:
                for other in processes:
                    other.kill()
                raise RuntimeError((folder / "log").read_text()[-3000:])
    records = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return [list(of_all_ranks) for of_all_ranks in zip(*records)]


def largest_difference(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    """Return the largest |a - b| / |a| of two sets of curves with the same names and lengths."""
    assert one.keys() == other.keys() and all(len(one[name]) == len(other[name]) for name in one)
    pairs = [pair for name in one for pair in zip(one[name], other[name])]
    return max((abs(a - b) / max(abs(a), 1e-30) for a, b in pairs if a != b), default=0.0)


def _run_rank(rank: int, ranks: int, jobs: list[dict[str, Any]], folder: Path, port: int) -> None:
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not those of pytest
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, TORCHELASTIC_RUN_ID="tests")
    records = [train(**job) for job in jobs]
    (folder / f"{rank}.json").write_text(json.dumps(records))
