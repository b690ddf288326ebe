"""DreamBooth's datasets: the subject in turn with its class, and the weights of the loss."""

import re

import pytest
from torch.utils.data import default_collate

from ldm.data.base import DataConfigError
from ldm.data.dreambooth import ClassImages, DreamBooth
from tests.data.test_folder import save_image

FOLDER = "ldm.data.folder.ImageFolder"


@pytest.fixture
def folders(tmp_path):
    for i in range(2):
        save_image(tmp_path / f"subject/{i}.png", i)
    for i in range(5):
        save_image(tmp_path / f"class/{i}.png", 10 + i)
    return tmp_path


def subject(folders, **params):
    params = {"root": str(folders / "subject"), "size": 8, "subject": "a sks cat", **params}
    return {"target": FOLDER, "params": params}


def prior(folders, **params):
    params = {"root": str(folders / "class"), "size": 8, "prompt": "a cat", "count": 5, **params}
    return {"target": "ldm.data.dreambooth.ClassImages", "params": params}


def test_the_subject_and_its_class_take_turns_and_the_smaller_one_repeats(folders):
    dataset = DreamBooth(subject(folders), prior(folders), prior_weight=0.5)
    assert len(dataset) == 10
    batch = default_collate([dataset[i] for i in range(10)])
    assert batch["caption"] == ["a sks cat", "a cat"] * 5
    assert batch["loss_weight"].tolist() == [1.0, 0.5] * 5
    assert [path[-7:] for path in batch["file_path_"][::2]] == [f"t/{i}.png" for i in (0, 1, 0, 1, 0)]
    assert [path[-7:] for path in batch["file_path_"][1::2]] == [f"s/{i}.png" for i in range(5)]


def test_without_a_prior_the_subject_is_alone(folders):
    dataset = DreamBooth(subject(folders))
    assert len(dataset) == 2 and dataset[1]["loss_weight"] == 1.0


def test_items_hold_the_keys_of_both(folders):
    captioned = subject(folders, caption_key="words")
    assert set(DreamBooth(captioned, prior(folders))[0]) == {"image", "caption", "txt", "file_path_", "loss_weight"}
    with pytest.raises(DataConfigError, match=r"prior .*: its images have the keys image, those of instance jpg"):
        DreamBooth(subject(folders, image_key="jpg"), prior(folders))


def test_too_few_class_images_are_an_error_with_both_numbers(folders):
    with pytest.raises(DataConfigError, match=r"prior\.params\.count 6: .*class holds 5 usable images"):
        DreamBooth(subject(folders), prior(folders, count=6))


def test_errors_name_the_dataset_that_they_are_about(folders):
    advice = re.escape("set instance.params.root to a folder of images")
    with pytest.raises(DataConfigError, match=advice):
        DreamBooth(subject(folders, root=str(folders / "none")))


def test_the_fingerprint_covers_both(folders):
    first = DreamBooth(subject(folders), prior(folders)).fingerprint
    save_image(folders / "class/9.png", 3)
    changed = DreamBooth(subject(folders), prior(folders)).fingerprint
    assert {key for key in first if first[key] != changed[key]} == {"prior files", "prior labels", "prior content"}


def test_class_images_have_the_prompt_as_caption(folders):
    dataset = ClassImages(str(folders / "class"), "a cat", 3, size=8)
    assert len(dataset) == 5 and dataset[4]["caption"] == "a cat"
