"""A model that is ready to draw: its device, its precision, its weights, and what tells it from another."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config.model_info import ModelInfo, model_info, read_config, value_at
from ldm.inference.precision import cast_weights, choose_device, resolve_precision
from ldm.models.diffusion.samplers.registry import make_sampler
from ldm.paths import fingerprint, in_checkout

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig
    from PIL import Image
    from torch import Tensor

    from ldm.checkpoint import WeightsSource
    from ldm.models.diffusion.samplers.base import Sampler

logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------------------- the model


class Pipeline:
    """A model that is ready to draw, with all that does not change from picture to picture.

    dtype: what convolutions and products are computed in under autocast; None: in the dtype of the weights.
    identity: what the metadata says of the model: config, checkpoint, version, precision.
    """

    def __init__(
        self,
        model: Any,
        info: ModelInfo,
        device: torch.device,
        dtype: torch.dtype | None,
        identity: Mapping[str, Any],
    ) -> None:
        self.model, self.info, self.device, self.dtype, self.identity = model, info, device, dtype, identity

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within it the model draws: no gradients, averaged weights where it keeps both, the precision that was chosen."""
        import torch

        with torch.no_grad(), self.model.ema_scope(), self._autocast():
            yield

    def _autocast(self) -> AbstractContextManager[Any]:
        import torch

        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, dtype=self.dtype)

    def encode_prompts(
        self, prompts: Sequence[str], negative_prompt: str = "", scale: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Conditions of the prompts and, where guidance needs it (scale other than 1), of as many negative prompts."""
        uncond = self.model.get_learned_conditioning([negative_prompt] * len(prompts)) if scale != 1.0 else None
        return self.model.get_learned_conditioning(list(prompts)), uncond

    def sampler(self, name: str) -> Sampler:
        """A sampler over this model, by its name in ldm.models.diffusion.samplers.registry."""
        return make_sampler(name, self.model)

    def tensor(self, image: Image.Image) -> Tensor:
        """A picture as (1, 3, H, W) float32 in [-1, 1] on the model's device."""
        import torch

        from ldm.data.image import to_array

        return torch.from_numpy(to_array(image)).permute(2, 0, 1)[None].contiguous().to(self.device)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, c, h, w) -> float32 pictures (B, 3, H, W) in [-1, 1].

        Where half precision overflows, the first stage decodes again in float32, and its weights stay so.
        """
        import torch

        from ldm.modules.dtype import weights_dtype

        if not torch.isfinite(z).all():
            raise ValueError(
                "sampling gave values that are not finite; try --precision full, another sampler or more steps"
            )
        if not hasattr(self.model, "decode_first_stage"):  # diffusion of the pictures themselves
            return z.float().clamp(-1.0, 1.0)
        x = self.model.decode_first_stage(z).float()
        stage = getattr(self.model, "first_stage_model", None)
        used = self.dtype or (weights_dtype(stage) if stage is not None else None)
        if used in (torch.float16, torch.bfloat16) and not torch.isfinite(x).all():
            logger.info("the first stage overflows in %s: decoding in float32", used)
            if stage is not None:
                stage.float()
            with torch.autocast(self.device.type, enabled=False):
                x = self.model.decode_first_stage(z.float())
        if not torch.isfinite(x).all():
            raise ValueError("the first stage gave values that are not finite: are these the weights of this config?")
        return x.clamp(-1.0, 1.0)


def load_model(
    config: str | Path | Mapping[str, Any],
    ckpt: str | Path | WeightsSource,
    device: str = "auto",
    precision: str = "auto",
    use_ema: bool | None = None,
) -> Pipeline:
    """The model of a YAML with the weights of a file, ready to draw.

    It is built without initializing a weight and filled from the memory-mapped file, tensor by tensor where that holds other numbers than
    `precision` asks for; nothing is downloaded that the file holds.
    use_ema: draw with the file's averaged weights (as the published scripts do where the config keeps an average: the default, None)
        or with the trained ones. Raises ValueError or OSError in one line for what the user can mend.
    """
    import torch
    from omegaconf import OmegaConf

    from ldm.checkpoint import CheckpointError, ensure_weights, load_weights, open_weights, weights_on_meta
    from ldm.config.instantiate import instantiate_from_config
    from ldm.cli import import_lightning

    start = time.perf_counter()
    import_lightning()  # models are its modules
    name = str(config) if isinstance(config, (str, Path)) else None
    config = read_config(config) if name is not None else OmegaConf.create(dict(config))
    info = model_info(config)
    use_ema = info.use_ema if use_ema is None else use_ema
    where = choose_device(device)
    numbers = resolve_precision(precision, where)
    source = open_weights(ckpt)
    source.check(config)
    weights = source.tensors()  # memory-mapped, except for old formats
    config = for_inference(config, set(weights))
    with weights_on_meta():
        model = instantiate_from_config(config.model)
    cast_weights(model, numbers.weights, channels_last=where.type == "cpu" and numbers.weights != torch.float32)
    load_weights(model, source, use_ema=use_ema, weights=weights)
    del weights  # they stay mapped where the model uses them
    ensure_weights(model)
    absent = [key for key, tensor in model.named_parameters() if tensor.is_meta]
    if absent:
        raise CheckpointError(
            f"{source.path}: lacks {len(absent)} weights of this model ({', '.join(absent[:3])}, ...); is the config its own?"
        )
    model = model.requires_grad_(False).eval().to(where)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    logger.info(
        "model ready in %.1f s: %.1f M parameters on %s, precision %s",
        time.perf_counter() - start,
        millions,
        where,
        numbers,
    )
    identity = {
        **identify(source, name),
        "use_ema": use_ema,
        "device": where.type,
        "precision": precision,
        "precision_used": numbers.name,
    }
    return Pipeline(model, info, where, numbers.autocast, identity)


def for_inference(config: DictConfig, names: set[str]) -> DictConfig:
    """A copy of `config` without what only training needs, given the names that the weights file holds.

    No moving average beside the weights (the chosen ones are loaded in their place), no training loss of the first stage, and no
    weights of a part read from a file of its own (`ckpt_path`) where this file holds them.
    """
    from omegaconf import OmegaConf, open_dict

    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    params = config.model.setdefault("params", {})
    with open_dict(config):
        params.use_ema = False
        params.pop("ckpt_path", None)
        for block in ("first_stage", "cond_stage"):
            stage = value_at(params, f"{block}_config", "params")
            if stage is None or not any(name.startswith(f"{block}_model.") for name in names):
                continue
            stage.pop("ckpt_path", None)
            if "lossconfig" in stage:
                stage.lossconfig = {"target": "torch.nn.Identity"}
                stage.pop("learn_logvar", None)  # a number of the loss
    return config


def identify(source: WeightsSource, config: str | Path | None = None) -> dict[str, Any]:
    """The model's part of the metadata: version, files, size of the weights, fingerprints of both."""
    from ldm import __version__

    return {
        "version": __version__,
        "ckpt": in_checkout(source.path),
        "ckpt_bytes": source.size,
        "ckpt_fingerprint": source.fingerprint,
        "config": None if config is None else in_checkout(config),
        "config_fingerprint": None if config is None else fingerprint(config),
    }
