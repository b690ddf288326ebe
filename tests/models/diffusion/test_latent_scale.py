"""Laws of the scale factor of latents."""

import pytest
import torch

from tests.models.diffusion.tiny import fit, latent_diffusion, loader

MEASURED = {"scale_factor": 1.0, "scale_by_std": True}


def build(**changes):
    return latent_diffusion(None, {}, "__is_unconditional__", **changes)


def test_a_measured_scale_gives_unit_deviation_is_saved_and_not_measured_again(tmp_path):
    model = build()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "fixed.ckpt")
    tuned = build(ckpt_path=str(tmp_path / "fixed.ckpt"), **MEASURED)  # a file without a scale factor
    fit(tuned, steps=1)
    z = torch.cat([tuned.get_input(data, "image")[0] for data in loader(2)])
    assert abs(float(z.std()) - 1) < 0.05 and float(tuned.scale_factor) != 1.0 and "scale_factor" in tuned.state_dict()
    torch.save({"state_dict": tuned.state_dict()}, tmp_path / "measured.ckpt")
    again = build(ckpt_path=str(tmp_path / "measured.ckpt"), **MEASURED)
    fit(again, steps=1)
    assert torch.equal(again.scale_factor, tuned.scale_factor)
    with pytest.raises(ValueError, match=r"set model\.params\.scale_factor="):
        build(ckpt_path=str(tmp_path / "measured.ckpt"))
    assert build(ckpt_path=str(tmp_path / "measured.ckpt"), ignore_keys=["scale_factor"]).scale_factor == 0.18215
