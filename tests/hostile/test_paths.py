"""Prompts, run names, metadata and archives cannot write outside of the output folder."""

import io
import os
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import nn

from ldm.callbacks import ImageLogger
from ldm.cli import run_command
from ldm.config.instantiate import ConfigError
from ldm.config.text_shapes import clip_shape
from ldm.data import archives
from ldm.data.archives import ArchiveError, unpack
from ldm.inference.from_metadata import FLAGS
from ldm.output.images import METADATA_KEY, GeneratedImage, NamedOutput, Output, png_info, read_metadata
from ldm.training.flags import RunOptions
from ldm.training.run_directory import new_run
from scripts.txt2img import main as txt2img
from tests.tiny import model_flags, save_text_model

WORDS = (
    *(
        "../up",
        "../../../up",
        "/etc/cron.d/up",
        "~/up",
        "..",
        ".",
        "/",
        "\\up",
        "..\\up",
        "C:\\up",
        "C:up",
        "a/../../up",
    ),
    *(
        "nul\0nul",
        "line\nline",
        "\x1b[2J",
        "tab\tup",
        "a" * 300,
        "🎨" * 90,
        "é" * 120,
        "..." * 50,
        "-rf",
        "$(touch up)",
        "`touch up`",
        "; touch up",
    ),
    *("%s%n", "{0.__class__}", "{}", "con", "a:b", "a|b", '"', "*", "\u202egnp.exe", "\udcff", "", " "),
)


def tree(folder):
    return {path for path in folder.rglob("*") if not path.is_relative_to(folder / "home")}


# --- run names


@pytest.mark.parametrize("word", WORDS, ids=ascii)
def test_a_run_folder_is_in_the_log_folder_or_its_name_is_refused(word, tmp_path):
    home = tmp_path / "home"
    for flags in (
        {"name": word},
        {"postfix": word},
        {"project": word},
        {"name": word, "postfix": word, "project": word},
    ):
        try:
            folder = new_run(RunOptions(base=("x.yaml",), logdir=str(home), **flags), now="2026-01-01T00-00-00").path
        except ConfigError as error:
            assert "\n" not in str(error) and "\0" not in str(error)
            continue
        (folder / "checkpoints").mkdir(parents=True)
        assert folder.resolve().parent in (home.resolve(), home.resolve() / word) and folder.resolve() != home.resolve()
    assert not tree(tmp_path) - {home}


# --- prompts, file names


def test_prompts_are_never_names_of_files(tmp_path, monkeypatch):
    saved, home = save_text_model(tmp_path), tmp_path / "home"
    monkeypatch.chdir(tmp_path)
    words = [word for word in WORDS if word.isprintable() and word]
    (tmp_path / "prompts.txt").write_text("\n".join([*words, "nul\0nul", "tab\tup"]), encoding="utf-8")
    before = tree(tmp_path)
    model = [*model_flags(saved), "--H", "8", "--W", "8"]
    asked = [
        "--from-file",
        "prompts.txt",
        "--negative_prompt",
        "../up",
        "--ddim_steps",
        "1",
        "--n_iter",
        "1",
        "--captions",
        "--n_samples",
        "9",
    ]
    assert run_command(txt2img, [*model, *asked, "--outdir", str(home)]) == 0
    assert tree(tmp_path) == before
    names = sorted(path.name for path in (home / "samples").iterdir())
    assert names == [f"{k:05}.png" for k in range(len(words) + 2)] and sorted(os.listdir(home)) == [
        "grid-0000.png",
        "samples",
    ]


def generated():
    return GeneratedImage(Image.new("RGB", (8, 8)), {"prompt": "../up"})


def test_links_in_the_output_folder_are_never_written_through(tmp_path):
    home, victim = tmp_path / "home", tmp_path / "victim"
    (home / "samples").mkdir(parents=True)
    victim.write_text("precious")
    (home / "samples" / "00000.png").symlink_to(victim)
    (home / "samples" / "00001.png").symlink_to(tmp_path / "nowhere")
    (home / "grid-0000.png").symlink_to(victim)
    output, named = Output(home), NamedOutput(home)
    (home / "x.png").symlink_to(tmp_path / "nowhere")
    assert output.save_sample(generated()).name == "00002.png" and output.save_grid(generated()).name == "grid-0001.png"
    assert named.save(generated(), "x").name == "x-1.png"
    assert victim.read_text() == "precious" and not (tmp_path / "nowhere").exists()


def test_an_output_folder_may_be_a_link_that_the_user_made(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    assert Output(tmp_path / "home").save_sample(generated()) == tmp_path / "home/samples/00000.png"
    assert (tmp_path / "disk/samples/00000.png").is_file()


@pytest.mark.parametrize("stem", [word for word in WORDS if "\0" not in word], ids=ascii)
def test_results_with_the_name_of_an_image_stay_in_their_folder(stem, tmp_path):
    home = tmp_path / "home"
    output = NamedOutput(home)
    try:
        assert output.save(generated(), stem).resolve().parent == home.resolve()
    except (ValueError, OSError):
        assert not os.listdir(home)
    assert not tree(tmp_path) - {home}


@pytest.mark.parametrize("name", WORDS, ids=ascii)
def test_logged_images_stay_in_the_runs_folder_whatever_they_are_called(name, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    model = nn.Identity()
    model.log_images = lambda batch, split: {name: torch.zeros(1, 3, 8, 8)}
    trainer = SimpleNamespace(default_root_dir=str(home), is_global_zero=True, current_epoch=0, loggers=[])
    ImageLogger(batch_frequency=1, max_images=1)._log(trainer, model, None, 0, "train", 1)
    assert not tree(tmp_path) - {home} and {path.parent for path in home.rglob("*.png")} <= {home / "images" / "train"}


# --- metadata


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "[1]", "null", '"x"', "7", "{" * 100_000, "\\ud800", "9" * 10_000]
)
def test_metadata_that_is_none_is_one_clear_line(text, tmp_path):
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text(METADATA_KEY, text)
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png", pnginfo=chunk)
    with pytest.raises(ValueError, match=r"x\.png: the metadata are corrupt"):
        read_metadata(tmp_path / "x.png")


def test_a_bomb_of_metadata_is_refused(tmp_path):
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text(METADATA_KEY, '{"a": "' + "x" * (3 << 20) + '"}', zip=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png", pnginfo=chunk)
    with pytest.raises(ValueError, match=r"x\.png: cannot read the metadata of this image"):
        read_metadata(tmp_path / "x.png")


VALUES = ([], {"a": 1}, "x", True, -1, 10**30, "../up", "\0")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_text_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    "name",
    [*FLAGS, "n_prompts", "batch_size", "image_index", "prompt", "prompts", "task", "outdir", "allow_targets", "debug"],
)
def test_metadata_to_regenerate_from_is_used_or_refused_in_one_line_whatever_its_values(
    name, saved, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "ldm.inference.load_model", lambda *args, **kwargs: (_ for _ in ()).throw(ValueError("accepted"))
    )
    good = {
        "task": "txt2img",
        "prompt": "a cat",
        "steps": 1,
        "height": 8,
        "width": 8,
        "config": str(saved.config),
        "ckpt": str(saved.ckpt),
    }
    for value in VALUES:
        GeneratedImage(Image.new("RGB", (2, 2)), {}).image.save("x.png", pnginfo=png_info({**good, name: value}))
        assert (
            run_command(txt2img, ["--from-metadata", "x.png", "--outdir", str(tmp_path / "home"), "--device", "cpu"])
            == 2
        )
        said = capsys.readouterr().err
        assert "Traceback" not in said and said.splitlines()[-1].startswith("error: "), (value, said)
        assert not tree(tmp_path) - {tmp_path / "home", tmp_path / "x.png"}


# --- archives


def member(name, content=b"x", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


LINKS = [
    {"type": kind, "linkname": target, "size": 0}
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)
    for target in ("/etc", "..", "good")
]
SPECIAL = [{"type": kind, "size": 0} for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)]
TARS = [
    *(
        [member(name)]
        for name in ("../up", "a/../../up", "/tmp/ldm-up", "a" * 300, "C:up", "..\\up", "..", "a/" * 3000 + "a")
    ),
    *([member("link", b"", **fields)] for fields in (*LINKS, *SPECIAL)),
    *([member("link", b"", **fields), member("link/up")] for fields in LINKS),
    *([member("a"), member("a/up")], [member("a"), member("a")]),
]


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("number", range(len(TARS)))
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_hostile_tar_leaves_nothing_inside_or_outside(number, nested, tmp_path):
    path = write_tar(tmp_path / "x.tar", [member("good"), *TARS[number]])
    if nested:
        inner = path.read_bytes()
        path = write_tar(tmp_path / "x.tar", [member("good"), member("inner.tar", inner)])
    with pytest.raises(ArchiveError, match=r"\.tar: "):
        unpack(path, tmp_path / "home", nested=nested)
    assert os.listdir(tmp_path) == ["x.tar"] and not Path("/tmp/ldm-up").exists()


@pytest.mark.parametrize("name", ["../up", "/tmp/ldm-up", "a/../../up", "..\\up", "C:up", "..", "a" * 300, "good/up"])
def test_a_hostile_zip_leaves_nothing_inside_or_outside(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("good", "x")
        archive.writestr(name, "x")
    with pytest.raises(ArchiveError):
        unpack(tmp_path / "x.zip", tmp_path / "home")
    assert os.listdir(tmp_path) == ["x.zip"] and not Path("/tmp/ldm-up").exists()


def zeros(path, size):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("zeros", bytes(size))
    else:
        write_tar(path, [member("zeros", bytes(size))], "w:gz")


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_a_bomb_is_refused_before_it_is_unpacked(name, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "BOMB_BYTES", 1 << 20)
    zeros(tmp_path / name, 4 << 20)
    with pytest.raises(ArchiveError, match=r"its .* bytes unpack to"):
        unpack(tmp_path / name, tmp_path / "home")
    assert os.listdir(tmp_path) == [name]


def test_a_bomb_of_empty_files_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "BOMB_BYTES", 1 << 18)
    monkeypatch.setattr(archives, "BOMB_RATIO", 20)
    path = write_tar(tmp_path / "x.tar.gz", [member(f"{k}", b"") for k in range(1000)], "w:gz")
    with pytest.raises(ArchiveError, match="unpack to"):
        unpack(path, tmp_path / "home")


def test_a_size_that_lies_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", [member("a", b"x" * 100)])
    body = bytearray(path.read_bytes())
    for size in ((-5).to_bytes(12, "big", signed=True), b"77777777777\0"):
        body[124:136] = size
        body[148:156] = b"%06o\0 " % (sum(body[:148]) + 8 * 32 + sum(body[156:512]))
        path.write_bytes(body)
        with pytest.raises(ArchiveError):
            unpack(path, tmp_path / "home")
        assert os.listdir(tmp_path) == ["x.tar"]


# --- JSON


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[1]", "7", '"x"', "\\xff", '{"text_config": 3}'])
def test_a_json_file_that_is_none_is_one_clear_line(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: ") as caught:
        clip_shape(str(tmp_path))
    assert "\n" not in str(caught.value)
