"""Images under ControlNets: files of every kind on any base, several at once, strengths and guess mode."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm.checkpoint import CheckpointError
from ldm.data.image import from_tensor
from ldm.inference import ControlRequest, TextToImageRequest, control_to_image, load_controlnet, load_model
from ldm.inference import text_to_image as txt2img
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.modules.dtype import is_quantized
from tests.inference.test_lora import write
from tests.tiny import SavedModel, save_model

TINY = {"height": 16, "width": 24, "steps": 3}


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    """A saved ControlLDM."""
    return save_model(tmp_path_factory.mktemp("control"), "control")


@pytest.fixture(scope="module")
def whole(controlled):
    return load_model(controlled.config, controlled.ckpt, "cpu", "full")


@pytest.fixture(scope="module")
def base(tmp_path_factory, controlled):
    """The model of `controlled` as a plain LatentDiffusion."""
    saved = save_model(tmp_path_factory.mktemp("base"), "text", use_ema=False)
    state = {name: tensor for name, tensor in controlled.model.state_dict().items() if "control_model" not in name}
    torch.save({"state_dict": state}, saved.ckpt)
    return load_model(saved.config, saved.ckpt, "cpu", "full")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, controlled):
    """A file of `control_model.*` alone, as the published single-control files."""
    path, state = tmp_path_factory.mktemp("alone") / "control.pth", controlled.model.state_dict()
    torch.save({name: tensor for name, tensor in state.items() if name.startswith("control_model.")}, path)
    return path


def generate(pipeline, hints, nets=(), prompt="a cat", only=None, **changes) -> list[np.ndarray]:
    request = ControlRequest(prompt=prompt, controls=len(hints), **{**TINY, **changes})
    images = control_to_image(pipeline, hints, request, nets, progress=False, only=only)
    return [np.asarray(generated.image) for generated in images]


@pytest.mark.parametrize("guess", [False, True])
def test_an_image_is_sampled_under_the_hint_and_in_guess_mode_without_it_in_one_half(whole, image, guess):
    model = whole.model
    with torch.no_grad():
        hint = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]
        text, none = model.get_learned_conditioning(["a cat"]), model.get_learned_conditioning([""])
        cond = {"c_crossattn": [text], "c_concat": [hint]}
        uncond = {"c_crossattn": [none], "c_concat": None if guess else [hint]}
        model.control_scales = [0.5 * 0.825 ** (4 - k if guess else 0) for k in range(5)]
        options = {"unconditional_guidance_scale": 9.0, "unconditional_conditioning": uncond, "verbose": False}
        torch.manual_seed(42)
        z, _ = DDIMSampler(model).sample(3, 1, (4, 4, 6), cond, **options)
        expected = np.asarray(from_tensor(whole.decode(z)[0]))
    (found,) = generate(whole, [image], guess=guess, control_scale=(0.5,))
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_control_file_on_its_base_gives_the_images_of_the_whole_model(whole, base, alone, controlled, image):
    expected = generate(whole, [image])
    for path in (alone, controlled.ckpt):
        assert np.array_equal(generate(base, [image], [load_controlnet(base, path)]), expected)


def test_without_strength_the_image_is_that_of_the_base(base, alone, image):
    net = load_controlnet(base, alone)
    request = TextToImageRequest(prompt="a cat", scale=9.0, n_samples=1, n_iter=1, **TINY)
    (plain,) = (np.asarray(one.image) for one in txt2img(base, request, progress=False))
    (off,) = generate(base, [image], [net], control_scale=(0.0,))
    assert np.array_equal(off, plain) and not np.array_equal(generate(base, [image], [net])[0], plain)


def test_several_controls_act_together_each_with_its_hint_and_strength(base, whole, alone, image):
    net, other = load_controlnet(base, alone), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    halves = generate(base, [image, image], [net, net], control_scale=(0.25, 0.75))
    assert np.abs(halves[0].astype(int) - generate(base, [image], [net])[0]).max() <= 1
    both = generate(base, [image, other], [net, net])
    assert not np.array_equal(both, generate(base, [other, image], [net, net], control_scale=(1.0, 0.0)))
    assert np.array_equal(both, generate(whole, [image, other], [net])), "the model's own control comes first"


def test_an_image_alone_equals_that_of_the_whole_run(base, alone, image):
    options = {"prompt": ["a", "b", "c"], "n_samples": 2, "sampler": "euler_ancestral"}
    net = load_controlnet(base, alone)
    every = generate(base, [image], [net], **options)
    (one,) = generate(base, [image], [net], only=2, **options)
    assert len(every) == 3 and np.abs(one.astype(int) - every[2]).max() <= 1


def test_a_control_is_loaded_in_the_precision_of_its_base(tmp_path, alone, image):
    saved = save_model(tmp_path, "text", use_ema=False)
    half = load_model(saved.config, saved.ckpt, "cpu", "bf16")
    net = load_controlnet(half, alone)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.bfloat16}
    assert np.ptp(generate(half, [image], [net])[0]) > 0


def test_a_control_is_quantized_as_its_base(tmp_path, controlled, alone, image):
    pytest.importorskip("torchao", reason="pip install -e '.[quantize]' installs it")
    saved = save_model(tmp_path, "text", use_ema=False)
    base, own = (load_model(each.config, each.ckpt, "cpu", "full", quantize="int8") for each in (saved, controlled))
    net = load_controlnet(base, alone)
    for network in (net, own.model.control_model):
        layers = [layer for layer in network.modules() if type(layer) is nn.Linear]
        assert layers and all(is_quantized(layer.weight) for layer in layers)
    whole = load_model(saved.config, saved.ckpt, "cpu", "full")
    (expected,), (found,) = generate(whole, [image], [load_controlnet(whole, alone)]), generate(base, [image], [net])
    assert 0 < np.abs(expected.astype(float) - found).mean() < 4  # of 255


@pytest.mark.parametrize("mode", ["merged", "live"])
def test_a_lora_changes_the_base_under_a_control_of_either_kind(tmp_path, controlled, base, whole, alone, image, mode):
    """A ControlLDM reads the names of its base's layers too."""
    lora = write(tmp_path / "lora.safetensors", SavedModel(base.info.path, Path(), base.model))
    options = {"lora": [(lora, 0.8)], "lora_mode": mode}
    one = load_model(controlled.config, controlled.ckpt, "cpu", "full", **options)
    (found,) = generate(one, [image])
    other = load_model(base.info, base.identity["ckpt"], "cpu", "full", **options)
    assert np.array_equal(found, generate(other, [image], [load_controlnet(other, alone)])[0])
    assert not np.array_equal(found, generate(whole, [image])[0])


def test_a_file_that_is_no_control_of_this_model_is_refused(tmp_path, base, alone, controlled):
    torch.save({"model.diffusion_model.out.2.weight": torch.zeros(4, 32, 3, 3)}, tmp_path / "unet.ckpt")
    with pytest.raises(CheckpointError, match="not a ControlNet"):
        load_controlnet(base, tmp_path / "unet.ckpt")
    weights = torch.load(alone, weights_only=True)
    torch.save({k: v for k, v in weights.items() if "zero_convs.2" not in k}, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=r"lacks zero_convs\.2\.0\.weight"):
        load_controlnet(base, tmp_path / "short.pth")
    torch.save({**weights, "control_model.further.weight": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match=r"also has further\.weight"):
        load_controlnet(base, tmp_path / "more.pth")
    other = {k: v[:, :8] if "attn2.to_k" in k else v for k, v in weights.items()}
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"context_dim=8"):
        load_controlnet(base, tmp_path / "other.pth")
    kept = {k: v for k, v in weights.items() if not k.startswith("control_model.input_hint_block.8")}
    torch.save(kept, tmp_path / "factor.pth")
    with pytest.raises(CheckpointError, match="hints of 2 pixels per latent cell; this model's cells have 4"):
        load_controlnet(base, tmp_path / "factor.pth")
