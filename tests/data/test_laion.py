"""The published data module of image-text shards: its arguments, its transforms, its runs."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import main
from ldm.checkpoint import read_checkpoint
from ldm.config.instantiate import ConfigError
from ldm.data.laion import AddMask, CenterCrop, RandomCrop, RandomHorizontalFlip, Resize, WebDataModuleFromConfig
from ldm.util import instantiate_from_config
from tests import toys
from tests.data.layouts import image_bytes, pixels, save_shard, save_shards

TRANSFORMS = [
    {"target": "torchvision.transforms.Resize", "params": {"size": 8, "interpolation": 3}},
    {"target": "torchvision.transforms.RandomCrop", "params": {"size": 8}},
]


def published(folder, **params):
    """The `data` of a published YAML."""
    split = {"shards": "{00000..00001}.tar", "shuffle": 100, "image_key": "png", "image_transforms": TRANSFORMS}
    validation = {**split, "shards": ["00002.tar"], "shuffle": 0, "image_transforms": [*TRANSFORMS[:1], CENTER]}
    params = {"tar_base": str(folder), "batch_size": 2, "num_workers": 0, "multinode": True, **params}
    params = {"train": split, "validation": validation, "cache": str(folder / "cache"), **params}
    return {"target": "ldm.data.laion.WebDataModuleFromConfig", "params": params}


CENTER = {"target": "torchvision.transforms.CenterCrop", "params": {"size": 8}}


def test_a_published_config_builds_and_gives_batches(tmp_path):
    save_shards(tmp_path, 3, 4)
    module = instantiate_from_config(OmegaConf.create(published(tmp_path)))
    module.prepare_data()
    module.setup()
    assert isinstance(module, WebDataModuleFromConfig) and module.datasets["train"].crop_size == (8, 8)
    batch = next(iter(module.train_dataloader()))
    assert batch["png"].shape == (2, 8, 8, 3) and batch["png"].dtype == torch.float32 and len(batch["txt"]) == 2
    trained = [key for batch in module.train_dataloader() for key in batch["__key__"]]
    assert sorted(trained) == [f"{i:03d}" for i in range(8)] != trained
    assert [key for batch in module.val_dataloader() for key in batch["__key__"]] == ["008", "009", "010", "011"]


def test_shards_of_both_training_and_validation_are_a_warning(tmp_path, caplog):
    save_shards(tmp_path, 3, 1)
    split = {"shards": ["00001.tar", "00002.tar"], "image_key": "png"}
    instantiate_from_config(published(tmp_path, validation=split)).setup()
    assert "trained on too: 1 shard of validation, e.g. " in caplog.text and "00001.tar" in caplog.text


def test_filters_are_those_of_the_published_module(tmp_path):
    members = {}
    for i, fields in enumerate(
        [
            {"original_width": 600, "original_height": 512, "pwatermark": 0.2, "punsafe": 0.0},
            {"original_width": 600, "original_height": 511, "pwatermark": 0.2, "punsafe": 0.0},
            {"original_width": 600, "original_height": 600, "pwatermark": 0.9, "punsafe": 0.0},
            {"original_width": 600, "original_height": 600, "pwatermark": 0.2, "punsafe": 0.5},
            {},
        ]
    ):
        members |= {f"{i}.png": image_bytes(i), f"{i}.txt": "x", f"{i}.json": fields}
    members |= {"5.png": image_bytes(5)}  # without a caption
    save_shard(tmp_path / "0.tar", members)
    split = {"shards": f"{tmp_path}/0.tar", "image_key": "png", "image_transforms": TRANSFORMS}

    def kept(**options):
        options = {"num_workers": 0, "cache": str(tmp_path), **options}
        module = WebDataModuleFromConfig(None, 9, train=split, **options)
        module.setup()
        [batch] = module.train_dataloader()
        return batch["__key__"]

    assert kept() == ["0", "1", "2", "3", "4"]
    assert kept(min_size=512) == ["0", "2", "3"]
    assert kept(min_size=512, max_pwatermark=0.8) == ["0", "3"]
    assert kept(min_size=512, max_pwatermark=0.8, p_unsafe_threshold=0.1) == ["0"]


def test_min_size_takes_the_sides_of_images_whose_shards_name_no_original_ones(tmp_path):
    members = {f"{i}.png": image_bytes(i, side, 8) for i, side in enumerate((8, 7, 9))}
    members |= {f"{i}.txt": "x" for i in range(3)} | {"2.json": {"original_width": 7, "original_height": 9}}
    save_shard(tmp_path / "0.tar", members)
    split = {"shards": f"{tmp_path}/0.tar", "image_key": "png", "image_transforms": TRANSFORMS}
    module = WebDataModuleFromConfig(None, 9, train=split, num_workers=0, min_size=8, cache=str(tmp_path))
    module.setup()
    assert [batch["__key__"] for batch in module.train_dataloader()] == [["0"]]


def test_errors_have_the_yaml_path_of_the_split(tmp_path):
    save_shards(tmp_path, 1, 1)
    module = instantiate_from_config(published(tmp_path))
    with pytest.raises(ConfigError, match=r"00001.tar': no such file; set data.params.train.shards to"):
        module.setup()
    wrong = published(tmp_path, train={"shards": "x", "shufle": 3})
    with pytest.raises(ConfigError, match=r"shufle: .*did you mean 'shuffle'"):
        instantiate_from_config(wrong)


def test_transforms_are_those_of_torchvision():
    image = Image.fromarray(pixels(0, 30, 50))
    assert Resize(15)(image).size == (25, 15) and Resize((8, 9))(image).size == (9, 8)
    assert np.array_equal(np.asarray(CenterCrop(10)(image)), pixels(0, 30, 50)[10:20, 20:30])
    assert {RandomCrop(29)(image).tobytes() for _ in range(20)} != {RandomCrop(29)(image).tobytes()}
    assert np.array_equal(np.asarray(RandomHorizontalFlip(1.0)(image)), pixels(0, 30, 50)[:, ::-1])
    assert RandomHorizontalFlip(0.0)(image) is image
    resized = Resize(15, 3)(image)
    assert resized.tobytes() == image.resize((25, 15), Image.Resampling.BICUBIC).tobytes()


def test_masks_and_small_images_are_added_to_the_items_of_a_split(tmp_path):
    save_shards(tmp_path, 3, 2, height=16, width=16)
    for target, params in (("AddMask", {"mode": "512train-large", "p_drop": 0.25}), ("AddLR", LOW)):
        split = {"shards": "00000.tar", "image_key": "png"}
        split["postprocess"] = {"target": f"ldm.data.laion.{target}", "params": {**params, "image_key": "png"}}
        module = instantiate_from_config(published(tmp_path, train=split, validation=None))
        module.setup()
        [batch] = module.train_dataloader()
        if target == "AddLR":
            assert batch["lr"].shape == (2, 12, 12, 3) and batch["lr"].abs().max() <= 1
            continue
        mask, masked = batch["mask"], batch["masked_image"]
        assert mask.shape == (2, 16, 16, 1) and set(mask.unique().tolist()) <= {0.0, 1.0} and mask.mean() > 0.2
        assert torch.equal(masked, batch["png"] * (1 - mask))
    with pytest.raises(ConfigError, match="mode 'large': unknown; set mode to one of 256train"):
        AddMask("large")


LOW = {"factor": 2, "output_size": 12, "initial_size": 8}


class Toy(toys.Toy):
    """Trains on `png`, and remembers the keys of its samples in its state."""

    def __init__(self, stop=-1):
        super().__init__()
        self.stop, self.keys = stop, []

    def training_step(self, batch, batch_idx):
        self.keys += batch["__key__"]
        if self.trainer.global_step == self.stop:
            self.happen("SIGTERM")
        return self.loss({"image": batch["png"][:, :2, :2]})

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss({"image": batch["png"][:, :2, :2]}))

    def log_images(self, batch, **kwargs):
        return {}

    def on_save_checkpoint(self, checkpoint):
        checkpoint["keys"] = list(self.keys)


def test_a_run_of_main_stops_and_resumes_without_repeating_or_missing_a_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.config.instantiate._user_prefixes", [])
    save_shards(tmp_path / "shards", 3, 3)
    config = {**toys.CONFIG, "data": published(tmp_path / "shards")}
    config["model"] = {**config["model"], "target": f"{__name__}.Toy", "params": {}}
    OmegaConf.save(OmegaConf.create(config), "toy.yaml")
    quiet = ["lightning.callbacks.image_logger=null", "lightning.callbacks.cuda_callback=null", "--max_epochs", "2"]
    words = ["--allow-targets", "tests", "-b", "toy.yaml", "-t", *quiet]
    assert main.main([*words, "-n", "whole"]) == 0
    assert main.main([*words, "-n", "parts", "model.params.stop=3"]) == 143
    [whole], [parts] = (sorted(tmp_path.glob(f"logs/*_{name}")) for name in ("whole", "parts"))
    before = read_checkpoint(parts / "checkpoints/last.ckpt")["keys"]
    assert main.main(["--allow-targets", "tests", "-r", str(parts), "-t", "model.params.stop=-1"]) == 0
    first, second = (read_checkpoint(run / "checkpoints/last.ckpt") for run in (whole, parts))
    assert before + second["keys"] == first["keys"] and sorted(first["keys"][:6]) == [f"{i:03d}" for i in range(6)]
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())
