"""The pipeline: what is loaded is the file's, a seed gives the published noise, and nothing outside a run touches its numbers."""

import builtins
import copy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm import inference
from ldm.checkpoint import CheckpointError, weights_on_meta
from ldm.config.model_info import model_info
from ldm.data.image import from_tensor
from ldm.inference import Pipeline, choose_device, load_model, text_to_image
from ldm.inference.pipeline import for_inference
from ldm.inference.requests import TextToImageRequest
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.paths import fingerprint
from ldm.util import instantiate_from_config
from tests.tiny import FIRST_STAGE, text_model_config

TINY = {"height": 16, "width": 24, "steps": 3, "n_samples": 2, "n_iter": 1, "scale": 3.0}


def draw(pipeline: Pipeline, prompts="a cat", **changes) -> list[np.ndarray]:
    return [
        np.asarray(p.image)
        for p in text_to_image(pipeline, TextToImageRequest(prompt=prompts, **{**TINY, **changes}), progress=False)
    ]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


# ------------------------------------------------------------------------------ loading


def test_the_averaged_weights_are_drawn_with_where_the_config_keeps_them(saved, pipeline):
    network = dict(saved.model.model.named_parameters())
    with saved.model.ema_scope():
        expected = {name: p.detach().clone() for name, p in network.items()}
    loaded = dict(pipeline.model.model.named_parameters())
    assert expected.keys() == loaded.keys() and all(torch.equal(expected[name], loaded[name]) for name in expected)
    assert any(not torch.equal(network[name], loaded[name]) for name in network)


def test_use_ema_false_draws_with_the_trained_weights(saved):
    loaded = load_model(saved.config, saved.ckpt, "cpu", "full", use_ema=False)
    network = dict(saved.model.model.named_parameters())
    assert all(torch.equal(network[name], p) for name, p in loaded.model.model.named_parameters())
    assert loaded.identity["use_ema"] is False


def test_everything_but_the_average_is_the_files_and_ready_to_draw(saved, pipeline):
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


def test_the_models_own_config_is_left_alone(saved):
    config = OmegaConf.create(text_model_config())
    before = OmegaConf.to_yaml(config)
    assert for_inference(config, {"first_stage_model.x"}).model.params.use_ema is False
    assert OmegaConf.to_yaml(config) == before


def test_half_precision_files_are_computed_with_in_float32(saved, tmp_path, pipeline):
    halves = {name: t.half() if t.is_floating_point() else t for name, t in saved.model.state_dict().items()}
    torch.save(halves, tmp_path / "half.ckpt")
    loaded = load_model(saved.config, tmp_path / "half.ckpt", "cpu", "full")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert np.abs(np.stack(draw(loaded)).astype(int) - np.stack(draw(pipeline))).max() <= 3


@pytest.mark.parametrize("block", ["cond_stage_model", "first_stage_model", "model"])
def test_a_file_without_a_part_of_the_model_is_refused(saved, tmp_path, block):
    rest = {name: t for name, t in saved.model.state_dict().items() if not name.startswith((f"{block}.", "model_ema."))}
    torch.save(rest, tmp_path / "part.ckpt")
    with pytest.raises(CheckpointError, match=block):
        load_model(saved.config, tmp_path / "part.ckpt", "cpu", "full")


def test_a_file_that_lacks_one_weight_is_refused(saved, tmp_path):
    name = "model.diffusion_model.out.2.weight"
    torch.save(
        {key: t for key, t in saved.model.state_dict().items() if key != name and "out2weight" not in key},
        tmp_path / "part.ckpt",
    )
    with pytest.raises(CheckpointError, match=r"out\.2"):
        load_model(saved.config, tmp_path / "part.ckpt", "cpu", "full")


def test_a_mapping_will_do_for_a_config(saved):
    assert load_model(text_model_config(), saved.ckpt, "cpu", "full").identity["config"] is None


def test_building_on_meta_keeps_tables_and_ends_with_the_context():
    with weights_on_meta():
        model = instantiate_from_config(OmegaConf.create(text_model_config(use_ema=False))["model"])
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers()) and model.betas.shape == (100,)
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_a_torchvision_that_does_not_fit_torch_is_named_with_what_mends_it(monkeypatch):
    original = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "pytorch_lightning":
            raise RuntimeError("operator torchvision::nms does not exist")
        return original(name, *args, **kwargs)

    monkeypatch.delattr(inference, "load_model", raising=False)
    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ImportError, match="pip install --upgrade torch torchvision, or pip uninstall torchvision"):
        _ = inference.load_model


def test_a_fingerprint_changes_with_the_content(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(bytes(3_000_000))
    before = fingerprint(file)
    file.write_bytes(bytes(2_999_999) + b"\x01")
    assert fingerprint(file) != before and len(before) == 16
    file.write_bytes(b"")
    assert len(fingerprint(file)) == 16


# ------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize("name, cls", [("ddim", DDIMSampler), ("plms", PLMSSampler), ("dpm_solver", DPMSolverSampler)])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_a_seed_gives_the_published_noise(saved, pipeline, name, cls, scale):
    """The published order: seed, then for each batch the sampler's own draws and nothing else."""
    model = saved.model
    expected = []
    torch.manual_seed(5)
    with torch.no_grad(), model.ema_scope():
        for _ in range(2):
            uncond = model.get_learned_conditioning([""] * 2) if scale != 1.0 else None
            cond = model.get_learned_conditioning(["a cat"] * 2)
            z, _ = cls(model).sample(
                S=3,
                batch_size=2,
                shape=(4, 4, 6),
                conditioning=cond,
                unconditional_guidance_scale=scale,
                unconditional_conditioning=uncond,
                verbose=False,
            )
            expected += [np.asarray(from_tensor(x)) for x in model.decode_first_stage(z)]
    assert same(draw(pipeline, sampler=name, scale=scale, seed=5, n_iter=2), expected)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_the_same_seed_gives_the_same_pictures_and_another_seed_others(pipeline, sampler):
    first = draw(pipeline, sampler=sampler)
    assert same(first, draw(pipeline, sampler=sampler)) and not same(first, draw(pipeline, sampler=sampler, seed=43))
    assert not np.array_equal(first[0], first[1])


def test_what_the_caller_draws_in_between_changes_nothing_and_is_not_changed(pipeline):
    undisturbed = draw(pipeline, n_iter=2, eta=1.0)
    torch.manual_seed(99)
    expected = torch.randn(6)
    torch.manual_seed(99)
    numbers, pictures = [], []
    for picture in text_to_image(
        pipeline, TextToImageRequest(prompt="a cat", **{**TINY, "n_iter": 2, "eta": 1.0}), progress=False
    ):
        numbers.append(torch.randn(1))
        pictures.append(np.asarray(picture.image))
    assert same(pictures, undisturbed) and torch.equal(torch.cat(numbers), expected[:4])


def test_fixed_code_starts_every_batch_from_the_same_noise(pipeline):
    a, b, c, d = draw(pipeline, fixed_code=True, n_iter=2)
    assert np.array_equal(a, c) and np.array_equal(b, d) and not np.array_equal(a, b)
    three = draw(pipeline, ["a cat"] * 3, fixed_code=True)
    assert (
        same(three, [a, b, a]) or np.abs(np.stack(three).astype(int) - np.stack([a, b, a])).max() <= 1
    )  # a batch of one


@pytest.mark.parametrize("n_prompts", [1, 2, 3, 5])
def test_every_prompt_of_a_list_is_drawn_n_iter_times_in_order(pipeline, n_prompts):
    prompts = [f"a cat number {k}" for k in range(n_prompts)]
    pictures = list(
        text_to_image(pipeline, TextToImageRequest(prompt=prompts, **{**TINY, "n_iter": 2}), progress=False)
    )
    assert [p.info["prompt"] for p in pictures] == prompts * 2
    assert [p.info["image_index"] for p in pictures] == list(range(2 * n_prompts))
    assert all(
        p.info["batch_size"] == len([q for q in pictures if q.info["batch_index"] == p.info["batch_index"]])
        for p in pictures
    )


def test_prompts_negative_prompts_and_guidance_matter(pipeline):
    base = draw(pipeline)
    assert not same(base, draw(pipeline, "a dog")) and not same(base, draw(pipeline, scale=1.0))
    assert not same(base, draw(pipeline, negative_prompt="blurry")) and same(base, draw(pipeline, negative_prompt=""))


def test_conditions_of_another_origin_take_the_place_of_the_models_own(pipeline):
    seen = []

    def encode(prompts):
        seen.append(list(prompts))
        return pipeline.encode_prompts(["a dog"] * len(prompts), "", 3.0)

    request = TextToImageRequest(prompt="a cat", **TINY)
    pictures = list(text_to_image(pipeline, request, progress=False, encode=encode))
    assert same([np.asarray(p.image) for p in pictures], draw(pipeline, "a dog")) and seen == [["a cat"] * 2]
    assert (pictures[0].info["task"], pictures[0].info["prompt"]) == ("txt2img", "a cat")


def test_the_metadata_holds_all_that_is_needed_to_draw_again(saved, pipeline):
    prompts, changes = ["a", "b", "c"], {"negative_prompt": "blurry", "seed": 7, "n_iter": 2}
    pictures = list(text_to_image(pipeline, TextToImageRequest(prompt=prompts, **{**TINY, **changes}), progress=False))
    info = pictures[4].info
    again = TextToImageRequest(**{field.name: info[field.name] for field in fields(TextToImageRequest)})
    again = replace(again, prompt=[pictures[k].info["prompt"] for k in range(info["n_prompts"])])
    redrawn = list(text_to_image(pipeline, again, progress=False))
    assert np.array_equal(np.asarray(redrawn[info["image_index"]].image), np.asarray(pictures[4].image))
    assert info["ckpt_bytes"] == saved.ckpt.stat().st_size and info["config"] == str(saved.config) and info["version"]
    assert info["latent_shape"] if "latent_shape" in info else (info["channels"], info["factor"]) == (4, 4)


def test_pictures_have_the_size_asked_for_and_are_rounded(pipeline):
    (image,) = draw(pipeline, n_samples=1, height=40, width=8)
    assert image.shape == (40, 8, 3) and image.dtype == np.uint8
    assert isinstance(
        next(iter(text_to_image(pipeline, TextToImageRequest(prompt="", **TINY), progress=False))).image, Image.Image
    )


# ------------------------------------------------------------------------------ numbers, devices


class Overflowing:
    """A model whose first stage overflows in half precision, or always."""

    def __init__(self, always: bool = False) -> None:
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


def test_a_device_that_is_not_there_is_refused_with_those_that_are():
    assert choose_device("cpu") == torch.device("cpu") and choose_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("tpu", "cuda:99", "gpu", ""):
        with pytest.raises(ValueError, match=r"choose auto, .*cpu"):
            choose_device(name)


def test_autocast_draws_nearly_the_same_pictures(saved, pipeline):
    half = Pipeline(pipeline.model, pipeline.info, pipeline.device, torch.bfloat16, pipeline.identity)
    assert np.abs(np.stack(draw(half)).astype(int) - np.stack(draw(pipeline))).mean() < 8
