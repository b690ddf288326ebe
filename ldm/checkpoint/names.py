"""The one visible table of how names in weight files differ from the published names, and the rules that put them right."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

EMA = "model_ema."
EMA_COUNTERS = (f"{EMA}decay", f"{EMA}num_updates")


class Rename(NamedTuple):
    """A name in a file -> its published name. `to` is None for a tensor that is not a weight and is made anew by its module."""

    pattern: re.Pattern[str]
    to: str | None
    reason: str


RENAMES: tuple[Rename, ...] = (
    Rename(re.compile(r"(^|\.)_orig_mod\."), r"\1", "torch.compile(model) wraps the names"),
    Rename(
        re.compile(r"(^|\.)transformer\.(?=(?:embeddings|encoder|final_layer_norm)\.)"),
        r"\1transformer.text_model.",
        "from transformers 5.6 on, CLIP's own names have no text_model; published files do",
    ),
    Rename(
        re.compile(r"\.embeddings\.position_ids$"),
        None,
        "CLIP's 0, 1, ..., 76: absent in some files, rounded to half precision in others; FrozenCLIPEmbedder makes it",
    ),
)


class Excuse(NamedTuple):
    """Why names that match may be absent from a file without an error."""

    pattern: re.Pattern[str]
    reason: str


EXCUSES: tuple[Excuse, ...] = (
    Excuse(re.compile(r"(^|\.)model_ema\."), "the average starts again from the loaded weights"),
    Excuse(re.compile(r"(^|\.)loss\."), "used in training alone"),
    Excuse(
        re.compile(r"^(?!scale_factor$)[^.]+$"),
        "tables of the noise schedule and single numbers follow from the config",
    ),
)


def published_name(name: str) -> str | None:
    """The published form of a name; None for a tensor that is not a weight."""
    for rule in RENAMES:
        if rule.pattern.search(name):
            if rule.to is None:
                return None
            name = rule.pattern.sub(rule.to, name)
    return name


def published_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights among `weights` under their published names."""
    return {published: tensor for name, tensor in weights.items() if (published := published_name(name)) is not None}


def ema_name(name: str, has: Callable[[str], bool]) -> str | None:
    """Where the moving average of the parameter `name` is stored, if anywhere that `has` it.

    LitEma drops the dots of the name inside the averaged module: `model` in the diffusion models, the whole module in a first stage.
    """
    for inner in (name.removeprefix("model."), name):
        candidate = EMA + inner.replace(".", "")
        if candidate not in EMA_COUNTERS and has(candidate):
            return candidate
    return None


def use_ema_weights(weights: Mapping[str, Tensor], wanted: Iterable[str] = ()) -> tuple[dict[str, Tensor], int]:
    """-> (`weights` with every averaged parameter in the place of the trained one and no `model_ema.*`, how many were taken).

    wanted: names of the model that the weights are for: averages of parameters that a file lacks (one of averages alone) are found by them.
    """
    taken = 0
    chosen: dict[str, Tensor] = {}
    for name in (*weights, *(name for name in wanted if name not in weights)):
        if name.startswith(EMA):
            continue
        trained, average = weights.get(name), ema_name(name, weights.__contains__)
        if average is not None and (trained is None or weights[average].shape == trained.shape):
            chosen[name], taken = weights[average], taken + 1
        elif trained is not None:
            chosen[name] = trained
    return chosen, taken


def start_ema(weights: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Fill in the averages that a model wants and a file lacks from the file's weights; True if that was done.

    Without it a model that is fine-tuned from a file without averages would mix its random initial weights into them.
    """
    if any(name.startswith(EMA) for name in weights) or not any(name.startswith(EMA) for name in wanted):
        return False
    for name in list(weights):
        average = ema_name(name, wanted.__contains__)
        if average is not None and wanted[average].shape == weights[name].shape:
            weights[average] = weights[name]
    return any(name.startswith(EMA) for name in weights)
