"""A softmax or sigmoid at the end of a network is told, once, where it was called; logits not."""

import copy
import warnings

import pytest
import torch
from strategies import inputs, mlp
from torch import nn

import fimlib
from fimlib import Bernoulli, Categorical, Gaussian

X = inputs(6, 3)
PLAIN = mlp([3, 4, 3], nn.Tanh)
SOFTMAX = nn.Sequential(PLAIN, nn.Softmax(dim=1))
SIGMOID = nn.Sequential(PLAIN, nn.Sequential(nn.Sigmoid(), nn.Dropout(0.5)), nn.Flatten()).eval()
REMEDY = "the outputs look like probabilities; Categorical takes logits: remove the softmax"


class Ends(nn.Module):
    """A network with a forward pass of its own."""

    def __init__(self, end):
        super().__init__()
        self.layer, self.end = nn.Linear(3, 3).double(), end

    def forward(self, x):
        return self.end(self.layer(x))


def told(call):
    """The warnings of a call, by message; all of them point here."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    assert {w.filename for w in found} <= {__file__}
    assert {w.category for w in found} <= {UserWarning}
    return [str(w.message) for w in found]


CALLS = {
    "accumulate": lambda net, x: fimlib.accumulate(
        net, x, Categorical(), batch_size=2, quantities=["I"]
    ),
    "batches": lambda net, x: fimlib.accumulate(net, x.split(4), Categorical(), quantities=["I"]),
    "summarise": lambda net, x: fimlib.summarise(net, x, Categorical(), num_probes=4),
    "matrix": lambda net, x: fimlib.fisher_matrix(
        net, x, Categorical(), parameters=[next(iter(dict(net.named_parameters())))]
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("net", [SOFTMAX, Ends(lambda h: h.softmax(1))], ids=["chain", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_softmax_at_the_end_is_told_once(net, dtype, call):
    net = copy.deepcopy(net).to(dtype)
    [message] = told(lambda: call(net, X.to(dtype)))
    assert message.startswith(REMEDY)


def test_of_derivatives_it_is_told_as_well():
    family, derivs = Categorical(), fimlib.differentiate(SOFTMAX, X, order=1)
    for quantity in (fimlib.fisher_information, fimlib.variance_i1):
        [message] = told(lambda quantity=quantity: quantity(derivs, family))
        assert message.startswith(REMEDY)
    labels = family.observed(derivs.outputs, [0, 1, 2, 0, 1, 2])
    for estimate in (fimlib.estimate_i1, fimlib.data_fisher, fimlib.data_fisher_variance):
        assert len(told(lambda estimate=estimate: estimate(derivs, labels))) == 1


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    "end",
    [
        lambda h: h,
        torch.relu,  # not negative, other sums
        torch.sigmoid,
        lambda h: h - h.mean(1, keepdim=True) + 1 / 3,  # they sum to 1, some negative
        lambda h: h.log_softmax(1),  # which is as good as the logits
    ],
)
def test_logits_are_taken_in_silence(end, call):
    assert told(lambda: call(Ends(end), X)) == []


def test_other_families_take_what_sums_to_1():
    for family in (Gaussian(), Bernoulli()):
        assert (
            told(lambda family=family: fimlib.accumulate(SOFTMAX, X, family, quantities=["I"]))
            == []
        )


@pytest.mark.parametrize("call", [fimlib.accumulate, fimlib.summarise])
def test_of_a_sigmoid_the_last_module_decides(call):
    """Logits may lie between 0 and 1, too."""
    [message] = told(lambda: call(SIGMOID, X, Bernoulli()))
    assert "ends in a Sigmoid" in message
    assert "Bernoulli takes logits: remove the sigmoid" in message
    assert told(lambda: call(SIGMOID, X, Gaussian())) == []
    assert told(lambda: call(nn.Sequential(PLAIN, nn.ReLU6()), X, Bernoulli())) == []
    assert told(lambda: call(Ends(lambda h: h.sigmoid()), X, Bernoulli())) == []  # nothing shows it
