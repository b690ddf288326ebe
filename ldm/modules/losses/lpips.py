"""LPIPS, the perceptual distance of VGG16 features (Zhang et al. 2018, arXiv 1801.03924, eq. 1, VGG "lin" version 0.1).

Building it never downloads. Its weights come from a checkpoint or from `load_pretrained()`: the linear layers from
torchmetrics, VGG16 from a local file or from torchvision's download, whose hash is checked.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import read_weights
from ldm.paths import expand_user

logger = logging.getLogger(__name__)

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG16_SHA256_PREFIX = "397923af"  # torchvision publishes the first eight digits in the file's name
VGG16_VARIABLE = "LDM_VGG16"  # environment variable: path of a local copy

# torchvision's vgg16().features up to relu5_3: widths of the 3x3 convolutions, each with a ReLU; None is a max pool.
VGG16_LAYERS = (64, 64, None, 128, 128, None, 256, 256, 256, None, 512, 512, 512, None, 512, 512, 512)
VGG16_SLICES = (0, 4, 9, 16, 23, 30)  # limits of the slices; features are compared at the end of each
FEATURE_WIDTHS = (64, 128, 256, 512, 512)
SMALLEST_SIDE = 16  # four max pools


class PerceptualWeightsError(ValueError):
    """The weights of LPIPS cannot be loaded; the message is one line that says what to do."""


class _Vgg16(nn.Module):
    """Convolutions of VGG16: (B, 3, H, W) -> five feature maps, relu1_2 to relu5_3."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in VGG16_LAYERS:
            if width is None:
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
                continue
            convolution = nn.Conv2d(channels, width, kernel_size=3, padding=1)
            for p in convolution.parameters():  # for `perceptual_init: random`
                nn.init.kaiming_normal_(p, nonlinearity="relu") if p.ndim > 1 else nn.init.zeros_(p)
            layers += [convolution, nn.ReLU(inplace=True)]
            channels = width
        features = nn.Sequential(*layers)
        for number, (start, end) in enumerate(itertools.pairwise(VGG16_SLICES), start=1):
            self.add_module(f"slice{number}", features[start:end])  # keeps torchvision's indices: slice2.5.weight

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for part in self.children():
            x = part(x)  # (B, C_i, H / 2^i, W / 2^i)
            features.append(x)
        return features


class _ScalingLayer(nn.Module):
    """Normalization with the statistics of VGG16's training images: (B, 1 or 3, H, W) in [-1, 1] -> (B, 3, H, W)."""

    shift: Tensor
    scale: Tensor

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
        convolution = nn.Conv2d(channels, 1, kernel_size=1, bias=False)
        nn.init.uniform_(convolution.weight, 0.0, 2.0 / channels)  # positive, so that a random LPIPS is a distance too
        # Index 0 of the published module is a dropout, needed only to train LPIPS itself.
        self.model = nn.Sequential(nn.Identity(), convolution)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class LPIPS(nn.Module):
    """Distance of two batches of images in [-1, 1]: (B, 3, H, W) twice -> (B, 1, 1, 1), >= 0 with trained weights.

    Frozen, always in eval mode, and in float32 under autocast. `weights_file`: local file with torchvision's VGG16
    (`features.0.weight`) or a whole LPIPS (`net.slice1.0.weight`, with any prefix).
    """

    def __init__(self, weights_file: str | os.PathLike | None = None) -> None:
        super().__init__()
        self.weights_file = weights_file
        self.has_weights = False  # True once a state_dict with all weights is loaded
        self.scaling_layer = _ScalingLayer()
        self.net = _Vgg16()
        for number, width in enumerate(FEATURE_WIDTHS):
            self.add_module(f"lin{number}", _LinearLayer(width))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> LPIPS:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if input.shape[1] not in (1, 3) or min(input.shape[-2:]) < SMALLEST_SIDE:
            raise ValueError(
                f"LPIPS needs images of 1 or 3 channels and at least {SMALLEST_SIDE}x{SMALLEST_SIDE} pixels, got shape "
                f"{tuple(input.shape)}; set perceptual_weight: 0 to train without it"
            )
        with torch.autocast(device_type=input.device.type, enabled=False):
            dtype = self.scaling_layer.shift.dtype  # float32 under autocast, 16 bits only if the module itself is
            features, others = (self.net(self.scaling_layer(x.to(dtype))) for x in (input, target))
            distance = input.new_zeros((), dtype=dtype)
            for number, (f0, f1) in enumerate(zip(features, others)):
                squares = (_unit_length(f0) - _unit_length(f1)).square()
                weighted = self.get_submodule(f"lin{number}")(squares)  # (B, 1, h, w)
                distance = distance + weighted.mean(dim=(2, 3), keepdim=True)
        return distance

    def load_pretrained(self) -> None:
        """Load the trained weights unless they are loaded already, e.g. from a checkpoint.

        VGG16 comes from `weights_file`, else $LDM_VGG16, else torch.hub's cache, else the download.
        Raises PerceptualWeightsError if the file is missing or invalid, or if the download fails.
        """
        if self.has_weights:
            return
        path = self._local_file() or _download_vgg16()
        weights = self._from_file(path)
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("scaling_layer.")}
        wrong = [name for name, value in own.items() if name not in weights or weights[name].shape != value.shape]
        if wrong:
            raise PerceptualWeightsError(
                f"{path}: not VGG16 or LPIPS weights: {len(wrong)} of {len(own)} are missing, e.g. {wrong[0]}"
            )
        self.load_state_dict({name: weights[name] for name in own}, strict=False)
        logger.info("LPIPS: loaded VGG16 from %s", path)

    def _local_file(self) -> Path | None:
        """File named by the config or the environment. If it is missing, the other sources are not tried."""
        sources = {"perceptual_weights": self.weights_file, VGG16_VARIABLE: os.environ.get(VGG16_VARIABLE)}
        for source, value in sources.items():
            if value:
                path = expand_user(value)
                if not path.is_file():
                    raise PerceptualWeightsError(f"{source}={value}: file not found; expected a copy of {VGG16_URL}")
                return path
        return None

    def _from_file(self, path: Path) -> dict[str, Tensor]:
        """Return all weights under LPIPS' keys, from a file of either kind."""
        weights = read_weights(path)
        marker = "net.slice1.0.weight"
        prefix = next((name.removesuffix(marker) for name in weights if name.endswith(marker)), None)
        if prefix is not None:
            weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        else:
            names = {name: "features." + name.split(".", 1)[1] for name, _ in self.net.named_parameters()}
            weights = {f"net.{name}": weights[source] for name, source in names.items() if source in weights}
        return weights if "lin0.model.1.weight" in weights else weights | _linear_layers()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if all(prefix + name in state_dict for name, _ in self.named_parameters()):
            self.has_weights = True


def _unit_length(features: Tensor, eps: float = 1e-10) -> Tensor:
    """Scale features (B, C, H, W) to length 1 across channels.

    Lengths below 1e-10 are clamped: the square root's gradient is infinite at 0 and would become NaN in black regions.
    """
    length = features.square().sum(dim=1, keepdim=True).clamp_min(eps * eps).sqrt()
    return features / (length + eps)


def _linear_layers() -> dict[str, Tensor]:
    """Load the trained linear layers from torchmetrics' folder, without the slow import of the package."""
    spec = importlib.util.find_spec("torchmetrics")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "functional" / "image" / "lpips_models" / "vgg.pth"
        if path.is_file():
            return read_weights(path)
    raise PerceptualWeightsError(
        "LPIPS needs functional/image/lpips_models/vgg.pth of torchmetrics, which was not found: "
        "pip install torchmetrics, or set perceptual_weights to a file with a whole LPIPS"
    )


def _download_vgg16() -> Path:
    """Return torch.hub's copy of torchvision's VGG16; download it if missing, and check its published hash."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_URL.rsplit("/", 1)[1]
    if path.is_file():
        return path
    logger.info("LPIPS: downloading %s (528 MiB) to %s", VGG16_URL, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(VGG16_URL, str(path), hash_prefix=VGG16_SHA256_PREFIX)
    except (OSError, RuntimeError) as error:  # no network, disk full, wrong hash
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PerceptualWeightsError(
            f"LPIPS needs VGG16: no checkpoint holds it, and the download of {VGG16_URL} failed ({reason}). "
            f"Save the file as {path}, or set ${VGG16_VARIABLE} or lossconfig.params.perceptual_weights to its path; "
            f"or set perceptual_weight: 0 (trains without LPIPS) or perceptual_init: random (for tests)"
        ) from error
    return path
