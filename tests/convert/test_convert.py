"""Conversion to diffusers' layout and back: bit for bit, all or nothing, and refused in one line where it cannot be."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from ldm.checkpoint import CheckpointError, load_weights, read_weights
from ldm.checkpoint.diffusers.read import read_folder
from ldm.checkpoint.diffusers.rules import ConversionError
from ldm.convert.convert import to_file, to_folder
from ldm.inference import fingerprint, load_model
from ldm.inference.settings import read_config
from ldm.util import instantiate_from_config
from tests.convert.models import MODELS, exactly, save
from tests.tiny import SavedModel

KINDS = [*MODELS, "kl", "vq"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """kind -> (the saved model, its folder), each made once."""
    root, made = tmp_path_factory.mktemp("interchange"), {}

    def make(kind: str) -> SavedModel:
        if kind not in made:
            saved = save(root / kind, kind)
            to_folder(read_config(saved.config), saved.ckpt, root / kind / "folder")
            made[kind] = saved, root / kind / "folder"
        return made[kind]

    return make


def weights_of(saved: SavedModel) -> dict[str, torch.Tensor]:
    """What a converted file keeps: all but averages."""
    return {name: tensor for name, tensor in saved.model.state_dict().items() if not name.startswith("model_ema.")}


@pytest.mark.parametrize(("kind", "ending"), [*((kind, "ckpt") for kind in KINDS), ("sd1", "safetensors")])
def test_to_diffusers_and_back_is_bitwise(converted, tmp_path, kind, ending):
    saved, folder = converted(kind)
    target = tmp_path / f"back.{ending}"
    to_file(read_config(saved.config), folder, target)
    back = torch.load(target, weights_only=True)["state_dict"] if ending == "ckpt" else load_file(target)
    assert exactly(back, weights_of(saved))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_loads_wherever_a_file_does(converted, kind):
    saved, folder = converted(kind)
    model = instantiate_from_config(read_config(saved.config).model)
    report = load_weights(model, folder)
    assert not [name for name in report.missing if not name.startswith("model_ema.")] and not report.unexpected
    loaded = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model_ema.")}
    assert exactly(loaded, weights_of(saved))


def test_a_folder_draws_as_its_file_and_is_told_apart_by_its_content(converted, tmp_path):
    saved, folder = converted("sd1")
    one, other = (
        load_model(saved.config, saved.ckpt, "cpu", "full"),
        load_model(folder / "config.yaml", folder, "cpu", "full"),
    )
    z, t, c = torch.ones(1, 4, 8, 8), torch.tensor([500]), one.encode_prompts(["a cat"])[0]
    assert torch.equal(c, other.encode_prompts(["a cat"])[0])
    with torch.no_grad():
        assert torch.equal(one.model.apply_model(z, t, c), other.model.apply_model(z, t, c))
    assert other.identity["ckpt_bytes"] > saved.ckpt.stat().st_size * 0.9
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(folder) == other.identity["ckpt_fingerprint"]
    (copy / "unet" / "config.json").write_text("{}")
    assert fingerprint(copy) != fingerprint(folder)


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


def test_what_a_folder_holds(converted):
    def files(kind: str) -> set[str]:
        folder = converted(kind)[1]
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    unet = {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "config.yaml",
    }
    text = {"text_encoder/config.json", "text_encoder/model.safetensors"}
    text |= {
        f"tokenizer/{name}" for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
    }
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
    assert (
        read("sd2", "unet/config.json")["attention_head_dim"] == [4, 8]
        and read("sd2", "unet/config.json")["use_linear_projection"]
    )
    assert read("sd2", "text_encoder/config.json")["num_hidden_layers"] == 2, "the layer that takes no part is left out"
    assert read("unconditional", "vqvae/config.json")["scaling_factor"] == pytest.approx(0.7), (
        "as measured, from the file"
    )
    classes = {
        kind: read(kind, "model_index.json")["_class_name"] for kind in ("sd1", "sd2", "inpainting", "unconditional")
    }
    assert classes == {
        **{"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline"},
        **{"inpainting": "StableDiffusionInpaintPipeline", "unconditional": "LDMPipeline"},
    }


@pytest.mark.parametrize(
    "dtype, expected", [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_weights_are_written_in_the_precision_asked_for(tmp_path, dtype, expected):
    saved = save(tmp_path, "sd1")
    to_folder(read_config(saved.config), saved.ckpt, tmp_path / "folder", dtype)
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert {tensor.dtype for tensor in load_file(tmp_path / "folder" / f"{name}.safetensors").values()} == {
            expected
        }
    tables = load_file(tmp_path / "folder" / "published_extras.safetensors")
    assert {tensor.dtype for tensor in tables.values()} == {torch.float32}, (
        "a noise schedule in half precision is useless"
    )
    to_file(read_config(saved.config), tmp_path / "folder", tmp_path / "back.ckpt")
    assert read_weights(tmp_path / "back.ckpt")["model.diffusion_model.out.2.weight"].dtype == expected


def test_averages_are_converted_where_asked_for_even_from_a_file_of_averages_alone(tmp_path):
    saved = save(tmp_path, "class")
    config, stage = read_config(saved.config), {}
    to_folder(config, saved.ckpt, tmp_path / "averaged", use_ema=True)
    weights = read_folder(tmp_path / "averaged")
    for name, parameter in saved.model.model.named_parameters():
        assert torch.allclose(weights[f"model.{name}"], 0.9 * parameter)
    stage = {
        name: t
        for name, t in saved.model.state_dict().items()
        if name.startswith(("model_ema", "first_stage", "cond_stage"))
    }
    torch.save(stage, tmp_path / "alone.ckpt")
    to_folder(config, tmp_path / "alone.ckpt", tmp_path / "alone", use_ema=True)
    alone = read_folder(tmp_path / "alone")
    assert exactly(alone, {name: weights[name] for name in alone}) and any(name.startswith("model.") for name in alone)


# ----------------------------------------------------------------------------------------------------------- other folders


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
    tables = {name for name in weights_of(saved) if "." not in name}
    expected = {
        name: t for name, t in weights_of(saved).items() if name not in tables and not name.endswith("position_ids")
    }
    assert exactly(read_weights(other), expected)


def test_a_sharded_file_is_read_by_its_index(converted, tmp_path):
    saved, _ = converted("sd1")
    save_file({name: t.contiguous() for name, t in weights_of(saved).items()}, tmp_path / "model.safetensors")
    shard(tmp_path, "model")
    index = tmp_path / "model.safetensors.index.json"
    assert exactly(read_weights(index), read_weights(saved.ckpt))
    to_folder(read_config(saved.config), index, tmp_path / "folder")
    assert exactly(read_weights(tmp_path / "folder"), read_weights(converted("sd1")[1]))


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "shards must be in the folder of their index"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "shards must be in the folder of their index"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "no such file"),
        ('{"weight_map": {"a": 3}}', "not an index of shards"),
        ('{"weight_map": []}', "not an index of shards"),
        ("[" * 100_000, "not an index of shards"),
        ("{}", "not an index of shards"),
    ],
)
def test_a_bad_index_is_refused_in_one_line(tmp_path, index, says):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_weights(tmp_path / "model.safetensors.index.json")
    assert "\n" not in str(caught.value)


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
    for refused in (
        lambda: to_file(read_config(saved.config), other, tmp_path / "back.ckpt"),
        lambda: load_model(saved.config, other, "cpu", "full"),
    ):
        with pytest.raises(ConversionError) as caught:
            refused()
        assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "back.ckpt").exists()


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
    import os
    import pickle

    other = shutil.copytree(converted("kl")[1], tmp_path / "other")

    class Call:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'canary'}",)

    (other / "diffusion_pytorch_model.safetensors").unlink()
    (other / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Call()))
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        read_weights(other)
    assert not (tmp_path / "canary").exists()


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"resblock_updown": True}, "resblock_updown True"),
        ({"use_new_attention_order": True}, "use_new_attention_order True"),
        (
            {"num_head_channels": -1, "num_heads": 2, "channel_mult": [1, 2], "attention_resolutions": [1, 2]},
            "16, 32 channels wide",
        ),
        ({"channel_mult": [2, 4]}, "must begin with 1"),
        ({"conv_resample": False}, "conv_resample False"),
    ],
)
def test_a_unet_that_diffusers_has_no_class_for_is_refused_before_anything_is_read(tmp_path, changes, says):
    config = OmegaConf.create({"model": {"params": {**MODELS["unconditional"]}}})
    config.model.params.unet_config.params.update(changes)
    with pytest.raises(ConversionError, match=says):
        to_folder(config, tmp_path / "nowhere.ckpt", tmp_path / "folder")


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


def test_a_disk_that_refuses_leaves_nothing(converted, tmp_path, monkeypatch):
    from ldm.checkpoint.diffusers import write as writer

    saved, _ = converted("kl")
    monkeypatch.setattr(writer, "sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConversionError, match="could not be written: No space left on device"):
        to_folder(read_config(saved.config), saved.ckpt, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_conversion_left_is_swept_and_a_living_one_spared(tmp_path):
    from ldm.checkpoint.diffusers.write import new_folder

    (tmp_path / ".out.abandoned.tmp" / "unet").mkdir(parents=True)
    with new_folder(tmp_path / "out") as first, new_folder(tmp_path / "other.out"):
        assert first.is_dir() and not (tmp_path / ".out.abandoned.tmp").exists()
        with pytest.raises(ConversionError, match="already exists"), new_folder(tmp_path / "out"):
            assert first.is_dir()
            (tmp_path / "out").mkdir()
        (tmp_path / "out").rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.out", "out"]


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


def test_a_folder_without_its_classes_is_said_to_lack_them(converted, tmp_path, caplog):
    saved, folder = converted("class")
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "class_embedder.safetensors").unlink()
    to_file(read_config(saved.config), other, tmp_path / "back.ckpt")
    assert "class_embedder.safetensors is missing" in caplog.text


def test_a_model_that_no_pipeline_holds_is_said_to_be_written_in_parts(tmp_path, caplog):
    for kind, said in (("class", True), ("inpainting", False)):
        saved = save(tmp_path / kind, kind)
        caplog.clear()
        with caplog.at_level("INFO", "ldm.convert.convert"):
            to_folder(read_config(saved.config), saved.ckpt, tmp_path / kind / "folder")
        assert ("diffusers has no pipeline for this model" in caplog.text) == said
