"""Laws of the first stages as modules. Published values and manifests: tests/golden/README.md."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.config.instantiate import ConfigError
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage
from ldm.util import instantiate_from_config
from tests.models.first_stages import DDCONFIG, batches, loss_config, make_autoencoder
from tests.reference import GOLDEN, TOLERANCE, randn, rel_error, seed_weights

CONFIGS = Path(__file__).parents[2] / "configs" / "autoencoder"
# name: (embed_dim, ch_mult, attn_resolutions) of the published configs
PUBLISHED = {
    "autoencoder_kl_64x64x3": (3, [1, 2, 4], []),
    "autoencoder_kl_32x32x4": (4, [1, 2, 4, 4], []),
    "autoencoder_kl_16x16x16": (16, [1, 1, 2, 2, 4], [16]),
    "autoencoder_kl_8x8x64": (64, [1, 1, 2, 2, 4, 4], [16, 8]),
}


@torch.no_grad()
def test_outputs_have_the_published_values():
    ddconfig = {**DDCONFIG, "z_channels": 4, "resolution": 32, "ch_mult": [1, 2, 4]}
    model = seed_weights(AutoencoderKL(ddconfig, {"target": "torch.nn.Identity"}, embed_dim=4, monitor="val/rec_loss"))
    reconstruction, posterior = model(randn(13, 2, 3, 32, 32), sample_posterior=False)
    reference = np.load(GOLDEN / "modules/autoencoder_kl.npz")
    assert rel_error(reconstruction, reference["out0"]) < TOLERANCE
    assert rel_error(posterior.parameters, reference["out1"]) < TOLERANCE


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_configs_have_the_published_values_and_state_dicts(name):
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    embed_dim, ch_mult, attn_resolutions = PUBLISHED[name]
    params = config.model.params
    assert (config.model.base_learning_rate, params.embed_dim, params.ddconfig.z_channels) == (
        4.5e-6,
        embed_dim,
        embed_dim,
    )
    assert (list(params.ddconfig.ch_mult), list(params.ddconfig.attn_resolutions)) == (ch_mult, attn_resolutions)
    assert dict(params.lossconfig.params) == {"disc_start": 50001, "kl_weight": 1e-6, "disc_weight": 0.5}
    assert (config.data.params.batch_size, config.lightning.trainer.accumulate_grad_batches) == (12, 2)
    with torch.device("meta"):
        state = instantiate_from_config(config.model).state_dict()
    manifest = json.loads(gzip.decompress((GOLDEN / "manifests/autoencoder-kl.json.gz").read_bytes()))[name]
    assert {key: list(value.shape) for key, value in state.items()} == manifest


@torch.no_grad()
def test_encoding_and_decoding_shapes():
    model = make_autoencoder().eval()
    posterior = model.encode(torch.zeros(1, 3, 16, 24))
    assert posterior.mode().shape == (1, 2, 8, 12)
    assert model.decode(posterior.sample()).shape == (1, 3, 16, 24)
    assert model.get_last_layer() is model.decoder.conv_out.weight


@torch.no_grad()
def test_forward_samples_unless_asked_not_to():
    model = make_autoencoder().eval()
    x = model.get_input(batches(1)[0], "image")
    assert not torch.equal(model(x)[0], model(x)[0])
    assert torch.equal(model(x, sample_posterior=False)[0], model(x, sample_posterior=False)[0])


def test_images_come_channels_last_from_the_batch():
    model = make_autoencoder()
    batch = batches(1)[0]
    x = model.get_input(batch, "image")
    assert x.dtype == torch.float32 and torch.equal(x, batch["image"].permute(0, 3, 1, 2))
    assert model.get_input({"image": torch.zeros(2, 8, 8)}, "image").shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"no 'jpg', it has image: set image_key"):
        model.get_input(batch, "jpg")


def test_logged_images_lie_in_range_and_hold_no_graph():
    model = make_autoencoder()
    with torch.no_grad():
        model.decoder.conv_out.bias.fill_(3.0)
    images = model.log_images(batches(1)[0], split="val")
    assert list(images) == ["inputs", "samples", "reconstructions"]
    for value in images.values():
        assert value.shape == (2, 3, 16, 16) and value.min() >= -1 and value.max() <= 1 and not value.requires_grad
    assert model.log_images(batches(1)[0], N=1)["samples"].shape[0] == 1
    assert list(model.log_images(batches(1)[0], only_inputs=True)) == ["inputs"]


def test_segmentation_maps_are_drawn_in_colors():
    ddconfig = {**DDCONFIG, "in_channels": 5, "out_ch": 5}
    config = loss_config(use_discriminator=False)
    model = AutoencoderKL(ddconfig, config, embed_dim=2, image_key="segmentation", colorize_nlabels=5)
    images = model.log_images({"segmentation": torch.rand(1, 16, 16, 5)})
    assert images["inputs"].shape == images["reconstructions"].shape == (1, 3, 16, 16)
    assert images["inputs"].min() >= -1 and images["inputs"].max() <= 1
    model.image_key = "image"
    with pytest.raises(ValueError, match="cannot show 5 channels of 'image'"):
        model.log_images({"image": torch.rand(1, 16, 16, 5)})


def test_weights_are_read_from_ckpt_path(tmp_path):
    model = seed_weights(make_autoencoder())
    torch.save({"state_dict": model.state_dict()}, tmp_path / "kl.ckpt")
    other = AutoencoderKL(DDCONFIG, {"target": "torch.nn.Identity"}, embed_dim=2, ckpt_path=str(tmp_path / "kl.ckpt"))
    assert torch.equal(other.decoder.conv_out.weight, model.decoder.conv_out.weight)


def test_init_logvar_lowers_the_noise_at_the_start_and_weights_replace_it(tmp_path):
    plain, quiet = (AutoencoderKL(DDCONFIG, loss_config(), embed_dim=2, init_logvar=value) for value in (0.0, -8.0))
    quiet.load_state_dict(plain.state_dict() | {"quant_conv.bias": quiet.quant_conv.bias})
    images = torch.rand(2, 3, 16, 16)
    assert quiet.encode(images).logvar.mean() < plain.encode(images).logvar.mean() - 7
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "kl.ckpt")
    loaded = AutoencoderKL(DDCONFIG, loss_config(), 2, str(tmp_path / "kl.ckpt"), init_logvar=-8.0)
    assert torch.equal(loaded.quant_conv.bias, plain.quant_conv.bias)


def test_misspelt_and_missing_network_options_are_named():
    with pytest.raises(ConfigError, match=r"ddconfig\.num_res_block: .*did you mean 'num_res_blocks'"):
        AutoencoderKL({**DDCONFIG, "num_res_block": 1}, loss_config(), embed_dim=2)
    with pytest.raises(ConfigError, match=r"ddconfig: needs ch$"):
        AutoencoderKL({key: value for key, value in DDCONFIG.items() if key != "ch"}, loss_config(), embed_dim=2)


def test_wrong_options_are_refused_when_building():
    with pytest.raises(ValueError, match="double_z"):
        AutoencoderKL({**DDCONFIG, "double_z": False}, loss_config(), embed_dim=2)
    with pytest.raises(ValueError, match="Identity has no logvar"):
        AutoencoderKL(DDCONFIG, {"target": "torch.nn.Identity"}, embed_dim=2, learn_logvar=True)
    with pytest.raises(ValueError, match="colorize_nlabels"):
        AutoencoderKL(DDCONFIG, loss_config(), embed_dim=2, colorize_nlabels="five")


def test_identity_gives_back_what_it_gets():
    x = randn(1, 1, 3, 4, 4)
    stage, quantizing = IdentityFirstStage(), IdentityFirstStage(vq_interface=True, embed_dim=3)
    assert stage(x) is stage.encode(x) is stage.decode(x) is stage.quantize(x) is x
    z, loss, info = quantizing.quantize(x)
    assert z is x and loss is None and info == [None, None, None]
