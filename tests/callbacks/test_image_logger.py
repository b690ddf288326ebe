"""Image logs: when, how, and without side effects."""

import random
import re

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from ldm.callbacks import ImageLogger, StepSeed
from ldm.config.instantiate import ConfigError
from tests.callbacks.fit import fit
from tests.models.diffusion.test_ddpm import pixel_model
from tests.models.diffusion.test_fixed_samples import UNET
from tests.reference import randn
from tests.toys import Toy


def logged(folder, split="train", key="inputs"):
    """Steps with logged images."""
    names = [path.name for path in (folder / "images" / split).glob(f"{key}_*.png")]
    return sorted(int(re.search(r"_gs-(\d{6})_e-\d{6}_b-\d{6}\.png$", name)[1]) for name in names)


@pytest.mark.parametrize(
    "options, steps",
    [
        ({"batch_frequency": 5}, [1, 2, 4, 5, 10]),
        ({"batch_frequency": 5, "increase_log_steps": False}, [5, 10]),
        ({"batch_frequency": 5, "increase_log_steps": False, "log_first_step": True}, [0, 5, 10]),
        ({"batch_frequency": 5, "disabled": True}, []),
        ({"batch_frequency": 100, "increase_log_steps": False}, []),
    ],
)
def test_images_are_logged_at_the_published_steps(tmp_path, options, steps):
    fit(tmp_path, [ImageLogger(max_images=2, **options)], batches=11, validate=False)
    assert logged(tmp_path) == steps


def test_steps_are_optimizer_steps_and_logged_once_each(tmp_path):
    logger = ImageLogger(batch_frequency=2, max_images=2, increase_log_steps=False, log_first_step=True)
    fit(tmp_path, [logger], batches=12, validate=False, accumulate_grad_batches=3)
    assert logged(tmp_path) == [0, 2]


def test_log_on_batch_idx_counts_batches(tmp_path):
    logger = ImageLogger(batch_frequency=4, max_images=2, increase_log_steps=False, log_on_batch_idx=True)
    fit(tmp_path, [logger], batches=6, validate=False, max_epochs=2)
    names = sorted(path.name for path in (tmp_path / "images" / "train").glob("inputs*"))
    assert names == ["inputs_gs-000004_e-000000_b-000004.png", "inputs_gs-000010_e-000001_b-000004.png"]


def test_validation_logs_its_first_batch_and_not_too_often(tmp_path):
    fit(tmp_path, [ImageLogger(batch_frequency=8, max_images=2)], batches=4, max_epochs=5, num_sanity_val_steps=2)
    assert logged(tmp_path, "val") == [3, 11, 19]


def test_a_failed_image_log_is_reported_and_training_continues(tmp_path, caplog):
    class Broken(Toy):
        def log_images(self, batch, split="train", **kwargs):
            self.net.eval()
            raise RuntimeError("no paint")

    model, trainer = fit(tmp_path, [ImageLogger(batch_frequency=1, max_images=2)], Broken())
    assert trainer.global_step == 8 and "no paint" in caplog.text and model.net.training
    assert re.findall(r"val, step (\d+)", caplog.text) == ["8"]  # as the validation's own line


def test_arguments_of_log_images_are_passed_on(tmp_path):
    seen = []

    class Curious(Toy):
        def log_images(self, batch, split="train", **kwargs):
            seen.append((split, kwargs))
            return {}

    fit(
        tmp_path,
        [ImageLogger(batch_frequency=4, max_images=2, increase_log_steps=False, log_images_kwargs={"ddim_steps": 3})],
        Curious(),
    )
    assert seen == [("train", {"ddim_steps": 3}), ("val", {"ddim_steps": 3})]


@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode")
def test_logging_changes_neither_modes_nor_random_numbers(tmp_path):
    class Rough(Toy):
        def log_images(self, batch, split="train", **kwargs):
            assert not any(module.training for module in self.modules())
            random.random(), np.random.rand(), torch.rand(1)
            return {"x": torch.full((1, 3, 4, 4), float("nan"))}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, model, *args):
            numbers.append(
                (model.training, model.average.training, random.random(), np.random.rand(), float(torch.rand(())))
            )

    runs = []
    for disabled in (False, True):
        numbers = []
        model = Rough()
        model.average.eval()
        fit(tmp_path, [StepSeed(1), ImageLogger(1, 2, disabled=disabled), Watch()], model, validate=False)
        runs.append(numbers)
    assert runs[0] == runs[1] and runs[0][0][:2] == (True, False)


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (5, 1, 4, 6), (5, 2, 4, 6), (5, 4, 4, 6), (1, 3, 4, 6)])
def test_any_number_of_channels_becomes_an_image(shape):
    image = ImageLogger(1, 8)._grid(randn(0, *shape))
    rows, columns = 2, 4
    assert image.size == ((2 + columns * 8, 2 + rows * 6) if shape[0] > 1 else (6, 4)) and image.mode == "RGB"


def test_a_grid_is_in_reading_order_on_black():
    images = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 3, 2, 2) / 4
    pixels = np.asarray(ImageLogger(1, 8, rescale=False)._grid(images))
    assert pixels[2::4, 2::4, 0].tolist() == [[0, 64, 128, 191], [255, 0, 0, 0]]


def test_clamp_and_rescale_are_the_published_ones():
    x = torch.tensor([-3.0, 0.0, 0.5, 3.0]).reshape(1, 1, 2, 2)
    assert np.asarray(ImageLogger(1, 1)._grid(x))[..., 0].flatten().tolist() == [0, 128, 191, 255]
    assert np.asarray(ImageLogger(1, 1, rescale=False)._grid(x))[..., 0].flatten().tolist() == [0, 0, 128, 255]


@pytest.mark.parametrize("frequency", [0, -1])
def test_an_invalid_frequency_is_refused(frequency):
    with pytest.raises(ValueError, match=f"batch_frequency {frequency}"):
        ImageLogger(frequency, 1)


def test_fixed_samples_are_logged_at_every_validation(tmp_path):
    model = pixel_model(unet_config=UNET, timesteps=5)
    settings = {"count": 2, "steps": 2}
    logger = ImageLogger(1000, 2, increase_log_steps=False, fixed_samples=settings, log_images_kwargs={"sample": False})
    fit(tmp_path, [logger], model, batches=1, max_epochs=2, num_sanity_val_steps=1)
    names = sorted(path.name for path in (tmp_path / "images" / "val").glob("fixed*"))
    assert names == ["fixed_gs-000000_e-000000.png", "fixed_gs-000001_e-000001.png"]
    assert Image.open(tmp_path / "images" / "val" / names[0]).width > 2 * 90  # large enough for captions


def test_fixed_samples_of_a_model_that_they_do_not_fit_are_refused(tmp_path):
    for model, words in ((Toy(), "Toy is not a diffusion model"), (pixel_model(unet_config=UNET), "remove them")):
        with pytest.raises(ConfigError, match=f"lightning.callbacks.image_logger.params.fixed_samples.*{words}"):
            fit(tmp_path, [ImageLogger(8, 2, fixed_samples={"prompts": ["a cat"]})], model)
