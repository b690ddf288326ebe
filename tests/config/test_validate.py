"""The validator of configs: it reads source text and imports nothing."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from ldm.config.instantiate import ConfigError
from ldm.config.merge import merge
from ldm.config.validate import check_class_count, check_config, check_targets, convert_types
from tests.config.toys import toy_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"modle": {}}, "unknown key modle; did you mean 'model'"),
        ({"lightning": {"callback": {}}}, "unknown key lightning.callback; did you mean 'callbacks'"),
        ({"lightning": {"trainer": {"max_epoch": 2}}}, "lightning.trainer.max_epoch; did you mean 'max_epochs'"),
        (
            {"lightning": {"trainer": {"default_root_dir": "x"}}},
            "lightning.trainer.default_root_dir: outputs go to the run directory",
        ),
        (
            {"model": {"params": {"widht": 2}}},
            r"model.params.widht: tests.toys.Toy takes no such parameter; did you mean 'width'",
        ),
        (
            {"data": {"params": {"train": {"params": {"size": 2}}}}},
            "data.params.train.params.size: tests.toys.Images takes no such",
        ),
        ({"model": {"params": {"monitor": "${nowhere}"}}}, "nowhere"),
        ({"data": None}, "data: missing"),
        ({"model": {"target": "os.system"}}, r"model.target: target 'os.system' is not allowed"),
        (
            {"model": {"prams": {}}},
            "model.prams: unknown key next to target; arguments of tests.toys.Toy go under model.params",
        ),
        ({"model": {"target": "Toy"}}, r"model.target: target 'Toy': expected a dotted name"),
        (
            {"model": {"target": "ldm.models.autoencoder.AutoencoderLK"}},
            r"has no class 'AutoencoderLK'; did you mean 'AutoencoderKL'\?",
        ),
        (
            {"model": {"target": "ldm.models.autoencodr.AutoencoderKL"}},
            r"no module named ldm.models.autoencodr; did you mean 'ldm.models.autoenc",
        ),
        (
            {"model": {"params": {"at": {"target": "ldm.modules.losses.LPIPSWithDiscriminatr"}}}},
            "did you mean 'LPIPSWithDiscriminator'",
        ),
        (
            {"data": {"params": {"train": {"target": "ldm.data.lsun.LSUNCatTrain"}}}},
            r"train.target: .* did you mean 'LSUNCatsTrain'",
        ),
        (
            {"lightning": {"callbacks": {"mine": {"target": "main.ImageLoger"}}}},
            r"mine.target: .* \(did you mean main.ImageLogger\?\)",
        ),
        (
            {"model": {"params": {"at": [{"target": "tests.toys.Toy", "wieght": 2}]}}},
            r"model.params.at\[0\].wieght: unknown key next to target; did you mean 'weight'\?",
        ),
        ({"model": {"params": {"at": [{"target": "builtins.eval"}]}}}, r"model.params.at\[0\].target: .*not allowed"),
    ],
)
def test_wrong_keys_of_a_yaml_are_found_before_anything_is_imported(yaml, change, message):
    config = OmegaConf.merge(toy_config(), change)
    with pytest.raises(ConfigError, match=message) as error:
        check_config(merge([yaml(config)]))
    assert "\n" not in str(error.value)


WEIGHTINGS = "ldm.models.diffusion.loss_weighting"


@pytest.mark.parametrize(
    "section, message",
    [
        (
            {"optimizer_config": {"target": "Muon"}},
            r"optimizer_config.target 'Muon': .* did you mean 'torch.optim.Muon'",
        ),
        ({"optimizer_config": {"target": "torch.optim.adamw"}}, "has no class 'adamw'; did you mean 'AdamW'"),
        (
            {"optimizer_config": {"weight_decay": 0.1}},
            r"weight_decay: .* go under model.params.optimizer_config.params",
        ),
        ({"optimizer_config": {"lr": 0.1}}, r"optimizer_config.lr: .* set model.base_learning_rate"),
        ({"optimizer_config": {"no_decai": True}}, "did you mean 'no_decay'"),
        (
            {"loss_weighting_config": {"target": "MinSNRWeighting"}},
            f"loss_weighting_config.target 'MinSNRWeighting': .* did you mean '{WEIGHTINGS}.MinSNRWeighting'",
        ),
        ({"loss_weighting_config": {"target": "xyz"}}, "target 'xyz': expected a dotted name such as"),
        (
            {"timestep_config": {"target": "LogitNormal"}},
            "did you mean 'ldm.models.diffusion.timesteps.LogitNormalTimesteps'",
        ),
        (
            {"noise_config": {"params": {"offset_strenght": 0.1}}},
            "noise_config.params.offset_strenght: .*'offset_strength'",
        ),
        ({"noise_config": {"offset_strength": 0.1}}, "offset_strength: .* go under model.params.noise_config.params"),
        ({"ema_config": {"averages": [0.99]}}, r"ema_config.averages \[0.99\]: .*, e.g. \[{decay: 0.9999}\]"),
    ],
)
def test_near_misses_in_the_sections_of_a_model_name_what_was_meant(section, message):
    config = {"model": {"target": "ldm.models.diffusion.ddpm.DDPM", "params": section}}
    with pytest.raises(ConfigError, match=message) as error:
        check_targets(config)
    assert "model.params" in str(error.value)


@pytest.mark.parametrize(
    "path, name, target",
    [
        ("model", "LatentDiffusion", "ldm.models.diffusion.ddpm.LatentDiffusion"),
        ("model.params.unet_config", "UnetModel", "ldm.modules.diffusionmodules.openaimodel.UNetModel"),
        ("data.params.train", "Digits", "ldm.data.digits.Digits"),
        ("lightning.callbacks.loss", "LossBySNR", "ldm.callbacks.loss_by_snr.LossBySNR"),
    ],
)
def test_a_class_without_its_module_is_named_in_full(path, name, target):
    config = OmegaConf.create({"model": {"target": "torch.nn.Identity"}})
    OmegaConf.update(config, f"{path}.target", name)
    with pytest.raises(ConfigError, match=f"{path}.target '{name}': expected a dotted name; did you mean '{target}'"):
        check_targets(OmegaConf.to_container(config))
    check_targets({"model": {"target": "torch.nn.Identity", "params": {"mode": {"target": name}}}})


def test_an_argument_may_be_called_target():
    params = {"target": "my.own", "loss": {"target": "eps", "weight": 1}, "head": {"target": "torch.nn.Identity"}}
    check_targets({"model": {"target": "torch.nn.Identity", "params": params}})
    with pytest.raises(ConfigError, match=r"model.params.head.target: target 'os.system' is not allowed"):
        check_targets({"model": {"target": "torch.nn.Identity", "params": params | {"head": {"target": "os.system"}}}})


@pytest.mark.parametrize(
    "file, advice",
    [
        ("gone.ckpt", "add it, or choose another with {place}=FILE"),
        ("models/first_stage_models/kl-f8/model.ckpt", "download it: bash scripts/download_first_stages.sh kl-f8"),
        ("models/ldm/cin256/model.ckpt", "download it: bash scripts/download_models.sh cin"),
        ("models/ldm/stable-diffusion-v1/model.ckpt", "put sd-v1-4.ckpt of https://huggingface.co/CompVis/stable-"),
        ("models/ldm/mine/model.ckpt", "it is in {root}: run from there"),
    ],
)
def test_missing_weights_are_named_with_their_source(file, advice, tmp_path, monkeypatch):
    """In a checkout with the configs of the released models and with one file of weights, whatever this one holds."""
    root = tmp_path / "checkout"
    for name in ("first_stage_models/kl-f8/config.yaml", "ldm/cin256/config.yaml", "ldm/mine/model.ckpt"):
        (root / "models" / name).parent.mkdir(parents=True)
        (root / "models" / name).touch()
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("*.py"))
    monkeypatch.setattr("ldm.config.validate.ROOT", root)
    monkeypatch.chdir(tmp_path)
    first_stage = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"ckpt_path": file}}
    model = {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {"ckpt_path": None, "first_stage_config": first_stage},
    }
    judge = {
        "target": "ldm.models.diffusion.classifier.NoisyLatentImageClassifier",
        "params": {"diffusion_ckpt_path": file},
    }
    for named, place in (
        (judge, "model.params.diffusion_ckpt_path"),
        (model, "model.params.first_stage_config.params.ckpt_path"),
    ):
        config = OmegaConf.merge(toy_config(), {"model": {"target": None}}, {"model": named})
        del config.model.params["width"]
        with pytest.raises(
            ConfigError, match=re.escape(f"{place}: no such file: {file}; {advice.format(place=place, root=root)}")
        ):
            check_config(config)
        check_config(config, weights=False)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).touch()
    check_config(config)


@pytest.mark.parametrize(
    "n_classes, dropout, advice", [(3, 0.0, "4 classes; .*n_classes=4"), (4, 0.1, '"no class".*n_classes=5')]
)
def test_a_class_embedder_needs_every_class_and_one_for_no_class(n_classes, dropout, advice):
    """With dropout the last class means none: a class of the data there would be trained as unconditional."""

    def config(n):
        stage = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"n_classes": n, "embed_dim": 8}}
        return OmegaConf.create({"model": {"params": {"cond_dropout": dropout, "cond_stage_config": stage}}})

    datasets = {"train": SimpleNamespace(class_names=["ape", "emu", "owl", "tench"]), "validation": SimpleNamespace()}
    with pytest.raises(ConfigError, match=f"n_classes {n_classes}: data.params.train .*{advice}"):
        check_class_count(config(n_classes), datasets)
    check_class_count(config(n_classes + 1), datasets)
    check_class_count(OmegaConf.create({"model": {"params": {"cond_stage_config": "__is_first_stage__"}}}), datasets)


def test_a_home_directory_is_expanded_in_every_path_of_the_classes(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    loss = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {"perceptual_weights": "~/a"}}
    stage = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"ckpt_path": "~/a", "lossconfig": loss}}
    text = {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": {"tokenizer_path": "~/a"}}
    params = {"ckpt_path": "~/a", "first_stage_config": stage, "cond_stage_config": text}
    datasets = {
        "train": ("ldm.data.folder.ImageFolder", ("root", "captions", "files", "classes")),
        "validation": ("ldm.data.landscapes.RFWTrain", ("root", "segmentation_root")),
        "test": ("ldm.data.openimages.OpenImagesBBoxTrain", ("root", "object_classes")),
        "predict": ("ldm.data.imagenet.ImageNetTrain", ("root",)),
    }
    data = {
        split: {"target": target, "params": dict.fromkeys(names, "~/a")} for split, (target, names) in datasets.items()
    }
    data["predict"]["params"]["config"] = {"root": "~/a"}
    logger = {"target": "pytorch_lightning.loggers.CSVLogger", "params": {"save_dir": "~/a"}}
    config = OmegaConf.create(
        {
            "model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params},
            "data": {"target": "main.DataModuleFromConfig", "params": data},
            "lightning": {"logger": logger, "trainer": {"resume_from_checkpoint": "~/a"}},
        }
    )
    convert_types(config)
    written = str(OmegaConf.to_container(config))
    assert written.count("/home/me/a") == 16 and "~" not in written


def test_values_are_converted_in_place_and_interpolations_stay():
    config = OmegaConf.create(
        {
            "model": {
                "base_learning_rate": "1e-4",
                "target": "ldm.models.diffusion.ddpm.DDPM",
                "params": {"timesteps": 1.0e2, "log_every_t": "${model.params.timesteps}", "linear_start": "1e-4"},
            },
            "lightning": {"trainer": {"max_epochs": 3.0, "limit_val_batches": 1.0}},
        }
    )
    convert_types(config)
    assert OmegaConf.to_container(config) == {
        "model": {
            "base_learning_rate": 1e-4,
            "target": "ldm.models.diffusion.ddpm.DDPM",
            "params": {"timesteps": 100, "log_every_t": "${model.params.timesteps}", "linear_start": 1e-4},
        },
        "lightning": {"trainer": {"max_epochs": 3, "limit_val_batches": 1.0}},
    }
    assert type(config.model.params.timesteps) is int and type(config.lightning.trainer.limit_val_batches) is float


@pytest.mark.parametrize("place", ["model", "model.params.at", "data.params.train"])
def test_params_that_are_no_mapping_are_refused(place):
    config = OmegaConf.merge(toy_config(), {"model": {"params": {"at": {"target": "torch.nn.Identity"}}}})
    OmegaConf.update(config, f"{place}.params", 3, merge=False)
    with pytest.raises(ConfigError, match=rf"^{re.escape(place)}\.params 3: expected a mapping of arguments of "):
        convert_types(config)


def test_a_run_directory_as_weights_is_refused_with_its_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    stage = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"ckpt_path": str(tmp_path)}}
    config = OmegaConf.create(toy_config())
    config.model = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {"first_stage_config": stage}}
    place = "model.params.first_stage_config.params.ckpt_path"
    expected = f"{place}: {tmp_path} is a run directory; set {place}={tmp_path}/checkpoints/last.ckpt"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        check_config(config)


@pytest.mark.parametrize("section", [{"adapters": {"rank": 4}}, {"token_embeddings": {"token": "<x>", "init": "x"}}])
def test_adapters_without_a_base_are_refused_before_anything_is_loaded(section):
    config = OmegaConf.create(toy_config())
    config.model = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {"ckpt_path": None, **section}}
    with pytest.raises(ConfigError, match=r"model\.params\.ckpt_path: not set; adapters and tokens train on a base"):
        check_config(config)
    check_config(config, weights=False)
