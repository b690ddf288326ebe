"""The parity check: our modules with the published tensors against diffusers' arithmetic with the converted ones.

Both sides start from the same random input and run on their own outputs. The other side (`blocks`) follows diffusers'
config and knows no table of names, so that a swapped query and key, a transposed weight or a misplaced block changes
the first output after it.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.checkpoint.diffusers.controlnet import ControlNetLayout
from ldm.checkpoint.diffusers.first_stage import KL, StageLayout
from ldm.checkpoint.diffusers.plan import Component
from ldm.checkpoint.diffusers.rules import ConversionError, to_ours
from ldm.checkpoint.diffusers.text import CLIP, TextLayout
from ldm.checkpoint.diffusers.unet import UNetLayout
from ldm.checkpoint.formats import preview
from ldm.config.text_shapes import CLIP_VERSION, OPEN_CLIP_ARCH, clip_shape, open_clip_shape
from ldm.convert import blocks
from ldm.models.diffusion.controlnet import ControlNet
from ldm.modules.diffusionmodules.model import AttnBlock, Decoder, Downsample, Encoder, ResnetBlock, Upsample
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.clip_text import CLIPTextModel
from ldm.modules.encoders.open_clip import hidden_states, text_tower

TOLERANCE = 1e-5  # relative, in the Frobenius norm, float32 on both sides
_STAGE_LAYERS = ("conv_in", "conv_out", "quant_conv", "post_quant_conv")
Weights = Mapping[str, Tensor]
Sides = tuple[list[Tensor], Iterator[blocks.Block]]  # outputs of our layers, blocks of the other side


class Parity(NamedTuple):
    """Largest relative difference of a block's output, and the number of blocks compared."""

    worst: float
    blocks: int


def check_component(part: Component, published: Weights, theirs: Weights) -> Parity:
    """Compare a component; ConversionError names the first block whose outputs differ.

    published: its tensors under their published names, without the component's prefix; theirs: under diffusers' names.
    """
    _check_round_trip(part, published, theirs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(part.layout, UNetLayout):
            return _compare(part.name, *_unet(part, part.layout, published, theirs))
        if isinstance(part.layout, TextLayout):
            return _compare(part.name, *_text(part, part.layout, published, theirs))
        if isinstance(part.layout, ControlNetLayout):
            return _compare(part.name, *_controlnet(part, part.layout, published, theirs))
        stage = _FirstStage(part.layout, part.params)
        _load(stage, published, part.name)
        encoder = _compare(part.name, *_encoder(part, part.layout, stage, theirs))
        decoder = _compare(part.name, *_decoder(part, part.layout, stage, theirs))
        return Parity(max(encoder.worst, decoder.worst), encoder.blocks + decoder.blocks)


def _check_round_trip(part: Component, published: Weights, theirs: Weights) -> None:
    """Raise ConversionError unless every tensor, converted back, equals the original bit for bit."""
    for name, tensor in to_ours(part.layout.rules(), theirs, part.name).items():
        if not torch.equal(tensor, published[name]):
            finite = bool(torch.isfinite(published[name]).all())
            reason = "changes when converted there and back" if finite else "has values that are not finite"
            raise _failure(part.name, f"{name} {reason}")


def _compare(what: str, ours: list[Tensor], theirs: Iterable[blocks.Block]) -> Parity:
    worst = 0.0
    bar = tqdm(theirs, total=len(ours), desc=f"checking {what}", unit="block", leave=False)
    try:
        for mine, block in zip_longest(ours, bar):
            if mine is None or block is None:
                raise _failure(what, "the two sides have different numbers of blocks")
            same_shape = mine.shape == block.output.shape
            difference = float((mine - block.output).norm() / mine.norm().clamp_min(1e-12)) if same_shape else torch.inf
            if not difference <= TOLERANCE:  # NaN too
                raise _failure(what, f"the outputs of {block.name} differ by {difference:.2g} (relative)")
            worst = max(worst, difference)
    except (KeyError, RuntimeError) as error:  # a missing tensor, or one of another shape
        raise _failure(what, str(error).splitlines()[0]) from error
    finally:
        bar.close()
    return Parity(worst, len(ours))


def _failure(what: str, reason: str) -> ConversionError:
    return ConversionError(f"{what}: parity check failed: {reason}; nothing was written")


# ---------------------------------------------------------------------------------------------------------- both sides


def _unet(part: Component, layout: UNetLayout, published: Weights, theirs: Weights) -> Sides:
    with torch.device("meta"):
        network = UNetModel(**{**part.params, "use_checkpoint": False, "use_fp16": False})
    _load(network, published, part.name)
    side = 2 ** len(layout.channels)  # 2x3 pixels in the middle, where attention needs several
    x, t = torch.randn(2, layout.in_channels, side, side * 3 // 2), torch.tensor([3.0, 417.0])
    context = None if layout.context_dim is None else torch.randn(2, 5, layout.context_dim)
    y = None if layout.classes is None else torch.tensor([0, layout.classes - 1])
    parts = [network.time_embed, *network.input_blocks, network.middle_block, *network.output_blocks, network.out]
    with _outputs_of(parts) as ours:
        network(x, t, context, y)
    return ours, blocks.unet(theirs, part.config, x, t, context, y)


def _controlnet(part: Component, layout: ControlNetLayout, published: Weights, theirs: Weights) -> Sides:
    with torch.device("meta"):
        network = ControlNet(**{**part.params, "use_checkpoint": False, "use_fp16": False})
    _load(network, published, part.name)
    height, width = 2 ** len(layout.copied.channels), 2 ** len(layout.copied.channels) * 3 // 2
    x, t = torch.randn(2, layout.copied.in_channels, height, width), torch.tensor([3.0, 417.0])
    hint = torch.rand(2, layout.hint_channels, height * network.hint_factor, width * network.hint_factor)
    context = torch.randn(2, 5, layout.copied.context_dim or 1)
    parts = [network.time_embed, network.input_hint_block, *network.input_blocks, network.middle_block]
    with _outputs_of([*parts, *network.zero_convs, network.middle_block_out]) as ours:
        network(x, hint, t, context)
    return ours, blocks.controlnet(theirs, part.config, x, hint, t, context)


class _FirstStage(nn.Module):
    """Encoder and decoder of a first stage on the meta device."""

    def __init__(self, layout: StageLayout, params: Mapping[str, Any]) -> None:
        super().__init__()
        double = 2 if layout.kind == KL else 1
        with torch.device("meta"):
            self.encoder, self.decoder = Encoder(**params["ddconfig"]), Decoder(**params["ddconfig"])
            self.quant_conv = nn.Conv2d(double * layout.z_channels, double * layout.embed_dim, 1)
            self.post_quant_conv = nn.Conv2d(layout.embed_dim, layout.z_channels, 1)


def _encoder(part: Component, layout: StageLayout, stage: _FirstStage, theirs: Weights) -> Sides:
    side = 2 ** len(layout.channels)
    x = torch.rand(1, layout.in_channels, side, side * 3 // 2) * 2 - 1
    with _outputs_of([*_layers(stage.encoder), stage.quant_conv]) as ours:
        stage.quant_conv(stage.encoder(x))
    return ours, blocks.encoder(theirs, part.config, x)


def _decoder(part: Component, layout: StageLayout, stage: _FirstStage, theirs: Weights) -> Sides:
    z = torch.randn(1, layout.embed_dim, 2, 3)
    with _outputs_of([stage.post_quant_conv, *_layers(stage.decoder)]) as ours:
        stage.decoder(stage.post_quant_conv(z))
    return ours, blocks.decoder(theirs, part.config, z)


def _layers(half: nn.Module) -> list[nn.Module]:
    """The layers of an encoder or decoder whose outputs are compared."""
    own = [layer for layer in half.modules() if isinstance(layer, AttnBlock | Downsample | ResnetBlock | Upsample)]
    return [*own, *(layer for name, layer in half.named_children() if name in _STAGE_LAYERS)]


def _text(part: Component, layout: TextLayout, published: Weights, theirs: Weights) -> Sides:
    tokens = torch.randint(layout.vocab_size, (2, min(layout.positions, 16)))
    overrides = part.params.get("text_config")
    tower: Any  # of attributes that mypy does not know
    if layout.kind == CLIP:
        with torch.device("meta"):
            tower = CLIPTextModel(clip_shape(part.params.get("version", CLIP_VERSION), overrides))
        layers, run = [*tower.text_model.encoder.layers, tower.text_model.final_layer_norm], tower
    else:
        shape = open_clip_shape(part.params.get("arch", OPEN_CLIP_ARCH), overrides)
        with torch.device("meta"):
            tower = text_tower({**shape, "layers": layout.layers})
        layers, run = [*tower.transformer.resblocks, tower.ln_final], partial(hidden_states, tower)
    _load(tower, published, part.name, spare=("text_projection", "logit_scale"))
    with _outputs_of(layers) as ours:
        run(tokens)
    return ours, blocks.text_model(theirs, part.config, tokens)


def _load(module: nn.Module, published: Weights, what: str, spare: tuple[str, ...] = ()) -> None:
    """Load the weights of a module on the meta device, in float32; those in `spare` may be missing."""
    names = [name for name, _ in module.named_parameters()]
    module.load_state_dict({n: published[n].float() for n in names if n in published}, strict=False, assign=True)
    missing = [name for name in names if name not in published and name not in spare]
    if missing:
        raise ConversionError(f"{what}: the file lacks {preview(missing)}, which its config requires")
    module.eval().requires_grad_(False)


@contextlib.contextmanager
def _outputs_of(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs of layers in the order in which they run."""
    outputs: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output)) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
