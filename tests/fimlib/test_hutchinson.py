"""The Hutchinson estimate of V₂: unbiased, its error bar, and what it must refuse."""

import copy
import itertools

import pytest
import reference
import torch
import torch.nn.functional as F  # noqa: N812
from lying import CutSine, OnceSine
from strategies import inputs, mlp
from test_functional import (
    SEQUENCES,
    TOKENS,
    Call,
    attention,
    controlled,
    convolutional,
    normalised,
    pair,
    parametrized,
    recurrent,
    tempered,
    tied,
    transformer,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fimlib
from fimlib import hutchinson
from fimlib.hutchinson import hutchinson_variance_i2


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def exact(net, x, family, num_samples=1):
    """V₂ by autograd twice, the cross terms of tied parameters included: name → [B, *shape]."""
    found = {}
    for one in x.split(1):
        with sdpa_kernel(SDPBackend.MATH):
            J, S = reference.derivatives(net, one)
        outputs = net(one).detach()
        blocks = [fimlib.Block(n, J[n][None], S[n][None], {n: None}) for n in J]
        V2 = fimlib.variance_i2(
            fimlib.Derivatives(outputs, tuple(blocks)), family, num_samples=num_samples
        )
        for name in J:
            found.setdefault(name, []).append(V2[name])
    return {name: torch.cat(values) for name, values in found.items()}


def check(found, expected, far=0.0):
    """At most a share ``far`` of the entries, and no layer mean, is off by 5 standard errors.

    Where noise makes an estimate nearly 0 its error bar comes out too small as well.
    """
    assert list(found.value) == list(found.standard_error) == list(expected)
    scores = []
    for name, V2 in expected.items():
        value, error = found.value[name], found.standard_error[name]
        assert value.shape == error.shape == V2.shape
        exact_zero = (value - V2).abs() <= 1e-12 * (1 + V2.abs())
        score = (value - V2).abs() / error.clamp_min(1e-300)
        scores.append(score.masked_fill(exact_zero, 0.0).flatten())
    for layer, (mean, error) in found.layer_means.items():
        names = [name for name in expected if name.rpartition(".")[0] == layer]
        V2 = torch.cat([expected[name].flatten(1) for name in names], 1).mean(1)
        assert torch.allclose(mean, found.value.layer_means()[layer], rtol=1e-10, atol=1e-14)
        assert ((mean - V2).abs() <= 5 * error + 1e-12).all(), layer
    score = torch.cat(scores)
    assert (score > 5).double().mean() <= far
    assert (score < 1).double().mean() > 0.6
    assert (score > 0.1).double().mean() > 0.3  # nor are the bars too large


# Against exact values.


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    ).double()


@pytest.mark.long
@pytest.mark.parametrize("family", [fimlib.Categorical(), fimlib.Bernoulli(), fimlib.Poisson()])
@pytest.mark.parametrize(
    ("net", "x"),
    [
        (mlp([4, 6, 5, 3], nn.Tanh, scale=1.5), inputs(2, 4)),
        (cnn(), inputs(2, 36).view(2, 1, 6, 6)),
    ],
)
def test_within_the_error_bars_of_the_engines_v2(net, x, family):
    derivs = fimlib.differentiate(net, x)
    expected = fimlib.variance_i2(derivs, family, num_samples=3)
    found = hutchinson_variance_i2(net, x, family, num_probes=64, num_samples=3, generator=seeded())
    expected = {name: expected[name] for name, _ in net.named_parameters()}
    check(found, expected)
    assert found.num_probes == 64


NETWORKS = {
    "transformer": (lambda: transformer("gelu"), TOKENS),
    "attention": (attention, TOKENS),
    "tied": (tied, TOKENS),
    "group norm": (normalised, inputs(2, 4).view(2, 1, 4)),
    "GRU": (lambda: recurrent(nn.GRU), SEQUENCES),
    "fused attention": (
        lambda: Call(
            lambda self, x: self.head(
                F.scaled_dot_product_attention(self.q(x), self.q(x), self.v(x)).flatten(1)
            ),
            q=nn.Linear(2, 3),
            v=nn.Linear(2, 2),
            head=nn.Linear(8, 3),
        ),
        SEQUENCES,
    ),
    "control flow": (controlled, inputs(2, 3)),
}


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_no_engine_has_second_derivatives_of(name):
    make, x = NETWORKS[name]
    net, family = make(), fimlib.Categorical()
    found = hutchinson_variance_i2(net, x, family, num_probes=64, generator=seeded())
    check(found, exact(net, x, family), far=0.01)


def test_a_parameter_without_axes():
    net, x, family = tempered(), inputs(2, 3), fimlib.Categorical()
    found = hutchinson_variance_i2(net, x, family, num_probes=64, generator=seeded())
    expected = exact(net, x, family)
    assert found.value["t"].shape == found.standard_error["t"].shape == (2,)
    assert list(found.value) == list(expected)
    # S in t is the same for all outputs, so that no label tells of it
    assert not expected["t"].any()
    for name, V2 in expected.items():
        off = (found.value[name] - V2).abs()
        assert (off <= 5 * found.standard_error[name] + 1e-12).all(), name
    mean, error = found.layer_means[""]
    assert torch.allclose(mean, found.value["t"], rtol=1e-12)
    assert torch.allclose(error, found.standard_error["t"], rtol=1e-12)


def test_only_a_parameter_without_axes():
    """h = sin(t x) has S = −x² sin(t x), which every probe finds."""
    net = Call(lambda self, x: torch.sin(self.t * x), t=nn.Parameter(torch.tensor(0.7)))
    x = inputs(2, 3)
    found = hutchinson_variance_i2(net, x, fimlib.Gaussian(), num_probes=3, generator=seeded())
    S = -x.square() * torch.sin(net.t.detach() * x)
    assert torch.allclose(found.value["t"], S.square().sum(1), rtol=1e-10)


def test_the_cross_term_of_tied_parameters_is_there():
    """h = w², so that S = 2, though w is used linearly in each of its two places."""
    net = Call(lambda self, x: x * self.w * self.w, w=nn.Parameter(torch.empty(1)))
    found = hutchinson_variance_i2(
        net, inputs(1, 2), fimlib.Gaussian(), num_probes=3, generator=seeded()
    )
    assert torch.allclose(found.value["w"], 4 * inputs(1, 2).square().sum(1, keepdim=True))


def test_a_family_whose_outputs_are_not_natural_parameters():
    net, x, family = mlp([2, 4, 2], nn.Tanh), inputs(2, 2), fimlib.GaussianHead()
    found = hutchinson_variance_i2(net, x, family, num_probes=64, generator=seeded())
    expected = exact(net, x, family)
    assert expected["2.weight"][:, 1].min() > 0  # the last layer is not linear in these
    check(found, expected, far=0.01)


def test_kinks_have_no_curvature():
    net, x = convolutional(zero_bias=True).double(), inputs(2, 144).view(2, 1, 12, 12)
    x[:, :, :4] = 0  # these units stand exactly at their kink
    found = hutchinson_variance_i2(net, x, fimlib.Categorical(), num_probes=32, generator=seeded())
    check(found, {name: torch.zeros_like(V2) for name, V2 in found.value.items()}, far=0.01)


@pytest.mark.long
def test_float32_networks():
    net, x, family = transformer("gelu"), TOKENS, fimlib.Categorical()
    expected = exact(net, x, family)
    found = hutchinson_variance_i2(net.float(), x, family, num_probes=48, generator=seeded())
    check(found, expected, far=0.01)
    assert found.value["head.weight"].dtype == torch.float64


# Against all that the signs can be.


def tiny(seed, size=3):
    """Two curved outputs of one vector of parameters, with all cross terms."""
    net = Call(
        lambda self, x: torch.stack([torch.sin(2 * x @ self.w), (x @ self.w).tanh() * x[:, 0]], 1),
        seed=seed,
        w=nn.Parameter(torch.empty(size)),
    )
    return net, inputs(1, size, seed=seed)


def enumerated(monkeypatch, net, x, family, num_probes, **options):
    """The estimates at all equally probable outcomes of the signs, as if at so many inputs."""
    size = x.shape[1] - 1  # v is as good as −v, so that its first sign is +
    patterns = torch.tensor(list(itertools.product([1.0, -1.0], repeat=size)), dtype=x.dtype)
    patterns = torch.cat([torch.ones(2**size, 1, dtype=x.dtype), patterns], 1)
    outcomes = torch.cartesian_prod(*[torch.arange(2**size)] * num_probes)
    draws = iter(outcomes.T)
    monkeypatch.setattr(hutchinson, "draw_signs", lambda *_: {"w": patterns[next(draws)]})
    monkeypatch.setattr(hutchinson, "PROBE_NUMBERS", 10**12)  # all inputs at once
    return hutchinson_variance_i2(
        net, x.expand(len(outcomes), -1), family, num_probes=num_probes, **options
    )


@pytest.mark.parametrize("family", [fimlib.Categorical(), fimlib.GaussianHead()])
@pytest.mark.parametrize(("num_probes", "blocks"), [(3, 32), (4, 32), (6, 3)])
def test_unbiased_with_an_error_bar_that_is_not_too_small(monkeypatch, family, num_probes, blocks):
    """Exactly: the mean over all signs is V₂, that of the squared error at least the variance."""
    monkeypatch.setattr(hutchinson, "BLOCKS", blocks)
    for seed in (0, 1):
        net, x = tiny(seed, 3 if num_probes < 6 else 2)
        V2 = exact(net, x, family)["w"][0]
        found = enumerated(monkeypatch, net, x, family, num_probes)
        values, errors = found.value["w"], found.standard_error["w"]
        assert torch.allclose(values.mean(0), V2, rtol=1e-10)
        variance = values.var(0, correction=0)
        assert (variance > 1e-3 * V2.square()).all()
        ratio = errors.square().mean(0) / variance
        r = min(num_probes, blocks)
        assert (ratio >= 1).all()
        assert (ratio <= 2 + 2 * (r - 1) / (r - 2)).all()
        mean, error = found.layer_means[""]
        assert torch.allclose(mean.mean(), V2.mean(), rtol=1e-10)
        ratio = error.square().mean() / mean.var(correction=0)
        assert 1 <= ratio <= 2 + 2 * (r - 1) / (r - 2)


def test_the_square_of_one_estimate_would_be_too_large(monkeypatch):
    net, x = tiny(0)
    family = fimlib.Categorical()
    seen = []
    pairs = hutchinson.pairs
    monkeypatch.setattr(
        hutchinson,
        "pairs",
        lambda f, o, h, J, means: seen.append(means) or pairs(f, o, h, J, means),
    )
    enumerated(monkeypatch, net, x, family, 3)
    s = torch.stack([mean["w"] for mean in seen[0]]).mean(0)
    plain = family.variance2(net(x).detach().expand(len(s), -1), s).mean(0)
    assert (plain > 1.01 * exact(net, x, family)["w"][0]).all()


@pytest.mark.long
def test_more_probes_and_labels_make_it_smaller():
    net, x, family = mlp([4, 6, 3], nn.Tanh), inputs(2, 4), fimlib.Categorical()
    few, many, labels = (
        hutchinson_variance_i2(net, x, family, num_probes=m, num_samples=n, generator=seeded())
        for m, n in ((32, 1), (512, 1), (32, 5))
    )
    for name in few.value:
        assert torch.allclose(labels.value[name] * 5, few.value[name])
        assert torch.allclose(labels.standard_error[name] * 5, few.standard_error[name])
    errors = [
        torch.cat([e.standard_error[n].flatten() for n in few.value]).square().mean().sqrt()
        for e in (many, few)
    ]
    assert errors[0] < errors[1] / 3  # 1/4 where V₂ is seen, 1/16 where noise is all


@pytest.mark.parametrize(("num_probes", "used"), [(3, 3), (32, 32), (33, 32), (100, 100), (65, 63)])
def test_blocks_of_equal_size(num_probes, used):
    size, count = hutchinson.blocks_of(num_probes)
    assert size * count == used
    assert 3 <= count <= 32


def test_only_the_chosen_layers_are_estimated_and_with_less_noise():
    net, x, family = transformer("gelu"), TOKENS, fimlib.Categorical()
    whole = hutchinson_variance_i2(net, x, family, num_probes=32, generator=seeded())
    part = hutchinson_variance_i2(
        net, x, family, num_probes=32, generator=seeded(), layers=["head", "norm"]
    )
    assert list(part.value) == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert list(part.layer_means) == ["norm", "head"]
    for name in ("norm.weight", "head.weight"):
        assert part.standard_error[name].mean() < whole.standard_error[name].mean()


@pytest.mark.long
def test_inputs_have_their_own_probes_however_they_are_grouped(monkeypatch):
    net, x, family = mlp([3, 4, 3], nn.Tanh), inputs(1, 3).expand(4, -1), fimlib.Categorical()
    together = hutchinson_variance_i2(net, x, family, num_probes=8, generator=seeded())
    assert together.value["0.weight"].flatten(1).std(0).min() > 0
    monkeypatch.setattr(hutchinson, "PROBE_NUMBERS", 1)
    expected = exact(net, x, family)
    check(hutchinson_variance_i2(net, x, family, num_probes=64, generator=seeded()), expected)


def test_the_same_generator_gives_the_same_estimate():
    net, x, family = mlp([3, 4, 3], nn.Tanh), inputs(2, 3), fimlib.Categorical()
    a, b, c = (
        hutchinson_variance_i2(net, x, family, num_probes=4, generator=seeded(s)) for s in (1, 1, 2)
    )
    assert torch.equal(a.value["0.weight"], b.value["0.weight"])
    assert not torch.equal(a.value["0.weight"], c.value["0.weight"])


def test_the_model_and_the_settings_stay_as_they_are():
    net = transformer("gelu")
    net.head.weight.requires_grad_(False)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cudnn.enabled
    hutchinson_variance_i2(net, TOKENS, fimlib.Categorical(), num_probes=3, generator=seeded())
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["head.weight"]
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert flags == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cudnn.enabled)


# What is refused.


@pytest.mark.parametrize("num_probes", [0, 1, 2, 2.5, True])
def test_too_few_probes(num_probes):
    with pytest.raises(ValueError, match="num_probes must be an integer ≥ 3"):
        hutchinson_variance_i2(
            mlp([3, 3], nn.Tanh), inputs(2, 3), fimlib.Categorical(), num_probes=num_probes
        )


def test_arguments_are_checked():
    net, x, family = mlp([3, 4, 3], nn.Tanh), inputs(2, 3), fimlib.Categorical()
    with pytest.raises(ValueError, match=r"num_samples \(N\) must be an integer ≥ 1"):
        hutchinson_variance_i2(net, x, family, num_probes=3, num_samples=0)
    with pytest.raises(ValueError, match="no layer '7'"):
        hutchinson_variance_i2(net, x, family, num_probes=3, layers=["7"])
    with pytest.raises(ValueError, match="T ≥ 2"):
        hutchinson_variance_i2(mlp([3, 1], nn.Tanh), x, family, num_probes=3)
    with pytest.raises(NotImplementedError, match="depend on the others of the batch"):
        hutchinson_variance_i2(
            pair(lambda self, x: self.b(self.a(x) - self.a(x).mean(0))), x, family, num_probes=3
        )


@pytest.mark.parametrize("function", [CutSine, OnceSine])
def test_a_backward_without_derivative_is_refused(function):
    net = pair(lambda self, x: self.b(function.apply(self.a(x))))
    assert fimlib.differentiate(net, inputs(2, 3), engine="functional", order=1).engine
    with pytest.raises(NotImplementedError, match="does not give second derivatives"):
        hutchinson_variance_i2(net, inputs(2, 3), fimlib.Categorical(), num_probes=3)


def test_cut_graphs_are_refused():
    net = pair(lambda self, x: self.b(torch.tanh(self.a(x)).detach()))
    with pytest.raises(NotImplementedError, match="cuts the derivatives"):
        hutchinson_variance_i2(net, inputs(2, 3), fimlib.Categorical(), num_probes=3)


def test_weight_norm_is_refused_or_right():
    """The second derivatives of torch's own kernel leave out those of the norm (seen in 2.13)."""
    net, x, family = parametrized(), inputs(2, 3), fimlib.Categorical()
    try:
        found = hutchinson_variance_i2(net, x, family, num_probes=64, generator=seeded())
    except NotImplementedError as refusal:
        found = str(refusal)
    if isinstance(found, str):
        assert "does not give second derivatives" in found
    else:
        check(found, exact(net, x, family), far=0.02)  # one of 70
