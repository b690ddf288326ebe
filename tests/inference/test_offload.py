"""Offloading: where each stage is while each part of every task runs. A recorder of `.to` stands for the GPU."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm import inference
from ldm.inference import memory, requests
from ldm.inference import pipeline as pipelines
from ldm.inference.offload import keep_on_cpu, offloaded_stages
from ldm.inference.settings import OFFLOADS, check_offload
from ldm.models.diffusion.tiling import TiledModel, Tiling
from tests.images import hole, make_image
from tests.tiny import save_model

CUDA, TINY = torch.device("cuda"), {"height": 16, "width": 24, "steps": 2, "n_samples": 1, "prompt": "a cat"}
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))

TASKS = {  # task -> (model, function of the pipeline -> images)
    "txt2img": ("text", lambda p: inference.text_to_image(p, requests.TextToImageRequest(**TINY), progress=False)),
    "weighted": (
        "text",
        lambda p: inference.text_to_image(p, requests.TextToImageRequest(emphasis=True, **TINY), progress=False),
    ),
    "img2img": (
        "text",
        lambda p: inference.image_to_image(p, IMAGE, requests.ImageToImageRequest(**TINY), progress=False),
    ),
    "control2img": (
        "control",
        lambda p: inference.control_to_image(p, [IMAGE], requests.ControlRequest(controls=1, **TINY), progress=False),
    ),
    "edit": ("edit", lambda p: inference.edit(p, IMAGE, requests.EditRequest(**TINY), progress=False)),
    "inpaint": (
        "inpaint",
        lambda p: [inference.inpaint(p, make_image(), hole(), requests.InpaintRequest(steps=2), progress=False)],
    ),
    "upscale": (
        "upscale",
        lambda p: [inference.upscale(p, IMAGE, requests.UpscaleRequest(steps=2), progress=False)],
    ),
    "class": (
        "class",
        lambda p: inference.generate_samples(
            p, requests.ClassConditionalRequest(n_samples=1, steps=2, classes=(1,)), progress=False
        ),
    ),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load a new pipeline of a kind of tiny model, saved once."""
    saved = {}

    def load(kind):
        if kind not in saved:
            saved[kind] = save_model(tmp_path_factory.mktemp(kind), kind)
        return inference.load_model(saved[kind].config, saved[kind].ckpt, "cpu", "full")

    return load


def watch(model, name, monkeypatch):
    """Offload stages of a model -> a list of (part that runs, {part: device type}) to which each call adds."""
    every = {"cond_stage_model": model.cond_stage_model, "first_stage_model": model.first_stage_model}
    every = {"network": model.model, **every, "control": getattr(model, "control_model", None)}
    parts = {part: module for part, module in every.items() if isinstance(module, nn.Module)}
    if model.first_stage_model is model.cond_stage_model:
        del parts["cond_stage_model"]
    stages = offloaded_stages(model, name)
    place, calls = {id(module): "cpu" if module in stages else "cuda" for module in parts.values()}, []

    def to(module, device):
        place[id(module)] = device.type
        return module

    def record(part):
        def hook(module, args):
            calls.append((part, {each: place[id(module)] for each, module in parts.items()}))

        return hook

    monkeypatch.setattr(nn.Module, "to", to)
    networks = [parts[part] for part in ("network", "control") if part in parts]
    keep_on_cpu(stages, networks if name == "all" else [], CUDA)
    for part, module in parts.items():
        for layer in module.modules():  # also those that a task calls without the part's forward
            if layer is not module:
                layer.register_forward_pre_hook(record(part))
    return calls, [part for part, module in parts.items() if any(module is stage for stage in stages)]


CASES = [*((task, "all") for task in TASKS), ("txt2img", "text"), ("txt2img", "vae"), ("img2img", "vae")]


@pytest.mark.parametrize("task, name", CASES)
def test_every_part_runs_on_the_gpu_and_what_is_offloaded_waits_on_the_cpu(load, monkeypatch, task, name):
    kind, run = TASKS[task]
    pipeline = load(kind)
    expected = [np.asarray(generated.image) for generated in run(pipeline)]
    calls, offloaded = watch(pipeline.model, name, monkeypatch)
    images = [np.asarray(generated.image) for generated in run(pipeline)]
    assert {part for part, _ in calls} >= {"network", "first_stage_model"}
    for part, place in calls:
        assert place.pop(part) == "cuda"
        for other, device in place.items():
            network = other in ("network", "control")
            away = name == "all" and part in offloaded if network else other in offloaded
            assert device == ("cpu" if away else "cuda"), (part, other)
    assert all(map(np.array_equal, images, expected))


def test_an_error_during_a_call_brings_every_part_back(load, monkeypatch):
    model = load("text").model
    calls, _ = watch(model, "all", monkeypatch)
    with pytest.raises(RuntimeError):
        model.first_stage_model.decode(torch.zeros(1, 3, 2, 2))
    model.apply_model(torch.zeros(1, 4, 4, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 77, 16))
    assert calls[-1] == ("network", {"network": "cuda", "cond_stage_model": "cpu", "first_stage_model": "cpu"})


def test_tiles_and_parts_of_a_batch_move_each_stage_once(load, monkeypatch):
    pipeline = load("text")
    model, moves = pipeline.model, []
    monkeypatch.setattr(nn.Module, "to", lambda module, device: moves.append((module, device.type)))
    keep_on_cpu([model.first_stage_model], [model.model], CUDA)
    tiled = pipeline.with_model(TiledModel(model, Tiling((4, 4), (2, 2)), 4))
    once = [
        (model.model, "cpu"),
        (model.first_stage_model, "cuda"),
        (model.first_stage_model, "cpu"),
        (model.model, "cuda"),
    ]
    places = []
    monkeypatch.setattr(memory, "free_memory", lambda device: places.append(moves[-1]) or 0)
    for run in (lambda: tiled.encode(torch.zeros(1, 3, 32, 32)), lambda: tiled.decode(torch.zeros(2, 4, 8, 8))):
        moves.clear()
        with torch.no_grad():
            run()
        assert moves == once
    assert places == [once[1]]  # free memory is measured without the network


class Device:
    """The GPU, by the tensors that `.to` has moved there."""

    def __init__(self):
        self.tensors, self.peak = set(), 0  # peak: values

    def move(self, module, device):
        tensors = {*module.parameters(), *module.buffers()}
        self.tensors = self.tensors | tensors if device.type == "cuda" else self.tensors - tensors
        self.peak = max(self.peak, sum(tensor.numel() for tensor in self.tensors))
        return module

    def has(self, module):
        return {*module.parameters(), *module.buffers()} <= self.tensors


@pytest.fixture
def gpu(monkeypatch):
    device = Device()
    monkeypatch.setattr(nn.Module, "to", lambda module, where: device.move(module, where))
    monkeypatch.setattr(pipelines, "choose_device", lambda name: CUDA)
    return device


@pytest.mark.parametrize("name", OFFLOADS)
def test_loading_moves_to_the_gpu_only_what_stays_there(tmp_path, gpu, name):
    saved = save_model(tmp_path, "text")
    model = inference.load_model(saved.config, saved.ckpt, "cuda", "full", offload=name).model
    away = {tensor for stage in offloaded_stages(model, name) for tensor in (*stage.parameters(), *stage.buffers())}
    rest = {*model.parameters(), *model.buffers()} - away
    assert away and gpu.tensors == rest
    assert gpu.peak == sum(tensor.numel() for tensor in rest)


def test_a_controlnet_that_is_loaded_later_moves_with_the_network(tmp_path_factory, gpu):
    saved, control = (save_model(tmp_path_factory.mktemp(kind), kind) for kind in ("text", "control"))
    pipeline = inference.load_model(saved.config, saved.ckpt, "cuda", "full", offload="all")
    net, places = inference.load_controlnet(pipeline, control.ckpt), []
    stage = pipeline.model.first_stage_model
    stage.post_quant_conv.register_forward_pre_hook(lambda *_: places.append((gpu.has(stage), gpu.has(net))))
    stage.decode(torch.zeros(1, 4, 2, 2))
    assert places == [(True, False)] and gpu.has(net) and not gpu.has(stage)


def test_a_device_without_memory_of_its_own_and_a_model_without_the_stage_are_refused(load):
    with pytest.raises(ValueError, match="--offload vae: the model is on cpu"):
        check_offload("vae", "cpu")
    with pytest.raises(ValueError, match=r"^--offload all with --compile: .*; choose --offload vae or text, or remove"):
        check_offload("all", "cuda", "inductor")
    check_offload("vae", "cuda", "inductor")
    with pytest.raises(ValueError, match="choose one of text, vae, all"):
        check_offload("unet", "cuda")
    with pytest.raises(ValueError, match="--offload text: this model has no cond_stage_model"):
        offloaded_stages(load("upscale").model, "text")
