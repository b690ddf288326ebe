"""The command line, config merge and run folders, as far as they need no Trainer."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from ldm.config import merge as configs
from ldm.config.instantiate import ConfigError, accepted_params
from ldm.config.signature import constructor_arguments
from ldm.config.trainer_keys import REMOVED_SETTINGS, TRANSLATED, modernize, trainer_keys
from ldm.config.validate import check_class_count, check_config, check_targets
from ldm.training.devices import Machine, choose_devices
from ldm.training.flags import EPILOG, RunOptions, parse
from ldm.training.run_directory import new_run, resumed_run, saved_configs
from ldm.training.settings import learning_rate, resolve_settings
from ldm.util import get_obj_from_str

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path for folder in ("configs", "models") for path in (ROOT / folder).rglob("*.yaml"))
NO_GPU, TWO_GPUS = Machine(), Machine(cuda=2)


@pytest.fixture(autouse=True)
def toys_are_allowed(monkeypatch):
    monkeypatch.setattr("ldm.config.instantiate._user_prefixes", ["tests"])


@pytest.fixture
def yaml(tmp_path):
    """A function that writes a YAML file and returns its path."""

    def write(content, name="a.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else OmegaConf.to_yaml(OmegaConf.create(content)))
        return path

    return write


def toy_config(**lightning):
    return {
        "model": {"base_learning_rate": 1e-3, "target": "tests.toys.Toy", "params": {"width": 3}},
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {"batch_size": 2, "train": {"target": "tests.toys.Pictures"}},
        },
        "lightning": lightning,
    }


# ----------------------------------------------------------------------------------------------------------------- flags


def refused(words, capsys) -> str:
    """The one line with which a command line is refused, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        parse(words)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


def test_every_published_flag_is_read():
    words = "-n run -b a.yaml b.yaml -t True --no-test -p proj -d -s 5 -f _x -l out --scale_lr False model.params.x=1 --gpus 0,1"
    options = parse(words.split())
    assert options == RunOptions(
        name="run", base=("a.yaml", "b.yaml"), train=True, no_test=True, project="proj", debug=True, seed=5, postfix="_x", logdir="out",
        scale_lr=False, trainer={"gpus": "0,1"}, overrides=("model.params.x=1",),
    )  # fmt: skip


@pytest.mark.parametrize(
    "words, train", [("-t", True), ("-t True", True), ("-t false", False), ("--train", True), ("", False)]
)
def test_train_flag_stands_alone_or_with_a_boolean(words, train):
    assert parse(["-b", "a.yaml", *words.split()]).train is train


def test_overrides_may_stand_anywhere():
    options = parse(
        ["x.y=1", "-b", "a.yaml", "model.params.a=2", "-t", "data.params.b=3", "--benchmark", "lightning.trainer.c=4"]
    )
    assert options.overrides == ("x.y=1", "model.params.a=2", "data.params.b=3", "lightning.trainer.c=4")
    assert options.base == ("a.yaml",) and options.train and options.trainer == {"benchmark": True}


def test_only_explicit_trainer_flags_are_passed_on():
    words = "--max_epochs 3 --limit_val_batches .5 --check_val_every_n_epoch none --fast_dev_run 2 --max_time 0:1:0:0 --deterministic warn"
    assert parse(["-b", "a", *words.split()]).trainer == {
        "max_epochs": 3, "limit_val_batches": 0.5, "check_val_every_n_epoch": None, "fast_dev_run": 2, "max_time": "0:1:0:0",
        "deterministic": "warn",
    }  # fmt: skip


def test_flags_are_those_of_the_installed_trainer():
    import pytorch_lightning as pl

    signature = inspect.signature(pl.Trainer.__init__)
    assert set(constructor_arguments("pytorch_lightning.Trainer")) == set(signature.parameters) - {"self"}
    assert {"max_steps", "val_check_interval", "gradient_clip_val", "gpus", "precision"} <= trainer_keys()


TYPOS = """
max_epoch:max_epochs max-epochs:max_epochs bas:base gpu:gpus rezume:resume trian:train no_test:no-test notest:no-test scale-lr:scale_lr
logdirs:logdir sed:seed postfx:postfix precison:precision acumulate_grad_batches:accumulate_grad_batches dbug:debug nmae:name
val_check_intervall:val_check_interval strategie:strategy benchmrk:benchmark limit_train_batch:limit_train_batches
"""


@pytest.mark.parametrize("typo, meant", [[f"--{flag}" for flag in pair.split(":")] for pair in TYPOS.split()])
def test_misspelt_flags_are_refused_with_the_flag_that_was_meant(typo, meant, capsys):
    assert f"unknown flag {typo}; did you mean {meant}?" in refused(["-b", "a.yaml", typo, "3"], capsys)


@pytest.mark.parametrize(
    "words, message",
    [
        ("-b a --max_epochs many", "--max_epochs: expected int, got 'many'"),
        ("-b a -t maybe", "expected true or false, got 'maybe'"),
        ("-b a -s x", "--seed: invalid int"),
        ("-b a --model.params.x=3", "an override has no dashes: model.params.x=3"),
        ("-b a -t yes stray", "unexpected argument 'stray'"),
        ("-b a --callbacks x", "lightning.callbacks"),
        ("-r logs/x -n new", "--name and --resume"),
        ("-t", "--base"),
    ],
)
def test_unusable_command_lines_are_refused_in_one_line(words, message, capsys):
    assert message in refused(words.split(), capsys)


# --------------------------------------------------------------------------------------------- settings of Lightning 1.4


@pytest.mark.parametrize(
    "then, now",
    [
        ({"precision": 16}, {"precision": "16-mixed"}),
        ({"precision": "bf16"}, {"precision": "bf16-mixed"}),
        ({"precision": 32}, {"precision": "32-true"}),
        ({"accelerator": "ddp"}, {"strategy": "ddp"}),
        ({"distributed_backend": "ddp"}, {"strategy": "ddp"}),
        ({"accelerator": "ddp", "strategy": "fsdp"}, {"strategy": "fsdp"}),
        ({"accelerator": "cpu"}, {"accelerator": "cpu"}),
        ({"num_processes": 2}, {"accelerator": "cpu", "devices": 2}),
        ({"max_steps": None}, {"max_steps": -1}),
        ({"checkpoint_callback": False}, {"enable_checkpointing": False}),
        ({"weights_summary": "full"}, {"enable_model_summary": True}),
        ({"progress_bar_refresh_rate": 0}, {"enable_progress_bar": False}),
        ({"progress_bar_refresh_rate": 20}, {}),
        ({"replace_sampler_ddp": False}, {"use_distributed_sampler": False}),
        ({"terminate_on_nan": True, "amp_backend": "native", "benchmark": True}, {"benchmark": True}),
    ],
)
def test_published_trainer_settings_get_todays_names(then, now):
    assert modernize(then) == now


@pytest.mark.parametrize(
    "name, value",
    [("accelerator", "dp"), ("auto_lr_find", True), ("terminate_on_nan", False), ("precision", 8), ("tpu_cores", 8)],
)
def test_settings_that_mean_nothing_today_say_what_to_do(name, value):
    with pytest.raises(ValueError, match=f"--{name} {value}: "):
        modernize({name: value}, "--")


def test_every_name_of_lightning_1_4_is_known_once():
    assert not set(REMOVED_SETTINGS) & set(TRANSLATED)
    assert not (set(REMOVED_SETTINGS) | set(TRANSLATED)) & set(constructor_arguments("pytorch_lightning.Trainer"))


# --------------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    "settings, machine, accelerator, devices, count",
    [
        ({"gpus": "0,1"}, TWO_GPUS, "cuda", [0, 1], 2),
        ({"gpus": "1,"}, TWO_GPUS, "cuda", [1], 1),
        ({"gpus": "2"}, TWO_GPUS, "cuda", [0, 1], 2),
        ({"gpus": 1}, TWO_GPUS, "cuda", [0], 1),
        ({"gpus": [1]}, TWO_GPUS, "cuda", [1], 1),
        ({"gpus": -1}, TWO_GPUS, "cuda", [0, 1], 2),
        ({"gpus": "0"}, TWO_GPUS, "cpu", 1, 1),
        ({"gpus": "0,"}, Machine(mps=True), "mps", [0], 1),
        ({}, NO_GPU, "cpu", 1, 1),
        ({}, TWO_GPUS, "cuda", [0], 1),
        ({"accelerator": "auto"}, Machine(mps=True), "mps", [0], 1),
        ({"accelerator": "gpu", "devices": 2}, TWO_GPUS, "cuda", [0, 1], 2),
        ({"accelerator": "gpu", "devices": "auto"}, TWO_GPUS, "cuda", [0, 1], 2),
        ({"accelerator": "gpu", "devices": "1,"}, TWO_GPUS, "cuda", [1], 1),
        ({"accelerator": "cpu", "devices": 2}, TWO_GPUS, "cpu", 2, 2),
        ({"gpus": "0,1", "accelerator": "gpu"}, TWO_GPUS, "cuda", [0, 1], 2),
    ],
)
def test_devices_are_indices_where_there_is_a_comma_and_a_count_otherwise(
    settings, machine, accelerator, devices, count
):
    chosen = choose_devices(settings, machine)
    assert (chosen.accelerator, chosen.devices, chosen.processes) == (accelerator, devices, count)


@pytest.mark.parametrize(
    "settings, machine, message",
    [
        ({"gpus": "0,2"}, TWO_GPUS, "--gpus 0,2: no GPU 2; this machine has 2 GPUs"),
        ({"gpus": "0,"}, NO_GPU, "--gpus 0,: no GPU 0; this machine has no GPU"),
        ({"gpus": "3"}, TWO_GPUS, "--gpus 3: this machine has 2 GPUs"),
        ({"gpus": "-1"}, NO_GPU, "this machine has no GPU"),
        ({"gpus": "0,0"}, TWO_GPUS, "given twice"),
        ({"gpus": "all"}, TWO_GPUS, "--gpus all: expected indices"),
        ({"gpus": "0,", "devices": 2}, TWO_GPUS, "one setting only"),
        ({"accelerator": "gpu"}, NO_GPU, "--accelerator gpu: this machine has no GPU"),
        ({"accelerator": "cpu", "devices": "0,1"}, NO_GPU, "number of processes"),
    ],
)
def test_devices_that_are_not_there_are_refused_in_one_line(settings, machine, message):
    with pytest.raises(ConfigError, match=message) as error:
        choose_devices(settings, machine)
    assert "\n" not in str(error.value)


def test_flags_for_devices_replace_those_of_a_yaml():
    lightning = OmegaConf.create({"trainer": {"accelerator": "ddp", "gpus": "0,1,2,3,", "benchmark": True}})
    settings = resolve_settings(RunOptions(base=("a",), trainer={"devices": "1", "accelerator": "cpu"}), lightning)
    assert choose_devices(settings.devices, NO_GPU).accelerator == "cpu" and settings.trainer == {"benchmark": True}
    assert settings.lightning.trainer == {"benchmark": True, "devices": "1", "accelerator": "cpu"}


# --------------------------------------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize("scale_lr, value", [(None, 3 * 2 * 4 * 1e-3), (True, 3 * 2 * 4 * 1e-3), (False, 1e-3)])
def test_learning_rate_is_accumulation_times_devices_times_batch_times_base(scale_lr, value):
    config = OmegaConf.merge(toy_config(), {"data": {"params": {"batch_size": 4}}})
    settings = resolve_settings(
        RunOptions(base=("a",), scale_lr=scale_lr, trainer={"accumulate_grad_batches": 3}), OmegaConf.create({})
    )
    assert learning_rate(config, settings, devices=2).value == pytest.approx(value)


@pytest.mark.parametrize("path", ["model.base_learning_rate", "data.params.batch_size"])
def test_a_missing_rate_or_batch_size_is_named(path):
    config = OmegaConf.create(toy_config())
    OmegaConf.update(config, path, None)
    with pytest.raises(ConfigError, match=path):
        learning_rate(config, resolve_settings(RunOptions(base=("a",)), OmegaConf.create({})), devices=1)


@pytest.mark.parametrize(
    "flag, yaml, scaled", [(None, None, True), (None, False, False), (True, False, True), (False, True, False)]
)
def test_scaling_comes_from_the_flag_then_the_yaml_then_is_on(flag, yaml, scaled):
    settings = resolve_settings(RunOptions(scale_lr=flag), OmegaConf.create({} if yaml is None else {"scale_lr": yaml}))
    assert settings.scale_lr is scaled and settings.lightning.scale_lr is scaled


def test_seed_comes_from_the_flag_then_the_yaml_then_is_23():
    assert resolve_settings(RunOptions(), OmegaConf.create({})).seed == 23
    assert resolve_settings(RunOptions(), OmegaConf.create({"seed": 4})).seed == 4
    assert resolve_settings(RunOptions(seed=0), OmegaConf.create({"seed": 4})).lightning.seed == 0


# ---------------------------------------------------------------------------------------------------------------- config


def test_configs_merge_left_to_right_and_overrides_come_last(yaml):
    first = yaml(toy_config(trainer={"max_epochs": 3}), "a.yaml")
    second = yaml({"model": {"params": {"width": 5}}, "data": {"params": {"batch_size": 8}}}, "b.yaml")
    config = configs.merge(
        [first, second], ["data.params.batch_size=16", "lightning.trainer.max_steps=7", "model.base_learning_rate=1e-5"]
    )
    check_config(config)
    assert config.model.params.width == 5 and config.data.params.batch_size == 16
    assert config.lightning.trainer == {"max_epochs": 3, "max_steps": 7} and config.model.base_learning_rate == 1e-5


@pytest.mark.parametrize(
    "override",
    [
        "model.params.monitor=x",  # a constructor's argument that no YAML sets
        "data.params.num_workers=0",
        "data.params.train.params.length=4",
        "lightning.callbacks.image_logger.params.batch_frequency=5",
        "lightning.modelcheckpoint.params.save_top_k=1",
        "lightning.seed=3",
        "+model.params.at.nothing.knows=1",
    ],
)
def test_an_override_may_be_new_where_something_takes_it(yaml, override):
    key, value = override.removeprefix("+").split("=")
    assert str(OmegaConf.select(configs.merge([yaml(toy_config())], [override]), key)) == value


@pytest.mark.parametrize(
    "override, meant",
    [
        ("model.params.widht=4", "model.params.width"),
        ("model.parms.width=4", "model.params.width"),
        ("modle.params.width=4", "model.params.width"),
        ("model.params.moniter=4", "model.params.monitor"),
        ("data.params.batchsize=4", "data.params.batch_size"),
        ("data.params.train.params.lenght=4", "data.params.train.params.length"),
        ("lightning.trainer.max_epoch=4", "lightning.trainer.max_epochs"),
        ("lightning.callbacks.image_loger.params.max_images=4", "lightning.callbacks.image_logger"),
        ("lightning.callbacks.image_logger.params.batch_frequenzy=4", "batch_frequency"),
        ("lightning.sed=4", "lightning.seed"),
    ],
)
def test_a_misspelt_override_is_refused_with_the_nearest_path(yaml, override, meant):
    with pytest.raises(ConfigError, match=f"did you mean {meant}" if "." in meant else meant):
        configs.merge([yaml(toy_config())], [override])


@pytest.mark.parametrize(
    "path",
    [
        "model.params.zzz",  # the constructor is known
        "model.prams",
        "data.params.train.zzz",
        "lightning.zzz",
        "lightning.trainer.zzz",
        "lightning.callbacks.zzz",
        "model.params.at.zzz",
    ],
)
def test_a_plus_is_advised_exactly_where_it_helps(yaml, path):
    """at: a mapping that no class describes, with something in it."""
    files = [yaml(OmegaConf.merge(toy_config(), {"model": {"params": {"at": {"3": "nan"}}}}))]
    with pytest.raises(ConfigError, match=f"has no {path.rpartition('.')[2]}") as error:
        configs.merge(files, [f"{path}=1"])
    helps = True
    try:
        check_config(configs.merge(files, [f"+{path}=1"]))
    except ConfigError:
        helps = False
    assert (f"+{path}=..." in str(error.value)) is helps


def test_the_help_shows_overrides_that_can_be(yaml):
    words = [word for line in EPILOG.splitlines()[:2] for word in line.split() if "=" in word]
    assert len(words) == 4
    config = configs.merge(
        [ROOT / "configs/recipes/class-conditional-folder.yaml"], [w for w in words if "ddconfig" not in w]
    )
    check_config(config, weights=False)
    get_obj_from_str(config.lightning.callbacks.timer.target)
    check_config(
        configs.merge([ROOT / "configs/recipes/autoencoder-folder.yaml"], [w for w in words if "ddconfig" in w]),
        weights=False,
    )


@pytest.mark.parametrize(
    "override, whole",
    [
        ("model.params.at.steps.1=5", r"model.params.at.steps=\[1,5,3\]"),
        ("+model.params.at.steps.1=5", r"model.params.at.steps=\[1,5,3\]"),
        ("model.params.at.steps.7=5", r"model.params.at.steps=\[1,2,3\]"),
        ("model.params.at.steps.1.x=5", r"model.params.at.steps=\[1,2,3\]"),
        ("model.params.at.nodes.0=5", "model.params.at.nodes is a list; give the whole list$"),
    ],
)
def test_an_item_of_a_list_is_refused_with_the_whole_list(yaml, override, whole):
    files = [
        yaml(OmegaConf.merge(toy_config(), {"model": {"params": {"at": {"steps": [1, 2, 3], "nodes": [{"a": 1}]}}}}))
    ]
    with pytest.raises(ConfigError, match=f"{re.escape(override)}: .* is a list; give the whole list.*") as error:
        configs.merge(files, [override])
    assert re.search(whole, str(error.value))


@pytest.mark.parametrize("override", ["data.params.batch_size.x=3", "model.params.width=[1,", "model.params.zzz=1"])
def test_an_override_that_cannot_be_is_refused_in_one_line(yaml, override):
    with pytest.raises(ConfigError, match=override.split("=")[0]) as error:
        configs.merge([yaml(toy_config())], [override])
    assert "\n" not in str(error.value)


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
            "data.params.train.params.size: tests.toys.Pictures takes no such",
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
            r"has no 'AutoencoderLK'; did you mean 'AutoencoderKL'\?",
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
        ({"model": {"params": {"at": [{"target": "builtins.eval"}]}}}, r"model.params.at\[0\].target: .*not allowed"),
    ],
)
def test_wrong_keys_of_a_yaml_are_found_before_anything_is_imported(yaml, change, message):
    config = OmegaConf.merge(toy_config(), change)
    with pytest.raises(ConfigError, match=message) as error:
        check_config(configs.merge([yaml(config)]))
    assert "\n" not in str(error.value)


def test_an_argument_may_be_called_target():
    params = {"target": "my.own", "loss": {"target": "eps", "weight": 1}, "head": {"target": "torch.nn.Identity"}}
    check_targets({"model": {"target": "torch.nn.Identity", "params": params}})
    with pytest.raises(ConfigError, match=r"model.params.head.target: target 'os.system' is not allowed"):
        check_targets({"model": {"target": "torch.nn.Identity", "params": params | {"head": {"target": "os.system"}}}})


@pytest.mark.parametrize(
    "file, advice",
    [
        ("gone.ckpt", "add it, or choose another with {place}=FILE"),
        ("models/first_stage_models/kl-f8/model.ckpt", "download it: bash scripts/download_first_stages.sh"),
        ("models/ldm/cin256/model.ckpt", "download it: bash scripts/download_models.sh"),
        ("models/ldm/stable-diffusion-v1/model.ckpt", "add it"),
        ("models/ldm/mine/model.ckpt", "it is in {root}: run from there"),
    ],
)
def test_weights_that_are_not_there_are_named_with_where_they_come_from(file, advice, tmp_path, monkeypatch):
    """In a checkout with the configs of the released models and with one file of weights, whatever this one holds."""
    root = tmp_path / "checkout"
    for name in ("first_stage_models/kl-f8/config.yaml", "ldm/cin256/config.yaml", "ldm/mine/model.ckpt"):
        (root / "models" / name).parent.mkdir(parents=True)
        (root / "models" / name).touch()
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


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1,\n", "a: 1\na: 2\n", "\x00"])
def test_a_file_that_is_no_config_is_named(yaml, content):
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        check_config(configs.merge([yaml(content)]))


def test_a_missing_config_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"did you mean configs/autoencoder/autoencoder_kl_32x32x4\.yaml"):
        configs.find_config("configs/autoencoder/autoencoder_kl_32x32.yaml")


def test_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.find_config("configs/autoencoder/autoencoder_kl_32x32x4.yaml").is_file()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT).with_suffix("")))
def test_every_shipped_config_passes_the_check(path):
    config = OmegaConf.merge(
        {"data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 1}}}, configs.merge([path])
    )
    check_config(config, weights=False)


def test_every_target_of_the_shipped_configs_is_a_class_that_can_be_imported():
    targets = set()
    for path in SHIPPED:
        targets |= set(re.findall(r"^\s*target: *([\w.]+)", path.read_text(), re.MULTILINE))
    assert len(targets) > 40 and all(inspect.isclass(get_obj_from_str(target)) for target in targets)


# ------------------------------------------------------------------------------------------------------------ signatures


@pytest.mark.parametrize(
    "target",
    [
        "tests.toys.Toy",
        "tests.toys.ToyGan",
        "main.DataModuleFromConfig",
        "main.ImageLogger",
        "ldm.callbacks.CheckpointPolicy",
        "ldm.models.autoencoder.AutoencoderKL",
        "ldm.models.diffusion.ddpm.LatentDiffusion",
        "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "pytorch_lightning.callbacks.ModelCheckpoint",
        "torch.optim.AdamW",
    ],
)
def test_constructors_read_as_text_agree_with_the_imported_ones(target):
    names = constructor_arguments(target)
    accepted = accepted_params(get_obj_from_str(target))
    assert names is not None and accepted is not None and set(names) == accepted[0]


@pytest.mark.parametrize(
    "target", ["nowhere.Nothing", "ldm.util.Nothing", "ldm", "tests.toys.nn", "torch.nn.Sequential"]
)
def test_a_constructor_that_the_text_does_not_tell_is_left_to_the_import(target):
    assert constructor_arguments(target) is None


# ------------------------------------------------------------------------------------------------------------ run folders


def test_run_folder_is_time_name_postfix(tmp_path):
    options = RunOptions(base=("configs/my-model.yaml",), logdir=str(tmp_path))
    assert new_run(options, "T").path == tmp_path / "T_my-model"
    named = RunOptions(name="x", postfix="_p", base=("a.yaml",), logdir=str(tmp_path), project="group")
    assert new_run(named, "T").path == tmp_path / "group" / "T_x_p"
    assert new_run(RunOptions(name="x", debug=True, logdir=str(tmp_path)), "T").path == tmp_path / "debug_runs" / "T_x"


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    options = RunOptions(name="x", logdir=str(tmp_path))
    new_run(options, "T").path.mkdir()
    assert new_run(options, "T").path == tmp_path / "T_x-2"


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", "..", "a\0b", "x" * 300, "a\\b"])
@pytest.mark.parametrize("flag", ["name", "postfix", "project"])
def test_run_folders_stay_in_the_log_folder(flag, name, tmp_path):
    with pytest.raises(ConfigError, match=f"--{flag}"):
        new_run(RunOptions(base=("a.yaml",), logdir=str(tmp_path), **{flag: name}))


def test_a_run_is_resumed_from_its_folder_or_from_a_file_two_levels_below(tmp_path):
    run = tmp_path / "logs" / "T_x"
    for folder in ("checkpoints", "configs"):
        (run / folder).mkdir(parents=True)
    for name in ("2-project.yaml", "1-project.yaml", "1-lightning.yaml"):
        (run / "configs" / name).write_text("{}")
    (run / "checkpoints" / "last.ckpt").touch()
    assert resumed_run(str(run) + "/").path == run and resumed_run(str(run)).checkpoint is None
    from_file = resumed_run(str(run / "checkpoints" / "last.ckpt"))
    assert from_file.path == run and from_file.checkpoint == run / "checkpoints" / "last.ckpt"
    assert [path.name for path in saved_configs(from_file)] == ["1-lightning.yaml", "1-project.yaml", "2-project.yaml"]


def test_a_resume_that_finds_nothing_says_what_is_there(tmp_path):
    (tmp_path / "T_x" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"the newest run in .* is T_x"):
        resumed_run(str(tmp_path / "T_y"))
    (tmp_path / "lone.ckpt").touch()
    with pytest.raises(ConfigError, match="is not a run directory"):
        resumed_run(str(tmp_path / "lone.ckpt"))


# ------------------------------------------------------------------------------------------------------------- lightness


def test_help_and_refusals_import_neither_torch_nor_lightning(yaml):
    code = (
        "import sys, main\n"
        "for words in sys.argv[1:]:\n"
        "    assert main.main(words.split()) == (0 if words == '--help' else 2), words\n"
        "assert not {'torch', 'pytorch_lightning', 'transformers', 'torchvision'} & set(sys.modules)\n"
    )
    words = ["--help", "-b nowhere.yaml", "-b a --max_epoch 3", f"-b {yaml(toy_config())} -t model.params.widht=3"]
    words += [
        "-t -b configs/recipes/class-conditional-folder.yaml model.params.first_stage_config.params.ckpt_path=gone.ckpt"
    ]
    words += ["-t -b configs/recipes/class-conditional-folder.yaml model.target=os.system"]
    result = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("error: ") == 5 and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "n_classes, dropout, advice", [(3, 0.0, "4 classes; .*n_classes=4"), (4, 0.1, '"no class".*n_classes=5')]
)
def test_a_class_embedder_has_room_for_every_class_and_for_none(n_classes, dropout, advice):
    """With dropout the last class means none: a class of the data there would be trained as if it were no condition at all."""

    def config(n):
        stage = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"n_classes": n, "embed_dim": 8}}
        return OmegaConf.create({"model": {"params": {"cond_dropout": dropout, "cond_stage_config": stage}}})

    datasets = {"train": SimpleNamespace(class_names=["ape", "emu", "owl", "tench"]), "validation": SimpleNamespace()}
    with pytest.raises(ConfigError, match=f"n_classes {n_classes}: data.params.train .*{advice}"):
        check_class_count(config(n_classes), datasets)
    check_class_count(config(n_classes + 1), datasets)
    check_class_count(OmegaConf.create({"model": {"params": {"cond_stage_config": "__is_first_stage__"}}}), datasets)


def test_a_config_is_proposed_only_where_its_name_is_like_the_one_given():
    with pytest.raises(ConfigError, match=r"did you mean environment\.yaml\?"):
        configs.find_config("enviroment.yaml")
    with pytest.raises(ConfigError, match=r"no such file here or in [^;]*$"):
        configs.find_config("nosuch.yaml")
