"""LoRA files: every spelling means one layer; a file is read whole or refused; writing and reading are inverse."""

import gzip
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint import CheckpointError, weights_on_meta
from ldm.checkpoint.diffusers.lora import DIFFUSERS, STYLES, LoraNames, LoraTensors, read_lora, write_lora
from ldm.checkpoint.diffusers.rules import ConversionError
from ldm.config.model_info import read_config
from ldm.modules.adapters.lora import LoRA, adaptable, networks_of
from ldm.util import instantiate_from_config
from tests.convert.models import MODELS, unet
from tests.reference import GOLDEN
from tests.tiny import text_model_config

ROOT = Path(__file__).parents[3]
KINDS = {**MODELS, "sd1": {**MODELS["sd1"], "unet_config": unet(context_dim=32, attention_resolutions=[1, 2])}}
PUBLISHED = {"v1": "v1-inference.yaml", "v2": "v2-inference-v.yaml"}


def names_in(config) -> LoraNames:
    with weights_on_meta():
        model = instantiate_from_config(config["model"])
    return LoraNames(adaptable(networks_of(model)), config)


@cache
def names_of(kind: str) -> LoraNames:
    if kind in PUBLISHED:
        return names_in(read_config(ROOT / "configs/stable-diffusion" / PUBLISHED[kind]))
    return names_in(text_model_config(**KINDS.get(kind, {})))


def adapters_for(names: LoraNames, rank: int = 2, alpha: float = 1.0, keep: str = "") -> dict[str, LoraTensors]:
    """An adapter with seeded values for every layer whose key contains `keep`."""
    torch.manual_seed(0)
    adapters = {}
    for key, (out, inputs, *kernel) in names.shapes.items():
        up = torch.randn(out, rank, *[1] * len(kernel))
        if keep in key:
            adapters[key] = LoraTensors(torch.randn(rank, inputs, *kernel), up, alpha)
    return adapters


def save(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = folder / "lora.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def same(one, other) -> bool:
    def equal(a, b) -> bool:
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return a == b
        return a.dtype == b.dtype and torch.equal(a, b)

    return one.keys() == other.keys() and all(equal(a, b) for key in one for a, b in zip(one[key], other[key]))


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("kind", ["lora", "locon"])
def test_every_published_name_is_a_layer_of_stable_diffusion_v1_and_back(kind, tmp_path):
    """The names and shapes are ../shared/reference/lora_keys.json.gz, made with kohya's scripts."""
    shapes = json.loads(gzip.decompress((GOLDEN / "lora_keys.json.gz").read_bytes()))[kind]
    names = names_of("v1")
    tensors = {name: torch.ones(shape) * 4 for name, shape in shapes.items()}
    adapters = read_lora(save(tmp_path, tensors), names)
    assert len(adapters) == {"lora": 264, "locon": 350}[kind]
    write_lora(adapters, tmp_path / "again.safetensors", names)
    again = read_lora(tmp_path / "again.safetensors", names)
    assert same(again, adapters)
    assert {names.module(key) for key in adapters} == {name.partition(".")[0] for name in shapes}


@pytest.mark.parametrize("kind", ["v1", "v2", "sd1", "sd2", "unconditional", "class", "text"])
def test_every_layer_has_one_name_in_each_style(kind):
    names = names_of(kind)
    for style in STYLES:
        written = {names.module(key, style): key for key in names.shapes}
        assert len(written) == len(names.shapes)
        assert all(names.key(module) == key for module, key in written.items())
    assert all(
        names.key(key.replace("unet.", "lora_unet_").replace("text.", "lora_te_")) == key for key in names.shapes
    )


BLOCK, TEXT = "down_blocks.0.attentions.0.transformer_blocks.0", "text_model.encoder.layers.1"
OURS = "unet.input_blocks.1.1.transformer_blocks.0"
CLIP = "text.transformer.text_model.encoder.layers.1"
SPELLINGS = {  # down's name in a file -> the layer
    f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q.lora_down.weight": f"{OURS}.attn1.to_q",
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight": f"{OURS}.attn1.to_q",
    "lora_unet_conv_in.lora_down.weight": "unet.input_blocks.0.0",
    "lora_unet_input_blocks_0_0.lora_down.weight": "unet.input_blocks.0.0",
    "lora_unet_conv_out.lora_down.weight": "unet.out.2",
    "lora_unet_out_2.lora_down.weight": "unet.out.2",
    "lora_unet_time_embedding_linear_1.lora_down.weight": "unet.time_embed.0",
    "lora_unet_time_embed_2.lora_down.weight": "unet.time_embed.2",
    "lora_unet_down_blocks_0_downsamplers_0_conv.lora_down.weight": "unet.input_blocks.2.0.op",
    "lora_unet_up_blocks_0_resnets_1_conv_shortcut.lora_down.weight": "unet.output_blocks.1.0.skip_connection",
    "lora_te_text_model_encoder_layers_1_mlp_fc1.lora_down.weight": f"{CLIP}.mlp.fc1",
    f"unet.{BLOCK}.attn2.to_out.0.lora_A.weight": f"{OURS}.attn2.to_out.0",
    f"unet.{BLOCK}.attn2.to_out.0.lora.down.weight": f"{OURS}.attn2.to_out.0",
    f"unet.{BLOCK}.attn2.processor.to_out_lora.down.weight": f"{OURS}.attn2.to_out.0",
    f"{BLOCK}.attn1.processor.to_k_lora.down.weight": f"{OURS}.attn1.to_k",
    f"base_model.model.{BLOCK}.ff.net.0.proj.lora_A.weight": f"{OURS}.ff.net.0.proj",
    f"base_model.model.{BLOCK}.attn1.to_v.lora_A.default.weight": f"{OURS}.attn1.to_v",
    f"unet.base_model.model.{BLOCK}.attn1.to_v.lora_A.weight": f"{OURS}.attn1.to_v",
    f"diffusion_model.{OURS.removeprefix('unet.')}.attn1.to_v.lora_down.weight": f"{OURS}.attn1.to_v",
    f"model.diffusion_model.{OURS.removeprefix('unet.')}.attn1.to_v.lora_A.weight": f"{OURS}.attn1.to_v",
    f"text_encoder.{TEXT}.self_attn.out_proj.lora_linear_layer.down.weight": f"{CLIP}.self_attn.out_proj",
    f"text_encoder.{TEXT}.self_attn.to_q_lora.down.weight": f"{CLIP}.self_attn.q_proj",
    f"text_encoder.{TEXT}.self_attn.k_proj.lora_A.weight": f"{CLIP}.self_attn.k_proj",
    f"text_encoder.{TEXT.removeprefix('text_model.')}.mlp.fc2.lora_A.weight": f"{CLIP}.mlp.fc2",
    f"base_model.model.{TEXT}.self_attn.v_proj.lora_A.weight": f"{CLIP}.self_attn.v_proj",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_tools_mean_the_same_layers(spelling, tmp_path):
    names, key = names_of("sd1"), SPELLINGS[spelling]
    expected = adapters_for(names)[key]
    up = spelling.replace("lora_A", "lora_B").replace("down.weight", "up.weight")
    read = read_lora(save(tmp_path, {spelling: expected.down, up: expected.up}), names)
    assert same(read, {key: expected._replace(alpha=2.0)}), "without alpha the scale is 1"
    module = spelling.partition(".lora")[0]
    for alpha in (f"{module}.alpha", f"{spelling}.alpha") if "lora_A" not in spelling else ():
        if "_lora" not in module or alpha.startswith(spelling):
            tensors = {spelling: expected.down, up: expected.up, alpha: torch.tensor(1.0)}
            assert same(read_lora(save(tmp_path, tensors), names), {key: expected})


def test_the_fused_projections_of_openclip_are_layers_of_their_own():
    names = names_of("sd2")
    module = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert names.key(module) == "text.model.transformer.resblocks.0.attn.q_proj"
    assert (
        names.key("text_encoder.text_model.encoder.layers.1.mlp.fc1") == "text.model.transformer.resblocks.1.mlp.c_fc"
    )
    assert names.shapes[names.key(module)] == (32, 32)


def test_convolutions_and_linear_layers_of_one_pixel_are_interchangeable(tmp_path):
    """proj_in is a convolution in Stable Diffusion v1 and linear in v2; tools write either."""
    for kind, shape in (("sd1", (32, 32)), ("sd2", (32, 32, 1, 1))):
        names, module = names_of(kind), "lora_unet_down_blocks_0_attentions_0_proj_in"
        tensors = {
            f"{module}.lora_down.weight": torch.randn(2, *shape[1:]),
            f"{module}.lora_up.weight": torch.ones(32, 2),
        }
        (adapter,) = read_lora(save(tmp_path, tensors), names).values()
        assert adapter.down.shape[1:] == names.shapes[names.key(module)][1:]


# ---------------------------------------------------------------------------------------------------------- both ways


@pytest.mark.parametrize("kind", ["sd1", "sd2", "text"])
@pytest.mark.parametrize("style", STYLES)
def test_writing_and_reading_are_inverse(kind, style, tmp_path):
    names = names_of(kind)
    adapters = adapters_for(names)
    write_lora(adapters, tmp_path / "lora.safetensors", names, style)
    read = read_lora(tmp_path / "lora.safetensors", names)
    if style == DIFFUSERS:  # has no alpha: the scale is in `up`
        adapters = {key: x._replace(up=x.up * 0.5, alpha=2.0) for key, x in adapters.items()}
    assert same(read, adapters)


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_the_folder_of_a_run_means_its_lora(inside, tmp_path):
    names = names_of("text")
    adapters = adapters_for(names)
    (tmp_path / inside).mkdir(exist_ok=True)
    write_lora(adapters, tmp_path / inside / "lora.safetensors", names)
    assert same(read_lora(tmp_path, names), adapters)


def test_incomplete_files_and_checkpoints_of_runs_are_named_as_such(tmp_path):
    names = names_of("text")
    write_lora(adapters_for(names), file := tmp_path / "lora.safetensors", names)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"^[^:]*lora.safetensors: not a complete .safetensors file"):
        read_lora(file, names)
    run = {"state_dict": {"adapters.unet.out.down": torch.zeros(2, 2)}}
    torch.save(run, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"checkpoint of a run, which has lora.safetensors beside it"):
        read_lora(tmp_path / "last.ckpt", names)


def test_an_unknown_style_is_refused(tmp_path):
    names = names_of("text")
    with pytest.raises(ValueError, match="style 'a1111': choose one of kohya, diffusers"):
        write_lora(adapters_for(names), tmp_path / "lora.safetensors", names, "a1111")


def test_dora_and_middle_tensors_are_written_and_read(tmp_path):
    names = names_of("sd1")
    linear, conv = "unet.time_embed.0", "unet.input_blocks.0.0"
    adapters = {key: x for key, x in adapters_for(names).items() if key in (linear, conv)}
    magnitudes = {linear: torch.rand(names.shapes[linear][0], 1), conv: torch.rand(names.shapes[conv][0], 1, 1, 1)}
    adapters = {key: x._replace(magnitude=magnitudes[key]) for key, x in adapters.items()}
    for style in STYLES:
        write_lora(adapters, tmp_path / "lora.safetensors", names, style)
        read = read_lora(tmp_path / "lora.safetensors", names)
        assert all(torch.equal(read[key].magnitude, magnitudes[key]) for key in adapters)
    out, inputs, *_ = names.shapes[conv]
    tucker = LoraTensors(torch.rand(2, inputs, 1, 1), torch.rand(out, 2, 1, 1), 2.0, torch.rand(2, 2, 3, 3))
    columns = adapters[linear]._replace(magnitude=torch.rand(1, names.shapes[linear][1]))
    for adapter in ({conv: tucker}, {linear: columns}):
        write_lora(adapter, tmp_path / "lora.safetensors", names)
        assert same(read_lora(tmp_path / "lora.safetensors", names), adapter)
        with pytest.raises(ConversionError, match="use kohya"):
            write_lora(adapter, tmp_path / "lora.safetensors", names, DIFFUSERS)
    assert LoRA(*tucker).shape == names.shapes[conv] and LoRA(*columns).shape == names.shapes[linear]


@pytest.mark.parametrize("beside", ["adapter_config.json", "metadata"])
def test_scales_that_peft_keeps_beside_the_tensors_are_used(beside, tmp_path):
    names, layer = names_of("sd1"), BLOCK + ".attn1."
    down = {f"{layer}{name}.lora_A.weight": torch.ones(4, 32) for name in ("to_q", "to_k")}
    up = {name.replace("lora_A", "lora_B"): torch.ones(32, 4) for name in down}
    config = {"peft_type": "LORA", "lora_alpha": 2, "alpha_pattern": {"attn1.to_k": 3}}
    if beside == "metadata":
        tensors = {f"unet.{name}": tensor for name, tensor in (down | up).items()}
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in config.items()})}
        path = save(tmp_path, tensors, metadata)
    else:
        save(tmp_path, {f"base_model.model.{name}": tensor for name, tensor in (down | up).items()})
        (tmp_path / "lora.safetensors").rename(tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        path = tmp_path  # the folder that peft writes
    assert {key[-4:]: x.alpha for key, x in read_lora(path, names).items()} == {"to_q": 2.0, "to_k": 3.0}
    if beside == "adapter_config.json":
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
        assert {x.alpha for x in read_lora(path, names).values()} == {4.0, 6.0}  # alpha / sqrt(rank)
        for change in ({"peft_type": "LOHA"}, {"init_lora_weights": "pissa"}, {"alpha_pattern": {"(a+)+$": 1}}):
            (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
            with pytest.raises(CheckpointError, match=r"adapter_config\.json: "):
                read_lora(path, names)


def test_a_file_for_other_weights_is_refused_by_shape(tmp_path):
    """An adapter of a network with wider context, as of Stable Diffusion v2 on v1."""
    names = names_of("sd1")
    adapters = adapters_for(names)
    key = f"{OURS}.attn2.to_k"
    adapters[key] = adapters[key]._replace(down=torch.ones(2, 48))
    write_lora(adapters, tmp_path / "lora.safetensors", names)
    with pytest.raises(
        CheckpointError, match=r"attn2_to_k.lora_down.weight \(2, 48\): expected \(2, 32\).*another base"
    ):
        read_lora(tmp_path / "lora.safetensors", names)


def test_numbers_in_pickles_are_alphas(tmp_path):
    names, module = names_of("sd1"), "lora_unet_time_embed_0"
    out, inputs = names.shapes["unet.time_embed.0"]
    tensors = {f"{module}.lora_down.weight": torch.ones(2, inputs), f"{module}.lora_up.weight": torch.ones(out, 2)}
    torch.save({**tensors, f"{module}.alpha": 8}, tmp_path / "lora.pt")
    assert next(iter(read_lora(tmp_path / "lora.pt", names).values())).alpha == 8.0
