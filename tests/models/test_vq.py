"""Laws of the VQ first stages as modules; tests/golden has the published figures, tests/test_configs.py the published names."""

import numpy as np
import pytest
import torch

from ldm.models.autoencoder import VQModel, VQModelInterface
from ldm.models.vq import LARGEST_FIRST
from ldm.util import instantiate_from_config
from tests.models.first_stages import DDCONFIG, batches, make_vq, vq_config
from tests.reference import randn

X = torch.tanh(randn(1, 2, 3, 16, 24))


@torch.no_grad()
def test_encoding_quantizes_and_decoding_takes_what_it_gives():
    model = make_vq().eval()
    quant, codebook_loss, (_, _, codes) = model.encode(X)
    assert quant.shape == (2, 2, 8, 12) and codebook_loss.shape == () and codes.shape == (2 * 8 * 12,)
    torch.testing.assert_close(quant.permute(0, 2, 3, 1).reshape(-1, 2), model.quantize.embedding.weight[codes])
    reconstruction, same_loss, same_codes = model(X, return_pred_indices=True)
    assert (
        torch.equal(model.decode(quant), reconstruction)
        and torch.equal(same_loss, codebook_loss)
        and torch.equal(same_codes, codes)
    )
    assert len(model(X)) == 2 and torch.equal(model(X)[0], reconstruction)


@torch.no_grad()
def test_the_interface_encodes_to_latents_that_decoding_quantizes():
    model, interface = make_vq().eval(), make_vq(cls=VQModelInterface).eval()
    h = interface.encode(X)
    assert torch.equal(h, model.encode_to_prequant(X)) and not torch.equal(h, model.encode(X)[0])
    assert torch.equal(interface.decode(h), model(X)[0]) and torch.equal(interface(X)[0], model(X)[0])
    assert torch.equal(interface.decode(h, force_not_quantize=True), model.decode(h))
    assert not torch.equal(interface.decode(h, force_not_quantize=True), interface.decode(h))


@torch.no_grad()
@pytest.mark.parametrize("cls", [VQModel, VQModelInterface])
def test_codes_decode_to_the_reconstruction(cls):
    model = make_vq(cls=cls, sane_index_shape=True).eval()
    reconstruction, _, codes = model(X, return_pred_indices=True)
    assert codes.shape == (2, 8, 12)
    torch.testing.assert_close(model.decode_code(codes), reconstruction)
    with pytest.raises(ValueError, match="sane_index_shape"):
        model.decode_code(codes.flatten())


@torch.no_grad()
def test_remapped_codes_decode_to_the_reconstruction(tmp_path):
    every_second = np.arange(15, -1, -2)
    np.save(tmp_path / "used.npy", every_second)
    model = make_vq(remap=str(tmp_path / "used.npy"), sane_index_shape=True).eval()
    assert model.n_codes == model.loss.n_classes == 8
    model.quantize.embedding.weight[::2] = 100.0  # only codes of the list occur
    reconstruction, _, codes = model(X, return_pred_indices=True)
    assert codes.max() < 8
    torch.testing.assert_close(model.decode_code(codes), reconstruction)


@pytest.mark.parametrize("cls", [VQModel, VQModelInterface])
def test_it_builds_without_memory(cls):
    with torch.device("meta"):
        model = instantiate_from_config(
            {"target": f"ldm.models.autoencoder.{cls.__name__}", "params": vq_config(use_ema=True)}
        )
    assert type(model) is cls and all(tensor.is_meta for tensor in model.state_dict().values())


def test_the_loss_learns_how_many_codes_there_are():
    assert make_vq().loss.n_classes == 16 and make_vq(loss={"n_classes": 20}).loss.n_classes == 20


def test_the_average_has_the_published_names_and_leaves_frozen_weights_out():
    model = make_vq(use_ema=True, loss={"perceptual_weight": 1.0, "perceptual_init": "random"})
    averages = {name for name in model.state_dict() if name.startswith("model_ema.")} - {
        "model_ema.decay",
        "model_ema.num_updates",
    }
    trained = {
        "model_ema." + name.replace(".", "")
        for name, p in model.named_parameters()
        if ".perceptual_loss." not in f".{name}"
    }
    assert averages == trained and "model_ema.quantizeembeddingweight" in averages


def test_within_the_scope_of_the_average_the_weights_are_averages():
    model = make_vq(use_ema=True)
    weight, average = model.quantize.embedding.weight, model.model_ema.quantizeembeddingweight
    average.fill_(7.0)
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), model.ema_scope():
        with model.ema_scope():
            assert (weight == 7.0).all()
        assert (weight == 7.0).all()
        raise RuntimeError("inside")
    assert torch.equal(weight, before)
    with make_vq().ema_scope():  # nothing to average, nothing to do
        pass


def test_weights_are_read_from_ckpt_path_and_averages_start_there(tmp_path):
    model = make_vq()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "vq.ckpt")
    torch.manual_seed(1)
    config = vq_config(use_ema=True, ckpt_path=str(tmp_path / "vq.ckpt"))
    other = VQModelInterface(**{**config, "lossconfig": {"target": "torch.nn.Identity"}})
    assert torch.equal(other.quantize.embedding.weight, model.quantize.embedding.weight)
    assert torch.equal(other.model_ema.quantizeembeddingweight, model.quantize.embedding.weight)


def test_logged_pictures_lie_in_range_and_hold_no_graph():
    model = make_vq(use_ema=True)
    with torch.no_grad():
        model.decoder.conv_out.bias.fill_(3.0)
    pictures = model.log_images(batches(1)[0], plot_ema=True, split="val")
    assert list(pictures) == ["inputs", "reconstructions", "reconstructions_ema"]
    for value in pictures.values():
        assert value.shape == (2, 3, 16, 16) and value.min() >= -1 and value.max() <= 1 and not value.requires_grad
    assert not torch.equal(pictures["reconstructions"], pictures["reconstructions_ema"])
    assert model.log_images(batches(1)[0], N=1)["reconstructions"].shape[0] == 1
    assert list(model.log_images(batches(1)[0], only_inputs=True)) == ["inputs"]
    with pytest.raises(ValueError, match="use_ema: true"):
        make_vq().log_images(batches(1)[0], plot_ema=True)


def test_training_batches_are_resized_within_the_range_at_first_to_its_end():
    model = make_vq(batch_resize_range=[16, 64]).train()
    batch = {"image": torch.tanh(randn(2, 1, 32, 32, 3))}
    sides = []
    for update in range(LARGEST_FIRST + 40):
        model.generator_updates = update
        x = model.get_input(batch, "image")
        assert x.shape[2] == x.shape[3] and x.min() >= -1 and x.max() <= 1
        sides.append(x.shape[2])
    assert sides[:LARGEST_FIRST] == [64] * LARGEST_FIRST and set(sides) == {16, 32, 48, 64}
    assert model.eval().get_input(batch, "image").shape == (1, 3, 32, 32)
    assert torch.equal(model.get_input(batch, "image"), batch["image"].permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ddconfig": {**DDCONFIG, "double_z": True}}, "double_z=True: a quantized latent has no variance"),
        ({"batch_resize_range": [16, 40]}, r"batch_resize_range=\[16, 40\]"),
        ({"batch_resize_range": [15, 31]}, "multiples of the downsampling factor 2"),
        ({"batch_resize_range": [32, 16]}, r"batch_resize_range=\[32, 16\]"),
        ({"lr_g_factor": 0.0}, "lr_g_factor=0.0"),
    ],
)
def test_wrong_options_are_refused_when_building(options, message):
    with pytest.raises(ValueError, match=message):
        VQModel(**{**vq_config(), **options})
