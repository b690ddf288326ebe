"""Laws of low-rank adapters: nothing changes at first, live equals merged, names and weights of the base stay."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.checkpoint.diffusers.lora import PREFIX
from ldm.checkpoint.load import weights_on_meta
from ldm.inference.lora import Adapter
from ldm.inference.lora import merged as merged_weights
from ldm.modules.adapters import lora
from ldm.modules.adapters.lora import LoRA, LoRASpec
from ldm.modules.attention import CrossAttention
from ldm.util import instantiate_from_config
from tests.tiny import CAPTIONS, OPEN_CLIP, UNET

CLIP = {
    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "params": {
        "text_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
        }
    },
}
GROUPS = tuple(lora.TARGETS)
TOKENS = torch.tensor([[49406, 320, 8853, 49407]])


@pytest.fixture
def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    unet = instantiate_from_config({"target": UNET["target"], "params": UNET["params"]})
    for parameter in unet.parameters():  # the zero-initialized layers too
        nn.init.normal_(parameter, std=0.05)
    return {"unet": unet.eval(), "text": instantiate_from_config(OPEN_CLIP).eval()}


def outputs(networks: dict[str, nn.Module]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 16, generator=generator)
    dtype = next(networks["unet"].parameters()).dtype
    image = networks["unet"](x.to(dtype), torch.tensor([1, 50]), context=context.to(dtype))
    return torch.cat([image.flatten(), networks["text"](TOKENS).flatten()]).float()


def random_weights(networks: dict[str, nn.Module], seed: int = 0, **options) -> dict[str, LoRA]:
    """Adapters with values everywhere, `up` and `magnitude` included."""
    adapters = lora.inject(networks, LoRASpec(**{"rank": 2, "alpha": 3.0, "targets": GROUPS, **options}))
    generator = torch.Generator().manual_seed(seed)
    for layer in adapters.layers().values():
        layer.up.data.normal_(0, 0.1, generator=generator)
        if layer.magnitude is not None:
            layer.magnitude.data *= 1 + 0.3 * torch.rand(layer.magnitude.shape, generator=generator)
    adapters.remove()
    return adapters.weights()


def merge(networks: dict[str, nn.Module], adapters: list[tuple[dict[str, LoRA], float]]) -> None:
    """Merge (weights, strength) of adapters into the networks' weights, as sampling does."""
    named = {PREFIX[part] + name: x for part, network in networks.items() for name, x in network.state_dict().items()}
    changed = merged_weights(named, [Adapter(Path("lora.safetensors"), *each) for each in adapters])
    for part, network in networks.items():
        own = {name.removeprefix(PREFIX[part]): x for name, x in changed.items() if name.startswith(PREFIX[part])}
        network.load_state_dict(own)


@pytest.mark.parametrize("dora", [False, True])
def test_new_adapters_change_nothing_but_get_gradients(networks, dora):
    before = outputs(networks)
    adapters = lora.inject(networks, LoRASpec(dora=dora, targets=GROUPS))
    after = outputs(networks)
    assert torch.allclose(after, before, atol=1e-6)
    (after**2).sum().backward()
    for key, layer in adapters.layers().items():
        assert layer.up.grad is not None and layer.up.grad.abs().sum() > 0, key


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0, 0.0])
def test_live_equals_merged(networks, dora, strength):
    first, second = random_weights(networks, 1, dora=dora), random_weights(networks, 2, rank=3)
    before, merged = outputs(networks), deepcopy(networks)
    live = [lora.apply(networks, first, strength), lora.apply(networks, second, 0.7)]
    merge(merged, [(first, strength), (second, 0.7)])
    assert torch.allclose(outputs(networks), outputs(merged), atol=2e-5)
    assert not torch.allclose(outputs(networks), before, atol=1e-2)
    for adapters in live:
        adapters.remove()
    assert torch.equal(outputs(networks), before)


def test_strength_zero_is_the_base(networks):
    before = outputs(networks)
    merge(networks, [(random_weights(networks, dora=True), 0.0)])
    assert torch.allclose(outputs(networks), before, atol=1e-6)


def test_a_merged_weight_is_the_formula_in_float32_then_in_the_dtype_of_the_weight(networks):
    weights = random_weights(networks)
    key = "unet.middle_block.1.transformer_blocks.0.attn2.to_k"
    unet = networks["unet"].to(torch.bfloat16)
    layer = unet.get_submodule(key.removeprefix("unet."))
    w, adapter = layer.weight.detach().clone(), weights[key]
    merge(networks, [(weights, 0.5)])
    expected = w.float() + 0.5 * 3.0 / 2 * adapter.up @ adapter.down
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, expected.to(torch.bfloat16))


def test_dora_has_the_lengths_of_its_magnitude(networks):
    weights = random_weights(networks, dora=True)
    merge(networks, [(weights, 1.0)])
    for key in ("unet.input_blocks.1.0.in_layers.2", "unet.middle_block.1.transformer_blocks.0.attn1.to_q"):
        weight = networks["unet"].get_submodule(key.removeprefix("unet.")).weight
        assert torch.allclose(weight.flatten(1).norm(dim=1), weights[key].magnitude.flatten(), rtol=1e-5)


def test_magnitudes_of_columns_too(networks):
    key = "unet.middle_block.1.transformer_blocks.0.attn1.to_q"
    weight = networks["unet"].get_submodule(key.removeprefix("unet.")).weight
    adapter = random_weights(networks)[key]
    magnitude = torch.rand(1, weight.shape[1])
    merge(networks, [({key: LoRA(adapter.down, adapter.up, adapter.alpha, magnitude=magnitude)}, 1.0)])
    assert torch.allclose(weight.norm(dim=0, keepdim=True), magnitude, rtol=1e-5)


def test_a_core_between_down_and_up(networks):
    key = "unet.input_blocks.1.0.in_layers.2"
    layer = networks["unet"].get_submodule(key.removeprefix("unet."))
    o, i = layer.weight.shape[:2]
    weights = {key: LoRA(torch.randn(2, i, 1, 1), torch.randn(o, 2, 1, 1), 2.0, mid=torch.randn(2, 2, 3, 3))}
    x = torch.randn(1, i, 5, 5)
    adapters = lora.apply(networks, weights)
    live = layer(x)
    adapters.remove()
    merge(networks, [(weights, 1.0)])
    assert torch.allclose(live, layer(x), atol=1e-4, rtol=1e-4)


def test_names_and_weights_of_the_base_stay(networks):
    before = {part: deepcopy(network.state_dict()) for part, network in networks.items()}
    adapters = lora.inject(networks, LoRASpec(targets=GROUPS))
    for part, network in networks.items():
        assert {name: tuple(t.shape) for name, t in network.state_dict().items()} == {
            name: tuple(t.shape) for name, t in before[part].items()
        }
        network.load_state_dict(before[part], strict=True)
        assert all(torch.equal(t, before[part][name]) for name, t in network.state_dict().items())
    assert "unet.middle_block.1.transformer_blocks.0.attn1.to_q.down" in adapters.state_dict()


def test_forward_methods_put_in_place_by_research_code_keep_the_adapter(networks, monkeypatch):
    original = CrossAttention.forward
    monkeypatch.setattr(CrossAttention, "forward", lambda self, x, context=None, mask=None: original(self, x, context))
    before = outputs(networks)
    lora.apply(networks, random_weights(networks, targets=[r".*attn\d\.to_v"]))
    assert not torch.allclose(outputs(networks), before, atol=1e-5)


def test_a_copy_has_its_own_adapter(networks):
    model = nn.ModuleDict(networks)
    model["adapters"] = lora.apply(networks, random_weights(networks))
    before = outputs(networks)
    copy = deepcopy(model)
    for layer in copy["adapters"].layers().values():
        layer.up.data.zero_()
    assert torch.equal(outputs(networks), before)
    assert not torch.allclose(outputs({"unet": copy["unet"], "text": copy["text"]}), before, atol=1e-2)


def test_compiled_networks_have_the_adapter(networks):
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(4, 4, 3, padding=1))
    for dora in (False, True):
        compiled = deepcopy(model)
        x, parts = torch.randn(2, 4, 8), {"unet": compiled}
        lora.apply(parts, random_weights(parts, targets=[r".*"], dora=dora))
        eager = compiled(x)
        compiled.compile(backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), eager, atol=1e-6) and not torch.allclose(eager, model(x), atol=1e-3)


def test_dropout_is_of_training_only(networks):
    adapters = lora.inject(networks, LoRASpec(dropout=0.5, targets=GROUPS))
    for layer in adapters.layers().values():
        layer.up.data.normal_(0, 0.1)
    adapters.eval()
    still = outputs(networks)
    assert torch.equal(outputs(networks), still)
    adapters.train()
    assert not torch.allclose(outputs(networks), still, atol=1e-3)


def test_the_adapter_is_float32_beside_16_bit_weights(networks):
    unet = {"unet": networks["unet"].to(torch.bfloat16)}
    adapters = lora.inject(unet, LoRASpec())
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    x = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)
    out = unet["unet"](x, torch.tensor([3]), context=torch.randn(1, 2, 16, dtype=torch.bfloat16))
    out.float().sum().backward()
    assert all(layer.up.grad is not None for layer in adapters.layers().values())


def test_attention_is_the_default_and_patterns_name_whole_keys(networks):
    keys = lora.find_targets(networks, LoRASpec().targets)
    assert keys and all("attn" in key or key.endswith(("proj_in", "proj_out")) for key in keys)
    assert all(key.startswith("unet.") for key in keys)
    assert lora.find_targets(networks, [r"unet\.time_embed\.\d"]) == ["unet.time_embed.0", "unet.time_embed.2"]
    with pytest.raises(ValueError, match=r"'time_embed' names none of the .* attention, feed_forward"):
        lora.find_targets(networks, ["time_embed"])
    with pytest.raises(ValueError, match="not a regular expression"):
        lora.find_targets(networks, ["unet.("])


def test_no_targets_and_ranks_above_those_of_all_layers_are_refused(networks):
    with pytest.raises(ValueError, match=r"targets \[\]: expected one or more of attention"):
        lora.inject(networks, LoRASpec(targets=()))
    with pytest.raises(ValueError, match="rank 1000000: these layers have ranks of"):
        lora.inject(networks, LoRASpec(rank=1000000))


def test_layers_without_effect_are_no_targets(networks):
    keys = lora.find_targets(networks, ["text_encoder"])
    heads = ["q_proj", "k_proj", "v_proj", "out_proj"]
    stem = "text.model.transformer.resblocks.0."  # the penultimate of two layers is the last that is used
    assert keys == [*(f"{stem}attn.{head}" for head in heads), f"{stem}mlp.c_fc", f"{stem}mlp.c_proj"]


@pytest.mark.parametrize(("config", "count"), [(CLIP, 12), (CAPTIONS, 6)])
def test_text_encoders_have_targets(config, count):
    text = {"text": instantiate_from_config(config)}
    keys = lora.find_targets(text, ["text_encoder"])
    assert len(keys) == count
    assert not any("norm" in key or "embed" in key for key in keys)


def test_targets_of_stable_diffusion_are_those_of_kohya():
    """264 modules in LoRA, 350 in LoCon."""
    config = {"target": UNET["target"], "params": {**UNET["params"], "image_size": 32, "model_channels": 320}}
    config["params"] |= {"attention_resolutions": [4, 2, 1], "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4]}
    config["params"] |= {"num_heads": 8, "context_dim": 768}
    with weights_on_meta():
        networks = {"unet": instantiate_from_config(config)}
        networks["text"] = instantiate_from_config({"target": CLIP["target"]})
    assert len(lora.find_targets(networks, ["attention"])) == 16 * 10
    assert len(lora.find_targets(networks, ["attention", "feed_forward", "text_encoder"])) == 264
    assert len(lora.find_targets(networks, GROUPS)) == 350


def test_what_does_not_fit_changes_nothing(networks):
    weights = random_weights(networks)
    key = list(weights)[-1]
    before = outputs(networks)
    good = weights[key]
    for bad, match in (
        ({"unet.nowhere": good}, "unet.nowhere: this model has no such layer"),
        ({key: LoRA(good.down[:, 1:], good.up, 1.0)}, "of another base"),
        ({key: LoRA(good.down, good.up[:, 1:], 1.0)}, "do not fit together"),
    ):
        given = {**weights, **bad}
        with pytest.raises(ValueError, match=match):
            lora.apply(networks, given)
        assert torch.equal(outputs(networks), before)


def test_an_error_in_a_call_leaves_the_weights_of_attention(networks):
    adapters = lora.apply(networks, random_weights(networks))
    attention = networks["text"].model.transformer.resblocks[0].attn
    with pytest.raises((AssertionError, RuntimeError), match=r"dim|shape"):
        attention(torch.zeros(1, 2, 7), torch.zeros(1, 2, 7), torch.zeros(1, 2, 7))
    assert isinstance(attention.in_proj_weight, nn.Parameter)
    assert isinstance(attention.out_proj.weight, nn.Parameter)
    adapters.remove()
