"""Every shipped YAML: what it names exists, its values are the published ones, and it builds the published model."""

import gzip
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm.config.instantiate import accepted_params
from ldm.util import get_obj_from_str, instantiate_from_config
from tests.reference import GOLDEN

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(
    str(path.relative_to(ROOT)) for folder in ("configs", "models") for path in (ROOT / folder).rglob("*.yaml")
)
# Values of the 33 published configs, and of the model that each builds [tensors, numbers, hash of names and shapes] by block; both come
# from the published implementation.
PUBLISHED = json.loads(gzip.decompress((GOLDEN / "hyperparameters.json.gz").read_bytes()))
MANIFESTS = json.loads(gzip.decompress((GOLDEN / "manifests" / "zoo.json.gz").read_bytes()))

# Stable Diffusion's later models and fine-tunes: {config: millions of parameters of the network}, as released.
STABLE_DIFFUSION = {
    "configs/stable-diffusion/v1-inpainting-inference.yaml": 859.54,
    "configs/stable-diffusion/v2-inference-v.yaml": 865.91,
    "configs/stable-diffusion/v2-inference.yaml": 865.91,
    "configs/stable-diffusion/v2-inpainting-inference.yaml": 865.93,
    "configs/stable-diffusion/v2-midas-inference.yaml": 865.91,
    "configs/stable-diffusion/x4-upscaling.yaml": 473.4,
}

FIRST_STAGE = "model.params.first_stage_config.params.ckpt_path"
ABSENT = "(absent)"
# What a shipped YAML says otherwise than the published one, {place: (published, shipped)}, each with a comment in the YAML that says so.
MENDED = {
    "configs/latent-diffusion/cin-ldm-vq-f8.yaml": {
        FIRST_STAGE: ("configs/first_stage_models/vq-f8/model.yaml", "models/first_stage_models/vq-f8/model.ckpt")
    },
    "configs/latent-diffusion/ffhq-ldm-vq-4.yaml": {
        FIRST_STAGE: ("configs/first_stage_models/vq-f4/model.yaml", "models/first_stage_models/vq-f4/model.ckpt")
    },
    "configs/latent-diffusion/lsun_bedrooms-ldm-vq-4.yaml": {
        FIRST_STAGE: ("configs/first_stage_models/vq-f4/model.yaml", "models/first_stage_models/vq-f4/model.ckpt")
    },
    "configs/latent-diffusion/cin256-v2.yaml": {"model.params.cond_dropout": (ABSENT, 0.1)},
    "models/ldm/inpainting_big/config.yaml": {"model.params.concat_keys": (ABSENT, ["mask"])},
}
DATA_ADDED = {
    "configs/latent-diffusion/cin256-v2.yaml",
    "models/ldm/inpainting_big/config.yaml",
    "models/ldm/semantic_synthesis256/config.yaml",
}


def load(name):
    return OmegaConf.load(ROOT / name)


def plain(config):
    return OmegaConf.to_container(config, resolve=False)


def nodes(tree):
    """Every mapping in a tree of mappings and lists."""
    if isinstance(tree, (dict, DictConfig)):
        yield tree
        for key in tree:
            yield from nodes(tree[key])
    elif isinstance(tree, (list, ListConfig)):
        for item in tree:
            yield from nodes(item)


def leaves(tree, path=""):
    """{dotted path: value}; a list is a value."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        place: value
        for key, item in tree.items()
        for place, value in leaves(item, f"{path}.{key}" if path else key).items()
    }


def build_on_meta(config):
    for node in nodes(config):
        for key in {"ckpt_path", "diffusion_ckpt_path"} & set(node):
            node[key] = None
    with torch.device("meta"):
        return instantiate_from_config(config)


def digest(state):
    """[tensors, numbers, hash of sorted names and shapes] of each block, as in zoo.json.gz; files differ in position_ids."""
    blocks = {}
    for name, tensor in state.items():
        if not name.endswith("position_ids"):
            parts = name.split(".")
            block = ".".join(parts[:2]) if len(parts) > 2 else parts[0] if len(parts) > 1 else "(root)"
            blocks.setdefault(block, []).append((name, list(tensor.shape)))
    return {
        block: [
            len(items),
            sum(math.prod(shape) for _, shape in items),
            hashlib.sha256(
                "\n".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in sorted(items)).encode()
            ).hexdigest()[:16],
        ]
        for block, items in blocks.items()
    }


def test_every_published_config_is_shipped():
    assert len(PUBLISHED) == 33 and set(PUBLISHED) == set(MANIFESTS) and set(PUBLISHED) <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_target_exists_and_takes_its_params(name):
    for node in nodes(plain(load(name))):
        if "target" in node:
            names = accepted_params(get_obj_from_str(node["target"]))
            assert names is None or set(node.get("params") or {}) <= names[0], node["target"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_the_published_ones(name):
    ours, theirs = plain(load(name)), PUBLISHED[name]
    if name in DATA_ADDED:
        assert "data" not in theirs and ours.pop("data")["target"] == "main.DataModuleFromConfig"
    ours, theirs = leaves(ours), leaves(theirs)
    differs = {
        p: (theirs.get(p, ABSENT), ours.get(p, ABSENT))
        for p in {*ours, *theirs}
        if theirs.get(p, ABSENT) != ours.get(p, ABSENT)
    }
    assert differs == MENDED.get(name, {})


@pytest.mark.parametrize("name", sorted({*MENDED, *DATA_ADDED}))
def test_what_was_mended_is_said(name):
    text = (ROOT / name).read_text()
    assert "mended" in text.lower()
    assert all(f"{place.rpartition('.')[2]}: " in text for place in MENDED.get(name, {}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_is_the_published_one(name):
    have = digest(build_on_meta(load(name).model).state_dict())
    assert have == MANIFESTS[name]


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in PUBLISHED])
def test_our_own_configs_build_without_memory(name):
    model = build_on_meta(load(name).model)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_later_stable_diffusion_models_have_the_released_size(name):
    model = build_on_meta(load(name).model)
    assert round(sum(p.numel() for p in model.model.parameters()) / 1e6, 2) == STABLE_DIFFUSION[name]
    text_encoder = [key for key in model.state_dict() if key.startswith("cond_stage_model.")]
    assert len(text_encoder) == (197 if "/v1-" in name else 294)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_weights_file_that_a_config_needs_is_one_that_the_scripts_download(name):
    for node in nodes(plain(load(name))):
        path = node.get("ckpt_path")
        if path:
            assert Path(path).name == "model.ckpt" and Path(path).parent.parent == Path("models/first_stage_models")
            assert (ROOT / path).with_name("config.yaml").is_file()


def table():
    """What stands in configs/README.md: each published config, what it is by its own first line, and what can be done with it."""
    rows = ["| config | what it is | |", "|---|---|---|"]
    for name in sorted({*PUBLISHED, *STABLE_DIFFUSION}):
        what = (ROOT / name).read_text().splitlines()[0].removeprefix("# ").rstrip(".;")
        use = "train, draw" if "data" in load(name) else "draw"
        use = "train" if "loss" in load(name).model.params.get("lossconfig", {}).get("target", "") else use
        rows.append(f"| [{name}](../{name}) | {what} | {use}{' (mended)' if name in {*MENDED, *DATA_ADDED} else ''} |")
    return "\n".join(rows)


def test_the_table_of_configs_tells_the_truth():
    text = (ROOT / "configs" / "README.md").read_text()
    assert text[text.index("| config |") :].strip() == table()
