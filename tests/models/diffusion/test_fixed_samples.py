"""Laws of the samples of fixed conditions: what they depend on, and which models they fit."""

import pytest
import torch

from ldm.models.diffusion.fixed_samples import FixedSamples
from tests.models.diffusion.test_ddpm import pixel_model
from tests.models.diffusion.tiny import ATTEND, CAPTIONS, CLASSES, latent_diffusion, unet

UNET = unet(in_channels=3, out_channels=3, channel_mult=[1], attention_resolutions=[])
PIXELS = {
    "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
    "unet_config": unet(in_channels=3, out_channels=3, channel_mult=[1], **ATTEND),
    "channels": 3,
    "scale_factor": 1.0,
    "timesteps": 10,
}


@pytest.fixture(scope="module")
def of_classes():
    return latent_diffusion("crossattn", {}, CLASSES, cond_stage_key="class_label", cond_dropout=0.1, **PIXELS).eval()


@pytest.fixture(scope="module")
def of_texts():
    return latent_diffusion("crossattn", {}, CAPTIONS, cond_stage_key="caption", **PIXELS).eval()


@pytest.fixture(scope="module")
def unconditional():
    return pixel_model(unet_config=UNET, timesteps=10).eval()


def images(model, **options):
    spec = FixedSamples(**{"steps": 2, **options})
    spec.check(model)
    return spec.sample(model)


def test_a_sample_depends_on_its_prompt_its_seed_and_the_weights_alone(of_texts):
    whole, captions = images(of_texts, prompts=["a", "b c", "a"], seed=3)
    assert captions == ["a", "b c", "a"] and whole.shape == (3, 3, 8, 8) and not torch.equal(whole[0], whole[2])
    torch.manual_seed(99)
    again, _ = images(of_texts, prompts=["a", "b c", "a"], seed=3, batch_size=2)
    torch.testing.assert_close(again, whole)
    alone, _ = images(of_texts, prompts=["b c"], seed=4)
    torch.testing.assert_close(alone[0], whole[1])


def test_a_number_in_the_prompts_of_a_text_model_is_a_text(of_texts):
    assert torch.equal(images(of_texts, prompts=[1984])[0], images(of_texts, prompts=["1984"])[0])


def test_classes_are_guided_where_the_model_is_trained_for_it(of_classes):
    default, captions = images(of_classes, prompts=[1, 7])
    assert captions == ["1", "7"] and torch.equal(default, images(of_classes, prompts=["1", "7"], scale=3.0)[0])
    assert not torch.allclose(default, images(of_classes, prompts=[1, 7], scale=1.0)[0])


def test_an_unconditional_model_samples_a_number_of_images(unconditional):
    found, captions = images(unconditional, count=3, seed=5, sampler="dpm_solver")
    assert found.shape == (3, 3, 8, 8) and captions == ["seed 5", "seed 6", "seed 7"]


def test_a_file_holds_a_prompt_on_each_line(tmp_path, of_texts):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n")
    assert images(of_texts, prompts=str(tmp_path / "prompts.txt"))[1] == ["a cat", "a dog"]


def test_settings_that_do_not_fit_are_refused(of_classes, of_texts, unconditional, tmp_path):
    for options, words in (
        ({"sampler": "dimm"}, "sampler 'dimm': choose one of ddim, plms"),
        ({"prompts": str(tmp_path / "none.txt")}, r"prompts .*none\.txt: no such file"),
        ({"prompts": []}, "prompts: none; set at least one"),
        ({"sampler": "plms", "eta": 0.5}, "eta 0.5: plms has none; remove it, or choose one of ddim, "),
    ):
        with pytest.raises(ValueError, match=words):
            FixedSamples(**options)
    concat = latent_diffusion("concat", {"in_channels": 8}, "__is_first_stage__")
    for model, prompts, words in (
        (of_classes, ["cat"], "'cat' is not a class; expected numbers from 0 to 9"),
        (of_classes, [10], "10 is not a class"),
        (of_texts, None, "missing; this model is conditional"),
        (unconditional, ["a"], "this model is unconditional; remove them"),
        (concat, ["a"], "this model needs more than prompts"),
    ):
        with pytest.raises(ValueError, match=words):
            FixedSamples(prompts=prompts).check(model)
