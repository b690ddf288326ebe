"""LPIPS, the perceptual distance of VGG16 features (Zhang et al. 2018, arXiv 1801.03924, eq. 1, VGG "lin" version 0.1).

Building it never downloads. Its weights come from a checkpoint that holds them, or from `load_pretrained()`: the linear layers from the
file that torchmetrics ships, VGG16 from a local file or from torchvision's published one, whose hash is checked.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import read_weights

logger = logging.getLogger(__name__)

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG16_SHA256_PREFIX = "397923af"  # torchvision publishes the first eight digits, in the file's name
VGG16_VARIABLE = "LDM_VGG16"  # environment variable: path of a local copy

# The layers of torchvision's vgg16().features up to relu5_3: widths of 3x3 convolutions, each followed by a ReLU, and max pools ("M").
# A slice ends where a feature map is compared; layers keep their torchvision index as name (net.slice2.5.weight).
VGG16_SLICES: tuple[tuple[int | str, ...], ...] = (
    (64, 64),
    ("M", 128, 128),
    ("M", 256, 256, 256),
    ("M", 512, 512, 512),
    ("M", 512, 512, 512),
)
SMALLEST_SIDE = 2 ** sum("M" in layers for layers in VGG16_SLICES)


class PerceptualWeightsError(ValueError):
    """LPIPS has no weights and cannot get them; the message is one line that says what to do."""


class _Vgg16(nn.Module):
    """VGG16's convolutions: (B, 3, H, W) -> five feature maps, relu1_2 to relu5_3."""

    def __init__(self) -> None:
        super().__init__()
        index, width = 0, 3
        for number, layers in enumerate(VGG16_SLICES, start=1):
            part = nn.Sequential()
            for layer in layers:
                if layer == "M":
                    part.add_module(str(index), nn.MaxPool2d(kernel_size=2, stride=2))
                    index += 1
                else:
                    convolution = nn.Conv2d(width, int(layer), kernel_size=3, padding=1)
                    nn.init.kaiming_normal_(
                        convolution.weight, nonlinearity="relu"
                    )  # only matters where the weights stay random
                    nn.init.zeros_(convolution.bias)
                    part.add_module(str(index), convolution)
                    part.add_module(str(index + 1), nn.ReLU(inplace=True))
                    index, width = index + 2, int(layer)
            self.add_module(f"slice{number}", part)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for number in range(1, len(VGG16_SLICES) + 1):
            x = getattr(self, f"slice{number}")(x)
            features.append(x)
        return features


class _ScalingLayer(nn.Module):
    """Pictures in [-1, 1] to the statistics that VGG16 was trained with: (B, 1 or 3, H, W) -> (B, 3, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class _LinearLayer(nn.Module):
    """One weight per channel: (B, C, H, W) -> (B, 1, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Place 0 of the published module is a dropout, which belongs to the training of LPIPS itself and to nothing else.
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, kernel_size=1, bias=False))
        nn.init.uniform_(
            self.model[1].weight, 0.0, 2.0 / channels
        )  # positive, so that a random LPIPS is a distance as well

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class LPIPS(nn.Module):
    """Distance of two batches of pictures in [-1, 1]: (B, 3, H, W) twice -> (B, 1, 1, 1), >= 0 with trained weights.

    Frozen, in eval mode whatever its parent's mode is, and in float32 under autocast. `weights_file` is a local file with VGG16 as
    torchvision stores it (`features.0.weight`) or with a whole LPIPS (`net.slice1.0.weight`, any prefix: a first stage's file will do).
    """

    def __init__(self, weights_file: str | os.PathLike | None = None) -> None:
        super().__init__()
        self.weights_file = weights_file
        self.has_weights = False  # becomes true when a state_dict with all of them is loaded
        self.scaling_layer = _ScalingLayer()
        self.net = _Vgg16()
        for number, layers in enumerate(VGG16_SLICES):
            self.add_module(f"lin{number}", _LinearLayer(int(layers[-1])))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in eval mode: this is a measuring instrument."""
        return super().train(False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if input.shape[1] not in (1, 3) or min(input.shape[-2:]) < SMALLEST_SIDE:
            raise ValueError(
                f"LPIPS compares pictures of 1 or 3 channels and at least {SMALLEST_SIDE}x{SMALLEST_SIDE} pixels, got "
                f"{tuple(input.shape)}; set perceptual_weight: 0 to train without it"
            )
        with torch.autocast(device_type=input.device.type, enabled=False):
            dtype = (
                self.scaling_layer.shift.dtype
            )  # float32 under autocast; the model's own where all of it is in half precision
            features = self.net(self.scaling_layer(input.to(dtype)))
            others = self.net(self.scaling_layer(target.to(dtype)))
            distance = input.new_zeros((), dtype=dtype)
            for number, (f0, f1) in enumerate(zip(features, others)):
                weighted = getattr(self, f"lin{number}")((_unit_length(f0) - _unit_length(f1)).square())  # (B, 1, h, w)
                distance = distance + weighted.mean(dim=(2, 3), keepdim=True)
        return distance

    def load_pretrained(self) -> None:
        """Load the trained weights unless a checkpoint has brought them.

        VGG16 is looked for in `weights_file`, at $LDM_VGG16 and among torch.hub's downloads, and is downloaded last.
        Raises PerceptualWeightsError where it cannot be had.
        """
        if self.has_weights:
            return
        path = self._local_file() or _download_vgg16()
        weights = _from_file(path)
        if "lin0.model.1.weight" not in weights:
            weights |= _linear_layers()
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("scaling_layer.")}
        wrong = [name for name, value in own.items() if name not in weights or weights[name].shape != value.shape]
        if wrong:
            raise PerceptualWeightsError(
                f"{path}: not VGG16 or LPIPS weights: {len(wrong)} of {len(own)} are missing, {wrong[0]} for one"
            )
        self.load_state_dict({name: weights[name] for name in own}, strict=False)
        logger.info("LPIPS: loaded VGG16 from %s", path)

    def _local_file(self) -> Path | None:
        """The file that the config or the environment names; none of them may be misspelt silently."""
        for source, value in (
            ("perceptual_weights", self.weights_file),
            (VGG16_VARIABLE, os.environ.get(VGG16_VARIABLE)),
        ):
            if value:
                path = Path(value).expanduser()
                if not path.is_file():
                    raise PerceptualWeightsError(
                        f"{source}={value}: there is no such file; expected a copy of {VGG16_URL}"
                    )
                return path
        return None

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if all(prefix + name in state_dict for name, _ in self.named_parameters()):
            self.has_weights = True


def _unit_length(features: Tensor, eps: float = 1e-10) -> Tensor:
    """Features scaled to length 1 across channels: (B, C, H, W) -> the same.

    The clamp acts on vectors shorter than 1e-10 only: the square root's gradient at 0 is infinite, and a black region would train NaN.
    """
    length = features.square().sum(dim=1, keepdim=True).clamp_min(eps * eps).sqrt()
    return features / (length + eps)


def _from_file(path: Path) -> dict[str, Tensor]:
    """VGG16 (and the linear layers, where they are) from a file of either kind, under LPIPS' own names."""
    weights = read_weights(path)
    marker = "net.slice1.0.weight"
    prefix = next((name.removesuffix(marker) for name in weights if name.endswith(marker)), None)
    if prefix is not None:
        return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    renamed = {}
    for name, _ in _meta_vgg16().named_parameters():  # slice2.5.weight
        source = "features." + name.split(".", 1)[1]  # features.5.weight
        if source in weights:
            renamed[f"net.{name}"] = weights[source]
    return renamed


def _meta_vgg16() -> _Vgg16:
    with torch.device("meta"):
        return _Vgg16()


def _linear_layers() -> dict[str, Tensor]:
    """The trained linear layers, from torchmetrics' folder; the package itself, slow to import, is not needed."""
    spec = importlib.util.find_spec("torchmetrics")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        path = folder / "functional" / "image" / "lpips_models" / "vgg.pth"
        if path.is_file():
            return read_weights(path)
    raise PerceptualWeightsError(
        "LPIPS' linear layers ship with torchmetrics (functional/image/lpips_models/vgg.pth), which was not found: "
        "pip install torchmetrics, or give perceptual_weights a whole LPIPS"
    )


def _download_vgg16() -> Path:
    """torch.hub's copy of torchvision's VGG16, downloaded and checked against its published hash where it is not there yet."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_URL.rsplit("/", 1)[1]
    if path.is_file():
        return path
    logger.info("LPIPS: downloading %s (528 MiB) to %s", VGG16_URL, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(VGG16_URL, str(path), hash_prefix=VGG16_SHA256_PREFIX)
    except (OSError, RuntimeError) as error:  # no network, no space, a hash that differs
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PerceptualWeightsError(
            f"LPIPS needs VGG16, which came with no checkpoint, and {VGG16_URL} could not be downloaded ({reason}). "
            f"Put the file at {path}, or name it in ${VGG16_VARIABLE} or lossconfig.params.perceptual_weights; "
            f"or set perceptual_weight: 0 (trains without LPIPS) or perceptual_init: random (for tests)"
        ) from error
    return path
