"""The classifier that is trained in place."""

import numpy as np
import torch

from ldm.evaluation.classifier import SmallClassifier, reduced, train_classifier
from tests.evaluation.sets import bars


def test_it_learns_a_small_labelled_set():
    train, held_out = bars(64), bars(40, seed=1)
    weights = train_classifier(
        reduced(torch.from_numpy(train.images)), torch.from_numpy(train.labels), 2, steps=30, progress=False
    )
    model = SmallClassifier(2).eval()
    model.load_state_dict(dict(weights))
    with torch.no_grad():
        read = model(reduced(torch.from_numpy(held_out.images))).argmax(dim=1).numpy()
    assert np.mean(read == held_out.labels) > 0.9


def test_its_weights_follow_from_the_seed_and_the_global_generator_is_left_alone():
    train = bars(8)
    args = reduced(torch.from_numpy(train.images)), torch.from_numpy(train.labels), 2
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (train_classifier(*args, seed=seed, steps=2, progress=False) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first["neck.weight"], again["neck.weight"])
    assert not torch.equal(first["neck.weight"], other["neck.weight"])
