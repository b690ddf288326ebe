"""Facts of a model from its YAML."""

import pytest
from omegaconf import OmegaConf

from ldm.config.model_info import model_info, read_config, read_model_info
from ldm.inference.requests import (
    ClassConditionalRequest,
    require_text_model,
)
from ldm.paths import ROOT
from tests.shapes import CLIP, config
from tests.tiny import KINDS, text_model_config


def test_facts_of_stable_diffusion_are_read_off_its_yaml():
    info = model_info(read_config(ROOT / "configs/stable-diffusion/v1-inference.yaml"))
    assert (info.timesteps, info.channels, info.factor, info.latent_multiple, info.use_ema) == (
        1000,
        4,
        8,
        8,
        False,
    )
    require_text_model(info)


def test_facts_follow_the_constructors_defaults_where_the_yaml_is_silent():
    info = model_info(
        {"model": {"target": "ldm.models.diffusion.ddpm.DDPM", "params": {"unet_config": {"params": {}}}}}
    )
    assert (info.timesteps, info.channels, info.factor, info.latent_multiple, info.use_ema) == (
        1000,
        3,
        1,
        8,
        True,
    )
    identity = model_info(config(first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"}))
    assert identity.factor == 1


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "- 1\n- 2\n",
        "data: {}",
        "model: 3",
        "model: {params: {}}",
        "model: {target: x, a: '${nowhere}'}",
        "\x00",
    ],
)
def test_an_invalid_config_is_refused_in_one_line_by_name(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"c\.yaml"):
        read_config(file)
    with pytest.raises(FileNotFoundError, match="no such file; give --config"):
        read_config(tmp_path / "other.yaml")


def info(kind: str, **params):
    return model_info(text_model_config(**{**KINDS[kind], **params}))


def test_the_null_class_follows_from_1001_classes_or_dropout():
    def null_class(n_classes: int | None, **params) -> int | None:
        embedder = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 8}}
        embedder["params"] |= {} if n_classes is None else {"n_classes": n_classes}
        found = info("class", cond_stage_config=embedder, **params)
        assert found.n_classes == (n_classes or 1000)
        return found.null_class

    assert null_class(1001, cond_dropout=0.0) == 1000 and null_class(10, cond_dropout=0.1) == 9
    assert null_class(None, cond_dropout=0.0) is None
    assert ClassConditionalRequest().checked(info("class")).null_class == 5


def test_configs_are_merged_and_overrides_come_last(tmp_path):
    for k in range(2):
        target = "ldm.models.diffusion.ddpm.DDPM"
        (tmp_path / f"{k}.yaml").write_text(f"model: {{target: {target}, params: {{timesteps: {k}, channels: {k}}}}}\n")
    params = read_config(
        [tmp_path / "0.yaml", tmp_path / "1.yaml"], ["model.params.channels=5", "model.params.image_size=8"]
    ).model.params
    assert params == {"timesteps": 1, "channels": 5, "image_size": 8}
    with pytest.raises(ValueError, match=r"did you mean model\.params\.channels\?"):
        read_config(tmp_path / "0.yaml", ["model.params.chanels=5"])


SD_V1 = ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"


def info_of(**top):
    return model_info(OmegaConf.create({**text_model_config(), **top}))


def test_only_stable_diffusion_configs_turn_the_safety_check_on():
    """Those of its folder and of models that are made from its weights, and the recipes that go on from them."""
    configs = [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("models/ldm/**/*.yaml")]
    on = {path for path in configs if model_info(read_config(path)).safety == "on"}
    names = ["inpainting", "instruct-pix2pix", "controlnet", "dreambooth", "dreambooth-lora"]
    names += ["lora-stable-diffusion-v1", "lora-stable-diffusion-v2", "textual-inversion-object"]
    names += ["textual-inversion-style"]
    recipes = [ROOT / "configs" / "recipes" / f"{name}-folder.yaml" for name in names]
    folders = ("stable-diffusion", "controlnet", "instruct-pix2pix")
    models = [file for folder in folders for file in ROOT.glob(f"configs/{folder}/*.yaml")]
    assert on == {*models, *recipes} and len(configs) > 20


def test_a_clip_text_encoder_turns_the_safety_check_on_by_default(tmp_path):
    lines = SD_V1.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "v1.yaml").write_text("".join(line for line in lines if not line.startswith("safety:")))
    assert model_info(read_config(tmp_path / "v1.yaml")).safety == model_info(read_config(SD_V1)).safety == "on"
    (tmp_path / "v1.yaml").write_text(
        "safety: off\n" + "".join(line for line in lines if not line.startswith("safety:"))
    )
    assert model_info(read_config(tmp_path / "v1.yaml")).safety == "off"
    assert info_of().safety == "off"
    with pytest.raises(ValueError, match="safety: of: choose one of on, off, report"):
        info_of(safety="of")


def test_a_run_that_started_without_other_weights_is_not_checked_for_safety_by_default(tmp_path):
    """Its images are those of its own folder: sampling must not end in a download of the checker."""
    clip = {"cond_stage_config": CLIP}
    for ckpt_path, safety in (("sd-v1-4.ckpt", "on"), (None, "off")):
        for name, expected in (("2026-01-01T00-00-00-project.yaml", safety), ("mine.yaml", "on")):
            OmegaConf.save(OmegaConf.create(text_model_config(**clip, ckpt_path=ckpt_path)), tmp_path / name)
            assert read_model_info(tmp_path / name).safety == expected


@pytest.mark.parametrize(("start", "safety"), [("sd-v1-4.ckpt", "on"), (None, "off")])
def test_a_run_that_started_from_another_runs_full_state_is_checked_for_safety(tmp_path, start, safety):
    OmegaConf.save(OmegaConf.create(text_model_config(cond_stage_config=CLIP)), tmp_path / "T-project.yaml")
    lightning = {"lightning": {"trainer": {"resume_from_checkpoint": start} if start else {}}}
    OmegaConf.save(OmegaConf.create(lightning), tmp_path / "T-lightning.yaml")
    assert read_model_info(tmp_path / "T-project.yaml").safety == safety


def test_merged_files_keep_the_safety_mode(tmp_path):
    OmegaConf.save(
        OmegaConf.create({**text_model_config(), "safety": "report", "data": {"target": "x"}}), tmp_path / "a.yaml"
    )
    (tmp_path / "b.yaml").write_text("model: {params: {image_size: 16}}\n")
    config = read_config([tmp_path / "a.yaml", tmp_path / "b.yaml"])
    assert model_info(config).safety == "report" and config.model.params.image_size == 16


def test_a_first_stage_is_no_model_to_sample_from():
    with pytest.raises(ValueError, match="AutoencoderKL is a first stage; choose the run or config of a diffusion"):
        read_model_info(ROOT / "configs" / "quickstart" / "autoencoder.yaml")
