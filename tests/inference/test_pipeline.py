"""Loading: the file's weights without initialization; decoding: overflows of half precision."""

import builtins
import copy

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm import cli, inference
from ldm.checkpoint import CheckpointError
from ldm.config.model_info import model_info
from ldm.inference import Pipeline, load_model, text_to_image
from ldm.inference.pipeline import for_inference
from ldm.inference.requests import TextToImageRequest
from ldm.modules.prepacked import PrepackedConv2d, PrepackedLinear, is_supported
from tests.tiny import FIRST_STAGE, text_model_config

TINY = {"height": 16, "width": 24, "steps": 3, "n_samples": 2, "n_iter": 1, "scale": 3.0}


def generate(pipeline: Pipeline, prompts="a cat", **changes) -> list[np.ndarray]:
    return [
        np.asarray(p.image)
        for p in text_to_image(pipeline, TextToImageRequest(prompt=prompts, **{**TINY, **changes}), progress=False)
    ]


# --- loading


def test_ema_weights_are_used_if_the_config_keeps_an_ema(saved, pipeline):
    network = dict(saved.model.model.named_parameters())
    with saved.model.ema_scope():
        expected = {name: p.detach().clone() for name, p in network.items()}
    loaded = dict(pipeline.model.model.named_parameters())
    assert expected.keys() == loaded.keys() and all(torch.equal(expected[name], loaded[name]) for name in expected)
    assert any(not torch.equal(network[name], loaded[name]) for name in network)


def test_use_ema_false_uses_the_trained_weights(saved):
    loaded = load_model(saved.config, saved.ckpt, "cpu", "full", use_ema=False)
    network = dict(saved.model.model.named_parameters())
    assert all(torch.equal(network[name], p) for name, p in loaded.model.model.named_parameters())
    assert loaded.identity["use_ema"] is False


def test_a_compiled_network_gives_the_same_images_and_is_recorded(saved, pipeline):
    compiled = load_model(saved.config, saved.ckpt, "cpu", "full", compiler="aot_eager")
    assert compiled.identity["compile"] == "aot_eager" and "compile" not in pipeline.identity
    for size in ({}, {"n_samples": 1}):
        for ours, eager in zip(generate(compiled, **size), generate(pipeline, **size), strict=True):
            assert np.abs(ours.astype(int) - eager).max() <= 1


def test_convolutions_keep_packed_weights_in_bfloat16_in_a_program_that_samples(saved, pipeline, monkeypatch):
    monkeypatch.setattr("ldm.inference.pipeline.keep_freed_memory", lambda large: None)  # of this process
    monkeypatch.setattr(cli, "only_samples", True)
    half = load_model(saved.config, saved.ckpt, "cpu", "bf16")
    (image, _), (expected, _) = generate(half), generate(pipeline)
    packed = {type(layer) for layer in half.model.model.modules()} & {PrepackedConv2d, PrepackedLinear}
    assert np.abs(image.astype(float) - expected).mean() < 2  # of 255
    assert len(packed) == 2 or not is_supported()


def test_all_other_weights_are_those_of_the_file(saved, pipeline):
    theirs = saved.model.state_dict()
    ours = pipeline.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("model."))
    tensors = [*pipeline.model.parameters(), *pipeline.model.buffers()]
    assert not any(t.is_meta or t.requires_grad for t in tensors) and not any(
        m.training for m in pipeline.model.modules()
    )
    assert {t.dtype for t in pipeline.model.parameters()} == {torch.float32}


def test_no_weight_is_initialized_and_no_other_file_is_read(saved, tmp_path, monkeypatch):
    stage = copy.deepcopy(FIRST_STAGE)
    stage["params"] |= {
        "ckpt_path": "/nowhere/first_stage.ckpt",
        "lossconfig": {"target": "ldm.no.such.Loss"},
        "learn_logvar": True,
    }
    config = text_model_config(first_stage_config=stage, ckpt_path="/nowhere/model.ckpt")
    OmegaConf.save(OmegaConf.create(config), tmp_path / "c.yaml")
    filled = []
    for name in ("kaiming_uniform_", "uniform_", "normal_", "xavier_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda t, *a, **k: filled.append(t))
    loaded = load_model(tmp_path / "c.yaml", saved.ckpt, "cpu", "full")
    assert all(t.is_meta for t in filled)
    assert torch.equal(
        loaded.model.first_stage_model.decoder.conv_in.weight, saved.model.first_stage_model.decoder.conv_in.weight
    )


def test_the_given_config_is_not_modified(saved):
    config = OmegaConf.create(text_model_config())
    before = OmegaConf.to_yaml(config)
    assert for_inference(config, {"first_stage_model.x"}).model.params.use_ema is False
    assert OmegaConf.to_yaml(config) == before


def test_half_precision_files_load_as_float32(saved, tmp_path, pipeline):
    halves = {name: t.half() if t.is_floating_point() else t for name, t in saved.model.state_dict().items()}
    torch.save(halves, tmp_path / "half.ckpt")
    loaded = load_model(saved.config, tmp_path / "half.ckpt", "cpu", "full")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert np.abs(np.stack(generate(loaded)).astype(int) - np.stack(generate(pipeline))).max() <= 3


@pytest.mark.parametrize("block", ["cond_stage_model", "first_stage_model", "model"])
def test_a_file_without_a_part_of_the_model_is_refused(saved, tmp_path, block):
    rest = {name: t for name, t in saved.model.state_dict().items() if not name.startswith((f"{block}.", "model_ema."))}
    torch.save(rest, tmp_path / "part.ckpt")
    with pytest.raises(CheckpointError, match=block):
        load_model(saved.config, tmp_path / "part.ckpt", "cpu", "full")


def test_a_file_with_one_missing_weight_is_refused(saved, tmp_path):
    name = "model.diffusion_model.out.2.weight"
    torch.save(
        {key: t for key, t in saved.model.state_dict().items() if key != name and "out2weight" not in key},
        tmp_path / "part.ckpt",
    )
    with pytest.raises(CheckpointError, match=r"out\.2"):
        load_model(saved.config, tmp_path / "part.ckpt", "cpu", "full")


def test_a_config_may_be_a_mapping(saved):
    assert load_model(text_model_config(), saved.ckpt, "cpu", "full").identity["config"] is None


def test_an_incompatible_torchvision_is_reported_with_the_fix(monkeypatch):
    original = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "pytorch_lightning":
            raise RuntimeError("operator torchvision::nms does not exist")
        return original(name, *args, **kwargs)

    monkeypatch.delattr(inference, "load_model", raising=False)
    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ImportError, match="pip install --upgrade torch torchvision, or pip uninstall torchvision"):
        _ = inference.load_model


# --- drawing


# --- numbers, devices


class Overflowing(torch.nn.Module):
    """A model whose first stage overflows in half precision, or always."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.always = always

    def decode_first_stage(self, z):
        out = torch.nn.functional.linear(z, 3e38 * torch.eye(z.shape[-1]))
        bad = self.always or out.dtype != torch.float32
        return torch.full((1, 3, 2, 2), float("nan") if bad else 0.25)


def test_an_overflow_of_half_precision_in_the_first_stage_is_decoded_in_float32():
    info = model_info(text_model_config())
    ok = Pipeline(Overflowing(), info, torch.device("cpu"), torch.bfloat16, {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ok.decode(torch.zeros(1, 4, 2, 2)).eq(0.25).all()
    with pytest.raises(ValueError, match="non-finite"):
        Pipeline(Overflowing(always=True), info, torch.device("cpu"), None, {}).decode(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="--precision full"):
        ok.decode(torch.full((1, 4, 2, 2), float("inf")))


def test_weights_that_are_not_finite_are_named_with_their_file(saved, tmp_path):
    content = torch.load(saved.ckpt, weights_only=True)
    key = "first_stage_model.decoder.conv_in.weight"
    content["state_dict"][key][0, 0, 0, 0] = float("nan")
    torch.save(content, tmp_path / "nan.ckpt")
    broken = load_model(saved.config, tmp_path / "nan.ckpt", "cpu", "full")
    with pytest.raises(ValueError, match=rf"non-finite values; the weights of .*nan.ckpt are not finite: {key}; use"):
        generate(broken)


def test_autocast_gives_nearly_the_same_images(saved, pipeline):
    half = Pipeline(pipeline.model, pipeline.info, pipeline.device, torch.bfloat16, pipeline.identity)
    assert np.abs(np.stack(generate(half)).astype(int) - np.stack(generate(pipeline))).mean() < 8
