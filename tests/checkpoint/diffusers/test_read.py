"""Diffusers folders as weights: of other tools and versions too, and refused in one line if they do not fit."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoint import CheckpointError, load_weights, open_weights, read_weights
from ldm.checkpoint.diffusers.rules import ConversionError
from ldm.config.model_info import read_config
from ldm.convert.convert import to_folder
from ldm.util import instantiate_from_config
from tests.convert.models import exactly, published_weights


def test_a_component_alone_is_a_weights_file_too(converted):
    saved, folder = converted("sd1")
    stage = saved.model.first_stage_model
    assert exactly(read_weights(folder / "vae"), stage.state_dict())
    network = {
        name: tensor for name, tensor in saved.model.state_dict().items() if name.startswith("model.diffusion_model.")
    }
    assert exactly(read_weights(folder / "unet"), network)
    assert (
        load_weights(
            instantiate_from_config(read_config(saved.config).model.params.first_stage_config), folder / "vae"
        ).missing
        == ()
    )


def shard(folder, stem: str) -> None:
    tensors = load_file(folder / f"{stem}.safetensors")
    names = sorted(tensors)
    halves = {f"{stem}-0000{k + 1}-of-00002.safetensors": names[k::2] for k in range(2)}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    (folder / f"{stem}.safetensors").unlink()


def as_old(folder, stem: str, to: str) -> None:
    """The same weights as older versions of diffusers named and stored them."""
    tensors = load_file(folder / f"{stem}.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old_name(name: str) -> str:
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.") if ".attentions." in name else name
        return name

    torch.save({old_name(name): tensor for name, tensor in tensors.items()}, folder / f"{to}.bin")
    (folder / f"{stem}.safetensors").unlink()


@pytest.mark.parametrize("form", ["sharded", "old .bin files", "fp16 variant", "flat text names"])
def test_folders_of_others_are_read_whatever_their_files(converted, tmp_path, form):
    saved, folder = converted("sd1")
    other = shutil.copytree(folder, tmp_path / "other")
    if form == "sharded":
        shard(other / "unet", "diffusion_pytorch_model")
        shard(other / "text_encoder", "model")
    elif form == "old .bin files":
        as_old(other / "vae", "diffusion_pytorch_model", "diffusion_pytorch_model")
        tensors = load_file(other / "text_encoder" / "model.safetensors")
        torch.save(
            {**tensors, "text_model.embeddings.position_ids": torch.arange(77)[None]},
            other / "text_encoder" / "pytorch_model.bin",
        )
        (other / "text_encoder" / "model.safetensors").unlink()
    elif form == "fp16 variant":
        (other / "unet" / "diffusion_pytorch_model.safetensors").rename(
            other / "unet" / "diffusion_pytorch_model.fp16.safetensors"
        )
    else:
        tensors = load_file(other / "text_encoder" / "model.safetensors")
        save_file(
            {name.removeprefix("text_model."): t for name, t in tensors.items()},
            other / "text_encoder" / "model.safetensors",
        )
    for name in ("published_extras.safetensors", "config.yaml", "model_index.json"):
        (other / name).unlink()
    tables = {name for name in published_weights(saved) if "." not in name}
    expected = {
        name: t
        for name, t in published_weights(saved).items()
        if name not in tables and not name.endswith("position_ids")
    }
    assert exactly(read_weights(other), expected)


def test_a_sharded_file_is_read_by_its_index(converted, tmp_path):
    saved, _ = converted("sd1")
    save_file({name: t.contiguous() for name, t in published_weights(saved).items()}, tmp_path / "model.safetensors")
    shard(tmp_path, "model")
    index = tmp_path / "model.safetensors.index.json"
    assert exactly(read_weights(index), read_weights(saved.ckpt))
    to_folder(read_config(saved.config), index, tmp_path / "folder")
    assert exactly(read_weights(tmp_path / "folder"), read_weights(converted("sd1")[1]))


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("unet/config.json", {"block_out_channels": [32, 32]}, "channels is (32, 32), but (32, 64) in the YAML"),
        ("unet/config.json", {"in_channels": 9}, "in_channels is 9, but 4 in the YAML"),
        ("unet/config.json", {"cross_attention_dim": 64}, "context_dim is 64, but 32 in the YAML"),
        ("vae/config.json", {"layers_per_block": 2}, "res_blocks is 2, but 1 in the YAML"),
        ("vae/config.json", {"scaling_factor": 0.5}, "scaling_factor is 0.5, but 0.18215 in the YAML"),
        ("text_encoder/config.json", {"num_hidden_layers": 3}, "layers is 3, but 2 in the YAML"),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "v_prediction"},
            "prediction_type is v_prediction, but epsilon",
        ),
        (
            "scheduler/scheduler_config.json",
            {"beta_schedule": "linear"},
            "beta_schedule is linear, but scaled_linear in the YAML",
        ),
    ],
)
def test_a_folder_of_another_model_than_the_yamls_is_refused(converted, tmp_path, file, change, says):
    saved, folder = converted("sd1")
    other = shutil.copytree(folder, tmp_path / "other")
    (other / file).write_text(json.dumps({**json.loads((other / file).read_text()), **change}))
    with pytest.raises(ConversionError) as caught:
        open_weights(other).check(read_config(saved.config))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "invalid JSON"),
        ("[1]", "expected a JSON object"),
        ('{"_class_name": "UNetMotionModel"}', "expected UNet2DConditionModel or UNet2DModel"),
        ('{"_class_name": "UNet2DModel"}', "missing key 'block_out_channels'"),
        ('{"_class_name": "UNet2DModel", "block_out_channels": 5}', "invalid value"),
        ('{"_class_name": "UNet2DModel", "layers_per_block": 1000000000}', "implausible layer counts"),
        ('{"_class_name": "UNet2DModel", "layers_per_block": [1, 1000000000]}', "implausible layer counts"),
        (
            '{"_class_name": "UNet2DModel", "block_out_channels": [32, -1], "layers_per_block": -1}',
            "implausible layer counts",
        ),
    ],
)
def test_a_folder_with_a_bad_config_is_refused_in_one_line(tmp_path, content, says):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_weights(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_in_a_folders_bin_file_is_refused(converted, tmp_path):
    other = shutil.copytree(converted("kl")[1], tmp_path / "other")

    class Call:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'canary'}",)

    (other / "diffusion_pytorch_model.safetensors").unlink()
    (other / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Call()))
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        read_weights(other)
    assert not (tmp_path / "canary").exists()


def test_tensors_that_do_not_fit_their_config_are_named(converted, tmp_path):
    other = shutil.copytree(converted("unconditional")[1], tmp_path / "other")
    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "down_blocks.0.attentions.0.to_q.weight": torch.zeros(7, 32)}, path)
    with pytest.raises(
        CheckpointError, match=r"down_blocks\.0\.attentions\.0\.to_q\.weight does not fit its config: \(7, 32\)"
    ):
        read_weights(other)
    save_file({name: tensor for name, tensor in tensors.items() if name != "conv_in.bias"}, path)
    with pytest.raises(CheckpointError, match=r"lacks 1 of the \d+ tensors .*conv_in\.bias"):
        read_weights(other)
