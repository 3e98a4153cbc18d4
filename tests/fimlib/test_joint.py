import copy
import io
from functools import partial
from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch
from strategies import ADVERSARIAL, inputs, mlp
from torch import nn

import fimlib
from fimlib import Categorical, Gaussian, differentiate, projections
from fimlib.families import Bernoulli, GaussianHead
from fimlib.joint import Joint, joint_covariance

# The oracle: every data set, every sequence of labels, by loops. ---------------------------------


def categorical_labels(h):
    """Every label: (probability, log p as a function of the outputs)."""
    sigma = torch.softmax(h, 0)
    return [(sigma[k], lambda h, k=k: torch.log_softmax(h, 0)[k]) for k in range(len(sigma))]


def gaussian_labels(h):
    """Three nodes per output that have the first five moments of a Gaussian: exact for V₁."""
    nodes = [(1 / 6, -(3**0.5)), (2 / 3, 0.0), (1 / 6, 3**0.5)]
    labels = []
    for combination in product(nodes, repeat=len(h)):
        y = h + torch.tensor([node for _, node in combination], dtype=torch.float64)
        weight = torch.tensor([w for w, _ in combination], dtype=torch.float64).prod()
        labels.append((weight, lambda h, y=y: -((h - y) ** 2).sum() / 2))
    return labels


def gaussian_head_labels(h):
    """One label of predicted mean and spread: five nodes are exact for its eighth power."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)

    def log_p(h, y):
        return -h[1] - ((y - h[0]) / h[1].exp()) ** 2 / 2

    return [
        (torch.tensor(w / weights.sum()), partial(log_p, y=h[0] + h[1].exp() * node))
        for node, w in zip(nodes, weights, strict=True)
    ]


def bernoulli_labels(h):
    """Two coins."""
    p = torch.sigmoid(h)

    def log_p(h, y):
        return nn.functional.logsigmoid(torch.where(y > 0, h, -h)).sum()

    sides = [torch.tensor(y) for y in product((0, 1), repeat=2)]
    return [(torch.where(y > 0, p, 1 - p).prod(), partial(log_p, y=y)) for y in sides]


LABELS = {
    "categorical": categorical_labels,
    "gaussian": gaussian_labels,
    "gaussian head": gaussian_head_labels,
    "bernoulli": bernoulli_labels,
}
FAMILIES = {"categorical": Categorical(), "gaussian": Gaussian()}
ALL_FAMILIES = {**FAMILIES, "gaussian head": GaussianHead(), "bernoulli": Bernoulli()}


def one_label(model, x, labels_of):
    """Probabilities [A], and (Î₁, Î₂) of all parameters on every label at one input, [A, 2P]."""
    parameters = list(model.parameters())
    rows, probabilities = [], []
    for probability, log_p in labels_of(model(x[None])[0].detach()):
        score = torch.autograd.grad(log_p(model(x[None])[0]), parameters, create_graph=True)
        flat = torch.cat([s.flatten() for s in score])
        curvature = []
        for i in range(len(flat)):
            row = torch.autograd.grad(flat[i], parameters, retain_graph=True, allow_unused=True)
            full = [
                torch.zeros_like(p) if r is None else r
                for r, p in zip(row, parameters, strict=True)
            ]
            curvature.append(torch.cat([r.flatten() for r in full])[i])
        rows.append(torch.cat([flat.detach() ** 2, -torch.stack(curvature)]))
        probabilities.append(probability)
    return torch.stack(probabilities), torch.stack(rows)


def enumerate_joint(tables, num_inputs, num_labels, replacement=True):
    """Exact mean [2P] and covariance [2P, 2P] of the joint (Î₁, Î₂), by going through all cases."""
    choices = (
        list(product(tables, repeat=num_inputs))
        if replacement
        else list(combinations(tables, num_inputs))
    )
    estimates, weights = [], []
    for chosen in choices:
        weight, total = torch.ones(1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        for probabilities, rows in chosen:
            for _ in range(num_labels):
                weight = (weight[:, None] * probabilities).flatten()
                total = (total[:, None] + rows).flatten(0, 1)
        estimates.append(total / (num_inputs * num_labels))
        weights.append(weight / len(choices))
    estimate, weight = torch.cat(estimates), torch.cat(weights)
    mean = weight @ estimate
    centred = estimate - mean
    return mean, centred.T @ (weight[:, None] * centred)


def flat(quantity):
    return torch.cat([tensor.flatten() for tensor in quantity.values()])


def close(a, b, tolerance=1e-10, scale=0.0):
    """Relative to the largest entry of b, or to what b was the small difference of."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(b.abs().max(), 1e-6 * scale)


def small(family, num_inputs=3):
    net = mlp([2, 2, 3 if family == "categorical" else 2], nn.Tanh, scale=1.5)
    return net, inputs(num_inputs, 2)


def accumulate(derivs, family, *, bounds="certified", **options):
    joint = Joint(family, bounds=bounds, **options)
    joint.update(derivs)
    return joint


@pytest.fixture(scope="module")
def tables():
    """Per family: the network, its inputs and the oracle's table at each of them."""
    result = {}
    for family, labels_of in LABELS.items():
        net, x = small(family)
        result[family] = net, x, [one_label(net, one, labels_of) for one in x]
    return result


CASES = [
    *[("categorical", *n) for n in product((1, 2, 3), (1, 2, 3))],
    *[("gaussian", *n) for n in ((1, 1), (1, 2), (2, 1), (3, 1))],
    *[("gaussian head", *n) for n in ((1, 2), (2, 2), (3, 1))],
    *[("bernoulli", *n) for n in ((1, 3), (2, 1), (3, 2))],
]


@pytest.mark.parametrize("replacement", [True, False], ids=["with", "without"])
@pytest.mark.parametrize(("family", "num_inputs", "num_labels"), CASES)
def test_theorem_4_7_by_enumeration(tables, family, num_inputs, num_labels, replacement):
    """Eq. 20, for both estimators and their covariance, over all draws of inputs and labels."""
    net, x, table = tables[family]
    joint = accumulate(differentiate(net, x), ALL_FAMILIES[family])
    mean, covariance = enumerate_joint(table, num_inputs, num_labels, replacement)
    size = len(mean) // 2
    for half in (mean[:size], mean[size:]):
        close(flat(joint.fisher_information()), half)
    arguments = {"num_inputs": num_inputs, "num_labels": num_labels, "replacement": replacement}
    close(flat(joint.variance_i1(**arguments)), covariance.diagonal()[:size])
    close(flat(joint.variance_i2(**arguments)), covariance.diagonal()[size:])
    expected = covariance[:size, size:].diagonal()
    close(flat(joint.covariance_i1_i2(**arguments)), expected, scale=covariance.max())


@pytest.mark.parametrize(("family", "num_inputs", "num_labels"), CASES)
def test_joint_covariance_by_enumeration(tables, family, num_inputs, num_labels):
    net, x, table = tables[family]
    derivs, names = differentiate(net, x), [name for name, _ in net.named_parameters()]
    _, covariance = enumerate_joint(table, num_inputs, num_labels)
    size = len(covariance) // 2
    ours = joint_covariance(
        derivs,
        ALL_FAMILIES[family],
        parameters=names,
        num_inputs=num_inputs,
        num_labels=num_labels,
    )
    close(ours[0], covariance[:size, :size])
    close(ours[1], covariance[size:, size:])


def test_joint_covariance_has_the_variances_on_its_diagonal_in_the_order_of_the_names():
    net, x = small("categorical")
    derivs, names = differentiate(net, x.float().double()), ["2.bias", "0.weight"]
    joint = accumulate(derivs, Categorical())
    covariance = joint_covariance(derivs, Categorical(), parameters=names, num_inputs=4)
    for matrix, variance in zip(
        covariance, (joint.variance_i1(4), joint.variance_i2(4)), strict=True
    ):
        assert matrix.dtype == torch.float64
        close(matrix.diagonal(), flat({name: variance[name] for name in names}))
        assert torch.linalg.eigvalsh(matrix)[0] >= -1e-14 * matrix.abs().max()


def test_averages_over_inputs_by_loops(tables):
    """Every term of Eq. 20 on its own, against the oracle's table."""
    net, x, table = tables["categorical"]
    joint = accumulate(differentiate(net, x), Categorical())
    size = table[0][1].shape[1] // 2
    fisher, terms = [], {"v1": [], "v2": [], "c12": []}
    for probabilities, rows in table:
        i1, i2 = rows[:, :size], rows[:, size:]
        mean = probabilities @ i1
        fisher.append(mean)
        terms["v1"].append(probabilities @ (i1 - mean) ** 2)
        terms["v2"].append(probabilities @ (i2 - mean) ** 2)
        terms["c12"].append(probabilities @ ((i1 - mean) * (i2 - mean)))
    mean = sum(fisher) / len(x)
    assert joint.count == len(x)
    close(flat(joint.fisher_information()), mean)
    close(flat(joint.input_variance()), sum((f - mean) ** 2 for f in fisher) / len(x))
    close(flat(joint.label_variance(1)), sum(terms["v1"]) / len(x))
    close(flat(joint.label_variance(2)), sum(terms["v2"]) / len(x))
    close(flat(joint.label_covariance()), sum(terms["c12"]) / len(x))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_joint_estimators_by_monte_carlo(family):
    """At a size beyond enumeration: mean, variances and covariance within 5 standard errors."""
    repeats, num_inputs, num_labels = 2000, 5, 3
    net, x = mlp([4, 6, 5], nn.Sigmoid, scale=2.0), inputs(40, 4)
    joint = accumulate(differentiate(net, x), family)
    generator = torch.Generator().manual_seed(0)
    drawn = x[torch.randint(len(x), (repeats * num_inputs,), generator=generator)]
    derivs = differentiate(net, drawn)
    labels = family.sample(derivs.outputs, num_labels, generator)
    i1, i2 = fimlib.estimate_i1(derivs, labels), fimlib.estimate_i2(derivs, labels)
    fisher = joint.fisher_information()
    variance1 = joint.variance_i1(num_inputs, num_labels)
    variance2 = joint.variance_i2(num_inputs, num_labels)
    covariance = joint.covariance_i1_i2(num_inputs, num_labels)

    def agree(samples, expected):
        standard_error = samples.std(0) / repeats**0.5
        assert ((samples.mean(0) - expected).abs() <= 5 * standard_error + 1e-15).all()

    for name in fisher:
        e1, e2 = (e[name].unflatten(0, (repeats, -1)).mean(1) for e in (i1, i2))
        for estimate, variance in ((e1, variance1), (e2, variance2)):
            error = (variance[name] / repeats).sqrt()
            assert ((estimate.mean(0) - fisher[name]).abs() <= 5 * error + 1e-15).all()
        d1, d2 = e1 - fisher[name], e2 - fisher[name]
        agree(d1 * d1, variance1[name])
        agree(d2 * d2, variance2[name])
        agree(d1 * d2, covariance[name])


def test_one_label_each_is_the_default_and_labels_cannot_beat_the_first_term():
    net, x = small("categorical")
    joint = accumulate(differentiate(net, x), Categorical())
    first = flat(joint.input_variance()) / 2
    for variance in (joint.variance_i1, joint.variance_i2, joint.covariance_i1_i2):
        assert torch.equal(flat(variance(2)), flat(variance(2, 1, replacement=True)))
        close(flat(variance(2, 10**12)), first, 1e-9)
    assert (flat(joint.variance_i1(2, 5)) > first).all()


def test_a_full_pass_without_replacement_has_only_the_label_term():
    net, x = small("categorical")
    joint = accumulate(differentiate(net, x), Categorical())
    m = len(x)
    for ours, term in (
        (joint.variance_i1, joint.label_variance(1)),
        (joint.variance_i2, joint.label_variance(2)),
        (joint.covariance_i1_i2, joint.label_covariance()),
    ):
        close(flat(ours(m, 2, replacement=False)), flat(term) / (2 * m), 1e-15)
        with pytest.raises(ValueError, match=r"\(n_x\) is 4, but only 3 inputs were seen: draw"):
            ours(m + 1, replacement=False)
        assert ours(m + 1)


@pytest.mark.parametrize("num_inputs", [2, 3, 12])
def test_one_input_is_drawn_the_same_with_and_without_replacement(num_inputs):
    net, x = small("categorical", num_inputs)
    joint = accumulate(differentiate(net, x), Categorical())
    assert torch.equal(flat(joint.variance_i1(1)), flat(joint.variance_i1(1, replacement=False)))


def test_a_single_input_is_a_full_pass():
    net, x = small("categorical")
    derivs = differentiate(net, x[:1])
    joint = accumulate(derivs, Categorical())
    conditional = fimlib.variance_i1(derivs, Categorical(), num_samples=2).mean_over_inputs()
    for replacement in (True, False):
        variance = joint.variance_i1(1, 2, replacement=replacement)
        close(flat(variance), flat(conditional), 1e-14)
    assert (flat(joint.input_variance()) <= 1e-15 * flat(joint.fisher_information()) ** 2).all()


# Streaming. --------------------------------------------------------------------------------------


def everything(joint):
    """All that a Joint can say, as one dict of vectors."""
    bounds = [joint.variance_bounds(3, 2, estimator) for estimator in (1, 2)]
    return {
        "I": flat(joint.fisher_information()),
        "Var_x I": flat(joint.input_variance()),
        "V1": flat(joint.label_variance(1)),
        "V2": flat(joint.label_variance(2)),
        "C12": flat(joint.label_covariance()),
        "total": flat(joint.variance_i1(2, 2, replacement=False)),
        "4.8": flat(joint.lemma_4_8(tight=True).upper),
        "bounds": torch.cat([flat(side) for interval in bounds for side in interval]),
    }


def agree_to_rounding(a, b):
    """Relative to the scale that is subtracted from: E I² for Var_x I."""
    left, right = everything(a), everything(b)
    scale = flat(b.fisher_information()).square().max() + right["Var_x I"].max()
    assert a.count == b.count
    for key in right:
        assert (left[key] - right[key]).abs().max() <= 1e-12 * max(scale, right[key].abs().max())
    close(left["Var_x I"], right["Var_x I"], 1e-12)


SPLITS = [[12], [1, 11], [11, 1], [3, 4, 5], [6, 6], [1] * 12]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_any_split_into_batches_gives_the_same(family, split):
    net, x = mlp([3, 4, 3], nn.Sigmoid, scale=3.0), inputs(12, 3)
    whole = accumulate(differentiate(net, x), family)
    streamed = Joint(family, bounds="certified")
    for batch in x.split(split):
        streamed.update(differentiate(net, batch))
    agree_to_rounding(streamed, whole)


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_merging_in_any_order_gives_the_same(order):
    net, x = mlp([3, 4, 3], nn.Sigmoid, scale=3.0), inputs(12, 3)
    whole = accumulate(differentiate(net, x), Categorical())
    parts = [accumulate(differentiate(net, b), Categorical()) for b in x.split([2, 7, 3])]
    a, b, c = (parts[k] for k in order)
    before = everything(c)
    left, right, empty = (Joint(Categorical(), bounds="certified") for _ in range(3))
    for part in (a, empty, b, c):
        left.merge(part)
    b.merge(c)
    right.merge(a)
    right.merge(b)
    agree_to_rounding(left, whole)
    agree_to_rounding(right, whole)
    assert all(torch.equal(before[key], t) for key, t in everything(c).items())
    assert empty.count == 0


def test_merging_with_itself_doubles_the_data():
    net, x = mlp([3, 4, 3], nn.Sigmoid, scale=3.0), inputs(5, 3)
    joint = accumulate(differentiate(net, x), Categorical())
    joint.merge(joint)
    agree_to_rounding(joint, accumulate(differentiate(net, x.repeat(2, 1)), Categorical()))


def test_a_far_mean_does_not_drown_the_variance_between_batches():
    """Chan's formula, not E I² − (E I)² of the totals: relative spread 1e-7 of I = x²."""
    net = nn.Linear(1, 1, bias=False).double()
    x = 1 + 1e-7 * torch.arange(4, dtype=torch.float64)[:, None]
    joint = Joint(Gaussian())
    for one in x:
        joint.update(differentiate(net, one[None]))
    expected = (x**2).var(correction=0)
    assert joint.input_variance()["weight"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_equal_inputs_have_no_variance_and_never_a_negative_one():
    for seed in range(5):
        net, x = mlp([3, 6, 3], nn.Sigmoid, seed=seed), inputs(1, 3, seed=seed).repeat(7, 1)
        joint = accumulate(differentiate(net, x), Categorical())
        variance = flat(joint.input_variance())
        assert (variance >= 0).all()
        assert variance.max() <= 1e-14 * flat(joint.fisher_information()).square().max()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_dense_derivatives_give_the_same(family):
    net, x = mlp([3, 4, 3], nn.Sigmoid, scale=2.0), inputs(6, 3)
    dense = accumulate(differentiate(net, x, engine="backpack"), family)
    factored = accumulate(differentiate(net, x), family)
    for key, tensor in everything(dense).items():
        close(tensor, everything(factored)[key], 1e-9)
    needed = (joint.num_inputs_needed(0.1, 0.9) for joint in (dense, factored))
    assert len({tuple(n.items()) for n in needed}) == 1


def test_what_is_read_is_a_copy():
    net, x = small("categorical")
    joint = accumulate(differentiate(net, x), Categorical())
    before = everything(joint)
    for quantity in (joint.fisher_information(), joint.input_variance(), joint.label_variance(1)):
        for tensor in quantity.values():
            tensor.zero_()
    assert all(torch.equal(before[key], tensor) for key, tensor in everything(joint).items())


def test_a_float32_network_is_accumulated_in_float64():
    net, x = small("categorical")
    double = accumulate(differentiate(net, x), Categorical())
    single = accumulate(differentiate(net.float(), x.float()), Categorical())
    for key, tensor in everything(single).items():
        assert tensor.dtype == torch.float64
        close(tensor, everything(double)[key], 1e-4)


# Bounds. -----------------------------------------------------------------------------------------


def by_loops(derivs, family, form):
    """E_x of a form of (J, S, 𝓘's and M's eigenvalues), parameter by parameter."""
    spectrum = fimlib.spectrum(family, derivs.outputs, method="certified")
    derivs, result = family.natural_derivatives(derivs), {}
    for name in (name for block in derivs.blocks for name in block.inputs):
        J, S = derivs.jacobian(name), derivs.second(name)
        total = torch.zeros_like(J[0, 0])
        for b in range(len(J)):
            lam = [eigenvalue[b] for eigenvalue in spectrum]
            total += form((J[b] ** 2).sum(0).sqrt(), (S[b] ** 2).sum(0).sqrt(), *lam) / len(J)
        result[name] = total
    return flat(result)


NETS = {
    "sigmoid": lambda: mlp([3, 5, 4, 4], nn.Sigmoid, scale=2.0),
    "saturated": lambda: mlp([3, 5, 4], nn.Tanh, scale=8.0),
    "one wide": lambda: mlp([3, 1, 2], nn.Softplus),
    "linear": lambda: mlp([3, 4], nn.Tanh),
}


@pytest.mark.parametrize("family", ALL_FAMILIES.values(), ids=ALL_FAMILIES)
@pytest.mark.parametrize("net", [make() for make in NETS.values()], ids=NETS)
def test_lemma_4_8(net, family):
    derivs = differentiate(net, inputs(9, 3))
    joint = accumulate(derivs, family)
    lower, upper = joint.lemma_4_8()
    tight = joint.lemma_4_8(tight=True)
    variance = flat(joint.input_variance())
    second = by_loops(derivs, family, lambda J, S, lo, hi, *M: hi**2 * J**4)  # noqa: ARG005
    first = by_loops(derivs, family, lambda J, S, lo, hi, *M: lo * J**2)  # noqa: ARG005
    rounding = 1e-12 * second.max()
    assert not flat(lower).any()
    assert not flat(tight.lower).any()
    assert lower.keys() == upper.keys() == joint.fisher_information().keys()
    close(flat(upper), second)
    close(flat(tight.upper), second - first**2)
    assert (variance <= flat(tight.upper) + rounding).all()
    assert (flat(tight.upper) <= flat(upper) + rounding).all()


@pytest.mark.parametrize("probabilities", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_lemma_4_8_where_one_input_is_adversarial_and_another_is_not(probabilities):
    classes = len(probabilities)
    net = nn.Linear(2, classes, bias=False).double()
    net.weight.data[:, 0] = torch.tensor(probabilities, dtype=torch.float64).log()
    net.weight.data[:, 1] = 0  # uniform
    x = torch.tensor([[1.0, 0.0], [1e-3, 1.0], [0.0, -2.0]], dtype=torch.float64)
    joint = accumulate(differentiate(net, x), Categorical())
    variance, upper = joint.input_variance()["weight"], joint.lemma_4_8().upper["weight"]
    assert (variance <= upper * (1 + 1e-12)).all()
    assert variance.max() > 0


def test_separating_the_expectation_of_lemma_4_8_is_false():
    """One input in ten has both a large λ_max(𝓘) and a large ‖J‖: the others are certain, J = 0."""
    net = nn.Linear(2, 2, bias=False).double()
    net.weight.data = torch.tensor([[0.0, 20.0], [0.0, -20.0]], dtype=torch.float64)
    x = torch.tensor([[3.0, 0.0]] + [[0.0, 1.0]] * 9, dtype=torch.float64)
    derivs = differentiate(net, x)
    joint = accumulate(derivs, Categorical())
    variance = joint.input_variance()["weight"][0, 0].item()
    together = joint.lemma_4_8().upper["weight"][0, 0].item()
    lam = torch.linalg.eigvalsh(Categorical().covariance(derivs.outputs))[:, -1]
    apart = ((lam**2).mean() * (x[:, 0] ** 4).mean()).item()
    assert variance == pytest.approx(81 / 16 * 0.09)  # I is 9/4 with probability 1/10, else 0
    assert together == pytest.approx(81 / 4 / 10)
    assert apart == pytest.approx(81 / 4 / 100)
    assert apart < variance < together


def test_tight_lemma_4_8_is_an_equality_for_one_gaussian_output():
    joint = accumulate(differentiate(mlp([3, 4, 2], nn.Tanh), inputs(6, 3)), Gaussian())
    close(flat(joint.lemma_4_8(tight=True).upper), flat(joint.input_variance()))


@pytest.mark.parametrize("family", ALL_FAMILIES.values(), ids=ALL_FAMILIES)
@pytest.mark.parametrize("net", [make() for make in NETS.values()], ids=NETS)
@pytest.mark.parametrize(("num_inputs", "num_labels"), [(1, 1), (4, 3)])
def test_variance_bounds(net, family, num_inputs, num_labels):
    derivs = differentiate(net, inputs(7, 3))
    joint = accumulate(derivs, family)
    forms = {
        "lower1": lambda J, S, lo, hi, m, M: m * J**4 / num_labels,  # noqa: ARG005
        "upper1": lambda J, S, lo, hi, m, M: hi**2 * J**4 + M * J**4 / num_labels,  # noqa: ARG005
        "lower2": lambda J, S, lo, hi, m, M: lo * S**2 / num_labels,  # noqa: ARG005
        "upper2": lambda J, S, lo, hi, m, M: hi**2 * J**4 + hi * S**2 / num_labels,  # noqa: ARG005
    }
    expected = {key: by_loops(derivs, family, form) / num_inputs for key, form in forms.items()}
    for j, variance in (
        (1, joint.variance_i1(num_inputs, num_labels)),
        (2, joint.variance_i2(num_inputs, num_labels)),
    ):
        interval = joint.variance_bounds(num_inputs, num_labels, estimator=j)
        close(flat(interval.lower), expected[f"lower{j}"])
        close(flat(interval.upper), expected[f"upper{j}"])
        rounding = 1e-12 * expected[f"upper{j}"].max()
        assert (flat(interval.lower) <= flat(variance) + rounding).all()
        assert (flat(variance) <= flat(interval.upper) + rounding).all()


def test_gaussian_bounds_of_section_5_1():
    """N pairs: (3/N) E‖J‖⁴ and (1/N) (E‖J‖⁴ + E‖S‖²)."""
    derivs = differentiate(mlp([3, 4, 2], nn.Tanh), inputs(6, 3))
    joint = accumulate(derivs, Gaussian())
    upper1, upper2 = (joint.variance_bounds(5, estimator=j).upper for j in (1, 2))
    J4 = by_loops(derivs, Gaussian(), lambda J, *_: J**4)
    S2 = by_loops(derivs, Gaussian(), lambda J, S, *_: S**2)  # noqa: ARG005
    close(flat(upper1), 3 / 5 * J4)
    close(flat(upper2), (J4 + S2) / 5)


def test_the_method_of_the_bounds():
    """ "certified" is never below the others; None, the default, keeps no bounds."""
    derivs = differentiate(mlp([3, 4, 5], nn.Tanh, scale=2.0), inputs(4, 3))
    upper = {
        bounds: flat(accumulate(derivs, Categorical(), bounds=bounds).variance_bounds(1).upper)
        for bounds in ("certified", "multistart")
    }
    assert (upper["multistart"] <= upper["certified"] * (1 + 1e-12)).all()
    assert (upper["multistart"] < upper["certified"] * (1 - 1e-4)).any()
    without = accumulate(derivs, Categorical(), bounds=Joint(Categorical()).bounds)
    close(flat(without.variance_i1(2)), flat(accumulate(derivs, Categorical()).variance_i1(2)))
    for bound in (without.lemma_4_8, lambda: without.variance_bounds(1)):
        with pytest.raises(ValueError, match="bounds=None there are no bounds"):
            bound()
    with pytest.raises(ValueError, match="unknown method 'x'"):
        accumulate(derivs, Categorical(), bounds="x")


# Sample complexity. ------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [1, 2])
def test_num_inputs_needed_is_the_smallest_that_chebyshev_grants(estimator):
    net = mlp([3, 4, 3], nn.Sigmoid, scale=2.0)
    joint = accumulate(differentiate(net, inputs(9, 3)), Categorical())
    variance = joint.variance_i1 if estimator == 1 else joint.variance_i2
    fisher = joint.fisher_information()
    needed = joint.num_inputs_needed(0.3, 0.75, num_labels=2, estimator=estimator)
    assert list(needed) == ["0", "2"]
    for layer, n in needed.items():
        names = [f"{layer}.weight", f"{layer}.bias"]
        limit = 0.3**2 * sum(fisher[name].square().sum() for name in names)

        def exceedance(n, names=names, limit=limit):
            return sum(variance(n, 2)[name].sum() for name in names) / limit

        assert n == int(n) > 1
        assert exceedance(int(n)) <= 0.25 * (1 + 1e-9) < exceedance(int(n) - 1)


def test_num_inputs_needed_bounds_the_exceedance_probability_by_enumeration(tables):
    net, x, table = tables["categorical"]
    joint = accumulate(differentiate(net, x), Categorical())
    size = table[0][1].shape[1] // 2
    hidden = slice(0, 6)  # 0.weight and 0.bias
    for relative_error in (1.5, 2.0, 3.0):
        n = joint.num_inputs_needed(relative_error, 0.5)["0"]
        assert n <= 3
        fisher = flat(joint.fisher_information())[hidden]
        exceeding = 0.0
        for chosen in product(table, repeat=int(n)):
            for labels in product(range(3), repeat=int(n)):
                pairs = list(zip(chosen, labels, strict=True))
                estimate = sum(rows[y, :size][hidden] for (_, rows), y in pairs) / n
                weight = torch.stack([p[y] for (p, _), y in pairs]).prod().item()
                far = (estimate - fisher).norm() >= relative_error * fisher.norm()
                exceeding += far.item() * weight / len(table) ** n
        assert 0.05 < exceeding <= 0.5


def test_num_inputs_needed_by_hand():
    """h = wx at x = 1, 3: E I = 5, Var_x I = 16, E V₁ = 82; V₂ = 0. Defaults: one label, Î₁."""
    net = nn.Linear(1, 1, bias=False).double()
    joint = accumulate(differentiate(net, torch.tensor([[1.0], [3.0]]).double()), Gaussian())
    assert joint.num_inputs_needed(0.1, 0.9) == {"": 3920}  # 98 / (0.01 · 0.1 · 25)
    assert joint.num_inputs_needed(0.2, 0.9) == {"": 980}
    assert joint.num_inputs_needed(0.1, 0.9, num_labels=2) == {"": 2280}  # 16 + 41 = 57
    assert joint.num_inputs_needed(0.1, 0.9, estimator=2) == {"": 640}
    assert joint.num_inputs_needed(100.0, 0.5) == {"": 1}
    net.weight.data.zero_()
    joint = accumulate(differentiate(net, torch.zeros(1, 1).double()), Gaussian())
    assert joint.num_inputs_needed(0.1, 0.9) == {"": 1}  # nothing to estimate


# Errors. -----------------------------------------------------------------------------------------


def test_an_empty_accumulator_says_so():
    joint = Joint(Categorical())
    assert joint.count == 0
    joint.merge(Joint(Categorical()))
    for read in (
        joint.fisher_information,
        joint.input_variance,
        lambda: joint.label_variance(1),
        joint.label_covariance,
        lambda: joint.variance_i1(1),
        lambda: joint.variance_i2(1),
        lambda: joint.covariance_i1_i2(1),
        joint.lemma_4_8,
        lambda: joint.variance_bounds(1),
        lambda: joint.num_inputs_needed(0.1, 0.9),
    ):
        with pytest.raises(ValueError, match=r"no inputs seen yet: call update\(derivs\) first"):
            read()


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "2"])
def test_numbers_of_inputs_and_labels_are_positive_integers(bad):
    net, x = small("categorical")
    derivs = differentiate(net, x)
    joint = accumulate(derivs, Categorical())

    def covariance(num_inputs, num_labels=1):
        return joint_covariance(
            derivs,
            Categorical(),
            parameters=["2.bias"],
            num_inputs=num_inputs,
            num_labels=num_labels,
        )

    for f in (
        joint.variance_i1,
        joint.variance_i2,
        joint.covariance_i1_i2,
        joint.variance_bounds,
        covariance,
    ):
        with pytest.raises(ValueError, match=r"num_inputs \(n_x\) must be an integer ≥ 1, got"):
            f(bad)
        with pytest.raises(ValueError, match=r"num_labels \(n_y\) must be an integer ≥ 1, got"):
            f(1, bad)
    with pytest.raises(ValueError, match=r"num_labels \(n_y\)"):
        joint.num_inputs_needed(0.1, 0.9, num_labels=bad)


def test_other_bad_arguments():
    net, x = small("categorical")
    derivs = differentiate(net, x)
    joint = accumulate(derivs, Categorical())
    for bad in (0, 3):
        for f in (joint.label_variance, lambda j: joint.num_inputs_needed(0.1, 0.9, estimator=j)):
            with pytest.raises(ValueError, match=rf"must be 1 \(Î₁\) or 2 \(Î₂\), got {bad}"):
                f(bad)
    with pytest.raises(ValueError, match="relative_error"):
        joint.num_inputs_needed(0.0, 0.9)
    with pytest.raises(ValueError, match="confidence"):
        joint.num_inputs_needed(0.1, 1.0)
    for names in ("2.bias", [], ["2.bias", "2.bias"]):
        with pytest.raises(ValueError, match="a list of different names, got"):
            joint_covariance(derivs, Categorical(), parameters=names, num_inputs=1)
    with pytest.raises(KeyError, match=r"no parameter 'w'"):
        joint_covariance(derivs, Categorical(), parameters=["w"], num_inputs=1)


def test_accumulators_that_do_not_fit_each_other():
    net, x = small("categorical")
    derivs, other_net = differentiate(net, x), mlp([2, 4, 3], nn.Tanh)
    joint = accumulate(derivs, Categorical())
    before = everything(joint)
    message = "is for Categorical outputs, the other side for Gaussian outputs or the same with"
    for other in (Joint(Gaussian()), accumulate(derivs, Gaussian())):
        with pytest.raises(ValueError, match=message):
            joint.merge(other)
    known = [Gaussian(torch.eye(2) * scale) for scale in (1, 2, 1)]
    for other in (known[1], Gaussian()):
        with pytest.raises(ValueError, match="Gaussian outputs or the same with other settings"):
            Joint(known[0]).merge(Joint(other))
    Joint(known[0]).merge(Joint(known[2]))
    with pytest.raises(ValueError, match="other parameters than before: .*4.* instead of .*2.*"):
        joint.update(differentiate(other_net, x))
    with pytest.raises(ValueError, match=r"different settings: .*'certified'.*and .*None"):
        joint.merge(accumulate(derivs, Categorical(), bounds=None))
    for settings in ({"dtype": torch.float32}, {"quantities": ["V1"]}, {"bounds": "multistart"}):
        with pytest.raises(ValueError, match="different settings"):
            Joint(Categorical()).merge(Joint(Categorical(), **settings))
    labels = Categorical().sample(derivs.outputs, 2, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="on one side only: keep one Joint"):
        joint.update(derivs, labels)
    assert joint.count == 3
    assert all(torch.equal(before[key], tensor) for key, tensor in everything(joint).items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("which", ["J", "S"])
def test_damaged_derivatives_are_refused_and_leave_no_trace(value, which):
    net, x = small("categorical")
    joint = accumulate(differentiate(net, x), Categorical())
    before = everything(joint)
    damaged = differentiate(net, x)
    getattr(damaged.blocks[0], which)[1, 0, 0] = value
    with pytest.raises(ValueError, match=r"parameter '0.weight' are NaN, infinite or too large"):
        joint.update(damaged)
    assert joint.count == 3
    assert all(torch.equal(before[key], tensor) for key, tensor in everything(joint).items())


def test_every_parameter_and_layer_is_reported_once_after_many_batches():
    net, x = mlp([2, 3, 3, 3], nn.Tanh), inputs(4, 2)
    joint = Joint(Categorical())
    for one in x:
        joint.update(differentiate(net, one[None]))
    shapes = {name: p.shape for name, p in net.named_parameters()}
    assert {name: t.shape for name, t in joint.variance_i2(2).items()} == shapes
    assert list(joint.num_inputs_needed(0.1, 0.9)) == ["0", "2", "4"]


def test_families_without_settings_are_told_apart():
    bits, classes = fimlib.Joint(fimlib.Bernoulli()), fimlib.Joint(fimlib.Categorical())
    with pytest.raises(ValueError, match="Bernoulli.*Categorical"):
        bits.merge(classes)


# What is accumulated, and in which precision. -----------------------------------------------------


def test_first_order_accumulates_what_it_can():
    net, x = mlp([3, 5, 4], nn.Sigmoid, scale=2.0), inputs(6, 3)
    first, both = (Joint(Categorical(), bounds="certified") for _ in range(2))
    first.update(differentiate(net, x, order=1))
    both.update(differentiate(net, x))
    for quantity in ("fisher_information", "input_variance"):
        for name, value in getattr(both, quantity)().items():
            assert torch.equal(getattr(first, quantity)()[name], value)
    assert torch.equal(first.variance_i1(5)["0.bias"], both.variance_i1(5)["0.bias"])
    assert torch.equal(first.lemma_4_8().upper["0.bias"], both.lemma_4_8().upper["0.bias"])
    with pytest.raises(ValueError, match="with first derivatives alone there is no V₂"):
        first.variance_i2(5)
    with pytest.raises(ValueError, match="on one side only"):
        first.merge(both)


@pytest.mark.parametrize(
    ("quantities", "numbers"),
    [(["I"], 1), (["I", "Var_x I"], 2), (["V1"], 2), (None, 5)],
)
def test_only_what_is_asked_for_is_kept(quantities, numbers):
    net, x = mlp([3, 5, 4], nn.Sigmoid), inputs(6, 3)
    joint = Joint(Categorical(), quantities=quantities)
    joint.update(differentiate(net, x))
    state = joint.state_dict()
    kept = [*(t for m in state["means"].values() for t in m.values()), *state["scatter"].values()]
    assert sum(t.numel() for t in kept) == numbers * sum(p.numel() for p in net.parameters())
    assert all(t.dtype == torch.float64 for t in kept)
    if quantities == ["I"]:
        with pytest.raises(ValueError, match='"Var_x I" is not among the quantities'):
            joint.input_variance()
        with pytest.raises(ValueError, match="quantities= leaves out"):
            joint.variance_i1(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantities": ["V3"]}, "some of .*'Var_x I'.*got \\['V3'\\]"),
        ({"quantities": "V1"}, "must be a list"),
        ({"dtype": torch.float16}, "float64 or torch.float32"),
    ],
)
def test_bad_choices_of_what_to_keep_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Joint(Categorical(), **arguments)


def test_float32_contractions_are_close_and_kept_in_float64():
    net, x = mlp([3, 5, 4, 4], nn.Sigmoid, scale=2.0), inputs(50, 3)
    exact = Joint(Categorical(), bounds="certified")
    single = Joint(Categorical(), bounds="certified", dtype=torch.float32)
    exact.update(differentiate(net, x))
    single.update(differentiate(net.float(), x.float()))
    for key, means in exact.state_dict()["means"].items():
        for name, value in means.items():
            found = single.state_dict()["means"][key][name]
            assert found.dtype == torch.float64
            scale = value.abs().max()
            assert (found - value).abs().max() <= 1e-5 * scale, (key, name)
    for name, value in exact.input_variance().items():
        mean_square = exact.fisher_information()[name].square() + value
        gap = (single.input_variance()[name] - value).abs()
        assert (gap <= 1e-5 * mean_square).all()


def test_infinite_derivatives_are_named_and_nothing_is_taken_in():
    net, x = mlp([3, 4, 2], nn.Tanh), inputs(2, 3)
    joint = Joint(Categorical())
    joint.update(differentiate(net, x))
    derivs = differentiate(net, x)
    broken = fimlib.Block(
        "0", derivs.blocks[0].J * 1e200, derivs.blocks[0].S, derivs.blocks[0].inputs
    )
    before = joint.fisher_information()
    with pytest.raises(ValueError, match=r"parameter '0.weight' are NaN, infinite or too large"):
        joint.update(fimlib.Derivatives(derivs.outputs, (broken, derivs.blocks[1])))
    assert joint.count == 2
    assert all(torch.equal(joint.fisher_information()[n], t) for n, t in before.items())
    with pytest.raises(ValueError, match="outputs hold NaN"):
        joint.update(fimlib.Derivatives(derivs.outputs * torch.nan, derivs.blocks))


@pytest.mark.parametrize("gap", [0.0, 20.0, 60.0])
@pytest.mark.parametrize("shrink", [1.0, 1e-6])
def test_float32_reaches_far_or_says_that_it_does_not(gap, shrink):
    """Confident softmaxes and small derivatives, whose fourth powers float32 cannot hold."""
    net, x = mlp([4, 5, 4, 3], nn.Tanh), inputs(20, 4)
    with torch.no_grad():
        net[4].bias[0] += gap
        net[4].weight *= shrink
    net, x = net.float(), (x * shrink).float()
    exact = Joint(Categorical())
    exact.update(differentiate(net, x))
    single = Joint(Categorical(), dtype=torch.float32)
    try:
        single.update(differentiate(net, x))
    except ValueError as error:
        assert "float32 is too narrow" in str(error)  # noqa: PT017
        assert (
            min(float(t.max()) for t in exact.state_dict()["means"]["V2"].values() if t.any())
            < 1e-25
        )
        return
    spread = exact.input_variance()
    for name, value in spread.items():
        mean_square = value + exact.state_dict()["means"]["I"][name].square()
        gap = (single.input_variance()[name] - value).abs()
        assert gap.max() <= 1e-5 * mean_square.max(), name
    for key in ("I", "V1", "V2"):
        for name, value in exact.state_dict()["means"][key].items():
            assert (
                single.state_dict()["means"][key][name] - value
            ).abs().max() <= 1e-4 * value.abs().max(), name


def test_float32_that_is_too_narrow_is_refused():
    net, x = mlp([4, 5, 4, 3], nn.Tanh), inputs(20, 4)
    with torch.no_grad():
        net[4].bias[0] += 95.0
    joint = Joint(Categorical(), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"layer '\d': float32 is too narrow.*torch.float64"):
        joint.update(differentiate(net.float(), x.float()))
    assert joint.count == 0
    dead = mlp([4, 5, 3], nn.ReLU)
    with torch.no_grad():
        dead[0].bias.fill_(-100.0)  # no unit is alive, and I is 0 as it should be
    joint.update(differentiate(dead.float(), x.float()))
    assert not joint.fisher_information()["0.weight"].any()


def test_a_family_with_a_link_of_its_own_is_streamed():
    class Capped(Categorical):
        def link(self, h, at):  # noqa: ARG002
            return 2 * torch.tanh(h / 2)

        def mean(self, h):
            return torch.softmax(2 * torch.tanh(h.double() / 2), dim=1)

    net, x = mlp([3, 4, 3], nn.Sigmoid, scale=2.0), inputs(5, 3)
    capped = [Joint(Capped()), fimlib.accumulate(net, x, Capped())]
    capped[0].update(differentiate(net, x))
    for name, value in capped[0].fisher_information().items():
        assert torch.allclose(capped[1].fisher_information()[name], value, rtol=1e-12)


@pytest.mark.parametrize(
    "other",
    [
        Joint(Categorical()),
        Joint(Gaussian(2 * torch.eye(3))),
        Joint(Gaussian(), quantities=["I"]),
        Joint(Gaussian(), bounds="certified"),
        Joint(Gaussian(), dtype=torch.float32),
    ],
    ids=["family", "covariance", "quantities", "bounds", "dtype"],
)
def test_a_state_of_other_settings_is_refused(other):
    joint = Joint(Gaussian())
    joint.update(differentiate(mlp([3, 4, 3], nn.Sigmoid), inputs(5, 3)))
    half = {"settings": other.state_dict()["settings"]}
    for state in (joint.state_dict(), {}, half):
        with pytest.raises(ValueError, match="not the state of a Joint with the same settings"):
            other.load_state_dict(state)
    assert other.count == 0


def test_a_state_goes_into_another_accumulator_and_on_from_there():
    net, x = mlp([3, 4, 3], nn.Sigmoid), inputs(5, 3)
    whole, part = (Joint(Categorical(), bounds="certified") for _ in range(2))
    assert part.device == torch.device("cpu")
    for derivs in (differentiate(net, x[:2]), differentiate(net, x[2:])):
        whole.update(derivs)
    part.update(differentiate(net, x[:2]))
    buffer = io.BytesIO()
    torch.save(part.state_dict(), buffer)
    buffer.seek(0)
    resumed = Joint(Categorical(), bounds="certified")
    resumed.load_state_dict(torch.load(buffer))
    resumed.update(differentiate(net, x[2:]))
    for key, tensor in everything(resumed).items():
        assert torch.equal(tensor, everything(whole)[key]), key
    elsewhere = part.to("meta")
    assert elsewhere.device == torch.device("meta")
    assert part.device == torch.device("cpu")
    assert (
        elsewhere.layers
        == part.layers
        == {"0": ["0.weight", "0.bias"], "2": ["2.weight", "2.bias"]}
    )


def test_settings_of_a_family_are_compared_by_value():
    class Weighted(Categorical):
        def __init__(self, *values):
            self.values = values

    for same in (1.5, "a", (1, 2), [1], np.ones(3), torch.ones(2), None, torch.float32):
        twin = copy.deepcopy(same) if not isinstance(same, float) else float("1.5")
        Joint(Weighted(same)).merge(Joint(Weighted(twin)))
    for one, other in (
        (1.5, 2.5), ("a", "b"), (np.ones(3), np.zeros(3)), (np.ones(3), np.ones(2)),
        (torch.ones(2), torch.zeros(2)), (torch.ones(2), torch.ones(3)), (None, 0), (1, [1, 2]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="the same with other settings"):
            Joint(Weighted(one)).merge(Joint(Weighted(other)))


@pytest.mark.parametrize(("size", "is_lost"), [(1e-6, True), (1.0, False)])
def test_float32_is_too_narrow_for_v2_unless_that_is_rounding(size, is_lost):
    """V₂ is about 1e-36, below float32's reach: lost beside I² = 1e-24, nothing beside 1."""
    generator = torch.Generator().manual_seed(0)
    J, S = (torch.randn(2, 3, 4, generator=generator) for _ in "JS")
    block = fimlib.Block("layer", size * J, 1e-18 * S, {"p": None})
    joint = Joint(Categorical(), dtype=torch.float32)
    derivs = fimlib.Derivatives(inputs(2, 3).float(), (block,))
    if is_lost:
        with pytest.raises(ValueError, match="layer 'layer': float32 is too narrow"):
            joint.update(derivs)
    else:
        joint.update(derivs)
        assert joint.count == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_random_projections_of_random_inputs(dtype):
    """Theorem 4.7 with the variance of one projection for that of one label."""
    net, x, family = mlp([3, 5, 3], nn.Tanh), inputs(6, 3), Categorical()
    kinds = {"signs": {}, "importance": {}, "importance2": {"estimator": 2}}
    joint = fimlib.accumulate(net, x, family, quantities=["Var_x I", *kinds], dtype=dtype)
    derivs = differentiate(net, x)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    for kind, of in kinds.items():
        variance = getattr(projections, f"variance_{kind.rstrip('2')}")
        exact = variance(derivs, family, **of).mean_over_inputs()
        found = joint.variance(kind, num_inputs=5, num_labels=3)
        for n, spread in joint.input_variance().items():
            torch.testing.assert_close(
                found[n], (spread + exact[n] / 3) / 5, rtol=rtol, atol=1e-9 * float(spread.max())
            )
        assert all(n >= 1 for n in joint.num_inputs_needed(0.1, 0.9, 2, kind).values())
    assert "signs" not in Joint(family).quantities
    with pytest.raises(ValueError, match="was not accumulated"):
        joint.variance(1, num_inputs=5)
    with pytest.raises(ValueError, match="needs classes"):
        fimlib.accumulate(net, x, Gaussian(), quantities=["importance"])


@pytest.mark.parametrize("num_classes", [3, 70])
@pytest.mark.parametrize("gap", [0.0, 10.0, 30.0, 60.0, 80.0])
def test_i_alone_of_a_confident_float32_network_has_its_digits(num_classes, gap):
    """1 - sigma_max = exp(-gap): subtracted in float32, nothing would be left from 17 on."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, num_classes))
    with torch.no_grad():
        net[2].bias[1] += gap
    x = torch.randn(20, 4)
    single = fimlib.accumulate(net, x, Categorical(), quantities=["I"]).fisher_information()
    exact = fimlib.accumulate(net.double(), x.double(), Categorical()).fisher_information()
    for name, value in exact.items():
        assert single[name].dtype == torch.float64
        slack = 3e-5 * value + 3e-6 * value.max()
        assert bool(((single[name] - value).abs() <= slack).all())


def test_variances_are_contracted_in_float64_and_i_alone_in_the_networks_own_type():
    net, x = nn.Linear(3, 2), torch.randn(1, 3)
    same = x.expand(50, -1)  # Var_x I = 0
    full = fimlib.accumulate(net, same, Categorical())
    assert float(full.input_variance()["weight"].max()) < 1e-14
    alone = fimlib.accumulate(net, x, Categorical(), quantities=["I"]).fisher_information()
    off = (alone["weight"] - full.fisher_information()["weight"]).abs()
    assert 0 < float((off / full.fisher_information()["weight"]).max()) < 1e-6


@pytest.mark.parametrize("scale", [1e-21, 1e-12, 1e12, 1e20])
@pytest.mark.parametrize("weight", [1e20, 1.0, 1e-10])
def test_i_alone_of_a_float32_network_is_right_at_inputs_of_any_size(scale, weight):
    """J and z are float32 numbers; their squares, and the products of these, need not be."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 3)), torch.randn(5, 3)
    with torch.no_grad():
        net[0].weight /= scale
        net[2].weight *= weight
    family = Gaussian()
    single = fimlib.accumulate(net, x * scale, family, quantities=["I"]).fisher_information()
    exact = fimlib.accumulate(net.double(), (x * scale).double(), family).fisher_information()
    for name, value in exact.items():
        assert float(((single[name] - value) / value).abs().max()) < 1e-5


def tanh_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(64, 4)


def far_input(size):
    """Its units are saturated, so it has no part in the first layer's I."""
    net, x = tanh_network()
    x[5, 2] = size
    return net, x


def features_of_two_sizes(size):
    net, x = tanh_network()
    with torch.no_grad():
        net[0].weight[:, 0] /= size
    return net, x * torch.tensor([size, 1 / size, 1.0, 1.0])


def unit_without_influence(size):
    net, x = tanh_network()
    with torch.no_grad():
        net[0].weight /= size
        net[2].weight[:, 0] *= size**-2
    return net, x * size


@pytest.mark.parametrize("size", [1e3, 1e5, 1e7, 1e11, 1e18])
@pytest.mark.parametrize("case", [far_input, features_of_two_sizes, unit_without_influence])
@pytest.mark.parametrize("kind", ["I alone", "float32 asked for"])
def test_what_float32_loses_is_found(case, size, kind):
    """Every entry is right, or an error says that float32 is too narrow."""
    net, x = case(size)
    options = {"I alone": {"quantities": ["I"]}, "float32 asked for": {"dtype": torch.float32}}
    try:
        single = fimlib.accumulate(net, x, Categorical(), **options[kind])
    except ValueError as error:
        if kind == "I alone" or size == 1e3 or "float32 is too narrow" not in str(error):
            raise
        return
    exact = fimlib.accumulate(net.double(), x.double(), Categorical())
    keys = ["I"] if kind == "I alone" else ["I", "V1", "V2"]
    for key in keys:
        for name, value in exact._mean(key).items():
            lost = 1e-29 if key == "I" else 1e-24 * float(value.max())
            off = (single._mean(key)[name] - value).abs()
            assert bool((off <= 2e-5 * value + lost).all()), (key, name)
