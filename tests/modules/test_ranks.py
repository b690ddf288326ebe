"""Training does not depend on how the samples of an optimizer step are split into ranks and batches."""

import copy
from collections import Counter

import pytest
import torch

from ldm.modules.ranks import SharedBatchNorm2d
from tests.ranks import largest_difference, train, train_on
from tests.reference import randn

KINDS = ("latent diffusion", "autoencoder with GAN", "autoencoder with ActNorm", "VQ with GAN")
# 21 is not a multiple of 8: the last step of an epoch has 5 samples, 3 and 2 on two ranks.
JOB = {"length": 21, "steps": 5, "validation": 5}
# The data of a validation that is not due in the first epoch is loaded on all ranks alike, or they wait for each other.
RESUMED = {"kind": "autoencoder", "length": 21, "validation": 5, "validate_every": 2}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Records of two ranks with four samples each, for each kind, and a checkpoint of another run."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = [{**JOB, "kind": kind, "batch_size": 4} for kind in KINDS]
    jobs.append({**RESUMED, "batch_size": 4, "steps": 2, "save": str(folder / "x.ckpt")})
    return dict(zip((*KINDS, "resumed"), train_on(2, jobs, folder))), folder / "x.ckpt"


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_have_the_curves_of_one(two_ranks, kind):
    one = train(kind, 8, **JOB)
    assert one["curves"] and one["validations"]
    for record in two_ranks[0][kind]:
        assert largest_difference(one["curves"], record["curves"]) < 1e-5
        assert largest_difference(one["validations"], record["validations"]) < 1e-5


@pytest.mark.parametrize(("size", "accumulate"), [(4, 2), (2, 4), (3, 3)])
@pytest.mark.parametrize("kind", ["latent diffusion", "autoencoder"])
def test_accumulated_batches_have_the_curves_of_one(kind, size, accumulate):
    one, several = train(kind, size * accumulate, **JOB), train(kind, size, accumulate, **JOB)
    assert largest_difference(one["curves"], several["curves"]) < 1e-5
    assert largest_difference(one["validations"], several["validations"]) < 1e-5


def test_a_resume_on_one_rank_repeats_and_misses_no_sample_of_two(two_ranks):
    records, path = two_ranks
    after = train(batch_size=3, steps=12, resume=str(path), **RESUMED)
    used = Counter(tuple(sample) for record in (*records["resumed"], after) for sample in record["samples"])
    assert set(used.values()) == {1} and {(0, index) for index in range(21)} < set(used)


def test_shared_batch_norm_is_batch_norm_of_all_samples(monkeypatch):
    # One process in the place of two: every sum over the ranks counts this rank's part twice.
    monkeypatch.setattr("ldm.modules.ranks.number_of_ranks", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda x: x.mul_(2))
    plain = torch.nn.BatchNorm2d(3)
    torch.nn.init.normal_(plain.weight), torch.nn.init.normal_(plain.bias)
    shared = copy.deepcopy(plain)
    shared.__class__ = SharedBatchNorm2d
    x, direction = randn(1, 2, 3, 4, 4) * 2 + 5, randn(2, 2, 3, 4, 4)
    ours, both = x.clone().requires_grad_(), torch.cat([x, x]).requires_grad_()
    out, expected = shared(ours), plain(both)
    torch.testing.assert_close(out, expected[:2])
    out.backward(direction)
    expected.backward(torch.cat([direction, direction]))
    torch.testing.assert_close(ours.grad, both.grad[:2])
    for name in ("weight", "bias"):
        torch.testing.assert_close(2 * getattr(shared, name).grad, getattr(plain, name).grad)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(shared, name), getattr(plain, name))
