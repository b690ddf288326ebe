"""scripts/sample_conditional.py as a user runs it, on runs of every kind of condition."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.cli import run_command
from ldm.data.image import from_tensor
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.output.images import read_metadata
from ldm.paths import ROOT
from scripts.sample_conditional import main
from tests.scripts.refusals import help_without_heavy_imports, refused
from tests.tiny import CAPTIONS, UNET, SavedModel, save_model

RESCALER = {"target": "ldm.modules.encoders.modules.SpatialRescaler"}


def unet(**changes) -> dict:
    return {"target": UNET["target"], "params": {**UNET["params"], **changes}}


def dataset(kind: str, **params) -> dict:
    return {"target": f"ldm.data.{kind}", "params": {"size": 32, **params}}


PAIRS = {"min_crop_f": 1.0, "degradation": "pil_box", "captions": "sidecar"}
MAPS = {"target": "tests.scripts.test_sample_conditional.Maps"}
MODELS = {  # {name: (kind of the model, changes, dataset)}
    "text": ("text", {}, dataset("folder.ImageFolder", captions="sidecar")),
    "class": ("class", {}, dataset("folder.ImageFolder", class_labels=True)),
    "inpainting": ("inpaint", {"concat_keys": ["mask"]}, dataset("inpainting.Inpainting")),
    "super-resolution": ("upscale", {}, dataset("superres.SuperResolution", **PAIRS)),
    "rescaled image": (
        "upscale",
        {"cond_stage_key": "image", "cond_stage_config": {**RESCALER, "params": {"n_stages": 2}}},
        dataset("folder.ImageFolder"),
    ),
    "segmentation": (
        "upscale",
        {
            "cond_stage_key": "map",
            "cond_stage_config": {**RESCALER, "params": {"n_stages": 2, "in_channels": 5, "out_channels": 3}},
        },
        MAPS,
    ),
    "hybrid": (  # text and a low-resolution image
        "text",
        {"conditioning_key": "hybrid", "concat_keys": ["LR_image"], "unet_config": unet(in_channels=7)},
        dataset("superres.SuperResolution", **PAIRS),
    ),
    "adm": (
        "class",
        {
            "conditioning_key": "adm",
            "cond_stage_config": {"target": "torch.nn.Identity"},
            "cond_stage_trainable": False,
            "unet_config": unet(num_classes=3, use_spatial_transformer=False, context_dim=None),
        },
        dataset("folder.ImageFolder", class_labels=True),
    ),
    "layout": (
        "text",
        {
            "cond_stage_key": "boxes",
            "cond_stage_config": {
                "target": "ldm.modules.encoders.modules.BERTEmbedder",
                "params": {"n_embed": 16, "n_layer": 1, "vocab_size": 20, "max_seq_len": 8, "use_tokenizer": False},
            },
        },
        MAPS,
    ),
    "sd-inpaint": (
        "sd-inpaint",
        {"cond_stage_config": CAPTIONS, "finetune_keys": None},
        dataset("inpainting.Inpainting", captions="sidecar", convention="stable-diffusion"),
    ),
    "x4": (
        "x4",
        {"cond_stage_config": CAPTIONS, "low_scale_key": "LR_image"},
        dataset("superres.SuperResolution", **PAIRS),
    ),
}


class Maps(torch.utils.data.Dataset):
    """Images with segmentation maps of 5 labels, and token ids."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        labels = torch.randint(5, (32, 32), generator=generator)
        image = torch.rand(32, 32, 3, generator=generator) * 2 - 1
        return {"image": image, "map": torch.nn.functional.one_hot(labels, 5).float(), "boxes": torch.arange(8) + index}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for k in range(4):
        path = folder / ("cat", "dog")[k % 2] / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"image {k}")
    return folder


def save_run(folder, name: str, images) -> SavedModel:
    """A run directory of main.py whose data are `images`."""
    kind, params, data = MODELS[name]
    run = folder / name
    (run / "checkpoints").mkdir(parents=True)
    (run / "configs").mkdir()
    saved = save_model(run, kind, timesteps=20, **params)
    if "size" in data.get("params", {}):
        data = {**data, "params": {**data["params"], "root": str(images)}}
    params = {"batch_size": 2, "train": data, "validation": data}
    config = OmegaConf.create({"data": {"target": "main.DataModuleFromConfig", "params": params}})
    file = run / "configs" / "2026-01-01T00-00-00-project.yaml"
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(saved.config), config), file)
    return SavedModel(file, saved.ckpt.rename(run / "checkpoints" / "last.ckpt"), saved.model)


def arguments(saved: SavedModel, outdir, *flags: str) -> list[str]:
    where = ["-r", str(saved.ckpt.parents[1]), "--outdir", str(outdir), "--allow-targets", "tests"]
    return [*where, "--device", "cpu", "--precision", "full", "--steps", "2", *flags]


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_condition_is_sampled_from_the_runs_own_dataset(name, images, tmp_path):
    saved = save_run(tmp_path, name, images)
    flags = ["--batch", "validation:0..2", "--n_samples", "2", "--batch_size", "2"]
    assert run_command(main, arguments(saved, tmp_path / "out", *flags)) == 0
    files = sorted((tmp_path / "out" / "samples").iterdir())
    infos = [read_metadata(file) for file in files]
    assert sorted(info["image_index"] for info in infos) == [*range(6)]
    assert {Image.open(file).size for file in files} == {(32, 32)} and infos[0]["batch"] == "validation:0..2"
    row = Image.open(tmp_path / "out" / "grid-0000.png")
    assert row.width > 3 * 32 and row.height > 3 * 32


def test_the_condition_is_the_models_own_with_dropout_off(images, tmp_path):
    saved = save_run(tmp_path, "hybrid", images)
    flags = ["--batch", "validation:1", "--seed", "5", "--scale", "1", "model.params.cond_dropout=0.99"]
    assert run_command(main, arguments(saved, tmp_path, *flags)) == 0
    model = saved.model.eval()
    image = Image.open(images / "cat" / "2.png")  # the second by name
    small = image.resize((8, 8), Image.Resampling.BOX)
    pixels, small = (torch.from_numpy(np.asarray(x, np.float32) / 127.5 - 1)[None] for x in (image, small))
    batch = {"image": pixels, "LR_image": small, "caption": ["image 2"]}
    torch.manual_seed(5)
    with torch.no_grad(), model.ema_scope():
        z, c = model.get_input(batch, "image", force_c_encode=True)
        z, _ = DDIMSampler(model).sample(S=2, batch_size=1, shape=z.shape[1:], conditioning=c, verbose=False)
        expected = np.asarray(from_tensor(model.decode_first_stage(z)[0]))
    result = np.asarray(Image.open(tmp_path / "samples" / "00000.png"))
    assert np.array_equal(result, expected)
    assert read_metadata(tmp_path / "samples" / "00000.png")["condition"]["caption"] == "image 2"


def test_named_files_and_texts_replace_the_datasets_conditions_or_stand_alone(images, tmp_path):
    saved = save_run(tmp_path, "hybrid", images)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "small.png")
    named = ["--condition", f"LR_image={tmp_path / 'small.png'}", "--condition", "caption=a cat"]
    for k, flags in enumerate((named, [*named, "--batch", "train:0"], [*named, "--condition", "caption=a dog"])):
        assert run_command(main, arguments(saved, tmp_path / str(k), *flags)) == 0
        infos = [read_metadata(file) for file in sorted((tmp_path / str(k) / "samples").iterdir())]
        captions = ["a cat", "a dog"] if k == 2 else ["a cat"]
        assert [info["condition"]["caption"] for info in infos] == captions
    alone, replaced = (np.asarray(Image.open(tmp_path / str(k) / "samples" / "00000.png")) for k in (0, 1))
    assert np.array_equal(alone, replaced)  # the image of the batch gives the size only


def test_without_flags_the_first_samples_of_validation_are_taken(images, tmp_path):
    saved = save_run(tmp_path, "text", images)
    assert run_command(main, arguments(saved, tmp_path / "out", "--skip_grid")) == 0
    files = sorted((tmp_path / "out").rglob("*.png"))
    assert [read_metadata(file)["condition"]["caption"] for file in files] == [f"image {k}" for k in (0, 2, 1, 3)]


def test_guidance_and_a_negative_prompt_matter(images, tmp_path):
    saved, results = save_run(tmp_path, "text", images), []
    for k, flags in enumerate(([], ["--scale", "4"], ["--scale", "4", "--negative_prompt", "dull"])):
        assert run_command(main, arguments(saved, tmp_path / str(k), "--batch", "train:0", *flags)) == 0
        results.append(np.asarray(Image.open(tmp_path / str(k) / "samples" / "00000.png")))
    assert not np.array_equal(results[0], results[1]) and not np.array_equal(results[1], results[2])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--batch", "test:0"], "--batch test: this run has no such dataset; choose one of train, validation"),
        (["--batch", "train:0..9"], "--batch train:9: the dataset has 4 samples, 0 to 3"),
        (["--batch", "train:"], "--batch 'train:': expected a split and indices, e.g. validation:0..7"),
        (["--condition", "caption"], "--condition 'caption': expected KEY=VALUE"),
        (["--condition", "LR_image=gone.png"], "--condition LR_image=gone.png: no such file"),
        (["--condition", "caption=a", "--condition", "caption=b", "--batch", "train:0"], "2 values for 1 samples"),
        (["--n_samples", "0"], "--n_samples 0"),
        (["data.params.train.params.root=gone", "--batch", "train:0"], "data.params.train"),
        (["--batchs", "train:0"], "did you mean --batch"),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(images, tmp_path, flags, words, capsys, monkeypatch):
    saved = save_run(tmp_path, "hybrid", images)
    monkeypatch.setattr("ldm.inference.load_model", None)
    assert words in refused(main, arguments(saved, tmp_path / "out", *flags), capsys)
    assert not (tmp_path / "out").exists()


def test_a_condition_of_another_size_or_a_missing_one_is_one_line(images, tmp_path, capsys):
    saved = save_run(tmp_path, "hybrid", images)
    np.save(tmp_path / "map.npy", np.zeros((8, 8, 1), np.float32))
    command = arguments(saved, tmp_path / "out", "--condition", f"LR_image={tmp_path / 'map.npy'}")
    words = "--condition LR_image: the batch has no 'caption', it has LR_image, image; add --condition KEY=VALUE for it"
    assert words in refused(main, command, capsys)
    words = "the condition has 1 channels (1x8x8), this model takes 3"
    assert words in refused(main, [*command, "--condition", "caption=a cat"], capsys)


def test_a_named_condition_that_the_model_does_not_read_is_refused(images, tmp_path, capsys):
    saved = save_run(tmp_path, "hybrid", images)
    command = arguments(saved, tmp_path / "out", "--batch", "train:0", "--condition", "txt=a cat")
    words = "--condition txt: this model does not read it; it reads LR_image, caption, image"
    assert words in refused(main, command, capsys)


def test_an_unconditional_model_is_sent_to_its_script(tmp_path, capsys):
    saved = save_model(tmp_path, "unconditional")
    saved.config.rename(tmp_path / "config.yaml")
    assert "use scripts/sample_diffusion.py" in refused(main, ["-r", str(saved.ckpt)], capsys)
    assert "--resume: pass a run directory" in refused(main, [], capsys)


def test_help_is_quick_and_works_anywhere(tmp_path):
    assert "--batch" in help_without_heavy_imports(ROOT / "scripts" / "sample_conditional.py", tmp_path)
