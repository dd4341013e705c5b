"""The meter: FLOPs of matrix products, convolutions and recurrent layers, seconds, bytes."""

import time

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoflip import meter


def test_linear_and_convolution_agree_with_torchs_counter():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    x = torch.randn(2, 1, 8, 8)
    with FlopCounterMode(display=False) as torchs:
        model(x).sum().backward()
    with meter.measure(model) as cost:
        model(x).sum().backward()
    assert cost.flops == torchs.get_total_flops() > 0


@pytest.mark.parametrize("layers", [1, 2])
def test_fused_lstm_is_counted(layers):
    steps, batch, inputs, hidden = 7, 3, 5, 11
    model = nn.LSTM(inputs, hidden, num_layers=layers, batch_first=True)
    x = torch.randn(batch, steps, inputs)
    forward = meter.count_flops(lambda: model(x))
    widths = [inputs] + [hidden] * (layers - 1)
    want = sum(2 * batch * steps * 4 * hidden * (w + hidden) for w in widths)
    assert forward == want
    both = meter.count_flops(lambda: model(x)[0].sum().backward())
    # weights' and inputs' gradients: as many products each as the forward pass
    assert both == 3 * want


def attention_flops(batch, positions, width, hidden):
    rows = batch * positions
    scores = 2 * 2 * batch * positions**2 * width
    return 2 * rows * 4 * width**2 + scores + 2 * rows * 2 * width * hidden


def test_a_transformer_costs_the_same_with_and_without_gradients():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 8)

    @torch.no_grad()
    def plain():
        model(x)

    assert torch.backends.mha.get_fastpath_enabled()
    want = 2 * attention_flops(3, 5, 8, 16)
    assert meter.count_flops(lambda: model(x)) == want
    assert meter.count_flops(plain) == want
    with meter.measure(model) as cost:
        plain()
        assert meter.count_flops(plain) == want  # ends without switching the fast path on again
        plain()
    assert cost.flops == 3 * want
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError), meter.measure():
        _ = 1 / 0
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_alone_is_counted(need_weights):
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(3, 5, 8)
    want = attention_flops(3, 5, 8, 0)
    assert meter.count_flops(lambda: layer(x, x, x, need_weights=need_weights)) == want
    with torch.no_grad():
        assert meter.count_flops(lambda: layer(x, x, x, need_weights=need_weights)) == want


def test_fused_attention_costs_what_its_products_cost():
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    forward = 2 * 2 * 3 * 5 * 7 * (8 + 8)
    attend = nn.functional.scaled_dot_product_attention
    assert meter.count_flops(lambda: attend(q, k, v)) == forward
    # backward makes the scores again, then two products for each of the two
    assert meter.count_flops(lambda: attend(q, k, v).sum().backward()) == forward * 7 // 2


class Token(nn.Module):
    """A parameter goes through a layer itself."""

    def __init__(self):
        super().__init__()
        self.token, self.norm, self.out = nn.Parameter(torch.randn(1, 8)), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(x + self.norm(self.token))


def test_gradients_of_a_parameter_that_a_layer_is_given_are_counted():
    net, x = Token(), torch.randn(4, 8)

    def gradients():
        torch.autograd.grad(net(x).square().sum(), list(net.parameters()))

    assert meter.count_flops(gradients) == meter.count_flops(lambda: net(x).square().sum().backward()) == 3 * 2 * 96


def test_seconds_and_bytes_of_a_block():
    with meter.measure() as outer:
        with meter.measure() as inner:
            time.sleep(0.02)
            meter.charge_bytes(up=5, down=7)
        meter.charge_bytes(up=1)
    assert inner.seconds >= 0.02
    assert (inner.bytes_up, inner.bytes_down, inner.bytes) == (5, 7, 12)
    assert (outer.bytes_up, outer.bytes_down) == (6, 7)
    assert outer.seconds >= inner.seconds


def test_costs_add_up():
    assert meter.Cost(1, 2.0, 3, 4) + meter.Cost(10, 20.0, 30, 40) == meter.Cost(11, 22.0, 33, 44)


def test_the_machine_names_itself():
    about = meter.machine()
    assert about["cpu"]
    assert about["torch"] == torch.__version__
