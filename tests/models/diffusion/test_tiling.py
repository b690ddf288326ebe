"""Laws of tiles: values on which tiles agree are exact, and a local model computes the same as without tiles."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.tiling import TiledModel, Tiling
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from tests.models.diffusion.tiny import AUTOENCODER, latent_diffusion
from tests.reference import randn, seed_weights

SIZES = [(8, 8), (3, 5), (1, 8), (9, 8), (13, 30), (31, 17)]
TILING = Tiling(size=(8, 8), stride=(5, 4), margin=1)


class LocalModel(nn.Module):
    """A latent diffusion model of convolutions with a receptive field of `reach` cells; factor 2."""

    def __init__(self, reach: int = 1, gaussian: bool = True, concat: int = 0) -> None:
        super().__init__()
        self.gaussian, self.shapes = gaussian, []
        self.net = nn.Conv2d(4 + concat, 4, 2 * reach + 1, padding=reach)
        self.encoder = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8 if gaussian else 4, 3, stride=2))
        self.decoder = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.after = nn.Conv2d(3, 3, 4 * reach - 1, padding=2 * reach - 1)  # in pixels, two a cell
        seed_weights(self)

    def encode_first_stage(self, x: Tensor):
        self.shapes.append(tuple(x.shape[-2:]))
        return DiagonalGaussianDistribution(self.encoder(x)) if self.gaussian else self.encoder(x)

    def decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        z = z if force_not_quantize else z.round()  # a quantizer's work is local to the cell
        return self.after(self.decoder(z))

    def apply_model(self, x: Tensor, t: Tensor, cond=None) -> Tensor:
        self.shapes.append(tuple(x.shape[-2:]))
        return self.net(torch.cat([x, *(cond or {}).get("c_concat", ())], dim=1))


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("tiling", [TILING, Tiling(4, 3, 0), Tiling((8, 4), (2, 1))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_that_agree_give_their_value_to_the_last_bit(height, width, tiling, dtype):
    x = randn(0, 2, 3, height, width).to(dtype)
    assert torch.equal(tiling.apply(lambda tile: tile(x), height, width), x)


@pytest.mark.parametrize("height, width", SIZES)
def test_a_receptive_field_within_the_margin_gives_the_result_without_tiles(height, width):
    model, x, t = LocalModel(reach=1), randn(1, 2, 4, height, width), torch.zeros(2)
    tiled = TiledModel(model, TILING, factor=2)
    with torch.no_grad():
        torch.testing.assert_close(tiled.apply_model(x, t), model.apply_model(x, t))
        torch.testing.assert_close(tiled.decode_first_stage(x), model.decode_first_stage(x))
        assert tiled.decode_first_stage(x).shape == (2, 3, 2 * height, 2 * width)


def test_a_larger_receptive_field_is_close_and_closer_with_a_margin():
    model, x, t = LocalModel(reach=3), randn(2, 1, 4, 40, 40), torch.zeros(1)
    with torch.no_grad():
        whole = model.apply_model(x, t)
        tiled = [TiledModel(model, Tiling(16, 8, margin), factor=2).apply_model(x, t) for margin in (0, 1, 2, 3)]
    errors = [(out - whole).norm() / whole.norm() for out in tiled]
    assert errors[0] < 0.15 and errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-6


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale", [1, 4])
def test_neighbors_fade_without_a_jump(axis, scale):
    """Tiles of values 0, 1, 2, ... along an axis: the blend rises from one to the next, at most as fast as the ramp."""
    tiling, ramp = Tiling(16, 8, 2), (8 - 2 * 2) * scale
    size = (8 + 8 * 6, 16) if axis == 0 else (16, 8 + 8 * 6)
    blend = tiling.apply(
        lambda tile: torch.full((1, 1, 16 * scale, 16 * scale), tile[axis].start / 8), *size, scale=scale
    )
    line = blend[0, 0, :, 0] if axis == 0 else blend[0, 0, 0]
    steps = line.diff()
    assert line[0] == 0 and line[-1] == 5 and (steps > -1e-6).all() and steps.max() < 1 / ramp + 1e-5


@pytest.mark.parametrize("height, width", [(8, 8), (9, 13), (16, 24), (33, 19), (5, 2), (100, 31)])
@pytest.mark.parametrize("gaussian", [True, False])
def test_images_of_any_size_are_encoded_as_without_tiles(height, width, gaussian):
    model, x = LocalModel(gaussian=gaussian), randn(3, 1, 3, height, width)
    encoded = TiledModel(model, TILING, factor=2).encode_first_stage(x)
    assert (
        max(side for shape in model.shapes for side in shape) <= 2 * 8 + 1
    )  # a whole tile, and what is left of a cell
    whole = model.encode_first_stage(x)
    if gaussian:
        torch.testing.assert_close(encoded.mean, whole.mean)
        torch.testing.assert_close(encoded.logvar, whole.logvar)
        encoded = encoded.mode()
    assert encoded.shape == (1, 4, height // 2, width // 2)
    if not gaussian:
        torch.testing.assert_close(encoded, whole)


def test_options_of_a_quantizing_decoder_reach_it():
    model, z = LocalModel(), randn(4, 1, 4, 20, 20)
    tiled = TiledModel(model, TILING, factor=2)
    with torch.no_grad():
        torch.testing.assert_close(
            tiled.decode_first_stage(z, force_not_quantize=True), model.decode_first_stage(z, True)
        )
        assert not torch.allclose(tiled.decode_first_stage(z), model.decode_first_stage(z, True))


def test_concat_channels_are_cut_with_the_latent_and_other_parts_are_not():
    model, x, channels, seen = LocalModel(concat=2), randn(5, 1, 4, 20, 11), randn(6, 1, 2, 20, 11), []
    tokens, inner = randn(7, 1, 3, 5), model.apply_model
    model.apply_model = lambda x, t, cond: (seen.append(cond["c_crossattn"][0]), inner(x, t, cond))[1]
    cond = {"c_concat": [channels], "c_crossattn": [tokens]}
    with torch.no_grad():
        out = TiledModel(model, TILING, factor=2).apply_model(x, torch.zeros(1), cond)
        torch.testing.assert_close(out, inner(x, torch.zeros(1), cond))
    assert len(seen) > 1 and all(c is tokens for c in seen) and cond["c_concat"][0] is channels
    with pytest.raises(ValueError, match="c_concat"):
        TiledModel(model, TILING, factor=2).apply_model(x, torch.zeros(1), {"c_concat": [channels[..., :5]]})


@pytest.mark.parametrize("height, width", [(3, 5), (8, 8), (13, 30)])
def test_the_network_gets_multiples_for_any_size(height, width):
    model = LocalModel()
    with torch.no_grad():
        out = TiledModel(model, TILING, factor=2, multiple=4).apply_model(randn(8, 1, 4, height, width), torch.zeros(1))
    assert out.shape == (1, 4, height, width)
    assert all(h % 4 == 0 and w % 4 == 0 and h <= 8 and w <= 8 for h, w in model.shapes)


def test_a_sampler_takes_a_tiled_model_and_nothing_changes_if_one_tile_is_enough():
    model = latent_diffusion("concat", {"in_channels": 7}, {"target": "torch.nn.Identity"})
    tiled = TiledModel(model, Tiling(8, 4), multiple=2)
    assert tiled.factor == 4 and tiled.num_timesteps == 1000 and copy.copy(tiled).factor == 4
    for size, same in (((8, 8), True), ((8, 20), False)):
        cond, x_T = torch.tanh(randn(9, 1, 3, *size)), randn(10, 1, 4, *size)
        options = {
            "x_T": x_T,
            "verbose": False,
            "unconditional_guidance_scale": 2.0,
            "unconditional_conditioning": -cond,
        }
        z, zt = (DDIMSampler(either).sample(2, 1, (4, *size), cond, **options).samples for either in (model, tiled))
        assert zt.isfinite().all() and zt.shape == z.shape and torch.equal(z, zt) == same
    x = tiled.decode_first_stage(zt)
    assert x.shape == (1, 3, 32, 80) and x.isfinite().all()
    posterior = tiled.encode_first_stage(x)
    assert isinstance(posterior, DiagonalGaussianDistribution)
    assert tiled.get_first_stage_encoding(posterior).shape == (1, 4, 8, 20)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModelInterface"])
def test_published_first_stages_keep_their_form_and_nearly_their_values(kind):
    """They normalize over the tile, so tiles are only close to the whole; a single tile is exact."""
    ddconfig = {**AUTOENCODER["params"]["ddconfig"], "double_z": kind == "AutoencoderKL"}
    more = {"n_embed": 16} if kind == "VQModelInterface" else {}
    params = {"embed_dim": 4, "lossconfig": {"target": "torch.nn.Identity"}, "ddconfig": ddconfig, **more}
    stage = {"target": f"ldm.models.autoencoder.{kind}", "params": params}
    model = latent_diffusion(None, {}, "__is_unconditional__", first_stage_config=stage)
    x = torch.tanh(randn(11, 1, 3, 96, 72))
    for tiling, tolerance in ((Tiling((24, 18), 9), 0.0), (Tiling(16, 8), 0.2)):
        tiled = TiledModel(model, tiling)
        z, zt = (
            (e.mode() if kind == "AutoencoderKL" else e)
            for e in (model.encode_first_stage(x), tiled.encode_first_stage(x))
        )
        assert zt.shape == (1, 4, 24, 18) and (zt - z).norm() <= tolerance * z.norm()
        for options in ({}, {"force_not_quantize": True}) if more else ({},):
            decoded, decoded_t = (either.decode_first_stage(z, **options) for either in (model, tiled))
            assert decoded_t.shape == x.shape and (decoded_t - decoded).norm() <= tolerance * decoded.norm()


@pytest.mark.parametrize(
    "values, message",
    [
        ((8, 8), "choose 1 to"),
        ((8, 0), "choose 1 to"),
        ((8, 4, 2), "choose 0 to 1"),
        ((8, 4, -1), "choose 0"),
        (((8, 8, 8), 4), "height and"),
    ],
)
def test_wrong_tiles_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Tiling(*values)


def test_wrong_sizes_are_refused():
    model = LocalModel()
    with pytest.raises(ValueError, match="multiples of 3"):
        TiledModel(model, TILING, factor=2, multiple=3)
    with pytest.raises(ValueError, match="1x9 pixels"):
        TiledModel(model, TILING, factor=2).encode_first_stage(randn(0, 1, 3, 1, 9))
    with pytest.raises(ValueError, match="expected"):
        TiledModel(model, TILING, factor=4).decode_first_stage(randn(0, 1, 4, 9, 9))
    model.encode_first_stage = lambda x: (x, None)
    with pytest.raises(TypeError, match="got tuple"):
        TiledModel(model, TILING, factor=2).encode_first_stage(randn(0, 1, 3, 8, 8))
