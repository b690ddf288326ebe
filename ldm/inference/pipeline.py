"""A model that is ready for sampling: its device, its precision, its weights, and its identity for the metadata."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, MutableSet, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast
from weakref import WeakSet

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ldm import __version__, cli
from ldm.checkpoint import (
    CheckpointError,
    WeightsSource,
    ensure_weights,
    load_weights,
    open_weights,
    weights_on_meta,
)
from ldm.cli import collector_off
from ldm.config.instantiate import instantiate_from_config, value_at
from ldm.config.model_info import ModelInfo, model_info, read_model_info
from ldm.data.image import to_array
from ldm.inference.embeddings import add_tokens, read_tokens
from ldm.inference.lora import add_live, merged, read_adapters, split_adapter
from ldm.inference.memory import decoded_at_once
from ldm.inference.offload import in_use, keep_on_cpu, move_rest, offloaded_stages
from ldm.inference.precision import cast_weights, choose_device, resolve_precision
from ldm.inference.quantize import check_quantization, quantize_weights
from ldm.inference.settings import LORA_MODES, Request, check_offload, embedding_text, lora_text, require
from ldm.machine.allocator import keep_freed_memory, return_kept_memory
from ldm.models.diffusion.compile import compile_for_sampling
from ldm.models.diffusion.deep_cache import deep_cache
from ldm.models.diffusion.samplers.denoiser import DiffusionModel
from ldm.models.diffusion.samplers.noise import PUBLISHED_NOISE, NoiseSource
from ldm.models.diffusion.samplers.registry import make_sampler
from ldm.modules.adapters.lora import networks_of
from ldm.modules.dtype import is_quantized, weights_dtype
from ldm.modules.prepacked import prepack
from ldm.modules.token_merging import token_merging
from ldm.paths import fingerprint, in_checkout

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)

Watch = Callable[[Tensor, int], None]
"""Called after each sampling step with the predicted x_0 (B, c, h, w) and the step's number; raises to stop the run."""


class GenerativeModel(DiffusionModel, Protocol):
    """The members that tasks use of a model besides sampling. Models in pixel space have no first stage."""

    cond_stage_model: Any

    def ema_scope(self) -> AbstractContextManager[None]: ...

    def get_learned_conditioning(self, c: Any, /) -> Any: ...

    def encode_first_stage(self, x: Tensor, /) -> Any: ...

    def get_first_stage_encoding(self, posterior: Any, /) -> Tensor: ...

    def decode_first_stage(self, z: Tensor, /) -> Tensor: ...


class Conditioned(NamedTuple):
    """Conditioning of a batch, the callback after each sampling step, and what the latents keep."""

    cond: Any = None
    uncond: Any = None  # None without guidance
    scale: float = 1.0
    callback: Callable[[int], Any] | None = None
    mask: Tensor | None = None  # (1, 1, h, w), 1 where the latents keep x0
    x0: Tensor | None = None  # (B, c, h, w)
    image_scale: float = 1.0  # guidance by the image in c_concat


class Pipeline:
    """A model that is ready for sampling, and everything that does not change from image to image.

    dtype: of convolutions and matrix products under autocast; None: the weights'.
    identity: metadata of the model: config, checkpoint, version, precision.
    moved: networks that wait on the CPU while a stage works; empty without `--offload all`.
    """

    def __init__(
        self,
        model: GenerativeModel,
        info: ModelInfo,
        device: torch.device,
        dtype: torch.dtype | None,
        identity: Mapping[str, Any],
        moved: MutableSet[nn.Module] | None = None,
    ) -> None:
        self.model, self.info, self.device, self.dtype, self.identity = model, info, device, dtype, identity
        self.moved: MutableSet[nn.Module] = set() if moved is None else moved
        self.watch: Watch | None = None

    def watched(self, watch: Watch) -> Pipeline:
        """The pipeline, whose runs call `watch` after each step."""
        changed = copy(self)
        changed.watch = watch
        return changed

    def with_model(self, model: Any) -> Pipeline:
        """The pipeline with another model in its place, e.g. one that works in tiles."""
        changed = copy(self)
        changed.model = cast(GenerativeModel, model)
        return changed

    @contextmanager
    def sampling(self, request: Request | None = None) -> Iterator[None]:
        """Context without gradients, with the EMA weights of a model that keeps both, in the pipeline's precision.

        With a request, the context of one batch, in which the network saves the work that `deep_cache` and
        `token_merging` of the request allow.
        """
        autocast = nullcontext() if self.dtype is None else torch.autocast(self.device.type, dtype=self.dtype)
        with torch.no_grad(), self.model.ema_scope(), autocast, ExitStack() as stack:
            if request is not None and (request.deep_cache > 1 or request.token_merging > 0.0):
                unet = cast(Any, self.model).model.diffusion_model
                stack.enter_context(deep_cache(unet, request.deep_cache))
                stack.enter_context(token_merging(unet, request.token_merging))
            yield

    def encode_prompts(
        self, prompts: Sequence[str], negative_prompt: str = "", guided: bool = False
    ) -> tuple[Any, Any]:
        """(cond, uncond) of the prompts; uncond is None unless `guided`."""
        uncond = self.model.get_learned_conditioning([negative_prompt] * len(prompts)) if guided else None
        return self.model.get_learned_conditioning(list(prompts)), uncond

    def sample(
        self,
        request: Request,
        shape: Sequence[int],
        given: Conditioned,
        noise: NoiseSource = PUBLISHED_NOISE,
        x_T: Tensor | None = None,
    ) -> Tensor:
        """Latents of `shape` (B, c, h, w) by the sampler of a checked request; `x_T` replaces the initial noise."""
        assert request.steps is not None
        with self.large_enough(shape[2:]):
            z, _ = make_sampler(request.sampler, self.model).sample(
                S=request.steps,
                batch_size=shape[0],
                shape=shape[1:],
                conditioning=given.cond,
                eta=request.eta,
                x_T=x_T,
                unconditional_guidance_scale=given.scale,
                unconditional_conditioning=given.uncond,
                image_guidance_scale=given.image_scale,
                callback=given.callback,
                img_callback=self.watch,
                mask=given.mask,
                x0=given.x0,
                log_every_t=request.steps + 1,
                verbose=False,
                noise_source=noise,
                ddim_discretize=request.spacing,
                **request.prediction_options,
            )
        return z

    @contextmanager
    def large_enough(self, size: Sequence[int]) -> Iterator[None]:
        """Context in which a latent of `size` (h, w) that is too small for the network is an error with pixel sizes."""
        try:
            yield
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):  # GroupNorm's, of one cell and one channel
                raise
            (height, width), factor, least = size, self.info.factor or 1, self.info.latent_multiple
            raise ValueError(
                f"{width * factor}x{height * factor} pixels are too few for this model, whose deepest level would have "
                f"one cell; the nearest size is {2 * least * factor}x{least * factor}"
            ) from error

    def tensor(self, image: Image.Image) -> Tensor:
        """An image as (1, 3, H, W) float32 in [-1, 1] on the model's device."""
        return torch.from_numpy(to_array(image)).permute(2, 0, 1)[None].contiguous().to(self.device)

    def encode(self, x: Tensor) -> Any:
        """Images (B, 3, H, W) in [-1, 1] -> the first stage's posterior or latents."""
        with in_use(getattr(self.model, "first_stage_model", None)):
            return self.model.encode_first_stage(x)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, c, h, w) -> float32 images (B, 3, H, W) in [-1, 1].

        Latents are decoded in smaller batches if memory does not suffice for all at once.
        If half precision overflows, the first stage is cast to float32 for good and decodes again.
        """
        if not torch.isfinite(z).all():
            raise ValueError(f"sampling gave non-finite values; {self._why_not_finite()}")
        if not hasattr(self.model, "decode_first_stage"):  # diffusion in pixel space
            return z.float().clamp(-1.0, 1.0)
        stage: nn.Module | None = getattr(self.model, "first_stage_model", None)
        return_kept_memory()  # of the network's activations
        with in_use(stage):
            x = self._decode(z, stage)
        if not torch.isfinite(x).all():
            raise ValueError(f"the first stage gave non-finite values; {self._why_not_finite()}")
        return x.clamp(-1.0, 1.0)

    def _decode(self, z: Tensor, stage: nn.Module | None) -> Tensor:
        latents = z.split(decoded_at_once(self.model, z, self.dtype))
        x = torch.cat([self.model.decode_first_stage(part).float() for part in latents])
        used = self.dtype or (weights_dtype(stage) if stage is not None else None)
        if used in HALF and not torch.isfinite(x).all():
            logger.info("the first stage overflows in %s: decoding in float32", used)
            if stage is not None:
                stage.float()
            with torch.autocast(self.device.type, enabled=False):
                latents = z.float().split(decoded_at_once(self.model, z, torch.float32))
                x = torch.cat([self.model.decode_first_stage(part) for part in latents])
        return x

    def _why_not_finite(self) -> str:
        """The first weight that is not finite, or advice. Checked only here: reading every weight takes seconds."""
        state = cast(nn.Module, self.model).state_dict()
        state = {key: x for key, x in state.items() if x.is_floating_point() and not is_quantized(x)}
        bad = [key for key, x in state.items() if not torch.isfinite(x).all()]
        if bad:
            more = f" and {len(bad) - 1} more keys" if len(bad) > 1 else ""
            return f"the weights of {self.identity.get('ckpt')} are not finite: {bad[0]}{more}; use an undamaged file"
        half = self.dtype in HALF or any(x.dtype in HALF for x in state.values())
        advice = "try --precision full" if half else "try another sampler, more steps or a smaller --scale"
        added = {"lora": "a smaller strength of --lora", "embedding": "no --embedding"}
        return ", or ".join([advice, *(text for name, text in added.items() if self.identity.get(name))])


def progress_bar(total: int, progress: bool = True, leave: bool = True) -> tqdm:
    return tqdm(total=total, desc="sampling", unit="step", leave=leave, disable=not progress or total == 0)


def load_model(
    config: ModelInfo | str | Path | Mapping[str, Any],
    ckpt: str | Path | WeightsSource,
    device: str = "auto",
    precision: str = "auto",
    use_ema: bool | None = None,
    lora: Sequence[tuple[str | Path, float]] = (),
    lora_mode: str = LORA_MODES[0],
    embeddings: Sequence[tuple[str | Path, str | None]] = (),
    quantize: str | None = None,
    offload: str | None = None,
    compiler: str | None = None,
) -> Pipeline:
    """Load the model of a YAML with the weights of a file or a diffusers folder, ready for sampling.

    The model is built on the meta device and its weights stay memory-mapped; a cast that `precision` requires is done
    tensor by tensor. Nothing is downloaded that the file holds.
    use_ema: use the EMA weights; None: if the config keeps an EMA, as the published scripts do.
    lora: (file or folder, strength) of each LoRA; lora_mode: merged into the weights, or live: left apart.
    embeddings: (file, token) of each textual inversion; None for the token's own names, see `read_tokens`.
    quantize: int8, fp8 or int4 weights of linear layers, see ldm.inference.quantize; None: as `precision` says.
    compiler: backend of torch.compile for the network, which its first call then compiles, see compile_for_sampling.
    offload: text, vae or all: stages that wait on the CPU while they are not in use; needs a CUDA device.
    Raises ValueError or OSError, with the next step, for files that do not fit.
    """
    start = time.perf_counter()
    if isinstance(config, (str, Path)):
        config = read_model_info(config)
    info = config if isinstance(config, ModelInfo) else model_info(OmegaConf.create(dict(config)))
    use_ema = info.use_ema if use_ema is None else use_ema
    where = choose_device(device)
    chosen = resolve_precision(precision, where)
    require(lora_mode in LORA_MODES, f"lora_mode {lora_mode!r}: choose one of {', '.join(LORA_MODES)}")
    if quantize is not None:
        check_quantization(quantize, where, precision)
    if offload is not None:
        check_offload(offload, where.type, compiler)
    source = open_weights(ckpt)
    source.check(info.config)
    weights, trained = split_adapter(source.path, source.tensors(), info.config, use_ema)
    with collector_off(), weights_on_meta():
        model = instantiate_from_config(for_inference(info.config, set(weights)).model)
    stages = [] if offload is None else offloaded_stages(model, offload)
    tokens = read_tokens(embeddings)
    files = [(Path(path), strength) for path, strength in lora]
    adapters = [*trained, *(read_adapters(files, model, info.config) if files else [])]
    if lora_mode == "merged":
        weights = merged(weights, adapters, chosen.weights)
    cast_weights(model, chosen.weights, channels_last=where.type == "cpu" and chosen.weights != torch.float32)
    load_weights(model, source, use_ema=use_ema and not trained, weights=weights)
    del weights  # the mapped file stays open for the model alone
    ensure_weights(model)
    missing = [key for key, tensor in model.named_parameters() if tensor.is_meta]
    if missing:
        raise CheckpointError(
            f"{source.path}: {len(missing)} weights are missing ({', '.join(missing[:3])}, ...); "
            "does this config match the checkpoint?"
        )
    model = model.requires_grad_(False).eval()
    move_rest(model, stages, where)
    add_tokens(model.cond_stage_model, tokens)
    if lora_mode == "live":
        add_live(model, adapters)
    control = [model.control_model] if hasattr(model, "control_model") else []
    moved = WeakSet([model.model, *control] if offload == "all" else [])  # a ControlNet joins while it is in use
    keep_on_cpu(stages, moved, where)
    if quantize is not None:
        quantize_weights([*networks_of(model).values(), *control], quantize)
    if compiler is not None:
        compile_for_sampling(model.get_submodule("model.diffusion_model"), compiler, where.type)
    if where.type == "cpu" and cli.only_samples:  # a program of this project: nothing else reads weights or memory
        prepack(model)
        keep_freed_memory(large=True)
    del adapters
    seconds, millions = time.perf_counter() - start, sum(p.numel() for p in model.parameters()) / 1e6
    logger.info("model ready in %.1f s: %.1f M parameters on %s, precision %s", seconds, millions, where, chosen)
    used: dict[str, Any] = {
        "use_ema": use_ema,
        "device": where.type,
        "precision": precision,
        "precision_used": chosen.name,
    }
    used |= {name: value for name, value in (("quantize", quantize), ("compile", compiler)) if value is not None}
    if files or trained:
        used["lora_mode"] = lora_mode
    if files:
        used["lora"] = [lora_text(*file) for file in files]
        used |= {"lora_fingerprint": [fingerprint(path) for path, _ in files]}
    if embeddings:
        used["embedding"] = [embedding_text(Path(path), token) for path, token in embeddings]
        used["embedding_fingerprint"] = [fingerprint(path) for path, _ in embeddings]
    return Pipeline(model, info, where, chosen.autocast, {**identify(source, info.path), **used}, moved)


def for_inference(config: Mapping[str, Any], names: set[str]) -> DictConfig:
    """Copy a config without what only training needs, for a weights file with these keys.

    Drops the EMA (the chosen weights are loaded into the network), the adapter (which is added as other LoRAs are), the
    first stage's loss, and the `ckpt_path` of parts that the file holds.
    """
    inference = OmegaConf.create(OmegaConf.to_container(cast(DictConfig, config), resolve=True))
    assert isinstance(inference, DictConfig)
    params = inference.model.setdefault("params", {})
    with open_dict(inference):
        params.use_ema = False
        for name in ("ckpt_path", "adapters", "optimizer_config", "ema_config"):
            params.pop(name, None)
        for block in ("first_stage", "cond_stage"):
            stage = value_at(params, f"{block}_config", "params")
            if stage is None or not any(name.startswith(f"{block}_model.") for name in names):
                continue
            stage.pop("ckpt_path", None)
            if "lossconfig" in stage:
                stage.lossconfig = {"target": "torch.nn.Identity"}
                stage.pop("learn_logvar", None)  # a parameter of the loss
    return inference


def identify(source: WeightsSource, config: str | Path | None = None) -> dict[str, Any]:
    """Metadata that identify a model: version, files, size of the weights, fingerprints."""
    return {
        "version": __version__,
        "ckpt": in_checkout(source.path),
        "ckpt_bytes": source.size,
        "ckpt_fingerprint": source.fingerprint,
        "config": None if config is None else in_checkout(config),
        "config_fingerprint": None if config is None else fingerprint(config),
    }
