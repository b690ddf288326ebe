"""Laws of training a VQ first stage, with a real Trainer on the CPU; test_autoencoder_training.py has those of both kinds."""

import copy

import pytest
import torch

from ldm.models.adversarial import ADAM_BETAS
from ldm.models.autoencoder import VQModelInterface
from ldm.modules.ema import LitEma
from tests.models.first_stages import batches, fit, make_vq
from tests.models.test_autoencoder_training import differing, state


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
        x = batch["image"].permute(0, 3, 1, 2).contiguous()
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
