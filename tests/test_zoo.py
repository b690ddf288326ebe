"""A shrunken copy of every published config (and of later Stable Diffusion) trains, logs, reloads and samples."""

import copy
import json

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset

from ldm.checkpoint import weights_on_meta
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.modules.encoders.layout_tokens import Box, LayoutTokens
from ldm.modules.losses import lpips
from ldm.util import instantiate_from_config
from tests.models.first_stages import QUIET
from tests.reference import randn
from tests.test_configs import PUBLISHED, STABLE_DIFFUSION, load, nodes, plain

SIDE, FACTOR = 32, 4  # of images, and from images to latents
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "small", "picture"]
TEXT_MODEL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OPEN_CLIP = {"width": 16, "heads": 2, "layers": 2, "embed_dim": 8}


def shrink(model):
    """The config of a model with the same classes, keys and options in tiny sizes."""
    model = copy.deepcopy(model)
    for node in nodes(model):
        node.pop("ckpt_path", None)
        params = node.get("params") or {}
        if "model_channels" in params:  # the UNet
            params |= {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2], "image_size": SIDE // FACTOR}
            params["attention_resolutions"] = [a for a in (1, 2) if a in params["attention_resolutions"]] or [32]
            params |= {name: 16 for name in ("context_dim", "num_head_channels") if name in params}
            params |= {name: 1 for name in ("num_heads", "transformer_depth") if name in params}
            params |= {"disable_self_attentions": [True, False]} if "disable_self_attentions" in params else {}
        if "hint_channels" in params:
            params["hint_block_channels"] = [16, 32, 96]  # one for each level of the first stage
        if "ddconfig" in params:
            attention = [SIDE // FACTOR] if params["ddconfig"]["attn_resolutions"] else []
            params["ddconfig"] |= {
                "ch": 32,
                "ch_mult": [1, 1, 2],
                "num_res_blocks": 1,
                "resolution": SIDE,
                "attn_resolutions": attention,
            }
            params |= {"n_embed": 64} if "n_embed" in params else {}
            if "unet_config" not in model["params"]:
                params["embed_dim"] = params["ddconfig"]["z_channels"] = 4
        if "disc_start" in params:
            params |= {"disc_start": 0, "perceptual_init": "random", "disc_ndf": 8}
        kind = node.get("target", "").rpartition(".")[2]
        if kind == "BERTEmbedder":
            params |= {"n_embed": 16, "n_layer": 1}
        if kind == "ClassEmbedder":
            params["embed_dim"] = 16
        if kind == "FrozenCLIPEmbedder":
            node["params"] = {"text_config": TEXT_MODEL}
        if kind == "FrozenOpenCLIPEmbedder":
            node["params"]["text_config"] = OPEN_CLIP
    if "unet_config" in model["params"]:
        model["params"] |= {"image_size": SIDE // FACTOR, "timesteps": 20, "log_every_t": 10}
    return model


# Published configs that differ in their data or sizes alone are one copy: {its JSON: the first of their names}.
COPIES = {}
for published in (*PUBLISHED, *STABLE_DIFFUSION):
    COPIES.setdefault(json.dumps(shrink(plain(load(published).model)), sort_keys=True), published)


class Everything(Dataset):
    """Four samples under every key that a published config reads."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        image = torch.tanh(randn(index, SIDE, SIDE, 3))
        mask = torch.full((SIDE, SIDE, 1), -1.0)
        mask[8:16, 8:24] = 1.0
        labels = torch.randint(0, 182, (SIDE, SIDE), generator=torch.Generator().manual_seed(index))
        return {
            "image": image,
            "jpg": image,
            "mask": mask,
            "masked_image": torch.where(mask > 0, -1.0, image),
            "LR_image": image[::FACTOR, ::FACTOR],
            "lr": image[::FACTOR, ::FACTOR],
            "depth": image[:, :, :1],
            "hint": image / 2 + 0.5,
            "edited": image,
            "edit": {"c_concat": image, "c_crossattn": "a small picture"},
            "segmentation": torch.nn.functional.one_hot(labels, 182).float(),
            "coordinates_bbox": torch.as_tensor(LayoutTokens(40).encode([Box(index, (0.1, 0.2, 0.3, 0.4))])),
            "class_label": index,
            "human_label": f"class {index}",
            "caption": "a small picture",
            "txt": "a small picture",
            "nix": randn(10 + index, 3, 16),
        }


def loader():
    return DataLoader(Everything(), batch_size=2)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    file = tmp_path_factory.mktemp("zoo") / "vocab.txt"
    file.write_text("\n".join(WORDS))
    return str(file)


@pytest.fixture(autouse=True)
def narrow_perceptual_network(monkeypatch):
    """LPIPS on a VGG16 with a sixteenth of its channels."""
    monkeypatch.setattr(lpips, "VGG16_LAYERS", tuple(width and width // 16 for width in lpips.VGG16_LAYERS))
    monkeypatch.setattr(lpips, "FEATURE_WIDTHS", tuple(width // 16 for width in lpips.FEATURE_WIDTHS))


def build(config, vocabulary):
    for node in nodes(config):
        if node.get("target", "").endswith("BERTEmbedder") and node["params"].get("use_tokenizer", True):
            node["params"]["tokenizer_path"] = vocabulary
    torch.manual_seed(0)
    model = instantiate_from_config(OmegaConf.create(config))
    model.learning_rate = 1e-4
    model.untrained_first_stage = True  # of diffusion models
    return model


@pytest.mark.parametrize("text", COPIES, ids=COPIES.values())
def test_a_shrunken_copy_trains_validates_logs_images_saves_reloads_and_samples(text, vocabulary, tmp_path):
    config = json.loads(text)
    model = build(config, vocabulary)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = pl.Trainer(max_steps=2, limit_val_batches=1, default_root_dir=tmp_path, **QUIET)
    trainer.fit(model.train(), loader(), loader())
    assert trainer.global_step == 2 and trainer.callback_metrics
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())
    monitor = config["params"].get("monitor")
    assert monitor is None or monitor in trainer.callback_metrics
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())

    data = next(iter(loader()))
    diffusion = "unet_config" in config["params"]
    rows = ("plot_denoise_rows", "plot_diffusion_rows")
    options = {"ddim_steps": 2, **dict.fromkeys(rows, False)} if diffusion else {}
    images = model.eval().log_images(data, N=2, **options)
    assert "inputs" in images and len(images) > 1 and all(torch.isfinite(image).all() for image in images.values())

    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    with weights_on_meta():  # no time for weights that are replaced
        again = build(config, vocabulary).eval()
    again.init_from_ckpt(str(tmp_path / "last.ckpt"))
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    with torch.no_grad():
        if diffusion:
            z, c = again.get_input(data, again.first_stage_key, force_c_encode=True)
            out = again.decode_first_stage(DDIMSampler(again).sample(2, 2, z.shape[1:], c, verbose=False).samples)
        else:
            out = again(again.get_input(data, again.image_key))[0]
    assert out.shape == (2, 3, SIDE, SIDE) and torch.isfinite(out).all()
