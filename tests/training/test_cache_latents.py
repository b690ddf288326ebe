"""Cached latents and embeddings: training on them is training on the images, and they belong to their stages."""

import csv
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import default_collate

import main
from ldm.checkpoint import CheckpointError, read_checkpoint, write_weights
from ldm.config.instantiate import instantiate_from_config
from ldm.config.merge import merge
from ldm.config.validate import check_config
from ldm.data import shards
from ldm.data.base import DataConfigError
from ldm.data.latents import CachedLatents, read_index, use_cached_stages
from ldm.data.mixture import Mixture
from ldm.data.order import SeededDataset
from ldm.models.cached import LATENT, MOMENTS, CachedEncoder, CachedFirstStage, CachedStage
from ldm.rng import preserve_rng
from ldm.training.cache_latents import CacheOptions, _Encoder, cache_latents
from scripts import cache_latents as script
from tests.data.layouts import save_image, save_shards
from tests.test_main import folder_of, last
from tests.tiny import FIRST_STAGE, UNET, save_text_model

# f = 2, few weights.
STAGE = {**FIRST_STAGE["params"], "ddconfig": {**FIRST_STAGE["params"]["ddconfig"], "ch_mult": [1, 1]}}
MODEL = {
    "unet_config": {**UNET, "params": {**UNET["params"], "channel_mult": [1], "attention_resolutions": []}},
    "first_stage_config": {**FIRST_STAGE, "params": STAGE},
    **{"cond_stage_trainable": False, "cond_dropout": 0.4, "timesteps": 8, "image_size": 4},
}
QUIET = ["lightning.callbacks.image_logger=null", "lightning.callbacks.cuda_callback=null"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with images of several captions, a YAML, a checkpoint, and a cache of two variants in float32."""
    folder = tmp_path_factory.mktemp("cached")
    for number in range(4):
        save_image(folder / "images" / "train" / f"{number}.png", number)
        save_image(folder / "images" / "val" / f"{number}.png", 10 + number)
        for split in ("train", "val"):
            (folder / "images" / split / f"{number}.txt").write_text(f"image {number}\nnumber {number}\n")
    saved = save_text_model(folder, **MODEL)
    config = OmegaConf.load(saved.config)
    config.model.base_learning_rate = 1e-3
    config.model.params.ckpt_path = str(saved.ckpt)
    params = {"root": str(folder / "images"), "size": 8, "captions": "sidecar", "flip_p": 0.5, "random_crop": True}
    folders = {
        split: {"target": "ldm.data.folder.ImageFolder", "params": {**params, "split": split}}
        for split in ("train", "validation")
    }
    config.data = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "num_workers": 0, **folders}}
    config.lightning = {
        "scale_lr": False,
        "trainer": {"max_steps": 4, "accelerator": "cpu", "num_sanity_val_steps": 0, "log_every_n_steps": 1},
    }
    OmegaConf.save(config, folder / "run.yaml")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        assert cache("--variants", "2") == 0
    return folder


@pytest.fixture(autouse=True)
def inside(here, monkeypatch):
    monkeypatch.chdir(here)


def cache(*words, out="cache", base="run.yaml"):
    flags = ["--base", base, "--out", out, "--dtype", "float32", "--num_workers", "0", "--batch_size", "4"]
    return script.run_command(script.main, [*flags, "--device", "cpu", *words])


def train(name, *words, base=("run.yaml",)):
    assert main.main(["-b", *base, "-t", "-n", name, *words]) == 0
    return folder_of(name)


def losses(folder, key="train/loss_step"):
    with (folder / "csv" / "metrics.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


def model_of(*files):
    return instantiate_from_config(use_cached_stages(merge([Path(file) for file in files])))


def batch_of(dataset, indices=(0, 1, 2), epoch=0):
    return default_collate([SeededDataset(dataset, 23)[(epoch, index)] for index in indices])


def refusal(*words, **options):
    """Return the one line of a refused command."""
    with pytest.raises(ValueError) as error:
        script.main(["--base", "run.yaml", "--out", "cache", "--dtype", "float32", "--num_workers", "0", *words])
    return str(error.value)


def test_the_loss_on_a_cache_is_the_loss_on_the_images_of_the_same_draws(here, monkeypatch):
    online = train("online", *QUIET)
    for stage in (CachedFirstStage, CachedEncoder):  # training builds neither
        monkeypatch.setattr(stage, "stage", None)
    cached = train("cached", "lightning.trainer.max_steps=2", *QUIET, base=("run.yaml", "cache/data.yaml"))
    assert main.main(["-r", str(cached), "-t", "--max_steps", "4"]) == 0
    assert len(set(losses(online))) == 4
    assert losses(cached) == pytest.approx(losses(online), rel=1e-5)
    for key in ("val/loss", "val/loss_ema"):
        assert losses(cached, key) == pytest.approx(losses(online, key), rel=1e-5)
    before, after = last(online)["state_dict"], last(cached)["state_dict"]
    assert before.keys() == after.keys()  # complete: txt2img.py needs no other file
    assert all(torch.equal(before[name], after[name]) for name in before if "_stage_model." in name)
    assert all(torch.allclose(before[name], after[name], rtol=1e-3, atol=1e-5) for name in before)


def test_the_doctor_finds_nothing_wrong_with_a_cache(here):
    assert main.main(["-b", "run.yaml", "cache/data.yaml", "-t", "--doctor", *QUIET]) == 0


def test_each_epoch_has_its_variant_and_validation_the_first(here):
    data, images = CachedLatents("cache/train"), instantiate_from_config(merge([Path("run.yaml")]).data)
    images.setup()
    for epoch in (0, 1, 2, 5):
        cached, online = batch_of(data, epoch=epoch), batch_of(images.datasets["train"], epoch=epoch % 2)
        assert cached["caption"] == online["caption"] and cached["file_path_"] == online["file_path_"]
    assert not torch.equal(batch_of(data, epoch=0)[MOMENTS], batch_of(data, epoch=1)[MOMENTS])
    assert (
        read_index(Path("cache/validation"))["variants"] == 1
        and data.fingerprint == images.datasets["train"].fingerprint
    )


def test_the_image_log_builds_the_stages_of_the_cache(here):
    model = model_of("run.yaml", "cache/data.yaml").eval()
    log = model.log_images(batch_of(CachedLatents("cache/train")), N=2, ddim_steps=2, plot_denoise_rows=False)
    assert log["inputs"].shape == log["reconstruction"].shape == (2, 3, 8, 8) and "conditioning" in log
    whole = instantiate_from_config(merge([Path("run.yaml")]).model).eval()
    z = torch.randn(1, 4, 4, 4)
    assert torch.equal(model.decode_first_stage(z), whole.decode_first_stage(z))
    assert torch.equal(model.get_learned_conditioning(["new"]), whole.get_learned_conditioning(["new"]))
    assert torch.equal(model.get_unconditional_conditioning(2), whole.get_unconditional_conditioning(2))
    assert not any(True for _ in model.first_stage_model.parameters())


@pytest.mark.parametrize("stage", ["first_stage", "cond_stage"])
def test_weights_of_another_stage_are_refused_by_name(here, tmp_path, stage):
    model = model_of("run.yaml", "cache/data.yaml")
    state = model.state_dict()
    name = next(key for key in state if key.startswith(f"{stage}_model."))
    model.load_state_dict({**state, name: state[name].half()})  # the same in half precision
    with pytest.raises(CheckpointError, match=f"cache was made with another {stage}, .* make a new cache"):
        model.load_state_dict({**state, name: state[name] + 1})
    changed = OmegaConf.load("run.yaml")
    OmegaConf.update(changed, "model.params.ckpt_path", None)
    file = tmp_path / "own.ckpt"
    prefix = f"{stage}_model."
    own = {key.removeprefix(prefix): x + 1 for key, x in state.items() if key.startswith(prefix)}
    torch.save({"state_dict": own}, file)
    if stage == "first_stage":
        changed.model.params.first_stage_config.params.ckpt_path = str(file)
    else:
        changed.model.params.cond_stage_config.params.n_layer = 2
    OmegaConf.save(changed, tmp_path / "changed.yaml")
    with pytest.raises(ValueError, match=f"another {stage}|{stage}_config.params.n_layer 2: .* made with 1"):
        model_of(tmp_path / "changed.yaml", "cache/data.yaml")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"channels": 8}, "its latents have 4 channels, the model 8"),
        ({"unet_config.params.channel_mult": [1, 1, 1, 1]}, "images of 8x8 pixels .* needs multiples of 16"),
        (
            {"cond_stage_key": "human_label"},
            "embeddings of 'caption', but model.params.cond_stage_key is 'human_label'",
        ),
        ({"cond_stage_trainable": True}, "cond_stage_trainable needs the text encoder"),
        ({"cond_stage_forward": "unconditional_input"}, "cond_stage_forward needs the text encoder"),
        ({"token_embeddings": {"token": "sks", "init": "cat"}}, "token_embeddings needs the text encoder"),
        ({"adapters": {"targets": ["attention", ".*to_q"]}}, "adapters.targets needs the text encoder"),
    ],
)
def test_a_model_that_needs_more_than_the_cache_has_is_refused(here, changes, message):
    config = merge([Path("run.yaml"), Path("cache/data.yaml")])
    for path, value in changes.items():
        OmegaConf.update(config, f"model.params.{path}", value, force_add=True)
    with pytest.raises(ValueError, match=rf"^data.params.train.params.root \S+/cache/train: .*{message}"):
        use_cached_stages(config)


def test_adapters_of_the_unet_alone_use_cached_embeddings(here):
    config = merge([Path("run.yaml"), Path("cache/data.yaml")])
    config.model.params.adapters = {"targets": ["attention", "feed_forward", r"unet\.out\..*"]}
    assert "CachedEncoder" in use_cached_stages(config).params.cond_stage_config.target


def test_a_cache_beside_images_or_without_its_stages_is_refused(here, tmp_path):
    shutil.copytree("cache", tmp_path / "cache")
    config = merge([Path("run.yaml"), Path("cache/data.yaml")])
    config.data.params.validation = OmegaConf.load("run.yaml").data.params.validation
    with pytest.raises(ValueError, match=r"params.validation: encodes images, but data.params.train is a cache"):
        use_cached_stages(config)
    config.data.params.validation = None
    config.data.params.train.params.root = str(tmp_path / "cache" / "train")
    stage = tmp_path / "cache" / "first_stage.safetensors"
    shutil.copy(tmp_path / "cache" / "cond_stage.safetensors", stage)
    with pytest.raises(ValueError, match=r"first_stage\.safetensors: is not of this cache; run the same command"):
        use_cached_stages(config)
    stage.unlink()
    with pytest.raises(ValueError, match=r"first_stage\.safetensors: no such file; run the same command"):
        use_cached_stages(config)


def test_a_dataset_that_was_edited_after_it_was_cached_is_reported(here, caplog):
    files, edited = [Path("run.yaml"), Path("cache/data.yaml")], OmegaConf.load("run.yaml")
    with caplog.at_level(logging.WARNING, "ldm"):
        before = merge(files)
        assert not caplog.messages
        edited.data.params.train.params.size = 16
        del edited.data.params.validation.params.flip_p
        OmegaConf.save(edited, "edited.yaml")
        assert merge([Path("edited.yaml"), files[1]]).data == before.data
    problems = ["train.params.size: is 16", "validation.params.flip_p: is default"]
    assert [message.partition(", but")[0].split(" ", 1)[1].strip() for message in caplog.messages] == [
        f"data.params.{problem}" for problem in problems
    ]


def test_another_command_for_the_same_folder_is_refused_by_name(here, tmp_path):
    assert "is another cache, --variants 2 there, 1 here; delete it or choose another folder" in refusal()
    assert "dataset.params.size 8 there, 16 here;" in refusal(
        "--variants", "2", "data.params.train.params.size=16", "model.params.image_size=8"
    )
    state = read_checkpoint("tiny.ckpt")["state_dict"]
    state["first_stage_model.quant_conv.bias"] += 1
    torch.save({"state_dict": state}, tmp_path / "other.ckpt")
    other = f"model.params.ckpt_path={tmp_path}/other.ckpt"
    assert "was made with another first_stage" in refusal("--variants", "2", other)


def test_the_last_line_of_the_log_counts_what_is_cached_and_a_trained_encoder_is_named(here, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ldm"):
        assert cache("--variants", "2") == 0  # complete already
        trained = "model.params.cond_stage_trainable=true"
        assert cache(trained, out=str(tmp_path)) == 0
    done = [message for message in caplog.messages if " MiB, " in message]
    assert re.match(
        r"cache: train \(\d+ images, 2 variants, \d+ captions\), validation \(.*\); [\d.]+ MiB, [\d.]+ s$", done[0]
    )
    assert "captions)" not in done[1] and f"{trained.split('=')[0]} needs the text encoder" in caplog.text


def test_an_interrupted_cache_is_refused_and_continues_to_the_same_files(here, tmp_path, monkeypatch):
    config = merge([Path("run.yaml")])

    def build(out, **options):
        cache_latents(config, CacheOptions(out, 23, 2, 2, 0, "cpu", shard=3, text_shard=2, **options))

    build(tmp_path / "whole")
    written = []

    def write(tensors, path, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return write_weights(tensors, path, *args)

    monkeypatch.setattr("ldm.training.cache_latents.write_weights", write)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "stopped")
    with pytest.raises(DataConfigError, match="not complete; run the same command"):
        CachedLatents(tmp_path / "stopped" / "train")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    with pytest.raises(ValueError, match="precision 'float32' there, 'bfloat16' here"):
        build(tmp_path / "stopped", precision="bf16")
    build(tmp_path / "stopped")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    files = sorted(file.relative_to(whole) for file in whole.rglob("*.safetensors"))
    assert files == sorted(file.relative_to(stopped) for file in stopped.rglob("*.safetensors"))
    assert len(files) > 8 and len(list((whole / "train").glob("0*.safetensors"))) == 3
    assert all((whole / file).read_bytes() == (stopped / file).read_bytes() for file in files if file.parent.name)
    assert (whole / "train" / "index.json").read_bytes() == (stopped / "train" / "index.json").read_bytes()
    assert len(CachedLatents(stopped / "train")) == 4


def test_files_that_are_missing_damaged_or_of_changed_images_are_written_again(here, tmp_path):
    config, folder = merge([Path("run.yaml")]), tmp_path / "cache" / "train"
    shutil.copytree("images/train", tmp_path / "images")
    config.data.params.validation = None
    config.data.params.train.params.update({"root": str(tmp_path / "images"), "split": None})

    def build():
        """Cache the images -> the names of the files that were written, and the latents."""
        before = {file: file.stat().st_mtime_ns for file in folder.glob("*")}
        cache_latents(config, CacheOptions(tmp_path / "cache", 23, 1, 8, 0, "cpu", shard=1, text_shard=2))
        written = {file.name for file in folder.iterdir() if file.stat().st_mtime_ns != before.get(file)}
        return written - {"index.json"}, [CachedLatents(folder)[n][MOMENTS] for n in range(4)]

    written, latents = build()
    assert len(written) == 4 + 2 and build()[0] == set()
    (folder / "text-00000.safetensors").write_bytes(b"")
    assert build()[0] == {"text-00000.safetensors"}
    save_image(tmp_path / "images" / "0.png", 99)
    (folder / "00001.safetensors").unlink()
    written, again = build()
    assert written == {"00000.safetensors", "00001.safetensors"}
    assert [torch.equal(x, y) for x, y in zip(latents, again, strict=True)] == [False, True, True, True]
    (tmp_path / "images" / "1.txt").write_text("other\n")
    with pytest.raises(ValueError, match="the labels of its dataset have changed; delete it or choose another folder"):
        build()


def test_latents_that_are_not_finite_are_refused_by_the_name_of_their_image(here, tmp_path, monkeypatch):
    moments = torch.zeros(4, 8, 4, 4)
    moments[2, 5] = torch.tensor(1e6)  # infinite in 16 bits
    monkeypatch.setattr(_Encoder, "encode_images", lambda self, x: (MOMENTS, moments[: len(x)]))
    with pytest.raises(ValueError, match=r"images/train/2.png: is encoded to values that are not finite"):
        cache_latents(merge([Path("run.yaml")]), CacheOptions(tmp_path, 23, 1, 8, 0, "cpu", text=False))


def test_a_cache_of_published_shards_replaces_their_data_module_and_has_their_order(here, tmp_path):
    config = OmegaConf.load("run.yaml")
    config.model.params.update({"first_stage_key": "png", "cond_stage_key": "txt"})
    params = {"tar_base": str(tmp_path), "batch_size": 2, "num_workers": 0}
    split = {"shards": "{00000..00002}.tar", "image_key": "png", "shuffle": 9}
    split["image_transforms"] = [{"target": "torchvision.transforms.CenterCrop", "params": {"size": 8}}]
    save_shards(tmp_path)
    config.data = {"target": "ldm.data.laion.WebDataModuleFromConfig", "params": {**params, "train": split}}
    OmegaConf.save(config, tmp_path / "web.yaml")
    assert cache("--no-text", base=str(tmp_path / "web.yaml"), out=str(tmp_path / "cache")) == 0
    trained = merge([tmp_path / "web.yaml", tmp_path / "cache" / "data.yaml"])
    check_config(trained)
    online, cached = (instantiate_from_config(each.data) for each in (config, trained))
    online.setup()
    cached.setup()
    images, latents = online.datasets["train"], cached.datasets["train"]
    assert cached.batch_size == 2 and cached.num_workers == 0 and isinstance(latents, CachedLatents)
    for epoch in (0, 1):
        order = images.order(23, epoch, 2, True)
        assert order.tolist() == latents.order(23, epoch, 2, True).tolist() != sorted(order)
        assert [images.key(n) for n in order] == [latents[n]["__key__"] for n in order]


def test_numbers_of_samples_keep_their_dtypes(here, tmp_path):
    config = merge([Path("run.yaml")])
    folder = OmegaConf.to_container(config.data.params.train)
    config.data.params.validation = None
    config.data.params.train = {
        "target": "ldm.data.dreambooth.DreamBooth",
        "params": {"instance": folder, "prior": folder, "prior_weight": 0.3},
    }
    cache_latents(config, CacheOptions(tmp_path, 23, 1, 8, 0, "cpu", text=False))
    with preserve_rng():
        images = instantiate_from_config(config.data.params.train)
        cached, online = batch_of(CachedLatents(tmp_path / "train")), batch_of(images)
    assert cached["loss_weight"].dtype == online["loss_weight"].dtype == torch.float32
    assert torch.equal(cached["loss_weight"], online["loss_weight"])


def test_latents_without_texts_keep_the_text_encoder_and_16_bits_half_the_size(here):
    config = merge([Path("run.yaml")])
    out = Path("latents")
    cache_latents(config, CacheOptions(out, 23, 1, 8, 0, "cpu", dtype="float16", text=False))
    model = model_of("run.yaml", "latents/data.yaml").eval()
    assert isinstance(model.first_stage_model, CachedFirstStage) and not isinstance(model.cond_stage_model, CachedStage)
    batch, exact = batch_of(CachedLatents("latents/train")), batch_of(CachedLatents("cache/train"))
    assert batch[MOMENTS].dtype == torch.float16 and torch.allclose(batch[MOMENTS].float(), exact[MOMENTS], atol=2e-3)
    z, c = model.get_input(batch, "image")
    assert z.shape == (3, 4, 4, 4) and torch.equal(c, model.get_learned_conditioning(batch["caption"]))


def test_latents_of_a_vq_stage_have_no_noise_in_any_split(here, tmp_path):
    config = merge([Path("run.yaml")])
    config.data.params.test = config.data.params.validation
    stage = OmegaConf.to_container(config.model.params.first_stage_config)
    stage["target"] = "ldm.models.autoencoder.VQModelInterface"
    stage["params"] |= {"n_embed": 8}
    stage["params"]["ddconfig"]["double_z"] = False
    vq = save_text_model(tmp_path, **{**MODEL, "first_stage_config": stage})
    config.model = OmegaConf.load(vq.config).model
    config.model.params.ckpt_path = str(vq.ckpt)
    overlay = cache_latents(config, CacheOptions(tmp_path / "vq", 23, 1, 8, 0, "cpu", dtype="float32"))
    config = OmegaConf.merge(config, {"data": {"params": {"train": None, "validation": None}}})
    config = merge([overlay], onto=config)
    model = instantiate_from_config(use_cached_stages(config)).eval()
    for split in ("train", "validation", "test"):
        batch = batch_of(instantiate_from_config(config.data.params[split]))
        assert batch[LATENT].shape == (3, 4, 4, 4)
        assert torch.equal(model.get_input(batch, "image")[0], model.scale_factor * batch[LATENT])


def test_a_first_stage_from_its_own_file_gives_the_same_latents(here, tmp_path):
    prefix, state = "first_stage_model.", read_checkpoint("tiny.ckpt")["state_dict"]
    stage = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    torch.save({"state_dict": stage}, tmp_path / "stage.ckpt")
    own = f"model.params.first_stage_config.params.ckpt_path={tmp_path}/stage.ckpt"
    words = ["--variants", "2", "model.params.ckpt_path=null", "model.params.cond_stage_trainable=true", own]
    assert cache(*words, out=str(tmp_path / "own")) == 0
    before, now = (CachedLatents(folder / "train")[0][MOMENTS] for folder in (here / "cache", tmp_path / "own"))
    assert torch.equal(before, now)


def test_a_cache_is_no_part_of_a_mixture_and_a_mixture_is_not_cached(here):
    part = {"target": "ldm.data.latents.CachedLatents", "params": {"root": "cache/train"}}
    with pytest.raises(DataConfigError, match=r"datasets\[0\] .* a cache cannot be part of another dataset"):
        Mixture([part, part])
    images = OmegaConf.to_container(OmegaConf.load("run.yaml").data.params.train)
    mixed = OmegaConf.create({"data": {"params": {"train": {"_replace_": True, "target": "ldm.data.mixture.Mixture"}}}})
    mixed.data.params.train.params = {"datasets": [images]}
    OmegaConf.save(mixed, "mixed.yaml")
    assert "data.params.train: a Mixture cannot be cached" in refusal("--base", "mixed.yaml")


def test_seeds_folders_and_indices_that_cannot_be_used_are_refused(here, tmp_path):
    assert "--seed 4294967296: expected an integer from 0 to 4294967295" in refusal("--seed", str(1 << 32))
    assert "run.yaml/cache is a file or inside one" in refusal("--out", "run.yaml/cache")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "index.json").write_text('{"format": 2}')
    with pytest.raises(DataConfigError, match=r"its index\.json is not of version 2 of the cache; make it"):
        CachedLatents(tmp_path / "train")
    problem = "its index.json is not of version 2 of the cache; delete it or choose another folder"
    assert f"train: {problem}" in refusal("--out", str(tmp_path))


def test_a_flag_allows_commands_that_write_shards(here, monkeypatch, capsys):
    monkeypatch.setattr(shards, "_pipes_allowed", False)
    monkeypatch.setattr("ldm.training.cache_latents.cache_latents", lambda *_: shards._pipes_allowed)
    for words, allowed in (((), "False"), (("--allow-pipe",), "True")):
        assert cache(*words, out="none") == 0 and allowed in capsys.readouterr().out


def test_what_a_cache_cannot_hold_is_refused_by_name(here):
    depth = ["data.params.train.target=ldm.data.control.ControlFolder", "+data.params.train.params.detector=canny"]
    assert "samples have 'hint', a " in refusal(*depth, "data.params.train.params.random_crop=false")
    assert "condition cannot be cached" in refusal("model.params.cond_stage_config=__is_first_stage__")


def test_a_cache_of_buckets_has_their_batches_and_the_same_latents(here, tmp_path):
    for number, (height, width) in enumerate([(16, 32), (32, 16), (24, 24), (16, 32), (32, 16), (40, 40), (20, 30)]):
        save_image(tmp_path / "images" / f"{number}.png", number, height, width)
    config = merge([Path("run.yaml")])
    train = config.data.params.train.params
    config.data.params.validation = None
    train.update({"root": str(tmp_path / "images"), "split": None, "captions": None, "subject": "a b", "size": 24})
    train.buckets = {"step": 8}
    cache_latents(config, CacheOptions(tmp_path / "cache", 23, 1, 3, 0, "cpu", dtype="float32", shard=4))
    images = instantiate_from_config(config.data)
    images.setup()
    cached, online = CachedLatents(tmp_path / "cache" / "train"), images.datasets["train"]
    model = instantiate_from_config(config.model).eval()
    order = online.order(5, 1, 2, True)
    assert order.tolist() == cached.order(5, 1, 2, True).tolist()
    shapes = set()
    for k in range(0, 7, 2):
        batch, pictures = batch_of(cached, order[k : k + 2].tolist()), batch_of(online, order[k : k + 2].tolist())
        posterior = model.encode_first_stage(model.get_images(pictures, "image"))
        assert torch.allclose(batch[MOMENTS], torch.cat([posterior.mean, posterior.logvar], 1), atol=1e-5)
        for key in ("original_size", "crop_top_left", "target_size"):
            assert torch.equal(batch[key], pictures[key])
        shapes.add(tuple(batch[MOMENTS].shape[2:]))
        assert model.shared_step(batch)[0].isfinite()
    assert len(shapes) > 1 and cached.fingerprint == online.fingerprint and "buckets" in cached.fingerprint
    cached.set_batch(1)
    with pytest.raises(DataConfigError, match=r"batches of 2 samples or its divisors, not of 4; make a cache"):
        cached.set_batch(4)
