"""Laws of the validation loss by noise level: fixed samples, timesteps and noise, whatever the ranks and batches."""

import csv
import re
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from ldm.callbacks import LossBySNR, StepSeed
from ldm.callbacks.loss_by_snr import snr_bins
from ldm.config.instantiate import ConfigError
from ldm.data.datamodule import DataModuleFromConfig
from ldm.rng import BatchSamples, Purpose, normal_like, samples_set
from ldm.training.loggers import MetricsFile
from tests.callbacks.fit import fit
from tests.models.diffusion.test_ddpm import pixel_model
from tests.models.diffusion.tiny import unet
from tests.models.first_stages import QUIET
from tests.reference import randn


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"image": torch.tanh(randn(index, 8, 8, 3))}


UNET = unet(in_channels=3, out_channels=3, channel_mult=[1], attention_resolutions=[])


def train(folder, callback, batch_size=4, epochs=2, checkpoint=None):
    torch.manual_seed(0)  # of the averages' initial values
    model = pixel_model(use_ema=True, ema_decay=0.5, unet_config=UNET)
    model.learning_rate = 1e-3
    data = DataModuleFromConfig(batch_size, train={}, validation={}, num_workers=0)
    data.datasets, data.seed = {"train": Images(), "validation": Images()}, 3
    logger = MetricsFile(folder / "csv" / "metrics.csv")
    options = {**QUIET, "logger": logger, "log_every_n_steps": 1, "default_root_dir": str(folder)}
    trainer = pl.Trainer(callbacks=[StepSeed(3), callback], max_epochs=epochs, **options)
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return model, trainer


def test_a_bin_has_the_timesteps_of_its_log_snr_and_no_timestep_is_left_out():
    acp = np.linspace(0.999, 0.001, 500)
    bins = snr_bins(acp, 2.0, 3)
    assert [each.log_snr for each in bins] == [-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0]
    assert [each.name for each in bins][1:4] == ["val/loss_logsnr_-4", "val/loss_logsnr_-2", "val/loss_logsnr_0"]
    for each in bins:
        log_snr = np.log(acp / (1 - acp))[each.timesteps]
        assert (
            len(each.timesteps) == 3 or len(each.timesteps) == (abs(np.log(acp / (1 - acp)) - each.log_snr) <= 1).sum()
        )
        assert (abs(log_snr - each.log_snr) <= 1).all()


def test_a_timestep_without_signal_has_a_bin_of_its_own():
    assert next(each.name for each in snr_bins(np.array([0.9, 0.5, 0.0]), 2.0, 2)) == "val/loss_logsnr_-inf"


def test_a_metric_is_the_mean_error_at_the_timesteps_of_its_bin(tmp_path):
    callback = LossBySNR(samples=5, timesteps_per_bin=1)
    model, trainer = train(tmp_path, callback, epochs=1)
    with samples_set(BatchSamples(3, -1, range(5), 5)):  # -1: of evaluation
        x = torch.stack([Images()[index]["image"] for index in range(5)]).permute(0, 3, 1, 2)
        noise = normal_like(x, Purpose.NOISE)
    model.eval()
    with torch.no_grad(), model.ema_scope():
        for each in callback.bins:
            t = torch.full((5,), each.timesteps[0])
            wanted = (model.apply_model(model.q_sample(x, t, noise), t) - noise).square().mean()
            torch.testing.assert_close(trainer.callback_metrics[f"{each.name}_ema"], wanted)


def test_losses_depend_neither_on_the_batch_size_nor_on_the_number_of_ranks():
    torch.manual_seed(0)
    model = pixel_model(use_ema=True, unet_config=UNET)
    model.restart_ema()
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn="fit"), sanity_checking=False, precision_plugin=pl.plugins.precision.Precision()
    )

    def evaluated(size, ranks):
        total = None
        for rank in range(ranks):
            data = DataModuleFromConfig(size, validation={}, num_workers=0)
            data.datasets, data.seed, data._ranks = {"validation": Images()}, 3, lambda rank=rank: (rank, ranks)
            callback = LossBySNR(samples=7, timesteps_per_bin=1)
            callback.on_fit_start(trainer, model)
            callback.on_validation_epoch_start(trainer, model)
            for number, batch in enumerate(data.val_dataloader()):
                with samples_set(data.evaluation_samples("validation", number)):
                    callback.on_validation_batch_start(trainer, model, batch, number)
            total = callback._sums if total is None else total + callback._sums
        return total

    once = evaluated(10, 1)
    assert once[-1] == 7 and torch.equal(once[: len(once) // 2], once[len(once) // 2 : -1])  # averages equal weights
    for size, ranks in ((4, 1), (2, 2), (1, 3)):
        torch.testing.assert_close(evaluated(size, ranks), once)


def test_training_is_the_same_with_and_without_it(tmp_path):
    models = []
    for number, callback in enumerate((LossBySNR(samples=2, bin_width=4, timesteps_per_bin=1), pl.Callback())):
        model, trainer = train(tmp_path / str(number), callback)
        models.append(
            (model.state_dict(), {name: value for name, value in trainer.callback_metrics.items() if "snr" not in name})
        )
    for one, other in zip(*models):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_metrics_are_in_the_csv_and_the_plot_continues_after_a_resume(tmp_path, caplog):
    caplog.set_level("INFO", logger="ldm")
    callback = LossBySNR(samples=3, bin_width=4, timesteps_per_bin=1)
    _, trainer = train(tmp_path, callback)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    rows = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").open()))
    for suffix in ("", "_ema"):
        values = [float(row[f"val/loss_logsnr_4{suffix}"]) for row in rows if row.get(f"val/loss_logsnr_4{suffix}")]
        assert values == [pytest.approx(each["losses"][f"val/loss_logsnr_4{suffix}"]) for each in callback.history]
        assert len(values) == 2
    number = r"\d\.\d+"
    assert re.search(rf"by log-SNR, step 6: {number} at 0, {number} at 4, {number} at 8 \(", caplog.text)
    again = LossBySNR(samples=3, bin_width=4, timesteps_per_bin=1)
    train(tmp_path, again, epochs=3, checkpoint=str(tmp_path / "last.ckpt"))
    assert again.history[:2] == callback.history and [each["step"] for each in again.history] == [3, 6, 9]
    assert Image.open(tmp_path / "images" / "val" / "loss_by_logsnr.png").size[0] > 1000


def test_it_is_evaluated_every_few_validations_and_not_in_the_sanity_check():
    callback, due = LossBySNR(every=3), []
    for sanity_checking in (True, False, False, False, False):
        trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), sanity_checking=sanity_checking)
        callback.on_validation_epoch_start(trainer, None)
        due.append(callback._sums is not None)
    assert due == [False, True, False, False, True]


def test_a_model_without_noise_levels_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="LossBySNR: Toy is not a diffusion model; remove the callback"):
        fit(tmp_path, [LossBySNR()])
