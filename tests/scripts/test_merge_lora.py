"""scripts/merge_lora.py as it is called, and scripts/convert.py --lora: what they write, what they refuse."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.cli import run_command
from scripts import convert, merge_lora, txt2img
from tests.inference.test_lora import write
from tests.scripts.refusals import help_without_heavy_imports, refused
from tests.tiny import model_flags

SCRIPT = Path(__file__).parents[2] / "scripts" / "merge_lora.py"


@pytest.fixture(scope="module")
def lora(saved, tmp_path_factory):
    return write(tmp_path_factory.mktemp("lora") / "lora.safetensors", saved)


def image(saved, outdir, ckpt, *flags: str) -> np.ndarray:
    size = ["--H", "16", "--W", "16", "--n_samples", "1", "--n_iter", "1", "--ddim_steps", "2"]
    assert run_command(txt2img.main, [*model_flags(saved._replace(ckpt=ckpt), outdir), *size, *flags]) == 0
    return np.asarray(Image.open(outdir / "samples" / "00000.png"))


@pytest.mark.parametrize("averages", [True, False])
def test_the_merged_checkpoint_gives_the_image_of_the_lora(saved, lora, tmp_path, capsys, averages):
    """Weights and averages are merged, so that --use_ema keeps its meaning."""
    out, use_ema = tmp_path / "merged.ckpt", "--use_ema" if averages else "--no-use_ema"
    argv = ["--ckpt", str(saved.ckpt), "--config", str(saved.config), "--lora", f"{lora}:-0.5", "--lora", str(lora)]
    assert run_command(merge_lora.main, [*argv, "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    merged = image(saved, tmp_path / "a", out, use_ema)
    live = image(saved, tmp_path / "b", saved.ckpt, "--lora", f"{lora}:-0.5", "--lora", str(lora), use_ema)
    assert np.array_equal(merged, live)
    assert not np.array_equal(merged, image(saved, tmp_path / "c", saved.ckpt, use_ema))


def test_a_run_directory_needs_no_config(saved, lora, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(saved.ckpt, tmp_path / "run" / "checkpoints" / "last.ckpt")
    shutil.copy(saved.config, tmp_path / "run" / "config.yaml")
    argv = ["--ckpt", str(tmp_path / "run"), "--lora", str(lora), "--out", str(tmp_path / "merged.safetensors")]
    assert run_command(merge_lora.main, argv) == 0
    assert load_file(tmp_path / "merged.safetensors").keys() == saved.model.state_dict().keys()


def test_refusals(saved, lora, tmp_path, capsys):
    (tmp_path / "there.ckpt").touch()
    model = ["--ckpt", str(saved.ckpt), "--config", str(saved.config), "--lora", str(lora)]
    for argv, reason in (
        ([*model, "--out", str(tmp_path / "there.ckpt")], "already exists"),
        ([*model, "--out", str(tmp_path / "merged.bin")], "must end in .ckpt or .safetensors"),
        ([*model[:-1], f"{lora}:nan", "--out", str(tmp_path / "merged.ckpt")], "choose a strength"),
        ([*model[:-2], "--out", str(tmp_path / "merged.ckpt")], "nothing to merge: pass --lora FILE"),
    ):
        assert reason in refused(merge_lora.main, argv, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["there.ckpt"] and not (tmp_path / "there.ckpt").stat().st_size


def test_help_needs_no_torch(tmp_path):
    assert "--lora FILE[:STRENGTH]" in help_without_heavy_imports(SCRIPT, tmp_path)


# --------------------------------------------------------------------------------------------------- convert.py --lora


def test_a_lora_is_converted_both_ways(saved, lora, tmp_path, capsys):
    """Of a model whose text encoder diffusers lacks: its layers keep their names."""
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    config = ["--config", str(saved.config)]
    argv = [*config, "--lora", str(lora), "--lora_format", "diffusers", "--out", str(there)]
    assert run_command(convert.main, argv) == 0
    assert run_command(convert.main, [*config, "--lora", str(there), "--out", str(back)]) == 0
    assert "layers in" in capsys.readouterr().out
    names = load_file(there).keys()
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in names
    one, other = load_file(lora), load_file(back)
    downs = [name for name in one if name.endswith("lora_down.weight")]
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in downs)


def test_flags_of_the_other_conversion_are_refused(saved, lora, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out.safetensors")]
    for argv, reason in (
        (["--lora", str(lora), "--dtype", "fp16", *out], "--dtype: only for --ckpt"),
        (["--ckpt", str(saved.ckpt), "--lora_format", "kohya", *out], "--lora_format: only for --lora"),
        (["--ckpt", str(saved.ckpt), "--lora", str(lora), *out], "not allowed with"),
        (out, "--ckpt --lora"),
        (["--lora", str(lora), "--out", str(tmp_path / "out.ckpt")], "must end in .safetensors"),
    ):
        assert reason in refused(convert.main, argv, capsys)
