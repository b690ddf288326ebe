"""CelebA-HQ and FFHQ in their published layouts."""

import numpy as np
import pytest

from ldm.data.base import DataConfigError
from ldm.data.faceshq import CelebAHQTrain
from ldm.data.image import BadImageError
from ldm.util import instantiate_from_config
from tests.data.layouts import pixels, save_image


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/celebahq").mkdir(parents=True)
    for k in range(3):
        np.save(tmp_path / f"data/celebahq/imgHQ0000{k}.npy", pixels(k, 32, 32).transpose(2, 0, 1)[None])
        save_image(tmp_path / f"data/ffhq/00000/0000{k}.png", k, 32, 32)
    for name, line in (("celebahq", "imgHQ0000{}.npy\n"), ("ffhq", "00000/0000{}.png\n")):
        (tmp_path / f"data/{name}train.txt").write_text(line.format(0) + line.format(2))
        (tmp_path / f"data/{name}validation.txt").write_text(line.format(1))
    return tmp_path


@pytest.mark.parametrize("package", ["taming", "ldm"])
@pytest.mark.parametrize("family", ["CelebAHQ", "FFHQ"])
def test_the_published_yamls_find_images_and_split(home, family, package):
    targets = [f"{package}.data.faceshq.{family}{split}" for split in ("Train", "Validation")]
    sets = [instantiate_from_config({"target": target, "params": {"size": 32}}) for target in targets]
    assert [len(dataset) for dataset in sets] == [2, 1]
    np.testing.assert_allclose(sets[0][1]["image"], pixels(2, 32, 32) / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(sets[1][0]["image"], pixels(1, 32, 32) / 127.5 - 1, atol=1e-6)


def test_arrays_that_are_no_images_or_need_pickle_are_refused(home):
    (home / "data/list.txt").write_text("bad.npy\n")
    (home / "data/celebahq/bad.npy").touch()
    dataset = CelebAHQTrain(size=16, files="data/list.txt")
    for array, problem in (
        (np.zeros((1, 3, 8, 8), np.float32), r"float32 of shape \(8, 8, 3\)"),
        (np.zeros((4, 8, 8), np.uint8), "expected uint8"),
        (np.array([{"a": 1}], dtype=object), "cannot be read"),
    ):
        np.save(home / "data/celebahq/bad.npy", array)
        with pytest.raises(BadImageError, match=problem):
            dataset[0]
    with pytest.raises(BadImageError, match="cannot be read"):
        (home / "data/celebahq/bad.npy").write_bytes(b"x")
        dataset[0]


def test_without_the_lists_the_folder_is_divided_on_request(home):
    for path in (home / "data").glob("*.txt"):
        path.unlink()
    with pytest.raises(DataConfigError, match=r"files 'data/celebahqtrain.txt': no such file"):
        CelebAHQTrain()
    assert len(CelebAHQTrain(size=16, split="train", validation_fraction=0.34)) == 2
