"""Every shipped YAML is valid and builds its model; the published ones have the published values, names and shapes."""

import copy
import functools
import gzip
import hashlib
import inspect
import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm.config import merge
from ldm.config.instantiate import accepted_params
from ldm.config.validate import check_config, check_targets
from ldm.paths import ROOT
from ldm.util import get_obj_from_str, instantiate_from_config
from tests.reference import GOLDEN

SHIPPED = sorted(
    str(path.relative_to(ROOT)) for folder in ("configs", "models") for path in (ROOT / folder).rglob("*.yaml")
)
# Values of the 33 published configs, and [tensors, numbers, hash of names and shapes] of each block of their models,
# from the published implementation.
PUBLISHED = json.loads(gzip.decompress((GOLDEN / "hyperparameters.json.gz").read_bytes()))
MANIFESTS = json.loads(gzip.decompress((GOLDEN / "manifests" / "zoo.json.gz").read_bytes()))

# Stable Diffusion's later models and fine-tunes: {config: millions of parameters of the released network}.
STABLE_DIFFUSION = {
    "configs/controlnet/cldm_v15.yaml": 859.52,
    "configs/controlnet/cldm_v21.yaml": 865.91,
    "configs/instruct-pix2pix/generate.yaml": 859.53,
    "configs/stable-diffusion/v1-inpainting-inference.yaml": 859.54,
    "configs/stable-diffusion/v2-inference-v.yaml": 865.91,
    "configs/stable-diffusion/v2-inference.yaml": 865.91,
    "configs/stable-diffusion/v2-inpainting-inference.yaml": 865.93,
    "configs/stable-diffusion/v2-midas-inference.yaml": 865.91,
    "configs/stable-diffusion/x4-upscaling.yaml": 473.4,
}

# Recipes of Stable Diffusion: {config: the config of the released model}.
TRAINING = {
    "configs/stable-diffusion/v1-train.yaml": "configs/stable-diffusion/v1-inference.yaml",
    "configs/stable-diffusion/v1-finetune.yaml": "configs/stable-diffusion/v1-inference.yaml",
    "configs/stable-diffusion/v2-train.yaml": "configs/stable-diffusion/v2-inference.yaml",
    "configs/stable-diffusion/v2-finetune.yaml": "configs/stable-diffusion/v2-inference-v.yaml",
}

FIRST_STAGE = "model.params.first_stage_config.params.ckpt_path"
ABSENT = "(absent)"
# Differences between a shipped YAML and the published one, {path: (published, shipped)}; a comment in the YAML says so.
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


@functools.cache
def _read(name):
    return OmegaConf.load(ROOT / name)


def load(name):
    """Return a copy of a shipped config; each file is read once per session."""
    return copy.deepcopy(_read(name))


def plain(config):
    return OmegaConf.to_container(config, resolve=False)


def nodes(tree):
    """Yield every mapping in a tree of mappings and lists."""
    if isinstance(tree, (dict, DictConfig)):
        yield tree
        for key in tree:
            yield from nodes(tree[key])
    elif isinstance(tree, (list, ListConfig)):
        for item in tree:
            yield from nodes(item)


def leaves(tree, path=""):
    """Return {dotted path: value}; a list is a value."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        place: value
        for key, item in tree.items()
        for place, value in leaves(item, f"{path}.{key}" if path else key).items()
    }


def digest(state):
    """Return [tensors, numbers, hash of names and shapes] of each block as in zoo.json.gz, without position_ids."""
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


class Built(NamedTuple):
    """A config's model, built on the meta device."""

    digest: dict[str, list]
    takes_no_memory: bool
    network_millions: float
    text_tensors: int


@functools.cache
def built(name):
    config = load(name).model
    for node in nodes(config):
        for key in {"ckpt_path", "diffusion_ckpt_path"} & set(node):
            node[key] = None
    with torch.device("meta"):
        model = instantiate_from_config(config)
    state = model.state_dict()
    network = getattr(model, "model", model)
    return Built(
        digest(state),
        all(parameter.is_meta for parameter in model.parameters()),
        round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 2),
        sum(key.startswith("cond_stage_model.") for key in state),
    )


def test_every_published_config_is_shipped():
    assert len(PUBLISHED) == 33 and set(PUBLISHED) == set(MANIFESTS) and set(PUBLISHED) <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_valid_and_builds(name):
    config = load(name)
    check_targets(plain(config))
    data = {"data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 1}}}
    check_config(OmegaConf.merge(data, merge.merge([ROOT / name])), weights=False)
    for node in nodes(plain(config)):
        if "target" in node:
            found = get_obj_from_str(node["target"])
            names = accepted_params(found)
            assert inspect.isclass(found), node["target"]
            assert names is None or set(node.get("params") or {}) <= names[0].keys(), node["target"]
    assert built(name).takes_no_memory
    if "data" in config:
        instantiate_from_config(config.data)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_the_published_values(name):
    ours, theirs = plain(load(name)), PUBLISHED[name]
    if name in DATA_ADDED:
        assert "data" not in theirs and ours.pop("data")["target"] == "main.DataModuleFromConfig"
    ours, theirs = leaves(ours), leaves(theirs)
    differs = {
        path: (theirs.get(path, ABSENT), ours.get(path, ABSENT))
        for path in {*ours, *theirs}
        if theirs.get(path, ABSENT) != ours.get(path, ABSENT)
    }
    assert differs == MENDED.get(name, {})
    if name in {*MENDED, *DATA_ADDED}:  # and its comments say what was changed
        text = (ROOT / name).read_text()
        assert "mended" in text.lower()
        assert all(f"{place.rpartition('.')[2]}: " in text for place in MENDED.get(name, {}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_builds_the_published_model(name):
    assert built(name).digest == MANIFESTS[name]


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_later_stable_diffusion_models_have_the_released_size(name):
    assert built(name).network_millions == STABLE_DIFFUSION[name]
    assert built(name).text_tensors == (294 if any(word in name for word in ("/v2-", "/x4-", "_v21")) else 197)


@pytest.mark.parametrize("name, released", TRAINING.items())
def test_a_training_config_builds_the_released_model_and_its_average(name, released):
    blocks = dict(built(name).digest)
    average, parameters = blocks.pop("model_ema"), blocks["model.diffusion_model"]
    assert blocks == built(released).digest and average[1] == parameters[1] + 2  # decay and num_updates


def test_the_first_stages_of_published_configs_are_those_that_the_scripts_download():
    for name in PUBLISHED:
        for node in nodes(plain(load(name))):
            if path := node.get("ckpt_path"):
                assert Path(path).name == "model.ckpt" and Path(path).parent.parent == Path("models/first_stage_models")
                assert (ROOT / path).with_name("config.yaml").is_file(), name


def table():
    """Return the table of configs/README.md: each published config, its first line, and its uses."""
    rows = ["| config | what it is | use |", "|---|---|---|"]
    for name in sorted({*PUBLISHED, *STABLE_DIFFUSION}):
        what = (ROOT / name).read_text().splitlines()[0].removeprefix("# ").rstrip(".;")
        use = "train, sample" if "data" in load(name) else "sample"
        use = "train" if "loss" in load(name).model.params.get("lossconfig", {}).get("target", "") else use
        rows.append(f"| [{name}](../{name}) | {what} | {use}{' (mended)' if name in {*MENDED, *DATA_ADDED} else ''} |")
    return "\n".join(rows)


def test_the_table_in_the_readme_matches_the_configs():
    text = (ROOT / "configs" / "README.md").read_text()
    assert text[text.index("| config |") :].strip() == table()
