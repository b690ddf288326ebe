"""Training does not depend on how the samples of an optimizer step are split into ranks and batches."""

from collections import Counter

import pytest

from tests.ranks import largest_difference, train, train_on

KINDS = ("latent diffusion", "autoencoder with GAN", "autoencoder with ActNorm", "VQ with GAN")
# 21 is not a multiple of 8: the last step of an epoch has 5 samples, 3 and 2 on two ranks.
JOB = {"length": 21, "steps": 5, "validation": 5}
RESUMED = {"kind": "autoencoder", "length": 21}

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
