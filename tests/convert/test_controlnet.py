"""A ControlNet trained here, as diffusers' ControlNetModel and back: the same image, and the same weights."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_weights, read_weights
from ldm.checkpoint.diffusers.rules import ConversionError
from ldm.config.model_info import read_config
from ldm.convert.convert import to_file, to_folder
from ldm.inference import load_controlnet, load_model
from ldm.models.diffusion.controlnet import Control, ControlledModel
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import instantiate_from_config
from tests.convert.models import MODELS, exactly
from tests.convert.test_diffusers import PROMPTS, SCALE, STEPS, close, z_of
from tests.reference import randn, seed_weights

diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[test]' installs it")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, converted):
    """(base, its folder, YAML, checkpoint, model): a ControlNet after two steps on the base, from a copy of it."""
    base, base_folder = converted("sd1")
    folder = tmp_path_factory.mktemp("trained")
    params = deepcopy({**OmegaConf.to_container(read_config(base.config).model.params), **MODELS["sd1"]})
    network = params["unet_config"]["params"]
    copied = {name: value for name, value in network.items() if name != "out_channels"}
    params["unet_config"]["target"] = "cldm.cldm.ControlledUnetModel"
    params |= {"control_key": "hint", "ckpt_path": str(base.ckpt)}
    params["control_stage_config"] = {
        "target": "cldm.cldm.ControlNet",
        "params": {**copied, "hint_channels": 3, "hint_block_channels": [16, 16, 32]},
    }
    config = OmegaConf.create({"model": {"target": "cldm.cldm.ControlLDM", "params": params}})
    model = instantiate_from_config(config.model)
    with torch.no_grad():
        for name, parameter in seed_weights(deepcopy(model.control_model)).named_parameters():
            if name.startswith(("zero_convs", "middle_block_out", "input_hint_block")):
                model.control_model.get_parameter(name).copy_(parameter)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    x, hint, context = randn(1, 2, 4, 8, 8), torch.sigmoid(randn(2, 2, 3, 32, 32)), randn(3, 2, 5, 32)
    for step in range(2):
        optimizer.zero_grad()
        cond = {"c_crossattn": [context], "c_concat": [hint]}
        model.p_losses(x, cond, torch.tensor([200, 700]), noise=randn(4 + step, 2, 4, 8, 8))[0].backward()
        optimizer.step()
    params.pop("ckpt_path")
    OmegaConf.save(OmegaConf.create({"model": {"target": "cldm.cldm.ControlLDM", "params": params}}), folder / "c.yaml")
    torch.save({"state_dict": model.state_dict()}, folder / "c.ckpt")
    to_folder(read_config(folder / "c.yaml"), folder / "c.ckpt", folder / "diffusers")
    return base, base_folder, folder, model


def test_a_trained_control_gives_the_same_image_in_diffusers(trained):
    base, base_folder, folder, _ = trained
    control = diffusers.ControlNetModel.from_pretrained(folder / "diffusers")
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        base_folder, controlnet=control, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    hint = torch.sigmoid(randn(9, 1, 3, 32, 32))

    def their_images(strength: float) -> torch.Tensor:
        options = {"guidance_scale": SCALE, "num_inference_steps": STEPS, "output_type": "pt"}
        options |= {"controlnet_conditioning_scale": strength}
        return pipe(PROMPTS, image=[hint[0], hint[0]], latents=z_of(), **options).images

    pipeline = load_model(base.config, base.ckpt, "cpu", "full")
    for path in (folder / "diffusers", folder / "c.ckpt"):
        ours = our_images(pipeline, load_controlnet(pipeline, path), hint)
        assert close(ours, their_images(0.7)) and ours.std() > 0.05
    assert not close(their_images(0.0), their_images(0.7))


@torch.no_grad()
def test_a_folder_says_whether_outputs_are_averaged_over_positions(trained, tmp_path):
    """diffusers then controls the conditional half of guidance alone."""
    base, base_folder, folder, _ = trained
    pooled = shutil.copytree(folder / "diffusers", tmp_path / "pooled")
    config = json.loads((pooled / "config.json").read_text())
    (pooled / "config.json").write_text(json.dumps({**config, "global_pool_conditions": True}))
    pipeline, hint = load_model(base.config, base.ckpt, "cpu", "full"), torch.sigmoid(randn(9, 1, 3, 32, 32))
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        base_folder, controlnet=diffusers.ControlNetModel.from_pretrained(pooled), local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": SCALE, "num_inference_steps": STEPS, "output_type": "pt", "latents": z_of()}
    theirs = pipe(PROMPTS, image=[hint[0], hint[0]], controlnet_conditioning_scale=0.7, **options).images
    ours, plain = (
        our_images(pipeline, load_controlnet(pipeline, path), hint, {}) for path in (pooled, folder / "c.ckpt")
    )
    assert close(ours, theirs) and not close(plain, theirs)


@torch.no_grad()
def our_images(pipeline, net, hint: torch.Tensor, uncond_parts: dict | None = None) -> torch.Tensor:
    """(2, 3, 32, 32) in [0, 1]; uncond_parts: instead of the hint in the unconditional half of guidance."""
    parts = {"c_concat": [hint.expand(2, -1, -1, -1)]}
    cond, uncond = ({"c_crossattn": [c]} for c in pipeline.encode_prompts(PROMPTS, "", SCALE))
    cond, uncond = {**cond, **parts}, {**uncond, **(parts if uncond_parts is None else uncond_parts)}
    model = ControlledModel(pipeline.model, [Control(net, [0.7] * 6, net.global_average_pooling)])
    guidance = {"unconditional_guidance_scale": SCALE, "unconditional_conditioning": uncond}
    z, _ = DDIMSampler(model).sample(STEPS, 2, (4, 8, 8), cond, x_T=z_of(), verbose=False, **guidance)
    return (pipeline.decode(z) + 1) / 2


def test_to_diffusers_and_back_is_bitwise(trained, tmp_path):
    _, _, folder, model = trained
    config = read_config(folder / "c.yaml")
    to_file(config, folder / "diffusers", tmp_path / "control.safetensors")
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("control_model.")}
    assert exactly(read_weights(tmp_path / "control.safetensors"), state)
    assert exactly(read_weights(folder / "diffusers"), state)
    fresh = instantiate_from_config(config.model)
    report = load_weights(fresh, folder / "diffusers", only="control_model.")
    assert report.loaded == len(state) and not report.unexpected
    assert exactly(fresh.control_model.state_dict(), model.control_model.state_dict())


def test_a_swapped_weight_or_another_layout_is_refused(trained, tmp_path):
    _, _, folder, model = trained
    config = read_config(folder / "c.yaml")
    state = {name: tensor for name, tensor in model.state_dict().items() if "zero_convs.1" not in name}
    torch.save(state, tmp_path / "short.ckpt")
    with pytest.raises(ConversionError, match=r"zero_convs\.1"):
        to_folder(config, tmp_path / "short.ckpt", tmp_path / "out")
    config.model.params.control_stage_config.params.hint_block_channels = [16, 32, 32]
    with pytest.raises(ConversionError, match=r"hint_widths is \(16, 16, 32\), but \(16, 32, 32\) in the YAML"):
        to_file(config, folder / "diffusers", tmp_path / "out.ckpt")
    assert not (tmp_path / "out").exists()
