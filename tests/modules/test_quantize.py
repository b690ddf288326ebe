"""The quantizer, compared with taming's, which trained the published models."""

import numpy as np
import pytest
import torch

from ldm.modules import quantize
from ldm.modules.quantize import TamingVectorQuantizer2, VectorQuantizer2
from tests.reference import randn

Z = randn(1, 2, 3, 4, 5)


def pair(n_e: int = 32, **options) -> tuple[VectorQuantizer2, TamingVectorQuantizer2]:
    """Ours and taming's with the same spread-out codebook."""
    made = [cls(n_e, 3, beta=0.25, **options) for cls in (VectorQuantizer2, TamingVectorQuantizer2)]
    for quantizer in made:
        quantizer.embedding.weight.data.copy_(randn(2, n_e, 3))
    return made[0], made[1]


@pytest.fixture
def used(tmp_path) -> str:
    np.save(tmp_path / "used.npy", np.array([5, 1, 9, 30]))
    return str(tmp_path / "used.npy")


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("sane_index_shape", [True, False])
def test_values_loss_codes_and_gradients_are_those_of_taming(legacy, sane_index_shape):
    results = []
    for quantizer in pair(legacy=legacy, sane_index_shape=sane_index_shape):
        z = Z.clone().requires_grad_(True)
        z_q, loss, (_, _, codes) = quantizer(z)
        (loss + (z_q * randn(3, *z_q.shape)).sum()).backward()
        results.append((z_q, loss, codes, z.grad, quantizer.embedding.weight.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)
    assert results[0][2].shape == ((2, 4, 5) if sane_index_shape else (40,))


def test_beta_weighs_the_codebook_in_the_published_order_and_the_commitment_in_the_other():
    for legacy, share in ((True, 1.0), (False, 0.25)):
        quantizer, _ = pair(legacy=legacy)
        z = Z.clone().requires_grad_(True)
        z_q, loss, _ = quantizer(z)
        loss.backward()
        torch.testing.assert_close(z.grad, share * 2 * (Z - z_q.detach()) / Z.numel())


@torch.no_grad()
def test_searching_in_parts_changes_nothing(monkeypatch):
    quantizer, _ = pair()
    whole = quantizer(Z)[2][2]
    monkeypatch.setattr(quantize, "DISTANCES_AT_ONCE", 32 * 7)
    assert torch.equal(quantizer(Z)[2][2], whole)
    monkeypatch.setattr(quantize, "DISTANCES_AT_ONCE", 1)
    assert torch.equal(quantizer(Z)[2][2], whole)


@torch.no_grad()
def test_under_autocast_and_in_half_precision_the_search_is_float32():
    quantizer, _ = pair(4096)
    codes = quantizer(Z)[2][2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_q, loss, info = quantizer(Z)
    assert torch.equal(info[2], codes) and z_q.dtype == loss.dtype == torch.float32
    exact = quantizer.bfloat16().float()(Z.bfloat16().float())
    z_q, loss, info = quantizer.bfloat16()(Z.bfloat16())
    assert torch.equal(info[2], exact[2][2]) and z_q.dtype == torch.bfloat16 and torch.equal(loss, exact[1])


@torch.no_grad()
@pytest.mark.parametrize("sane_index_shape", [True, False])
def test_codes_give_their_entries_back(sane_index_shape, used):
    for options in ({}, {"remap": used, "unknown_index": "random"}):
        quantizer, _ = pair(sane_index_shape=sane_index_shape)
        z = quantizer.embedding.weight[torch.tensor([5, 1, 9, 30])].T.reshape(1, 3, 2, 2)
        quantizer, _ = pair(sane_index_shape=sane_index_shape, **options)
        z_q, _, (_, _, codes) = quantizer(z)
        assert codes.flatten().tolist() == ([0, 1, 2, 3] if options else [5, 1, 9, 30])
        torch.testing.assert_close(quantizer.get_codebook_entry(codes, (1, 2, 2, 3)), z_q)


@torch.no_grad()
def test_codes_outside_remap_become_the_unknown_one(used):
    quantizer, _ = pair(remap=used, unknown_index="extra")
    plain, _ = pair()
    theirs = plain(Z)[2][2].tolist()
    expected = [[5, 1, 9, 30].index(code) if code in (5, 1, 9, 30) else 4 for code in theirs]
    codes = quantizer(Z)[2][2]
    assert codes.tolist() == expected and quantizer.re_embed == 5 and {0, 4} & set(expected)
    before = codes.clone()
    assert quantizer.unmap_to_all(codes.reshape(2, -1)).flatten().tolist() == [
        [5, 1, 9, 30, 5][code] for code in expected
    ]
    assert torch.equal(codes, before)
    assert set(pair(remap=used, unknown_index=2)[0](Z)[2][2].tolist()) == {2} | set(expected) - {4}
    random = pair(remap=used)[0](Z)[2][2]
    assert random.min() >= 0 and random.max() < 4


def test_the_state_dict_has_the_published_names(used):
    assert list(pair()[0].state_dict()) == ["embedding.weight"]
    assert (
        set(pair(remap=used)[0].state_dict()) == {"embedding.weight", "used"} == set(pair(remap=used)[1].state_dict())
    )


def test_nothing_is_printed(used, capsys):
    VectorQuantizer2(32, 3, 0.25, remap=used)
    assert capsys.readouterr().out == ""


def test_wrong_options_are_errors(tmp_path, used):
    np.save(tmp_path / "wrong.npy", np.array([0, 32]))
    with pytest.raises(ValueError, match="codes from 0 to 31"):
        VectorQuantizer2(32, 3, 0.25, remap=tmp_path / "wrong.npy")
    with pytest.raises(ValueError, match="unknown_index=4: choose 'random', 'extra' or a number from 0 to 3"):
        VectorQuantizer2(32, 3, 0.25, remap=used, unknown_index=4)
    with pytest.raises(ValueError, match="at least 1"):
        VectorQuantizer2(0, 3, 0.25)
    with pytest.raises(ValueError, match="Gumbel"):
        pair()[0](Z, temp=0.5)
