"""ImageNet in its published layout, from class folders and from its archives."""

import io
import os
import tarfile

import pytest
from omegaconf import OmegaConf
from PIL import Image

from ldm.data.archives import ArchiveError
from ldm.data.base import DataConfigError
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.imagenet import ImageNetSRTrain, ImageNetSRValidation, ImageNetTrain, ImageNetValidation
from ldm.util import instantiate_from_config
from tests.data.layouts import pixels, save_image

SYNSETS = ("n01440764", "n01443537", "n02002724")


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 2), ("validation", 1)):
        for number, synset in enumerate(SYNSETS):
            for k in range(count):
                save_image(tmp_path / f"ILSVRC2012_{split}/data/{synset}/{synset}_{k}.JPEG", number)
        (tmp_path / f"ILSVRC2012_{split}/synset_human.txt").write_text(
            "n01440764 tench, Tinca tinca\nn01443537 goldfish\n"
        )
    return tmp_path


def jpeg(seed):
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, "JPEG")
    return file.getvalue()


def tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_a_synset_with_two_names_is_refused(root):
    file = root / "ILSVRC2012_train/synset_human.txt"
    file.write_text(file.read_text() + f"{SYNSETS[0]} another name\n")
    with pytest.raises(DataConfigError, match=f"has two lines '{SYNSETS[0]}'; remove one of them"):
        ImageNetTrain(root=str(root), size=8)


def test_classes_are_the_synsets_in_order_with_their_names(root):
    dataset = ImageNetTrain(root=str(root), size=16)
    samples = [dataset[i] for i in range(len(dataset))]
    assert [s["class_label"] for s in samples] == [0, 0, 1, 1, 2, 2]
    assert [s["synset"] for s in samples[::2]] == list(SYNSETS)
    assert [s["human_label"] for s in samples[::2]] == ["tench, Tinca tinca", "goldfish", "n02002724"]
    assert samples[0]["image"].shape == (16, 16, 3)


def test_the_published_yaml_finds_the_published_place(root, monkeypatch):
    home = root / "autoencoders/data"
    home.parent.mkdir()
    home.symlink_to(root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(root))
    for split in ("Train", "Validation"):
        config = OmegaConf.create({"target": f"ldm.data.imagenet.ImageNet{split}", "params": {"config": {"size": 16}}})
        assert instantiate_from_config(config)[0]["image"].shape == (16, 16, 3)
    pairs = instantiate_from_config(
        {"target": "ldm.data.imagenet.ImageNetSRTrain", "params": {"size": 16, "degradation": "pil_nearest"}}
    )
    assert pairs[0]["LR_image"].shape == (4, 4, 3)


@pytest.mark.parametrize(("cls", "count"), [(ImageNetSRTrain, 6), (ImageNetSRValidation, 3)])
def test_pairs_keep_their_classes(root, cls, count):
    dataset = cls(root=str(root), size=16, degradation="bsrgan_light", downscale_f=4)
    assert len(dataset) == count
    assert dataset[count - 1]["LR_image"].shape == (4, 4, 3) and dataset[count - 1]["class_label"] == 2


def test_other_layouts_are_found(root, tmp_path):
    (root / "ILSVRC2012_train/data").rename(root / "train")
    assert len(ImageNetTrain(root=str(root), size=16)) == len(ImageNetTrain(root=str(root / "train"), size=16)) == 6


def test_archives_are_unpacked_by_prepare_data_and_not_by_the_constructor(tmp_path):
    inner = {f"{s}.tar": tar(tmp_path / "inner" / s, {f"{s}_0.JPEG": jpeg(0)}).read_bytes() for s in SYNSETS}
    tar(tmp_path / "ILSVRC2012_train/ILSVRC2012_img_train.tar", inner)
    names = [f"ILSVRC2012_val_0000000{k}.JPEG" for k in (1, 2, 3)]
    tar(tmp_path / "ILSVRC2012_validation/ILSVRC2012_img_val.tar", {name: jpeg(k) for k, name in enumerate(names)})
    config = {"params": {"root": str(tmp_path), "size": 16}}
    module = DataModuleFromConfig(
        2,
        {"target": "ldm.data.imagenet.ImageNetTrain", **config},
        {"target": "ldm.data.imagenet.ImageNetValidation", "params": {"config": config["params"]}},
        num_workers=0,
    )
    with pytest.raises(DataConfigError, match="has no class folders"):
        module.setup()
    with pytest.raises(ArchiveError, match=r"needs validation_synset.txt next to it"):
        module.prepare_data()
    assert os.listdir(tmp_path / "ILSVRC2012_validation") == ["ILSVRC2012_img_val.tar"]
    (tmp_path / "ILSVRC2012_validation/validation_synset.txt").write_text(
        "".join(f"{n} {s}\n" for n, s in zip(names, SYNSETS[::-1]))
    )
    for _ in range(2):
        module.prepare_data()
        module.setup()
    assert len(module.datasets["train"]) == 3
    assert [sample["class_label"] for sample in module.datasets["validation"]] == [0, 1, 2]
    assert module.datasets["validation"].items[0].name == f"{SYNSETS[0]}/{names[2]}"


def test_a_missing_folder_and_an_unknown_parameter_are_reported(tmp_path):
    with pytest.raises(DataConfigError, match=r"root '.*nowhere': no such folder; set root to a folder of ImageNet"):
        ImageNetTrain(root=str(tmp_path / "nowhere"))
    with pytest.raises(DataConfigError, match=r"config.sise 16: no such parameter; choose from .*size"):
        ImageNetValidation(config={"sise": 16})
