"""Laws of CLIP's joint space of texts and pictures as conditions."""

import pytest
import torch
from torch import nn

from ldm.checkpoint import CheckpointError, ensure_weights, load_weights, write_weights
from ldm.modules.encoders.modules import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.util import get_obj_from_str
from tests.reference import randn, seed_weights

TINY = {
    "embed_dim": 16,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
}


def text(**kwargs):
    return FrozenCLIPTextEmbedder(clip_config=TINY, **kwargs)


def image(**kwargs):
    return FrozenClipImageEmbedder(clip_config=TINY, **kwargs)


@pytest.mark.parametrize("name", ["FrozenCLIPTextEmbedder", "FrozenClipImageEmbedder"])
def test_the_published_targets_resolve_and_build_without_network_or_memory(name):
    with torch.device("meta"):
        model = get_obj_from_str(f"ldm.modules.encoders.modules.{name}")()
    assert all(p.is_meta and not p.requires_grad for p in model.parameters()) and model.finds_own_weights
    other = "model.visual." if name == "FrozenCLIPTextEmbedder" else "model.transformer."
    assert not any(key.startswith(other) for key in model.state_dict())
    assert model.width == 768


def test_texts_become_unit_vectors_repeated():
    model = seed_weights(text(n_repeat=3))
    out = model.encode(["a horse", "", "a horse"])
    assert out.shape == (3, 3, 16) and torch.allclose(out.norm(dim=-1), torch.ones(3, 3), atol=1e-5)
    assert torch.allclose(out[0], out[2], atol=1e-6) and not torch.allclose(out[0], out[1], atol=1e-3)


def test_a_vector_depends_on_the_whole_text_up_to_its_end():
    model = seed_weights(text())
    out = model(["a red horse", "a red house", "a red horse"])
    assert not torch.allclose(out[0], out[1], atol=1e-4)


def test_pictures_of_any_size_become_one_vector_each():
    model = seed_weights(image())
    x = torch.tanh(randn(1, 2, 3, 40, 24))
    assert model(x).shape == (2, 16) and model.encode(x).shape == (2, 1, 16)
    assert torch.allclose(seed_weights(image(normalize=True))(x).norm(dim=-1), torch.ones(2), atol=1e-5)


def test_pictures_are_brought_to_clips_own_range():
    grey = image().preprocess(torch.zeros(1, 3, 8, 8))
    assert grey.shape == (1, 3, 16, 16)
    wanted = torch.tensor(
        [(0.5 - 0.48145466) / 0.26862954, (0.5 - 0.4578275) / 0.26130258, (0.5 - 0.40821073) / 0.27577711]
    )
    assert torch.allclose(grey[0, :, 5, 5], wanted, atol=1e-5)


def test_both_halves_stay_in_evaluation_mode():
    parent = nn.Sequential(text(), image()).train()
    assert not any(module.training for child in parent for module in child.modules())


def test_weights_come_from_a_file_and_work_after_a_build_without_memory(tmp_path):
    source = seed_weights(text())
    path = tmp_path / "clip.safetensors"
    write_weights({name.removeprefix("model."): tensor for name, tensor in source.state_dict().items()}, path)
    with torch.device("meta"):
        model = text(weights=str(path))
    ensure_weights(nn.ModuleList([model]))
    assert torch.allclose(model(["a horse"]), source(["a horse"]), atol=1e-6)


def test_a_checkpoint_that_holds_the_weights_is_enough(tmp_path):
    source, path = nn.ModuleDict({"cond_stage_model": seed_weights(image())}), tmp_path / "all.ckpt"
    write_weights(source.state_dict(), path)
    parent = nn.ModuleDict({"cond_stage_model": image(weights="nowhere.safetensors")})
    load_weights(parent, path)
    ensure_weights(parent)
    x = randn(2, 1, 3, 16, 16)
    assert torch.equal(parent["cond_stage_model"](x), source["cond_stage_model"](x))


def test_a_file_of_another_shape_is_refused(tmp_path):
    path = tmp_path / "clip.safetensors"
    write_weights({"ln_final.weight": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="are missing or differ"):
        text(weights=str(path)).ensure_weights()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FrozenCLIPTextEmbedder("ViT-X/99"), "choose one of ViT-B/32"),
        (lambda: text(max_length=20), "exactly 77 tokens"),
        (lambda: image(jit=True), "are programs, not weights"),
    ],
)
def test_what_cannot_be_honoured_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
