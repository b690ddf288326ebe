"""scripts/make_shards.py as it is called: what it writes and says, what it refuses."""

from pathlib import Path

from omegaconf import OmegaConf

from ldm.cli import run_command
from ldm.config.instantiate import instantiate_from_config
from ldm.config.merge import merge
from ldm.data.webdataset import ImageShards
from scripts import make_shards
from tests.data.layouts import save_image
from tests.scripts.refusals import help_without_heavy_imports, refused

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_shards.py"


def captioned(folder):
    for i in range(5):
        save_image(folder / f"{i}.png", i, 8, 8)
        (folder / f"{i}.txt").write_text(f"caption {i}")
    return folder


def test_a_folder_becomes_shards_and_the_last_line_says_how_to_train_on_them(tmp_path, capsys):
    (captioned(tmp_path / "images") / "4.png").write_bytes(b"<html>")
    argv = ["--root", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--samples", "2", "--workers", "2"]
    assert run_command(make_shards.main, argv) == 0
    said = capsys.readouterr().out
    assert "3 shards (3 new) of 4 images" in said and "shorter sides 8 to 8 pixels" in said
    assert "skipped 1 (an HTML page, not an image (a failed download?))" in said
    config = tmp_path / "out" / "data.yaml"
    assert said.endswith(f"next: python main.py --base CONFIG.yaml {config} -t data.params.validation=null\n")
    data = ImageShards(str(tmp_path / "out"), 8)
    assert {data[i]["txt"] for i in range(4)} == {f"caption {i}" for i in range(4)}
    assert run_command(make_shards.main, argv) == 0 and "3 shards (0 new)" in capsys.readouterr().out


def test_shards_of_both_splits_train_in_place_of_a_folder_without_further_keys(tmp_path, monkeypatch, capsys):
    captioned(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation"):
        argv = [
            "--root",
            "images",
            "--out",
            f"sh/{split}",
            "--split",
            split,
            "--size",
            "8",
            "--missing_caption",
            "empty",
        ]
        assert run_command(make_shards.main, argv) == 0
    said = capsys.readouterr().out.splitlines()
    files = ["sh/train/data.yaml", "sh/validation/data.yaml"]
    assert f"next: python main.py --base CONFIG.yaml {files[0]} VALIDATION/data.yaml -t" in said
    assert said[-1] == f"next: python main.py --base CONFIG.yaml {' '.join(files)} -t"
    folder = {"target": "ldm.data.folder.ImageFolder", "params": {"root": "images", "split": "train"}}
    config = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "train": folder, "validation": folder}}
    OmegaConf.save(OmegaConf.create({"data": config}), "folder.yaml")
    data = instantiate_from_config(merge([Path(file) for file in ("folder.yaml", *files)]).data)
    data.setup()
    assert sorted(map(len, data.datasets.values())) == [1, 4] and data.datasets["train"].crop_size == (8, 8)
    edited = Path(files[0]).read_text().replace("size: 8", "size: 4")
    Path(files[0]).write_text(edited)
    run_command(make_shards.main, [*argv[:2], "--out", "sh/train", "--split", "train", *argv[6:]])
    assert Path(files[0]).read_text() == edited


def test_a_table_with_the_usual_name_is_found(tmp_path, capsys):
    (captioned(tmp_path) / "captions.csv").write_text("file_name,text\n0.png,from the table\n")
    run_command(make_shards.main, ["--root", str(tmp_path), "--out", str(tmp_path / "out")])
    assert ImageShards(str(tmp_path / "out"), 8)[0]["txt"] == "from the table"


def test_refusals(tmp_path, capsys):
    root, out = str(captioned(tmp_path / "images")), str(tmp_path / "out")
    (tmp_path / "file").touch()
    for argv, reason in (
        (["--root", f"{root}x", "--out", out], "no such folder; set --root to a folder of images"),
        (["--root", root, "--out", str(tmp_path / "file")], "is a file"),
        (["--root", root, "--out", out, "--samples", "0"], "--samples 0: expected 1 to 1,000,000"),
        (["--root", root, "--out", out, "--captions", "x.csv"], "set --captions to a captions table"),
    ):
        assert reason in refused(make_shards.main, argv, capsys)
    Path(root, "0.txt").unlink()
    said = refused(make_shards.main, ["--root", root, "--out", out], capsys)
    assert "0.png has no caption" in said and "set --missing_caption to skip or empty" in said


def test_help_imports_nothing_heavy(tmp_path):
    assert "--captions" in help_without_heavy_imports(SCRIPT, tmp_path)
