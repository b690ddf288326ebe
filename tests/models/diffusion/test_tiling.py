"""Tiles: what is the same in every tile is exact, and what is local is as if there were none."""

import copy
import logging

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
    """Two convolutions that see `reach` cells around, behind the names of a latent diffusion model; factor 2, posterior or latents."""

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
    assert torch.equal(tiling.apply(lambda cut: cut(x), height, width), x)


@pytest.mark.parametrize("height, width", SIZES)
def test_a_network_that_sees_no_further_than_the_margin_gives_what_it_gives_for_the_whole(height, width):
    model, x, t = LocalModel(reach=1), randn(1, 2, 4, height, width), torch.zeros(2)
    tiled = TiledModel(model, TILING, factor=2)
    with torch.no_grad():
        torch.testing.assert_close(tiled.apply_model(x, t), model.apply_model(x, t))
        torch.testing.assert_close(tiled.decode_first_stage(x), model.decode_first_stage(x))
        assert tiled.decode_first_stage(x).shape == (2, 3, 2 * height, 2 * width)


def test_a_network_that_sees_further_is_close_and_closer_with_a_margin():
    model, x, t = LocalModel(reach=3), randn(2, 1, 4, 40, 40), torch.zeros(1)
    with torch.no_grad():
        whole = model.apply_model(x, t)
        tiled = [TiledModel(model, Tiling(16, 8, margin), factor=2).apply_model(x, t) for margin in (0, 1, 2, 3)]
    errors = [(out - whole).norm() / whole.norm() for out in tiled]
    assert errors[0] < 0.15 and errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-6


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale", [1, 4])
def test_neighbors_fade_without_a_jump(axis, scale):
    """Tiles of values 0, 1, 2, ... in turn along an axis: the blend climbs from one to the next in steps no larger than the ramp's."""
    tiling, ramp = Tiling(16, 8, 2), (8 - 2 * 2) * scale
    size = (8 + 8 * 6, 16) if axis == 0 else (16, 8 + 8 * 6)
    blend = tiling.apply(
        lambda cut: torch.full((1, 1, 16 * scale, 16 * scale), cut[axis].start / 8), *size, scale=scale
    )
    line = blend[0, 0, :, 0] if axis == 0 else blend[0, 0, 0]
    steps = line.diff()
    assert line[0] == 0 and line[-1] == 5 and (steps > -1e-6).all() and steps.max() < 1 / ramp + 1e-5


@pytest.mark.parametrize("height, width", [(8, 8), (9, 13), (16, 24), (33, 19), (5, 2), (100, 31)])
@pytest.mark.parametrize("gaussian", [True, False])
def test_pictures_of_any_size_are_encoded_as_they_are_whole(height, width, gaussian):
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


def test_what_a_quantizing_decoder_is_asked_for_reaches_it():
    model, z = LocalModel(), randn(4, 1, 4, 20, 20)
    tiled = TiledModel(model, TILING, factor=2)
    with torch.no_grad():
        torch.testing.assert_close(
            tiled.decode_first_stage(z, force_not_quantize=True), model.decode_first_stage(z, True)
        )
        assert not torch.allclose(tiled.decode_first_stage(z), model.decode_first_stage(z, True))


def test_a_concatenated_condition_is_cut_with_the_latent_and_anything_else_is_whole():
    model, x, beside, seen = LocalModel(concat=2), randn(5, 1, 4, 20, 11), randn(6, 1, 2, 20, 11), []
    tokens, inner = randn(7, 1, 3, 5), model.apply_model
    model.apply_model = lambda x, t, cond: (seen.append(cond["c_crossattn"][0]), inner(x, t, cond))[1]
    cond = {"c_concat": [beside], "c_crossattn": [tokens]}
    with torch.no_grad():
        out = TiledModel(model, TILING, factor=2).apply_model(x, torch.zeros(1), cond)
        torch.testing.assert_close(out, inner(x, torch.zeros(1), cond))
    assert len(seen) > 1 and all(c is tokens for c in seen) and cond["c_concat"][0] is beside
    with pytest.raises(ValueError, match="c_concat"):
        TiledModel(model, TILING, factor=2).apply_model(x, torch.zeros(1), {"c_concat": [beside[..., :5]]})


@pytest.mark.parametrize("height, width", [(3, 5), (8, 8), (13, 30)])
def test_the_network_sees_multiples_whatever_the_size(height, width):
    model = LocalModel()
    with torch.no_grad():
        out = TiledModel(model, TILING, factor=2, multiple=4).apply_model(randn(8, 1, 4, height, width), torch.zeros(1))
    assert out.shape == (1, 4, height, width)
    assert all(h % 4 == 0 and w % 4 == 0 and h <= 8 and w <= 8 for h, w in model.shapes)


def test_a_sampler_walks_a_tiled_model_and_nothing_changes_where_one_tile_holds_it_all():
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
def test_first_stages_as_they_are_trained_keep_their_form_and_nearly_their_values(kind):
    """They normalize over what they see, so that tiles are close to the whole and no more; one tile is the whole."""
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


def test_published_parameters_give_their_tiles(caplog):
    params = {
        "ks": (128, 128),
        "stride": (64, 64),
        "vqf": 4,
        "patch_distributed_vq": True,
        "tie_braker": False,
        "clip_min_weight": 0.01,
    }
    with caplog.at_level(logging.INFO):
        tiling = Tiling.from_split_input_params(params)
    assert tiling == Tiling((128, 128), (64, 64)) and tiling.margin_cells == 16
    assert "clip_min_weight, patch_distributed_vq, tie_braker" in caplog.text
    with pytest.raises(ValueError, match="unknown kss"):
        Tiling.from_split_input_params({**params, "kss": 1})
    with pytest.raises(ValueError, match="missing stride"):
        Tiling.from_split_input_params({"ks": (8, 8)})


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
def test_tiles_that_cannot_be_blended_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Tiling(*values)


def test_what_cannot_be_tiled_is_refused():
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
