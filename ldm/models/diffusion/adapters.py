"""Training of adapters on a frozen base: its checkpoints hold the adapters, and path and fingerprint of the base."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import CheckpointError, ensure_weights
from ldm.checkpoint.diffusers.embeddings import write_embedding
from ldm.checkpoint.diffusers.lora import RUN_FILE, LoraNames, LoraTensors, write_lora
from ldm.checkpoint.formats import read_entry
from ldm.checkpoint.names import EMA, LORA, TOKENS, use_ema_weights
from ldm.checkpoint.source import BaseWeights, base_of
from ldm.models.training import TrainedModule, freeze
from ldm.modules.adapters.lora import Adapters, LoRASpec, adaptable, inject, networks_of
from ldm.modules.adapters.token_embeddings import NewToken, initial_vectors
from ldm.modules.encoders.base import CLIPTokensEncoder
from ldm.modules.encoders.tokenizers import is_word

logger = logging.getLogger(__name__)


class AdapterTraining(TrainedModule):
    """Mixin of LatentDiffusion, which may train adapters alone: LoRA layers, vectors of new tokens.

    `freeze_base` freezes what exists; the parameters that are added after it are the adapters. `ckpt_path` is the base:
    its EMA weights if it has any, as sampling uses them. A checkpoint of the run holds the adapters and `base`.
    """

    cond_stage_model: Any
    model: Any
    base: BaseWeights | None = None
    trains_adapters = False
    adapters: Adapters | None
    new_tokens: Sequence[NewToken] = ()
    cond_stage_key: Any
    raw_condition: Callable[..., Any]
    _checked_prompts = False

    def freeze_base(self) -> None:
        """Disable the gradients of all parameters that exist now, and keep their modules in eval mode."""
        self.requires_grad_(False)
        for child in self.children():
            freeze(child)
        self.trains_adapters = True

    def new_lora(self, section: Mapping[str, Any], config: Mapping[str, Any]) -> Adapters:
        """Add the layers of the section `adapters`; `config` describes the model, for the names in files."""
        self._config = config
        return inject(networks_of(self), LoRASpec(**section))

    @property
    def alpha(self) -> float | None:
        """The alpha of the LoRA layers; None without them."""
        return None if self.adapters is None else next(iter(self.adapters.layers().values())).alpha

    def averaged_module(self) -> nn.Module:
        return self if self.trains_adapters else super().averaged_module()

    def add_tokens(self, section: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Add the trained tokens of `token_embeddings`: one, or a list; `start_adapters` initializes them."""
        sections = [section] if isinstance(section, Mapping) else section
        self.new_tokens = [NewToken(**each) for each in sections]
        self._check_file_names()
        encoder = self.cond_stage_model
        if not isinstance(encoder, CLIPTokensEncoder):
            raise ValueError(
                f"token_embeddings: requires a text encoder of CLIP's tokens, not {type(encoder).__name__}"
            )
        for new in self.new_tokens:
            encoder.add_token([new.token], torch.zeros(1, encoder.token_width).expand(new.vectors, -1))
            if is_word(new.token):
                text = "token_embeddings: the token %r is a word: all prompts with this word will use its vectors"
                logger.warning(text, new.token)

    def _check_file_names(self) -> None:
        """Raise ValueError for tokens whose files would overwrite each other or the LoRA's."""
        written = {Path(RUN_FILE).stem: "the section adapters"}
        for new in self.new_tokens:
            other = written.setdefault(new.stem.casefold(), new.token)
            if other != new.token:
                raise ValueError(
                    f"token {new.token!r}: its file {new.stem}.safetensors would overwrite that of {other}; "
                    "choose another token"
                )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Warn if the first batch has none of the trained tokens."""
        if self.new_tokens and not self._checked_prompts:
            self._checked_prompts = True
            texts = self.raw_condition(batch, self.cond_stage_key)
            if not self.cond_stage_model.has_added_tokens(texts):
                tokens = ", ".join(new.token for new in self.new_tokens)
                text = (
                    "token_embeddings: none of the %d prompts of the first batch has %s within the encoder's length "
                    "(the first: %.100r), which trains nothing: put the token into the captions, templates or subject"
                )
                logger.warning(text, len(texts), tokens, texts[0])

    def adapter_keys(self) -> set[str]:
        """State-dict keys of the adapters and of their averages."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return trained | {name for name in self.state_dict() if name.startswith(EMA)}

    @torch.no_grad()
    def start_adapters(self) -> None:
        """Initialize the adapters that start from values of the base, which is loaded now."""
        if self.adapters is not None:
            self.adapters.measure_magnitudes(networks_of(self))
        if self.new_tokens:
            encoder = self.cond_stage_model
            ensure_weights(encoder)
            for new, vectors in zip(self.new_tokens, encoder.token_embeddings.vectors):
                vectors.copy_(initial_vectors(encoder.embed_words(new.init), new.vectors))
        if self.use_ema:  # the averages start there too
            self.restart_ema()

    def write_adapter_files(self, folder: Path) -> None:
        """Write the adapters as files that other tools read into a folder of checkpoints, averages if there are any."""
        with self.ema_scope():
            if self.adapters is not None:
                names = LoraNames(adaptable(networks_of(self)), self._config)
                metadata = {"base": self.base.path, "base_fingerprint": self.base.fingerprint} if self.base else {}
                layers = {key: LoraTensors(**vars(lora)) for key, lora in self.adapters.weights().items()}
                write_lora(layers, folder / RUN_FILE, names, metadata=metadata)
            vectors = self.cond_stage_model.token_embeddings.vectors if self.new_tokens else ()
            for new, trained in zip(self.new_tokens, vectors):
                write_embedding(folder / f"{new.stem}.safetensors", new.token, trained)

    def load_tensors(
        self, path: str, tensors: Mapping[str, Tensor], ignore_keys: Sequence[str], only_model: bool
    ) -> None:
        """Load the base, or the base of an earlier run with its adapters, which continue.

        Raises CheckpointError if the earlier run has other adapters.
        """
        if not self.trains_adapters:
            super().load_tensors(path, tensors, ignore_keys, only_model)
            return
        own, recorded = self.adapter_keys(), base_of(path)
        if recorded is None:
            tensors, _ = use_ema_weights(tensors)
            ignore_keys = (*ignore_keys, *own)
        else:
            saved: dict[str, Any] = {name: read_entry(Path(path), name) for name in ("alpha", "tokens")}
            saved = {name: value for name, value in saved.items() if value is not None}
            saved["state_dict"] = {name: x for name, x in tensors.items() if name.startswith((LORA, TOKENS))}
            self._check_adapters(saved, {name for name in own if not name.startswith(EMA)})  # averages may start anew
        super().load_tensors(path, tensors, ignore_keys, only_model)
        self.base = recorded or BaseWeights.of(path)
        if recorded is None:
            self.start_adapters()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.trains_adapters and self.base is None:
            raise ValueError(
                "adapters and token_embeddings train on a frozen base: set model.params.ckpt_path to its weights"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapters alone, and a record of the base."""
        super().on_save_checkpoint(checkpoint)
        if self.base is not None:
            own = self.adapter_keys()
            checkpoint["state_dict"] = {name: x for name, x in checkpoint["state_dict"].items() if name in own}
            checkpoint["base"], checkpoint["alpha"] = self.base._asdict(), self.alpha
            checkpoint["tokens"] = [new.token for new in self.new_tokens]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Complete the state dict by the base. Raises CheckpointError if the checkpoint was trained on another one."""
        super().on_load_checkpoint(checkpoint)
        if self.base is not None and "base" in checkpoint:
            BaseWeights(**checkpoint["base"]).check(self.base.fingerprint, self.base.path)
            self._check_adapters(checkpoint, self.adapter_keys())
            checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}

    def _check_adapters(self, checkpoint: Mapping[str, Any], own: set[str]) -> None:
        """Raise CheckpointError if a checkpoint has other adapters: layers, shapes, alpha, names of tokens."""
        theirs, state = checkpoint["state_dict"], self.state_dict()
        differing = sorted(own ^ theirs.keys()) or [key for key in sorted(own) if state[key].shape != theirs[key].shape]
        if differing:
            key = differing[0]
            shapes = [str(tuple(x[key].shape)) if key in x else "none" for x in (state, theirs)]
            raise CheckpointError(
                f"the checkpoint has other adapters: {len(differing)} tensors differ, {key} is {shapes[0]} here and "
                f"{shapes[1]} there; undo the change of model.params.adapters or token_embeddings, or start a new run"
            )
        if self.alpha is not None and (alpha := checkpoint.get("alpha")) not in (self.alpha, None):
            raise CheckpointError(
                f"model.params.adapters.alpha {self.alpha:g}: the checkpoint was trained with {alpha:g}; set it to that"
            )
        tokens = [new.token for new in self.new_tokens]
        if (before := checkpoint.get("tokens", tokens)) != tokens:
            raise CheckpointError(
                f"model.params.token_embeddings.token {', '.join(tokens)}: the checkpoint was trained with "
                f"{', '.join(before)}; set it to that"
            )
