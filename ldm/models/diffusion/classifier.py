"""A classifier of noisy latents, and samplers guided by it (LDM, arXiv 2112.10752, appendix C; ADM, arXiv 2105.05233, section 4)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ldm import checkpoint
from ldm.checkpoint.resume import find_checkpoint
from ldm.config.files import load_yaml
from ldm.config.instantiate import accepted_params, instantiate_from_config
from ldm.models.diffusion.image_log import film
from ldm.models.diffusion.pixel import fixed_noise
from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, UNetModel
from ldm.util import log_txt_as_img

logger = logging.getLogger(__name__)

SEGMENTATION = "segmentation"


class NoisyLatentImageClassifier(pl.LightningModule):
    """p(label | x_t): the contracting half of a diffusion model's UNet with a head, trained on that model's noisy latents.

    diffusion_path: the diffusion model's YAML, or the folder of a run of this project (its newest project YAML and its last checkpoint).
    diffusion_ckpt_path: that model's weights; without them its first stage would be random.
    num_classes, label_key: of the labels `batch[label_key]`, by default the key that the model is conditioned on. `segmentation` maps are
    labels of every pixel: a whole UNet then gives scores (B, num_classes, h, w).
    pool: the head, one of adaptive, attention, spatial, spatial_v2. log_steps: noise levels at which validation reports the accuracy.
    """

    def __init__(
        self,
        diffusion_path: str,
        num_classes: int,
        ckpt_path: str | None = None,
        pool: str = "attention",
        label_key: str | None = None,
        diffusion_ckpt_path: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        weight_decay: float = 1e-2,
        log_steps: int = 10,
        monitor: str | None = "val/loss",
        ignore_keys: Sequence[str] = (),
    ) -> None:
        super().__init__()
        config, found = _read_diffusion(diffusion_path)
        weights = diffusion_ckpt_path or found
        first_stage = config.params.get("first_stage_config")
        if weights is not None and first_stage is not None and first_stage.get("params"):
            first_stage.params.ckpt_path = None  # its weights are in the same file
        self.diffusion_model = instantiate_from_config(config)
        if weights is not None:
            self.diffusion_model.init_from_ckpt(weights)
        self.diffusion_model.requires_grad_(False)
        self._has_weights = weights is not None
        self.label_key = label_key or _label_key_of(self.diffusion_model)
        self.num_classes, self.monitor, self.weight_decay, self.scheduler_config = (
            num_classes,
            monitor,
            weight_decay,
            scheduler_config,
        )
        self.learning_rate: float | None = None  # set by whoever trains: main.py works it out from the config
        T = self.diffusion_model.num_timesteps
        if not 1 <= log_steps <= T:
            raise ValueError(f"log_steps {log_steps}: choose 1 to {T}")
        self.log_times = list(range(0, T, max(1, T // log_steps)))
        self.model = self._build_classifier(config.params.unet_config.params, pool)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)
        self.train(self.training)

    def _build_classifier(self, unet: Mapping[str, Any], pool: str) -> torch.nn.Module:
        """The network that belongs to the labels, in the shape of the denoising UNet."""
        network = UNetModel if self.label_key == SEGMENTATION else EncoderUNetModel
        accepted, _ = accepted_params(network)
        params = {name: value for name, value in unet.items() if name in accepted}
        params |= {
            "in_channels": unet["out_channels"],
            "out_channels": self.num_classes,
            "image_size": self.diffusion_model.image_size,
        }
        if network is EncoderUNetModel:
            return network(**params, pool=pool)
        for name in (
            "use_spatial_transformer",
            "context_dim",
            "num_classes",
            "n_embed",
        ):  # a label's classifier has no condition
            params.pop(name, None)
        return network(**params)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load weights from a file. CheckpointError says what is wrong."""
        checkpoint.load_weights(self, path, ignore_keys)
        self._has_weights = True

    def train(self, mode: bool = True) -> NoisyLatentImageClassifier:
        """As every module, but the diffusion model stays in evaluation mode."""
        super().train(mode)
        if hasattr(self, "diffusion_model"):
            self.diffusion_model.eval()
        return self

    def on_fit_start(self) -> None:
        """Pretrained encoders that no checkpoint has filled find their weights now; a random first stage is worth a warning."""
        checkpoint.ensure_weights(self)
        stage = getattr(self.diffusion_model, "first_stage_model", None)
        filled = self._has_weights or self.trainer.ckpt_path is not None
        if (
            not filled
            and stage is not None
            and not checkpoint.has_loaded_weights(stage)
            and any(True for _ in stage.parameters())
        ):
            advice = "set model.params.diffusion_path to the folder of its run, or diffusion_ckpt_path to its weights"
            logger.warning("the diffusion model has random weights, and its latents mean nothing: %s", advice)

    # --------------------------------------------------------------------------------------------------------- batches

    def forward(self, x_noisy: Tensor, t: Tensor) -> Tensor:
        """Scores of the classes at x_noisy (B, c, h, w) and t (B,) -> (B, num_classes[, h, w])."""
        return self.model(x_noisy, t)

    @torch.no_grad()
    def get_latents(self, batch: Mapping[str, Any], bs: int | None = None) -> Tensor:
        """Clean scaled latents (B, c, h, w) of a batch; of a model in pixel space its pictures."""
        x = self.diffusion_model.get_pictures(batch, self.diffusion_model.first_stage_key, bs)
        if not hasattr(self.diffusion_model, "encode_first_stage"):
            return x
        return self.diffusion_model.get_first_stage_encoding(self.diffusion_model.encode_first_stage(x))

    def get_labels(self, batch: Mapping[str, Any], size: Sequence[int], bs: int | None = None) -> Tensor:
        """Labels (B,) int64, or (B, h, w) for segmentation maps, which are brought to `size` (h, w)."""
        labels = torch.as_tensor(self.diffusion_model.batch_value(batch, self.label_key), device=self.device)[:bs]
        if self.label_key == SEGMENTATION:
            labels = labels.argmax(dim=-1) if labels.ndim == 4 else labels  # (B, H, W, C) one-hot -> (B, H, W)
            labels = F.interpolate(labels[:, None].float(), size=tuple(size)).squeeze(1)
        if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            low, high = int(labels.min()), int(labels.max())
            raise ValueError(f"{self.label_key}: labels from {low} to {high}, but num_classes is {self.num_classes}")
        return labels.long()

    def shared_step(self, batch: Mapping[str, Any], t: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of a batch at timesteps t (B,), random where None, and its named logs."""
        x = self.get_latents(batch)
        t = self.diffusion_model.draw_timesteps(len(x)) if t is None else t
        return self.losses(x, self.get_labels(batch, x.shape[2:]), t)

    def losses(self, x: Tensor, labels: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of clean latents x (B, c, h, w) with labels (B,) or (B, h, w), noised to t (B,), and its named logs."""
        scores = self(self.diffusion_model.q_sample(x, t), t)
        loss = F.cross_entropy(scores, labels)
        prefix = "train" if self.training else "val"
        logs = {f"{prefix}/loss": loss.detach(), f"{prefix}/acc@1": top_k_accuracy(scores, labels, 1)}
        if self.num_classes > 5:
            logs[f"{prefix}/acc@5"] = top_k_accuracy(scores, labels, 5)
        return loss, logs

    # ----------------------------------------------------------------------------------------------------------- hooks

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss, logs = self.shared_step(batch)
        self.log_dict(logs, logger=True, on_step=True, on_epoch=True, batch_size=self._batch_size(batch))
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=self._batch_size(batch))
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Loss at random noise levels, the same each time, and the accuracy at each of `log_steps` levels (`val/acc@1_t0300`)."""
        size = self._batch_size(batch)
        with fixed_noise(batch_idx, self.device):
            x = self.get_latents(batch)
            labels = self.get_labels(batch, x.shape[2:])
            _, logs = self.losses(x, labels, self.diffusion_model.draw_timesteps(size))
            for step in self.log_times:
                _, at_t = self.losses(x, labels, torch.full((size,), step, device=self.device))
                logs[f"val/acc@1_t{step:04d}"] = at_t["val/acc@1"]
        self.log_dict(logs, logger=True, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def configure_optimizers(self) -> Any:
        if self.learning_rate is None:
            raise ValueError(
                "learning_rate is not set: assign model.learning_rate first (main.py takes it from base_learning_rate)"
            )
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        if self.scheduler_config is None:
            return optimizer
        schedule = instantiate_from_config(self.scheduler_config)
        return [optimizer], [
            {"scheduler": LambdaLR(optimizer, lr_lambda=schedule.schedule), "interval": "step", "frequency": 1}
        ]

    @property
    def logging_step(self) -> int:
        """Optimizer steps so far: what names image logs."""
        return self.global_step

    def _batch_size(self, batch: Mapping[str, Any]) -> int:
        return len(self.diffusion_model.batch_value(batch, self.diffusion_model.first_stage_key))

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, split: str = "train") -> dict[str, Tensor]:
        """`inputs`, their labels, the noisy latents decoded (a row for each sample) and what is seen in them, each (B, C, H, W)."""
        model = self.diffusion_model
        x, z = model.get_pictures(batch, model.first_stage_key, N), self.get_latents(batch, N)
        labels = self.get_labels(batch, z.shape[2:], N)
        times = [torch.full((len(z),), step, device=self.device) for step in self.log_times]
        noisy = [model.q_sample(z, t) for t in times]
        scores = [self(z_t, t) for z_t, t in zip(noisy, times)]
        decode = getattr(model, "decode_first_stage", lambda latents: latents)
        log = {"inputs": x, "noisy": film([decode(z_t) for z_t in noisy])}
        if labels.ndim > 1:
            from ldm.visualize import labels_to_rgb

            return log | {
                "labels": labels_to_rgb(labels, self.num_classes),
                "predictions": film([labels_to_rgb(s) for s in scores]),
            }
        names = list(batch.get("human_label") or map(str, labels.tolist()))[: len(x)]
        seen = [
            [f"t={step}: {int(score[i].argmax())}" for step, score in zip(self.log_times, scores)]
            for i in range(len(x))
        ]
        size = (max(x.shape[3], 128), max(x.shape[2], 128))
        return log | {
            "labels": log_txt_as_img(size, names),
            "predictions": log_txt_as_img(size, ["\n".join(lines) for lines in seen]),
        }


class ClassifierGuidance:
    """Leads samples to labels: eps - scale * sigma_t * grad_x log p(label | x_t)  (ADM, algorithm 2).

    Pass it to any sampler: `sample(..., score_corrector=ClassifierGuidance(classifier, labels, scale))`, with or without
    classifier-free guidance.

    classifier: (x (B, c, h, w), t (B,)) -> scores (B, n) or (B, n, h, w); labels: (B,) or (B, h, w) int64.
    """

    def __init__(self, classifier: Any, labels: Tensor, scale: float = 1.0) -> None:
        self.classifier, self.labels, self.scale = classifier, labels, scale

    def modify_score(self, model: Any, e_t: Tensor, x: Tensor, t: Tensor, c: Any = None) -> Tensor:
        """The noise to use in the place of `e_t` (B, c, h, w), the noise that the model sees in x (B, c, h, w) at t (B,)."""
        if len(self.labels) != len(x):
            raise ValueError(f"classifier guidance has {len(self.labels)} labels for {len(x)} samples")
        if self.scale == 0.0:
            return e_t
        return e_t - self.scale * (_sigma(model, t) * self.gradient(x, t)).to(e_t)

    def gradient(self, x: Tensor, t: Tensor) -> Tensor:
        """grad_x log p(labels | x_t), (B, c, h, w); summed over the pixels of segmentation maps."""
        with torch.enable_grad():
            x = x.detach().float().requires_grad_(True)
            log_p = F.log_softmax(self.classifier(x, t).float(), dim=1)
            chosen = log_p.gather(1, self.labels.to(x.device)[:, None])
            return torch.autograd.grad(chosen.sum(), x)[0]


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Share of labels (B, ...) among the k highest scores (B, n, ...)."""
    best = scores.topk(k, dim=1).indices
    return (best == labels[:, None]).any(dim=1).float().mean()


def _sigma(model: Any, t: Tensor) -> Tensor:
    """Noise scale at t (B,), (B, 1, 1, 1); between whole timesteps the logarithm of alphas_cumprod is interpolated."""
    log_alpha = model.alphas_cumprod.to(t.device).clamp(min=1e-8).log()  # a schedule may end in pure noise
    position = t.float().clamp(0, len(log_alpha) - 1)
    low = position.floor().long()
    high = (low + 1).clamp(max=len(log_alpha) - 1)
    return (
        (1 - torch.lerp(log_alpha[low], log_alpha[high], position - low).exp())
        .clamp(min=0.0)
        .sqrt()[:, None, None, None]
    )


def _read_diffusion(path: str) -> tuple[Any, Path | None]:
    """The config of a diffusion model and, for the folder of a run, its newest usable checkpoint."""
    place = Path(path)
    if place.is_file():
        config, weights = place, None
    else:
        projects = sorted((place / "configs").glob("*-project.yaml"))  # their names begin with the time
        if not projects:
            raise ValueError(
                f"diffusion_path {path!r}: neither a YAML file nor a run's folder with configs/*-project.yaml"
            )
        config, weights = projects[-1], find_checkpoint(place)
    config = load_yaml(config)
    if "model" not in config:
        raise ValueError(f"diffusion_path {path!r}: the YAML has no `model`")
    return config.model, weights


def _label_key_of(model: Any) -> str:
    """The key that a class-conditional or segmentation model reads; ValueError for others."""
    if getattr(getattr(model, "model", None), "conditioning_key", None) is None:
        raise ValueError(
            "label_key: the diffusion model is unconditional, so say which key of the batch holds the labels"
        )
    return model.cond_stage_key
