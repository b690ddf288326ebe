"""Laws of training a first stage against a discriminator, each with a real Trainer on the CPU."""

import copy
from contextlib import nullcontext

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.plugins.precision import MixedPrecision

from ldm.models.adversarial import ADAM_BETAS
from ldm.models.training import NonFiniteError
from ldm.modules.losses import lpips
from ldm.modules.losses.lpips import PerceptualWeightsError
from tests.models.first_stages import batches, differing, fit, make_autoencoder, make_vq, state

COSINE = {
    "target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": {"warm_up_steps": 2, "lr_min": 0.1, "lr_max": 1.0, "lr_start": 0.25, "max_decay_steps": 8},
}


def train_by_hand(
    model, data, accumulation: int, clip: float | None, clip_algorithm: str = "norm", epochs: int = 1
) -> None:
    """What the module promises, written out without Lightning."""
    model.train()
    parts = (model.encoder, model.decoder, model.quant_conv, model.post_quant_conv)
    generator = [p for part in parts for p in part.parameters()]
    discriminator = list(model.loss.discriminator.parameters())
    optimizers = [
        torch.optim.Adam(p, lr=model.learning_rate, betas=ADAM_BETAS, fused=True) for p in (generator, discriminator)
    ]
    updates, drawn = 0, 0
    for _ in range(epochs):
        for number, batch in enumerate(data):
            drawn += 1
            torch.manual_seed(drawn)
            x = batch["image"].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
            ends = (number + 1) % accumulation == 0 or number + 1 == len(data)
            reconstruction, posterior = model(x)
            for index, (optimizer, own, other) in enumerate(
                zip(optimizers, (generator, discriminator), (discriminator, generator))
            ):
                shown = reconstruction if index == 0 else reconstruction.detach()
                for p in other:
                    p.requires_grad_(False)
                loss, _ = model.loss(x, shown, posterior, index, updates, last_layer=model.get_last_layer())
                if loss.requires_grad:
                    (loss / accumulation).backward()
                for p in other:
                    p.requires_grad_(True)
                if ends and loss.requires_grad:
                    if clip is not None and clip_algorithm == "norm":
                        torch.nn.utils.clip_grad_norm_(own, clip)
                    elif clip is not None:
                        torch.nn.utils.clip_grad_value_(own, clip)
                    optimizer.step()
                    optimizer.zero_grad()
            updates += ends


@pytest.mark.parametrize(
    ("accumulation", "clip", "clip_algorithm", "disc_start"),
    [(1, None, "norm", 0), (2, None, "norm", 1), (3, 0.05, "norm", 0), (2, 1e-3, "value", 0)],
)
def test_training_is_bit_for_bit_a_loop_written_by_hand(accumulation, clip, clip_algorithm, disc_start):
    data = batches(5)  # with 2 and 3 the last window of an epoch is a shorter one
    model = make_autoencoder(accumulation=accumulation, loss={"disc_start": disc_start})
    by_hand = copy.deepcopy(model)
    model.gradient_clip_val, model.gradient_clip_algorithm = clip, clip_algorithm
    fit(model, data, max_epochs=2)
    train_by_hand(by_hand, data, accumulation, clip, clip_algorithm, epochs=2)
    assert differing(state(model), state(by_hand)) == []
    assert differing(state(model), state(make_autoencoder())) != []


def test_clipping_changes_what_is_learned():
    free, clipped = make_autoencoder(), make_autoencoder()
    clipped.gradient_clip_val = 1e-9  # below Adam's eps, so that the steps shrink too
    for model in (free, clipped):
        fit(model, batches(2))
    start = make_autoencoder().decoder.conv_out.weight
    moved = [(model.decoder.conv_out.weight - start).abs().max().item() for model in (free, clipped)]
    assert moved[1] < 0.3 * moved[0]


@pytest.mark.parametrize(("accumulation", "updates"), [(1, 5), (2, 3), (3, 2), (9, 1)])
def test_global_step_and_the_counter_are_generator_updates(accumulation, updates):
    model = make_autoencoder(accumulation=accumulation)
    trainer = fit(model, batches(5))
    assert trainer.global_step == model.generator_updates == model.logging_step == updates


def test_max_steps_counts_generator_updates():
    model = make_autoencoder(accumulation=2)
    trainer = fit(model, batches(8), max_steps=3)
    assert trainer.global_step == model.generator_updates == 3 and trainer.fit_loop.epoch_loop.total_batch_idx == 5


class DiscriminatorHistory(pl.Callback):
    """Whether the discriminator's weights moved, batch by batch."""

    def __init__(self) -> None:
        self.moved: list[bool] = []
        self.before: torch.Tensor | None = None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        now = module.loss.discriminator.main[0].weight.detach().clone()
        self.moved.append(self.before is not None and not torch.equal(now, self.before))
        self.before = now


def test_disc_start_counts_generator_updates_and_not_batches():
    history = DiscriminatorHistory()
    fit(make_autoencoder(accumulation=2, loss={"disc_start": 2}), batches(8), callbacks=[history])
    assert history.moved == [False, False, False, False, False, True, False, True]


def test_disc_start_survives_a_resume_and_the_resumed_run_is_exact(tmp_path):
    data = batches(4)
    options = {"accumulation": 2, "loss": {"disc_start": 3}, "scheduler_config": COSINE}
    straight = make_autoencoder(**options)
    fit(straight, data, max_epochs=3)

    first = make_autoencoder(**options)
    fit(first, data, max_epochs=1).save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["generator_updates"] == saved["global_step"] == 2
    assert not any("generator_updates" in name for name in saved["state_dict"])

    history = DiscriminatorHistory()
    resumed = make_autoencoder(**options)
    trainer = fit(resumed, data, ckpt_path=tmp_path / "last.ckpt", max_epochs=3, callbacks=[history])
    assert trainer.global_step == resumed.generator_updates == 6
    assert history.moved == [False, False, False, True, False, True, False, True]
    assert differing(state(resumed), state(straight)) == []


def test_the_counter_of_a_published_checkpoint_is_its_global_step():
    model = make_autoencoder()
    model.on_load_checkpoint({"global_step": 123})
    assert model.generator_updates == 123


class NaNAt(pl.Callback):
    """Puts a NaN into one batch, and keeps the weights from before it."""

    def __init__(self, batch_idx: int) -> None:
        self.batch_idx = batch_idx
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == self.batch_idx:
            self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}
            batch["image"] = batch["image"] * float("nan")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_stops_before_the_update(accumulation):
    model, callback = make_autoencoder(accumulation=accumulation), NaNAt(2)
    with pytest.raises(
        NonFiniteError, match=r"generator update \d, rank 0: .*train/nll_loss.*weights are good"
    ) as caught:
        fit(model, batches(5), callbacks=[callback])
    assert "\n" not in str(caught.value)
    weights = dict(model.named_parameters())
    assert callback.weights and differing(callback.weights, {name: p.detach() for name, p in weights.items()}) == []
    assert all(p.requires_grad for name, p in weights.items() if name != "loss.logvar")
    assert model.generator_updates == 2 // accumulation


@pytest.mark.parametrize("part", ["encoder.conv_in.weight", "loss.discriminator.main.0.weight"])
def test_a_gradient_that_is_not_finite_stops_before_the_update(part):
    model = make_autoencoder()
    parameter = dict(model.named_parameters())[part]
    before = parameter.detach().clone()
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=r"gradient norm (nan|inf)"):
        fit(model, batches(2))
    assert torch.equal(parameter, before)


def test_the_schedule_moves_both_learning_rates_at_generator_updates():
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

    fit(make_autoencoder(learning_rate=0.5, accumulation=2, scheduler_config=COSINE), batches(4), callbacks=[Rates()])
    assert rates == [[0.125] * 2, [0.3125] * 2, [0.3125] * 2, [0.5] * 2]


@pytest.mark.parametrize("off", [{"use_discriminator": False}, {"disc_factor": 0.0}, {"disc_weight": 0.0}])
def test_without_an_adversarial_game_no_discriminator_runs(off):
    model = make_autoencoder(loss=off)
    if model.loss.discriminator is not None:
        model.loss.discriminator.register_forward_hook(lambda *_: pytest.fail("the discriminator ran"))
    trainer = fit(model, batches(3), validation=batches(1))
    assert trainer.global_step == model.generator_updates == 3
    assert len(trainer.optimizers) == (1 if model.loss.discriminator is None else 2)
    assert differing(state(model), state(make_autoencoder(loss=off))) != []


@pytest.mark.parametrize("place", ["loss", "model", "nowhere"])
def test_logvar_is_trained_only_where_asked(place):
    model = make_autoencoder(loss={"learn_logvar": place == "loss"}, learn_logvar=place == "model")
    fit(model, batches(2))
    assert (model.loss.logvar.item() != 0.0) == (place != "nowhere")


def test_logs_have_the_published_names():
    model = make_autoencoder()
    trainer = fit(model, batches(2), validation=batches(2))
    parts = {"total_loss", "logvar", "kl_loss", "nll_loss", "rec_loss", "d_weight", "disc_factor", "g_loss"}
    parts |= {"disc_loss", "logits_real", "logits_fake"}
    expected = {f"{split}/{part}" for split in ("train", "val") for part in parts} | {"aeloss", "discloss"}
    assert expected <= set(trainer.callback_metrics)
    assert model.monitor == "val/rec_loss" and torch.isfinite(trainer.callback_metrics["val/rec_loss"])


def test_logs_are_drawn_over_generator_updates():
    steps = []

    class Steps(DummyLogger):
        def log_metrics(self, metrics, step) -> None:
            if "train/rec_loss" in metrics:
                steps.append(step)

    fit(make_autoencoder(accumulation=2), batches(6), logger=Steps(), log_every_n_steps=1)
    assert steps == [0, 0, 1, 1, 2, 2]


def test_bfloat16_autocast_trains():
    model = make_autoencoder()
    trainer = fit(model, batches(2), precision="bf16-mixed")
    assert torch.isfinite(trainer.callback_metrics["train/total_loss"])
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("make", [make_autoencoder, make_vq])
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_first_stages_with_weights_of_another_dtype_train(precision, make):
    trainer = fit(make(), batches(1), precision=precision)
    assert torch.isfinite(trainer.callback_metrics["train/total_loss"])
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16 if "16" in precision else torch.float64}


class LossScaling(MixedPrecision):
    """float16's scaling of losses by itself: the arithmetic stays float32, in which scaling by powers of 2 is exact."""

    def __init__(self, **options) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0, **options))

    def autocast_context_manager(self):
        return nullcontext()


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_a_changing_loss_scale_changes_nothing_of_what_is_learned(accumulation):
    plain, scaled = make_autoencoder(accumulation=accumulation), make_autoencoder(accumulation=accumulation)
    fit(plain, batches(6))
    plugin = LossScaling(growth_interval=1)  # the scale doubles at every step of either optimizer
    fit(scaled, batches(6), plugins=[plugin])
    assert plugin.scaler.get_scale() == 256.0 * 2 ** (2 * plain.generator_updates)
    assert differing(state(scaled), state(plain)) == []


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_update_that_float16s_scaler_skips_moves_the_discriminator_alone(accumulation):
    model, moved = make_autoencoder(accumulation=accumulation), []
    model.update_ema = lambda: moved.append(model.generator_updates)
    start = state(model)
    model.encoder.conv_in.weight.register_hook(
        lambda gradient: gradient * float("inf") if model.generator_updates == 0 else gradient
    )
    plugin = LossScaling(growth_interval=100)
    fit(model, batches(accumulation), plugins=[plugin])
    assert plugin.scaler.get_scale() == 128.0 and model.generator_updates == 1 and moved == []
    changed = differing(state(model), start)
    assert changed and all(name.startswith("loss.discriminator.") for name in changed)
    fit(model, batches(accumulation), plugins=[LossScaling(growth_interval=100)])
    assert moved == [2]


def test_a_config_that_only_encodes_and_decodes_does_not_train():
    model = make_autoencoder()
    model.loss = torch.nn.Identity()
    with pytest.raises(ValueError, match="Identity, which cannot train"):
        fit(model, batches(1))


def test_a_missing_learning_rate_is_one_clear_line():
    with pytest.raises(ValueError, match="learning_rate is not set"):
        fit(make_autoencoder(learning_rate=None), batches(1))


@pytest.mark.parametrize(("name", "value"), [("accumulate_grad_batches", 0), ("gradient_clip_algorithm", "median")])
def test_wrong_training_settings_are_refused_before_the_first_step(name, value):
    model = make_autoencoder()
    setattr(model, name, value)
    with pytest.raises(ValueError, match=f"{name}="):
        fit(model, batches(1))


@pytest.mark.parametrize("source", ["random", "checkpoint", "nowhere"])
def test_perceptual_weights_are_there_before_the_first_step_or_the_run_stops(source, tmp_path, monkeypatch):
    monkeypatch.setattr(lpips, "VGG16_URL", (tmp_path / "vgg16.pth").as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv(lpips.VGG16_VARIABLE, raising=False)
    initial = "random" if source == "random" else "pretrained"
    model = make_autoencoder(loss={"perceptual_weight": 1.0, "perceptual_init": initial, "use_discriminator": False})
    before = state(model)
    if source == "checkpoint":
        model.load_state_dict(before)
    with pytest.raises(PerceptualWeightsError, match="LPIPS needs VGG16") if source == "nowhere" else nullcontext():
        fit(model, batches(1))
    moved = differing(state(model), before)
    assert bool(moved) == (source != "nowhere") and not any("perceptual" in name for name in moved)
