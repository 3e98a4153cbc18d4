"""The engine for first derivatives of any network: against the oracle, and what it must refuse."""

import copy
import warnings

import pytest
import reference
import torch
import torch.nn.functional as F  # noqa: N812
from lying import ForgottenFactor, NoBackward, Sine, StraightThrough
from strategies import Call, inputs, mlp
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

import fimlib
from fimlib import differentiate
from fimlib.engines import first_order, forward_mode, functional


def pair(forward):
    """A network of two linear layers, with whatever between them."""
    return Call(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 3))


def transformer(activation="relu"):
    return Call(
        lambda self, x: self.head(self.norm(self.layer(self.tokens(x))).mean(1)),
        tokens=nn.Embedding(5, 4),
        layer=nn.TransformerEncoderLayer(4, 2, 6, activation=activation, batch_first=True),
        norm=nn.LayerNorm(4),
        head=nn.Linear(4, 3),
    )


def attention():
    def forward(self, x):
        z = self.tokens(x)
        return self.head((z + self.attend(z, z, z)[0]).mean(1))

    return Call(
        forward,
        tokens=nn.Embedding(5, 4),
        attend=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 3),
    )


def recurrent(cell):
    return Call(
        lambda self, x: self.head(self.cell(x)[0][:, -1]),
        cell=cell(2, 3, batch_first=True),
        head=nn.Linear(3, 3),
    )


def normalised():
    return Call(
        lambda self, x: self.head(F.silu(self.norm(self.conv(x))).flatten(1)),
        conv=nn.Conv1d(1, 4, 3),
        norm=nn.GroupNorm(2, 4),
        head=nn.Linear(8, 3),
    )


def tied():
    net = Call(
        lambda self, x: self.head(torch.tanh(self.tokens(x)).mean(1)),
        tokens=nn.Embedding(5, 4),
        head=nn.Linear(4, 5),
    )
    net.head.weight = net.tokens.weight
    return net


def parametrized():
    return Call(
        lambda self, x: self.b(torch.tanh(self.a(x))),
        a=parametrizations.weight_norm(nn.Linear(3, 4)),
        b=parametrizations.spectral_norm(nn.Linear(4, 3)),
    )


def controlled():
    """What is computed depends on the numbers of each input, in Python."""

    def forward(self, x):
        z = [self.a(one) if one.sum().item() > 0 else torch.tanh(self.a(one)) for one in x]
        return self.b(torch.stack(z))

    return pair(forward)


def tempered():
    """With a learned temperature, a parameter without axes."""
    return Call(
        lambda self, x: torch.log_softmax(self.b(torch.tanh(self.a(x))) * self.t, dim=1),
        seed=1,
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 3),
        t=nn.Parameter(torch.tensor(0.7)),
    )


TOKENS = torch.tensor([[0, 3, 1], [2, 2, 4]])
SEQUENCES = inputs(2, 8).view(2, 4, 2)
NETWORKS = {
    "transformer, ReLU": (transformer, TOKENS),
    "transformer, GELU": (lambda: transformer("gelu"), TOKENS),
    "attention": (attention, TOKENS),
    "GRU": (lambda: recurrent(nn.GRU), SEQUENCES),
    "LSTM": (lambda: recurrent(nn.LSTM), SEQUENCES),
    "group norm": (normalised, inputs(2, 4).view(2, 1, 4)),
    "tied": (tied, TOKENS),
    "parametrized": (parametrized, inputs(2, 3)),
    "in-place": (lambda: pair(lambda self, x: self.b(self.a(x.mul_(2)).relu_())), inputs(2, 3)),
    "control flow": (controlled, inputs(2, 3)),
    "temperature": (tempered, inputs(2, 3)),
}
each = pytest.mark.parametrize("name", NETWORKS)


def close(a, b, tolerance=1e-10):
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def by_labels(net, x):
    """J, I and V₁ at one input: labels enumerated, autograd."""
    sigma = torch.softmax(net(x.clone())[0].detach(), dim=0)
    found = {}
    for name, parameter in net.named_parameters():
        scores = [
            torch.autograd.grad(torch.log_softmax(net(x.clone())[0], dim=0)[y], parameter)[0]
            for y in range(len(sigma))
        ]
        I = sum(p * c**2 for p, c in zip(sigma, scores, strict=True))
        v1 = sum(p * (c**2 - I) ** 2 for p, c in zip(sigma, scores, strict=True))
        found[name] = {"scores": scores, "I": I, "V1": v1}
    return sigma, found


@each
def test_fisher_and_variance_agree_with_enumerated_labels(name):
    make, x = NETWORKS[name]
    net, family = make(), fimlib.Categorical()
    derivs = differentiate(net, x, engine="functional", order=1)
    assert derivs.engine == "functional"
    I, V1 = fimlib.fisher_information(derivs, family), fimlib.variance_i1(derivs, family)
    labels = family.sample(derivs.outputs, 7, torch.Generator().manual_seed(0))
    i1 = fimlib.estimate_i1(derivs, labels)
    for b, one in enumerate(x.split(1)):
        _, expected = by_labels(net, one)
        assert list(I) == list(expected)
        for parameter, found in expected.items():
            assert close(I[parameter][b], found["I"])
            assert close(V1[parameter][b], found["V1"])
            shares = zip(labels.weights[b], found["scores"], strict=True)
            assert close(i1[parameter][b], sum(w * c**2 for w, c in shares))


@each
def test_theorem_4_1_holds_and_its_bounds_are_those_of_the_dense_tensors(name):
    make, x = NETWORKS[name]
    net, family = make(), fimlib.Categorical()
    derivs = differentiate(net, x[:1], engine="functional", order=1)
    I, V1 = fimlib.fisher_information(derivs, family), fimlib.variance_i1(derivs, family)
    bounds = fimlib.theorem_4_1(derivs, family)
    sigma, expected = by_labels(net, x[:1])
    top = torch.linalg.eigvalsh(torch.diag(sigma) - torch.outer(sigma, sigma))[-1]
    for parameter in expected:
        J = torch.stack(
            [
                torch.autograd.grad(h, net.get_parameter(parameter))[0]
                for h in (net(x[:1].clone())[0, a] for a in range(len(sigma)))
            ]
        )
        assert close(bounds[0].upper[parameter][0], top * J.square().sum(0))
        for quantity, interval in ((I, bounds[0]), (V1, bounds[1])):
            slack = 1e-12 * (1 + quantity[parameter].abs().max())
            assert (interval.lower[parameter] <= quantity[parameter] + slack).all()
            assert (quantity[parameter] <= interval.upper[parameter] + slack).all()


def by_places(net, x, names):
    derivs = first_order.differentiate(net, x, wanted=None).derivatives()
    return {n: derivs.jacobian(n) for n in names}


@each
@pytest.mark.parametrize("way", [by_places, functional.one_by_one])
def test_both_ways_give_the_oracle_j(name, way):
    make, x = NETWORKS[name]
    net = make()
    J = way(copy.deepcopy(net), x, [n for n, _ in net.named_parameters()])
    for b, one in enumerate(x.split(1)):
        for parameter, p in net.named_parameters():
            rows = [
                torch.autograd.grad(h, p, retain_graph=True)[0]
                for h in net(one.clone())[0].split(1)
            ]
            assert close(J[parameter][b], torch.stack(rows))


def test_blocks_are_dense_but_for_layers_that_see_each_input_once():
    derivs = differentiate(transformer(), TOKENS, engine="functional", order=1)
    names = [n for n, _ in transformer().named_parameters()]
    assert [n for block in derivs.blocks for n in block.inputs] == names
    shared = [list(block.inputs) for block in derivs.blocks if len(block.inputs) > 1]
    assert shared == [["head.weight", "head.bias"]]
    assert all(block.S is None for block in derivs.blocks)
    assert [block.layer for block in derivs.blocks[:2]] == ["tokens", "layer.self_attn"]
    assert derivs.jacobian("head.weight").shape == (2, 3, 3, 4)
    with pytest.raises(ValueError, match="first order only"):
        fimlib.variance_i2(derivs, fimlib.Categorical())


class Fresh(nn.Module):
    """The network with inputs that it may overwrite."""

    def __init__(self, net):
        super().__init__()
        self.net = copy.deepcopy(net)

    def forward(self, x):
        return self.net(x.clone())


@pytest.mark.long
@each
def test_both_orders_agree_with_the_oracle(name):
    make, x = NETWORKS[name]
    net = make()
    derivs = differentiate(net, x)
    for b, one in enumerate(x.split(1)):
        with sdpa_kernel(SDPBackend.MATH):
            J, S = reference.derivatives(Fresh(net), one)
        for parameter, _ in net.named_parameters():
            own = f"net.{parameter}"
            scale = S[own].abs().max() + J[own].abs().max()
            assert close(derivs.jacobian(parameter)[b] / scale, J[own] / scale), parameter
            if "original" not in parameter:  # torch's double backward of weight_norm is wrong
                assert close(derivs.second(parameter)[b] / scale, S[own] / scale), parameter


@pytest.mark.long
@pytest.mark.parametrize("way", forward_mode.WAYS)
def test_all_ways_to_second_derivatives_agree(way):
    (net, x), curves = (attention(), TOKENS), functional.second_order(way)
    found = functional.differentiate(net, x, wanted=None, way=curves).derivatives()
    for b, one in enumerate(x.split(1)):
        _, S = reference.derivatives(net, one)
        for name in S:
            assert close(found.second(name)[b], S[name]), name


def test_many_parameters_are_refused_with_the_cost_and_a_part_that_works(monkeypatch):
    monkeypatch.setattr(forward_mode, "MANY_PARAMETERS", 60)
    net = attention()
    message = (
        r"each of 115 parameters, about a second for these . inputs.*'attend.out_proj', 'head'"
    )
    with pytest.raises(NotImplementedError, match=message):
        differentiate(net, TOKENS)
    part = differentiate(net, TOKENS, layers=["head"])
    assert [n for block in part.blocks for n in block.inputs] == ["head.weight", "head.bias"]
    assert differentiate(net, TOKENS, engine="functional").engine == "functional"


def test_it_is_the_last_resort_of_auto():
    own = pair(lambda self, x: self.b(Sine.apply(self.a(x))))
    derivs = differentiate(own, inputs(2, 3), order=1)
    assert derivs.engine == "functional"
    expected = differentiate(pair(lambda self, x: self.b(self.a(x).sin())), inputs(2, 3))
    assert close(derivs.jacobian("a.weight"), expected.jacobian("a.weight"))
    assert differentiate(tied(), TOKENS, order=1).engine == "functional"
    assert differentiate(mlp([3, 4, 2], nn.Tanh), inputs(2, 3), order=1).engine == "layerwise"


def test_a_module_that_stands_under_two_names_has_the_total_derivative():
    shared, act = nn.Linear(3, 3), nn.Tanh()
    net = nn.Sequential(nn.Linear(4, 3), act, shared, act, shared).double().eval()
    weights = {n: p.clone() for n, p in net.state_dict().items()}
    derivs = differentiate(net, inputs(2, 4), order=1)
    assert derivs.engine == "functional"
    names = [name for block in derivs.blocks for name in block.inputs]
    assert sorted(names) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    for b, one in enumerate(inputs(2, 4)):
        J, _ = reference.derivatives(net, one[None])
        for name in names:
            assert torch.allclose(derivs.jacobian(name)[b], J[name], rtol=1e-10, atol=1e-12), name
    assert all(torch.equal(weights[n], p) for n, p in net.state_dict().items())


def test_a_tied_parameter_has_the_total_derivative_under_its_first_name():
    net = tied()
    J = differentiate(net, TOKENS, engine="functional", order=1)
    copied = copy.deepcopy(net)
    copied.head.weight = nn.Parameter(net.tokens.weight.detach().clone())
    parts = differentiate(copied, TOKENS, engine="functional", order=1)
    total = parts.jacobian("tokens.weight") + parts.jacobian("head.weight")
    assert close(J.jacobian("tokens.weight"), total)
    assert "head.weight" not in {n for block in J.blocks for n in block.inputs}


def test_only_the_wanted_parameters_are_differentiated():
    net = transformer()
    whole = differentiate(net, TOKENS, engine="functional", order=1)
    part = differentiate(net, TOKENS, engine="functional", order=1, layers=["norm", "head"])
    names = ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert [n for block in part.blocks for n in block.inputs] == names
    for n in names:
        assert close(part.jacobian(n), whole.jacobian(n), 1e-14)


def test_chunks_of_inputs_change_nothing(monkeypatch):
    x = torch.randint(5, (7, 3), generator=torch.Generator().manual_seed(0))
    whole = differentiate(transformer(), x, engine="functional", order=1)
    monkeypatch.setattr(first_order, "NUMBERS_AT_A_TIME", 150)
    batch = first_order.differentiate(transformer(), x, wanted=None)
    sizes = [share.inputs_at_a_time for share in batch.shares]
    assert min(sizes) == 1 < max(sizes)
    seen = [0] * len(whole.blocks)
    for i, at, part, piece, is_last in batch.pieces():
        assert close(piece.blocks[0].J, whole.blocks[i].J[at][:, :, part], 1e-14)
        seen[i] += piece.blocks[0].J.numel()
        assert is_last == (seen[i] == whole.blocks[i].J.numel())
    assert seen == [block.J.numel() for block in whole.blocks]


@pytest.mark.parametrize("make", [transformer, lambda: recurrent(nn.LSTM)])
def test_the_model_and_the_generators_stay_as_they_are(make):
    net = make()
    net.train()
    for module in net.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    net.head.weight.requires_grad_(False)
    net.head.bias.grad = torch.ones(3, dtype=torch.float64)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    x = TOKENS if hasattr(net, "tokens") else SEQUENCES
    kept = x.clone()
    derivs = differentiate(net, x, engine="functional", order=1)
    assert derivs.jacobian("head.weight").any()  # frozen, and reported
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert net.training
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["head.weight"]
    assert torch.equal(net.head.bias.grad, torch.ones(3, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert not any(block.J.requires_grad for block in derivs.blocks)


@pytest.mark.parametrize("make", [transformer, lambda: recurrent(nn.GRU), normalised])
def test_float32_networks(make):
    net = make()
    x = {"GRU": SEQUENCES, "transformer": TOKENS}.get(
        "GRU" if hasattr(net, "cell") else "transformer" if hasattr(net, "tokens") else "",
        inputs(2, 4).view(2, 1, 4),
    )
    exact = differentiate(net, x, engine="functional", order=1)
    narrow = x.float() if x.is_floating_point() else x
    derivs = differentiate(net.float(), narrow, engine="functional", order=1)
    for a, b in zip(exact.blocks, derivs.blocks, strict=True):
        assert b.J.dtype == torch.float32
        assert close(a.J, b.J, 1e-4)


def test_a_network_that_insists_on_float32():
    net = pair(lambda self, x: self.b(torch.tanh(self.a(x.float()))).float()).float()
    derivs = differentiate(net, inputs(3, 3).float(), order=1, engine="functional")
    expected = differentiate(
        pair(lambda self, x: self.b(torch.tanh(self.a(x)))),
        inputs(3, 3),
        engine="functional",
        order=1,
    )
    assert close(derivs.jacobian("a.weight"), expected.jacobian("a.weight"), 1e-5)
    cut = pair(lambda self, x: self.b(torch.tanh(self.a(x.float()).detach()))).float()
    with pytest.raises(NotImplementedError, match="cuts the derivatives"):
        differentiate(cut, inputs(3, 3).float(), order=1, engine="functional")


# Kinks are no cuts.


def convolutional(zero_bias):
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip
    if zero_bias:
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zero_bias", [False, True])
def test_kinks_are_no_reason_to_refuse(dtype, zero_bias):
    net = convolutional(zero_bias).to(dtype)
    x = torch.rand(6, 1, 12, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:, :, :4] = 0  # with no bias, these units stand exactly at their kink
    derivs = differentiate(net, x, engine="functional", order=1)
    for b, one in enumerate(x.split(1)):
        for name, parameter in net.named_parameters():
            h = net(one.clone())[0]
            J = torch.stack([torch.autograd.grad(a, parameter, retain_graph=True)[0] for a in h])
            scale = J.abs().max()
            assert close(derivs.jacobian(name)[b] / scale, J / scale, 1e-5)


def test_a_cut_is_found_beside_kinks():
    class Cut(nn.Module):
        def forward(self, z):
            return z + 0.01 * torch.sin(z).detach()

    net = convolutional(zero_bias=True)
    x = torch.zeros(6, 1, 12, 12)
    net.insert(4, Cut())
    with pytest.raises(NotImplementedError, match="not the derivative"):
        differentiate(net, x, engine="functional", order=1)


# What is refused.


def without_graph(self, x):
    with torch.no_grad():
        z = self.a(x)
    return self.b(z)


def one_output_cut(self, x):
    h = self.b(torch.tanh(self.a(x)))
    return torch.cat([h[:, :1].detach(), h[:, 1:]], dim=1)


def one_input_cut(self, x):
    z = torch.tanh(self.a(x))
    return self.b(torch.where(x[:, :1] > 0.65, z.detach(), z))


def written(self, x):
    z = self.a(x)
    z.data.mul_(2)
    return self.b(torch.tanh(z))


CUTS = {
    "detach": lambda self, x: self.b(self.a(x).detach()),
    "no_grad": without_graph,
    "data": lambda self, x: self.b(self.a(x).data),
    "written": written,
    "item": lambda self, x: self.b(self.a(x)) * self.b.weight.norm().item(),
    "a thousandth": lambda self, x: self.b(torch.tanh(self.a(x)) + 1e-3 * self.a(x).detach()),
    "one output": one_output_cut,
    "one input": one_input_cut,
    "wrong backward": lambda self, x: self.b(ForgottenFactor.apply(torch.tanh(self.a(x)))),
    "straight through": lambda self, x: self.b(StraightThrough.apply(3 * self.a(x))),
    "all": lambda self, x: self.b(self.a(x)).detach(),
    "numpy": lambda self, x: self.b(torch.from_numpy(self.a(x).detach().numpy() * 2)),
}


@pytest.mark.parametrize("name", CUTS)
def test_cut_graphs_are_refused(name):
    x = inputs(5, 3)
    assert (x[:, 0] > 0.65).sum() == 1
    with pytest.raises(NotImplementedError, match="cuts the derivatives"):
        differentiate(pair(CUTS[name]), x, engine="functional", order=1)


def test_a_cut_in_parameters_of_little_influence_is_found():
    """Beside parameters that move the outputs 10⁵ times as much."""

    def forward(self, x):
        z = torch.tanh(self.a(x))
        return self.b(x) + 1e-5 * (0.5 * z + 0.5 * z.detach())

    net = Call(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    with pytest.raises(NotImplementedError, match="cuts the derivatives"):
        differentiate(net, inputs(3, 3), engine="functional", order=1)


def test_a_cut_is_found_beside_parameters_of_nearly_no_influence():
    def forward(self, x):
        h = self.b(x)
        return 0.999 * h + 0.001 * h.detach() + 1e-12 * self.a(x)

    net = Call(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    with pytest.raises(NotImplementedError, match="cuts the derivatives"):
        differentiate(net, inputs(3, 3), engine="functional", order=1)


def test_float32_networks_are_checked_in_float64():
    """In float32 the quotient of this cut, a two-thousandth of the outputs, is noise."""

    def forward(self, x):
        z = torch.tanh(self.a(x))
        return self.b(x) + 0.01 * (0.95 * z + 0.05 * z.detach())

    net = Call(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3)).float()
    with pytest.raises(NotImplementedError, match="cuts the derivatives"):
        differentiate(net, inputs(3, 3).float(), engine="functional", order=1)


def test_a_cut_outside_the_wanted_layers_does_not_matter():
    net = pair(CUTS["detach"])
    derivs = differentiate(net, inputs(3, 3), engine="functional", order=1, layers=["b"])
    expected = reference.derivatives(net.b, net.a(inputs(3, 3)).detach()[:1])[0]
    assert close(derivs.jacobian("b.weight")[0], expected["weight"])


def test_an_unused_parameter_has_derivative_zero():
    net = pair(lambda self, x: self.a(x)[:, :3])
    derivs = differentiate(net, inputs(3, 3), engine="functional", order=1)
    assert derivs.jacobian("a.weight").any()
    assert not derivs.jacobian("b.weight").any()


def test_outputs_that_depend_on_the_batch_are_refused():
    net = pair(lambda self, x: self.b(torch.tanh(self.a(x) - self.a(x).mean(0))))
    with pytest.raises(NotImplementedError, match="depend on the others of the batch"):
        differentiate(net, inputs(4, 3), engine="functional", order=1)


def test_randomness_is_refused():
    net = pair(lambda self, x: self.b(F.dropout(self.a(x))))
    with pytest.raises(NotImplementedError, match="draws random numbers"):
        differentiate(net, inputs(4, 3), engine="functional", order=1)


def test_a_parameter_out_of_a_closure_is_refused():
    hidden = nn.Linear(3, 4).double()
    net = pair(lambda self, x: self.b(F.linear(x, hidden.weight)))
    net.hidden = hidden
    with pytest.raises(NotImplementedError, match=r"uses parameter 'hidden.weight'.*closure"):
        differentiate(net, inputs(4, 3), engine="functional", order=1)


def test_a_parameter_in_a_list_is_found_there():
    """Under torch.func it would keep its value: plain autograd sees it."""
    net = pair(lambda self, x: self.b(torch.tanh(F.linear(x, *self.held))))
    net.held = [net.a.weight, net.a.bias]
    derivs = differentiate(net, inputs(2, 3), engine="functional", order=1)
    expected = differentiate(
        pair(lambda self, x: self.b(torch.tanh(self.a(x)))),
        inputs(2, 3),
        engine="functional",
        order=1,
    )
    assert close(derivs.jacobian("a.weight"), expected.jacobian("a.weight"))


def test_a_tensor_that_is_no_parameter_is_refused():
    net = pair(lambda self, x: self.b(torch.tanh(self.a(x)) * self.gain[0]))
    net.gain = [torch.ones(4, dtype=torch.float64, requires_grad=True)]
    with pytest.raises(NotImplementedError, match="is no parameter of the model"):
        differentiate(net, inputs(2, 3), engine="functional", order=1)


def test_outputs_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"must return one \[B, T\] tensor"):
        differentiate(
            pair(lambda self, x: self.a(x).mean(1)), inputs(2, 3), engine="functional", order=1
        )


def test_an_input_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"in module 'a' \(Linear\) on an input of shape \[2, 5\]"):
        differentiate(
            pair(lambda self, x: self.b(self.a(x))), inputs(2, 5), engine="functional", order=1
        )


def test_infinite_derivatives_are_refused_by_name():
    net = pair(lambda self, x: self.b(torch.sqrt(self.a(x * 0) - self.a.bias)))
    with pytest.raises(ValueError, match=r"'a\.weight' is NaN or infinite"):
        differentiate(net, inputs(2, 3), engine="functional", order=1)


def test_what_autograd_cannot_differentiate_is_refused():
    net = pair(lambda self, x: self.b(NoBackward.apply(self.a(x))))
    with pytest.raises(NotImplementedError, match="cannot differentiate Call: TypeError: no such"):
        differentiate(net, inputs(2, 3), engine="functional", order=1)


def test_no_warnings_reach_the_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        differentiate(recurrent(nn.LSTM), SEQUENCES, engine="functional", order=1)


def test_a_single_number_is_a_layer_with_means():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.t = nn.Linear(4, 3), nn.Parameter(torch.tensor(0.7))

        def forward(self, x):
            return self.layer(x) * self.t

    derivs = differentiate(Scaled().double(), inputs(2, 4), order=1)
    I = fimlib.fisher_information(derivs, fimlib.Categorical())
    assert torch.equal(I.layer_means()[""], I["t"])
    expected = sum(I[name].reshape(2, -1).sum(1) for name in I)
    assert torch.allclose(I.total(), expected, rtol=1e-14)
