"""scripts/convert.py as it is called: both directions, its report, its refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.checkpoint.formats import read_tensors
from ldm.checkpoint.names import use_ema_weights
from ldm.cli import run_command
from ldm.inference.runs import find_run
from ldm.output.images import read_metadata
from scripts.convert import main
from scripts.txt2img import main as txt2img
from tests.checkpoint.models import save_split
from tests.convert.models import save
from tests.scripts.refusals import help_without_heavy_imports, refused
from tests.tiny import model_flags

KL = "models/first_stage_models/kl-f8/config.yaml"
SCRIPT = Path(__file__).parents[2] / "scripts" / "convert.py"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("convert"), "sd1")


@pytest.fixture(scope="module")
def folder(saved):
    target = saved.ckpt.parent / "folder"
    assert run_command(main, ["--ckpt", str(saved.ckpt), "--config", str(saved.config), "--out", str(target)]) == 0
    return target


def test_there_and_back_again(saved, folder, tmp_path, capsys):
    """Back without --config: the folder holds its own."""
    back = tmp_path / "back.ckpt"
    assert run_command(main, ["--ckpt", str(folder), "--out", str(back)]) == 0
    out = capsys.readouterr().out
    assert str(back) in out and "tensors in" in out and "largest block difference" in out
    one, other = saved.model.state_dict(), torch.load(back, weights_only=True)["state_dict"]
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def sharded(saved, tmp_path_factory):
    """The directory of a run on two ranks, with the weights of `saved`."""
    run = tmp_path_factory.mktemp("sharded")
    shutil.copy(saved.config, run / "config.yaml")
    weights = torch.load(saved.ckpt, weights_only=True)["state_dict"]
    save_split(run / "checkpoints" / "last.ckpt", 2, {"state_dict": weights, "global_step": 3})
    return run


@pytest.mark.parametrize("name", ["one.ckpt", "one.safetensors"])
def test_a_sharded_run_becomes_one_file_under_the_published_keys(saved, sharded, tmp_path, name):
    assert run_command(main, ["--ckpt", str(sharded), "--out", str(tmp_path / name)]) == 0
    weights, read = saved.model.state_dict(), read_tensors(tmp_path / name)
    assert weights.keys() == read.keys() and all(torch.equal(weights[key], read[key]) for key in weights)
    assert run_command(main, ["--ckpt", str(sharded), "--out", str(tmp_path / f"ema-{name}"), "--use_ema"]) == 0
    averages, _ = use_ema_weights(weights)
    read = read_tensors(tmp_path / f"ema-{name}")
    assert averages.keys() == read.keys() and all(torch.equal(averages[key], read[key]) for key in averages)


def test_a_sharded_run_is_sampled_from_and_converted_as_it_is(saved, sharded, folder, tmp_path):
    flags = ["--prompt", "a cat", "--H", "16", "--W", "16", "--ddim_steps", "2", "--n_samples", "1", "--n_iter", "1"]
    end = [*flags, "--skip_grid", "--safety", "off", "--device", "cpu", "--precision", "full"]
    for name, ckpt in (("run", ["--ckpt", str(sharded)]), ("file", model_flags(saved)[:4])):
        assert run_command(txt2img, [*ckpt, *end, "--outdir", str(tmp_path / name)]) == 0
    one, other = (np.asarray(Image.open(tmp_path / name / "samples" / "00000.png")) for name in ("run", "file"))
    assert np.array_equal(one, other)
    target = tmp_path / "folder"
    assert run_command(main, ["--ckpt", str(sharded), "--out", str(target)]) == 0
    for file in folder.rglob("*.safetensors"):
        assert file.read_bytes() == (target / file.relative_to(folder)).read_bytes()


def test_txt2img_generates_the_same_image_from_the_folder(saved, folder, tmp_path):
    flags = ["--prompt", "a cat", "--H", "16", "--W", "16", "--ddim_steps", "2", "--n_samples", "1", "--n_iter", "1"]
    for name, ckpt in (("file", saved.ckpt), ("folder", folder)):
        argv = [*model_flags(saved._replace(ckpt=ckpt), tmp_path / name), *flags, "--skip_grid", "--safety", "off"]
        assert run_command(txt2img, argv) == 0
    one, other = (np.asarray(Image.open(tmp_path / name / "samples" / "00000.png")) for name in ("file", "folder"))
    assert np.array_equal(one, other)
    assert read_metadata(tmp_path / "folder" / "samples" / "00000.png")["ckpt"] == str(folder)


def test_a_converted_folder_is_a_run_to_sample_from(folder):
    assert find_run(folder).ckpt == folder and find_run(folder).configs == [folder / "config.yaml"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "required: --out"),
        (["--ckpt", "nowhere.ckpt", "--out", "x"], "nowhere.ckpt: no such file"),
        (["--ckpt", "FILE", "--out", "FOLDER"], "already exists"),
        (["--ckpt", "FILE", "--out", "new", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["--ckpt", "FILE", "--out", "new", "--scheduler", "euler"], "invalid choice: 'euler'"),
        (["--ckpt", "FILE", "--out", "new", "--config", "nowhere.yaml"], "no such file"),
        (
            ["--ckpt", "FILE", "--out", "new", "--config", "models/ldm/lsun_churches256/config.yaml"],
            "resblock_updown True",
        ),
        (["--ckpt", "FOLDER", "--out", "new.bin"], "must end in .ckpt or .safetensors"),
        (
            ["--ckpt", "FOLDER", "--out", "new.ckpt", "--no-use_ema"],
            "--use_ema: only for converting a file to a folder",
        ),
        (
            ["--ckpt", "FOLDER", "--out", "new.ckpt", "--scheduler", "ddim"],
            "--scheduler: only for converting a file to a folder",
        ),
        (
            ["--ckpt", "FILE", "--out", "new", "--scheduler", "pndm", "--config", KL],
            "--scheduler pndm: this model is converted without a scheduler",
        ),
        (
            ["--ckpt", "FOLDER", "--out", "new.ckpt", "--config", "configs/stable-diffusion/v1-inference.yaml"],
            "in the YAML",
        ),
        (["--ckpt", "FILE", "--out", "new", "--dytpe", "fp16"], "did you mean --dtype?"),
    ],
)
def test_impossible_conversions_are_refused_in_one_line_and_nothing_is_written(
    saved, folder, tmp_path, monkeypatch, capsys, flags, says
):
    monkeypatch.chdir(tmp_path)
    stands_for = {"FILE": str(saved.ckpt), "FOLDER": str(folder)}
    assert says in refused(main, [stands_for.get(flag, flag) for flag in flags], capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    says = refused(main, ["--ckpt", str(tmp_path / "photos"), "--out", str(tmp_path / "a.ckpt")], capsys)
    assert "not a model in diffusers' layout" in says


def test_a_folder_from_elsewhere_lacks_what_nothing_uses(tmp_path):
    """diffusers' folders of Stable Diffusion v2 omit the text tower's last layer; so does the file made of one."""
    from ldm.inference import load_model

    saved = save(tmp_path, "sd2")
    assert (
        run_command(main, ["--ckpt", str(saved.ckpt), "--config", str(saved.config), "--out", str(tmp_path / "folder")])
        == 0
    )
    hub = shutil.copytree(tmp_path / "folder", tmp_path / "hub")
    for name in ("published_extras.safetensors", "config.yaml"):
        (hub / name).unlink()
    whole, lacking = (load_model(saved.config, ckpt, "cpu", "full") for ckpt in (saved.ckpt, hub))
    one, other = (pipeline.encode_prompts(["a cat"])[0] for pipeline in (whole, lacking))
    assert torch.equal(one, other) and other.isfinite().all()
    assert (
        run_command(main, ["--ckpt", str(hub), "--config", str(saved.config), "--out", str(tmp_path / "b.ckpt")]) == 0
    )
    names = torch.load(tmp_path / "b.ckpt", weights_only=True)["state_dict"].keys()
    assert not any("resblocks.2." in name for name in names) and any("resblocks.1." in name for name in names)
    assert json.loads((hub / "text_encoder" / "config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.parametrize("name", ["cat.pt", "cat.safetensors", "cat.bin"])
def test_an_embedding_is_converted_to_a1111_and_back(tmp_path, capsys, name):
    """A name that the file lacks is that of the file; the vectors keep every bit."""
    vectors, there, back = torch.randn(3, 16), tmp_path / name, tmp_path / "back.safetensors"
    torch.save({"<kitten>": vectors}, tmp_path / "ours.bin")
    argv = ["--embedding", str(tmp_path / "ours.bin"), "--embedding_format", "a1111", "--out", str(there)]
    assert run_command(main, argv) == 0 and "<kitten>: 3 vectors" in capsys.readouterr().out
    content = load_file(there) if name.endswith(".safetensors") else torch.load(there, weights_only=True)
    assert torch.equal(content.get("string_to_param", {}).get("*", content.get("emb_params")), vectors)
    assert run_command(main, ["--embedding", str(there), "--out", str(back)]) == 0
    assert {token: tensor.tolist() for token, tensor in load_file(back).items()} == {"<kitten>": vectors.tolist()}

    save_file({"emb_params": vectors}, tmp_path / "dog.safetensors")
    argv = ["--embedding", str(tmp_path / "dog.safetensors"), "--out", str(tmp_path / "dog.bin")]
    assert run_command(main, argv) == 0 and [*torch.load(tmp_path / "dog.bin", weights_only=True)] == ["dog"]


def test_embeddings_that_do_not_convert_are_refused_in_one_line(tmp_path, capsys):
    torch.save({"<a>": torch.ones(4), "<b>": torch.ones(4)}, tmp_path / "two.bin")
    torch.save({"<a>": torch.ones(4)}, tmp_path / "one.bin")
    one, out = ["--embedding", str(tmp_path / "one.bin")], ["--out", str(tmp_path / "out.pt")]
    for argv, reason in (
        (["--embedding", str(tmp_path / "two.bin"), *out], "holds 2 tokens (<a>, <b>)"),
        ([*one, "--out", str(tmp_path / "out")], "must end in .safetensors or .pt or .bin"),
        ([*one, *out, "--config", KL], "--config: only for --ckpt and --lora"),
        ([*one, *out, "--dtype", "fp16"], "--dtype: only for --ckpt"),
        ([*one, *out, "--lora_format", "kohya"], "--lora_format: only for --lora"),
        ([*one, *out, "--lora", "a.safetensors"], "not allowed with"),
        (["--lora", str(tmp_path / "one.bin"), *out, "--embedding_format", "a1111"], "only for --embedding"),
    ):
        assert reason in refused(main, argv, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.bin", "two.bin"]


def test_help_is_quick_and_works_from_any_folder(tmp_path):
    shown = help_without_heavy_imports(SCRIPT, tmp_path)
    assert all(flag in shown for flag in ("--ckpt", "--out", "--config", "--dtype", "--scheduler", "--use_ema"))
