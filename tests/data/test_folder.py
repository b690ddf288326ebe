"""A folder of images: captions, classes, splits, and files that cannot be used."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from ldm.data.base import DataConfigError
from ldm.data.folder import ImageFolder
from ldm.data.image import BadImageError
from ldm.data.order import SeededDataset
from ldm.data.previews.pytorch_dataset import PreviewsTrain, PreviewsValidation
from tests.data.test_image import write_bad


def save_image(path, seed=0, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


@pytest.fixture
def captioned(tmp_path):
    for i, name in enumerate(["b.png", "a.jpg", "sub/c.webp", "d.tif"]):
        save_image(tmp_path / name, i)
        (tmp_path / name).with_suffix(".txt").write_text(f"image {name}\n")
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    return tmp_path


def names(dataset):
    return [item.name for item in dataset.items]


def test_a_batch_has_the_published_keys_shapes_and_ranges(captioned):
    dataset = ImageFolder(str(captioned), size=8, captions="sidecar")
    assert names(dataset) == ["a.jpg", "b.png", "d.tif", "sub/c.webp"]
    batch = default_collate([dataset[i] for i in range(4)])
    assert batch["image"].shape == (4, 8, 8, 3) and batch["image"].dtype == torch.float32
    assert -1 <= batch["image"].min() < -0.5 and 0.5 < batch["image"].max() <= 1
    assert batch["caption"] == batch["txt"] == [f"image {name}" for name in names(dataset)]
    assert batch["file_path_"][3] == str(captioned / "sub/c.webp")
    assert "class_label" not in batch


def test_stable_diffusions_keys_can_be_asked_for(captioned):
    sample = ImageFolder(str(captioned), size=8, captions="sidecar", image_key="jpg", caption_key="beschrijving")[0]
    assert (
        sample["jpg"].shape == (8, 8, 3)
        and sample["beschrijving"] == sample["txt"] == "image a.jpg"
        and "image" not in sample
    )


def test_without_captions_there_are_none(captioned):
    assert sorted(ImageFolder(str(captioned), size=8)[0]) == ["file_path_", "image"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.csv", "file_name,text\nb.png,one\nsub/c.webp,two\nb.png,uno\n"),
        ("c.tsv", "\ufefffile_name\ttext\nb.png\tone\nsub/c.webp\ttwo\nb.png\tuno\n"),
        ("c.jsonl", '{"file_name": "b.png", "text": ["one", "uno"]}\n{"file_name": "sub/c.webp", "text": "two"}\n'),
    ],
)
@pytest.mark.parametrize("relative", [True, False])
def test_a_table_lists_images_and_captions(captioned, name, content, relative):
    (captioned / name).write_text(content)
    dataset = ImageFolder(str(captioned), size=8, captions=name if relative else str(captioned / name))
    assert dataset.items == [("b.png", ("one", "uno")), ("sub/c.webp", ("two",))]


def test_one_of_several_captions_is_chosen_for_each_sample(captioned):
    (captioned / "a.txt").write_text("one\n\n two \nthree")
    dataset = ImageFolder(str(captioned), size=8, captions="sidecar")
    assert {dataset[0]["caption"] for _ in range(60)} == {"one", "two", "three"}
    assert {dataset[1]["caption"] for _ in range(5)} == {"image b.png"}


def test_missing_captions_raise_skip_or_are_empty(captioned):
    (captioned / "a.txt").unlink()
    (captioned / "b.txt").write_text(" \n")
    options = {"root": str(captioned), "size": 8, "captions": "sidecar"}
    with pytest.raises(DataConfigError, match=r"missing_caption 'raise': a.jpg has no caption \(no text in .*a.txt\)"):
        ImageFolder(**options)
    (captioned / "captions.csv").touch()
    with pytest.raises(DataConfigError, match=r"a.txt; the table captions.csv is read with captions=captions.csv\)"):
        ImageFolder(**options)
    skipping = ImageFolder(**options, missing_caption="skip")
    assert names(skipping) == ["d.tif", "sub/c.webp"] and skipping.skipped == {
        "a.jpg": "no caption",
        "b.png": "no caption",
    }
    assert [item.captions for item in ImageFolder(**options, missing_caption="empty").items[:2]] == [("",), ("",)]


def test_captions_in_another_encoding_are_errors_unless_it_is_named(captioned):
    (captioned / "a.txt").write_bytes(b"caf\xe9")
    options = {"root": str(captioned), "size": 8, "captions": "sidecar"}
    with pytest.raises(
        DataConfigError,
        match=r"on_error 'raise': .*a.txt: not utf-8 \(byte 0xe9\).*; repair it, or set on_error to skip",
    ):
        ImageFolder(**options)
    skipping = ImageFolder(**options, on_error="skip")
    assert len(skipping) == 3 and list(skipping.skipped) == [str(captioned / "a.txt")]
    assert ImageFolder(**options, caption_encoding="latin-1")[0]["caption"] == "café"


def test_records_that_name_nothing_follow_the_error_policy(captioned):
    (captioned / "c.csv").write_text("file,text\nnope.png,x\nb.png,y\n")
    options = {"root": str(captioned), "size": 8, "captions": "c.csv"}
    with pytest.raises(DataConfigError, match=r"c.csv line 2: no such file: .*nope.png"):
        ImageFolder(**options)
    assert names(ImageFolder(**options, on_error="skip")) == ["b.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": None}, "root None: not set; set root to a folder of images"),
        ({"root": "/x/y"}, "root '/x/y': no such folder; set root to a folder of images"),
        ({"root": __file__}, "is a file, not a folder"),
        ({"captions": "all.csv"}, "captions 'all.csv': no such file, here or in "),
        ({"captions": "all.xml"}, "captions 'all.xml': unknown; set captions to sidecar, null, or a file of type .csv"),
        ({"on_error": "ignore"}, "on_error 'ignore': unknown; set on_error to one of raise, skip"),
        ({"split": "val"}, "split 'val': unknown; set split to one of null, train, validation, test"),
        ({"split": "test"}, "split 'test': there is no folder test/ in root; set root to the folder that holds test/"),
        ({"interpolation": "sinc"}, "interpolation 'sinc': unknown; set interpolation to one of nearest, box"),
        ({"size": 0}, "size 0: not a size; set size to a positive integer"),
        ({"size": 8, "crop_size": 9}, "crop_size 9: larger than size 8"),
        ({"split": "validation", "validation_fraction": 0.0}, "validation_fraction 0.0: leaves a split empty"),
    ],
)
def test_parameters_that_cannot_be_used_are_one_line(captioned, options, message):
    with pytest.raises(DataConfigError) as caught:
        ImageFolder(**{"root": str(captioned), "size": 8, **options})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_images_says_so(tmp_path):
    with pytest.raises(DataConfigError, match="no images in it; set root"):
        ImageFolder(str(tmp_path))
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(
        DataConfigError, match=r"no images in it can be used: 1 skipped, first a.jpg: empty file; set root"
    ):
        ImageFolder(str(tmp_path), on_error="skip")


# --- classes ---


@pytest.fixture
def classes(tmp_path):
    for label, count in (("tench", 3), ("ape", 2), ("10", 1), ("9", 1)):
        for i in range(count):
            save_image(tmp_path / label / "deep" / f"{i}.png", i)
    return tmp_path


def test_folders_are_classes_in_the_order_of_their_names(classes):
    dataset = ImageFolder(str(classes), size=8, class_labels=True)
    assert dataset.class_names == ["10", "9", "ape", "tench"]
    batch = default_collate([dataset[i] for i in range(len(dataset))])
    assert batch["class_label"].dtype == torch.int64 and batch["class_label"].tolist() == [0, 1, 2, 2, 3, 3, 3]
    assert batch["human_label"] == ["10", "9", "ape", "ape", "tench", "tench", "tench"]


def test_the_order_of_classes_can_be_given_as_a_list_or_a_folder(classes, tmp_path_factory):
    dataset = ImageFolder(str(classes), size=8, class_labels=True, classes=["tench", "9", "10", "ape", "emu"])
    assert dataset.labels == [2, 1, 3, 3, 0, 0, 0]
    other = tmp_path_factory.mktemp("validation")
    save_image(other / "tench" / "x.png")
    assert ImageFolder(str(other), size=8, class_labels=True, classes=str(classes)).labels == [3]
    with pytest.raises(DataConfigError, match=r"tench/deep/0.png is in none of these 3 classes"):
        ImageFolder(str(classes), size=8, class_labels=True, classes=["10", "9", "ape"])
    with pytest.raises(DataConfigError, match="classes '/x/y': no such folder"):
        ImageFolder(str(classes), size=8, class_labels=True, classes="/x/y")


def test_an_image_outside_the_class_folders_is_an_error(classes):
    save_image(classes / "stray.png")
    with pytest.raises(
        DataConfigError, match=r"stray.png is not in a class folder; move it into one, or set class_labels to false"
    ):
        ImageFolder(str(classes), size=8, class_labels=True)


# --- splits ---


def test_a_fraction_divides_a_folder_and_images_keep_their_side(tmp_path):
    for i in range(40):
        save_image(tmp_path / f"{i}.png", i, (4, 4))
    train = ImageFolder(str(tmp_path), size=4, split="train", validation_fraction=0.25)
    held_out = ImageFolder(str(tmp_path), size=4, split="validation", validation_fraction=0.25)
    assert len(held_out) == 10 and sorted(names(train) + names(held_out)) == names(ImageFolder(str(tmp_path), size=4))
    for i in range(8):
        save_image(tmp_path / f"00 new {i}.png", i, (4, 4))
    again = ImageFolder(str(tmp_path), size=4, split="validation", validation_fraction=0.25)
    assert len(set(names(held_out)) & set(names(again))) >= 8


def test_classes_are_numbered_before_the_split(classes):
    parts = [
        ImageFolder(str(classes), size=8, class_labels=True, split=s, validation_fraction=0.2)
        for s in ("train", "validation")
    ]
    assert parts[0].class_names == parts[1].class_names == ["10", "9", "ape", "tench"]


def test_sub_folders_named_as_the_splits_are_the_splits(tmp_path):
    for name in ("train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "val/dog/3.png"):
        save_image(tmp_path / name)
    train, held_out = (
        ImageFolder(str(tmp_path), size=8, class_labels=True, split=split) for split in ("train", "validation")
    )
    assert names(train) == ["cat/0.png", "dog/1.png"] and names(held_out) == ["cat/2.png", "dog/3.png"]
    assert train.class_names == held_out.class_names == ["cat", "dog"]


def test_previews_are_the_parts_of_a_captioned_folder(captioned):
    train, held_out = PreviewsTrain(str(captioned)), PreviewsValidation(root=str(captioned), size=8)
    assert len(train) == 3 and len(held_out) == 1 and train[0]["image"].shape == (256, 256, 3)
    assert train[0]["caption"].startswith("image ")
    assert len(PreviewsTrain(str(captioned), split=None)) == 4
    with pytest.raises(DataConfigError, match="root None: not set"):
        PreviewsTrain(size=256)


# --- size, crop, flip ---


def test_images_are_scaled_cropped_and_flipped(tmp_path):
    ramp = np.repeat(np.arange(32, dtype=np.uint8)[None, :, None] * 8, 16, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    middle = ImageFolder(str(tmp_path), size=16)[0]["image"]
    assert middle.shape == (16, 16, 3) and abs(middle.mean() + 0.027) < 0.02
    assert ImageFolder(str(tmp_path), size=[16, 32], crop_size=[8, 4])[0]["image"].shape == (8, 4, 3)
    mirrored = ImageFolder(str(tmp_path), size=16, flip_p=1.0)[0]["image"]
    assert (mirrored == middle[:, ::-1]).all()
    anywhere = ImageFolder(str(tmp_path), size=16, random_crop=True)
    assert len({float(anywhere[0]["image"].mean()) for _ in range(40)}) > 8


# --- files that cannot be used ---


@pytest.fixture
def damaged(tmp_path):
    """30 good images and 8 that are bad in different ways; CMYK, 16-bit and a wrong extension are good."""
    for i in range(27):
        save_image(tmp_path / f"good{i:02}.png", i)
    Image.new("CMYK", (8, 8), (10, 200, 30, 40)).save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "named.jpg", "png")
    for kind in ("empty", "html", "text", "truncated png", "truncated jpeg", "bomb", "bad header"):
        write_bad(tmp_path / f"bad {kind}.jpg", kind)
    Image.new("RGB", (1, 1)).save(tmp_path / "bad tiny.png")
    return tmp_path


def test_skipping_counts_exactly_and_gives_the_same_order_twice(damaged, caplog):
    with caplog.at_level(logging.WARNING):
        first = ImageFolder(str(damaged), size=8, on_error="skip")
    assert len(first) == 30 and len(first.skipped) == 8 and all(name.startswith("bad ") for name in first.skipped)
    assert "kept 30 of 38, skipped 8" in caplog.text
    assert names(ImageFolder(str(damaged), size=8, on_error="skip")) == names(first) == sorted(names(first))
    assert all(np.isfinite(first[i]["image"]).all() for i in range(30))
    assert "below min_size 2" in first.skipped["bad tiny.png"] and "empty" in first.skipped["bad empty.jpg"]


@pytest.mark.parametrize("workers", [0, 1])
def test_raising_names_the_file_and_the_way_out(damaged, workers):
    dataset = ImageFolder(str(damaged), size=8)
    bad = [i for i, name in enumerate(names(dataset)) if name.startswith("bad ")]
    assert len(bad) == 8
    for i in bad if workers == 0 else bad[:1]:
        with pytest.raises(BadImageError) as caught:
            next(iter(DataLoader(dataset, sampler=[i], num_workers=workers)))
        assert str(caught.value).startswith(str(damaged / names(dataset)[i])) and "\n" not in str(caught.value)
        assert str(caught.value).endswith("repair or remove it, or set on_error to skip")


def test_links_in_a_circle_end_and_a_file_counts_once(tmp_path):
    save_image(tmp_path / "b" / "x.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "folder").symlink_to(tmp_path / "b")
    (tmp_path / "a" / "link.png").symlink_to("../b/x.png")
    assert names(ImageFolder(str(tmp_path), size=8)) == ["b/x.png"]
    (tmp_path / "c.csv").write_text("image,text\na/link.png,one\nb/x.png,two\n")
    assert ImageFolder(str(tmp_path), size=8, captions="c.csv").items == [("a/link.png", ("one", "two"))]


def test_an_image_that_becomes_unusable_under_skip_is_replaced_and_counted(tmp_path, caplog):
    for i in range(4):
        save_image(tmp_path / f"{i}.png", i)
    dataset, strict = (ImageFolder(str(tmp_path), size=8, on_error=on_error) for on_error in ("skip", "raise"))
    (tmp_path / "1.png").write_bytes(b"")
    for _ in range(2):
        assert (dataset[1]["image"] == dataset[2]["image"]).all()
    assert len(caplog.records) == 1 and "1.png: empty file; the next image takes its place (1 skipped)" in caplog.text
    with pytest.raises(BadImageError, match="set on_error to skip"):
        strict[1]
    for i in range(4):
        (tmp_path / f"{i}.png").unlink(missing_ok=True)
    with pytest.raises(BadImageError, match=r"1.png: no such file; nor can 3 other images be read: is .* there"):
        dataset[1]


def test_a_list_names_the_images_of_a_dataset_in_its_order(captioned, tmp_path):
    (tmp_path / "list.txt").write_text("sub/c.webp\n\nb.png\nb.png\n")
    assert names(ImageFolder(str(captioned), size=8, files=str(tmp_path / "list.txt"))) == ["sub/c.webp", "b.png"]
    save_image(captioned / "a\u2028b\x85c.png")
    (tmp_path / "list.txt").write_bytes("./b.png\rsub\\c.webp\r\na\u2028b\x85c.png\nsub//c.webp".encode())
    dataset = ImageFolder(str(captioned), size=8, files=str(tmp_path / "list.txt"))
    assert names(dataset) == ["b.png", "sub/c.webp", "a\u2028b\x85c.png"]
    (tmp_path / "list.txt").write_text("b.png\nnone.png\n")
    with pytest.raises(DataConfigError, match=r"list.txt: none.png: no such file: .*; repair it, or set on_error to"):
        ImageFolder(str(captioned), size=8, files=str(tmp_path / "list.txt"))
    assert len(ImageFolder(str(captioned), size=8, files=str(tmp_path / "list.txt"), on_error="skip")) == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("../x.png\n", "the path '../x.png' leaves"),
        ("/etc/x.png\n", "leaves"),
        ("notes.md\n", "'notes.md' is not an image"),
        (None, "no such file"),
    ],
)
def test_a_list_reaches_no_file_outside_the_root(captioned, content, problem):
    path = captioned / "list.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataConfigError, match=problem):
        ImageFolder(str(captioned), size=8, files=str(path))


def test_without_a_size_the_crop_is_taken_of_the_image_as_it_is(tmp_path):
    save_image(tmp_path / "a.png", 0, (20, 16))
    save_image(tmp_path / "b.png", 1, (6, 5))
    large, small = (ImageFolder(str(tmp_path), size=None, crop_size=10)[i]["image"] for i in (0, 1))
    expected = np.asarray(Image.open(tmp_path / "a.png"))[3:13, 5:15] / 127.5 - 1
    np.testing.assert_allclose(large, expected, atol=1e-6)
    assert small.shape == (10, 10, 3)  # upscaled to cover the crop
    with pytest.raises(DataConfigError, match="size None: not a size"):
        ImageFolder(str(tmp_path), size=None)


def test_templates_and_a_subject_caption_images_without_captions(captioned):
    dataset = ImageFolder(str(captioned), size=8, templates=["a {}", "the {}"], subject="<me>")
    assert (
        {dataset[0]["caption"] for _ in range(30)} == {dataset[0]["txt"] for _ in range(30)} == {"a <me>", "the <me>"}
    )
    assert ImageFolder(str(captioned), size=8, subject="my cat")[2]["caption"] == "my cat"
    assert ImageFolder(str(captioned), size=8, captions="sidecar", templates=["a {}"])[0]["caption"] == "a image a.jpg"


def test_the_template_of_a_sample_follows_from_its_seed_epoch_and_index(captioned):
    templates = [f"{k} {{}}" for k in range(1000)]
    dataset = ImageFolder(str(captioned), size=8, templates=templates, subject="x")
    first, again, other = (SeededDataset(dataset, seed) for seed in (1, 1, 2))
    captions = [[each[epoch, k]["caption"] for epoch in range(2) for k in range(4)] for each in (first, again, other)]
    assert captions[0] == captions[1] != captions[2] and len(set(captions[0])) == 8


def test_the_fingerprint_covers_templates_and_is_the_old_one_without(captioned):
    plain = ImageFolder(str(captioned), size=8, captions="sidecar").fingerprint
    assert plain == ImageFolder(str(captioned), size=8, captions="sidecar", templates=[]).fingerprint
    assert plain != ImageFolder(str(captioned), size=8, captions="sidecar", templates=["a {}"]).fingerprint


@pytest.fixture
def masked(tmp_path):
    """Images whose masks are their red channel, in other formats."""
    for i, name in enumerate(["a.png", "sub/b.png"]):
        red = np.kron(np.random.RandomState(i).randint(0, 256, (4, 5)), np.ones((5, 5))).astype(np.uint8)
        image, mask = tmp_path / "images" / name, (tmp_path / "masks" / name).with_suffix(".bmp")
        image.parent.mkdir(parents=True, exist_ok=True)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([red, red * 0, red * 0], axis=-1)).save(image)
        Image.fromarray(red).save(mask)
    return tmp_path


def masked_folder(masked, **options):
    return ImageFolder(str(masked / "images"), masks=str(masked / "masks"), **{"size": 16, **options})


def test_a_mask_has_the_crop_and_the_flip_of_its_image(masked):
    dataset = masked_folder(masked, size=20, crop_size=16, random_crop=True, flip_p=0.5)
    for sample in [dataset[index] for index in (0, 1) * 8]:
        assert sample["loss_mask"].shape == (16, 16, 1) and sample["loss_mask"].dtype == np.float32
        np.testing.assert_allclose(sample["loss_mask"][..., 0], (sample["image"][..., 0] + 1) / 2, atol=1e-6)


def test_masks_do_not_change_the_views_of_the_images(masked):
    options = {"size": 20, "crop_size": 16, "random_crop": True, "flip_p": 0.5}
    with_masks = SeededDataset(masked_folder(masked, **options), seed=1)
    without = SeededDataset(ImageFolder(str(masked / "images"), **options), seed=1)
    assert all(np.array_equal(with_masks[k]["image"], without[k]["image"]) for k in (0, 1))


def test_a_missing_or_unusable_mask_is_an_error_or_leaves_its_image_out(masked):
    (masked / "masks" / "sub" / "b.bmp").unlink()
    with pytest.raises(DataConfigError, match=r"sub/b\.png: has no mask in .*masks"):
        masked_folder(masked)
    dataset = masked_folder(masked, on_error="skip")
    assert names(dataset) == ["a.png"] and "no mask" in dataset.skipped["sub/b.png"]
    for image, problem in (
        (Image.new("L", (5, 25)), "is 5x25, but its image is 25x20"),
        (Image.new("L", (25, 20), 1), "its largest value is 1 of 255"),
    ):
        image.save(masked / "masks" / "sub" / "b.png")
        with pytest.raises(BadImageError, match=problem):
            masked_folder(masked)[1]
        assert problem in masked_folder(masked, on_error="skip").skipped["sub/b.png"]


def test_masks_are_not_images_and_a_change_of_them_changes_the_fingerprint(masked):
    with pytest.raises(DataConfigError, match=r"is in the folder of the images, so that the mask .* is an image too"):
        ImageFolder(str(masked / "masks"), masks=str(masked / "masks"))
    before, plain = masked_folder(masked).fingerprint, ImageFolder(str(masked / "images")).fingerprint
    (masked / "masks" / "a.bmp").rename(masked / "masks" / "a.png")
    after = masked_folder(masked).fingerprint
    assert before["files"] == after["files"] == plain["files"]
    assert len({each["labels"] for each in (before, after, plain)}) == 3
