"""Reconstructions of first stages."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from ldm.evaluation.first_stage import (
    Latents,
    difference,
    first_stage_figure,
    first_stage_metrics,
    psnr_interval,
    reconstruct,
)
from ldm.evaluation.metrics import psnr
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.vq import VQModel
from ldm.modules.losses.lpips import LPIPS
from tests.evaluation.sets import bars
from tests.tiny import FIRST_STAGE

DDCONFIG = FIRST_STAGE["params"]["ddconfig"]
IDENTITY = {"target": "torch.nn.Identity"}


@pytest.fixture(scope="module")
def vq() -> VQModel:
    torch.manual_seed(0)
    ddconfig = {**DDCONFIG, "double_z": False}
    return VQModel(ddconfig=ddconfig, lossconfig=IDENTITY, n_embed=8, embed_dim=4).eval()


def test_errors_of_reconstructions_are_those_of_their_images(vq):
    images = bars(5)
    found = reconstruct(vq, images, 2, "cpu", None)
    assert found.images.shape == images.images.shape and set(found.errors) == {"mse", "ssim"}
    exact = psnr(found.images / 127.5 - 1, images.images / 127.5 - 1)
    metrics = first_stage_metrics(found, np.random.rand(5, 3), np.random.rand(5, 3))
    assert metrics["psnr"].value == pytest.approx(exact, abs=1e-4) and metrics["ssim"].value < 1
    pair = [torch.from_numpy(x).permute(0, 3, 1, 2).double() / 255 for x in (found.images, images.images)]
    known = structural_similarity_index_measure(*pair, data_range=1.0)
    assert metrics["ssim"].value == pytest.approx(float(known), abs=1e-4)
    assert first_stage_figure("t", images, found).height > 400


def test_codebook_use_and_latents_are_counted_over_all_batches(vq):
    x = torch.from_numpy(bars(4).images).permute(0, 3, 1, 2) / 127.5 - 1
    latents = Latents(vq)
    with torch.no_grad():
        for part in x.split(2):
            latents.decoded(part)
        z, _, (_, _, codes) = vq.encode(x)
    found = latents.summary()
    assert found["codebook_usage"] == len(codes.unique()) / 8 and 1 <= found["codebook_perplexity"] <= 8
    assert found["std"] == pytest.approx(float(z.std(correction=0)), rel=1e-4)
    assert found["channel_mean"] == pytest.approx(z.mean(dim=(0, 2, 3)).tolist(), abs=1e-5)
    assert found["shape"] == list(z.shape[1:])


def test_a_kl_first_stage_decodes_its_mode_and_reports_the_kl(vq):
    torch.manual_seed(0)
    model = AutoencoderKL(ddconfig={**DDCONFIG, "double_z": True}, lossconfig=IDENTITY, embed_dim=4).eval()
    x = torch.from_numpy(bars(2).images).permute(0, 3, 1, 2) / 127.5 - 1
    latents = Latents(model)
    with torch.no_grad():
        decoded = latents.decoded(x)
        posterior = model.encode(x)
        assert torch.equal(decoded, model.decode(posterior.mode()))
    assert latents.summary()["kl"] == pytest.approx(float(posterior.kl().mean()), rel=1e-5)
    assert "codebook_usage" not in latents.summary()


def test_lpips_is_measured_if_it_is_given(vq):
    images = bars(2, size=32)
    assert reconstruct(vq, images, 2, "cpu", LPIPS()).errors["lpips"].shape == (2,)


def test_the_interval_of_psnr_is_that_of_the_squared_error():
    value, low, high = psnr_interval(np.array([1e-3] * 9 + [2e-3]))
    assert value == pytest.approx(-10 * np.log10(1.1e-3)) and low < value < high


def test_a_difference_is_gray_where_images_are_equal():
    a = np.full((2, 2, 3), 100, np.uint8)
    assert (difference(a, a) == 128).all() and (difference(a, a + 10) == 168).all()
