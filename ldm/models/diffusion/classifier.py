"""Classifier of noisy latents, and guidance by it (LDM, arXiv 2112.10752, appendix C; ADM, arXiv 2105.05233)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint.resume import find_checkpoint
from ldm.config.files import load_yaml
from ldm.config.instantiate import accepted_params, instantiate_from_config
from ldm.config.types import NonNegativeFloat, PositiveInt
from ldm.models.diffusion.compile import compile_network
from ldm.models.diffusion.ddpm import LatentDiffusion, require_weights
from ldm.models.diffusion.gaussian_diffusion import GaussianDiffusion
from ldm.models.diffusion.image_log import tile_frames
from ldm.models.training import Losses, TrainedModule, fixed_noise, freeze
from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, UNetModel
from ldm.util import log_txt_as_img
from ldm.visualize import labels_to_rgb

SEGMENTATION = "segmentation"


class NoisyLatentImageClassifier(TrainedModule):
    """p(label | x_t): the contracting half of a diffusion model's UNet with a head, trained on its noisy latents.

    diffusion_path: the diffusion model's YAML, or the folder of a run (its newest project YAML and last checkpoint).
    diffusion_ckpt_path: that model's weights; without them its first stage would be random.
    num_classes, label_key: of the labels `batch[label_key]`, by default the key that the model is conditioned on.
        `segmentation` maps label every pixel: a whole UNet then returns scores (B, num_classes, h, w).
    pool: head of the network: adaptive, attention, spatial or spatial_v2.
    log_steps: number of noise levels at which validation logs the accuracy.
    """

    key_settings = "label_key of the classifier or first_stage_key of the diffusion model"

    def __init__(
        self,
        diffusion_path: str | Path,
        num_classes: PositiveInt,
        *,
        pool: str = "attention",
        label_key: str | None = None,
        diffusion_ckpt_path: str | Path | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        weight_decay: NonNegativeFloat = 1e-2,
        log_steps: PositiveInt = 10,
        monitor: str | None = "val/loss",
        **weights: Any,
    ) -> None:
        super().__init__(**weights)
        config, found = _read_diffusion(diffusion_path)
        diffusion_weights = diffusion_ckpt_path or found
        first_stage = config.params.get("first_stage_config")
        if diffusion_weights is not None and first_stage is not None and first_stage.get("params"):
            first_stage.params.ckpt_path = None  # its weights are in the same file
        self.diffusion_model: Any = instantiate_from_config(config)
        if diffusion_weights is not None:
            self.diffusion_model.init_from_ckpt(diffusion_weights)
        freeze(self.diffusion_model)
        self.label_key = label_key or _label_key_of(self.diffusion_model)
        self.num_classes, self.monitor, self.scheduler_config = num_classes, monitor, scheduler_config
        self.optimizer_options = {"weight_decay": weight_decay}
        T = self.diffusion_model.num_timesteps
        if not 1 <= log_steps <= T:
            raise ValueError(f"log_steps {log_steps}: choose 1 to {T}")
        self.log_times = list(range(0, T, max(1, T // log_steps)))
        self.model = self._build_classifier(config.params.unet_config.params, pool)

    def _build_classifier(self, unet: Mapping[str, Any], pool: str) -> nn.Module:
        """Build the network for the labels, in the shape of the denoising UNet."""
        whole = self.label_key == SEGMENTATION
        network: type[nn.Module] = UNetModel if whole else EncoderUNetModel
        accepted, _ = accepted_params(network) or ((), ())
        conditions = ("use_spatial_transformer", "context_dim", "num_classes", "n_embed")  # a whole UNet's own
        left_out = conditions if whole else ()
        params = {name: value for name, value in unet.items() if name in accepted and name not in left_out}
        params |= {
            "in_channels": unet["out_channels"],
            "out_channels": self.num_classes,
            "image_size": self.diffusion_model.image_size,
        }
        return network(**params) if whole else network(**params, pool=pool)

    def compile_network(self, backend: str) -> None:
        compile_network(self.model, backend)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not getattr(self.diffusion_model, "untrained_first_stage", False):
            require_weights(
                getattr(self.diffusion_model, "first_stage_model", None),
                "the diffusion model's first stage",
                "set model.params.diffusion_path to the folder of its run, or model.params.diffusion_ckpt_path to its "
                "weights",
            )

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss, logs = self.shared_step(batch)
        self.log_training(loss, logs, self.diffusion_model.batch_size_of(batch))
        return loss

    def shared_step(self, batch: Mapping[str, Any], t: Tensor | None = None) -> Losses:
        """Return the cross-entropy of a batch at timesteps t (B,), random if None, and its named logs."""
        x = self.get_latents(batch)
        t = self.diffusion_model.random_timesteps(len(x)) if t is None else t
        return self.losses(x, self.get_labels(batch, x.shape[2:]), t)

    @torch.no_grad()
    def get_latents(self, batch: Mapping[str, Any], bs: int | None = None) -> Tensor:
        """Return clean scaled latents (B, c, h, w) of a batch; images for a model in pixel space."""
        x = self.diffusion_model.get_images(batch, self.diffusion_model.first_stage_key, bs)
        return self.diffusion_model.latents_of(x) if isinstance(self.diffusion_model, LatentDiffusion) else x

    def get_labels(self, batch: Mapping[str, Any], size: Sequence[int], bs: int | None = None) -> Tensor:
        """Return labels (B,) int64, or (B, h, w) for segmentation maps, which are resized to `size` (h, w)."""
        labels = torch.as_tensor(self.batch_value(batch, self.label_key), device=self.device)[:bs]
        if self.label_key == SEGMENTATION:
            labels = labels.argmax(dim=-1) if labels.ndim == 4 else labels  # (B, H, W, C) one-hot -> (B, H, W)
            labels = F.interpolate(labels[:, None].float(), size=tuple(size)).squeeze(1)
        if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            low, high = int(labels.min()), int(labels.max())
            raise ValueError(f"{self.label_key}: labels from {low} to {high}, but num_classes is {self.num_classes}")
        return labels.long()

    def losses(self, x: Tensor, labels: Tensor, t: Tensor) -> Losses:
        """Return the cross-entropy of clean latents x (B, c, h, w), noised to t (B,), with labels (B,) or (B, h, w)."""
        scores = self(self.diffusion_model.q_sample(x, t), t)
        loss = F.cross_entropy(scores, labels)
        prefix = "train" if self.training else "val"
        logs = {f"{prefix}/loss": loss.detach(), f"{prefix}/acc@1": top_k_accuracy(scores, labels, 1)}
        if self.num_classes > 5:
            logs[f"{prefix}/acc@5"] = top_k_accuracy(scores, labels, 5)
        return loss, logs

    def forward(self, x_noisy: Tensor, t: Tensor) -> Tensor:
        """Scores of the classes at x_noisy (B, c, h, w) and t (B,) -> (B, num_classes[, h, w])."""
        return self.model(x_noisy, t)

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss at noise levels that are the same each time, and the accuracy at each of `log_steps` levels."""
        size = self.diffusion_model.batch_size_of(batch)
        with fixed_noise(batch_idx, self.device):
            x = self.get_latents(batch)
            labels = self.get_labels(batch, x.shape[2:])
            _, logs = self.losses(x, labels, self.diffusion_model.random_timesteps(size))
            for step in self.log_times:
                _, at_t = self.losses(x, labels, torch.full((size,), step, device=self.device))
                logs[f"val/acc@1_t{step:04d}"] = at_t["val/acc@1"]
        self.log_validation(logs, size)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, split: str = "train") -> dict[str, Tensor]:
        """Return `inputs`, `labels`, `predictions` and decoded `noisy` latents, a row per sample, as (B, C, H, W)."""
        model = self.diffusion_model
        x, z = model.get_images(batch, model.first_stage_key, N), self.get_latents(batch, N)
        labels = self.get_labels(batch, z.shape[2:], N)
        times = [torch.full((len(z),), step, device=self.device) for step in self.log_times]
        noisy = [model.q_sample(z, t) for t in times]
        scores = [self(z_t, t) for z_t, t in zip(noisy, times)]
        decode = getattr(model, "decode_first_stage", lambda latents: latents)
        log = {"inputs": x, "noisy": tile_frames([decode(z_t) for z_t in noisy])}
        if labels.ndim > 1:
            log["labels"] = labels_to_rgb(labels, self.num_classes)
            log["predictions"] = tile_frames([labels_to_rgb(s) for s in scores])
            return log
        size = (max(x.shape[3], 128), max(x.shape[2], 128))
        names = list(batch.get("human_label") or map(str, labels.tolist()))[: len(x)]
        best = [[f"t={t}: {k}" for t, k in zip(self.log_times, row)] for row in _best_classes(scores)]
        log["labels"] = log_txt_as_img(size, names)
        log["predictions"] = log_txt_as_img(size, ["\n".join(lines) for lines in best])
        return log


def _best_classes(scores: Sequence[Tensor]) -> list[list[int]]:
    """Best class of each sample at each noise level, for scores (B, n) of each level."""
    return torch.stack([s.argmax(dim=1) for s in scores], dim=1).tolist()


class ClassifierGuidance:
    """Guidance of samples to labels: eps - scale * sigma_t * grad_x log p(label | x_t)  (ADM, algorithm 2).

    Pass it to any sampler: `sample(..., score_corrector=ClassifierGuidance(classifier, labels, scale))`, with or
    without classifier-free guidance.

    classifier: (x (B, c, h, w), t (B,)) -> scores (B, n) or (B, n, h, w); labels: (B,) or (B, h, w) int64.
    """

    def __init__(self, classifier: Callable[[Tensor, Tensor], Tensor], labels: Tensor, scale: float = 1.0) -> None:
        self.classifier, self.labels, self.scale = classifier, labels, scale

    def modify_score(self, model: GaussianDiffusion, e_t: Tensor, x: Tensor, t: Tensor, c: Any = None) -> Tensor:
        """Return the guided noise for `e_t` (B, c, h, w), the noise predicted in x (B, c, h, w) at t (B,)."""
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
    """Fraction of labels (B, ...) among the k highest scores (B, n, ...)."""
    best = scores.topk(k, dim=1).indices
    return (best == labels[:, None]).any(dim=1).float().mean()


def _sigma(model: GaussianDiffusion, t: Tensor) -> Tensor:
    """Noise scale at t (B,), (B, 1, 1, 1); the logarithm of alphas_cumprod is interpolated between timesteps."""
    log_alpha = model.alphas_cumprod.to(t.device).clamp(min=1e-8).log()  # a schedule may end in pure noise
    position = t.float().clamp(0, len(log_alpha) - 1)
    low = position.floor().long()
    high = (low + 1).clamp(max=len(log_alpha) - 1)
    variance = 1 - torch.lerp(log_alpha[low], log_alpha[high], position - low).exp()
    return variance.clamp(min=0.0).sqrt()[:, None, None, None]


def _read_diffusion(path: str | Path) -> tuple[Any, Path | None]:
    """Return the config of a diffusion model and, for the folder of a run, its newest usable checkpoint."""
    file, weights = Path(path), None
    if not file.is_file():
        projects = sorted((file / "configs").glob("*-project.yaml"))  # their names begin with the time
        if not projects:
            raise ValueError(
                f"diffusion_path {path!r}: expected a YAML file or a run folder with configs/*-project.yaml"
            )
        file, weights = projects[-1], find_checkpoint(file)
    config = load_yaml(file)
    if "model" not in config:
        raise ValueError(f"diffusion_path {path!r}: the YAML has no `model`")
    return config.model, weights


def _label_key_of(model: Any) -> str:
    """Return the batch key that a class-conditional or segmentation model reads. Raises ValueError for others."""
    if getattr(getattr(model, "model", None), "conditioning_key", None) is None:
        raise ValueError(
            "label_key is not set, and the diffusion model is unconditional: name the batch key of the labels"
        )
    return model.cond_stage_key
