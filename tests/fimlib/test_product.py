"""Several labels for one input: against sums over all of them, drawn and observed; refusals."""

import itertools

import pytest
import reference
import torch
from strategies import inputs
from torch import nn

from fimlib import Joint, data_fisher, differentiate, kl_gradient
from fimlib.derivatives import Block, Derivatives
from fimlib.families import (
    Bernoulli,
    Categorical,
    Gaussian,
    GaussianHead,
    Heads,
    Poisson,
    Positions,
)
from fimlib.spectra import lambda_max

H = 0.7 * inputs(2, 6, seed=8)


def classes(h):
    """All one-hot labels at logits h [C], their probabilities and t(y)."""
    eye = torch.eye(len(h), dtype=torch.float64)
    return eye, torch.softmax(h, 0), eye


# Family, and for each of its labels: how many outputs it has, and all its values.
PRODUCTS = {
    "two words": (Positions(Categorical(), 3), [(3, classes)] * 2),
    "three pairs of answers": (Positions(Bernoulli(), 2), [(2, reference.bernoulli)] * 3),
    "a class and two answers": (
        Heads({"class": (Categorical(), 4), "answers": (Bernoulli(), 2)}),
        [(4, classes), (2, reference.bernoulli)],
    ),
    "two numbers and a class": (
        Heads({"numbers": (Gaussian(), 2), "class": (Categorical(), 4)}),
        [(2, reference.gaussian(torch.eye(2).double())), (4, classes)],
    ),
}
each_product = pytest.mark.parametrize("name", PRODUCTS)


def all_labels(h, parts):
    """Probabilities and t(y) of all combinations of the labels at outputs h [T]."""
    found = [
        labels(one) for one, (_, labels) in zip(h.split([n for n, _ in parts]), parts, strict=True)
    ]
    rows = list(itertools.product(*(range(len(p)) for _, p, _ in found)))
    p = [torch.stack([of[1][k] for of, k in zip(found, row, strict=True)]).prod() for row in rows]
    t = [torch.cat([of[2][k] for of, k in zip(found, row, strict=True)]) for row in rows]
    return torch.stack(p), torch.stack(t)


@each_product
def test_all_quantities_are_those_of_all_labels_together(name):
    family, parts = PRODUCTS[name]
    J, S = (inputs(2, 6 * 5, seed=s).view(2, 6, 5) for s in (2, 3))
    for b, h in enumerate(H):
        p, t = all_labels(h, parts)
        delta = t - p @ t
        first, second = delta @ J[b], delta @ S[b]
        I = p @ first.square()
        expected = {
            "mean": p @ t,
            "covariance": torch.einsum("a,ai,aj->ij", p, delta, delta),
            "information": I,
            "variance1": p @ (first.square() - I).square(),
            "variance2": p @ second.square(),
            "covariance12": -p @ (first.square() * second),
            "fourth_moment": torch.einsum("a,ai,aj,ak,al->ijkl", p, *[delta] * 4),
        }
        if name != "two numbers and a class":
            expected["residual_bound"] = delta.square().sum(1).max()
        arrays = {"information": (J,), "variance1": (J,), "variance2": (S,), "covariance12": (J, S)}
        for quantity, value in expected.items():
            ours = getattr(family, quantity)(H, *arrays.get(quantity, ()))[b]
            assert torch.allclose(ours, value, rtol=1e-9, atol=1e-10), quantity


def test_the_spectrum_of_a_product():
    family = PRODUCTS["two words"][0]
    upper = lambda_max(family, H, method="certified")
    assert (lambda_max(family, H, method="multistart") <= upper * (1 + 1e-9)).all()
    assert not family.outer_covariance_min(H).any()


@each_product
@pytest.mark.parametrize("kind", ["signs", "residual", "labels"])
def test_random_vectors_have_the_covariance(name, kind):
    family, _ = PRODUCTS[name]
    h, generator = H[:1].expand(40_000, -1), torch.Generator().manual_seed(0)
    if kind == "labels":
        w = family.sample(h[:1], 40_000, generator).values[0] - family.mean(h[:1])
    else:
        w = getattr(family, f"draw_{kind}")(h, generator)
    cov = family.covariance(H[:1])[0]
    scale = cov.diagonal().max()
    assert (w.mean(0).abs() < 5 * (scale / len(w)).sqrt()).all()
    assert ((w.T @ w / len(w) - cov).abs() < 8 * scale / len(w) ** 0.5).all()


def test_a_head_may_have_outputs_that_are_not_natural_parameters():
    heads = Heads({"class": (Categorical(), 2), "number": (GaussianHead(), 4)})
    J, S = (inputs(2, 6 * 5, seed=s).view(2, 6, 5) for s in (2, 3))
    block = Block("", J, S, {"w": None})
    (found,) = heads.natural_derivatives(Derivatives(H, (block,))).blocks
    own = Derivatives(H[:, 2:], (Block("", J[:, 2:], S[:, 2:], {"w": None}),))
    (expected,) = GaussianHead().natural_derivatives(own).blocks
    assert torch.equal(found.J[:, :2], J[:, :2])
    assert torch.allclose(found.J[:, 2:], expected.J)
    assert torch.allclose(found.S[:, 2:], expected.S)
    I = GaussianHead().information(H[:, 2:], expected.J)
    I = I + Categorical().information(H[:, :2], J[:, :2])
    assert torch.allclose(heads.information(H, found.J), I)


def padded_words():
    """Three sequences of 4, 2 and 0 words of 3, logits and derivatives, 0 where padded."""
    lengths = [4, 2, 0]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]  # [3, 4]
    y = (torch.arange(12).view(3, 4) * 5 % 3).masked_fill(~mask, -100)
    outputs = mask.repeat_interleave(3, 1).double()
    h, J = inputs(3, 12, seed=5) * outputs, inputs(3, 12 * 2, seed=6).view(3, 12, 2)
    return lengths, y, h, J * outputs[..., None]


def test_ignored_labels_of_padding_count_nothing():
    lengths, y, h, J = padded_words()
    family = Positions(Categorical(), 3, ignore_index=-100)
    derivs = Derivatives(h, (Block("", J, None, {"w": None}),))
    found = data_fisher(derivs, family.observed(h, y))["w"]
    slopes = kl_gradient(derivs, family.observed(h, y))["w"]
    joint = Joint(family, quantities=["I"])
    joint.update(derivs, family.observed(h, y))
    for b, length in enumerate(lengths):
        delta = torch.eye(3)[y[b, :length]] - h[b].view(4, 3)[:length].softmax(1)
        score = torch.einsum("lt,lti->i", delta, J[b].view(4, 3, 2)[:length])
        assert torch.allclose(found[b], score.square())
        assert torch.allclose(slopes[b], -score)
    assert torch.allclose(joint.fisher_information()["w"], found.mean(0))
    assert not found[2].any()
    # I is that of the model's labels, of which there are none where the outputs are constant
    I = family.information(h, J)
    assert torch.allclose(I[1:2], family.information(h[1:2, :6], J[1:2, :6]))
    assert not I[2].any()


class Texts(nn.Module):
    """Logits of the next of 4 words, 0 where a word is 0, position by position."""

    def __init__(self):
        super().__init__()
        self.table, self.rnn = nn.Embedding(4, 3), nn.GRU(3, 3, batch_first=True)
        self.head = nn.Linear(3, 4)

    def forward(self, ids):
        return (self.head(self.rnn(self.table(ids))[0]) * (ids > 0)[..., None]).flatten(1)


def test_padded_sequences_have_the_data_fisher_of_the_sequences_alone():
    torch.manual_seed(0)
    model, family = Texts().double(), Positions(Categorical(), 4, ignore_index=-100)
    ids = torch.tensor([[1, 3, 2, 2], [2, 1, 0, 0], [3, 0, 0, 0]])
    y = ids.roll(-1, 1).masked_fill(ids == 0, -100)
    derivs = differentiate(model, ids, order=1)
    found = data_fisher(derivs, family.observed(derivs.outputs, y))
    for b, length in enumerate((4, 2, 1)):
        one = differentiate(model, ids[b : b + 1, :length], order=1)
        expected = data_fisher(
            one, Positions(Categorical(), 4).observed(one.outputs, y[b : b + 1, :length])
        )
        for name, _ in model.named_parameters():
            assert torch.allclose(found[name][b], expected[name][0], rtol=1e-9, atol=1e-14)


def test_an_ignored_label_where_outputs_are_not_masked():
    _, y, _, _ = padded_words()
    h, J = inputs(3, 12, seed=5), torch.ones(3, 12, 2).double().cumsum(1)
    family = Positions(Categorical(), 3, ignore_index=-100)
    scores = family.observed(h, y).project(J)[:, 0]
    short = Positions(Categorical(), 3).observed(h[1:2, :6], y[1:2, :2]).project(J[1:2, :6])[:, 0]
    assert torch.allclose(scores[1:2], short)
    assert not scores[2].any()
    plain = Positions(Categorical(), 3)  # I counts the position: the model has a label there
    assert torch.equal(family.information(h, J), plain.information(h, J))


def test_ignored_labels_of_other_families():
    h = inputs(2, 4, seed=5)
    y = torch.tensor([[[3.0, 1.0], [-1.0, -1.0]], [[-1.0, 0.5], [2.0, 2.0]]]).double()
    delta = Positions(Gaussian(), 2, ignore_index=-1).observed(h, y).mean_residual()
    expected = y.flatten(1) - h
    expected[0, 2:] = 0
    assert torch.allclose(delta, expected)


def test_labels_that_do_not_fit_the_positions():
    _, y, h, _ = padded_words()
    with pytest.raises(ValueError, match=r"between 0 and 2.* pass ignore_index=-100 to Positions"):
        Positions(Categorical(), 3).observed(h, y)
    with pytest.raises(ValueError, match=r"4 positions of 3 inputs, and y is \[3, 3\]"):
        Positions(Categorical(), 3).observed(h, y[:, :3].clamp_min(0))


def test_observed_labels():
    words = Positions(Categorical(), 3).observed(H, torch.tensor([[0, 2], [1, 1]]))
    assert words.values.tolist() == [[[1, 0, 0, 0, 0, 1]], [[0, 1, 0, 0, 1, 0]]]
    answers = Positions(Bernoulli(), 2).observed(H, torch.ones(2, 3, 2))
    assert answers.values.tolist() == [[[1] * 6]] * 2
    heads = PRODUCTS["a class and two answers"][0]
    both = heads.observed(H, {"class": [3, 0], "answers": [[1.0, 0.0], [0.0, 0.0]]})
    assert both.values.tolist() == [[[0, 0, 0, 1, 1, 0]], [[1, 0, 0, 0, 0, 0]]]
    with pytest.raises(ValueError, match="a dict with the heads class, answers"):
        heads.observed(H, {"class": [3, 0]})
    with pytest.raises(ValueError, match="between 0 and 2"):
        Positions(Categorical(), 3).observed(H, torch.tensor([[0, 3], [1, 1]]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Positions(Categorical(), 1), ValueError, "size must be an integer ≥ 2"),
        (lambda: Positions(Categorical, 3), TypeError, "make an instance"),
        (lambda: Heads({}), TypeError, "heads must be a dict"),
        (lambda: Heads({"a": (Poisson(), 0)}), ValueError, "head 'a' must be an integer ≥ 1"),
        (lambda: Positions(Categorical(), 4).natural(H), ValueError, "no multiple of size = 4"),
        (lambda: Positions(Poisson(), 2).natural(H + 99), ValueError, "overflows"),
        (lambda: Heads({"a": (Poisson(), 5)}).natural(H), ValueError, "6 outputs.*a have 5"),
        (
            lambda: Positions(Categorical(), 4).flatten(torch.ones(2, 3, 5)),
            ValueError,
            r"axis 2 of the outputs \[2, 3, 5\] must hold the 4 outputs",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_accumulators_know_the_families_inside():
    joint = Joint(Positions(Categorical(), 3))
    joint.merge(Joint(Positions(Categorical(), 3)))
    for other in (Positions(Categorical(), 4), Positions(Bernoulli(), 3), Categorical()):
        with pytest.raises(ValueError, match="other settings"):
            joint.merge(Joint(other))
        with pytest.raises(ValueError, match="not the state"):
            joint.load_state_dict(Joint(other).state_dict())


def all_projections(kind, family, h):
    """Weights and vectors w of one label: all signs, or all classes with a sign."""
    if kind == "signs":
        factor = family.factor(h[None])[0]
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=factor.shape[1]))).double()
        return torch.full((len(signs),), 1 / len(signs)).double(), signs @ factor.T
    p, q = family.mean(h[None])[0], family.importance(h[None])[0]
    rows = (p / q).sqrt()[:, None] * (torch.eye(len(p)).double() - p)
    return torch.cat([q, q]) / 2, torch.cat([rows, -rows])


@pytest.mark.parametrize("kind", ["signs", "importance"])
@each_product
def test_random_projections_are_those_of_all_labels_together(kind, name):
    family, parts = PRODUCTS[name]
    kinds = family.families * (len(parts) // len(family.families))
    J = inputs(6, 2, seed=1).expand(2, -1, -1)
    variance = getattr(family, f"variance_{kind}")
    if kind == "importance" and not all(isinstance(f, Categorical) for f in kinds):
        with pytest.raises(ValueError, match="needs classes"):
            variance(H, J)
        return
    sizes = [size for size, _ in parts]
    for h, found in zip(H, variance(H, J), strict=True):
        drawn = [
            all_projections(kind, one, part)
            for one, part in zip(kinds, h.split(sizes), strict=True)
        ]
        squares, weights = [], []
        for row in itertools.product(*(range(len(p)) for p, _ in drawn)):
            w = torch.cat([of[1][k] for of, k in zip(drawn, row, strict=True)])
            squares.append((w @ J[0]).square())
            weights.append(torch.stack([of[0][k] for of, k in zip(drawn, row, strict=True)]).prod())
        squares, weights = torch.stack(squares), torch.stack(weights)
        mean = weights @ squares
        torch.testing.assert_close(mean, family.information(h[None], J[:1])[0])
        torch.testing.assert_close(found, weights @ (squares - mean).square())


@each_product
def test_the_second_estimator_on_important_labels_sums_over_the_labels(name):
    family, parts = PRODUCTS[name]
    kinds = family.families * (len(parts) // len(family.families))
    S = inputs(6, 2, seed=1).expand(2, -1, -1)
    if not all(isinstance(f, Categorical) for f in kinds):
        with pytest.raises(ValueError, match="needs classes"):
            family.variance2_importance(H, S)
        return
    sizes = [size for size, _ in parts]
    for h, found in zip(H, family.variance2_importance(H, S), strict=True):
        expected = torch.zeros(2).double()
        for one, part, D in zip(kinds, h.split(sizes), S[0].split(sizes), strict=True):
            p, q = one.mean(part[None])[0], one.importance(part[None])[0]
            weighted = (p / q)[:, None] * (D - p @ D)  # of every class, with the mean 0
            expected += q @ weighted.square()
        torch.testing.assert_close(found, expected)
