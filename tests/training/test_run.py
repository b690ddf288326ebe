"""The part of a run that needs torch: messages."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torch import nn

from ldm.paths import ROOT
from ldm.training.run import _misfits, next_command


def test_a_state_of_another_shape_is_described_by_three_keys_the_count_and_the_settings():
    def model(ch):
        encoder = nn.ModuleDict({"conv_in": nn.Conv2d(3, ch, 3), "conv_out": nn.Conv2d(ch, 8, 3)})
        return nn.ModuleDict({"encoder": encoder, "norm": nn.BatchNorm1d(ch)})

    with pytest.raises(RuntimeError) as error:
        model(32).load_state_dict(model(64).state_dict())
    text = _misfits(str(error.value))
    assert text.startswith("encoder.conv_in.weight is [64, 3, 3, 3] in the file and [32, 3, 3, 3] in the model; ")
    assert text.count("in the file") == 3 and " and 4 more; the file needs ddconfig.ch=64; undo the change" in text


@pytest.mark.parametrize(
    "config, command",
    [
        ("recipes/text-to-image-folder", 'scripts/txt2img.py --ckpt "logs/a run" --prompt "..."'),
        ("recipes/class-conditional-folder", 'scripts/sample_diffusion.py -r "logs/a run" -n 16'),
        ("recipes/super-resolution-folder", 'scripts/upscale.py --ckpt "logs/a run" --init-img small.png'),
        ("recipes/inpainting-folder", 'scripts/inpaint.py --ckpt "logs/a run" --init-img photo.png --mask'),
        ("latent-diffusion/celebahq-ldm-vq-4", 'scripts/sample_diffusion.py -r "logs/a run" -n 16'),
        ("../models/ldm/semantic_synthesis256/config", 'scripts/sample_conditional.py -r "logs/a run"'),
        ("../models/ldm/layout2img-openimages256/config", 'scripts/sample_conditional.py -r "logs/a run"'),
        ("recipes/autoencoder-folder", "main.py --base configs/recipes/text-to-image-folder.yaml"),
        ("recipes/autoencoder-small-folder", "main.py --base configs/recipes/text-to-image-small-folder.yaml"),
        ("recipes/text-to-image-small-folder", 'scripts/txt2img.py --ckpt "logs/a run" --prompt "..."'),
        ("quickstart/textual-inversion", 'scripts/txt2img.py --ckpt "logs/a run" --prompt "... <digit>"'),
        ("quickstart/dreambooth", 'scripts/txt2img.py --ckpt "logs/a run" --prompt "a handwritten sks seven"'),
        ("quickstart/edit", 'scripts/edit.py --ckpt "logs/a run" --init-img photo.png --prompt "..."'),
        (
            "recipes/controlnet-folder",
            'scripts/control2img.py --ckpt "logs/a run" --control-image image.png',
        ),
    ],
)
def test_a_finished_run_names_the_command_that_uses_it(config, command):
    yaml = OmegaConf.load(ROOT / "configs" / f"{config}.yaml")
    assert next_command(yaml, Path("logs/a run")).replace("'", '"').startswith(f"python {command}")


def test_the_command_after_a_first_stage_names_its_data(tmp_path):
    recipe, shards = ROOT / "configs" / "recipes" / "autoencoder-folder.yaml", tmp_path / "data.yaml"
    shards.write_text("data: {params: {train: {params: {shards: x}}}}")
    yaml = OmegaConf.load(recipe)
    words = f" --base configs/recipes/text-to-image-folder.yaml {shards} -t "
    assert words in next_command(yaml, Path("logs/run"), [str(recipe), str(shards)])
    yaml.data.params.train.params.root = "my images"
    assert next_command(yaml, Path("logs/run")).endswith(" data.params.train.params.root='my images'")
    yaml.data.params.train.params.root = str(tmp_path)
    (tmp_path / "captions.csv").touch()
    assert next_command(yaml, Path("logs/run")).endswith(
        f".root={tmp_path} data.params.train.params.captions=captions.csv"
    )


def test_a_damaged_or_other_yaml_beside_the_config_does_not_end_a_finished_run(tmp_path):
    yaml = OmegaConf.load(ROOT / "configs" / "quickstart" / "autoencoder.yaml")
    OmegaConf.save(yaml, tmp_path / "own.yaml")
    (tmp_path / "damaged.yaml").write_text("a: [")
    stage = {"first_stage_config": {"target": yaml.model.target}}
    other = {"model": {"params": stage}, "data": {"params": {"train": yaml.data.params.train}}}
    OmegaConf.save(OmegaConf.create(other), tmp_path / "other.yaml")
    assert next_command(yaml, Path("logs/run"), [str(tmp_path / "own.yaml")]) == ""


def test_the_command_after_a_first_stage_takes_a_config_that_fits_its_shapes_and_data():
    digits = ROOT / "configs" / "quickstart" / "autoencoder.yaml"
    yaml = OmegaConf.load(digits)
    assert " --base configs/quickstart/text2image.yaml -t " in next_command(yaml, Path("logs/run"), [str(digits)])
    assert next_command(yaml, Path("logs/run")) == ""  # digits have no folder
    recipe = ROOT / "configs" / "recipes" / "autoencoder-small-folder.yaml"
    yaml = OmegaConf.load(recipe)
    yaml.model.params.ddconfig.attn_resolutions = [16, 32]
    attention = "model.params.first_stage_config.params.ddconfig.attn_resolutions=[16, 32]"
    assert f" '{attention}'" in next_command(yaml, Path("logs/run"), [str(recipe)])
    yaml.model.params.embed_dim = 4  # of which the UNet's channels depend
    assert next_command(yaml, Path("logs/run"), [str(recipe)]) == ""
    yaml = OmegaConf.load(recipe)
    yaml.data.params.train.target = "my.Dataset"
    assert next_command(yaml, Path("logs/run"), [str(recipe)]) == ""
