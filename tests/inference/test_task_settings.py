"""TextToImageRequest of img2img, inpaint, upscale and sample_diffusion: what is accepted, what is refused, and where a model is found."""

import pytest

from ldm.cli import Parser
from ldm.config.model_info import model_info, read_config
from ldm.inference.inputs import find_pairs, find_run, parse_classes
from ldm.inference.requests import (
    ClassConditionalRequest,
    ImageToImageRequest,
    InpaintRequest,
    UpscaleRequest,
    require_inpainting_model,
    require_unconditional_or_class,
    require_upscaler,
)
from ldm.models.diffusion.samplers.registry import SAMPLERS
from tests.tiny import KINDS, text_model_config


def info(kind: str, **params):
    return model_info(text_model_config(**{**KINDS[kind], **params}))


def test_the_published_defaults():
    image = ImageToImageRequest()
    assert (image.strength, image.scale, image.n_iter, image.n_samples, image.steps, image.encode_steps) == (
        0.75,
        5.0,
        1,
        2,
        50,
        37,
    )
    for kind, scale in (("inpaint", 1.0), ("sd-inpaint", 7.5)):
        hole = InpaintRequest().checked(info(kind))
        assert (hole.steps, hole.eta, hole.scale, hole.feather, hole.prompt) == (50, 0.0, scale, 0, "")
    for kind, published in (("upscale", (100, 1.0, 1.0, None)), ("x4", (50, 0.0, 9.0, 20))):
        larger = UpscaleRequest().checked(info(kind, timesteps=1000))
        assert (larger.steps, larger.eta, larger.scale, larger.noise_level) == published
    sample = ClassConditionalRequest().checked(info("unconditional"))
    assert (sample.n_samples, sample.batch_size, sample.steps, sample.eta, sample.vanilla, sample.scale) == (
        50000,
        10,
        50,
        1.0,
        False,
        1.0,
    )


@pytest.mark.parametrize(
    "kind, cls, flag", [("unconditional", ClassConditionalRequest, "--eta"), ("upscale", UpscaleRequest, "--ddim_eta")]
)
def test_samples_and_enlargements_take_every_sampler_with_a_noise_that_it_can_have(kind, cls, flag):
    for name, entry in SAMPLERS.items():
        assert cls(sampler=name).checked(info(kind)).eta == (1.0 if name == "ddim" else entry.default_eta)
    with pytest.raises(ValueError, match=f"{flag} 1: plms is deterministic"):
        cls(sampler="plms", eta=1.0).checked(info(kind))
    with pytest.raises(ValueError, match="--spacing karras: ddim supports"):
        cls(spacing="karras").checked(info(kind))
    with pytest.raises(ValueError, match=r"--guidance_rescale 0\.5 with --scale 1"):
        cls(guidance_rescale=0.5).checked(info(kind))


def test_the_chain_over_every_timestep_is_a_sampler_of_its_own():
    assert ClassConditionalRequest(vanilla=True).checked(info("unconditional")).vanilla
    for given in ({"sampler": "heun"}, {"spacing": "trailing"}):
        with pytest.raises(ValueError, match="-v with --s"):
            ClassConditionalRequest(vanilla=True, **given).checked(info("unconditional"))


@pytest.mark.parametrize(
    "strength, steps, walked", [(0.0, 50, 0), (1.0, 50, 50), (0.29, 100, 28), (0.999, 10, 9), (0.3, 10, 3)]
)
def test_the_steps_walked_are_the_published_rounding(strength, steps, walked):
    assert ImageToImageRequest(strength=strength, steps=steps).encode_steps == walked  # 0.29 * 100 is 28.999...


@pytest.mark.parametrize(
    "height, width, fits", [(16, 24, (16, 24)), (19, 21, (16, 24)), (1, 4000, (8, 4000)), (37, 4, (40, 8))]
)
def test_a_picture_of_any_size_is_brought_to_the_nearest_the_model_takes(height, width, fits):
    settings = ImageToImageRequest().fitted(height, width, info("text")).checked(info("text"))
    assert (settings.height, settings.width) == fits
    assert ImageToImageRequest(factor=8).fitted(16, 40, info("text")).width % 16 == 0


@pytest.mark.parametrize(
    "words, classes", [(["207"], (207,)), (["1,2", "10-12"], (1, 2, 10, 11, 12)), (["3", "3-3"], (3, 3))]
)
def test_classes_are_numbers_lists_and_ranges(words, classes):
    assert parse_classes(words) == classes


@pytest.mark.parametrize("word", ["cat", "", "1,", "-1", "1-", "5-3", "1.5", "²"])
def test_what_is_no_class_is_refused_by_name(word):
    with pytest.raises(ValueError, match="--classes"):
        parse_classes([word])


def test_no_class_is_known_from_1001_classes_or_from_dropout():
    def null_class(n_classes: int | None, **params) -> int | None:
        embedder = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 8}}
        embedder["params"] |= {} if n_classes is None else {"n_classes": n_classes}
        found = info("class", cond_stage_config=embedder, **params)
        assert found.n_classes == (n_classes or 1000)
        return found.null_class

    assert null_class(1001, cond_dropout=0.0) == 1000 and null_class(10, cond_dropout=0.1) == 9
    assert null_class(None, cond_dropout=0.0) is None
    assert ClassConditionalRequest().checked(info("class")).null_class == 5


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_taken_by_its_own_task_alone(kind):
    takers = {
        "unconditional": require_unconditional_or_class,
        "class": require_unconditional_or_class,
        "inpaint": require_inpainting_model,
        "upscale": require_upscaler,
    }
    takers |= {"sd-inpaint": require_inpainting_model, "x4": require_upscaler}
    for check in {require_unconditional_or_class, require_inpainting_model, require_upscaler}:
        if takers.get(kind) is check:
            check(info(kind))
        else:
            with pytest.raises(ValueError, match=r"scripts/|see models/ldm"):
                check(info(kind))


def test_a_network_without_room_for_the_condition_is_refused():
    unet = {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {"in_channels": 4, "channel_mult": [1, 1]},
    }
    for kind, check in (("inpaint", require_inpainting_model), ("upscale", require_upscaler)):
        with pytest.raises(ValueError, match=r"got .* and 4"):
            check(info(kind, unet_config=unet))


def test_a_picture_belongs_to_its_mask_whatever_its_ending(tmp_path):
    for name in ("b.jpg", "b_mask.png", "a.png", "a.jpg", "a_mask.png", "c.png"):
        (tmp_path / name).touch()
    assert [(p.name, m.name) for p, m in find_pairs(tmp_path)] == [
        ("a.png", "a_mask.png"),
        ("b.jpg", "b_mask.png"),
    ]


def test_a_run_is_found_by_its_folder_and_by_every_checkpoint_in_it(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "configs").mkdir()
    for name in ("checkpoints/last.ckpt", "checkpoints/epoch=1.ckpt"):
        (tmp_path / "run" / name).touch()
    for name in ("2-project", "1-project", "1-lightning"):
        (tmp_path / "run" / "configs" / f"{name}.yaml").touch()
    for resume in ("run", "run/checkpoints", "run/checkpoints/epoch=1.ckpt"):
        folder, configs, ckpt = find_run(tmp_path / resume)
        assert folder == tmp_path / "run" and [path.name for path in configs] == ["1-project.yaml", "2-project.yaml"]
        assert ckpt.name == ("epoch=1.ckpt" if resume.endswith("ckpt") else "last.ckpt")
    (tmp_path / "run" / "model.ckpt").touch()
    (tmp_path / "run" / "config.yaml").touch()
    assert find_run(tmp_path / "run") == (
        tmp_path / "run",
        [tmp_path / "run" / "config.yaml"],
        tmp_path / "run" / "model.ckpt",
    )


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


def test_overrides_stand_anywhere_among_the_flags(capsys):
    parser = Parser(takes_overrides=True)
    parser.add_argument("-n", type=int)
    opt = parser.parse_args(["a.b=1", "-n", "3", "+a.c=x y"])
    assert (opt.n, opt.overrides) == (3, ["a.b=1", "+a.c=x y"])
    for words, message in (
        (["a=1"], "unexpected argument 'a=1'"),
        (["--m", "a.b=1"], "unknown flag --m"),
        (["-n=1.5"], "invalid int"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert message in capsys.readouterr().err
