"""Conversion to diffusers' layout and back: bit for bit, all or nothing, and refused in one line where it cannot be."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ldm.checkpoint import load_weights, read_weights
from ldm.checkpoint.diffusers.read import read_folder
from ldm.checkpoint.diffusers.rules import ConversionError
from ldm.config.model_info import read_config
from ldm.convert.convert import to_file, to_folder
from ldm.inference import load_model
from ldm.util import instantiate_from_config
from tests.convert.models import MODELS, exactly, published_weights

KINDS = [*MODELS, "kl", "vq"]


@pytest.mark.parametrize(("kind", "ending"), [*((kind, "ckpt") for kind in KINDS), ("sd1", "safetensors")])
def test_to_diffusers_and_back_is_bitwise(converted, tmp_path, kind, ending):
    saved, folder = converted(kind)
    target = tmp_path / f"back.{ending}"
    to_file(read_config(saved.config), folder, target)
    back = torch.load(target, weights_only=True)["state_dict"] if ending == "ckpt" else load_file(target)
    assert exactly(back, published_weights(saved))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_loads_wherever_a_file_does(converted, kind):
    saved, folder = converted(kind)
    model = instantiate_from_config(read_config(saved.config).model)
    report = load_weights(model, folder)
    assert not [name for name in report.missing if not name.startswith("model_ema.")] and not report.unexpected
    loaded = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model_ema.")}
    assert exactly(loaded, published_weights(saved))


def test_a_folder_generates_as_its_file_does(converted):
    saved, folder = converted("sd1")
    one = load_model(saved.config, saved.ckpt, "cpu", "full")
    other = load_model(folder / "config.yaml", folder, "cpu", "full")
    z, t, c = torch.ones(1, 4, 8, 8), torch.tensor([500]), one.encode_prompts(["a cat"])[0]
    assert torch.equal(c, other.encode_prompts(["a cat"])[0])
    with torch.no_grad():
        assert torch.equal(one.model.apply_model(z, t, c), other.model.apply_model(z, t, c))
    assert other.identity["ckpt_bytes"] > saved.ckpt.stat().st_size * 0.9


def test_what_a_folder_holds(converted):
    def files(kind: str) -> set[str]:
        folder = converted(kind)[1]
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    unet = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"}
    unet |= {"config.yaml"}
    tokenizer = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
    text = {"text_encoder/config.json", "text_encoder/model.safetensors", *(f"tokenizer/{name}" for name in tokenizer)}
    extras, index = {"published_extras.safetensors"}, {"model_index.json"}
    vae, vq = ({f"{name}/config.json", f"{name}/diffusion_pytorch_model.safetensors"} for name in ("vae", "vqvae"))
    assert files("sd1") == unet | vae | text | extras | index
    assert files("unconditional") == unet | vq | extras | index
    assert files("class") == unet | vq | extras | {"class_embedder.safetensors"}
    assert files("kl") == {"config.json", "diffusion_pytorch_model.safetensors", "config.yaml"}


def test_configs_are_in_diffusers_terms(converted):
    def read(kind: str, name: str) -> dict:
        return json.loads((converted(kind)[1] / name).read_text())

    scheduler = read("v", "scheduler/scheduler_config.json")
    assert (scheduler["beta_schedule"], scheduler["prediction_type"]) == ("scaled_linear", "v_prediction")
    assert (scheduler["steps_offset"], scheduler["clip_sample"], scheduler["set_alpha_to_one"]) == (1, False, False)
    assert read("sd1", "scheduler/scheduler_config.json")["prediction_type"] == "epsilon"
    assert read("sd1", "unet/config.json")["attention_head_dim"] == 2, "the number of heads, by diffusers' name"
    unet = read("sd2", "unet/config.json")
    assert unet["attention_head_dim"] == [4, 8] and unet["use_linear_projection"]
    assert read("sd2", "text_encoder/config.json")["num_hidden_layers"] == 2, "without the unused layer"
    assert read("unconditional", "vqvae/config.json")["scaling_factor"] == pytest.approx(0.7), "measured, from the file"
    classes = {
        **{"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline"},
        **{"inpainting": "StableDiffusionInpaintPipeline", "unconditional": "LDMPipeline"},
    }
    assert {kind: read(kind, "model_index.json")["_class_name"] for kind in classes} == classes


@pytest.mark.parametrize(("dtype", "expected"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_weights_are_written_in_the_precision_asked_for(converted, tmp_path, dtype, expected):
    saved, folder = converted("sd1")[0], tmp_path / "folder"
    config = read_config(saved.config)
    to_folder(config, saved.ckpt, folder, dtype)
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert {tensor.dtype for tensor in load_file(folder / f"{name}.safetensors").values()} == {expected}
    tables = load_file(folder / "published_extras.safetensors")
    assert {tensor.dtype for tensor in tables.values()} == {torch.float32}, "a half-precision noise schedule is useless"
    back = "fp32" if dtype == "fp16" else None
    to_file(config, folder, tmp_path / "back.ckpt", back)
    found = read_weights(tmp_path / "back.ckpt")["model.diffusion_model.out.2.weight"].dtype
    assert found == (torch.float32 if back else expected)


def test_averages_are_converted_even_from_a_file_that_holds_nothing_else(converted, tmp_path):
    saved, _ = converted("class")
    config, kept = read_config(saved.config), ("model_ema", "first_stage", "cond_stage")
    to_folder(config, saved.ckpt, tmp_path / "averaged", use_ema=True)
    weights = read_folder(tmp_path / "averaged")
    for name, parameter in saved.model.model.named_parameters():
        assert torch.allclose(weights[f"model.{name}"], 0.9 * parameter)
    averages = {name: tensor for name, tensor in saved.model.state_dict().items() if name.startswith(kept)}
    torch.save(averages, tmp_path / "alone.ckpt")
    to_folder(config, tmp_path / "alone.ckpt", tmp_path / "alone", use_ema=True)
    alone = read_folder(tmp_path / "alone")
    assert exactly(alone, {name: weights[name] for name in alone}) and any(name.startswith("model.") for name in alone)


@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_what_exists_is_never_overwritten(converted, tmp_path, there):
    saved, folder = converted("kl")
    target = tmp_path / "out.ckpt"
    {"folder": target.mkdir, "file": target.touch, "link": lambda: target.symlink_to("nowhere")}[there]()
    with pytest.raises(ConversionError, match="already exists"):
        to_folder(read_config(saved.config), saved.ckpt, target)
    with pytest.raises(ConversionError, match="already exists"):
        to_file(read_config(saved.config), folder, target)
    assert [path.name for path in tmp_path.iterdir()] == ["out.ckpt"]


def test_a_folder_without_its_classes_gives_a_warning(converted, tmp_path, caplog):
    saved, folder = converted("class")
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "class_embedder.safetensors").unlink()
    to_file(read_config(saved.config), other, tmp_path / "back.ckpt")
    assert "class_embedder.safetensors is missing" in caplog.text


@pytest.mark.parametrize(("kind", "supported"), [("class", False), ("unconditional", True), ("kl", True)])
def test_a_model_without_a_pipeline_of_diffusers_is_converted_with_a_note(converted, tmp_path, caplog, kind, supported):
    saved, _ = converted(kind)
    with caplog.at_level("INFO", "ldm.convert.convert"):
        to_folder(read_config(saved.config), saved.ckpt, tmp_path / "folder")
    assert ("diffusers has no pipeline for this model" in caplog.text) != supported
