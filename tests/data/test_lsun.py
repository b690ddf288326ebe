"""LSUN in its published layout, and its lists on request."""

import random
import zipfile

import numpy as np
import pytest

from ldm.data import lsun
from ldm.data.archives import ArchiveError
from ldm.data.base import DataConfigError
from ldm.util import instantiate_from_config
from tests.data.layouts import save_image

FAMILIES = {"Churches": ("churches", "church_outdoor"), "Bedrooms": ("bedrooms", "bedrooms"), "Cats": ("cats", "cat")}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, prefix in FAMILIES.values():
        names = [f"a/{k}.webp" if k else "0.jpg" for k in range(4)]
        for k, name in enumerate(names):
            save_image(tmp_path / "data/lsun" / folder / name, k)
        (tmp_path / f"data/lsun/{prefix}_train.txt").write_text("\n".join(names[:3]) + "\n")
        (tmp_path / f"data/lsun/{prefix}_val.txt").write_text(names[3] + "\n")
    return tmp_path


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_yaml_finds_images_and_split(home, family):
    sets = [
        instantiate_from_config({"target": f"ldm.data.lsun.LSUN{family}{s}", "params": {"size": 16}})
        for s in ("Train", "Validation")
    ]
    assert [len(dataset) for dataset in sets] == [3, 1]
    assert sets[0][2]["image"].shape == (16, 16, 3) and sets[1][0]["file_path_"].endswith("a/3.webp")


def test_only_training_images_are_flipped(home):
    train, validation = lsun.LSUNCatsTrain(size=16), lsun.LSUNCatsValidation(size=16)
    random.seed(0)
    drawn = [train[0]["image"] for _ in range(20)]
    plain = lsun.LSUNCatsTrain(size=16, flip_p=0.0)[0]["image"]
    mirrored = sum((x == plain[:, ::-1]).all() for x in drawn)
    assert 4 <= mirrored <= 16 and mirrored + sum((x == plain).all() for x in drawn) == 20
    assert all((validation[0]["image"] == validation[0]["image"]).all() for _ in range(10))


def test_without_a_list_the_folder_is_divided_on_request(home):
    for path in (home / "data/lsun").glob("*.txt"):
        path.unlink()
    with pytest.raises(
        DataConfigError, match=r"files 'data/lsun/church_outdoor_train.txt': no such file; set files to a text file"
    ):
        lsun.LSUNChurchesTrain()
    train = lsun.LSUNChurchesTrain(split="train", validation_fraction=0.25)
    validation = lsun.LSUNChurchesValidation(split="validation", validation_fraction=0.25)
    names = [{item.name for item in dataset.items} for dataset in (train, validation)]
    assert len(names[0]) == 3 and len(names[1]) == 1 and not names[0] & names[1]


def test_lists_are_fetched_on_request_only(home, monkeypatch):
    wanted = home / "data/lsun/church_outdoor_train.txt"
    content = wanted.read_text()
    wanted.unlink()

    def fetch(remote, folder):
        with zipfile.ZipFile(folder / remote.name, "w") as archive:
            archive.writestr("lsun/church_outdoor_train.txt", content)
        return folder / remote.name

    monkeypatch.setattr(lsun, "fetch", fetch)
    lsun.LSUNChurchesTrain.prepare_data(size=16)
    assert not wanted.exists() and not (home / "data/lsun/lsun.zip").exists()
    lsun.LSUNChurchesTrain.prepare_data(size=16, download=True)
    assert wanted.read_text() == content and len(lsun.LSUNChurchesTrain(size=16, download=True)) == 3
    with pytest.raises(ArchiveError, match=r"has no bedrooms_train.txt"):
        (home / "data/lsun/bedrooms_train.txt").unlink()
        lsun.LSUNBedroomsTrain.prepare_data(download=True)


def test_images_of_the_middle_are_square(home):
    x = lsun.LSUNCatsValidation(size=24, files="data/lsun/cat_train.txt")[0]["image"]
    assert x.shape == (24, 24, 3) and np.isfinite(x).all()
