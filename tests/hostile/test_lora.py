"""Adapter files are data: hostile, damaged and foreign ones run nothing, change nothing and are refused in one line."""

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoint import CheckpointError, UnsafeCheckpointError
from ldm.checkpoint.diffusers.lora import LoraNames, LoraTensors, read_lora, write_lora
from ldm.checkpoint.load import weights_on_meta
from ldm.cli import run_command
from ldm.modules.adapters.lora import adaptable, networks_of
from ldm.util import instantiate_from_config
from scripts import convert, merge_lora, txt2img
from tests.convert.models import MODELS
from tests.hostile.weights import FILES, safetensors
from tests.tiny import text_model_config

MODULE = "lora_unet_mid_block_attentions_0_proj_in"  # (64, 64, 1, 1)
DOWN, UP, ALPHA = f"{MODULE}.lora_down.weight", f"{MODULE}.lora_up.weight", f"{MODULE}.alpha"
CONV = "lora_unet_conv_in"  # (32, 4, 3, 3)
CONFIG = text_model_config(**MODELS["sd1"])


@pytest.fixture(scope="module")
def names() -> LoraNames:
    with weights_on_meta():
        model = instantiate_from_config(CONFIG["model"])
    return LoraNames(adaptable(networks_of(model)), CONFIG)


@pytest.fixture(scope="module")
def good(names, tmp_path_factory) -> dict[str, Tensor]:
    """A LoRA that fits, of every layer."""
    adapters = {
        key: LoraTensors(torch.ones(2, *shape[1:]), torch.ones(shape[0], 2, *[1] * (len(shape) - 2)), 1.0)
        for key, shape in names.shapes.items()
    }
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    write_lora(adapters, path, names)
    assert len(read_lora(path, names)) == len(names.shapes) > 50
    return load_file(path)


Make = Callable[[Path, dict[str, Tensor]], Path]


def changed(**changes: object) -> Make:
    """The good file with other values under some names; None leaves a name out."""
    renamed = {"down": DOWN, "up": UP, "alpha": ALPHA}
    values = {renamed.get(name, name): value for name, value in changes.items()}

    def make(folder: Path, good: dict[str, Tensor]) -> Path:
        content = {name: value for name, value in {**good, **values}.items() if value is not None}
        plain = all(isinstance(value, Tensor) and value.layout == torch.strided for value in content.values())
        if plain and not any(x.is_meta or x.is_quantized or not x.is_contiguous() for x in content.values()):
            save_file({name: x.clone() for name, x in content.items()}, folder / "lora.safetensors")
            return folder / "lora.safetensors"
        torch.save(content, folder / "lora.pt")
        return folder / "lora.pt"

    return make


def only(*names: str, shape: tuple[int, ...] = (2, 2)) -> Make:
    """A file with these names alone."""

    def make(folder: Path, good: dict[str, Tensor]) -> Path:
        save_file({name: torch.ones(shape) for name in names}, folder / "lora.safetensors")
        return folder / "lora.safetensors"

    return make


def pickled(content: object) -> Make:
    def make(folder: Path, good: dict[str, Tensor]) -> Path:
        torch.save(content, folder / "lora.pt")
        return folder / "lora.pt"

    return make


def raw(content: bytes, name: str = "lora.safetensors") -> Make:
    def make(folder: Path, good: dict[str, Tensor]) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def cut(ending: str) -> Make:
    def make(folder: Path, good: dict[str, Tensor]) -> Path:
        path = folder / f"lora.{ending}"
        save_file(good, path) if ending == "safetensors" else torch.save(good, path)
        path.write_bytes(path.read_bytes()[:-1000])
        return path

    return make


def with_metadata(text: str) -> Make:
    def make(folder: Path, good: dict[str, Tensor]) -> Path:
        save_file(
            {
                "unet.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3),
                "unet.conv_in.lora_B.weight": torch.ones(32, 1, 1, 1),
            },
            folder / "lora.safetensors",
            {"lora_adapter_metadata": text},
        )
        return folder / "lora.safetensors"

    return make


def peft_folder(config: object) -> Make:
    def make(folder: Path, good: dict[str, Tensor]) -> Path:
        tensors = {"lora_A": torch.ones(1, 4, 3, 3), "lora_B": torch.ones(32, 1, 1, 1)}
        save_file(
            {f"base_model.model.conv_in.{name}.weight": x for name, x in tensors.items()},
            folder / "adapter_model.safetensors",
        )
        (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return folder

    return make


def archive(folder: Path, good: dict[str, Tensor]) -> Path:
    with zipfile.ZipFile(folder / "lora.zip", "w") as file:
        file.writestr("lora.safetensors", b"x" * 100)
    return folder / "lora.zip"


def empty_folder(folder: Path, good: dict[str, Tensor]) -> Path:
    return folder


def header(entries: dict, data: bytes = b"") -> Make:
    return raw(safetensors(entries, data))


F32 = {"dtype": "F32", "data_offsets": [0, 16]}
BASE = "of another base"
FILES_TO_REFUSE: dict[str, tuple[Make, str]] = {  # what the file is -> (it, words of the error)
    # not adapters
    "text": (raw(b"not a LoRA", "lora.pt"), "neither a .ckpt nor a .safetensors file"),
    "nothing": (raw(b""), "empty"),
    "a web page": (raw(b"<!DOCTYPE html>"), "a web page"),
    "a git-lfs pointer": (raw(b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs pointer"),
    "an archive": (archive, "an archive around the weights"),
    "an empty folder": (empty_folder, "no LoRA in this folder"),
    "a list": (pickled([torch.ones(2, 2)]), "holds a list; expected a state dict"),
    "a tensor": (pickled(torch.ones(2, 2)), "holds a Tensor; expected a state dict"),
    "an empty state dict": (pickled({"state_dict": {}}), "holds no tensors of a LoRA"),
    "an empty header": (header({}), "holds no tensors of a LoRA"),
    "an embedding of A1111": (pickled({"string_to_param": {"*": torch.ones(1, 32)}, "name": "x"}), "textual inversion"),
    "an embedding of diffusers": (only("<cat-toy>", shape=(32,)), "textual inversion"),
    "an embedding in safetensors": (only("emb_params", shape=(1, 32)), "textual inversion"),
    "an embedding of SDXL": (only("clip_l", "clip_g", shape=(1, 32)), "textual inversion"),
    "a checkpoint": (only("betas", "model.diffusion_model.out.2.weight"), "weights of a model"),
    "a UNet of diffusers": (only("conv_in.weight", "conv_in.bias"), "weights of a model"),
    "a first stage": (only("encoder.conv_in.weight"), "weights of a model"),
    "a ControlNet": (only("control_model.input_blocks.0.0.weight"), "a ControlNet"),
    "a ControlLoRA": (only("lora_controlnet", "input_hint_block.0.weight"), "a ControlNet"),
    "a motion module": (only("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"), "a motion module"),
    "a LoHa": (only(f"{MODULE}.hada_w1_a", f"{MODULE}.hada_w1_b", f"{MODULE}.alpha"), "LyCORIS"),
    "a LoKr": (only(f"{MODULE}.lokr_w1", f"{MODULE}.lokr_w2"), "LyCORIS"),
    "an IA3": (only(f"{MODULE}.weight", f"{MODULE}.on_input"), "LyCORIS"),
    "an OFT": (only(f"{MODULE}.oft_blocks"), "LyCORIS"),
    "a GLoRA": (only(f"{MODULE}.a1.weight", f"{MODULE}.b1.weight"), "LyCORIS"),
    "whole differences": (changed(**{"lora_unet_conv_norm_out.diff": torch.ones(32)}), "LyCORIS"),
    # adapters of other models
    "a LoRA of SDXL": (only("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"), "Stable Diffusion XL"),
    "a LoRA of Flux": (
        only("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"),
        "diffusion transformer",
    ),
    "kohya's LoRA of Flux": (only("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"), "diffusion transformer"),
    "a wider context": (
        changed(
            **{"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.ones(2, 48)}
        ),
        BASE,
    ),
    "a deeper UNet": (changed(**{"lora_unet_down_blocks_3_resnets_0_conv1.lora_down.weight": torch.ones(2, 2)}), BASE),
    "more layers of text": (
        changed(**{"lora_te_text_model_encoder_layers_5_mlp_fc1.lora_down.weight": torch.ones(2, 32)}),
        BASE,
    ),
    "a wider layer": (changed(up=torch.ones(128, 2, 1, 1)), BASE),
    "another kernel": (changed(**{f"{CONV}.lora_down.weight": torch.ones(2, 4, 5, 5)}), BASE),
    # tensors that do not belong together
    "no up": (changed(up=None), "no lora_up: the file is incomplete"),
    "no down": (changed(down=None), "no lora_down: the file is incomplete"),
    "an alpha alone": (changed(up=None, down=None), "no lora_down: the file is incomplete"),
    "up and down exchanged": (changed(up=torch.ones(2, 64), down=torch.ones(64, 2)), "expected"),
    "different ranks": (changed(up=torch.ones(64, 3, 1, 1)), "expected (64, 2, 1, 1)"),
    "rank 0": (changed(up=torch.ones(64, 0, 1, 1), down=torch.ones(0, 64, 1, 1)), "a rank of 1 or more"),
    "no axes": (changed(down=torch.tensor(1.0)), "a rank of 1 or more"),
    "too many axes": (changed(down=torch.ones(2, 64, 1, 1, 1, 2)), "expected (2, 64, 1, 1)"),
    "one layer in two spellings": (
        changed(**{"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 64, 1, 1)}),
        "of the same layer",
    ),
    "an unknown tensor": (changed(**{f"{MODULE}.lora_side.weight": torch.ones(2, 2)}), "not a tensor of a LoRA"),
    "the checkpoint of a run": (
        changed(**{"adapters.unet.up": torch.ones(2, 2)}),
        "which has lora.safetensors beside it",
    ),
    "a bias": (changed(**{f"{MODULE}.lora_up.bias": torch.ones(64)}), "not a tensor of a LoRA"),
    "magnitudes of another length": (changed(**{f"{MODULE}.dora_scale": torch.ones(63, 1)}), BASE),
    "a middle tensor of another rank": (
        changed(**{f"{CONV}.lora_mid.weight": torch.ones(3, 3, 3, 3)}),
        "expected (2, 2, 3, 3)",
    ),
    # values
    "alpha 0": (changed(alpha=torch.tensor(0.0)), "expected one positive number"),
    "alpha NaN": (changed(alpha=torch.tensor(float("nan"))), "expected one positive number"),
    "alpha infinite": (changed(alpha=torch.tensor(float("inf"))), "expected one positive number"),
    "alpha negative": (changed(alpha=torch.tensor(-4.0)), "expected one positive number"),
    "two alphas": (changed(alpha=torch.ones(2)), "expected one positive number"),
    "no alpha in the tensor": (changed(alpha=torch.ones(0)), "expected one positive number"),
    "a complex alpha": (changed(alpha=torch.tensor(1j)), "expected one positive number"),
    "a text as alpha": (changed(alpha="4"), "expected one positive number"),
    "a list as alpha": (changed(alpha=[4.0]), "expected one positive number"),
    "a huge integer as alpha": (changed(alpha=10**400), "expected one positive number"),
    "NaN": (changed(down=torch.full((2, 64, 1, 1), float("nan"))), "not finite"),
    "infinity": (changed(up=torch.full((64, 2, 1, 1), float("inf"))), "not finite"),
    "integers": (changed(down=torch.ones(2, 64, 1, 1, dtype=torch.int32)), "is int32; expected floating-point"),
    "truth values": (changed(up=torch.ones(64, 2, 1, 1, dtype=torch.bool)), "is bool; expected floating-point"),
    "complex numbers": (changed(down=torch.ones(2, 64, 1, 1, dtype=torch.complex64)), "is complex64; expected"),
    "a text as tensor": (changed(down="weights"), "is str; expected floating-point"),
    "a dictionary as tensor": (changed(down={"weight": torch.ones(2, 64)}), "is dict; expected floating-point"),
    "a sparse tensor": (changed(down=torch.ones(2, 64).to_sparse()), "expected floating-point"),
    "a tensor without memory": (changed(down=torch.ones(2, 64, 1, 1, device="meta")), "the file holds fewer numbers"),
    "a huge shape over one number": (changed(down=torch.ones(1).expand(10**9, 64)), "the file holds fewer numbers"),
    # damage
    "half of a .safetensors file": (cut("safetensors"), "not a complete .safetensors file"),
    "half of a .pt file": (cut("pt"), "truncated or corrupt"),
    "a negative shape": (header({DOWN: {**F32, "shape": [-2, 2]}}, bytes(16)), ".safetensors"),
    "a huge shape": (header({DOWN: {**F32, "shape": [2**40, 2**40]}}, bytes(16)), ".safetensors"),
    "offsets beyond the end": (
        header({DOWN: {**F32, "shape": [2, 2], "data_offsets": [0, 2**50]}}, bytes(16)),
        ".safetensors",
    ),
    "overlapping offsets": (
        header({DOWN: {**F32, "shape": [2, 2]}, UP: {**F32, "shape": [2, 2]}}, bytes(16)),
        ".safetensors",
    ),
    "a header longer than the file": (raw(struct.pack("<Q", 2**40) + b"{}"), "neither"),
    "a header of broken JSON": (raw(safetensors(b"{'a': }")), ".safetensors"),
    # what stands beside the tensors
    "broken metadata": (with_metadata("{"), "invalid lora_adapter_metadata"),
    "deeply nested metadata": (with_metadata("[" * 100_000), "invalid lora_adapter_metadata"),
    "alpha 0 in the metadata": (with_metadata('{"unet.lora_alpha": 0}'), "expected one positive number"),
    "a text as alpha in the metadata": (with_metadata('{"unet.lora_alpha": "8"}'), "expected one positive number"),
    "a regular expression in the metadata": (with_metadata('{"unet.alpha_pattern": {"(.+)+$": 1}}'), "alpha_pattern"),
    "a folder of another kind of peft": (peft_folder({"peft_type": "LOKR"}), "peft_type 'LOKR' is not supported"),
    "a folder with a changed base": (peft_folder({"init_lora_weights": "pissa_niter_4"}), "changed the base weights"),
    "a folder with a broken config": (peft_folder("{"), "adapter_config.json"),
    "a folder with a list as config": (peft_folder([1]), "adapter_config.json"),
}


def test_there_are_at_least_forty_files():
    assert len(FILES_TO_REFUSE) >= 40


@pytest.mark.parametrize("what", FILES_TO_REFUSE)
def test_a_file_that_is_no_adapter_of_this_model_is_refused_in_one_line(what, names, good, tmp_path):
    make, words = FILES_TO_REFUSE[what]
    path = make(tmp_path, good)
    with pytest.raises(CheckpointError) as caught:
        read_lora(path, names)
    message = str(caught.value)
    assert words in message and str(tmp_path) in message and "\n" not in message and len(message) < 600, message


@pytest.mark.parametrize("which", FILES)
def test_a_pickle_with_code_runs_nothing(which, names, tmp_path):
    path, canary = tmp_path / f"lora{FILES[which].suffix}", tmp_path / "canary"
    FILES[which].write(path, canary)
    with pytest.raises(CheckpointError) as caught:
        read_lora(path, names)
    assert not canary.exists()
    assert isinstance(caught.value, UnsafeCheckpointError) == (FILES[which].refused is not None)


SOME = ("a checkpoint", "a LoHa", "a wider layer", "alpha NaN", "a huge shape over one number", "half of a .pt file")


@pytest.mark.parametrize("script", ["txt2img", "convert", "merge_lora"])
def test_no_script_uses_such_a_file(script, good, tmp_path, capfd):
    torch.manual_seed(0)
    config, ckpt = tmp_path / "config.yaml", tmp_path / "model.ckpt"
    OmegaConf.save(OmegaConf.create(CONFIG), config)
    torch.save({"state_dict": instantiate_from_config(CONFIG["model"]).state_dict()}, ckpt)
    main = {"txt2img": txt2img.main, "convert": convert.main, "merge_lora": merge_lora.main}[script]
    for number, what in enumerate((*SOME, "posix.system")):
        folder = tmp_path / str(number)
        folder.mkdir()
        path, canary = folder / "lora.pt", folder / "canary"
        if what in FILES:
            FILES[what].write(path, canary)
        else:
            path = FILES_TO_REFUSE[what][0](folder, good)
        out = folder / "out.safetensors"
        argv = ["--config", str(config), "--lora", str(path)]
        argv += [] if script == "convert" else ["--ckpt", str(ckpt)]
        size = ["--H", "16", "--W", "16", "--safety", "off", "--device", "cpu"]
        argv += [*size, "--outdir", str(out)] if script == "txt2img" else ["--out", str(out)]
        assert run_command(main, argv) == 2
        said = capfd.readouterr().err.strip().splitlines()
        assert said[-1].startswith("error: ") and str(path) in said[-1] and "Traceback" not in "".join(said)
        assert not canary.exists() and not list(out.rglob("*.png")) and not out.is_file()
