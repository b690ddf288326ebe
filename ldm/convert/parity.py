"""The parity check: our modules with the published tensors against diffusers' computation with the converted ones, block by block.

Both sides start from the same random input and run on their own outputs; the other side (`blocks`) follows diffusers' config and knows no
table of names, so that a swapped query and key, a transposed weight or a block in the wrong place shows in the first output behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.checkpoint.diffusers.first_stage import KL, StageLayout
from ldm.checkpoint.diffusers.plan import Component
from ldm.checkpoint.diffusers.rules import ConversionError, to_ours
from ldm.checkpoint.diffusers.text import CLIP, TextLayout
from ldm.checkpoint.diffusers.unet import UNetLayout
from ldm.config.text_shapes import CLIP_VERSION, OPEN_CLIP_ARCH, clip_shape, open_clip_shape
from ldm.convert import blocks

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5  # relative, in the Frobenius norm, float32 on both sides
_STAGE_LAYERS = ("conv_in", "conv_out", "quant_conv", "post_quant_conv")


class Parity(NamedTuple):
    """How far the two sides are apart: the largest relative difference of a block's output, and how many blocks were compared."""

    worst: float
    blocks: int


def check_component(part: Component, published: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Parity:
    """Compare a component; ConversionError names the first block whose outputs differ.

    published: its tensors under their published names, without the component's prefix; theirs: the same in diffusers' names.
    """
    _check_bits(part, published, theirs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(part.layout, UNetLayout):
            return _compare(part.name, *_unet(part, published, theirs))
        if isinstance(part.layout, TextLayout):
            return _compare(part.name, *_text(part, published, theirs))
        halves = (
            _compare(part.name, *_encoder(part, published, theirs)),
            _compare(part.name, *_decoder(part, published, theirs)),
        )
        return Parity(max(half.worst for half in halves), sum(half.blocks for half in halves))


def _check_bits(part: Component, published: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Converted back, every tensor is the one it came from, bit for bit."""
    back = to_ours(part.layout.rules(), theirs, part.name)
    for name, tensor in back.items():
        if tensor.shape != published[name].shape or not torch.equal(tensor, published[name]):
            raise ConversionError(
                f"{part.name}: parity check failed: {name} does not come back from its conversion; nothing was written"
            )


def _compare(what: str, ours: list[Tensor], theirs: Iterable[blocks.Block]) -> Parity:
    worst, count = 0.0, 0
    bar = tqdm(theirs, total=len(ours), desc=f"checking {what}", unit="block", leave=False)
    try:
        for mine, block in zip(ours, bar, strict=True):
            apart = (
                (mine - block.output).norm() / mine.norm().clamp_min(1e-12)
                if mine.shape == block.output.shape
                else torch.inf
            )
            if not apart <= TOLERANCE:  # NaN too
                raise ConversionError(
                    f"{what}: parity check failed: the output of {block.name} is {float(apart):.2g} (relative) from this framework's; "
                    f"nothing was written"
                )
            worst, count = max(worst, float(apart)), count + 1
    except (KeyError, RuntimeError) as error:  # a tensor that is not there, or of another shape
        raise ConversionError(
            f"{what}: parity check failed: {str(error).splitlines()[0]}; nothing was written"
        ) from error
    except ValueError as error:  # zip(strict=True): another number of blocks
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(
            f"{what}: parity check failed: another number of blocks than here; nothing was written"
        ) from error
    finally:
        bar.close()
    return Parity(worst, count)


# ------------------------------------------------------------------------------------------------------------------ both sides


Sides = tuple[list[Tensor], Iterator[blocks.Block]]


def _unet(part: Component, published: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Sides:
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    layout = part.layout
    with torch.device("meta"):
        network = UNetModel(**{**part.params, "use_checkpoint": False, "use_fp16": False})
    _fill(network, published, part.name)
    side = 2 ** len(layout.channels)  # 2x3 pixels in the middle, where attention needs several
    x, t = torch.randn(2, layout.in_channels, side, side * 3 // 2), torch.tensor([3.0, 417.0])
    context = None if layout.context_dim is None else torch.randn(2, 5, layout.context_dim)
    y = None if layout.classes is None else torch.tensor([0, layout.classes - 1])
    parts = [network.time_embed, *network.input_blocks, network.middle_block, *network.output_blocks, network.out]
    with _outputs_of(parts) as ours:
        network(x, t, context, y)
    return ours, blocks.unet(theirs, part.config, x, t, context, y)


def _encoder(part: Component, published: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Sides:
    stage = _first_stage(part, published)
    side = 2 ** len(part.layout.channels)
    x = torch.rand(1, part.layout.in_channels, side, side * 3 // 2) * 2 - 1
    layers = [*_stage_layers(stage.encoder), stage.quant_conv]
    with _outputs_of(layers) as ours:
        stage.quant_conv(stage.encoder(x))
    return ours, blocks.encoder(theirs, part.config, x)


def _decoder(part: Component, published: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Sides:
    stage = _first_stage(part, published)
    z = torch.randn(1, part.layout.embed_dim, 2, 3)
    with _outputs_of([stage.post_quant_conv, *_stage_layers(stage.decoder)]) as ours:
        stage.decoder(stage.post_quant_conv(z))
    return ours, blocks.decoder(theirs, part.config, z)


def _first_stage(part: Component, published: Mapping[str, Tensor]) -> nn.Module:
    from ldm.modules.diffusionmodules.model import Decoder, Encoder

    layout: StageLayout = part.layout
    stage, double = nn.Module(), 2 if layout.kind == KL else 1
    with torch.device("meta"):
        stage.encoder, stage.decoder = Encoder(**part.params["ddconfig"]), Decoder(**part.params["ddconfig"])
        stage.quant_conv = nn.Conv2d(double * layout.z_channels, double * layout.embed_dim, 1)
        stage.post_quant_conv = nn.Conv2d(layout.embed_dim, layout.z_channels, 1)
    _fill(stage, published, part.name)
    return stage


def _stage_layers(half: nn.Module) -> list[nn.Module]:
    """The layers of an encoder or decoder whose outputs are compared."""
    from ldm.modules.diffusionmodules.model import AttnBlock, Downsample, ResnetBlock, Upsample

    own = [layer for layer in half.modules() if isinstance(layer, AttnBlock | Downsample | ResnetBlock | Upsample)]
    return [*own, *(layer for name, layer in half.named_children() if name in _STAGE_LAYERS)]


def _text(part: Component, published: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Sides:
    layout: TextLayout = part.layout
    tokens = torch.randint(layout.vocab_size, (2, min(layout.positions, 16)))
    with torch.device("meta"):
        if layout.kind == CLIP:
            from ldm.modules.encoders.clip import clip_text_model

            tower = clip_text_model(
                clip_shape(part.params.get("version", CLIP_VERSION), part.params.get("text_config"))
            )
        else:
            from ldm.modules.encoders.open_clip import hidden_states, text_tower

            shape = open_clip_shape(part.params.get("arch", OPEN_CLIP_ARCH), part.params.get("text_config"))
            tower = text_tower({**shape, "layers": layout.layers})
    _fill(tower, published, part.name, spare=("text_projection", "logit_scale"))
    if layout.kind == CLIP:
        layers = [*tower.text_model.encoder.layers, tower.text_model.final_layer_norm]
    else:
        layers = [*tower.transformer.resblocks, tower.ln_final]
    with _outputs_of(layers) as ours:
        tower(tokens) if layout.kind == CLIP else hidden_states(tower, tokens)
    return ours, blocks.text_model(theirs, part.config, tokens)


def _fill(module: nn.Module, published: Mapping[str, Tensor], what: str, spare: tuple[str, ...] = ()) -> None:
    """Give a module on the meta device its weights in float32."""
    names = dict(module.named_parameters())
    found = {name: published[name].float() for name in names if name in published}
    module.load_state_dict(found, strict=False, assign=True)
    absent = [name for name, parameter in module.named_parameters() if parameter.is_meta and name not in spare]
    if absent:
        raise ConversionError(f"{what}: the file lacks {', '.join(absent[:3])}, which its config asks for")
    module.eval().requires_grad_(False)


class _outputs_of:
    """Within it the outputs of some layers are kept, in the order in which they run."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers, self.outputs = list(layers), []

    def __enter__(self) -> list[Tensor]:
        self.hooks = [
            layer.register_forward_hook(lambda _module, _inputs, output: self.outputs.append(output))
            for layer in self.layers
        ]
        return self.outputs

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
