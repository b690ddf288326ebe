"""Precision: the meaning of each name, and images from 16-bit weights close to those of float32."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.checkpoint import load_weights, weights_on_meta, write_weights
from ldm.inference import (
    Pipeline,
    choose_device,
    generate_samples,
    image_to_image,
    inpaint,
    load_model,
    precision,
    text_to_image,
    upscale,
)
from ldm.inference.precision import Precision, cast_weights, has_bfloat16, resolve_precision
from ldm.inference.requests import (
    ClassConditionalRequest,
    ImageToImageRequest,
    InpaintRequest,
    TextToImageRequest,
    UpscaleRequest,
)
from ldm.inference.settings import PRECISIONS
from ldm.models.autoencoder import VQModelInterface
from ldm.models.diffusion.samplers.registry import SAMPLERS, make_sampler
from ldm.modules.dtype import weights_dtype
from ldm.modules.encoders.modules import BERTEmbedder, FrozenCLIPEmbedder
from tests.inference.tasks.test_every_task import VQ
from tests.models.diffusion.modes import MODES
from tests.models.diffusion.samplers.toy import ToyModel
from tests.models.diffusion.tiny import batch, latent_diffusion
from tests.reference import randn, seed_weights
from tests.tiny import FIRST_STAGE, save_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
IMAGE = Image.fromarray(np.add.outer(np.arange(16), 5 * np.arange(24)).astype(np.uint8)).convert("RGB")


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB."""
    a, b = (np.asarray(image, dtype=np.float64) for image in (one, other))
    return 20 * np.log10(255) - 10 * np.log10(max(np.square(a - b).mean(), 1e-9))


def generate(kind: str, pipeline: Pipeline) -> Image.Image:
    """An image of the task that a kind of model is for."""
    if kind in ("unconditional", "class"):
        classes = None if kind == "unconditional" else (1,)
        settings = ClassConditionalRequest(
            n_samples=1, steps=3, eta=0.0, seed=1, classes=classes, scale=1.0 if classes is None else 2.0
        )
        return next(iter(generate_samples(pipeline, settings, progress=False))).image
    if kind in ("inpaint", "sd-inpaint"):
        mask = Image.new("L", IMAGE.size)
        mask.paste(255, (4, 4, 20, 12))
        prompt = {"prompt": "a cat", "scale": 2.0} if kind == "sd-inpaint" else {}
        return inpaint(pipeline, IMAGE, mask, InpaintRequest(steps=3, **prompt), progress=False).image
    if kind in ("upscale", "x4"):
        prompt = {"prompt": "a cat", "scale": 2.0, "noise_level": 20} if kind == "x4" else {}
        return upscale(pipeline, IMAGE, UpscaleRequest(steps=3, eta=0.0, **prompt), progress=False).image
    size = {"height": 16, "width": 24, "steps": 4, "n_samples": 1, "n_iter": 1, "scale": 2.0}
    if kind == "img2img":
        results = image_to_image(
            pipeline, IMAGE, ImageToImageRequest(prompt="a cat", **size, strength=0.5), progress=False
        )
    else:
        results = text_to_image(pipeline, TextToImageRequest(prompt="a cat", **size), progress=False)
    return next(iter(results)).image


# --- what a name means


@pytest.mark.parametrize("bfloat16", [True, False])
def test_auto_is_bf16_where_the_device_has_instructions_for_it_and_full_elsewhere(monkeypatch, bfloat16):
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bfloat16, "amx_bf16": False}, raising=False
    )
    assert resolve_precision("auto", CPU) == (Precision("bf16", BF16) if bfloat16 else Precision("full", FP32))
    assert resolve_precision("autocast", CPU) == Precision("autocast", FP32, BF16 if bfloat16 else None)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16, raising=False)
    assert has_bfloat16(CPU) == bfloat16


@pytest.mark.parametrize("capability, name", [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "full")])
def test_a_gpu_computes_in_bf16_from_ampere_on(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(precision, "_try_layers", lambda numbers, device: None)
    assert resolve_precision("auto", CUDA).name == name and resolve_precision("autocast", CUDA) == Precision(
        "autocast", FP32, FP16
    )
    assert (
        resolve_precision("fp16", CUDA) == Precision("fp16", FP16) and resolve_precision("full", CUDA).weights is FP32
    )


def test_unknown_and_unsupported_precisions_are_refused_in_one_line(monkeypatch):
    with pytest.raises(ValueError, match=f"--precision half: choose one of {', '.join(PRECISIONS)}"):
        resolve_precision("half", CPU)

    def conv2d(*args, **kwargs):
        raise RuntimeError('"slow_conv2d_cpu" not implemented\nfor Half')

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    with pytest.raises(
        ValueError, match=r"^--precision fp16: cpu cannot compute in float16 \(.*implemented\); choose one of"
    ) as error:
        resolve_precision("fp16", CPU)
    assert "\n" not in str(error.value)


def test_the_resolved_precision_is_logged_and_recorded(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    saved = save_model(tmp_path, "text")
    with caplog.at_level(logging.INFO):
        pipeline = load_model(saved.config, saved.ckpt, "cpu")
    assert "on cpu, precision bf16: weights in bfloat16" in caplog.text
    assert (pipeline.identity["precision"], pipeline.identity["precision_used"]) == ("auto", "bf16")
    assert str(resolve_precision("autocast", CPU)) == "autocast: weights in float32, computed in bfloat16"


# --- the weights


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_weights_are_read_in_their_dtype_and_channels_last_and_buffers_stay_float32(tmp_path, suffix):
    saved = save_model(tmp_path, "text", first_stage_config=VQ)
    write_weights(saved.model.state_dict(), tmp_path / f"model.{suffix}")
    model = load_model(saved.config, tmp_path / f"model.{suffix}", "cpu", "bf16").model
    theirs = saved.model.state_dict()
    with saved.model.ema_scope():
        theirs = {name: tensor.clone() for name, tensor in saved.model.state_dict().items()}
    codebook = "first_stage_model.quantize.embedding.weight"
    for name, weight in model.named_parameters():
        assert weight.dtype == (FP32 if name == codebook else BF16), name
        assert torch.equal(weight, theirs[name].to(weight.dtype)), name
        assert weight.ndim != 4 or weight.is_contiguous(memory_format=torch.channels_last), name
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {FP32}
    assert all(torch.equal(table, theirs[name]) for name, table in model.named_buffers() if name in theirs)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells where files are mapped")
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_weights_that_need_no_cast_stay_in_the_file(tmp_path, suffix):
    saved = save_model(tmp_path, "text")
    path = tmp_path / f"model.{suffix}"
    write_weights(saved.model.state_dict(), path)
    model = load_model(saved.config, path, "cpu", "full").model
    lines = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    mapped = [range(*(int(end, 16) for end in line.split("-"))) for line in lines]
    elsewhere = [
        name for name, weight in model.named_parameters() if not any(weight.data_ptr() in part for part in mapped)
    ]
    assert mapped and not elsewhere


def test_feature_maps_stay_channels_last(tmp_path):
    """If a layer loses the layout, every convolution after it has to restore it."""
    saved = save_model(tmp_path, "text")
    pipeline = load_model(saved.config, saved.ckpt, "cpu", "bf16")
    lost = []

    def check(name):
        def hook(module, args, out):
            if (
                torch.is_tensor(out)
                and out.ndim == 4
                and out.shape[1] > 4
                and not out.is_contiguous(memory_format=torch.channels_last)
            ):
                lost.append(name)

        return hook

    for name, module in pipeline.model.named_modules():
        module.register_forward_hook(check(name))
    generate("text", pipeline)
    generate("img2img", pipeline)
    assert not lost


# --- the images


TASKS = ("text", "img2img", "unconditional", "class", "inpaint", "upscale")


@pytest.mark.parametrize(
    "kind, stage", [*((kind, "kl") for kind in (*TASKS, "v2-v", "sd-inpaint", "x4")), *((kind, "vq") for kind in TASKS)]
)
def test_every_task_gives_nearly_the_same_image_in_bf16(tmp_path, kind, stage, monkeypatch):
    """With a codebook, latents are decoded unquantized: rounding may switch to another code."""
    monkeypatch.setattr(VQModelInterface, "decode", VQModelInterface.decode_latent)
    first_stage = FIRST_STAGE if stage == "kl" else VQ
    saved = save_model(tmp_path, "text" if kind == "img2img" else kind, first_stage_config=first_stage)
    full, half = (generate(kind, load_model(saved.config, saved.ckpt, "cpu", name)) for name in ("full", "bf16"))
    assert psnr(full, half) > 35


@pytest.mark.parametrize("mode", MODES)
def test_every_condition_stage_works_with_bf16_weights(tmp_path, mode):
    key, unet_changes, cond, params = MODES[mode]
    params = {name: value for name, value in params.items() if name != "cond_stage_trainable"}
    full = latent_diffusion(key, unet_changes, cond, **params).eval()
    torch.save(full.state_dict(), tmp_path / "a.ckpt")
    with weights_on_meta():
        half = latent_diffusion(key, unet_changes, cond, **params)
    cast_weights(half, BF16, channels_last=True)
    load_weights(half, tmp_path / "a.ckpt")
    assert weights_dtype(half.model) is BF16
    outs = []
    for model in (full, half.eval()):
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            z, c = model.get_input(batch(), "image", force_c_encode=True)
            outs.append(model.apply_model(z, torch.tensor([500, 20]), c))
            outs[-1] = torch.cat([outs[-1].flatten(), model.decode_first_stage(z).flatten()])
    assert outs[1].dtype is FP32 and (outs[0] - outs[1]).norm() / outs[0].norm() < 0.03


@pytest.mark.parametrize("encoder", ["CLIP", "BERT"])
def test_text_encoders_work_with_bf16_weights(tmp_path, encoder):
    def make():
        if encoder == "CLIP":
            shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
            return FrozenCLIPEmbedder(text_config=shape)
        return BERTEmbedder(n_embed=16, n_layer=2, vocab_size=50, use_tokenizer=False)

    full = seed_weights(make())
    torch.save(full.state_dict(), tmp_path / "a.ckpt")
    with weights_on_meta():
        half = make().eval()
    cast_weights(half, BF16)
    load_weights(half, tmp_path / "a.ckpt")
    inputs = ["a cat"] if encoder == "CLIP" else torch.tensor([[3, 4, 5]])
    expected, out = full(inputs), half(inputs)
    assert out.dtype is BF16 and (out - expected).norm() / expected.norm() < 0.02


def test_a_first_stage_that_overflows_in_fp16_is_decoded_with_float32_weights(tmp_path):
    saved = save_model(tmp_path, "text")
    large = {
        name: 1e4 * t if name == "first_stage_model.decoder.conv_in.weight" else t
        for name, t in saved.model.state_dict().items()
    }
    torch.save(large, saved.ckpt)
    pipeline = load_model(saved.config, saved.ckpt, "cpu", "fp16")
    z = 100 * randn(1, 1, 4, 4, 6)
    with pipeline.sampling():
        assert not pipeline.model.decode_first_stage(z).isfinite().all()
        x = pipeline.decode(z)
        expected = load_model(saved.config, saved.ckpt, "cpu", "full").decode(z)
    assert weights_dtype(pipeline.model.first_stage_model) is FP32 and weights_dtype(pipeline.model.model) is FP16
    assert (x - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("name", ["bf16", "fp16", "autocast"])
def test_the_noise_and_the_samplers_state_are_float32_in_every_precision(tmp_path, name):
    saved = save_model(tmp_path, "text")
    noise, seen = {}, []
    for used in ("full", name):
        pipeline = load_model(saved.config, saved.ckpt, "cpu", used)
        inner = pipeline.model.apply_model

        def apply_model(x, t, cond, inner=inner, used=used):
            out = inner(x, t, cond)
            noise.setdefault(used, x)
            seen.extend((x.dtype, out.dtype))
            return out

        pipeline.model.apply_model = apply_model
        generate("text", pipeline)
    assert torch.equal(noise["full"], noise[name]) and set(seen) == {FP32}


class NoReadingBack(TorchDispatchMode):
    """Fails where a number is read back to the host, which would stall a GPU and break its graphs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "a number was read back"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_step_of_a_sampler_waits_for_the_device(sampler, monkeypatch):
    walker = make_sampler(sampler, ToyModel())
    step = type(walker).step

    def watched(self, x, k, run):
        with NoReadingBack():
            return step(self, x, k, run)

    monkeypatch.setattr(type(walker), "step", watched)
    cond = torch.zeros(1, 4, 2, 2)
    options = {
        "unconditional_guidance_scale": 2.0,
        "unconditional_conditioning": cond,
        "guidance_rescale": 0.5,
        "verbose": False,
    }
    assert walker.sample(5, 1, (4, 2, 2), cond, **options).samples.isfinite().all()
    with pytest.raises(AssertionError, match="read back"), NoReadingBack():
        float(torch.ones(()))


def test_an_unavailable_device_is_refused_with_the_choices():
    assert choose_device("cpu") == torch.device("cpu") and choose_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("tpu", "cuda:99", "gpu", ""):
        with pytest.raises(ValueError, match=r"choose auto, .*cpu"):
            choose_device(name)
