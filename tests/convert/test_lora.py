"""LoRA files exchanged with diffusers and peft give the same images; conversion and merging write what they say."""

import functools

import pytest
import torch
from safetensors.torch import load_file

from ldm.checkpoint import CheckpointError, read_weights
from ldm.checkpoint.diffusers.lora import DIFFUSERS, KOHYA, LoraNames, write_lora
from ldm.config.model_info import read_config
from ldm.convert.lora import convert_lora, merge_lora
from ldm.inference import load_model
from ldm.modules.adapters.lora import LoRASpec, adaptable, inject, networks_of
from tests.convert.test_diffusers import close, our_image, their_image

diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[test]' installs it")
peft = pytest.importorskip("peft", reason="pip install -e '.[test]' installs it")
pytestmark = pytest.mark.filterwarnings(
    "ignore:::peft"
)  # of adapters that are added twice, of patterns without a layer

LORA = ("attention", "feed_forward", "text_encoder")
LOCON = (*LORA, "convolutions")
OTHERS = (r"unet\.(input_blocks\.0\.0|out\.2|time_embed\.\d)",)  # conv_in, conv_out, time_embedding


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write(path, saved, seed: int = 0, targets=LORA, style: str = KOHYA, **options):
    """Write a LoRA of a saved model with seeded values."""
    networks = networks_of(saved.model)
    torch.manual_seed(seed)
    adapters = inject(networks, LoRASpec(**{"rank": 3, "alpha": 1.5, "targets": targets, **options}))
    adapters.remove()
    for layer in adapters.layers().values():
        torch.nn.init.normal_(layer.up, std=0.5)
        if layer.magnitude is not None:
            layer.magnitude.data *= 1 + 0.3 * torch.rand_like(layer.magnitude)
    names = LoraNames(adaptable(networks), read_config(saved.config))
    write_lora(adapters.weights(), path, names, style)
    return path


def pipeline_of(folder):
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


def ours(saved, *lora, **options) -> torch.Tensor:
    return our_image(load_model(saved.config, saved.ckpt, "cpu", "full", lora=lora, **options))


@functools.cache
def without(saved) -> torch.Tensor:
    return ours(saved)


CASES = {  # kind of model, targets, style, options
    "kohya's LoRA": ("sd1", LORA, KOHYA, {}),
    "LoCon": ("sd1", LOCON, KOHYA, {}),
    "LoCon for v2": ("sd2", LOCON, KOHYA, {}),
    "all layers": ("sd1", (*LOCON, *OTHERS), DIFFUSERS, {}),
    "diffusers' names for v2": ("sd2", LOCON, DIFFUSERS, {}),
    "DoRA": ("sd1", ("attention", "feed_forward"), DIFFUSERS, {"dora": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_diffusers_generates_our_image_from_our_file(converted, tmp_path, case):
    kind, targets, style, options = CASES[case]
    saved, folder = converted(kind)
    path = write(tmp_path / "lora.safetensors", saved, targets=targets, style=style, **options)
    pipe = pipeline_of(folder)
    pipe.load_lora_weights(str(path), adapter_name="a")
    # peft scales a DoRA before it normalizes; here, as in ComfyUI, the strength scales its change of the weight.
    strength = 1.0 if "dora" in options else -0.5
    pipe.set_adapters(["a"], [strength])
    image = ours(saved, (path, strength))
    assert close(image, their_image(pipe)) and not close(image, without(saved))


def test_two_adapters_at_once_give_diffusers_image(converted, tmp_path):
    saved, folder = converted("sd1")
    first = write(tmp_path / "a.safetensors", saved, 1, LOCON)
    second = write(tmp_path / "b.safetensors", saved, 2, ("attention",), DIFFUSERS, rank=2)
    pipe = pipeline_of(folder)
    for name, path in (("a", first), ("b", second)):
        pipe.load_lora_weights(str(path), adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.5, -1.0])
    image = ours(saved, (first, 0.5), (second, -1.0))
    assert close(image, their_image(pipe)) and not close(image, ours(saved, (first, 0.5)))
    assert close(image, ours(saved, (first, 0.5), (second, -1.0), lora_mode="live"))


def test_a_folder_of_peft_gives_its_image(converted, tmp_path):
    saved, folder = converted("sd1")
    pipe = pipeline_of(folder)
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v", "conv2"], init_lora_weights=False)
    pipe.unet = peft.get_peft_model(pipe.unet, config)
    pipe.unet.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    image = ours(saved, (tmp_path / "adapter", 1.0))
    pipe.unet = pipe.unet.merge_and_unload()
    assert close(image, their_image(pipe)) and not close(image, without(saved))


@pytest.mark.parametrize(("kind", "alpha"), [("sd1", 1), ("sd1", 4), ("sd2", 1)])
def test_a_file_that_diffusers_saves_gives_its_image(converted, tmp_path, kind, alpha):
    saved, folder = converted(kind)
    pipe = pipeline_of(folder)
    torch.manual_seed(4)
    options, layers, metadata = {"r": 4, "lora_alpha": alpha, "init_lora_weights": False}, {}, {}
    if alpha != 4:  # saved in the metadata of the file; the first pattern that fits a layer counts
        options |= {"alpha_pattern": {"attn1.to_q": 2, "to_q": 9}, "rank_pattern": {"conv1": 2}}
    for name, targets in (("unet", ["to_q", "to_out.0", "conv1", "proj_in"]), ("text_encoder", ["q_proj", "fc1"])):
        network, config = getattr(pipe, name), peft.LoraConfig(target_modules=targets, **options)
        peft.inject_adapter_in_model(config, network)
        layers[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(network)
        metadata[f"{name}_lora_adapter_metadata"] = config.to_dict() if alpha != 4 else None
    pipe.save_lora_weights(tmp_path, safe_serialization=alpha != 4, **layers, **metadata)
    image = ours(saved, (tmp_path, 1.0))
    assert close(image, their_image(pipe)) and not close(image, without(saved))


# ---------------------------------------------------------------------------------------------------- conversion, merge


@pytest.mark.parametrize("kind", ["sd1", "sd2", "unconditional"])
def test_a_conversion_to_diffusers_and_back_gives_the_same_image(converted, tmp_path, kind):
    saved, _ = converted(kind)
    config = read_config(saved.config)
    targets = ("attention", "convolutions") if kind == "unconditional" else LOCON
    path = write(tmp_path / "a.safetensors", saved, targets=targets, alpha=3.0)  # a scale of 1
    convert_lora(config, path, tmp_path / "b.safetensors", DIFFUSERS)
    assert all(name.startswith(("unet.", "text_encoder.")) for name in load_file(tmp_path / "b.safetensors"))
    convert_lora(config, tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    one, other = load_file(path), load_file(tmp_path / "c.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(CheckpointError, match="already exists"):
        convert_lora(config, path, tmp_path / "b.safetensors")


@pytest.mark.parametrize(("source", "ending"), [("file", "ckpt"), ("folder", "safetensors")])
def test_a_merged_checkpoint_gives_the_image_of_its_loras(converted, tmp_path, source, ending):
    saved, folder = converted("sd1")
    files = [(write(tmp_path / f"{k}.safetensors", saved, k), strength) for k, strength in enumerate((0.5, -1.0))]
    target = tmp_path / f"merged.{ending}"
    config = read_config(saved.config)
    merge_lora(config, saved.ckpt if source == "file" else folder, files, target)
    before, after = read_weights(saved.ckpt), read_weights(target)
    assert before.keys() == after.keys() and all(x.dtype == after[name].dtype for name, x in before.items())
    image = our_image(load_model(saved.config, target, "cpu", "full"))
    assert torch.equal(image, ours(saved, *files))
    with pytest.raises(CheckpointError, match="already exists"):
        merge_lora(config, saved.ckpt, files, target)
