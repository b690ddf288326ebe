"""LoRA in sampling: merged equals live, files add up, nothing is lost to 16 bits, images can be repeated."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint import CheckpointError
from ldm.checkpoint.diffusers.lora import LoraNames, write_lora
from ldm.cli import run_command
from ldm.config.model_info import read_config
from ldm.inference import load_model
from ldm.inference.lora import Adapter, merged
from ldm.modules.adapters.lora import LoRA, LoRASpec, adaptable, inject, networks_of
from ldm.output.images import read_metadata
from scripts import sample_diffusion, txt2img
from tests.scripts.refusals import refused
from tests.tiny import SavedModel, model_flags, save_model

ALL = ("attention", "feed_forward", "convolutions", "text_encoder")


def write(path, saved: SavedModel, seed: int = 0, targets=ALL, **options):
    """Write a LoRA of a saved model with seeded values."""
    networks = networks_of(saved.model)
    torch.manual_seed(seed)
    adapters = inject(networks, LoRASpec(**{"rank": 2, "alpha": 1.0, "targets": targets, **options}))
    adapters.remove()
    for layer in adapters.layers().values():
        torch.nn.init.normal_(layer.up, std=0.3)
        if layer.magnitude is not None:
            layer.magnitude.data *= 1 + 0.3 * torch.rand_like(layer.magnitude)
    saved.model.requires_grad_(True)
    names = LoraNames(adaptable(networks), read_config(saved.config))
    write_lora(adapters.weights(), path, names)
    return path


@pytest.fixture(scope="module")
def loras(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return [write(folder / f"{k}.safetensors", saved, k, dora=k == 1) for k in (0, 1)]


@torch.no_grad()
def output(saved: SavedModel, *lora, mode: str = "merged", **options) -> torch.Tensor:
    """The network's output for a prompt."""
    pipeline = load_model(saved.config, saved.ckpt, "cpu", "full", lora=lora, lora_mode=mode, **options)
    cond, _ = pipeline.encode_prompts(["a cat"])
    with pipeline.sampling():
        return pipeline.model.apply_model(torch.ones(1, 4, 8, 8), torch.tensor([50]), cond)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("strengths", [(1.0,), (0.5,), (-1.0,), (0.7, 0.4), (1.0, -2.0)])
@pytest.mark.parametrize("use_ema", [True, False])
def test_merged_equals_live(saved, loras, strengths, use_ema):
    files = list(zip(loras, strengths))
    live, base = (output(saved, *lora, mode="live", use_ema=use_ema) for lora in (files, ()))
    assert difference(output(saved, *files, use_ema=use_ema), live) < 1e-5
    assert difference(live, base) > 1e-2


def test_merged_equals_live_with_the_fused_projections_of_openclip(tmp_path):
    saved = save_model(tmp_path, "v2")
    lora = write(tmp_path / "lora.safetensors", saved), 0.8
    assert difference(output(saved, lora), output(saved, lora, mode="live")) < 1e-5
    text = write(tmp_path / "text.safetensors", saved, targets=("text_encoder",)), 1.0
    assert difference(output(saved, text), output(saved)) > 1e-3


def test_strengths_and_files_add_up(saved, loras):
    first, _ = loras
    assert torch.equal(output(saved, (first, 0.0)), output(saved))
    assert difference(output(saved, (first, 0.5), (first, 0.5)), output(saved, (first, 1.0))) < 1e-5
    assert difference(output(saved, (first, 2.0), (first, -2.0)), output(saved)) < 1e-5


def test_a_change_below_the_steps_of_bfloat16_is_kept_on_average():
    """Added to rounded weights it would vanish: each sum would round back."""
    torch.manual_seed(0)
    weight, name = 1 + torch.rand(64, 64), "model.diffusion_model.out.2.weight"  # steps of 2^-7
    lora = LoRA(torch.full((1, 64), 1e-3), torch.ones(64, 1), 1.0)
    adapter = Adapter("lora.safetensors", {"unet.out.2": lora}, 1.0)
    rounded = weight.bfloat16()
    now = merged({name: weight}, [adapter], torch.bfloat16)[name]
    assert float((now.float() - rounded.float()).mean()) == pytest.approx(1e-3, rel=0.2)
    assert torch.equal(merged({name: rounded}, [adapter])[name], rounded)


def test_the_checkpoint_is_not_written_to(saved, loras):
    before = saved.ckpt.read_bytes()
    output(saved, (loras[0], 1.0))
    assert saved.ckpt.read_bytes() == before


def test_an_unknown_mode_is_refused(saved, loras):
    with pytest.raises(ValueError, match="lora_mode 'merge': choose one of merged, live"):
        output(saved, (loras[0], 1.0), mode="merge")


def test_weights_that_the_checkpoint_lacks_are_named(saved, loras, tmp_path):
    """As those of a text encoder that has a folder of its own."""
    weights = {name: x for name, x in saved.model.state_dict().items() if not name.startswith("cond_stage_model.")}
    keys = {"text.transformer.layer": LoRA(torch.ones(1, 4), torch.ones(4, 1), 1.0)}
    with pytest.raises(CheckpointError, match=r"lacks the weight of text.transformer.layer.*--lora_mode live"):
        merged(weights, [Adapter(loras[0], keys, 1.0)])


def test_a_lora_of_another_model_is_refused_before_the_weights_are_read(saved, loras, tmp_path):
    other = save_model(tmp_path, "unconditional")
    with pytest.raises(CheckpointError, match=r"0\.safetensors: .*no such layer"):
        output(other, (loras[0], 1.0))


# ------------------------------------------------------------------------------------------------------------- scripts


def arguments(saved: SavedModel, outdir, *flags: str) -> list[str]:
    size = ["--H", "16", "--W", "16", "--n_samples", "1", "--n_iter", "1", "--ddim_steps", "2"]
    return [*model_flags(saved, outdir), *size, *flags]


def image_in(outdir) -> tuple[np.ndarray, dict]:
    path = outdir / "samples" / "00000.png"
    return np.asarray(Image.open(path)), read_metadata(path)


@pytest.mark.parametrize(
    "script", ["txt2img", "img2img", "inpaint", "upscale", "knn2img", "edit", "sample_diffusion", "sample_conditional"]
)
def test_every_script_that_samples_takes_loras(script):
    parser = importlib.import_module(f"scripts.{script}").parser()
    assert {"--lora", "--lora_mode"} <= set(parser.flags)


@pytest.mark.parametrize("mode", ["merged", "live"])
def test_an_image_is_repeated_with_its_loras(saved, loras, tmp_path, mode):
    flags = ["--lora", f"{loras[0]}:-0.5", "--lora", str(loras[1]), "--lora_mode", mode]
    assert run_command(txt2img.main, arguments(saved, tmp_path / "a", *flags)) == 0
    pixels, info = image_in(tmp_path / "a")
    assert info["lora"] == [f"{loras[0]}:-0.5", f"{loras[1]}:1.0"] and info["lora_mode"] == mode
    assert [len(text) for text in info["lora_fingerprint"]] == [16, 16]
    again = ["--from-metadata", str(tmp_path / "a" / "samples" / "00000.png"), "--outdir", str(tmp_path / "b")]
    assert run_command(txt2img.main, again) == 0
    repeated = image_in(tmp_path / "b")
    assert repeated[1] == info and np.array_equal(repeated[0], pixels)
    run_command(txt2img.main, arguments(saved, tmp_path / "c"))
    without = image_in(tmp_path / "c")
    assert not np.array_equal(without[0], pixels) and not any(name.startswith("lora") for name in without[1])


def test_a_changed_lora_is_refused_unless_the_flag_names_it(saved, loras, tmp_path, capsys):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(loras[0].read_bytes())
    assert run_command(txt2img.main, arguments(saved, tmp_path / "a", "--lora", str(copy))) == 0
    again = ["--from-metadata", str(tmp_path / "a" / "samples" / "00000.png"), "--outdir", str(tmp_path / "b")]
    copy.write_bytes(loras[1].read_bytes())
    capsys.readouterr()
    assert f"--lora {copy}: not the file that" in refused(txt2img.main, again, capsys)
    assert run_command(txt2img.main, [*again, "--lora", str(copy)]) == 0
    copy.unlink()
    capsys.readouterr()
    assert "copy.safetensors:1.0: no such file" in refused(txt2img.main, again, capsys)


def test_unusable_loras_are_refused_in_one_line(saved, loras, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    for given, reason in {
        f"{loras[0]}:nan": "choose a strength of",
        f"{loras[0]}:1e9": "choose a strength of",
        f"{loras[0]}:high": "no such file; pass FILE or FILE:strength",
        str(tmp_path / "missing.safetensors"): "no such file",
        str(tmp_path / "folder"): "no LoRA in this folder",
        str(saved.ckpt): "weights of a model, not a LoRA",
    }.items():
        assert reason in refused(txt2img.main, arguments(saved, tmp_path / "out", "--lora", given), capsys)


def test_class_conditional_samples_take_loras(tmp_path):
    saved = save_model(tmp_path, "class")
    saved.config.rename(tmp_path / "config.yaml")
    saved = saved._replace(config=tmp_path / "config.yaml")
    lora = write(tmp_path / "lora.safetensors", saved, targets=("attention",))
    argv = ["-r", str(saved.ckpt), "-n", "1", "-c", "2", "--device", "cpu", "--seed", "1", "--lora", f"{lora}:2"]
    assert run_command(sample_diffusion.main, [*argv, "-l", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").rglob("sample_*.png")
    assert read_metadata(file)["lora"] == [f"{lora}:2.0"]


def test_one_file_given_twice_is_warned_of(saved, loras, caplog):
    with caplog.at_level("WARNING"):
        output(saved, (loras[0], 0.5), (loras[1], 0.5))
        assert "given" not in caplog.text
        output(saved, (loras[0], 0.5), (loras[0], 1.0))
    assert f"{loras[0]}: this LoRA is given 2 times; the strengths add up" in caplog.text


def test_weights_that_a_merge_would_overflow_are_refused_and_those_of_the_file_are_not_blamed(tmp_path):
    up = LoRA(torch.ones(1, 4), torch.full((4, 1), 300.0), 1.0)
    weights = {"model.diffusion_model.out.weight": torch.ones(4, 4, dtype=torch.float16)}
    adapter = Adapter(Path("big.safetensors"), {"unet.out": up}, 1000.0)
    with pytest.raises(CheckpointError, match=r"big.safetensors: .*out.weight would not be finite in float16"):
        merged(weights, [adapter])
    merged({name: x / 0 for name, x in weights.items()}, [adapter])  # not by the LoRA


def test_values_that_overflow_in_sampling_name_the_strength(saved, loras):
    pipeline = load_model(saved.config, saved.ckpt, device="cpu", precision="full", lora=[(loras[0], 1.0)])
    with pytest.raises(ValueError, match=r"non-finite values; try .*, or a smaller strength of --lora"):
        pipeline.decode(torch.full((1, 4, 4, 4), float("nan")))


def test_live_without_a_lora_is_refused(saved, tmp_path, capsys):
    words = refused(txt2img.main, arguments(saved, tmp_path, "--lora_mode", "live"), capsys)
    assert "--lora_mode live: there is no LoRA; add --lora FILE, or remove the flag" in words
