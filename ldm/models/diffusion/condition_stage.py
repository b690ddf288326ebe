"""The condition of a latent diffusion model: from a batch's values to what the network takes, and its "no condition"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.diffusion.conditioning import condition_batch_size, main_part, map_main, map_tensors, route
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.modules import ClassEmbedder


class ConditionStage:
    """Mixin of LatentDiffusion. The main condition comes from `cond_stage_model` and `cond_stage_key`; further parts join it:

    concat_keys: pictures and masks of the batch that become more channels of the network's input, in this order, after the main condition
    where that is channels too. They are brought to the latent's size (nearest), but for `masked_image_key`, which the first stage encodes.
    adm_key: labels of the batch that join the timestep's embedding, for crossattn-adm and hybrid-adm.

    Further parts are never dropped and are the same on both sides of guidance: "no condition" is about the main one.
    """

    cond_stage_model: nn.Module | None
    cond_stage_forward: str | None
    concat_keys: tuple[str, ...]
    masked_image_key: str | None
    adm_key: str | None
    model: Any
    device: torch.device
    batch_value: Callable[..., Any]
    get_pictures: Callable[..., Tensor]
    encode_first_stage: Callable[..., Any]
    get_first_stage_encoding: Callable[..., Tensor]

    def set_further_parts(self, concat_keys: Sequence[str], masked_image_key: str | None, adm_key: str | None) -> None:
        """Keep the batch keys of further parts; ValueError where the conditioning key has no place for them."""
        key = self.model.conditioning_key
        needs, main = route(key).needs, main_part(key)
        if concat_keys and "c_concat" not in needs:
            raise ValueError(
                f"concat_keys {list(concat_keys)}: conditioning_key {key!r} has no channels to join; concat or hybrid has"
            )
        if adm_key is not None and ("c_adm" not in needs or main == "c_adm"):
            raise ValueError(
                f"adm_key {adm_key!r}: conditioning_key {key!r} takes no labels beside its condition; crossattn-adm does"
            )
        self.concat_keys, self.masked_image_key, self.adm_key = tuple(concat_keys), masked_image_key, adm_key

    @property
    def has_further_parts(self) -> bool:
        return bool(self.concat_keys) or self.adm_key is not None

    def get_learned_conditioning(self, c: Any) -> Any:
        """The condition stage's output for its raw input: text (list of B strings) -> (B, L, D), and so on."""
        stage = self.cond_stage_model
        if self.cond_stage_forward is not None:
            return getattr(stage, self.cond_stage_forward)(c)
        c = stage.encode(c) if callable(getattr(stage, "encode", None)) else stage(c)
        return c.mode() if isinstance(c, DiagonalGaussianDistribution) else c

    def map_main_condition(self, f: Callable[[Any], Any], c: Any) -> Any:
        """`c` with `f` applied to its main condition; further parts stay."""
        return map_main(f, c, self.model.conditioning_key) if self.has_further_parts else f(c)

    def further_parts(self, batch: Mapping[str, Any], size: Sequence[int], bs: int | None = None) -> dict[str, Any]:
        """What joins the main condition of a batch for latents of `size` (h, w): {"c_concat": [...], "c_adm": ...}, often nothing."""
        parts: dict[str, Any] = {}
        channels = []
        for key in self.concat_keys:
            x = self.get_pictures(batch, key, bs)
            encoded = key == self.masked_image_key
            channels.append(
                self.get_first_stage_encoding(self.encode_first_stage(x))
                if encoded
                else F.interpolate(x, size=tuple(size))
            )
        if channels:
            parts["c_concat"] = channels
        if self.adm_key is not None:
            parts["c_adm"] = self._on_device(self.batch_value(batch, self.adm_key)[:bs])
        return parts

    def raw_condition(self, batch: Mapping[str, Any], key: str, bs: int | None = None) -> Any:
        """The condition as its encoder takes it: {key: labels}, list of strings, pictures (B, C, H, W), or a tensor as it is.

        Such tensors are labels, tokens, and vectors (B, L, D) to attend to.
        """
        if isinstance(self.cond_stage_model, ClassEmbedder):
            key = self.cond_stage_model.key if key not in batch else key
            return {self.cond_stage_model.key: self.batch_value(batch, key)[:bs].to(self.device)}
        value = self.batch_value(batch, key)
        if torch.is_tensor(value):
            vectors = (
                main_part(self.model.conditioning_key) == "c_crossattn"
            )  # (B, L, D), where maps would be (B, H, W)
            if value.ndim == 4 or (value.ndim == 3 and value.is_floating_point() and not vectors):
                return self.get_pictures(batch, key, bs)
            return value[:bs].to(self.device)
        return list(value)[:bs]

    # ---------------------------------------------------------------------------------------------------- no condition

    def get_unconditional_conditioning(self, batch_size: int, null_label: Any = None) -> Any:
        """The encoded "no condition" of `batch_size` samples, for guidance; `null_label` is a raw input to use instead.

        A `null_label` for one sample (a text, say) serves all; ValueError where it is for another number.
        """
        if self.cond_stage_model is None:
            return None
        if null_label is None:
            null_label = self._unconditional_input(batch_size)
        null_label = [null_label] if isinstance(null_label, str) else null_label
        c = self.get_learned_conditioning(self._on_device(null_label))
        size = condition_batch_size(c)
        if size == 1 and batch_size > 1:
            return map_tensors(
                lambda leaf: leaf.expand(batch_size, *leaf.shape[1:]) if torch.is_tensor(leaf) else leaf, c
            )
        if size is not None and size != batch_size:
            raise ValueError(f"null_label is for {size} samples: give it for one or for all {batch_size}")
        return c

    def unconditional_like(self, c: Any, raw_c: Any, batch_size: int, null_label: Any = None) -> Any:
        """The encoded "no condition" in the form of the encoded condition `c` of raw input `raw_c`: what guidance sets against it."""
        if self.cond_stage_model is None:
            return None
        raw_null = self.no_condition_like(raw_c, batch_size) if null_label is None else null_label
        null = self.get_unconditional_conditioning(batch_size, raw_null)
        return self.map_main_condition(lambda _: null, c)

    def no_condition_like(self, raw_c: Any, batch_size: int) -> Any:
        """The raw input that means "no condition", in the form of `raw_c`."""
        if torch.is_tensor(raw_c) and raw_c.is_floating_point():
            return torch.zeros_like(raw_c)  # pictures and maps: an empty one
        return self._on_device(self._unconditional_input(batch_size))

    def _unconditional_input(self, batch_size: int) -> Any:
        if hasattr(self.cond_stage_model, "unconditional_input"):
            return self.cond_stage_model.unconditional_input(batch_size)
        classes = getattr(self.model.diffusion_model, "num_classes", None)
        if main_part(self.model.conditioning_key) == "c_adm" and isinstance(classes, int):
            # The network has the table of classes: the last one means none, as in ClassEmbedder.
            return torch.full((batch_size,), classes - 1, device=self.device)
        name = type(self.cond_stage_model).__name__
        raise ValueError(
            f"{name} has no input that means 'no condition': set cond_dropout 0, sample at scale 1 or pass null_label"
        )

    def _on_device(self, value: Any) -> Any:
        if torch.is_tensor(value):
            return value.to(self.device)
        if isinstance(value, Mapping):
            return {key: self._on_device(item) for key, item in value.items()}
        return value
