"""Layers with packed bfloat16 weights: the same numbers, state dict and gradients as plain ones."""

import copy

import pytest
import torch
from torch import nn

from ldm.modules import prepacked
from ldm.modules.prepacked import PrepackedConv2d, PrepackedLinear, prepack
from tests.reference import randn, rel_error

pytestmark = pytest.mark.skipif(not prepacked.is_supported(), reason="no bfloat16 instructions")
X = randn(0, 2, 8, 16, 16).bfloat16()


def plain(**options) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(8, 24, 3, stride=2, padding=1, **options)
    layers = first, nn.Conv2d(24, 8, 1, bias=False), nn.Flatten(2), nn.Linear(64, 40)
    return nn.Sequential(*layers).bfloat16().requires_grad_(False)


def packed() -> nn.Sequential:
    """A network whose weights are packed already."""
    net = plain()
    prepack(net)
    with torch.no_grad():
        net(X)
        assert not any(net[i].weight.is_mkldnn for i in (0, 1, 3))
        net(X)
    assert [type(net[i]) for i in (0, 1, 3)] == [PrepackedConv2d, PrepackedConv2d, PrepackedLinear]
    assert all(net[i].weight.is_mkldnn for i in (0, 1, 3))
    return net


@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs_are_equal_up_to_rounding_also_of_another_size(batch, layout):
    x = randn(1, batch, 8, 16, 16).bfloat16().to(memory_format=layout)
    with torch.no_grad():
        assert rel_error(packed()(x).float(), plain()(x).float()) < 4e-3  # half a unit of bfloat16's last place


def test_the_state_dict_is_that_of_plain_layers_and_loads_again():
    net, state = packed(), plain().state_dict()
    assert all(torch.equal(net.state_dict()[key], tensor) for key, tensor in state.items())
    net.load_state_dict({key: 2 * tensor for key, tensor in state.items()})
    assert torch.equal(net[3].weight, 2 * state["3.weight"])


@pytest.mark.parametrize("change", [copy.deepcopy, nn.Module.float, lambda net: net.to("cpu", torch.float64)])
def test_a_packed_network_can_be_copied_and_cast(change):
    net = change(packed())
    x = X.to(net[0].weight.dtype)
    assert rel_error(net(x).double(), plain().to(x.dtype)(x).double()) < 4e-3


def test_gradients_of_the_input_are_those_of_plain_layers():
    gradients = []
    for net in (packed(), plain()):
        x = X.clone().requires_grad_()
        net(x).float().square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)  # of the same plain layers


def test_weights_that_train_keep_their_parameters():
    net = packed().requires_grad_(True)
    net.load_state_dict(plain().state_dict())  # plain again
    parameters = list(net.parameters())
    net(X).float().sum().backward()
    assert all(p is q and p.grad is not None for p, q in zip(parameters, net.parameters(), strict=True))


def _circular(layer):
    layer.padding_mode = "circular"
    layer._reversed_padding_repeated_twice = [1, 1, 1, 1]


def _other_forward(layer):
    layer._conv_forward = lambda x, weight, bias: torch.zeros_like(x)


@pytest.mark.parametrize("change", [_circular, _other_forward])
def test_a_layer_that_research_code_changes_computes_as_changed(change):
    layers = packed()[0], plain()[0]
    for layer in layers:
        change(layer)
    with torch.no_grad():
        assert torch.equal(*(layer(X) for layer in layers))


def test_an_input_without_batch_is_taken_as_by_a_plain_layer():
    with torch.no_grad():
        assert torch.equal(packed()[0](X[0]), plain()[0](X[0]))


def test_float32_hooked_and_padded_layers_stay_plain():
    hooked, same = plain(padding_mode="reflect"), nn.Sequential(nn.Conv2d(8, 8, 3, padding="same")).bfloat16()
    hooked[1].register_forward_hook(lambda *args: None)
    for net in (plain().float(), hooked[:2], same):
        prepack(net)
        assert {type(layer) for layer in net} <= {nn.Conv2d, nn.Linear, nn.Flatten}
