"""Stable Diffusion v1 with random weights at three sizes: one file, loaded here and by diffusers."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baseline import diffusers_pipeline
from ldm.atomic import save_text
from ldm.checkpoint import weights_on_meta, write_weights
from ldm.checkpoint.diffusers.files import as_json
from ldm.checkpoint.diffusers.plan import plan_of
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_info import ModelInfo, read_model_info
from ldm.convert.convert import tokenizer_files
from ldm.inference.pipeline import load_model
from ldm.models.diffusion.compile import compile_for_sampling
from ldm.paths import ROOT

CONFIG = ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_UNET, _STAGE = "model.params.unet_config.params.", "model.params.first_stage_config.params.ddconfig."
_TEXT = "model.params.cond_stage_config.params.text_config="


@dataclass(frozen=True)
class Size:
    """A size of the model: the side of its images in pixels, and changes of the published config."""

    side: int
    overrides: tuple[str, ...] = ()


SIZES = {
    "full": Size(512),
    "small": Size(
        256,
        (
            f"{_UNET}model_channels=128",
            f"{_UNET}context_dim=128",
            f"{_STAGE}ch=32",
            f"{_TEXT}{{hidden_size: 128, intermediate_size: 512, num_hidden_layers: 4, num_attention_heads: 4}}",
        ),
    ),
    "tiny": Size(
        64,
        (
            f"{_UNET}model_channels=32",
            f"{_UNET}num_heads=2",
            f"{_UNET}channel_mult=[1,2]",
            f"{_UNET}attention_resolutions=[1]",
            f"{_UNET}num_res_blocks=1",
            f"{_UNET}context_dim=32",
            f"{_STAGE}ch=32",
            f"{_STAGE}ch_mult=[1,1,1,1]",
            f"{_STAGE}num_res_blocks=1",
            f"{_TEXT}{{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4}}",
        ),
    ),
}


@dataclass
class Models:
    """The model at one size on one device, for both sides, kept in one precision at a time."""

    size: str
    device: torch.device
    folder: Path  # of the files that both sides load
    _loaded: dict[str, Any] = field(default_factory=dict)
    _setting: tuple[str, bool] | None = None

    @property
    def side(self) -> int:
        return SIZES[self.size].side

    @property
    def overrides(self) -> tuple[str, ...]:
        """Changes of the published config."""
        return SIZES[self.size].overrides

    @cached_property
    def config(self) -> Path:
        """The YAML of this size."""
        from omegaconf import OmegaConf

        path = self.folder / f"sd-v1-{self.size}.yaml"
        info = read_model_info(CONFIG, self.overrides)
        save_text(path, OmegaConf.to_yaml(OmegaConf.create({"model": dict(info.config["model"])})))
        return path

    @cached_property
    def info(self) -> ModelInfo:
        return read_model_info(self.config)

    @property
    def file(self) -> Path:
        return self.weights(".safetensors")

    def weights(self, suffix: str) -> Path:
        """The random weights: float16 in .safetensors (2.1 GB), float32 in .ckpt. An earlier run's file is used."""
        path = self.folder / f"sd-v1-{self.size}{suffix}"
        if not path.is_file():
            dtype = torch.float16 if suffix == ".safetensors" else torch.float32
            write_weights(random_weights(self.info.config, dtype), path)
        return path

    @cached_property
    def diffusers_config(self) -> Path:
        """A folder of diffusers' configs and tokenizer, from which `from_single_file` takes what the file lacks."""
        plan, folder = plan_of(self.info.config), self.folder / f"diffusers-{self.size}"
        files: dict[str, Any] = {f"{part.folder}/config.json": part.config for part in plan.components}
        files |= {f"tokenizer/{name}": content for name, content in tokenizer_files("FrozenCLIPEmbedder").items()}
        files |= {"scheduler/scheduler_config.json": plan.scheduler, "model_index.json": plan.model_index()}
        for name, content in files.items():
            save_text(folder / name, content if isinstance(content, str) else as_json(content))
        return folder

    def ours(self, precision: str, compiled: bool = False) -> Any:
        """Our pipeline."""
        return self._pair("ours", precision, compiled)

    def theirs(self, precision: str, compiled: bool = False) -> Any:
        """diffusers' pipeline, with the same weights."""
        return self._pair("theirs", precision, compiled)

    def _pair(self, who: str, precision: str, compiled: bool) -> Any:
        """A side, loaded when it is asked for first; both leave when another precision is asked for."""
        if self._setting != (precision, compiled):
            self.release()
            self._setting = precision, compiled
        if who not in self._loaded:
            compiler = "inductor" if compiled else None
            if who == "ours":
                named = "full" if precision == "fp32" else precision
                loaded: Any = load_model(self.config, self.file, str(self.device), named, compiler=compiler)
            else:
                loaded = self.diffusers(precision)
                if compiler:
                    compile_for_sampling(loaded.unet, compiler, self.device.type)
            self._loaded[who] = loaded
        return self._loaded[who]

    def diffusers(self, precision: str) -> Any:
        return diffusers_pipeline(str(self.file), str(self.diffusers_config), str(self.device), precision)

    def release(self) -> None:
        """Free the memory of both sides."""
        self._loaded.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def random_weights(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return weights of the config's model that preserve the scale of their input; norms are the identity."""
    with weights_on_meta():
        model = instantiate_from_config(config["model"])
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta:
            weights[name] = tensor
        elif tensor.ndim < 2:
            weights[name] = (torch.zeros if name.endswith("bias") else torch.ones)(tensor.shape, dtype=dtype)
        else:
            weights[name] = (torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5).to(dtype)
    return weights
