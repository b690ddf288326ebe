"""First stages small enough to be trained in a test, and their images."""

from __future__ import annotations

import copy
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.models.autoencoder import AutoencoderKL, VQModel
from tests.reference import randn

DDCONFIG = {
    "double_z": True, "z_channels": 2, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1],
    "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
LOSS = {
    "disc_start": 0,
    "perceptual_weight": 0,
    "disc_num_layers": 2,
    "disc_ndf": 8,
    "disc_weight": 0.5,
    "kl_weight": 1e-6,
}


def loss_config(**options: Any) -> dict[str, Any]:
    return {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {**LOSS, **options}}


def make_autoencoder(
    learning_rate: float | None = 1e-3, accumulation: int = 1, loss: dict[str, Any] | None = None, **options: Any
) -> AutoencoderKL:
    """The tiny KL autoencoder, always with the same first weights."""
    torch.manual_seed(0)
    model = AutoencoderKL(DDCONFIG, loss_config(**(loss or {})), embed_dim=2, monitor="val/rec_loss", **options)
    model.learning_rate = learning_rate
    model.accumulate_grad_batches = accumulation
    return model


VQ_TARGET = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
VQ_LOSS = {"disc_start": 0, "perceptual_weight": 0, "disc_num_layers": 2, "disc_ndf": 8, "disc_weight": 0.5}


def vq_config(loss: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Arguments of the tiny VQ autoencoder."""
    lossconfig = {"target": VQ_TARGET, "params": {**VQ_LOSS, **(loss or {})}}
    options = {"n_embed": 16, "embed_dim": 2, "monitor": "val/rec_loss", **options}
    return {"ddconfig": {**DDCONFIG, "double_z": False}, "lossconfig": lossconfig, **options}


def make_vq(
    learning_rate: float | None = 1e-3,
    accumulation: int = 1,
    loss: dict[str, Any] | None = None,
    cls: type = VQModel,
    **options: Any,
) -> VQModel:
    """The tiny VQ autoencoder, always with the same first weights; its codebook is as spread out as its latents are."""
    torch.manual_seed(0)
    model = cls(**vq_config(loss, **options))
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.3)
    if model.use_ema:
        model.model_ema.quantizeembeddingweight.copy_(model.quantize.embedding.weight.detach())
    model.learning_rate = learning_rate
    model.accumulate_grad_batches = accumulation
    return model


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not bitwise equal."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def batches(number: int) -> list[dict[str, Tensor]]:
    """Batches of two images (2, 16, 16, 3) in [-1, 1]."""
    return [{"image": torch.tanh(randn(300 + i, 2, 16, 16, 3))} for i in range(number)]


class SeedEveryBatch(pl.Callback):
    """Seed every batch by its number, so that another loop gets the same posterior samples."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(trainer.fit_loop.epoch_loop.total_batch_idx + 1)


def fit(
    model: pl.LightningModule,
    data: list[dict[str, Tensor]],
    validation: Any = (),
    ckpt_path: Any = None,
    **options: Any,
) -> pl.Trainer:
    """Train on the CPU without logs or files. Returns the trainer."""
    callbacks = [SeedEveryBatch(), *options.pop("callbacks", [])]
    options = {**QUIET, "max_epochs": 1, "limit_val_batches": len(validation), **options}
    trainer = pl.Trainer(devices=1, callbacks=callbacks, **options)
    loaders = [DataLoader(list(part), batch_size=None) for part in (data, validation)]
    trainer.fit(model, *loaders, ckpt_path=ckpt_path, weights_only=True)
    return trainer
