"""Every recipe asks for its folder and trains in tiny sizes; tests/test_configs.py builds it at full size."""

import tarfile

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.data.base import DataConfigError
from ldm.paths import ROOT
from ldm.util import instantiate_from_config

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
RECIPES += sorted((ROOT / "configs" / "stable-diffusion").glob("*-finetune.yaml"))
SHARDS = sorted((ROOT / "configs" / "stable-diffusion").glob("*-train.yaml"))  # recipes for tar files
ADAPTERS = {"adapters", "token_embeddings"}
CLASS_CONDITIONAL = next(path for path in RECIPES if path.stem == "class-conditional-folder")
SMALL_UNET = {
    "model_channels": 32,
    "channel_mult": [1, 1],
    "num_res_blocks": 1,
    "attention_resolutions": [1],
    "context_dim": 32,
}
SMALL_CLIP = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL_OPEN_CLIP = {"width": 32, "heads": 2, "layers": 2, "embed_dim": 16}
SMALL_STAGE = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "resolution": 16}


def load(path):
    config = OmegaConf.load(path)
    for params in (config.model.params, OmegaConf.select(config, "model.params.first_stage_config.params")):
        for key in {"ckpt_path", "diffusion_ckpt_path"} & set(params or ()):
            params[key] = None  # a download
    return config


def small(config, root):
    """Return the recipe with the same classes and keys in tiny sizes."""
    model, data = config.model.params, config.data.params
    is_latent = "first_stage_config" in model
    if "diffusion_path" in model:
        diffusion = small(load(CLASS_CONDITIONAL), root)
        model |= {"diffusion_path": str(root / "diffusion.yaml"), "num_classes": 2, "log_steps": 2}
        OmegaConf.save(diffusion, model.diffusion_path)
    else:
        OmegaConf.update(model, "first_stage_config.params.ddconfig" if is_latent else "ddconfig", SMALL_STAGE)
    if is_latent:
        OmegaConf.update(model, "unet_config.params", SMALL_UNET)
        if not model.unet_config.params.get("use_spatial_transformer"):
            model.unet_config.params.context_dim = None
        if "control_stage_config" in model:
            OmegaConf.update(model, "control_stage_config.params", {**SMALL_UNET, "hint_block_channels": [16, 32]})
        model.image_size, model.untrained_first_stage = 8, True
    if is_latent and model.cond_stage_config.target == "torch.nn.Identity":
        data.train.params.downscale_f = 2  # the small first stage's factor
    elif is_latent and model.cond_stage_config.target.endswith(".FrozenCLIPEmbedder"):
        OmegaConf.update(model, "cond_stage_config.params.text_config", SMALL_CLIP, force_add=True)
    elif is_latent and model.cond_stage_config.target.endswith(".FrozenOpenCLIPEmbedder"):
        OmegaConf.update(model, "cond_stage_config.params.text_config", SMALL_OPEN_CLIP, force_add=True)
        model.unet_config.params.num_head_channels = 16
    elif is_latent:
        embedder = model.cond_stage_config.params
        width = (
            {"embed_dim": 32} if "n_classes" in embedder else {"n_embed": 32, "n_layer": 1, "heads": 2, "dim_head": 16}
        )
        OmegaConf.update(
            model, "cond_stage_config.params", {**width, **({"n_classes": 3} if "n_classes" in embedder else {})}
        )
    elif "lossconfig" in model:
        OmegaConf.update(
            model,
            "lossconfig.params",
            {"perceptual_init": "random", "disc_start": 0, "disc_ndf": 8, "disc_num_layers": 1},
        )
    data.batch_size, data.num_workers = 2, 0
    if "instance" in data.train.params:  # DreamBooth
        data.train.params.instance.params.root = str(root)
        prior = data.train.params.prior.params
        prior.root, prior.count = str(root / "ape"), 3
        datasets = [data.train.params.instance.params, prior]
    elif "shards" in data.train.params:
        data.train.params.shards = data.validation.params.shards = str(root / "images.tar")
        datasets = [data.train.params]
    else:
        data.train.params.root = str(root)
        datasets = [data.train.params, data.validation.params]
    for dataset in datasets:
        dataset.size = 16
    if ADAPTERS & set(model):  # they train on a base
        bare = OmegaConf.create({name: value for name, value in model.items() if name not in ADAPTERS})
        base = instantiate_from_config({"target": config.model.target, "params": bare})
        model.ckpt_path = str(root / "base.ckpt")
        torch.save({"state_dict": base.state_dict()}, model.ckpt_path)
    if "crop_size" in data.train.params:
        data.train.params.crop_size = 16
    return config


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        path = tmp_path / ("ape", "tench")[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.RandomState(i).randint(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"image {i}\nanother caption of {i}")
    rows = [f"tench/{5 - i % 3 * 2}.png,make it {i},{('ape', 'tench')[i % 2]}/{i}.png" for i in range(6)]
    (tmp_path / "triples.csv").write_text("\n".join(["before,instruction,after", *rows]))
    with tarfile.open(tmp_path / "images.tar", "w") as shard:
        for path in sorted(tmp_path.glob("*/*.*")):
            shard.add(path, path.name)
    return tmp_path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_without_a_folder_asks_for_it(path):
    with pytest.raises(
        DataConfigError,
        match=r"^data.params.train (?P<root>(instance.params.)?root) None: not set; "
        r"set data.params.train.params.(?P=root) to a folder",
    ):
        instantiate_from_config(load(path).data).setup()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", RECIPES + SHARDS, ids=lambda path: path.stem)
def test_a_small_recipe_trains_validates_and_logs_images(path, folder):
    config = small(load(path), folder)
    torch.manual_seed(0)
    model, data = instantiate_from_config(config.model), instantiate_from_config(config.data)
    model.learning_rate = 1e-4
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", max_steps=2, limit_val_batches=1, **quiet)
    trainer.fit(model, data)
    assert trainer.global_step == 2 and all(p.isfinite().all() for p in model.parameters())
    batch = next(iter(data.val_dataloader() if "validation" in config.data.params else data.train_dataloader()))
    with torch.no_grad():
        options = {"ddim_steps": 2} if "first_stage_config" in config.model.params else {}
        images = model.log_images(batch, N=1, **options)
    assert images and all(torch.is_tensor(image) and image.isfinite().all() for image in images.values())
