"""scripts/train_searcher.py and scripts/knn2img.py as a user runs them, on a model and a CLIP of a few numbers."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint import write_weights
from ldm.cli import run_command
from ldm.config.model_info import read_model_info
from ldm.modules.encoders import modules
from ldm.modules.encoders.modules import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.output.images import read_metadata
from ldm.paths import ROOT
from ldm.retrieval import clip as clip_side
from ldm.retrieval.database import Database
from scripts import knn2img, train_searcher
from tests.reference import seed_weights
from tests.scripts.refusals import help_without_heavy_imports, refused
from tests.tiny import SavedModel, model_flags, save_model

CLIP = {
    "embed_dim": 16,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
}
VECTORS = {"cond_stage_key": "nix", "cond_stage_config": {"target": "torch.nn.Identity"}, "cond_stage_trainable": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> SavedModel:
    return save_model(tmp_path_factory.mktemp("tiny"), "text", **VECTORS)


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    halves = (FrozenCLIPTextEmbedder(clip_config=CLIP), FrozenClipImageEmbedder(clip_config=CLIP))
    weights = {
        name.removeprefix("model."): tensor
        for half in halves
        for name, tensor in seed_weights(half).state_dict().items()
    }
    write_weights(weights, path)
    return path


@pytest.fixture(autouse=True)
def small_clip(monkeypatch):
    """The scripts name a CLIP by its published name alone; here it has a smaller shape."""
    for name in ("FrozenCLIPTextEmbedder", "FrozenClipImageEmbedder"):
        small = partial(getattr(modules, name), clip_config=CLIP)
        for module in (modules, clip_side):
            monkeypatch.setattr(module, name, small, raising=False)


@pytest.fixture
def database(tmp_path):
    folder = tmp_path / "data" / "toy"
    folder.mkdir(parents=True)
    for k in range(2):
        embedding = np.random.default_rng(k).normal(size=(30, 16)).astype(np.float16)
        np.savez(folder / f"{k}.npz", embedding=embedding, img_id=np.arange(30), patch_coords=np.zeros((30, 4), int))
    return folder


def arguments(saved: SavedModel, clip_weights, outdir, *flags: str) -> list[str]:
    size = ["--H", "16", "--W", "16", "--ddim_steps", "2", "--n_samples", "2", "--clip_weights", str(clip_weights)]
    return [*model_flags(saved, outdir), *size, *flags]


def pixels(outdir) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted((outdir / "samples").glob("*.png"))])


def test_flags_have_the_published_defaults():
    opt = vars(knn2img.parser().parse_args([]))
    published = {
        "H": 768,
        "W": 768,
        "n_iter": 1,
        "n_samples": 3,
        "scale": 5.0,
        "n_repeat": 1,
        "clip_type": "ViT-L/14",
        "knn": 10,
    }
    published |= {
        "config": "configs/retrieval-augmented-diffusion/768x768.yaml",
        "ckpt": "models/rdm/rdm768x768/model.ckpt",
    }
    published |= {
        "database": "artbench-surrealism",
        "use_neighbors": False,
        "ddim_steps": 50,
        "seed": 42,
        "plms": False,
    }
    assert {name: opt[name] for name in published} == published
    opt = vars(train_searcher.parser().parse_args([]))
    published = {
        "database": "data/rdm/retrieval_databases/openimages",
        "target_path": "data/rdm/searchers/openimages",
        "knn": 20,
    }
    assert {name: opt[name] for name in published} == published


def test_the_published_model_takes_the_vectors_of_the_published_clip():
    info = read_model_info(ROOT / knn2img.CONFIG)
    request = knn2img.request_of(knn2img.parser().parse_args([])).checked(info)
    assert request.latent_shape == (16, 48, 48)
    with torch.device("meta"):
        assert modules.FrozenCLIPTextEmbedder.func().width == info.context_dim


def test_neighbors_of_a_searcher_that_was_saved_or_made_on_the_spot_lead_to_the_same_images(
    saved, clip_weights, database, tmp_path, monkeypatch, capsys, caplog
):
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    command = ["--database", str(database), "--use_neighbors", "--knn", "4", "--n_repeat", "2"]
    assert run_command(knn2img.main, arguments(saved, clip_weights, tmp_path / "a", *command)) == 0
    assert run_command(train_searcher.main, ["-d", str(database), "-t", "data/rdm/searchers/toy", "-k", "5"]) == 0
    assert "60 vectors in" in capsys.readouterr().out and (tmp_path / "data/rdm/searchers/toy/index.faiss").is_file()
    with caplog.at_level("INFO"):
        assert run_command(knn2img.main, arguments(saved, clip_weights, tmp_path / "b", *command)) == 0
    assert "indexed" not in caplog.text and "neighbors" in caplog.text
    assert run_command(knn2img.main, arguments(saved, clip_weights, tmp_path / "c")) == 0
    a, b, c = (pixels(tmp_path / name) for name in "abc")
    assert a.shape == (2, 16, 16, 3) and np.array_equal(a, b) and not np.array_equal(a, c)
    info = read_metadata(tmp_path / "b" / "samples" / "00001.png")
    said = {
        "task": "knn2img",
        "database": str(database),
        "knn": 4,
        "n_repeat": 2,
        "clip": "ViT-L/14",
        "scale": 5.0,
        "image_index": 1,
    }
    assert {key: info[key] for key in said} == said
    assert read_metadata(tmp_path / "c" / "samples" / "00000.png")["database"] is None
    for before, results in (("b", b), ("c", c)):
        again = [
            "--from-metadata",
            str(tmp_path / before / "samples" / "00001.png"),
            "--outdir",
            str(tmp_path / f"{before}2"),
        ]
        assert run_command(knn2img.main, again) == 0
        assert np.array_equal(pixels(tmp_path / f"{before}2"), results[1:])


def test_images_are_those_of_the_context_alone(saved, clip_weights, database, tmp_path, monkeypatch):
    """The network sees text and neighbors, and zeros as unconditional context."""
    pytest.importorskip("faiss")
    from ldm.models.diffusion.ddpm import LatentDiffusion

    seen, inner = [], LatentDiffusion.apply_model
    monkeypatch.setattr(
        LatentDiffusion, "apply_model", lambda self, x, t, cond=None: (seen.append(cond), inner(self, x, t, cond))[1]
    )
    command = ["--database", str(database), "--use_neighbors", "--knn", "3", "--n_repeat", "2", "--plms"]
    assert (
        run_command(knn2img.main, arguments(saved, clip_weights, tmp_path / "out", *command, "--prompt", "a cat")) == 0
    )
    clip = modules.FrozenCLIPTextEmbedder(weights=str(clip_weights))
    clip.load_pretrained()
    text = clip.encode(["a cat"] * 2)
    uncond, cond = seen[0].chunk(2)
    assert cond.shape == (2, 5, 16) and torch.equal(uncond, torch.zeros_like(cond))
    assert torch.allclose(cond[:, :2], text.repeat(1, 2, 1), atol=1e-6)
    stored = Database(database)
    everything = stored.embedding(np.arange(60))
    everything /= np.linalg.norm(everything, axis=1, keepdims=True)  # as published
    order = np.argsort(-(everything @ text[0, 0].numpy()))[:3]
    assert np.allclose(cond[1, 2:].numpy(), everything[order], atol=1e-6)


def test_a_database_is_made_of_images_and_generated_with(saved, clip_weights, tmp_path):
    pytest.importorskip("faiss")
    (tmp_path / "in").mkdir()
    for k in range(5):
        generated = np.random.default_rng(k).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(generated).save(tmp_path / "in" / f"{k}.png")
    made, index = tmp_path / "made", tmp_path / "index"
    flags = [
        "-d",
        str(made),
        "-t",
        str(index),
        "--images",
        str(tmp_path / "in"),
        "--clip_weights",
        str(clip_weights),
        "--device",
        "cpu",
    ]
    assert run_command(train_searcher.main, flags) == 0
    assert len(Database(made)) == 5
    command = ["--database", str(made), "--searcher", str(index), "--use_neighbors", "--knn", "5", "--scale", "1"]
    assert run_command(knn2img.main, arguments(saved, clip_weights, tmp_path / "out", *command)) == 0
    assert pixels(tmp_path / "out").shape == (2, 16, 16, 3)


def test_mistakes_are_refused_in_one_line(saved, clip_weights, database, tmp_path, capsys):
    pytest.importorskip("faiss")

    def line(*flags: str) -> str:
        return refused(knn2img.main, arguments(saved, clip_weights, tmp_path / "out", *flags), capsys)

    assert "--knn 0" in line("--knn", "0") and "--n_repeat 0" in line("--n_repeat", "0")
    assert "artbench_databases.zip" in line("--use_neighbors")
    assert "choose 1 to 60" in line("--use_neighbors", "--database", str(database), "--knn", "61")
    assert "CLIP version 'ViT-H'" in line("--clip_type", "ViT-H")
    assert "models/rdm" in refused(knn2img.main, ["--device", "cpu"], capsys)
    sd = ["--config", "configs/stable-diffusion/v1-inference.yaml", "--H", "512", "--W", "512"]
    assert "not conditioned on CLIP vectors" in refused(knn2img.main, sd, capsys)
    assert "--knn 0" in refused(train_searcher.main, ["-k", "0"], capsys)
    assert "no such folder" in refused(train_searcher.main, ["-d", str(tmp_path / "none")], capsys)
    assert not (tmp_path / "out").exists()


def test_a_clip_of_another_width_is_refused_before_the_model_is_loaded(
    saved, clip_weights, tmp_path, monkeypatch, capsys
):
    wide = {**CLIP, "embed_dim": 32}
    monkeypatch.setattr(clip_side, "FrozenCLIPTextEmbedder", partial(FrozenCLIPTextEmbedder, clip_config=wide))
    assert "its vectors have 32 values, this model takes 16" in refused(
        knn2img.main, arguments(saved, clip_weights, tmp_path), capsys
    )


@pytest.mark.parametrize("name, says", [("knn2img", "--use_neighbors"), ("train_searcher", "--target_path")])
def test_help_is_quick_and_works_from_any_folder(tmp_path, name, says):
    assert says in help_without_heavy_imports(ROOT / "scripts" / f"{name}.py", tmp_path)
