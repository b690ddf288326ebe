"""Calls of networks with 16-bit weights."""

import torch
from torch import nn

from ldm.modules.dtype import in_dtype, weights_dtype


def test_the_dtype_of_a_module_is_that_of_its_first_floating_point_weight():
    assert weights_dtype(nn.Linear(2, 2).half()) == torch.float16 and weights_dtype(nn.Identity()) is None


def test_a_call_computes_in_the_given_dtype_and_returns_that_of_the_input_contiguous():
    seen = []

    def transpose(x):
        seen.append(x.dtype)
        return x.T

    x = torch.ones(2, 3)
    out = in_dtype(torch.bfloat16, transpose, x)
    assert seen == [torch.bfloat16] and out.dtype == torch.float32 and out.is_contiguous()
    for dtype in (None, torch.float32):
        assert in_dtype(dtype, lambda x: x, x) is x
