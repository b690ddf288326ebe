"""Laws of previews."""

import torch

from ldm.web import preview
from ldm.web.preview import SHOWN_SIDE, Previews


def test_a_cheap_first_stage_decodes_and_the_random_state_stays(pipeline):
    z, before = torch.randn(2, 4, 8, 8), torch.get_rng_state()
    image = Previews(pipeline)(z)
    assert max(image.size) == SHOWN_SIDE and torch.equal(torch.get_rng_state(), before)


def test_the_linear_map_gives_the_mean_colors_of_a_first_stage_that_is_linear(pipeline, monkeypatch):
    def encode(x):
        """Latents of 4 channels: the mean colors in another basis, and a constant."""
        small = torch.nn.functional.avg_pool2d(x, 4)
        return torch.cat([small.flip(1) * 2 - 0.3, torch.ones_like(small[:, :1])], dim=1)

    monkeypatch.setattr(pipeline.model, "encode_first_stage", encode)
    monkeypatch.setattr(preview, "CHEAP", 0)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    seen = Previews(pipeline).linear(pipeline.model.get_first_stage_encoding(encode(x)))
    torch.testing.assert_close(seen, torch.nn.functional.avg_pool2d(x, 4), atol=1e-3, rtol=0)


def test_a_prediction_that_is_not_finite_is_shown_and_does_not_end_the_job(pipeline):
    assert Previews(pipeline)(torch.full((1, 4, 8, 8), float("nan"))).getbbox() is not None
