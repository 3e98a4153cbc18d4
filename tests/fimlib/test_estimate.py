"""Estimates by random projections: unbiased, with the variances and the errors that they state."""

import itertools
import math
import warnings

import pytest
import random_networks
import torch
from strategies import ADVERSARIAL, inputs, logits_of, mlp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import fimlib
from fimlib import estimates, projections
from fimlib.families.categorical import residual_of
from fimlib.projections import DRAWS, MOST_PASSES, passes_to_take
from fimlib.streaming import Batches

COVARIANCE = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.7]])
FAMILIES = {
    "Categorical": (fimlib.Categorical(), 3),
    "Bernoulli": (fimlib.Bernoulli(), 3),
    "Poisson": (fimlib.Poisson(), 3),
    "Gaussian": (fimlib.Gaussian(), 3),
    "Gaussian, covariance": (fimlib.Gaussian(COVARIANCE), 3),
    "GaussianHead": (fimlib.GaussianHead(), 4),
}


def problem(name, scale=3.0):
    family, num_outputs = FAMILIES[name]
    net = mlp([4, 5, num_outputs], nn.Sigmoid)
    with torch.no_grad():
        net[2].weight.mul_(scale)
    return net, inputs(6, 4), family


def exact(net, x, family):
    """I of the data set, and the variance of one pass over its inputs, squared one by one."""
    derivs = fimlib.differentiate(net, x, order=1)
    fisher = fimlib.fisher_information(derivs, family)
    kinds = {"signs": projections.variance_signs, "labels": fimlib.variance_i1}
    if isinstance(family, fimlib.Categorical):
        kinds["importance"] = projections.variance_importance
    variances = {kind: function(derivs, family) for kind, function in kinds.items()}
    by_input = {kind: {n: v[n].sum(0) / len(x) ** 2 for n in v} for kind, v in variances.items()}
    return fisher, by_input


def cross_terms(fisher, name):
    """What squaring a whole batch adds: 2 [(Σ I)² − Σ I²] / m²."""
    I = fisher[name]
    return 2 * (I.sum(0).square() - I.square().sum(0)) / len(I) ** 2


# The random vectors.


@pytest.mark.parametrize("name", FAMILIES)
def test_the_factor_is_a_root_of_the_covariance(name):
    family, num_outputs = FAMILIES[name]
    h = inputs(4, num_outputs)
    factor = family.factor(h)
    torch.testing.assert_close(factor @ factor.mT, family.covariance(h))
    torch.testing.assert_close(
        fimlib.Family.factor(family, h) @ fimlib.Family.factor(family, h).mT, family.covariance(h)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_signs_go_through_the_factor(name):
    family, num_outputs = FAMILIES[name]
    h = inputs(4, num_outputs)
    own, general = (
        draw(family, h, torch.Generator().manual_seed(0))
        for draw in (type(family).draw_signs, fimlib.Family.draw_signs)
    )
    torch.testing.assert_close(own, general)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_variance_with_signs_by_enumeration(name):
    net, x, family = problem(name)
    derivs = family.natural_derivatives(fimlib.differentiate(net, x))
    variance = projections.variance_signs(fimlib.differentiate(net, x), family)
    fisher = fimlib.fisher_information(fimlib.differentiate(net, x), family)
    h = family.natural(derivs.outputs)
    factor = family.factor(h)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=factor.shape[2]))).double()
    for parameter in variance:
        J = derivs.jacobian(parameter).double()
        squares = torch.einsum("btr,sr,bt...->sb...", factor, signs, J).square()
        torch.testing.assert_close(squares.mean(0), fisher[parameter])
        torch.testing.assert_close(squares.var(0, correction=0), variance[parameter])
        assert (variance[parameter] <= 2 * fisher[parameter].square() * (1 + 1e-12)).all()


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_variance_with_important_labels_by_enumeration(name):
    h, family = logits_of(ADVERSARIAL[name]), fimlib.Categorical()
    p, q = family.mean(h), family.importance(h)
    J, S = (inputs(1, h.shape[1], seed)[..., None] for seed in (1, 2))
    derivs = fimlib.Derivatives(h, (fimlib.Block("", J, S, {"w": None}),))
    squares = (p / q)[0] * family.project(h, J)[0, :, 0].square()
    mean = (q[0] * squares).sum()
    torch.testing.assert_close(mean, family.information(h, J)[0, 0])
    variance = (q[0] * (squares - mean).square()).sum()
    torch.testing.assert_close(projections.variance_importance(derivs, family)["w"][0, 0], variance)
    i2 = mean - (p / q)[0] * family.project(h, S)[0, :, 0]
    variance = (q[0] * (i2 - mean).square()).sum()
    found = projections.variance_importance(derivs, family, estimator=2)["w"][0, 0]
    torch.testing.assert_close(found, variance)
    norms = torch.stack([residual_of(p, torch.tensor([[k]])).norm() for k in range(p.shape[1])])
    torch.testing.assert_close(q[0], p[0] * norms / (p[0] * norms).sum())


@pytest.mark.parametrize("name", ["certain 1 - 1e-3", "certain 1 - 1e-12"])
def test_important_labels_scatter_less_where_the_network_is_sure(name):
    h, family = logits_of(ADVERSARIAL[name]), fimlib.Categorical()
    derivs = fimlib.Derivatives(h, (fimlib.Block("", inputs(1, 10)[..., None], None, {"w": None}),))
    I = fimlib.fisher_information(derivs, family)["w"].square()
    labels, important, signs = (
        float(v(derivs, family)["w"] / I)
        for v in (fimlib.variance_i1, projections.variance_importance, projections.variance_signs)
    )
    assert labels > 500 * important
    assert important < 10
    assert signs <= 2


@pytest.mark.parametrize("kind", DRAWS)
def test_random_vectors_have_the_moments_of_a_residual(kind):
    family, h = fimlib.Categorical(), logits_of([0.7, 0.2, 0.1])
    many = h.expand(40_000, -1)
    w = DRAWS[kind](family, many, torch.Generator().manual_seed(0))
    outer = torch.einsum("bi,bj->bij", w, w)
    for found, right in ((w, torch.zeros(3).double()), (outer, family.covariance(h)[0])):
        off = (found.mean(0) - right).abs() / (found.std(0) / len(w) ** 0.5 + 1e-15)
        assert off.max() < 5


def test_a_residual_has_all_digits_where_a_class_is_sure():
    sigma = torch.tensor([[1.0, 1e-20, 3e-30]], dtype=torch.float64)
    found = residual_of(sigma, torch.tensor([[0]]))
    assert found.tolist() == [[1e-20 + 3e-30, -1e-20, -3e-30]]
    certain = fimlib.Categorical().importance(torch.tensor([[800.0, 0.0]]).double())
    assert certain.tolist() == [[1.0, 0.0]]


def test_other_families_say_that_importance_needs_classes():
    net, x, _ = problem("Gaussian")
    with pytest.raises(ValueError, match=r"importance sampling needs classes.*estimator='signs'"):
        fimlib.estimate(net, x, fimlib.Gaussian(), estimator="importance")
    with pytest.raises(ValueError, match="needs classes"):
        projections.variance_importance(fimlib.differentiate(net, x), fimlib.Gaussian())


# Estimates.


@pytest.mark.long
@pytest.mark.parametrize("squares", ["batch", "input"])
@pytest.mark.parametrize("kind", DRAWS)
def test_means_and_spreads_of_a_classifier(kind, squares):
    net, x, family = problem("Categorical")
    fisher, variances = exact(net, x, family)
    found = fimlib.estimate(net, x, family, estimator=kind, squares=squares, passes=600)
    ratios = []
    for name, I in fisher.mean_over_inputs().items():
        assert ((found.value[name] - I).abs() < 5 * found.standard_error[name]).all()
        predicted = variances[kind][name]
        if squares == "batch":
            predicted = predicted + cross_terms(fisher, name)
        ratios.append((600 * found.standard_error[name].square() / predicted).flatten())
    assert torch.cat(ratios).median() == pytest.approx(1, abs=0.1)


@pytest.mark.long
@pytest.mark.parametrize("squares", [pytest.param("batch", marks=pytest.mark.full), "input"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, squares):
    net, x, family = problem(name)
    fisher = fimlib.fisher_information(fimlib.differentiate(net, x), family).mean_over_inputs()
    for kind in ("signs", "labels"):
        found = fimlib.estimate(net, x, family, estimator=kind, squares=squares, passes=200)
        for parameter, right in fisher.items():
            off = (found.value[parameter] - right).abs()
            assert (off <= 5 * found.standard_error[parameter] + 1e-12).all()


@pytest.mark.long
@pytest.mark.parametrize(
    "seeds", [range(3), pytest.param(range(3, 64), marks=pytest.mark.full)], ids=str
)
def test_random_networks_are_within_five_standard_errors(seeds):
    """Exact ones, since labels of a sure network do not know their own."""
    for seed in seeds:
        case = random_networks.draw(seed)
        fisher, variances = exact(case.model, case.x, case.family)
        for kind, squares in itertools.product(variances, ["batch", "input"]):
            options = {"estimator": kind, "squares": squares, "passes": 64}
            found = fimlib.estimate(case.model, case.x, case.family, **options)
            means = fisher.mean_over_inputs()
            rounding = 1e-12 * max(float(I.max()) for I in means.values())
            for name, I in means.items():
                variance = variances[kind][name]
                if squares == "batch":
                    variance = variance + cross_terms(fisher, name)
                off = (found.value[name] - I).abs()
                slack = 5 * (variance / 64).sqrt() + 1e-9 * I + rounding
                assert (off <= slack).all(), f"{case.source}\n{options} {name}: {off / slack}"


class Tied(nn.Module):
    """A language model that classifies the next word, with one table for both ends."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.unused = nn.Linear(4, 4)

    def forward(self, ids):
        e = self.table(ids)
        mixed = self.norm(e + self.attention(e, e, e, need_weights=False)[0])
        return mixed[:, -1] @ self.table.weight.T


@pytest.mark.long
@pytest.mark.parametrize("squares", ["batch", "input"])
def test_attention_and_tied_tables(squares):
    net, family = Tied().double(), fimlib.Categorical()
    ids = torch.randint(7, (5, 6), generator=torch.Generator().manual_seed(1))
    right = fimlib.accumulate(net, ids, family, quantities=["I"]).fisher_information()
    found = fimlib.estimate(net, ids, family, squares=squares, passes=100, batch_size=3)
    assert found.value.keys() == right.keys()
    for name, I in right.items():
        assert ((found.value[name] - I).abs() <= 5 * found.standard_error[name] + 1e-12).all()
    assert not found.value["unused.weight"].any()
    assert found.layers["unused"] == (0.0, 0.0, 0.0)


def test_layers_and_what_is_said_of_them():
    net, x, family = problem("Categorical")
    whole = fimlib.estimate(net, x, family, passes=40)
    part = fimlib.estimate(net, x, family, passes=40, layers=["2"])
    assert list(part.value) == ["2.weight", "2.bias"]
    torch.testing.assert_close(part.value["2.weight"], whole.value["2.weight"])
    assert list(whole.layers) == ["0", "2"]
    layer, V, I = whole.layers["2"], 0.0, 0.0
    for name in part.value:
        V += float(whole.standard_error[name].square().sum())
        I += float(whole.value[name].square().sum())
    assert layer.total == pytest.approx(float(sum(v.sum() for v in part.value.values())))
    assert layer.relative_error == pytest.approx(math.sqrt(V / (I - V)))
    assert (whole.passes, whole.num_inputs) == (40, 6)
    assert (whole.estimator, whole.squares) == ("signs", "batch")


# How it runs.


def test_equal_seeds_give_equal_numbers_and_batches_of_a_loader_those_of_a_tensor():
    net, x, family = problem("Categorical")
    one = fimlib.estimate(net, x, family, passes=3, batch_size=4)
    loader = DataLoader(TensorDataset(x, torch.zeros(6)), 4)
    for again in (
        fimlib.estimate(net, x, family, passes=3, batch_size=4),
        fimlib.estimate(net, loader, family, passes=3),
    ):
        assert all(torch.equal(one.value[n], again.value[n]) for n in one.value)
    other = fimlib.estimate(net, x, family, passes=3, batch_size=4, seed=1)
    assert not torch.equal(one.value["0.weight"], other.value["0.weight"])


def test_signs_know_how_many_passes_are_enough():
    assert passes_to_take("signs", None, 0.1) == 200
    assert passes_to_take("signs", None, 5.0) == 16
    assert passes_to_take("labels", None, 0.1) == MOST_PASSES
    assert passes_to_take("labels", 7, 0.1) == 7
    net, x, family = problem("Categorical")
    found = fimlib.estimate(net, x, family, relative_error=0.15, squares="input")
    assert 16 <= found.passes < 2 / 0.15**2
    assert found.relative_error <= 0.15
    rough = fimlib.estimate(net, x, family, relative_error=1e-3, passes=20)
    assert rough.passes == 20


def test_float32_follows_float64():
    net, x, family = problem("Categorical")
    wide = fimlib.estimate(net, x, family, passes=4)
    narrow = fimlib.estimate(net.float(), x.float(), family, passes=4)
    for name, value in wide.value.items():
        assert narrow.value[name].dtype == torch.float64
        torch.testing.assert_close(narrow.value[name], value, rtol=1e-3, atol=1e-8)


class Interrupting(list):
    """Batches that are interrupted in a later pass."""

    def __init__(self, batches, passes):
        super().__init__(batches)
        self.left = passes

    def __iter__(self):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().__iter__()


def test_what_is_done_is_returned_when_it_is_interrupted():
    net, x, family = problem("Categorical")
    with pytest.warns(UserWarning, match="interrupted: .* 3 of 9 passes"):
        found = fimlib.estimate(net, Interrupting([x], 3), family, passes=9)
    right = fimlib.estimate(net, [x], family, passes=3)
    assert found.passes == 3
    assert torch.equal(found.value["0.weight"], right.value["0.weight"])
    with pytest.raises(KeyboardInterrupt):
        fimlib.estimate(net, Interrupting([x], 1), family, passes=9)


class Growing(list):
    """One input more in every pass."""

    def __iter__(self):
        self.append(self[0][:1])
        return super().__iter__()


class Cut(nn.Module):
    def forward(self, s):
        return s + (torch.sign(s) - s).detach()


class Centred(nn.Module):
    def forward(self, s):
        return s - s.mean(0)


@pytest.mark.parametrize("squares", ["batch", "input"])
@pytest.mark.parametrize(
    ("module", "says"), [(Cut, "autograd's derivative"), (Centred, "depend on the others")]
)
def test_networks_whose_numbers_would_be_wrong_are_refused(module, says, squares):
    net = nn.Sequential(nn.Linear(4, 3), module(), nn.Linear(3, 2)).double()
    with pytest.raises(NotImplementedError, match=says):
        fimlib.estimate(net, inputs(5, 4), fimlib.Categorical(), squares=squares)


@pytest.mark.parametrize("squares", ["batch", "input"])
def test_one_input_is_not_enough_to_trust_a_network(squares):
    """The first is behind a dead ReLU, which hides the wrong derivative."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), Cut(), nn.Linear(1, 2)).double()
    with torch.no_grad():
        net[0].weight.fill_(1.0), net[0].bias.fill_(0.0)
    batches = [torch.tensor([[x]], dtype=torch.float64) for x in (-5.0, 3.0)]
    fimlib.estimate(net, batches[:1], fimlib.Categorical(), squares=squares, passes=2)
    with pytest.raises(NotImplementedError, match="batch 2: .*autograd's derivative"):
        fimlib.estimate(net, batches, fimlib.Categorical(), squares=squares)


def nan_in(x):
    x = x.clone()
    x[0, 0] = math.nan
    return x


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _: {"passes": 1}, r"passes must be an integer ≥ 2, got 1"),
        (lambda _: {"passes": 2.5}, r"passes must be an integer ≥ 2"),
        (lambda _: {"estimator": "sign"}, r"estimator must be one of 'signs', 'labels'"),
        (lambda _: {"squares": "inputs"}, r"squares must be one of 'batch', 'input'"),
        (lambda _: {"relative_error": 0.0}, "relative_error must be a positive number"),
        (lambda _: {"relative_error": "a"}, "relative_error must be a positive number"),
        (lambda _: {"batch_size": 0}, "batch_size must be an integer ≥ 1"),
        (lambda x: {"inputs": iter([x])}, "can be used only once"),
        (lambda _: {"inputs": []}, r"there are no inputs: pass M ≥ 1"),
        (lambda x: {"inputs": x[:0]}, r"there are no inputs|M ≥ 1"),
        (lambda x: {"inputs": [x, nan_in(x)]}, "batch 2: the input holds NaN"),
        (lambda x: {"inputs": [x, x[:, :3]]}, "batch 2: its inputs have shape"),
        (lambda x: {"inputs": Growing([x, x])}, "pass 2 went through .* inputs, the first through"),
        (lambda _: {"layers": ["9"]}, "no layer '9'"),
    ],
)
def test_bad_input(change, says):
    net, x, family = problem("Categorical")
    arguments = {"inputs": x, **change(x)}
    with pytest.raises(ValueError, match=says):
        fimlib.estimate(net, arguments.pop("inputs"), family, **arguments)


class Waits(TorchDispatchMode):
    """Counts what makes the CPU wait for a GPU's numbers."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        return func(*args, **(kwargs or {}))


def waits_of_a_pass(num_batches):
    """Of the second pass, whose batches need no check; the inputs are on the CPU."""
    net, x, family = problem("Categorical")
    source = projections.Source(Batches(net, [x] * num_batches, family), DRAWS["signs"], 0)
    square = projections.SquaredBatches(net, None, source)
    first = source.run(0, square)[0]
    with Waits() as waits:
        source.run(1, square)
    looks_at_inputs = num_batches
    return first, waits.count - looks_at_inputs


def test_a_gpu_is_not_waited_for_at_every_batch(monkeypatch):
    plain, often = waits_of_a_pass(9)
    assert often >= 2 * 9
    monkeypatch.setattr(projections.Source, "waits", False)
    found, seldom = waits_of_a_pass(9)
    assert seldom == 0  # a list of all flags is taken at once, which is not counted
    assert all(torch.equal(found[n], plain[n]) for n in plain)


@pytest.mark.parametrize("between", [2, 64])
def test_a_batch_with_nan_is_named_however_late_it_is_seen(between, monkeypatch):
    monkeypatch.setattr(projections.Source, "waits", False)
    monkeypatch.setattr(projections, "BATCHES_BETWEEN_WAITS", between)
    net, x, family = problem("Categorical")
    far = x.clone()
    far[0, 0] = 1e300
    with pytest.raises(ValueError, match=r"^batch 3: the derivative in parameter 'net\.0\.weight'"):
        fimlib.estimate(NanFarOut(net), [x, x, far, x, x, x], family, passes=2)


class NanFarOut(nn.Module):
    """NaN where an input is very large."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) * torch.where(x.amax(1, keepdim=True) > 1e200, math.nan, 1.0)


class CentresLargeBatches(nn.Module):
    """As experts with a capacity: a few inputs at a time do not show it."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        h = self.a(x)
        return h - h.mean(0, keepdim=True) if len(x) > 8 else h


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("squares", ["batch", "input"])
def test_a_network_that_mixes_large_batches_only_is_refused(dtype, squares):
    net, x = CentresLargeBatches().to(dtype), torch.randn(32, 4, dtype=dtype)
    options = {"passes": 2, "squares": squares}
    with pytest.raises(NotImplementedError, match="batch 1: the outputs for one input depend on"):
        fimlib.estimate(net, x, fimlib.Categorical(), **options)
    fimlib.estimate(net, x[:8], fimlib.Categorical(), **options)


def test_numbers_too_small_to_be_squared_have_no_known_error():
    net = nn.Linear(1, 1, bias=False).double()
    x = torch.tensor([[1e-82], [2e-82]], dtype=torch.float64)
    found = fimlib.estimate(net, x, fimlib.Gaussian(), passes=4)
    assert found.layers[""].standard_error == math.inf
    assert found.interval("") == (0.0, math.inf)


def test_other_mistakes():
    net, x, _ = problem("Categorical")
    with pytest.raises(TypeError, match="no output family"):
        fimlib.estimate(net, x, "Categorical")
    with pytest.raises(TypeError, match="inputs is a"):
        fimlib.estimate(net, 3, fimlib.Categorical())
    with pytest.raises(ValueError, match="training mode"):
        fimlib.estimate(
            nn.Sequential(nn.Linear(4, 3), nn.Dropout()).double(), x, fimlib.Categorical()
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="look like probabilities"):
            fimlib.estimate(nn.Sequential(net, nn.Softmax(1)), x, fimlib.Categorical(), passes=2)


class OneNumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()).double())

    def forward(self, x):
        return self.w * torch.cat([x, x**2, x**3], 1)


def test_the_error_of_a_layer_of_one_parameter_is_that_of_the_parameter():
    found = fimlib.estimate(OneNumber(), inputs(4, 1), fimlib.Categorical(), passes=7)
    layer, error = found.layers[""], float(found.standard_error["w"])
    assert layer.total == pytest.approx(float(found.value["w"]))
    assert error > 0
    assert layer.standard_error == pytest.approx(error)


def test_an_interval_by_hand():
    layers = {"a": estimates.LayerEstimate(2.0, 0.5, 0.1), "b": estimates.LayerEstimate(3.0, 0, 0)}
    layers["c"] = estimates.LayerEstimate(1e-200, math.inf, math.inf)
    found = estimates.Estimate({}, {}, layers, 0.1, 3, 5, "signs", "batch")
    low, high = found.interval("a", 0.9)
    assert math.log(high / 2) == pytest.approx(2.919986 * 0.25)  # Student's t, two degrees
    assert low * high == pytest.approx(4.0)
    assert found.interval("b") == (3.0, 3.0)
    assert found.interval("c") == (0.0, math.inf)
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        found.interval("a", 95)


class CutBehindAnOffset(nn.Module):
    """The first output is cut off from the body, and has a constant that is large."""

    def __init__(self, offset):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.price, self.other = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 1)
        self.offset = offset

    def forward(self, x):
        z = torch.tanh(self.body(x))
        return torch.cat([self.offset + self.price(z.detach()), self.other(z)], 1)


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize(("dtype", "offset"), [("float32", 300.0), ("float64", 1e6)])
def test_a_constant_in_an_output_hides_no_cut(dtype, offset, count):
    net, x = CutBehindAnOffset(offset).to(getattr(torch, dtype)), inputs(count, 4)
    with pytest.raises(NotImplementedError, match="autograd's derivative is not"):
        fimlib.estimate(net, x.to(net.body.weight.dtype), fimlib.Gaussian(), passes=2)


def test_numbers_that_are_too_small_to_be_squared_have_no_small_error():
    net, x, _ = problem("Categorical")
    with torch.no_grad():
        net[2].weight.mul_(0.1)
        net[2].bias.copy_(torch.tensor([450.0, 0, 0]))
    found = fimlib.estimate(net, x, fimlib.Categorical(), passes=4)
    assert math.isinf(found.relative_error)


@pytest.mark.parametrize("squares", ["batch", "input"])
def test_inference_mode_changes_nothing(squares):
    net, x, family = problem("Categorical")
    right = fimlib.estimate(net, x, family, passes=3, squares=squares)
    with torch.inference_mode():
        found = fimlib.estimate(net, x, family, passes=3, squares=squares)
    for n, value in right.value.items():
        assert torch.equal(found.value[n], value)


@pytest.mark.parametrize(
    ("model", "words"),
    [(nn.ReLU(), "the model has no parameters"), (nn.LazyLinear(2), "lazy parameters")],
    ids=["none", "lazy"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_model_without_parameters_is_refused(model, words):
    with pytest.raises(ValueError, match=words):
        fimlib.estimate(model, torch.ones(2, 3), fimlib.Gaussian(), passes=2)
