"""Tensor names: published names, names that other versions use, optional names, names of averages."""

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

EMA = "model_ema."
EMA_COUNTERS = (f"{EMA}decay", f"{EMA}num_updates")
LORA, TOKENS = "adapters.", "cond_stage_model.token_embeddings.vectors."  # trained on a frozen base


RENAMES: tuple[tuple[re.Pattern[str], str | None], ...] = (  # name in a file -> published name; None drops the tensor
    (re.compile(r"(^|\.)_orig_mod\."), r"\1"),  # torch.compile(model) wraps the names
    # From transformers 5.6 on, CLIP's names have no text_model; published files do.
    (re.compile(r"(^|\.)transformer\.(?=(?:embeddings|encoder|final_layer_norm)\.)"), r"\1transformer.text_model."),
    # CLIP's 0, 1, ..., 76: missing in some files, rounded to half precision in others; FrozenCLIPEmbedder makes it.
    (re.compile(r"\.embeddings\.position_ids$"), None),
)
OPTIONAL_KEYS: tuple[re.Pattern[str], ...] = (  # names that may be missing from a file
    re.compile(r"(^|\.)model_ema\."),  # the average starts again from the loaded weights
    re.compile(r"(^|\.)loss(_weighting)?\."),  # used in training only
    re.compile(r"^(?!scale_factor$)[^.]+$"),  # noise schedule tables and scalars follow from the config
)


def published_name(name: str) -> str | None:
    """The published form of a name; None for a tensor that is not a weight."""
    for pattern, replacement in RENAMES:
        if pattern.search(name):
            if replacement is None:
                return None
            name = pattern.sub(replacement, name)
    return name


def published_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights among `weights` under their published names."""
    return {published: tensor for name, tensor in weights.items() if (published := published_name(name)) is not None}


def ema_name(name: str, has: Callable[[str], bool]) -> str | None:
    """The name of the moving average of the parameter `name`, if there is one (`has`).

    Names in `model_ema` have no dots and start inside the averaged module: `model` in the diffusion models, the whole
    module in a first stage.
    """
    for inner in (name.removeprefix("model."), name):
        candidate = EMA + inner.replace(".", "")
        if candidate not in EMA_COUNTERS and has(candidate):
            return candidate
    return None


def use_ema_weights(weights: Mapping[str, Tensor], wanted: Iterable[str] = ()) -> tuple[dict[str, Tensor], int]:
    """-> (`weights` with averages in place of trained parameters and without `model_ema.*`, number of averages).

    wanted: names of the target model, which identify the averages of parameters that the file lacks.
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
    """Add the averages that a model keeps and a file lacks, equal to the weights; True if any were added.

    Otherwise a model fine-tuned from a file without averages would average in its random initial weights.
    """
    if any(name.startswith(EMA) for name in weights) or not any(name.startswith(EMA) for name in wanted):
        return False
    averages = {}
    for name, tensor in weights.items():
        average = ema_name(name, wanted.__contains__)
        if average is not None and wanted[average].shape == tensor.shape:
            averages[average] = tensor
    weights |= averages
    return bool(averages)
