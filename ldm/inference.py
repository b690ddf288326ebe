"""One pipeline for all sampling scripts: checks before anything heavy is loaded, the model, conditions, latents, pictures.

A script reads `model_facts` off the YAML and checks its `Settings` against them (ldm.settings), gets a `Pipeline` from `load_model` and
writes the pictures that `text_to_image` yields through `ldm.pictures.Output`. Importing this module imports neither torch nor Lightning.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.commandline import in_checkout
from ldm.pictures import Picture
from ldm.settings import SAMPLERS, ModelFacts, Settings, batches_of, check_takes_text, model_facts, read_config, value_at

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

PRECISIONS = ("autocast", "full")


# ------------------------------------------------------------------------------------------------------- device, precision


def choose_device(name: str = "auto") -> torch.device:
    """`auto`: CUDA, then MPS, then the CPU; any other name must be a device that is there, else ValueError with those that are."""
    import torch

    there = [f"cuda:{k}" for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    there += ["mps"] if torch.backends.mps.is_available() else []
    there += ["cpu"]
    wanted = there[0] if name == "auto" else "cuda:0" if name == "cuda" else name
    if wanted not in there:
        raise ValueError(f"--device {name}: not on this machine; choose auto, {', '.join(there)}")
    return torch.device(wanted)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype that `precision` computes convolutions and products in; None is plain float32.

    `autocast` is half precision on a GPU as published, and bfloat16 on a CPU that has instructions for it; weights stay float32.
    `auto` is what suits the device, which today is the same.
    """
    import torch

    if precision not in (*PRECISIONS, "auto"):
        raise ValueError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}")
    if precision == "full":
        return None
    if device.type != "cpu":
        return torch.float16
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if can.get("amx_bf16") or can.get("avx512_bf16") else None


# --------------------------------------------------------------------------------------------------------------- the model


class Pipeline:
    """A model that is ready to draw, with all that does not change from picture to picture.

    identity: what the metadata says of the model: config, checkpoint, version.
    """

    def __init__(self, model: Any, facts: ModelFacts, device: torch.device, dtype: torch.dtype | None, identity: Mapping[str, Any]) -> None:
        self.model, self.facts, self.device, self.dtype, self.identity = model, facts, device, dtype, identity

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within it the model draws: no gradients, averaged weights where it keeps both, the precision that was chosen."""
        import torch

        with torch.no_grad(), self.model.ema_scope(), self._autocast():
            yield

    def _autocast(self) -> AbstractContextManager[Any]:
        import torch

        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, dtype=self.dtype)

    def encode_prompts(self, prompts: Sequence[str], negative_prompt: str = "", scale: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """Conditions of the prompts and, where guidance needs it (scale other than 1), of as many negative prompts."""
        uncond = self.model.get_learned_conditioning([negative_prompt] * len(prompts)) if scale != 1.0 else None
        return self.model.get_learned_conditioning(list(prompts)), uncond

    def sampler(self, name: str) -> Any:
        """A sampler over this model, by its name in SAMPLERS."""
        module, _, cls = SAMPLERS[name].rpartition(".")
        return getattr(importlib.import_module(module), cls)(self.model)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, c, h, w) -> float32 pictures (B, 3, H, W) in [-1, 1]; again in float32 where half precision overflows."""
        import torch

        if not torch.isfinite(z).all():
            raise ValueError("sampling gave values that are not finite; try --precision full, another sampler or more steps")
        x = self.model.decode_first_stage(z).float()
        if self.dtype is not None and not torch.isfinite(x).all():
            logger.info("the first stage overflows in %s: decoding in float32", self.dtype)
            with torch.autocast(self.device.type, enabled=False):
                x = self.model.decode_first_stage(z.float())
        if not torch.isfinite(x).all():
            raise ValueError("the first stage gave values that are not finite: are these the weights of this config?")
        return x.clamp(-1.0, 1.0)


def load_model(
    config: str | Path | Mapping[str, Any],
    ckpt: str | Path,
    device: str = "auto",
    precision: str = "autocast",
    use_ema: bool | None = None,
) -> Pipeline:
    """The model of a YAML with the weights of a file, ready to draw.

    It is built without initializing a weight and filled from the memory-mapped file; nothing is downloaded that the file holds.
    use_ema: draw with the file's averaged weights (as the published scripts do where the config keeps an average: the default, None)
        or with the trained ones. Raises ValueError or OSError in one line for what the user can mend.
    """
    from omegaconf import OmegaConf

    from ldm.checkpoint import CheckpointError, ensure_weights, load_weights, read_weights
    from ldm.util import instantiate_from_config

    start = time.perf_counter()
    name = str(config) if isinstance(config, (str, Path)) else None
    config = read_config(config) if name is not None else OmegaConf.create(dict(config))
    facts = model_facts(config)
    use_ema = facts.use_ema if use_ema is None else use_ema
    where = choose_device(device)
    dtype = autocast_dtype(precision, where)

    weights = read_weights(ckpt)
    config = for_inference(config, set(weights))
    with weights_on_meta():
        model = instantiate_from_config(config.model)
    ignore_keys = rounded_tables(model, weights)
    del weights                                                             # old formats are read into memory, which should not hold two
    load_weights(model, ckpt, ignore_keys, use_ema=use_ema)
    ensure_weights(model)
    absent = [key for key, tensor in model.named_parameters() if tensor.is_meta]
    if absent:
        raise CheckpointError(f"{ckpt}: lacks {len(absent)} weights of this model ({', '.join(absent[:3])}, ...); is the config its own?")
    model = model.requires_grad_(False).eval().to(where)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    numbers = "float32" if dtype is None else f"autocast to {str(dtype).removeprefix('torch.')}"
    logger.info("model ready in %.1f s: %.1f M parameters on %s, %s", time.perf_counter() - start, millions, where, numbers)
    identity = {**identify(ckpt, name), "use_ema": use_ema, "precision": precision, "device": where.type}
    return Pipeline(model, facts, where, dtype, identity)


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
                stage.pop("learn_logvar", None)                             # a number of the loss
    return config


def rounded_tables(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Tables of the noise schedule that a half-precision file holds: there the first alphas_cumprod are 1, which divides by zero.

    They follow from the config, so that the model's own float32 ones are right.
    """
    own = {name for name, buffer in model.named_buffers() if buffer.shape == (getattr(model, "num_timesteps", None),)}
    return [name for name in own & weights.keys() if weights[name].itemsize < 4]


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Within it every new Parameter takes no memory and its initialization no time; buffers are made for real."""
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def to_meta(module: nn.Module, name: str, parameter: Tensor | None) -> Tensor | None:
        if parameter is None or parameter.is_meta:
            return None
        return torch.nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


def identify(ckpt: str | Path, config: str | Path | None = None) -> dict[str, Any]:
    """What tells this model from another: version, files, the size of the weights, fingerprints of both."""
    from ldm import __version__

    return {
        "version": __version__,
        "ckpt": in_checkout(ckpt),
        "ckpt_bytes": Path(ckpt).stat().st_size,
        "ckpt_fingerprint": fingerprint(ckpt),
        "config": None if config is None else in_checkout(config),
        "config_fingerprint": None if config is None else fingerprint(config),
    }


def fingerprint(path: str | Path, pieces: int = 64, piece: int = 16384) -> str:
    """16 hex digits of the SHA-256 of 64 pieces that are spread over a file, all of it where it is small: no second for 4 GB."""
    import hashlib

    size, digest = Path(path).stat().st_size, hashlib.sha256()
    with Path(path).open("rb") as file:
        for k in range(pieces):
            file.seek(k * max(0, size - piece) // (pieces - 1))
            digest.update(file.read(piece))
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------- drawing


class Randomness:
    """Torch's random numbers of one run: seeded at its start, continued batch after batch, whatever the caller draws in between."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self._states: list[Tensor] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within it torch's generators are the run's; afterwards they are the caller's again."""
        import torch

        outside = self._read()
        if self._states is None:
            torch.manual_seed(self.seed)                                    # of every device, as seed_everything does
        else:
            self._write(self._states)
        try:
            yield
            self._states = self._read()
        finally:
            self._write(outside)

    def _read(self) -> list[Tensor]:
        import torch

        states = [torch.get_rng_state()]
        if self.device.type != "cpu":
            states.append(getattr(torch, self.device.type).get_rng_state(self.device))
        return states

    def _write(self, states: Sequence[Tensor]) -> None:
        import torch

        torch.set_rng_state(states[0])
        if self.device.type != "cpu":
            getattr(torch, self.device.type).set_rng_state(states[1], self.device)


def text_to_image(pipeline: Pipeline, prompts: str | Sequence[str], settings: Settings, progress: bool = True) -> Iterator[Picture]:
    """Draw `settings.n_iter` times: `n_samples` pictures of the one prompt, or one of each prompt of a list, `n_samples` at a time.

    Noise is drawn as published (first the fixed code, then batch after batch), so that a seed gives the published picture.
    """
    import torch
    from tqdm import tqdm

    settings = settings.checked(pipeline.facts)
    check_takes_text(pipeline.facts)
    n_prompts = 1 if isinstance(prompts, str) else len(prompts)             # fixes the sizes of the batches, and so the noise
    batches = batches_of(prompts, settings.n_samples) * settings.n_iter
    shape, device = settings.latent_shape, pipeline.device
    sampler, randomness, start, index = pipeline.sampler(settings.sampler), Randomness(settings.seed, device), None, 0
    bar = tqdm(total=len(batches) * settings.steps, desc="drawing", unit="step", disable=not progress)
    for number, batch in enumerate(batches):
        with randomness(), pipeline.drawing():
            if settings.fixed_code and start is None:
                start = torch.randn((settings.n_samples, *shape), device=device)
            cond, uncond = pipeline.encode_prompts(batch, settings.negative_prompt, settings.scale)
            z, _ = sampler.sample(
                S=settings.steps,
                batch_size=len(batch),
                shape=shape,
                conditioning=cond,
                eta=settings.eta,
                x_T=start[: len(batch)] if start is not None else None,
                unconditional_guidance_scale=settings.scale,
                unconditional_conditioning=uncond,
                callback=lambda i: bar.update(),
                log_every_t=settings.steps + 1,
                verbose=False,
            )
            images = pipeline.decode(z)
        for k, picture in enumerate(finished(images, batch, pipeline, settings)):
            position = {"image_index": index, "batch_index": number, "index_in_batch": k, "batch_size": len(batch), "n_prompts": n_prompts}
            yield Picture(picture.image, {"task": "txt2img", **picture.info, **position})
            index += 1
    bar.close()


def finished(images: Tensor, prompts: Sequence[str], pipeline: Pipeline, settings: Settings) -> Iterator[Picture]:
    """Pictures of one batch (B, 3, H, W) in [-1, 1], each with its prompt, the settings and the model's identity."""
    from ldm.data.image import from_tensor

    for image, prompt in zip(images, prompts, strict=True):
        yield Picture(from_tensor(image), {"prompt": prompt, **asdict(settings), **pipeline.identity})
