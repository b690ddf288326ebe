"""Weights of 8 and 4 bits: what is quantized, the images, adapters on them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm.cli import run_command
from ldm.inference import TextToImageRequest, load_model, text_to_image
from ldm.inference.quantize import check_quantization, quantize_weights
from ldm.inference.settings import QUANTIZATIONS
from ldm.modules.adapters.lora import LoRASpec, inject, networks_of
from ldm.modules.dtype import is_quantized
from ldm.output.images import read_metadata
from scripts.txt2img import main
from tests.reference import randn
from tests.scripts.refusals import refused
from tests.tiny import model_flags

pytest.importorskip("torchao", reason="pip install -e '.[quantize]' installs it")

ON_CPU = ("int8", "fp8")
REQUEST = TextToImageRequest(prompt="a cat", height=16, width=16, steps=3, n_samples=1, n_iter=1)


def image_of(pipeline) -> np.ndarray:
    (generated,) = text_to_image(pipeline, REQUEST, progress=False)
    return np.asarray(generated.image).astype(float)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("precision", ["full", "bf16"])
def test_linear_layers_are_quantized_and_the_image_stays(saved, pipeline, name, precision, caplog):
    with caplog.at_level("INFO"):
        quantized = load_model(saved.config, saved.ckpt, "cpu", precision, quantize=name)
    for network in networks_of(quantized.model).values():
        for layer in network.modules():
            weight = getattr(layer, "weight", None)
            if isinstance(weight, torch.Tensor):
                assert is_quantized(weight) is (type(layer) is nn.Linear)
                assert weight.dtype == {"full": torch.float32, "bf16": torch.bfloat16}[precision]
    assert not any(is_quantized(weight) for weight in quantized.model.first_stage_model.parameters())
    assert f"{name} weights: " in caplog.text and "keep their dtype" in caplog.text
    error = np.abs(image_of(quantized) - image_of(pipeline)).mean()
    assert 0 < error < 4  # of 255
    assert quantized.identity["quantize"] == name and "quantize" not in pipeline.identity


def test_what_the_device_does_not_compute_is_refused_in_one_line(saved, tmp_path, capsys):
    model = model_flags(saved)
    line = refused(main, [*model, "--quantize", "int4", "--outdir", str(tmp_path / "out")], capsys)
    assert "--quantize int4: cpu does not compute int4 weights with float32 (" in line
    assert "choose another precision or one of int8, fp8" in line and not (tmp_path / "out").exists()
    assert "argument --quantize: invalid choice: 'int3'" in refused(main, [*model, "--quantize", "int3"], capsys)
    with pytest.raises(ValueError, match="--quantize int3: choose one of int8, fp8, int4"):
        check_quantization("int3", torch.device("cpu"), "full")


def test_a_missing_package_is_named_with_its_extra_before_anything_loads(saved, capsys, monkeypatch):
    monkeypatch.setattr("ldm.inference.settings.find_spec", lambda name: None)
    monkeypatch.setattr("ldm.inference.load_model", None)
    model = ["--config", str(saved.config), "--ckpt", str(saved.ckpt), "--quantize", QUANTIZATIONS[0]]
    assert "--quantize int8 needs torchao: pip install -e '.[quantize]'" in refused(main, model, capsys)


def test_a_quantized_sample_is_repeated_from_its_metadata(saved, tmp_path):
    flags = model_flags(saved)
    flags += ["--prompt", "a cat", "--ddim_steps", "2", "--n_samples", "1", "--n_iter", "1", "--quantize", "int8"]
    assert run_command(main, [*flags, "--outdir", str(tmp_path / "one")]) == 0
    first = tmp_path / "one" / "samples" / "00000.png"
    assert read_metadata(first)["quantize"] == "int8"
    assert run_command(main, ["--from-metadata", str(first), "--outdir", str(tmp_path / "two")]) == 0
    again = tmp_path / "two" / "samples" / "00000.png"
    assert read_metadata(again) == read_metadata(first)
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(first)))


@pytest.mark.parametrize("name", ON_CPU)
def test_a_lora_on_quantized_frozen_weights_trains(saved, name):
    model = load_model(saved.config, saved.ckpt, "cpu", "full", quantize=name).model
    networks = networks_of(model)
    adapters = inject(networks, LoRASpec(rank=4, targets=("attention", "feed_forward")))
    before = {key: layer.dequantize().clone() for key, layer in model.named_parameters() if is_quantized(layer)}
    optimizer = torch.optim.Adam(adapters.parameters(), lr=1e-2)
    x, t, target = randn(1, 4, 4, 8, 8), torch.tensor([5, 30, 60, 90]), randn(2, 4, 4, 8, 8)
    text = model.get_learned_conditioning(["a", "b", "c", "d"]).detach()
    losses = []
    for _ in range(12):
        loss = nn.functional.mse_loss(model.apply_model(x, t, text), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.98 * losses[0] and all(each.up.abs().max() > 0 for each in adapters.layers().values())
    assert before and all(torch.equal(model.get_parameter(key).dequantize(), was) for key, was in before.items())


def test_a_live_lora_adds_the_same_to_quantized_weights(saved):
    outputs = []
    for name in (None, "int8"):
        model = load_model(saved.config, saved.ckpt, "cpu", "full").model
        for dora in (False, True):
            torch.manual_seed(0)
            adapters = inject(networks_of(model), LoRASpec(rank=2, dora=dora, targets=("attention", "text_encoder")))
            for layer in adapters.layers().values():
                nn.init.normal_(layer.up, std=0.2)
            if name is not None and not dora:
                quantize_weights(networks_of(model).values(), name)
            with torch.no_grad():
                text = model.get_learned_conditioning(["a"])
                outputs.append(model.apply_model(randn(1, 1, 4, 8, 8), torch.tensor([50]), text))
            adapters.remove()
    plain, plain_dora, quantized, quantized_dora = outputs
    for one, other in ((plain, quantized), (plain_dora, quantized_dora)):
        assert 0 < float((one - other).norm() / one.norm()) < 0.03
