"""Laws of the VQ first stages, as modules and in training; test_adversarial.py has those of both kinds."""

import copy

import numpy as np
import pytest
import torch

from ldm.models.adversarial import ADAM_BETAS
from ldm.models.autoencoder import VQModel, VQModelInterface
from ldm.models.vq import LARGEST_FIRST
from ldm.modules.ema import LitEma
from ldm.util import instantiate_from_config
from tests.models.first_stages import DDCONFIG, batches, differing, fit, make_vq, state, vq_config
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


def test_a_loss_that_counts_fewer_codes_than_the_codebook_has_is_refused():
    assert make_vq(loss={"n_classes": 16}).loss.n_classes == 16
    with pytest.raises(ValueError, match=r"^lossconfig.params.n_classes=8: the codebook has 16 entries; remove"):
        make_vq(loss={"n_classes": 8})


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


def test_logged_images_lie_in_range_and_hold_no_graph():
    model = make_vq(use_ema=True)
    with torch.no_grad():
        model.decoder.conv_out.bias.fill_(3.0)
    images = model.log_images(batches(1)[0], plot_ema=True, split="val")
    assert list(images) == ["inputs", "reconstructions", "reconstructions_ema"]
    for value in images.values():
        assert value.shape == (2, 3, 16, 16) and value.min() >= -1 and value.max() <= 1 and not value.requires_grad
    assert not torch.equal(images["reconstructions"], images["reconstructions_ema"])
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
    ],
)
def test_wrong_options_are_refused_when_building(options, message):
    with pytest.raises(ValueError, match=message):
        VQModel(**{**vq_config(), **options})


# ------------------------------------------------------------------------------------------------------------- training


def train_by_hand(model, data, accumulation: int) -> None:
    """What the module promises, written out without Lightning."""
    model.train()
    parts = (model.encoder, model.decoder, model.quantize, model.quant_conv, model.post_quant_conv)
    generator = [p for part in parts for p in part.parameters()]
    discriminator = list(model.loss.discriminator.parameters())
    rates = (model.lr_g_factor * model.learning_rate, model.learning_rate)
    optimizers = [
        torch.optim.Adam(p, lr=lr, betas=ADAM_BETAS, fused=True) for p, lr in zip((generator, discriminator), rates)
    ]
    updates = 0
    for number, batch in enumerate(data):
        x = batch["image"].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        ends = (number + 1) % accumulation == 0 or number + 1 == len(data)
        reconstruction, codebook_loss, codes = model(x, return_pred_indices=True)
        for index, (optimizer, other) in enumerate(zip(optimizers, (discriminator, generator))):
            shown = reconstruction if index == 0 else reconstruction.detach()
            for p in other:
                p.requires_grad_(False)
            last_layer = model.decoder.conv_out.weight
            loss, _ = model.loss(
                codebook_loss, x, shown, index, updates, last_layer=last_layer, predicted_indices=codes
            )
            if loss.requires_grad:
                (loss / accumulation).backward()
            for p in other:
                p.requires_grad_(True)
            if ends and loss.requires_grad:
                optimizer.step()
                optimizer.zero_grad()
        updates += ends


@pytest.mark.parametrize(("accumulation", "disc_start"), [(1, 0), (2, 1)])
def test_training_is_bit_for_bit_a_loop_written_by_hand(accumulation, disc_start):
    data = batches(5)
    model = make_vq(accumulation=accumulation, loss={"disc_start": disc_start}, lr_g_factor=0.5)
    by_hand, start = copy.deepcopy(model), state(model)
    fit(model, data)
    train_by_hand(by_hand, data, accumulation)
    assert differing(state(model), state(by_hand)) == []
    moved = differing(state(model), start)
    assert {"quantize.embedding.weight", "quant_conv.weight", "loss.discriminator.main.0.weight"} <= set(moved)


def test_the_interface_trains_as_the_model_does():
    model, interface = make_vq(), make_vq(cls=VQModelInterface)
    for trained in (model, interface):
        fit(trained, batches(2), validation=batches(1))
    assert differing(state(model), state(interface)) == []


def test_the_reconstruction_improves():
    model = make_vq(learning_rate=3e-3, loss={"disc_start": 20})
    x = model.get_input(batches(1)[0], "image")
    with torch.no_grad():
        before = (model(x)[0] - x).abs().mean()
    fit(model, batches(1) * 30)
    with torch.no_grad():
        after = (model(x)[0] - x).abs().mean()
    assert torch.isfinite(after) and after < 0.8 * before


def test_logs_have_the_published_names_and_the_use_of_the_codebook():
    trainer = fit(make_vq(), batches(2), validation=batches(2))
    parts = {
        "total_loss",
        "quant_loss",
        "nll_loss",
        "rec_loss",
        "p_loss",
        "d_weight",
        "disc_factor",
        "g_loss",
        "perplexity",
        "cluster_usage",
    }
    parts |= {"disc_loss", "logits_real", "logits_fake", "codebook_usage", "codebook_perplexity"}
    expected = {f"{split}/{part}" for split in ("train", "val") for part in parts} | {
        "aeloss",
        "discloss",
        "val/aeloss",
    }
    assert expected <= set(trainer.callback_metrics)
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())
    assert not any(name.startswith("val_ema") for name in trainer.callback_metrics)


def test_the_codebooks_use_is_that_of_the_whole_validation_set():
    model, data = make_vq(learning_rate=1e-9), batches(4)
    logged = fit(model, data[:1], validation=data, num_sanity_val_steps=2).callback_metrics
    with torch.no_grad():
        codes = torch.cat([model(model.get_input(batch, "image"), return_pred_indices=True)[2] for batch in data])
    frequencies = torch.bincount(codes, minlength=16) / len(codes)
    assert logged["val/codebook_usage"] == (frequencies > 0).sum() / 16
    torch.testing.assert_close(logged["val/codebook_perplexity"], torch.special.entr(frequencies).sum().exp())
    assert logged["val/cluster_usage"] <= (frequencies > 0).sum()  # of single batches, averaged


def test_the_average_moves_once_an_update_and_is_validated_too():
    model = make_vq(use_ema=True, accumulation=2)
    start = make_vq(use_ema=True)
    trainer = fit(model, batches(2), validation=batches(1))
    assert model.model_ema.num_updates == 1
    by_hand = LitEma(start)
    by_hand(model)
    assert torch.equal(model.model_ema.quantizeembeddingweight, by_hand.quantizeembeddingweight)
    logged = trainer.callback_metrics
    assert logged["val_ema/rec_loss"] != logged["val/rec_loss"] and {"val_ema/aeloss", "val_ema/codebook_usage"} <= set(
        logged
    )


def test_a_resumed_run_is_exact(tmp_path):
    data, options = batches(3), {"use_ema": True, "loss": {"disc_start": 2}, "batch_resize_range": [16, 32]}
    straight = make_vq(**options)
    fit(straight, data, max_epochs=2)
    fit(make_vq(**options), data, max_epochs=1).save_checkpoint(tmp_path / "last.ckpt")
    resumed = make_vq(**options)
    trainer = fit(resumed, data, ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    assert trainer.global_step == resumed.generator_updates == 6
    assert differing(state(resumed), state(straight)) == []


@pytest.mark.parametrize("off", [{"use_discriminator": False}, {"disc_factor": 0.0}])
def test_without_an_adversarial_game_it_trains_on_reconstruction_alone(off):
    model = make_vq(loss=off)
    trainer = fit(model, batches(2), validation=batches(1))
    assert trainer.global_step == 2 and "discloss" not in trainer.callback_metrics
    assert "decoder.conv_out.weight" in differing(state(model), state(make_vq(loss=off)))


def test_bfloat16_autocast_trains():
    model = make_vq()
    trainer = fit(model, batches(2), precision="bf16-mixed")
    assert torch.isfinite(trainer.callback_metrics["train/total_loss"])
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())


def test_a_config_that_only_encodes_and_decodes_names_the_loss_to_train_with():
    model = make_vq()
    model.loss = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"Identity, which cannot train: .*VQLPIPSWithDiscriminator"):
        fit(model, batches(1))
