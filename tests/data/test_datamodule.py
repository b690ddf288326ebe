"""The data module: datasets are built once, loaders are what the config says, ranks share, errors name their place."""

from itertools import chain
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
from omegaconf import OmegaConf
from torch.utils.data import IterableDataset

from ldm.config.instantiate import ConfigError
from ldm.data.base import DataConfigError
from ldm.data.datamodule import SPLITS, DataModuleFromConfig, WrappedDataset
from ldm.data.order import usable_cpus
from ldm.util import allow_targets, instantiate_from_config
from tests.data.layouts import save_image, save_shards
from tests.data.toys import LENGTH, Numbers

TARGET = "tests.data.toys.Numbers"


@pytest.fixture(autouse=True)
def toys_may_be_built(monkeypatch):
    monkeypatch.setattr("ldm.config.instantiate._user_prefixes", [])
    allow_targets("tests")


def data(**params):
    return DataModuleFromConfig(**{"batch_size": 3, "num_workers": 0, "train": {"target": TARGET}, **params})


def indices(loader):
    return [batch["index"].tolist() for batch in loader]


def test_a_published_yaml_builds_by_its_published_name():
    config = OmegaConf.create(
        {
            "target": "main.DataModuleFromConfig",
            "params": {"batch_size": 4, "num_workers": 5, "wrap": True, "train": {"target": TARGET}},
        }
    )
    module = instantiate_from_config(config)
    module.setup()
    assert module.batch_size == 4 and module.num_workers == 5 and isinstance(module.datasets["train"], WrappedDataset)
    assert isinstance(module.datasets["train"].data, Numbers) and len(module.datasets["train"]) == LENGTH


def test_datasets_are_built_once_however_often_setup_is_called():
    before = Numbers.built
    module = data(validation={"target": TARGET})
    for stage in (None, "fit", "fit", "test"):
        module.prepare_data()
        module.setup(stage)
    module.train_dataloader()
    assert Numbers.built == before + 2


def test_only_splits_with_a_config_have_a_loader():
    from pytorch_lightning.utilities.model_helpers import is_overridden

    module = data(test={"target": TARGET})
    assert is_overridden("train_dataloader", module) and is_overridden("test_dataloader", module)
    assert not is_overridden("val_dataloader", module) and not is_overridden("predict_dataloader", module)


def test_training_data_is_shuffled_and_the_rest_only_on_request():
    splits = {split: {"target": TARGET} for split in SPLITS}
    plain, shuffled = data(**splits), data(**splits, shuffle_test_loader=True, shuffle_val_dataloader=True)
    in_order = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert indices(plain.train_dataloader()) != in_order
    assert sorted(chain(*indices(plain.train_dataloader()))) == list(range(LENGTH))
    assert (
        indices(plain.val_dataloader())
        == indices(plain.test_dataloader())
        == indices(plain.predict_dataloader())
        == in_order
    )
    assert indices(shuffled.val_dataloader()) != in_order != indices(shuffled.test_dataloader())
    assert indices(shuffled.predict_dataloader()) == in_order


def test_the_order_follows_the_seed():
    orders = []
    for seed in (1, 1, 2):
        module = data()
        module.seed = seed
        orders.append(indices(module.train_dataloader()))
    assert orders[0] == orders[1] != orders[2]


def test_set_epoch_works_without_a_trainer():
    loader = data().train_dataloader()
    first = indices(loader)
    loader.sampler.set_epoch(1)
    assert indices(loader) != first
    loader.sampler.set_epoch(0)
    assert indices(loader) == first


def test_the_default_number_of_workers_is_the_published_one_within_the_cpus():
    assert DataModuleFromConfig(1).num_workers == min(2, usable_cpus())
    assert DataModuleFromConfig(4096).num_workers == usable_cpus()
    assert DataModuleFromConfig(4, num_workers=99).num_workers == 99


def test_a_missing_folder_is_one_line_that_says_what_to_do():
    module = data(train={"target": "ldm.data.folder.ImageFolder", "params": {"root": "/x/y"}})
    with pytest.raises(DataConfigError) as caught:
        module.setup()
    expected = "data.params.train root '/x/y': no such folder; set data.params.train.params.root to a folder of images"
    assert str(caught.value) == expected


def test_an_empty_dataset_is_named():
    module = data(train={"target": TARGET, "params": {"length": 0}})
    with pytest.raises(ConfigError, match=r"data.params.train: Numbers is empty"):
        module.train_dataloader()


def test_splits_must_number_their_classes_alike():
    config = {"target": TARGET, "params": {"class_names": ["ape", "tench"]}}
    data(train=config, validation=config).setup()
    data(train=config, validation={"target": TARGET}).setup()
    for wrap in (False, True):
        with pytest.raises(
            ConfigError, match=r"data.params.validation has 1 classes and train 2, which differ in ape; set"
        ):
            data(train=config, validation={"target": TARGET, "params": {"class_names": ["tench"]}}, wrap=wrap).setup()


def as_rank(module, rank, world_size):
    """The module as it is attached to a trainer of that rank."""
    fit_loop = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    ).fit_loop
    module.trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, num_devices=world_size, accelerator=None, fit_loop=fit_loop
    )
    return module


@pytest.mark.parametrize("target", [TARGET, "tests.data.toys.NumberStream"])
def test_ranks_share_the_data(target):
    params = {"num_records": LENGTH} if target.endswith("Stream") else {}
    modules = [as_rank(data(train={"target": target, "params": params}), rank, 2) for rank in range(2)]
    shares = [list(chain(*indices(module.train_dataloader()))) for module in modules]
    assert sorted(shares[0] + shares[1]) == list(range(LENGTH)) and len(shares[0]) == len(shares[1])
    assert len(modules[0].train_dataloader()) == 2


def test_lightning_keeps_the_sampler_of_a_distributed_run():
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    loader = data().train_dataloader()
    assert not trainer._data_connector._requires_distributed_sampler(loader)


@pytest.mark.filterwarnings("ignore")
def test_streams_count_the_batches_that_their_workers_give():
    stream = {"target": "tests.data.toys.NumberStream", "params": {"num_records": LENGTH}}
    for workers in (0, 2, 3):
        loader = data(train=stream, num_workers=workers).train_dataloader()
        batches = indices(loader)
        assert len(batches) == len(loader) and sorted(chain(*batches)) == list(range(LENGTH))


class Foreign(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_a_stream_that_may_not_split_itself_is_warned_about(caplog):
    module = data(num_workers=2)
    module.datasets["train"] = Foreign()
    module.train_dataloader()
    assert "Foreign streams but is not a Txt2ImgIterableBaseDataset" in caplog.text


class Prepared(Numbers):
    calls = ()

    @classmethod
    def prepare_data(cls, root=None, **_):
        if root is None:
            raise DataConfigError("root", None, "not set", "set {param}")
        cls.calls += ((root, Numbers.built),)

    def __init__(self, root=None):
        super().__init__()


def test_datasets_are_prepared_before_they_are_built_and_not_again():
    target = f"{Prepared.__module__}.Prepared"
    before = Numbers.built
    module = data(train={"target": target, "params": {"root": "somewhere"}}, validation={"target": TARGET})
    for _ in range(2):
        module.prepare_data()
        module.setup("fit")
    assert Prepared.calls == (("somewhere", before),)
    with pytest.raises(
        DataConfigError, match=r"data.params.train root None: not set; set data.params.train.params.root"
    ):
        data(train={"target": target}).prepare_data()


def test_a_target_that_is_not_there_is_reported_with_its_place():
    module = data(train=OmegaConf.create({"train": {"target": "ldm.data.lsun.LSUNDogsTrain"}}).train)
    module.prepare_data()
    with pytest.raises(ConfigError, match=r"train.target: target .*LSUNDogsTrain"):
        module.setup()


def folders(train, validation, **options):
    def config(params):
        return {"target": "ldm.data.folder.ImageFolder", "params": {"size": 4, **options, **params}}

    return data(train=config(train), validation=config(validation))


def test_nothing_is_trained_on_another_split(tmp_path, caplog):
    for i, name in enumerate(("train/0.png", "train/1.png", "val/2.png", "test/3.png")):
        save_image(tmp_path / name, i, 4, 4)
    root, part = {"root": str(tmp_path)}, [{"root": str(tmp_path / name)} for name in ("train", "test")]
    folders({**root, "split": "train"}, {**root, "split": "validation"}).setup()
    folders(part[0], part[1]).setup()
    assert "trained on too" not in caplog.text
    for wrong in ({**root, "split": "test"}, {**root, "split": "validation"}, part[1]):
        with pytest.raises(ConfigError, match=r"holds the (test|validation) split; set data.params.train.params.split"):
            folders(wrong, {**root, "split": "validation"}).setup()
        train = {"target": "ldm.data.folder.ImageFolder", "params": {"size": 4, **wrong}}
        mixture = {"target": "ldm.data.mixture.Mixture", "params": {"datasets": [train]}}
        with pytest.raises(
            ConfigError, match=r"split; set data.params.train.params.datasets\[0\].params.split to train"
        ):
            data(train=mixture).setup()
    folders(part[0], part[0]).setup()
    assert "2 of 2 images of validation are trained on too; set split in both" in caplog.text


def test_shards_that_are_trained_on_and_validated_on_are_logged_whatever_their_spelling(tmp_path, caplog):
    [path, _] = save_shards(tmp_path, 2, 1)

    def config(shards):
        return {"target": "ldm.data.webdataset.ImageShards", "params": {"shards": str(shards), "size": 4}}

    mixture = {"target": "ldm.data.mixture.Mixture", "params": {"datasets": [config(tmp_path)]}}
    data(train=mixture, validation=config(tmp_path / "../" / tmp_path.name / "00000.tar")).setup()
    assert f"trained on too: 1 shard of validation, e.g. {path}" in caplog.text


def test_the_numbers_of_the_classes_are_logged_and_known(tmp_path, caplog):
    caplog.set_level("INFO")
    for i in range(25):
        save_image(tmp_path / f"class {i:02}" / "x.png", i, 4, 4)
    module = folders({"root": str(tmp_path)}, {"root": str(tmp_path)}, class_labels=True)
    module.setup()
    module.setup()
    lines = [message for message in caplog.messages if message.startswith("classes")]
    assert len(lines) == 1 and lines[0].endswith("18 class 18, 19 class 19, ... 25 in all")
    assert "0 class 00, 1 class 01, " in lines[0] and module.class_names[24] == "class 24"


def test_samples_know_their_places_in_the_batch_of_all_ranks(monkeypatch):
    batches = []
    for rank in (0, 1):
        module = data(batch_size=2, validation={"target": TARGET})
        monkeypatch.setattr(module, "_ranks", lambda rank=rank: (rank, 2))
        loader = module.val_dataloader()
        batches.append([module.evaluation_samples("validation", number) for number in range(len(loader))])
    for number, pair in enumerate(zip(*batches)):
        assert [samples.start for samples in pair] == [4 * number] * 2
        found = {
            4 * number + place: index
            for samples in pair
            if samples.weight
            for place, index in zip(samples.places, samples.indices, strict=True)
        }
        assert found == {index: index for index in range(4 * number, min(LENGTH, 4 * number + 4))}
