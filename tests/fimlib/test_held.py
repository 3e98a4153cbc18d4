"""Batches of any kind, several labels for one input, and parts of the parameters."""

import copy
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from strategies import inputs, mlp
from torch import nn

import fimlib
from fimlib import Categorical, Gaussian, accumulate, estimate, summarise
from fimlib.engines.held import hold
from fimlib.engines.truth import Truth
from fimlib.families import Bernoulli, Heads, Positions

WORDS, LENGTH = 7, 5


class Language(nn.Module):
    """A small language model with tied tables, called as those of transformers are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(WORDS, 8, padding_idx=0)
        self.place = nn.Parameter(0.1 * torch.randn(LENGTH, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, *, input_ids, attention_mask):  # noqa: ARG002
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH).to(self.place)
        z = self.block(self.table(input_ids) + self.place, src_mask=mask, is_causal=True)
        return {"logits": self.norm(z) @ self.table.weight.T}


def texts():
    """Two batches of texts with padding at the end."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, WORDS, (6, LENGTH), generator=generator)
    mask = torch.ones(6, LENGTH, dtype=torch.long)
    mask[0, 3:] = mask[2, 2:] = 0
    ids = ids * mask
    return [
        {"input_ids": ids[:4], "attention_mask": mask[:4]},
        {"input_ids": ids[4:], "attention_mask": mask[4:]},
    ]


def logits(model, batch):
    return model(**batch)["logits"] * batch["attention_mask"][..., None]


def exact(model, data):
    """I of the texts, word by word, by autograd."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = {n: torch.zeros_like(p) for n, p in zip(names, parameters, strict=True)}
    count = sum(len(batch["input_ids"]) for batch in data)
    for batch in data:
        h = model(**batch)["logits"]
        for i, place in batch["attention_mask"].nonzero().tolist():
            log_p = h[i, place].log_softmax(0)
            for k in range(WORDS):
                rows = torch.autograd.grad(log_p[k], parameters, retain_graph=True)
                for name, row in zip(names, rows, strict=True):
                    found[name] += log_p[k].exp().detach() * row**2 / count
    return found


@pytest.fixture(scope="module")
def language():
    model = Language().double().eval()
    return model, texts(), exact(model, texts())


def test_the_exact_information_of_a_language_model(language):
    model, data, expected = language
    before = copy.deepcopy((model.state_dict(), data))
    family = Positions(Categorical(), WORDS)
    joint = accumulate(model, data, family, forward=logits, quantities=["V1", "Var_x I"])
    assert joint.count == 6
    for name, I in joint.fisher_information().items():
        assert torch.allclose(I, expected[name], rtol=1e-10, atol=1e-15)
    assert joint.fisher_information()["table.weight"][0].any()  # each word is an output, too
    split = accumulate(model, data, family, forward=logits, quantities=["V1"], batch_size=1)
    for name, V1 in joint.label_variance(1).items():
        assert torch.allclose(split.label_variance(1)[name], V1, rtol=1e-9, atol=1e-18)
    for a, b in zip(before, (model.state_dict(), data), strict=True):
        assert str(a) == str(b)


@pytest.mark.long
@pytest.mark.parametrize(
    ("estimator", "squares"),
    [
        ("signs", "input"),
        ("importance", "batch"),
        pytest.param("signs", "batch", marks=pytest.mark.full),
        pytest.param("importance", "input", marks=pytest.mark.full),
    ],
)
def test_estimates_of_a_language_model(language, squares, estimator):
    model, data, expected = language
    options = {"forward": logits, "squares": squares, "estimator": estimator, "passes": 200}
    found = estimate(model, data, Positions(Categorical(), WORDS), **options)
    for name, I in expected.items():
        off = (found.value[name] - I).abs()
        bars = 6 if estimator == "signs" else 15  # rare words are drawn rarely
        assert (off <= bars * found.standard_error[name] + 1e-18).all()
    assert found.num_inputs == 6


def test_half_precision_is_computed_in_float32(language):
    model, data, _ = language
    half = copy.deepcopy(model).bfloat16()
    options = {"forward": logits, "passes": 50, "seed": 3}
    family = Positions(Categorical(), WORDS)
    ours = estimate(half, data, family, **options).value
    assert next(half.parameters()).dtype == torch.bfloat16
    wide = estimate(half.float(), data, family, **options).value
    assert all(torch.equal(ours[n], wide[n]) for n in wide)


KINDS = {
    "dict": lambda x: {"x": x},
    "user's dict": lambda x: UserDict(x=x),
    "tuple": lambda x: (x, torch.zeros(len(x)), "name"),
    "tensor": lambda x: x,
}
TAKES = {
    "dict": lambda m, b: m(b["x"]),
    "user's dict": lambda m, b: m(b.data["x"]),
    "tuple": lambda m, b: m(b[0]),
    "tensor": lambda m, b: m(b),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantities", [["V1"], None])
def test_any_batch_gives_the_same(kind, quantities):
    net, x = mlp([3, 4, 3], nn.Tanh), inputs(6, 3)
    expected = accumulate(net, x, Categorical(), quantities=quantities)
    batches = [KINDS[kind](part) for part in x.split(2)]
    if kind == "tensor":
        with pytest.raises(ValueError, match=r"pass \[inputs\] then, or list\(inputs\)"):
            accumulate(net, tuple(batches), Categorical(), forward=TAKES[kind])
    found = accumulate(net, batches, Categorical(), forward=TAKES[kind], quantities=quantities)
    assert found.layers.keys() == expected.layers.keys()
    for key, means in expected._means.items():
        for name, mean in means.items():
            assert torch.allclose(found._means[key][name], mean, rtol=1e-9, atol=1e-15)
    options = {"passes": 5, "squares": "input"}
    ours = estimate(net, batches, Categorical(), forward=TAKES[kind], **options)
    theirs = estimate(net, list(x.split(2)), Categorical(), **options)
    assert all(torch.allclose(ours.value[n], theirs.value[n]) for n in theirs.value)


def test_images_with_a_class_at_every_pixel():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Sigmoid(), nn.Conv2d(2, 3, 1)).double()
    x = inputs(2, 16).view(2, 1, 4, 4)
    joint = accumulate(net, x, Positions(Categorical(), 3, class_dim=1))
    flat = nn.Sequential(net, Pixels())
    expected = {"I": 0, "V2": 0}
    for place in range(16):
        at = nn.Sequential(flat, At(place))
        derivs = fimlib.differentiate(at, x)
        I = fimlib.fisher_information(derivs, Categorical())
        V2 = fimlib.variance_i2(derivs, Categorical())
        for key, value in (("I", I), ("V2", V2)):
            expected[key] = expected[key] + value["0.0.0.weight"].mean(0)
    assert torch.allclose(joint.fisher_information()["0.weight"], expected["I"])
    assert torch.allclose(joint.label_variance(2)["0.weight"], expected["V2"])


class Pixels(nn.Module):
    def forward(self, h):
        return h.flatten(2).mT


class At(nn.Module):
    def __init__(self, place):
        super().__init__()
        self.place = place

    def forward(self, h):
        return h[:, self.place]


def test_two_heads():
    net, x = mlp([3, 4, 5], nn.Tanh), inputs(4, 3)
    heads = Heads({"class": (Categorical(), 3), "answers": (Bernoulli(), 2)})
    found = accumulate(net, x, heads).fisher_information()["0.weight"]
    parts = (lambda m, x: m(x)[:, :3], lambda m, x: m(x)[:, 3:])
    I = [
        accumulate(net, x, family, forward=part).fisher_information()["0.weight"]
        for family, part in zip((Categorical(), Bernoulli()), parts, strict=True)
    ]
    assert torch.allclose(found, I[0] + I[1])


class Attends(nn.Module):
    """Attention in one call of torch, whose kernels crash within transforms of torch.func."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.out = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, z, mask=None):
        q, k, v = self.mix(z).chunk(3, -1)
        seen = None if mask is None else mask[:, None].bool()
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).mean(1))


def test_attention_in_one_call_at_order_2():
    net, z = Attends().double(), inputs(3, 12).view(3, 3, 4)
    plain = accumulate(net, z, Categorical()).label_variance(2)
    batch = {"z": z, "mask": torch.ones(3, 3)}
    masked = accumulate(net, [batch], Categorical(), forward=lambda m, b: m(**b)).label_variance(2)
    for name, V2 in plain.items():
        assert torch.allclose(masked[name], V2, rtol=1e-9, atol=1e-15)
    assert plain["mix.weight"].any()


@pytest.mark.parametrize("exact", [True, False])
def test_a_summary_of_any_batch(exact, monkeypatch):
    if not exact:
        monkeypatch.setattr("fimlib.engines.forward_mode.MANY_PARAMETERS", 1)
    net, x = mlp([3, 4, 3], nn.Tanh), inputs(6, 3)
    forward = lambda m, b: m(b["x"].sin()).cos()  # noqa: E731
    batches = [{"x": part} for part in x.split(4)]
    found = fimlib.summarise(net, batches, Categorical(), forward=forward, num_probes=40)
    wrapped = nn.Sequential(Sine(), net, Cosine())
    whole = fimlib.summarise(wrapped, x, Categorical(), num_probes=40)
    assert [row.layer for row in found.layers] == ["0", "2"]
    for a, b in zip(found.layers, whole.layers, strict=True):
        assert a.relative_sd_i1 == pytest.approx(b.relative_sd_i1)
        slack = 1e-9 if exact else 5 * a.relative_sd_i2_error
        assert abs(a.relative_sd_i2 - b.relative_sd_i2) <= slack


class Sine(nn.Module):
    def forward(self, x):
        return x.sin()


class Cosine(nn.Module):
    def forward(self, h):
        return h.cos()


# Parts of the parameters.


class Adapted(nn.Module):
    """A frozen matrix, and an adapter in bare parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(3, 4).requires_grad_(False)
        self.down, self.up = (nn.Parameter(torch.randn(s)) for s in ((3, 1), (1, 4)))

    def forward(self, x):
        return self.base(x) + x @ self.down @ self.up


@pytest.mark.parametrize("layers", ["trainable", ["down", "up"]])
def test_adapters_apart_from_their_base(layers):
    net, x = Adapted().double(), inputs(4, 3)
    expected = accumulate(net, x, Categorical()).fisher_information()
    for found in (
        accumulate(net, x, Categorical(), layers=layers).fisher_information(),
        estimate(net, x, Categorical(), layers=layers, passes=2).value,
    ):
        assert found.keys() == {"down", "up"}
    joint = accumulate(net, x, Categorical(), layers=layers)
    assert all(torch.allclose(v, expected[n]) for n, v in joint.fisher_information().items())


# Refusals.


def mixed(model, batch):
    h = model(batch["x"])
    return h - h.mean(0)


X = inputs(4, 3)
REFUSED = {
    "a loss": (
        {"x": X},
        lambda m, b: m(b["x"]).sum(),
        "return the outputs of each input, and no loss",
    ),
    "a tuple": ({"x": X}, lambda m, b: (m(b["x"]),), "return its tensor"),
    "other inputs": ({"x": X}, mixed, "depend on the others of the batch"),
    "a wrong name": ({"x": X}, lambda m, b: m(b["y"]), "KeyError: 'y'"),
    "no tensors": ({"x": [1.0]}, lambda m, b: m(b["x"]), "a dict, are none"),
    "two lengths": ({"x": X, "y": X[:2]}, lambda m, b: m(b["x"]), r"lengths \[2, 4\]"),
    "NaN": ({"x": X * torch.nan}, lambda m, b: m(b["x"]), "batch 1: the batch holds NaN"),
    "cut": ({"x": X}, lambda m, b: m(b["x"]) * m(b["x"]).detach(), "not the derivative"),
    "positions": ({"x": X}, lambda m, b: m(b["x"])[:, None], "Positions"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("function", [accumulate, estimate])
def test_batches_that_cannot_be_used(name, function):
    batch, forward, message = REFUSED[name]
    with pytest.raises((ValueError, NotImplementedError), match=message):
        function(mlp([3, 4, 3], nn.Tanh), [batch], Categorical(), forward=forward)


@pytest.mark.parametrize("function", [accumulate, estimate])
def test_inputs_that_meet_are_seen_one_at_a_time_too(function):
    with pytest.raises(NotImplementedError, match="depend on the others of the batch"):
        function(mlp([3, 4, 3], nn.Tanh), [{"x": X}], Categorical(), forward=mixed, batch_size=1)


def test_a_held_batch_follows_its_network_to_float64():
    net = mlp([3, 4, 3], nn.Tanh).float()
    held = hold(net, lambda m, b: m(b["x"]), {"x": X, "ids": torch.arange(4)})
    assert held.batch["x"].dtype == torch.float32
    assert Truth.of(held, held.positions).dtype == torch.float64
    wide = copy.deepcopy(held).double()
    assert (wide.batch["x"].dtype, wide.batch["ids"].dtype) == (torch.float64, torch.int64)


CANNOT = torch.tensor([False, False, True, False, True])


class Masked(nn.Module):
    """A network with five classes, some of which cannot occur."""

    def __init__(self, how, value=-torch.inf):
        super().__init__()
        self.body, self.how, self.value = mlp([3, 4, 5], nn.Tanh), how, value

    def forward(self, x):
        h = self.body(x)
        if self.how == "by a sum":
            return h + torch.zeros(5, dtype=h.dtype).masked_fill(CANNOT, self.value)
        if self.how == "by the input":
            return h.masked_fill(torch.arange(5) == 1 + (x[:, :1] > 0), self.value)
        if self.how == "at one position of two":
            h = h[:, None] * torch.tensor([1.0, 2.0])[:, None]
            return h.masked_fill(CANNOT & torch.tensor([[True], [False]]), self.value)
        if self.how == "in one head of two":
            return torch.cat([h.masked_fill(CANNOT, self.value), x[:, :1] * h[:, :1]], 1)
        return h.masked_fill(CANNOT, self.value)


FAMILIES = {
    "at one position of two": Positions(Categorical(), 5),
    "in one head of two": Heads({"class": (Categorical(), 5), "size": (Gaussian(), 1)}),
}
MASKS = ["by a number", "by a sum", "by the input", *FAMILIES]


def moments(model, family):
    joint = accumulate(model, X, family)
    found = {"I": joint.fisher_information(), "C12": joint.label_covariance()}
    found |= {"V1": joint.variance_i1(num_inputs=2), "V2": joint.variance_i2(num_inputs=2)}
    found["estimate"] = estimate(model, X, family, passes=3).value
    s = summarise(model, X, family)
    return found | {"summarise": {one.layer: torch.tensor(one.mean_fisher) for one in s.layers}}


@pytest.mark.parametrize("how", MASKS)
def test_a_class_masked_by_infinity_cannot_occur(how):
    family, net = FAMILIES.get(how, Categorical()), Masked(how)
    finite = Masked(how, -1e5)
    finite.load_state_dict(net.state_dict())
    found, right = (moments(m, family) for m in (net, finite))
    for quantity, values in right.items():
        for name, value in values.items():
            torch.testing.assert_close(found[quantity][name], value, msg=f"{quantity} of {name}")
    if how == "by a number":
        assert not found["I"]["body.2.weight"][CANNOT].any()


def test_masked_classes_of_a_batch_with_several_tensors():
    net = mlp([3, 4, 5], nn.Tanh)
    masked = lambda m, b: m(b["x"]).masked_fill(CANNOT, -torch.inf)  # noqa: E731
    kept = lambda m, b: m(b["x"])[:, ~CANNOT]  # noqa: E731
    found, right = (
        accumulate(net, [{"x": X}], Categorical(), forward=f).fisher_information()
        for f in (masked, kept)
    )
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("function", [accumulate, estimate, summarise])
@pytest.mark.parametrize(
    ("model", "batches", "family", "message"),
    [
        (lambda x: x.new_full((1, 5), -torch.inf) + 0 * x[:, :1], [X], Categorical(), "NaN"),
        (lambda x: x[:, :1] - torch.tensor([1e4, torch.inf]), [X], Categorical(), "NaN"),
        (
            lambda x: torch.where(x > 90, -torch.inf, x),
            [X, X + 100],
            Categorical(),
            "batch 2.*-inf",
        ),
        (lambda x: x.masked_fill(CANNOT[2:], -torch.inf), [X], Gaussian(), "-inf"),
        (lambda x: x.masked_fill(CANNOT[2:], torch.inf), [X], Categorical(), "NaN or infinite"),
    ],
    ids=["no class can occur", "no other logit is larger", "later", "no classes", "plus infinity"],
)
def test_infinite_outputs_without_a_meaning(function, model, batches, family, message):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()).double())

        def forward(self, x):
            return model(self.w * x)

    with pytest.raises(ValueError, match=message):
        function(Net(), batches, family)


@pytest.mark.parametrize("function", [accumulate, estimate])
def test_arguments_that_do_not_fit(function):
    net, batch = mlp([3, 4, 3], nn.Tanh), {"x": X}
    call = {"forward": lambda m, b: m(b["x"])}
    with pytest.raises(TypeError, match=r"pass \[inputs\], and forward="):
        function(net, batch, Categorical(), **call)
    with pytest.raises(ValueError, match="leave pick out"):
        function(net, [batch], Categorical(), pick="x", **call)
    with pytest.raises(ValueError, match="none is trainable"):
        function(net.requires_grad_(False), [batch], Categorical(), layers="trainable", **call)
    net.requires_grad_(True)[0].register_full_backward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="has a backward hook"):
        function(net, [batch], Categorical(), **call)
    random = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).double()
    with pytest.raises(ValueError, match="training mode"):
        function(random, [batch], Categorical(), **call)


@pytest.mark.parametrize("function", [accumulate, estimate])
def test_sequences_alone_may_change_their_length(function):
    net = mlp([3, 4, 6], nn.Tanh)
    data = [{"x": X, "width": 6}, {"x": X, "width": 4}]
    forward = lambda m, b: m(b["x"])[:, : b["width"]]  # noqa: E731
    function(net, data, Positions(Categorical(), 2), forward=forward)
    with pytest.raises(ValueError, match="batch 2.*4 outputs, and gave 6 before"):
        function(net, data, Categorical(), forward=forward)
    with pytest.raises(ValueError, match="batch 2.*no multiple of size = 3"):
        function(net, data, Positions(Categorical(), 3), forward=forward)
