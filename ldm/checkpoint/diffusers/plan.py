"""The components of a model of our YAML in diffusers' layout. Nothing is built or read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.checkpoint.diffusers import text
from ldm.checkpoint.diffusers.controlnet import ControlNetLayout
from ldm.checkpoint.diffusers.first_stage import KL, VQ, StageLayout
from ldm.checkpoint.diffusers.rules import ConversionError
from ldm.checkpoint.diffusers.scheduler import scheduler_config
from ldm.checkpoint.diffusers.text import TextLayout
from ldm.checkpoint.diffusers.unet import CROSS, PLAIN, UNetLayout
from ldm.config.instantiate import FIRST_STAGE_AS_CONDITION, UNCONDITIONAL, value_at

UNET, STAGE, CONDITION, CONTROL = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "control_model."
CLASS_FILE, CONDITION_FILE = "class_embedder.safetensors", "condition_encoder.safetensors"
Layout = UNetLayout | StageLayout | TextLayout | ControlNetLayout


@dataclass(frozen=True)
class Component:
    """A part of a model; `params` are those of its YAML."""

    folder: str  # empty for a model of one part
    prefix: str  # of its tensors' published names
    layout: Layout
    config: dict[str, Any]  # diffusers' config.json
    params: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder or self.config["_class_name"]

    @property
    def weights_name(self) -> str:
        return "model.safetensors" if isinstance(self.layout, TextLayout) else "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Plan:
    """A model in diffusers' layout."""

    components: tuple[Component, ...]
    pipeline: str | None = None  # None if no pipeline class of diffusers supports the model
    scheduler: dict[str, Any] | None = None
    condition_file: str | None = None  # for weights of a condition stage that diffusers lacks
    shared_condition: bool = False  # the first stage is also the condition stage
    scale_factor: float | None = None  # of the YAML; None if training measures it
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> TextLayout | None:
        return next((part.layout for part in self.components if isinstance(part.layout, TextLayout)), None)

    def model_index(self) -> dict[str, Any] | None:
        """model_index.json, from which diffusers builds the pipeline."""
        if self.pipeline is None or self.scheduler is None:
            return None
        index: dict[str, Any] = {"_class_name": self.pipeline}
        models = [part for part in self.components if not isinstance(part.layout, TextLayout)]
        index |= {part.folder: ["diffusers", part.config["_class_name"]] for part in models}
        index["scheduler"] = ["diffusers", self.scheduler["_class_name"]]
        if self.text is not None:
            index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
            index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
            index["requires_safety_checker"] = False
        return index


def plan_of(config: Mapping[str, Any], scheduler: str = "ddim", scale_factor: float | None = None) -> Plan:
    """The plan for a config (with its key `model`) of a diffusion model, a first stage, or a ControlLDM's control.

    scheduler: ddim or pndm; scale_factor: as measured by training, instead of the YAML's.
    Raises ConversionError for a model that diffusers does not support.
    """
    params = config["model"].get("params") or {}
    if "ddconfig" in params:
        return Plan((_stage("", "", params, 1.0),))
    if "control_stage_config" in params:
        return Plan((_control(params),))
    if "unet_config" not in params:
        target = config["model"].get("target")
        raise ConversionError(f"{target}: neither a diffusion model (unet_config) nor a first stage (ddconfig)")
    given = None if params.get("scale_by_std") else float(params.get("scale_factor", 1.0))
    unet = UNetLayout.from_params(value_at(params, "unet_config", "params") or {})
    parts = [Component("unet", UNET, unet, unet.config(params.get("image_size", 256)), params["unet_config"]["params"])]
    condition = params.get("cond_stage_config") or UNCONDITIONAL
    stage_params = value_at(params, "first_stage_config", "params")
    if value_at(stage_params, "ddconfig") is not None:
        folder = "vqvae" if "n_embed" in stage_params or condition == UNCONDITIONAL or unet.kind == PLAIN else "vae"
        parts.append(_stage(folder, STAGE, stage_params, scale_factor or given or 1.0))
    kind = str(value_at(condition, "target")).rpartition(".")[2] if isinstance(condition, Mapping) else condition
    if kind in text.PREFIX:
        text_params = value_at(condition, "params") or {}
        layout = TextLayout.from_params(kind, text_params)
        parts.append(Component("text_encoder", text.PREFIX[kind], layout, layout.config(), text_params))
    has_file = kind not in (*text.PREFIX, UNCONDITIONAL, FIRST_STAGE_AS_CONDITION, "Identity")
    return Plan(
        tuple(parts),
        pipeline=_pipeline(params, parts, kind),
        scheduler=scheduler_config(params, scheduler),
        condition_file=(CLASS_FILE if kind == "ClassEmbedder" else CONDITION_FILE) if has_file else None,
        shared_condition=kind == FIRST_STAGE_AS_CONDITION,
        scale_factor=given,
        params=params,
    )


def _stage(folder: str, prefix: str, params: Mapping[str, Any], scale_factor: float) -> Component:
    layout = StageLayout.from_params(VQ if "n_embed" in params else KL, params)
    return Component(folder, prefix, layout, layout.config(params["ddconfig"]["resolution"], scale_factor), params)


def _control(params: Mapping[str, Any]) -> Component:
    own = value_at(params, "control_stage_config", "params") or {}
    layout = ControlNetLayout.from_params(own)
    return Component("", CONTROL, layout, layout.config(bool(params.get("global_average_pooling"))), own)


def _pipeline(params: Mapping[str, Any], parts: list[Component], condition: str) -> str | None:
    """The pipeline class of diffusers that generates the same images from these parts; None if there is none."""
    unet, channels = parts[0].layout, int(params.get("channels", 3))
    assert isinstance(unet, UNetLayout)
    stage = next((part.layout.kind for part in parts if isinstance(part.layout, StageLayout)), None)
    extra = unet.in_channels - channels
    if unet.kind == PLAIN and condition == UNCONDITIONAL and not extra:
        return "LDMPipeline" if stage else "DDIMPipeline"
    if unet.kind == PLAIN and condition == "Identity" and stage == VQ and extra == 3:
        return "LDMSuperResolutionPipeline"
    if unet.kind == CROSS and condition in text.PREFIX and stage == KL and unet.classes is None:
        pipelines = {0: "Pipeline", channels: "InstructPix2PixPipeline", channels + 1: "InpaintPipeline"}
        return f"StableDiffusion{pipelines[extra]}" if extra in pipelines else None
    return None
