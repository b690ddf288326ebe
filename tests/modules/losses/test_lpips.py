"""LPIPS. The published figures of the losses (test_contperceptual.py) check its values."""

import socket

import pytest
import torch

from ldm.modules.losses import lpips
from ldm.modules.losses.lpips import LPIPS, PerceptualWeightsError
from tests.reference import randn, rel_error, seed_weights


@pytest.fixture(scope="module")
def distance() -> LPIPS:
    model = LPIPS()
    seed_weights(model)
    with torch.no_grad():
        for number in range(5):
            getattr(model, f"lin{number}").model[1].weight.abs_()  # like trained weights
    return model


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No VGG16 to be found anywhere, and any connection fails the test."""

    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.delenv(lpips.VGG16_VARIABLE, raising=False)


def images(seed: int, size: int = 32) -> torch.Tensor:
    return torch.tanh(randn(seed, 2, 3, size, size))


def vgg16_file(path, distance: LPIPS) -> str:
    """VGG16 as torchvision stores it, classifier included."""
    weights = {"features." + name.split(".", 1)[1]: p.detach().clone() for name, p in distance.net.named_parameters()}
    torch.save({**weights, "classifier.0.weight": torch.zeros(1)}, path)
    return str(path)


def test_is_zero_between_equals_and_grows_with_the_difference(distance):
    x, noise = images(1), 0.1 * images(2)
    assert (distance(x, x) == 0).all()
    near, far = distance(x, x + noise), distance(x, x + 4 * noise)
    assert near.shape == (2, 1, 1, 1) and (near > 0).all() and (far > near).all()


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_gradients_are_finite_for_equal_and_constant_images(distance, value):
    x = torch.full((1, 3, 32, 32), value)
    reconstruction = x.clone().requires_grad_()
    distance(x, reconstruction).sum().backward()
    assert torch.isfinite(reconstruction.grad).all()


def test_gradients_are_finite_if_all_features_are_zero(distance):
    features = torch.zeros(1, 8, 2, 2, requires_grad=True)
    lpips._unit_length(features).sum().backward()
    assert torch.isfinite(features.grad).all()


def test_is_frozen_and_in_eval_mode_inside_a_parent_in_training(distance):
    parent = torch.nn.ModuleList([distance]).train()
    assert parent.training and not any(module.training for module in distance.modules())
    assert not any(p.requires_grad for p in distance.parameters())


def test_is_computed_in_float32_under_autocast(distance):
    x, y = images(3), images(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = distance(x.bfloat16(), y.bfloat16())
    assert inside.dtype == torch.float32
    assert torch.equal(inside, distance(x.bfloat16().float(), y.bfloat16().float()))


def test_greyscale_counts_as_three_equal_channels(distance):
    x, y = images(5)[:, :1], images(6)[:, :1]
    assert rel_error(distance(x, y), distance(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1))) < 1e-6


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (1, 3, 8, 8)])
def test_other_images_are_errors_that_name_perceptual_weight(distance, shape):
    with pytest.raises(ValueError, match="perceptual_weight: 0"):
        distance(torch.zeros(shape), torch.zeros(shape))


def test_building_needs_no_network_and_leaves_has_weights_false(no_network):
    with torch.device("meta"):
        assert not LPIPS().has_weights


def test_without_weights_the_error_is_one_line_that_says_what_to_do(no_network, tmp_path):
    with pytest.raises(PerceptualWeightsError) as caught:
        LPIPS().load_pretrained()
    message = str(caught.value)
    assert "\n" not in message
    for part in (lpips.VGG16_URL, str(tmp_path), lpips.VGG16_VARIABLE):
        assert part in message
    for option in ("perceptual_weights", "perceptual_weight: 0", "perceptual_init: random"):
        assert option in message


def test_a_download_with_another_hash_is_an_error(no_network, monkeypatch, tmp_path):
    served = tmp_path / "served.pth"
    served.write_bytes(b"something else")
    monkeypatch.setattr(lpips, "VGG16_URL", served.as_uri())
    with pytest.raises(PerceptualWeightsError, match="invalid hash"):
        LPIPS().load_pretrained()
    assert not (tmp_path / "empty/hub/checkpoints/served.pth").exists()


@pytest.mark.parametrize("source", ["config", "environment", "hub"])
def test_weights_come_from_a_local_file(distance, source, no_network, monkeypatch, tmp_path):
    path = vgg16_file(tmp_path / "vgg16-397923af.pth", distance)
    if source == "environment":
        monkeypatch.setenv(lpips.VGG16_VARIABLE, path)
    if source == "hub":
        folder = tmp_path / "empty/hub/checkpoints"
        folder.mkdir(parents=True)
        (tmp_path / "vgg16-397923af.pth").rename(folder / "vgg16-397923af.pth")
    model = LPIPS(path if source == "config" else None)
    model.load_pretrained()
    assert model.has_weights
    assert torch.equal(model.net.slice3[1].weight, distance.net.slice3[1].weight)
    assert (model.lin4.model[1].weight >= 0).all() and not torch.equal(
        model.lin4.model[1].weight, distance.lin4.model[1].weight
    )


def test_weights_come_from_a_first_stages_checkpoint(distance, no_network, tmp_path):
    weights = {f"loss.perceptual_loss.{name}": value for name, value in distance.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "kl.ckpt")
    model = LPIPS(tmp_path / "kl.ckpt")
    model.load_pretrained()
    x, y = images(7), images(8)
    assert torch.equal(model(x, y), distance(x, y))


def test_loaded_weights_are_kept_and_nothing_is_fetched(distance, no_network):
    parent = torch.nn.ModuleDict({"perceptual_loss": LPIPS()})
    parent.load_state_dict({f"perceptual_loss.{name}": value for name, value in distance.state_dict().items()})
    parent["perceptual_loss"].load_pretrained()
    assert torch.equal(parent["perceptual_loss"].lin0.model[1].weight, distance.lin0.model[1].weight)


def test_a_part_of_the_weights_does_not_count(distance):
    model = LPIPS()
    model.load_state_dict(
        {name: value for name, value in distance.state_dict().items() if "lin" not in name}, strict=False
    )
    assert not model.has_weights


def test_a_misspelt_path_is_an_error_even_if_another_source_works(distance, no_network, monkeypatch, tmp_path):
    monkeypatch.setenv(lpips.VGG16_VARIABLE, vgg16_file(tmp_path / "vgg.pth", distance))
    with pytest.raises(PerceptualWeightsError, match=r"perceptual_weights=missing\.pth"):
        LPIPS("missing.pth").load_pretrained()


def test_a_file_of_something_else_is_an_error(no_network, tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(PerceptualWeightsError, match=r"other\.pth: not VGG16"):
        LPIPS(tmp_path / "other.pth").load_pretrained()
