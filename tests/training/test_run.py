"""The part of a run that needs torch: messages."""

import pytest
from torch import nn

from ldm.training.run import _misfits


def test_a_state_of_another_shape_is_described_by_three_keys_the_count_and_the_settings():
    def model(ch):
        encoder = nn.ModuleDict({"conv_in": nn.Conv2d(3, ch, 3), "conv_out": nn.Conv2d(ch, 8, 3)})
        return nn.ModuleDict({"encoder": encoder, "norm": nn.BatchNorm1d(ch)})

    with pytest.raises(RuntimeError) as error:
        model(32).load_state_dict(model(64).state_dict())
    text = _misfits(str(error.value))
    assert text.startswith("encoder.conv_in.weight is [64, 3, 3, 3] in the file and [32, 3, 3, 3] in the model; ")
    assert text.count("in the file") == 3 and " and 4 more; the file needs ddconfig.ch=64; undo the change" in text
