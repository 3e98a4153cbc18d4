import pytest
import reference
import torch
from strategies import ADVERSARIAL, Cube, inputs, mlp
from torch import nn

import fimlib
from fimlib import Categorical, Gaussian, differentiate
from fimlib.families import Bernoulli, GaussianHead, Poisson

NETWORKS = {
    "sigmoid": lambda: mlp([3, 5, 4, 3], nn.Sigmoid, scale=2.0),
    "log-sigmoid, 5 layers": lambda: mlp([2, 3, 4, 3, 3, 4], nn.LogSigmoid, scale=1.5),
    "own activation": lambda: mlp([3, 4, 2], Cube),
    "linear": lambda: mlp([3, 4], nn.Tanh),
}


def derivs_with_outputs(target, num_inputs=2):
    """A network whose logits are exactly ``target`` at every input, and whose S is not 0."""
    net = mlp([2, 3, len(target)], nn.Tanh)
    net[2].weight.data.mul_(0.7)
    x = inputs(1, 2).repeat(num_inputs, 1)
    net[2].bias.data += torch.tensor(target, dtype=torch.float64).log() - net(x)[0].detach()
    return differentiate(net, x)


ENGINES = [(name, "layerwise") for name in NETWORKS] + [
    (name, "backpack") for name in NETWORKS if name != "own activation"
]


@pytest.mark.parametrize(("name", "engine"), ENGINES)
def test_closed_forms_equal_enumeration(name, engine):
    """Lemma A.1 against the sum over all labels, both estimators differentiated by autograd."""
    net = NETWORKS[name]()
    x = inputs(2, net[0].in_features)
    derivs = differentiate(net, x, engine=engine)
    ours = {
        "I": fimlib.fisher_information(derivs, Categorical()),
        "v1": fimlib.variance_i1(derivs, Categorical()),
        "v2": fimlib.variance_i2(derivs, Categorical()),
        "c12": fimlib.covariance_i1_i2(derivs, Categorical()),
    }
    for b in range(2):
        expected = reference.categorical(net, x[b : b + 1])
        for quantity, values in ours.items():
            assert set(values) == set(expected[quantity])
            scale = max(t.abs().max() for t in expected[quantity].values()) + 1e-20  # V₂ may be 0
            for parameter, tensor in values.items():
                error = (tensor[b] - expected[quantity][parameter]).abs().max()
                assert error <= 1e-10 * scale, (quantity, parameter)


@pytest.mark.parametrize("probabilities", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_variance_of_one_label_at_adversarial_softmax(probabilities):
    """The estimators on each single label, weighted by its probability."""
    derivs = derivs_with_outputs(probabilities, num_inputs=1)
    sigma = torch.softmax(derivs.outputs[0], 0)
    family, one = Categorical(), torch.eye(len(sigma), dtype=torch.float64)
    exact = {
        "I": fimlib.fisher_information(derivs, family),
        "v1": fimlib.variance_i1(derivs, family),
        "v2": fimlib.variance_i2(derivs, family),
        "c12": fimlib.covariance_i1_i2(derivs, family),
    }
    singles = [fimlib.Labels(family, derivs.outputs, row[None], 1) for row in one]
    for name in exact["I"]:
        i1 = torch.stack([fimlib.estimate_i1(derivs, y)[name][0] for y in singles])
        i2 = torch.stack([fimlib.estimate_i2(derivs, y)[name][0] for y in singles])
        mean = torch.einsum("k,k...->...", sigma, i1)
        for estimate in (i1, i2):
            bias = torch.einsum("k,k...->...", sigma, estimate) - exact["I"][name][0]
            assert bias.abs().max() <= 1e-14 * estimate.abs().max()
        for quantity, a, b in (("v1", i1, i1), ("v2", i2, i2), ("c12", i1, i2)):
            moment = torch.einsum("k,k...->...", sigma, (a - mean) * (b - mean))
            expected = exact[quantity][name][0]
            rounding = 1e-14 * a.abs().max() * b.abs().max()
            assert (moment - expected).abs().max() <= 1e-10 * expected.abs().max() + rounding


@pytest.mark.parametrize("family", [Categorical(), Gaussian()], ids=["categorical", "gaussian"])
@pytest.mark.parametrize("num_samples", [2, 9])
def test_estimators_by_monte_carlo(family, num_samples):
    """Mean I, variances V₁ and V₂ and their covariance over repeated draws: 5 standard errors.

    The standard error of a sample (co)variance is itself estimated from the repetitions.
    """
    repeats = 20_000
    net = mlp([2, 3, 3], nn.Tanh, scale=1.5)
    derivs = differentiate(net, inputs(1, 2).repeat(repeats, 1))
    one = differentiate(net, inputs(1, 2))
    labels = family.sample(derivs.outputs, num_samples, torch.Generator().manual_seed(0))
    i1, i2 = fimlib.estimate_i1(derivs, labels), fimlib.estimate_i2(derivs, labels)
    s1 = fimlib.sample_variance_i1(derivs, labels)
    s2 = fimlib.sample_variance_i2(derivs, labels)
    I = fimlib.fisher_information(one, family)
    V1 = fimlib.variance_i1(one, family, num_samples=num_samples)
    V2 = fimlib.variance_i2(one, family, num_samples=num_samples)
    C12 = fimlib.covariance_i1_i2(one, family, num_samples=num_samples)

    def agree(samples, expected):
        standard_error = samples.std(0) / repeats**0.5
        assert ((samples.mean(0) - expected).abs() <= 5 * standard_error + 1e-13).all()

    for name in I:
        yardstick = (V1[name][0] / repeats).sqrt(), (V2[name][0] / repeats).sqrt()
        for estimate, error in zip((i1, i2), yardstick, strict=True):
            assert ((estimate[name].mean(0) - I[name][0]).abs() <= 5 * error + 1e-13).all()
        d1, d2 = i1[name] - I[name][0], i2[name] - I[name][0]
        agree(d1 * d1, V1[name][0])
        agree(d2 * d2, V2[name][0])
        agree(d1 * d2, C12[name][0])
        agree(s1[name], V1[name][0])
        agree(s2[name], V2[name][0])


def test_counting_labels_equals_going_through_them():
    """N labels by their class counts against a loop over the N labels."""
    net, x = mlp([3, 4, 3], nn.Sigmoid, scale=2.0), inputs(1, 3)
    derivs = differentiate(net, x)
    labels = Categorical().sample(derivs.outputs, 6, torch.Generator().manual_seed(1))
    counts = (labels.weights[0] * 6).round().long().tolist()
    drawn = [k for k, n in enumerate(counts) for _ in range(n)]
    singles = [torch.eye(3, dtype=torch.float64)[[k]] for k in drawn]
    for estimator in (fimlib.estimate_i1, fimlib.estimate_i2):
        together = estimator(derivs, labels)
        for name in together:
            each = [
                estimator(derivs, fimlib.Labels(Categorical(), labels.outputs, one, 1))[name]
                for one in singles
            ]
            assert torch.allclose(together[name], torch.stack(each).mean(0), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("family", [Categorical(), Gaussian()], ids=["categorical", "gaussian"])
@pytest.mark.parametrize("num_inputs", [1, 4])
def test_matrices_have_the_diagonals(family, num_inputs):
    """Eqs 2–4 on all parameters against the diagonal, conditional (B = 1) and joint (B = 4)."""
    net, x = mlp([2, 3, 3], nn.Sigmoid, scale=2.0), inputs(num_inputs, 2)
    derivs = differentiate(net, x)
    labels = family.sample(derivs.outputs, 5, torch.Generator().manual_seed(0))
    names = ["2.bias", "0.weight", "2.weight"]
    pairs = [
        (
            fimlib.fisher_matrix(net, x, family, parameters=names),
            fimlib.fisher_information(derivs, family),
        ),
        (
            fimlib.estimate_i1_matrix(net, x, labels, parameters=names),
            fimlib.estimate_i1(derivs, labels),
        ),
        (
            fimlib.estimate_i2_matrix(net, x, labels, parameters=names),
            fimlib.estimate_i2(derivs, labels),
        ),
    ]
    for matrix, diagonal in pairs:
        joint = diagonal.mean_over_inputs()
        expected = torch.cat([joint[name].flatten() for name in names])
        assert torch.allclose(matrix.diagonal(), expected, rtol=1e-10, atol=1e-14)
        assert torch.allclose(matrix, matrix.T, atol=1e-14)


def test_i2_matrix_is_the_negative_hessian_of_the_log_likelihood():
    """Off-diagonal too, for a module that only torch.func can differentiate."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(2, 2), nn.Linear(2, 3)

        def forward(self, x):
            return self.outer(x + torch.tanh(self.inner(x)))

    torch.manual_seed(0)
    net, x, label = Residual().double(), inputs(1, 2), 2
    weights = torch.eye(3, dtype=torch.float64)[[label]]
    labels = fimlib.Labels(Categorical(), net(x).detach(), weights, 1)

    def minus_log_p(w):
        h = torch.func.functional_call(net, {"inner.weight": w.view(2, 2)}, (x,))
        return -torch.log_softmax(h[0], 0)[label]

    w = net.inner.weight.detach().flatten()
    matrices = (fimlib.estimate_i1_matrix, fimlib.estimate_i2_matrix)
    i1, i2 = (f(net, x, labels, parameters=["inner.weight"]) for f in matrices)
    score = torch.func.grad(minus_log_p)(w)
    assert torch.allclose(i1, torch.outer(score, score), atol=1e-14)
    assert torch.allclose(i2, torch.func.hessian(minus_log_p)(w), atol=1e-14)


def test_the_last_linear_layer_has_no_variance_in_i2():
    """Remark 4.4, and Î₂ = I there whatever the labels."""
    derivs = differentiate(mlp([3, 4, 3], nn.Sigmoid), inputs(2, 3))
    labels = Categorical().sample(derivs.outputs, 1)
    I = fimlib.fisher_information(derivs, Categorical())
    V2 = fimlib.variance_i2(derivs, Categorical())
    for name in ("2.weight", "2.bias"):
        assert not V2[name].any()
        assert torch.equal(fimlib.estimate_i2(derivs, labels)[name], I[name])
    assert V2["0.weight"].all()


def test_layer_means_and_joint_means_equal_the_dense_ones():
    net, x = mlp([3, 5, 4, 3], nn.Tanh), inputs(4, 3)
    derivs = differentiate(net, x)
    for quantity in (
        fimlib.fisher_information(derivs, Categorical()),
        fimlib.variance_i2(derivs, Categorical(), num_samples=7),
        fimlib.fisher_information(differentiate(net, x, engine="backpack"), Categorical()),
    ):
        for name, tensor in quantity.mean_over_inputs().items():
            assert torch.allclose(tensor, quantity[name].mean(0), rtol=1e-12)
            assert tensor.shape == net.get_parameter(name).shape
        means = quantity.layer_means()
        assert list(means) == ["0", "2", "4"]
        for layer, mean in means.items():
            entries = [quantity[f"{layer}.{p}"].flatten(1) for p in ("weight", "bias")]
            assert torch.allclose(mean, torch.cat(entries, dim=1).mean(1), rtol=1e-12)


def test_moments_are_float64_for_a_float32_network():
    """1 − ‖σ‖² would be several percent off in float32 at σ_max = 1 − 1e-6."""
    net = nn.Linear(1, 2, bias=False)
    net.weight.data = torch.tensor([[13.8], [0.0]])
    I = fimlib.fisher_information(differentiate(net, torch.ones(1, 1)), Categorical())
    p = torch.sigmoid(net.weight[0, 0].double()).item()
    assert I["weight"].dtype == torch.float64
    assert I["weight"][0, 0, 0].item() == pytest.approx(p * (1 - p), rel=1e-9)


def test_float32_networks_give_float64_results_near_the_exact_ones():
    """Every quantity, and the matrices, of a network whose weights are float32 numbers."""
    net, x = mlp([3, 5, 4, 3], nn.Sigmoid, scale=2.0), inputs(1, 3).float().double()
    for parameter in net.parameters():
        parameter.data = parameter.data.float().double()

    def everything(net, x):
        derivs, family = differentiate(net, x), Categorical()
        weights = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
        labels = fimlib.Labels(family, derivs.outputs.double(), weights, 4)
        for quantity in (
            fimlib.fisher_information(derivs, family),
            fimlib.variance_i1(derivs, family),
            fimlib.variance_i2(derivs, family),
            fimlib.estimate_i1(derivs, labels),
            fimlib.estimate_i2(derivs, labels),
            fimlib.sample_variance_i1(derivs, labels),
        ):
            yield from quantity.values()
        for matrix in (fimlib.estimate_i1_matrix, fimlib.estimate_i2_matrix):
            yield matrix(net, x, labels, parameters=["2.weight"])

    exact = list(everything(net, x))
    for a, b in zip(exact, everything(net.float(), x.float()), strict=True):
        assert b.dtype == torch.float64
        assert (a - b).abs().max() <= 1e-4 * a.abs().max() + 1e-30


def test_an_in_place_first_module_changes_nothing():
    x = inputs(2, 3)
    before = x.clone()
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)]
    in_place = nn.Sequential(nn.SiLU(inplace=True), *layers).double()
    plain = nn.Sequential(nn.SiLU(), *layers).double()
    names = ["1.weight", "3.bias"]
    a, b = (fimlib.fisher_matrix(n, x, Categorical(), parameters=names) for n in (in_place, plain))
    assert torch.equal(a, b)
    assert torch.equal(x, before)


def test_bad_arguments_are_refused_with_a_remedy():
    net, x = mlp([3, 4, 3], nn.Sigmoid), inputs(2, 3)
    derivs = differentiate(net, x)
    labels = Categorical().sample(derivs.outputs, 1)
    for variance in (fimlib.variance_i1, fimlib.variance_i2, fimlib.covariance_i1_i2):
        with pytest.raises(ValueError, match="num_samples"):
            variance(derivs, Categorical(), num_samples=0)
    for sample_variance in (fimlib.sample_variance_i1, fimlib.sample_variance_i2):
        with pytest.raises(ValueError, match="≥ 2"):
            sample_variance(derivs, labels)
    other = differentiate(net, x + 1)
    for estimator in (fimlib.estimate_i1, fimlib.estimate_i2):
        with pytest.raises(ValueError, match="drawn for other outputs"):
            estimator(other, labels)
    made = r"family.observed\(derivs.outputs, y\) or family.sample\(.*; got list"
    for function in (
        fimlib.estimate_i1, fimlib.estimate_i2, fimlib.sample_variance_i1,
        fimlib.sample_variance_i2, fimlib.data_fisher, fimlib.data_fisher_variance,
        fimlib.kl_gradient,
    ):  # fmt: skip
        with pytest.raises(TypeError, match=made):
            function(derivs, [0, 1])
    for matrix in (
        fimlib.estimate_i1_matrix, fimlib.estimate_i2_matrix, fimlib.empirical.data_fisher_matrix,
        fimlib.empirical.data_fisher_covariance,
    ):  # fmt: skip
        with pytest.raises(TypeError, match=made):
            matrix(net, x, [0, 1], parameters=["0.weight"])
    with pytest.raises(TypeError, match=made):
        fimlib.Joint(Categorical()).update(derivs, labels=[0, 1])
    for matrix in (fimlib.estimate_i1_matrix, fimlib.estimate_i2_matrix):
        with pytest.raises(ValueError, match="drawn for other outputs"):
            matrix(net, x + 1, labels, parameters=["0.weight"])
        with pytest.raises(ValueError, match=r"no parameters named \['w'\]; there are: 0.weight"):
            matrix(net, x, labels, parameters=["w"])
    with pytest.raises(ValueError, match="there are: 0.weight"):
        fimlib.fisher_matrix(net, x, Categorical(), parameters=[])
    for names in ("0.weight", ["0.bias", "0.bias"]):
        with pytest.raises(ValueError, match="a list of different names"):
            fimlib.fisher_matrix(net, x, Categorical(), parameters=names)
    with pytest.raises(ValueError, match=r"T ≥ 2"):
        fimlib.fisher_information(differentiate(mlp([3, 1], nn.Tanh), x), Categorical())
    training = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).double()
    with pytest.raises(ValueError, match="eval"):
        fimlib.fisher_matrix(training, x, Categorical(), parameters=["0.weight"])


COVARIANCE = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
OTHERS = {
    "bernoulli": (Bernoulli(), 3, reference.bernoulli),
    "poisson": (Poisson(), 2, reference.poisson),
    "gaussian": (Gaussian(), 2, reference.gaussian(torch.eye(2, dtype=torch.float64))),
    "gaussian, known covariance": (Gaussian(COVARIANCE), 2, reference.gaussian(COVARIANCE)),
    "gaussian head, one pair": (GaussianHead(), 2, reference.gaussian_head),
    "gaussian head, two pairs": (GaussianHead(), 4, reference.gaussian_head),
}


def flat_at(diagonal, b):
    return torch.cat([tensor[b].flatten() for tensor in diagonal.values()])


def near(a, b, rel=1e-10):
    return (a - b).abs().max() <= rel * b.abs().max() + 1e-13


@pytest.mark.parametrize("case", OTHERS)
def test_closed_forms_equal_quadrature(case):
    """Lemma A.1 for every family, against autograd on log p at every label: no formula of ours."""
    family, num_outputs, labels = OTHERS[case]
    net, x = mlp([2, 2, num_outputs], nn.Tanh, seed=2), inputs(2, 2)
    derivs = differentiate(net, x)
    for b in range(2):
        truth = reference.by_quadrature(net, x[b : b + 1], family, labels)
        mean = torch.einsum("a,ap->p", truth["p"], truth["minus_hessian"].diagonal(0, 1, 2))
        assert near(mean, truth["I"])  # (*) of Eq. 2
        assert near(flat_at(fimlib.fisher_information(derivs, family), b), truth["I"])
        for quantity, key in (
            (fimlib.variance_i1, "v1"),
            (fimlib.variance_i2, "v2"),
            (fimlib.covariance_i1_i2, "c12"),
        ):
            scale = 1e-10 * (truth["v1"].max() * truth["v2"].max()).sqrt()
            for n in (1, 4):
                ours = n * flat_at(quantity(derivs, family, num_samples=n), b)
                assert ((ours - truth[key]).abs() <= 1e-10 * truth[key].abs() + scale).all(), key
            assert torch.equal(flat_at(quantity(derivs, family), b), ours), key


@pytest.mark.parametrize("case", OTHERS)
def test_estimators_of_observed_labels_are_those_of_autograd(case):
    """Î₁, Î₂ and their matrices on given labels, against scores and Hessians of log p."""
    family, num_outputs, labels = OTHERS[case]
    net, x = mlp([2, 2, num_outputs], nn.Tanh, seed=2), inputs(1, 2)
    names, derivs = [name for name, _ in net.named_parameters()], differentiate(net, x)
    truth = reference.by_quadrature(net, x, family, labels)
    chosen = [0, len(truth["p"]) // 3, -1]
    observed = family.observed(derivs.outputs, truth["y"][chosen][None])
    i1 = torch.einsum("ai,aj->ij", truth["score"][chosen], truth["score"][chosen]) / 3
    i2 = truth["minus_hessian"][chosen].mean(0)
    assert near(fimlib.estimate_i1_matrix(net, x, observed, parameters=names), i1)
    assert near(fimlib.estimate_i2_matrix(net, x, observed, parameters=names), i2)
    assert near(flat_at(fimlib.estimate_i1(derivs, observed), 0), i1.diagonal())
    assert near(flat_at(fimlib.estimate_i2(derivs, observed), 0), i2.diagonal())
    squares = truth["score"][chosen] ** 2
    assert near(flat_at(fimlib.sample_variance_i1(derivs, observed), 0), squares.var(0) / 3)
    diagonals = truth["minus_hessian"][chosen].diagonal(0, 1, 2)
    assert near(flat_at(fimlib.sample_variance_i2(derivs, observed), 0), diagonals.var(0) / 3)
    fisher = torch.einsum("a,ai,aj->ij", truth["p"], truth["score"], truth["score"])
    assert near(fimlib.fisher_matrix(net, x, family, parameters=names), fisher)


@pytest.mark.parametrize("case", OTHERS)
def test_matrices_average_over_the_inputs(case):
    family, num_outputs, _ = OTHERS[case]
    net, x = mlp([2, 2, num_outputs], nn.Tanh, seed=2), inputs(3, 2)
    names, derivs = ["0.weight", "2.bias"], differentiate(net, x)
    observed = family.sample(derivs.outputs, 2, torch.Generator().manual_seed(0))
    pairs = (
        (
            fimlib.fisher_matrix(net, x, family, parameters=names),
            fimlib.fisher_information(derivs, family),
        ),
        (
            fimlib.estimate_i1_matrix(net, x, observed, parameters=names),
            fimlib.estimate_i1(derivs, observed),
        ),
        (
            fimlib.estimate_i2_matrix(net, x, observed, parameters=names),
            fimlib.estimate_i2(derivs, observed),
        ),
    )
    for matrix, diagonal in pairs:
        joint = diagonal.mean_over_inputs()
        assert near(matrix.diagonal(), torch.cat([joint[name].flatten() for name in names]))


def test_remark_4_4_needs_linearity_in_the_natural_parameters():
    """Every family has V₂ = 0 in a linear last layer, but for the log s of a head."""
    for case, (family, num_outputs, _) in OTHERS.items():
        derivs = differentiate(mlp([2, 2, num_outputs], nn.Tanh, seed=2), inputs(2, 2))
        V2 = fimlib.variance_i2(derivs, family)
        assert V2["0.weight"].all()
        for name in ("2.weight", "2.bias"):
            means, rest = V2[name][:, : num_outputs // 2], V2[name][:, num_outputs // 2 :]
            assert not means.any()
            assert rest.all() if case.startswith("gaussian head") else not rest.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_natural_derivatives_of_a_head_are_the_chain_rule_by_hand(dtype):
    """J = (μ'/s, ρ') and S = (μ''/s − 4ab, ρ'' − 2b²), in every layer, dense or factored."""
    net, x = mlp([2, 3, 4], nn.Tanh, seed=2).to(dtype), inputs(2, 2).to(dtype)
    derivs = differentiate(net, x)
    ours = GaussianHead().natural_derivatives(derivs)
    assert torch.equal(ours.outputs, derivs.outputs)
    s = derivs.outputs.double()[:, 2:].exp()
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        J, S = derivs.jacobian(name).double(), derivs.second(name).double()
        scale = s.reshape(2, 2, *[1] * (J.ndim - 2))
        a, b = J[:, :2] / scale, J[:, 2:]
        expected = torch.cat([S[:, :2] / scale - 4 * a * b, S[:, 2:] - 2 * b * b], dim=1)
        rel = 1e-12 if dtype == torch.float64 else 1e-5
        assert ours.jacobian(name).dtype == ours.second(name).dtype == torch.float64
        assert near(ours.jacobian(name), torch.cat([a, b], dim=1), rel)
        assert near(ours.second(name), expected, rel)


def test_natural_derivatives_are_the_given_ones_where_outputs_are_natural():
    derivs = differentiate(mlp([2, 3], nn.Tanh), inputs(1, 2))
    for family in (Categorical(), Bernoulli(), Poisson(), Gaussian()):
        assert family.natural_derivatives(derivs) is derivs


def test_a_diagonal_names_its_parameters():
    derivs = differentiate(mlp([3, 4, 2], nn.Tanh), inputs(1, 3))
    shown = repr(fimlib.fisher_information(derivs, Categorical()))
    assert shown == "Diagonal(0.weight, 0.bias, 2.weight, 2.bias)"
