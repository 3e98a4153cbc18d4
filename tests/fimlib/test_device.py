"""Everything is computed where the outputs are, and in float64, shown without a GPU.

On the fake device of tests/tools an operation on tensors of two devices is an error, as on a GPU.
What is computed there must equal what is computed on the CPU, but for rounding.
"""

import copy
import functools
import re

import fake_device
import pytest
import test_caller
import torch
from strategies import inputs, mlp
from torch import nn

import fimlib
from fimlib.engines import checks

ONES = torch.ones(2, 4, dtype=torch.float64)
FAMILIES = {
    "categorical": (fimlib.Categorical(), torch.tensor([0, 2])),
    "bernoulli": (fimlib.Bernoulli(), torch.tensor([[0, 1, 1, 0]] * 2)),
    "poisson": (fimlib.Poisson(), torch.tensor([[0, 3, 1, 0]] * 2)),
    "gaussian": (fimlib.Gaussian(), ONES),
    "known covariance": (fimlib.Gaussian(torch.eye(4, dtype=torch.float64) + 1), ONES),
    "head": (fimlib.GaussianHead(), ONES[:, :2]),
}
NETWORK, X = mlp([3, 4, 4], nn.Sigmoid), inputs(2, 3)
NAMES = ["2.bias"]


@pytest.fixture
def device():
    with fake_device.installed() as device:
        yield device


def moments(derivs, family, _observed):
    h = family.natural(derivs.outputs)
    u = family.directions(h)
    lists = family.log_partition(h), family.mean(h), family.covariance(h), u
    fourth = family.fourth_moment(h), family.outer_covariance(h), family.outer_covariance_min(h)
    return *lists, *fourth, family.outer_covariance_at(h, u), family.unfolding(h)


def exact(derivs, family, _observed):
    return (
        fimlib.fisher_information(derivs, family),
        fimlib.variance_i1(derivs, family),
        fimlib.variance_i2(derivs, family),
        fimlib.covariance_i1_i2(derivs, family),
    )


def estimates(derivs, family, observed):
    generator = torch.Generator(derivs.outputs.device).manual_seed(0)
    drawn = family.sample(derivs.outputs, 3, generator)
    given = family.observed(derivs.outputs, observed)
    return (
        fimlib.estimate_i1(derivs, drawn),
        fimlib.estimate_i2(derivs, drawn),
        fimlib.sample_variance_i1(derivs, drawn),
        fimlib.sample_variance_i2(derivs, drawn),
        drawn.mean_residual(),
        fimlib.data_fisher(derivs, given),
        fimlib.data_fisher_variance(derivs, given),
        fimlib.kl_gradient(derivs, given),
    )


def bounds(derivs, family, _observed):
    h = derivs.outputs
    pairs = torch.stack([h, h.flip(1), h + 1], 2)
    return (
        fimlib.theorem_4_1(derivs, family),
        fimlib.corollary_4_6(derivs, family),
        fimlib.trace_bounds.theorem_c_1(derivs, family),
        fimlib.corollary_4_2(family, h),
        fimlib.lambda_max(family, h, method="lower"),
        fimlib.bounds.theorem_b_1(pairs, pairs, pairs, family, h),
        fimlib.bounds.off_diagonal(pairs, pairs, pairs, family, h),
    )


def softmax(derivs, family, _observed):
    if not family.shift_invariant:
        return ()
    h = derivs.outputs
    sigma = family.mean(h)
    return (
        fimlib.theorem_4_1(derivs, family, centred=True),
        fimlib.theorem_5_2(sigma),
        fimlib.bounds.corollary_q_1(sigma),
        fimlib.estimate_i1(derivs, family.expected(h, sigma)),
        family.residual_bound(h),
    )


def joint(derivs, family, _observed):
    total = fimlib.Joint(family, bounds="certified")
    total.update(derivs)
    total.update(derivs)
    return (
        total.variance_i1(2),
        total.variance_bounds(2),
        total.variance_bounds(2, estimator=2),
        total.lemma_4_8(tight=True),
        fimlib.joint_covariance(derivs, family, parameters=NAMES, num_inputs=2),
        fimlib.num_samples_needed(derivs, family, relative_error=0.1, confidence=0.9),
        list(fimlib.compare_estimators(derivs, family).values()),
    )


def matrices(derivs, family, observed):
    labels, at = family.observed(derivs.outputs, observed), derivs.outputs.device
    net, x = copy.deepcopy(NETWORK).to(at), X.to(at)
    return (
        fimlib.fisher_matrix(net, x, family, parameters=NAMES),
        fimlib.estimate_i1_matrix(net, x, labels, parameters=NAMES),
        fimlib.estimate_i2_matrix(net, x, labels, parameters=NAMES),
        fimlib.empirical.data_fisher_matrix(net, x, labels, parameters=NAMES),
        fimlib.empirical.data_fisher_covariance(net, x, labels, parameters=NAMES),
    )


def tensors(value):
    """All tensors in a result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if value is None:  # as where the labels are no classes
        return []
    if isinstance(value, fimlib.Diagonal | dict):
        value = value.values()
    return [tensor for part in value for tensor in tensors(part)]


def assert_same(ours, expected):
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a.device.type == fake_device.NAME
        assert float((a.cpu() - b).abs().max()) <= 1e-5 * max(float(b.abs().max()), 1e-9)


COMPUTED = [(n, c) for n in FAMILIES for c in (moments, exact, estimates, softmax, joint, matrices)]
COMPUTED += [(n, bounds) for n in FAMILIES if n not in ("bernoulli", "poisson")]
SLOW = [pytest.param(n, bounds, marks=pytest.mark.full) for n in ("bernoulli", "poisson")]


@pytest.mark.long
@pytest.mark.parametrize(("name", "compute"), [*COMPUTED, *SLOW])
def test_nothing_is_made_elsewhere(name, compute, device):
    family, observed = FAMILIES[name]
    expected = tensors(compute(fimlib.differentiate(NETWORK, X), family, observed))
    derivs = fimlib.differentiate(copy.deepcopy(NETWORK).to(device), X.to(device))
    assert_same(tensors(compute(derivs, family, observed.to(device))), expected)
    assert expected or compute is softmax


CNN = nn.Sequential(
    nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten()
)
NETWORKS = {
    "layerwise": (NETWORK, X),
    "traced": (nn.Sequential(CNN, nn.Linear(2, 3)).double().eval(), inputs(2, 9).view(2, 1, 3, 3)),
    "functional": (nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4)).double(), X),
}


def first_order(engine, net, x):
    derivs = fimlib.differentiate(net, x, engine=engine, order=1)
    return fimlib.variance_i1(derivs, fimlib.Categorical())


def second_order(engine, net, x):
    if engine == "functional":
        generator = torch.Generator(x.device).manual_seed(0)
        found = fimlib.hutchinson_variance_i2(
            net, x, fimlib.Categorical(), num_probes=4, generator=generator
        )
        return found.value, found.standard_error
    return fimlib.variance_i2(fimlib.differentiate(net, x, engine=engine), fimlib.Categorical())


def streamed(engine, net, x):
    quantities = ["Var_x I", "V1"] if engine == "functional" else None
    options = {"engine": engine, "quantities": quantities}
    single = copy.deepcopy(net).float()
    return [
        joint.variance_i1(2)
        for joint in (
            fimlib.accumulate(net, x, fimlib.Categorical(), **options),
            fimlib.accumulate(
                single, x.float(), fimlib.Categorical(), dtype=torch.float32, **options
            ),
        )
    ]


@pytest.mark.parametrize("compute", [first_order, second_order, streamed])
@pytest.mark.parametrize("engine", NETWORKS)
def test_engines_make_nothing_elsewhere(engine, compute, device):
    net, x = NETWORKS[engine]
    expected = tensors(compute(engine, net, x))
    ours = tensors(compute(engine, copy.deepcopy(net).to(device), x.to(device)))
    assert_same(ours, expected)
    assert expected


# Every public function that takes a model, on networks with every kind of kernel. ---------------


class Last(nn.Module):
    """A recurrent layer, and a head on its last state."""

    def __init__(self, recurrent):
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(2, 1, batch_first=True), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def convolutions():
    first = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.SiLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2), nn.Flatten())


def norms():
    return nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4), nn.Softplus(), nn.Linear(4, 3), nn.Softmax(-1)
    )


KINDS = {
    "convolutions": (convolutions, (1, 3, 3)),
    "norms": (norms, (3,)),
    "attention": (Attending, (2, 2)),
    "lstm": (lambda: Last(nn.LSTM(2, 2, batch_first=True)), (2, 2)),
    "rnn": (lambda: Last(nn.RNN(2, 2, batch_first=True)), (2, 2)),
    "embedding": (test_caller.embedding, None),
    "weight norm": (test_caller.weight_normed, (3,)),
}
# Not BackPACK, which refuses networks by errors in hooks: the fake device cannot have these.
QUICK = {
    "differentiate": [lambda m, x, _: fimlib.differentiate(m, x, order=1)],
    "estimate": test_caller.CALLS["estimate"][:1],
    "accumulate": [lambda m, x, _: test_caller.accumulate(m, x, order=1, batch_size=2)],
}
THOROUGH = test_caller.CALLS | {
    "differentiate": [
        lambda m, x, _, c=c: fimlib.differentiate(m, x, **c)
        for c in test_caller.choices()
        if c["engine"] != "backpack"
    ],
    "accumulate": [lambda m, x, _: test_caller.accumulate(m, x)],
    "plan": [lambda m, x, _: fimlib.plan(m, x)],
    "hutchinson_variance_i2": [
        lambda m, x, _: fimlib.hutchinson_variance_i2(
            m, x, fimlib.Gaussian(), num_probes=3,
            generator=torch.Generator(x.device).manual_seed(0),
        )
    ],
}  # fmt: skip


def build(kind, device):
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    model = make().double().eval().to(device)
    if shape is None:
        return model, torch.tensor([[1, 4], [0, 6], [1, 1]], device=device)
    x = inputs(3, torch.Size(shape).numel()).view(3, *shape)
    return model, x.to(device)


def answer(way, kind, device):
    """The numbers of an answer, or the refusal."""
    model, x = build(kind, device)
    h = model(x).detach()
    labels = fimlib.Gaussian().observed(h, torch.zeros_like(h))
    try:
        return [t.cpu() for t in numbers(way(model, x, labels))]
    except (ValueError, NotImplementedError) as error:
        # kernels of another name stand behind the same module
        return re.sub(r"\w+Backward0 of", "", str(error).replace("fake:0", "cpu"))


def numbers(value):
    """All tensors in what a function returns, whatever holds them."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, fimlib.Plan):  # seconds
        return []
    if isinstance(value, fimlib.Diagonal | dict):
        value = value.values()
    elif type(value).__module__.startswith("fimlib") and not isinstance(value, fimlib.Family):
        value = value if isinstance(value, tuple) else vars(value).values()
    elif not isinstance(value, list | tuple):
        return []
    return [t for part in value for t in numbers(part)]


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "calls", [QUICK, pytest.param(THOROUGH, marks=pytest.mark.full)], ids=["quick", "thorough"]
)
def test_functions_that_take_a_model_stay_on_its_device(kind, calls, device):
    for function, ways in calls.items():
        for way in ways:
            ours, expected = answer(way, kind, device), answer(way, kind, "cpu")
            assert len(ours) == len(expected), (function, ours, expected)
            if isinstance(expected, str):
                assert ours == expected
                continue
            for a, b in zip(ours, expected, strict=True):
                assert torch.allclose(a.double(), b.double(), rtol=1e-8, atol=1e-12), function


class Watching(nn.Module):
    """Keeps whether cuDNN may round to TF32."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(3, 2)), []

    def forward(self, x):
        self.seen.append(torch.backends.cudnn.allow_tf32)
        return torch.tanh(x @ self.weight)

    def __deepcopy__(self, memo):
        copied = Watching()
        copied.weight, copied.seen = nn.Parameter(self.weight.detach().clone()), self.seen
        return copied


@pytest.mark.parametrize("function", QUICK)
def test_networks_are_called_without_tf32(function, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # PyTorch's default
    model = Watching().eval()
    for way in QUICK[function]:
        way(model, inputs(3, 3).float(), None)
    assert model.seen
    assert not any(model.seen)
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_needs_a_kernel_that_is_not_deterministic(name, device):
    family, observed = FAMILIES[name]
    derivs = fimlib.differentiate(copy.deepcopy(NETWORK).to(device), X.to(device))
    expected = [tensors(c(derivs, family, observed.to(device))) for c in (exact, estimates)]
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.ones(2, device=device).cumsum(0)
        found = [tensors(c(derivs, family, observed.to(device))) for c in (exact, estimates)]
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, others in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_generator_of_another_device_is_named(name, device):
    family, _ = FAMILIES[name]
    h = torch.zeros(2, 4, device=device)
    with pytest.raises(ValueError, match=r"on cpu, .* on fake:0: make it by torch.Generator\("):
        family.sample(h, 3, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="the generator is on fake:0, the outputs are on cpu"):
        family.sample(h.cpu(), 3, torch.Generator(device).manual_seed(0))


def test_a_device_without_float64_is_refused(device, monkeypatch):
    assert "mps" in checks.WITHOUT_FLOAT64
    monkeypatch.setattr(checks, "WITHOUT_FLOAT64", (device.type,))
    net, x = copy.deepcopy(NETWORK).float().to(device), X.float().to(device)
    for call in (
        lambda: fimlib.differentiate(net, x),
        lambda: fimlib.accumulate(net, x, fimlib.Categorical()),
        lambda: fimlib.estimate(net, x, fimlib.Categorical(), passes=2),
    ):
        with pytest.raises(ValueError, match=r"on fake:0, which has no float64: take the CPU"):
            call()


# How often the host waits for a GPU. --------------------------------------------------------------


def accumulated(net, batches, **options):
    fimlib.accumulate(net, batches, fimlib.Categorical(), **options)


def estimated(net, batches):
    fimlib.estimate(net, batches, fimlib.Categorical(), passes=2)


# What is done with a batch, and how often it waits once the first batches were checked.
LOOPS = {
    "estimate": (estimated, 0),
    "accumulate": (accumulated, 1),
    "accumulate, order 1": (functools.partial(accumulated, quantities=["I", "V1"]), 1),
}


@pytest.mark.long
@pytest.mark.parametrize("loop", LOOPS)
def test_a_batch_waits_for_the_device_once_at_most(loop, device):
    work, most = LOOPS[loop]
    found = []
    for count in (30, 40):
        net = copy.deepcopy(NETWORK).to(device)
        with fake_device.waits() as waits:
            work(net, list(inputs(2 * count, 3).split(2)))
        found.append(waits.total())
    # A pass that is long enough to be saved waits a few times more.
    assert found[0] > 0
    assert found[1] - found[0] <= 10 * most + 5


MIXED = {
    "sum": lambda ours, cpu: ours + cpu,
    "product": lambda ours, cpu: ours @ cpu.T,
    "concatenation": lambda ours, cpu: torch.cat([ours, cpu]),
    "choice": lambda ours, cpu: torch.where(ours > 0, ours, cpu),
    "assignment": lambda ours, cpu: ours.index_put((torch.tensor([0]),), cpu),
    "index on the device": lambda ours, cpu: cpu[ours[0].long()],
    "out": lambda ours, cpu: torch.add(ours, 1, out=cpu),
    "generator": lambda ours, _: ours.normal_(generator=torch.Generator().manual_seed(0)),
    "numpy": lambda ours, _: ours.numpy(),
}


@pytest.mark.parametrize("mix", MIXED)
def test_the_fake_device_refuses_what_cuda_refuses(mix, device):
    with pytest.raises((RuntimeError, TypeError), match="device"):
        MIXED[mix](torch.zeros(2, 3, device=device), torch.zeros(2, 3))


def test_the_fake_device_takes_what_cuda_takes_and_counts_what_waits(device):
    t = torch.arange(6.0, device=device).view(2, 3).requires_grad_()
    with fake_device.waits() as waits:
        found = (t * torch.tensor(2.0))[:, torch.tensor([0, 2])].square().sum()
        found.backward()
        drawn = torch.rand(2, generator=torch.Generator(device).manual_seed(0), device=device)
        assert not waits
        assert found.item() == 4 * (4 + 9 + 25)
        assert t.grad.tolist() == [[0.0, 0.0, 16.0], [24.0, 0.0, 40.0]]
        assert bool((drawn > 0).all())
        assert len(t[t > 3]) == 2
    assert waits == {"_local_scalar_dense": 2, "copy to the host": 1, "nonzero": 1}


@pytest.mark.parametrize("compute", [moments, exact, estimates, bounds, softmax, joint])
@pytest.mark.parametrize("name", FAMILIES)
def test_results_of_a_float32_network_are_float64(name, compute):
    family, observed = FAMILIES[name]
    net = mlp([3, 4, 4], nn.Sigmoid).float()
    derivs = fimlib.differentiate(net, X.float())
    for tensor in tensors(compute(derivs, family, observed)):
        assert tensor.dtype in (torch.float64, torch.int64)


@pytest.mark.parametrize("name", FAMILIES)
def test_moments_at_float32_outputs_are_computed_in_float64(name):
    family, _ = FAMILIES[name]
    rough = inputs(2, 4).float()
    for method in ("log_partition", "mean", "covariance", "fourth_moment", "outer_covariance_min"):
        ours, expected = (getattr(family, method)(h) for h in (rough, rough.double()))
        assert ours.dtype == torch.float64
        assert torch.equal(ours, expected)
    J = inputs(2, 12, seed=2).view(2, 4, 3).float()
    for form in (family.information, family.variance1, lambda h, D: family.covariance12(h, D, D)):
        assert torch.equal(form(rough, J), form(rough.double(), J.double()))
        assert form(rough, J).dtype == torch.float64
