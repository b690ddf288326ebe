"""Data that a model cannot use is refused before training, in pixels."""

from types import SimpleNamespace

import pytest

from ldm.callbacks import DataCheck
from ldm.config.instantiate import ConfigError
from ldm.data.folder import ImageFolder
from ldm.modules.encoders.modules import CaptionEmbedder
from tests.data.layouts import save_image


def model(levels=3, unet=2, **more):
    """A diffusion model with a first stage of `levels` resolutions (a factor of 2 ** (levels - 1)) and a UNet."""
    return SimpleNamespace(
        first_stage_model=SimpleNamespace(encoder=SimpleNamespace(num_resolutions=levels)),
        model=SimpleNamespace(diffusion_model=SimpleNamespace(channel_mult=(1,) * unet)),
        first_stage_key="image",
        **more,
    )


def check(module, data):
    trainer = SimpleNamespace(datamodule=SimpleNamespace(datasets={"train": data}), is_global_zero=True)
    callback = DataCheck()
    callback.setup(trainer, module, "fit")
    return callback


@pytest.mark.parametrize(
    ("size", "nearest"),
    [(30, "24x24 or 32x32"), (10, "8x8 or 16x16"), (1, "8x8"), ([16, 20], "16x16 or 16x24"), (16, None), (32, None)],
)
def test_sizes_that_the_model_cannot_process_are_refused_with_the_nearest(tmp_path, size, nearest):
    save_image(tmp_path / "a.png")
    data = ImageFolder(str(tmp_path), size=size)
    if nearest is None:
        check(model(), data)
        return
    height, width = size if isinstance(size, list) else (size, size)
    with pytest.raises(ConfigError) as caught:
        check(model(), data)
    assert str(caught.value) == (
        f"data.params.train.params.size: images of {height}x{width} pixels (height x width); this model needs "
        f"multiples of 8 (first stage 4 x UNet 2), the nearest are {nearest}"
    )


def test_an_autoencoder_needs_multiples_of_its_factor(tmp_path):
    save_image(tmp_path / "a.png")
    autoencoder = SimpleNamespace(encoder=SimpleNamespace(num_resolutions=3), image_key="image")
    check(autoencoder, ImageFolder(str(tmp_path), size=32, crop_size=28))
    with pytest.raises(ConfigError, match=r"params.crop_size: .* multiples of 4 .first stage 4 x UNet 1"):
        check(autoencoder, ImageFolder(str(tmp_path), size=32, crop_size=30))


def test_buckets_of_a_single_size_are_a_warning_with_the_smallest_step(tmp_path, caplog):
    save_image(tmp_path / "a.png", 0, 40, 40)
    for step, advice in ((32, "the smallest step of this model is 8"), (8, None)):
        caplog.clear()
        check(model(), ImageFolder(str(tmp_path), size=32, buckets={"step": step}))
        said = f"data.params.train.params.buckets.step {step}: one size only, 32x32, at size 32; {advice}"
        assert [message[12:] for message in caplog.messages] == ([said] if advice else [])


def test_captions_over_the_encoders_length_are_one_warning(tmp_path, caplog):
    for i in range(4):
        save_image(tmp_path / f"{i}.png", i)
        (tmp_path / f"{i}.txt").write_text(f"{i} " + "word " * (5 * i))
    module = model(cond_stage_key="caption", cond_stage_model=CaptionEmbedder(8, 1, max_seq_len=8))
    callback = check(module, ImageFolder(str(tmp_path), size=8, captions="sidecar"))
    module.cond_stage_model.encode(["another text that is longer than what the encoder takes"])
    (message,) = caplog.messages
    assert message.startswith("2 of 4 texts truncated to 6 tokens; dropped from the first: 'word word word word word'")
    callback.teardown()
    module.cond_stage_model.encode(["a further text that is longer than what the encoder takes"])
    assert len(caplog.messages) == 2
