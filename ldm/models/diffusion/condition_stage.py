"""Conditions of latent diffusion models: from batch values to network inputs, and the unconditional condition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.diffusion.conditioning import condition_batch_size, main_part, map_main, map_tensors, route
from ldm.models.frozen import FrozenIn16Bits
from ldm.models.training import TrainedModule
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.modules import ClassEmbedder


class ConditionStage(TrainedModule):
    """Mixin of LatentDiffusion. `cond_stage_model` encodes the main condition, `cond_stage_key` of the batch.

    Further parts join it:
    concat_keys: images and masks of the batch, concatenated to the channels of the network's input in this order, after
        a main condition of channels. They are resized to the latent (nearest), except `masked_image_key`, which the
        first stage encodes.
    adm_key: labels of the batch that are added to the timestep embedding, for crossattn-adm and hybrid-adm.
    A subclass adds parts of other names in `further_parts`.

    Further parts are the same in both halves of guidance and are not dropped, unless a subclass does in `drop_further`.
    """

    cond_stage_model: Any  # any module with `encode` or `forward`
    cond_stage_forward: str | None
    cond_dropout: float
    concat_keys: tuple[str, ...]
    masked_image_key: str | None
    adm_key: str | None
    model: Any
    stages_in_16_bits: Sequence[FrozenIn16Bits] = ()  # while it trains
    latents_of: Callable[[Tensor], Tensor]

    def set_further_parts(self, concat_keys: Sequence[str], masked_image_key: str | None, adm_key: str | None) -> None:
        """Keep the batch keys of further parts. Raises ValueError if the conditioning key does not take them."""
        key = self.model.conditioning_key
        needs, main = route(key).needs, main_part(key)
        if concat_keys and "c_concat" not in needs:
            raise ValueError(
                f"concat_keys {list(concat_keys)}: conditioning_key {key!r} takes no channels; use concat or hybrid"
            )
        if adm_key is not None and ("c_adm" not in needs or main == "c_adm"):
            raise ValueError(
                f"adm_key {adm_key!r}: conditioning_key {key!r} takes no further labels; use crossattn-adm"
            )
        self.concat_keys, self.masked_image_key, self.adm_key = tuple(concat_keys), masked_image_key, adm_key

    def get_learned_conditioning(self, c: Any) -> Any:
        """Encode a raw condition, e.g. a list of B texts -> (B, L, D)."""
        stage = self.cond_stage_model
        if self.cond_stage_forward is not None:
            c = getattr(stage, self.cond_stage_forward)(c)
        else:
            c = stage.encode(c) if callable(getattr(stage, "encode", None)) else stage(c)
            c = c.mode() if isinstance(c, DiagonalGaussianDistribution) else c
        if not self.stages_in_16_bits:
            return c
        return map_tensors(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, c)

    def encode_distinct(self, c: Any) -> Any:
        """Encode a raw condition like `get_learned_conditioning`, but each distinct text of a list once.

        For frozen encoders: the captions that were dropped, and those that templates repeat, cost one pass. Adapters in
        training get every text: each has its own dropout.
        """
        adapters = getattr(self, "adapters", None)
        adapted = self.training and adapters is not None and any(key.startswith("text.") for key in adapters.layers())
        if adapted or not (isinstance(c, list) and all(isinstance(text, str) for text in c)):
            return self.get_learned_conditioning(c)
        rows = {text: row for row, text in enumerate(dict.fromkeys(c))}
        encoded = self.get_learned_conditioning(list(rows))
        if len(rows) == len(c):
            return encoded
        index = torch.tensor([rows[text] for text in c])
        return map_tensors(lambda tensor: tensor[index.to(tensor.device, non_blocking=True)], encoded)

    def map_main_condition(self, f: Callable[[Any], Any], c: Any) -> Any:
        """Apply `f` to the main condition of `c`, composed or alone; further parts stay."""
        key = self.model.conditioning_key
        return map_main(f, dict(c), key) if isinstance(c, Mapping) and main_part(key) in c else f(c)

    def further_parts(self, batch: Mapping[str, Any], size: Sequence[int], bs: int | None = None) -> dict[str, Any]:
        """Return the further parts for latents of `size` (h, w): {"c_concat": [...], "c_adm": ...}, or {}."""
        parts: dict[str, Any] = {}
        for key in self.concat_keys:
            x = self.get_images(batch, key, bs)
            x = self.latents_of(x) if key == self.masked_image_key else F.interpolate(x, size=tuple(size))
            parts.setdefault("c_concat", []).append(x)
        return parts | self.adm_part(batch, bs)

    def adm_part(self, batch: Mapping[str, Any], bs: int | None = None) -> dict[str, Any]:
        if self.adm_key is None:
            return {}
        return {"c_adm": self._on_device(self.batch_value(batch, self.adm_key)[:bs])}

    def drops_main(self, chance: Tensor) -> Tensor:
        """Return which samples of a training batch lose their main condition; chance: uniform in [0, 1), (B,)."""
        return chance < self.cond_dropout

    def drop_further(self, parts: dict[str, Any], chance: Tensor) -> dict[str, Any]:
        """Return the further parts of a training batch after dropping, by the same numbers as in `drops_main`."""
        return parts

    def raw_condition(self, batch: Mapping[str, Any], key: str, bs: int | None = None) -> Any:
        """Return the condition in the form its encoder takes.

        {key: labels}, a list of strings, images (B, C, H, W), or the tensor itself: labels, tokens, vectors (B, L, D).
        """
        if isinstance(self.cond_stage_model, ClassEmbedder):
            key = self.cond_stage_model.key if key not in batch else key
            return {self.cond_stage_model.key: self.batch_value(batch, key)[:bs].to(self.device)}
        value = self.batch_value(batch, key)
        if not torch.is_tensor(value):
            return list(value)[:bs]
        # A float tensor with three axes is (B, L, D) if the network attends to it, else maps (B, H, W).
        maps = value.is_floating_point() and main_part(self.model.conditioning_key) != "c_crossattn"
        if value.ndim == 4 or (value.ndim == 3 and maps):
            return self.get_images(batch, key, bs)
        return value[:bs].to(self.device)

    def get_unconditional_conditioning(self, batch_size: int, null_label: Any = None) -> Any:
        """Encode the unconditional condition of `batch_size` samples; `null_label` is a raw input to use instead.

        A `null_label` of one sample (a text, say) serves all. Raises ValueError if it is for another number.
        """
        if self.cond_stage_model is None:
            return None
        if null_label is None:
            null_label = self._unconditional_input(batch_size)
        null_label = [null_label] if isinstance(null_label, str) else null_label
        c = self.get_learned_conditioning(self._on_device(null_label))
        size = condition_batch_size(c)
        if size == 1 and batch_size > 1:
            return map_tensors(lambda tensor: tensor.expand(batch_size, *tensor.shape[1:]), c)
        if size is not None and size != batch_size:
            raise ValueError(f"null_label is for {size} samples: pass one, or one for each of the {batch_size}")
        return c

    def unconditional_like(self, c: Any, raw_c: Any, batch_size: int, null_label: Any = None) -> Any:
        """Encode the unconditional condition in the form of the encoded condition `c` of raw input `raw_c`."""
        if self.cond_stage_model is None:
            return None
        if null_label is None and torch.is_tensor(raw_c) and raw_c.is_floating_point():
            null_label = self.unconditional_input_like(raw_c, batch_size)
        # ControlNet's override takes the number alone.
        labels = () if null_label is None else (null_label,)
        null = self.get_unconditional_conditioning(batch_size, *labels)
        return self.map_main_condition(lambda _: null, c)

    def unconditional_input_like(self, raw_c: Any, batch_size: int) -> Any:
        """Return the raw unconditional input in the form of `raw_c`: zeros for images and maps."""
        if torch.is_tensor(raw_c) and raw_c.is_floating_point():
            return torch.zeros_like(raw_c)
        return self._on_device(self._unconditional_input(batch_size))

    def _unconditional_input(self, batch_size: int) -> Any:
        if hasattr(self.cond_stage_model, "unconditional_input"):
            return self.cond_stage_model.unconditional_input(batch_size)
        classes = getattr(self.model.diffusion_model, "num_classes", None)
        if main_part(self.model.conditioning_key) == "c_adm" and isinstance(classes, int):
            # The class embedding is in the network: its last class means none, as in ClassEmbedder.
            return torch.full((batch_size,), classes - 1, device=self.device)
        name = type(self.cond_stage_model).__name__
        raise ValueError(
            f"{name} has no unconditional input: set cond_dropout 0, sample at guidance scale 1 or pass null_label"
        )

    def _on_device(self, value: Any) -> Any:
        return map_tensors(lambda tensor: tensor.to(self.device), value)


def drop_condition(raw: Any, null: Any, dropped: Tensor) -> Any:
    """Replace the samples of `raw` where `dropped` (B,) is true by those of `null`, which has the same form.

    Takes lists of B items (texts), tensors (B, ...), and dicts of both (Ho & Salimans 2022, algorithm 1, line 3).
    """
    if isinstance(raw, Mapping):
        return {key: drop_condition(value, null[key], dropped) if key in null else value for key, value in raw.items()}
    if torch.is_tensor(raw):
        return torch.where(dropped.to(raw.device).reshape(-1, *(1 for _ in raw.shape[1:])), null.to(raw.dtype), raw)
    return [empty if drop else item for item, empty, drop in zip(raw, null, dropped.tolist(), strict=True)]
