"""scripts/download_*.sh with a local mirror: resumed, verified, unpacked next to existing files."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from ldm.paths import ROOT

PAYLOAD = bytes(range(256)) * 400


@pytest.fixture
def mirror(tmp_path) -> Path:
    (tmp_path / "mirror").mkdir()
    for name, member in (("kl-f4", "model.ckpt"), ("inpainting_big", "inpainting_big/last.ckpt")):
        with zipfile.ZipFile(tmp_path / "mirror" / f"{name}.zip", "w") as archive:
            archive.writestr(member, PAYLOAD)
            archive.writestr("config.yaml", "theirs")
    folder = tmp_path / "models" / "first_stage_models" / "kl-f4"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("ours")
    return tmp_path / "mirror"


def download(mirror: Path, *names: str, script: str = "download_first_stages.sh") -> subprocess.CompletedProcess:
    env = {
        "PATH": "/usr/bin:/bin:/usr/local/bin",
        "LDM_DOWNLOADS": mirror.as_uri(),
        "LDM_MODELS": str(mirror.parent / "models"),
    }
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *names], env=env, capture_output=True, text=True, cwd=mirror
    )


def here(mirror: Path, folder: str = "first_stage_models/kl-f4") -> set[str]:
    return {path.name for path in (mirror.parent / "models" / folder).iterdir()}


def test_weights_come_beside_the_config_that_is_there_and_the_sum_is_printed(mirror):
    done = download(mirror, "kl-f4")
    folder = mirror.parent / "models" / "first_stage_models" / "kl-f4"
    assert done.returncode == 0, done.stderr
    assert (folder / "model.ckpt").read_bytes() == PAYLOAD and (folder / "config.yaml").read_text() == "ours"
    assert here(mirror) == {"model.ckpt", "config.yaml"}
    sum_ = hashlib.sha256((mirror / "kl-f4.zip").read_bytes()).hexdigest()
    assert f"{sum_}  kl-f4.zip\nnot compared" in done.stdout  # no list of sums is shipped
    assert "already" in download(mirror, "kl-f4").stdout


def test_a_folder_inside_the_archive_does_not_matter(mirror):
    assert download(mirror, "inpainting_big", script="download_models.sh").returncode == 0
    assert here(mirror, "ldm/inpainting_big") == {"last.ckpt", "config.yaml"}


def test_a_stopped_download_goes_on_where_it_was(mirror):
    whole, part = (
        (mirror / "kl-f4.zip").read_bytes(),
        mirror.parent / "models" / "first_stage_models" / "kl-f4" / "kl-f4.zip.part",
    )
    part.write_bytes(whole[:1000])
    assert download(mirror, "kl-f4").returncode == 0 and "model.ckpt" in here(mirror)
    (part.parent / "model.ckpt").unlink()
    part.write_bytes(b"x" * 1000)  # gone on with, this gives no archive
    done = download(mirror, "kl-f4")
    assert done.returncode == 2 and "damaged" in done.stderr and here(mirror) == {"config.yaml"}
    assert download(mirror, "kl-f4").returncode == 0


@pytest.mark.parametrize("right", [True, False])
def test_the_sum_is_compared_where_the_list_has_a_line(mirror, right):
    sum_ = hashlib.sha256((mirror / "kl-f4.zip").read_bytes()).hexdigest() if right else "0" * 64
    (mirror.parent / "models" / "SHA256SUMS").write_text(f"{'1' * 64}  vq-f4.zip\n{sum_}  kl-f4.zip\n")
    done = download(mirror, "kl-f4")
    assert done.returncode == (0 if right else 2) and ("model.ckpt" in here(mirror)) is right
    assert ("matches models/SHA256SUMS" in done.stdout) is right and ("0" * 64 in done.stderr) is not right


def test_the_printed_line_is_a_line_of_the_list_however_it_is_written(mirror):
    sums, weights = (
        mirror.parent / "models" / "SHA256SUMS",
        mirror.parent / "models" / "first_stage_models" / "kl-f4" / "model.ckpt",
    )
    printed = next(line for line in download(mirror, "kl-f4").stdout.splitlines() if line.endswith("  kl-f4.zip"))
    for content in (
        printed,
        printed.replace("  ", " *"),
        printed.upper().replace("KL-F4.ZIP", "kl-f4.zip"),
        printed + "\r\n",
    ):
        weights.unlink()
        sums.write_text(content)
        assert "matches models/SHA256SUMS" in download(mirror, "kl-f4").stdout and weights.is_file()
    weights.unlink()
    sums.write_text("")  # a list without the archive's line changes nothing
    assert "not compared" in download(mirror, "kl-f4").stdout and weights.is_file()


def test_a_damaged_archive_is_not_unpacked(mirror):
    content = bytearray((mirror / "kl-f4.zip").read_bytes())
    content[500] ^= 1
    (mirror / "kl-f4.zip").write_bytes(content)
    done = download(mirror, "kl-f4")
    assert done.returncode == 2 and "damaged" in done.stderr and here(mirror) == {"config.yaml"}


def test_a_missing_archive_is_one_clear_line(mirror):
    done = download(mirror, "kl-f8")
    assert done.returncode == 2 and "kl-f8.zip: download incomplete" in done.stderr
    wrong = download(mirror, "kl-f5")
    assert wrong.returncode == 2 and "kl-f5: choose from kl-f4" in wrong.stderr


def test_members_that_point_outside_stay_inside(mirror):
    with zipfile.ZipFile(mirror / "kl-f8.zip", "w") as archive:
        archive.writestr("../../../escaped.ckpt", PAYLOAD)
        archive.writestr("/absolute.ckpt", PAYLOAD)
    download(mirror, "kl-f8")
    assert (
        not [p for p in mirror.parent.rglob("*.ckpt") if p.parent.name != "kl-f8"]
        and not Path("/absolute.ckpt").exists()
    )


def test_the_folders_are_those_of_the_published_configs(mirror):
    listed = download(mirror, "--list").stdout + download(mirror, "--list", script="download_models.sh").stdout
    folders = {line.split(" -> ")[1].strip("/") for line in listed.splitlines()}
    assert len(folders) == 20 and all((ROOT / folder / "config.yaml").is_file() for folder in folders)
