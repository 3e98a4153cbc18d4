"""What the caller gives stays as it was; what the caller gets stays as it is."""

import contextlib
import dataclasses
import inspect
import random
import warnings
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from strategies import Failing, inputs
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import fimlib
from fimlib.engines.choose import ENGINES

pytestmark = pytest.mark.long

FAMILY = fimlib.Gaussian()


# Every public function that takes a model, by all its engines. ----------------------------------


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def choices(**more):
    engines = [(e, order) for e in ("auto", *ENGINES) for order in (1, 2)]
    return [{"engine": e, "order": order, **more} for e, order in engines]


def by_labels(function, **more):
    return lambda model, x, labels: function(
        model, x, labels, parameters=names_of(model)[:2], **more
    )


def loader(x):
    return DataLoader(TensorDataset(x), 2, generator=torch.Generator())  # else it seeds by torch's


def accumulate(model, x, order=2, **options):
    quantities = None if order == 2 else ["I", "V1"]
    return fimlib.accumulate(model, x, FAMILY, quantities=quantities, bounds="certified", **options)


# The size of a batch is found out as well; every engine does that in the same way.
AUTO = choices()[:2]
SMALL_BATCHES = [
    choice
    for choice in choices(batch_size=2)[2:]
    if choice["order"] == (1 if choice["engine"] == "functional" else 2)
]
TRACED_AT_ONCE = {"batch_size": 3, "engine": "traced"}

# Name → ways to call it, from the model, x and labels.
CALLS = {
    "accumulate": [
        lambda m, x, _, c=c: accumulate(m, x, **c)
        for c in (*AUTO, *SMALL_BATCHES, {"batch_size": 1}, TRACED_AT_ONCE)
    ]
    + [
        lambda m, x, _: fimlib.accumulate(m, [(x[:1],), (x[1:],)], FAMILY),
        lambda m, x, _: fimlib.accumulate(m, loader(x), FAMILY, quantities=["V1"]),
    ],
    "data_fisher_covariance": [by_labels(fimlib.empirical.data_fisher_covariance)],
    "data_fisher_matrix": [by_labels(fimlib.empirical.data_fisher_matrix)],
    "differentiate": [lambda m, x, _, c=c: fimlib.differentiate(m, x, **c) for c in choices()],
    "estimate": [
        lambda m, x, _, s=s: fimlib.estimate(m, x, FAMILY, squares=s, passes=2, batch_size=3)
        for s in ("batch", "input")
    ],
    "estimate_i1_matrix": [by_labels(fimlib.estimate_i1_matrix)],
    "estimate_i2_matrix": [by_labels(fimlib.estimate_i2_matrix)],
    "fisher_matrix": [
        lambda m, x, _: fimlib.fisher_matrix(m, x, FAMILY, parameters=names_of(m)[:2])
    ],
    "hutchinson_variance_i2": [
        lambda m, x, _: fimlib.hutchinson_variance_i2(
            m, x, FAMILY, num_probes=3, generator=torch.Generator().manual_seed(0)
        )
    ],
    "identify": [
        lambda m, x, _, size=size: fimlib.identify(
            {n: torch.ones_like(p) for n, p in m.named_parameters()},
            m,
            [(part,) for part in x.split(size)],
            FAMILY,
        )
        for size in (9, 2)
    ],
    "plan": [lambda m, x, _, c=c: fimlib.plan(m, x, **c) for c in choices()[:3]],
    "summarise": [
        lambda m, x, _: fimlib.summarise(m, x, FAMILY, num_probes=3),
        lambda m, x, _: fimlib.summarise(m, [x[:1], x[1:]], FAMILY, num_probes=3),
    ],
}


def test_no_public_function_that_takes_a_model_is_left_out():
    modules = (fimlib, fimlib.empirical, fimlib.bounds, fimlib.trace_bounds, fimlib.spectra)
    functions = {name: getattr(m, name) for m in modules for name in m.__all__}
    functions = {n: f for n, f in functions.items() if inspect.isroutine(f)}
    taking = {n for n, f in functions.items() if "model" in inspect.signature(f).parameters}
    assert taking == set(CALLS) | {"load"}  # which reads the weights only


# Awkward models. --------------------------------------------------------------------------------


class Own(nn.Module):
    """A forward() of one's own over a few layers; it keeps what it was called with."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.how = forward
        self.seen = []
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        self.seen.append(x)
        return self.how(self, x)


class Counter(nn.Module):
    """Counts its calls in a buffer and in an attribute."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.number = 0

    def forward(self, x):
        self.calls += 1
        self.number += 1
        return x.clone()


class FailsAtCall(Counter):
    def forward(self, x):
        if self.number:
            raise RuntimeError("the second call")
        return super().forward(x.mul_(1.5))


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


def mlp(*before):
    return nn.Sequential(*before, nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def own(forward, **more):
    return Own(forward, a=nn.Linear(3, 4), **(more or {"b": nn.Linear(4, 2)}))


def after_a_view(self, x):
    x.view(len(x), -1)[:, :2].mul_(1.5)
    return self.b(self.a(x).tanh())


def x_itself(self, x):
    return x.add_(self.c(self.a(x.clone()).tanh()))


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


def frozen():
    net = mlp()
    net[0].requires_grad_(False)
    return net


def with_grads():
    net = mlp()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    return net


def hooked():
    net = mlp()
    net[1].register_forward_hook(lambda _module, _args, out: 2 * out)
    return net


class Recorder:
    """Keeps what a module returned, with its graph."""

    def __init__(self):
        self.seen = []

    def __call__(self, _module, _args, out):
        self.seen.append(out)


def recorded():
    """A network that was called before."""
    net = mlp()
    net[1].register_forward_hook(Recorder())
    net[1](torch.ones(1, 4, requires_grad=True) * 2)
    return net


def mixed_modes():
    net = mlp(nn.Dropout(0.5))
    net[1].train(), net[2].train(), net.train()
    net[0].eval()
    return net


def pruned():
    net = mlp()
    prune.l1_unstructured(net[0], "weight", 0.5)
    return net


def weight_normed():
    net = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that there is a newer one
        nn.utils.weight_norm(net[0])
    return net


def norm():
    net = mlp(nn.BatchNorm1d(3))
    nn.init.constant_(net[0].running_mean, 0.3)
    return net


def embedding(**options):
    table = nn.Embedding(7, 3, **options)
    return nn.Sequential(table, nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))


MODELS = {
    "in place first": lambda: mlp(nn.Hardswish(inplace=True)),
    "in place first, known": lambda: mlp(nn.ReLU(inplace=True)),
    "in place in the middle": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.SiLU(inplace=True), nn.Linear(4, 2), nn.ELU(inplace=True)
    ),
    "in place after a view": lambda: mlp(nn.Flatten(), nn.Hardswish(inplace=True)),
    "in place after a view, by hand": lambda: own(after_a_view),
    "view of the outputs": lambda: own(lambda self, x: self.b(self.a(x).sin())[:, :2].view(-1, 2)),
    "returns x, changed": lambda: own(x_itself, c=nn.Linear(4, 3)),
    "returns a view of x": lambda: own(lambda m, x: x_itself(m, x)[:, :2], c=nn.Linear(4, 3)),
    "returns x": lambda: own(lambda _, x: x),
    "counts its calls": lambda: mlp(Counter()),
    "dropout": lambda: mlp(nn.Dropout(0.5)),
    "batch norm": norm,
    "frozen": frozen,
    "gradients are there": with_grads,
    "hooked": hooked,
    "recorded": recorded,
    "fails in the middle": lambda: mlp(FailsAtCall()),
    "tied": tied,
    "modes mixed": mixed_modes,
    "pruned": pruned,
    "weight norm": weight_normed,
    "embedding": embedding,
    "sparse embedding": lambda: embedding(sparse=True),
    "random": lambda: mlp(Noise()),
    "random in the middle": lambda: own(lambda self, x: self.b(torch.rand_like(self.a(x)))),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(4, 2)
    ),
}
ANY_ANSWER = ("returns x",)
NEVER_ANSWERED = ("random", "random in the middle", "fails in the middle")
KEEP_THEIR_MODE = ("modes mixed",)


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    return model if name in KEEP_THEIR_MODE else model.eval()


def case(name):
    """A model, x, labels and whatever the labels were made of."""
    model, twin = build(name), build(name)
    x = inputs(3, 3)
    if "embedding" in name:
        x = torch.tensor([[1, 4], [0, 6], [1, 1]])
    h = twin(x.clone()).detach()
    y = torch.zeros_like(h)
    return model, x, FAMILY.observed(h, y), [h, y]


# All that may not change. -----------------------------------------------------------------------


def of_tensor(t):
    if t is None:
        return None
    return id(t), t._version, t.requires_grad, t.detach().clone(), of_tensor(t.grad)


def state_of(model, x):
    found = {"x": of_tensor(x)}
    for name, module in model.named_modules():
        found[name, "mode"] = module.training
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            found[name, kind] = list(getattr(module, kind).items())
        for kind in ("_parameters", "_buffers"):
            found[name, kind] = {n: of_tensor(t) for n, t in getattr(module, kind).items()}
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | Tensor)}
        found[name, "attributes"] = (sorted(vars(module)), plain)
        found[name, "seen"] = list(getattr(module, "seen", []))
        hooks = module._forward_hooks.values()
        found[name, "recorded"] = [list(map(id, getattr(h, "seen", []))) for h in hooks]
    return found


def settings():
    """The generators, and what torch lets one set for all."""
    generators = [torch.get_rng_state(), *random.getstate(), *np.random.get_state()]  # noqa: NPY002
    backends = torch.backends
    return {
        "generators": generators,
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "precision": torch.get_float32_matmul_precision(),
        "fastpath": backends.mha.get_fastpath_enabled(),
        "attention": (
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
            backends.cuda.cudnn_sdp_enabled(),
        ),
        "cudnn": (
            backends.cudnn.enabled,
            backends.cudnn.benchmark,
            backends.cudnn.deterministic,
            backends.cudnn.allow_tf32,
            backends.mkldnn.enabled,
        ),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "warnings": list(warnings.filters),
        "hooks on all modules": [
            list(getattr(global_hooks, name))
            for name in ("_global_forward_hooks", "_global_forward_pre_hooks")
        ],
        "print": repr(torch._tensor_str.PRINT_OPTS),
    }


def assert_same(before, after, where):
    if isinstance(before, Tensor | np.ndarray):
        assert type(before) is type(after), where
        before, after = torch.as_tensor(before), torch.as_tensor(after)
        assert torch.equal(before, after), where
    elif isinstance(before, Mapping):
        assert before.keys() == after.keys(), where
        for key in before:
            assert_same(before[key], after[key], (*where, key))
    elif isinstance(before, list | tuple):
        assert len(before) == len(after), where
        for i, (b, a) in enumerate(zip(before, after, strict=True)):
            assert_same(b, a, (*where, i))
    else:
        assert before == after, where


def numbers_in(result):
    """All numbers of a result, copied."""
    if isinstance(result, Tensor):
        return result.detach().clone()
    if isinstance(result, fimlib.Joint):
        return numbers_in(result.state_dict())
    if isinstance(result, fimlib.Derivatives):
        names = [n for block in result.blocks for n in block.inputs]
        return numbers_in([result.outputs, list(result.blocks), list(map(result.jacobian, names))])
    if dataclasses.is_dataclass(result):
        return numbers_in(vars(result))
    if isinstance(result, Mapping):
        return {key: numbers_in(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [numbers_in(value) for value in result]
    return repr(result)


@pytest.fixture(scope="module", autouse=True)
def _what_torch_imports_on_first_use_is_imported():
    """Which adds to the filters of warnings."""
    model, x, labels, _ = case("convolution")
    for ways in CALLS.values():
        with contextlib.suppress(*REFUSALS):
            ways[0](model, x, labels)


REFUSALS = (ValueError, NotImplementedError, RuntimeError, ImportError)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch.func, of weight norm
@pytest.mark.parametrize("name", MODELS)
def test_the_callers_things_stay_and_so_do_the_results(name):
    answered = set()
    for function, ways in CALLS.items():
        for i, way in enumerate(ways):
            model, x, labels, sources = case(name)
            before, around = state_of(model, x), settings()
            try:
                result = way(model, x, labels)
            except REFUSALS:
                result = None
            assert_same(before, state_of(model, x), (function, i))
            assert_same(around, settings(), (function, i))
            if result is None:
                continue
            answered.add(function)
            numbers = numbers_in(result)
            with torch.no_grad():
                for t in (x, *sources, *model.parameters(), *model.buffers()):
                    t.zero_()
            assert_same(numbers, numbers_in(result), (function, i, "later"))
    if name not in ANY_ANSWER:
        assert bool(answered & {"differentiate", "accumulate"}) == (name not in NEVER_ANSWERED)


# The same causes in the same words, everywhere. ------------------------------------------------


class Standardised(nn.Module):
    def forward(self, x):
        return (x - x.mean(0)) / x.var(0, correction=0).sqrt()


def spectral():
    net = mlp()
    nn.utils.spectral_norm(net[0])
    return net.train()


def compiled_inside():
    net = mlp()
    net[1] = torch.compile(net[1])
    return net


X = inputs(3, 3)
CAUSES = {
    "compiled inside": (compiled_inside, X, NotImplementedError, "'1' is compiled .* _orig_mod"),
    "no hidden units": (
        lambda: nn.Sequential(nn.Linear(3, 0), nn.Tanh(), nn.Linear(0, 2)),
        X,
        ValueError,
        r"'0.weight' has no entries, its shape being \[0, 3\]: remove its layer",
    ),
    "no outputs": (lambda: nn.Sequential(nn.Linear(3, 0)), X, ValueError, "'0.weight' has no entr"),
    "batch statistics": (
        lambda: mlp(nn.BatchNorm1d(3, track_running_stats=False)),
        X,
        ValueError,
        r"'0' \(BatchNorm1d\) has no running statistics.*in eval mode, too",
    ),
    "power iteration": (spectral, X, ValueError, r"'0' \(Linear\) is in training mode.*eval\(\)"),
    "one index per input": (
        embedding, torch.tensor([1, 2, 3]), ValueError, r"got \[3\]: .*x\[:, None\].*x\[:, 0\]",
    ),
    "one number per input": (mlp, X[:, 0], ValueError, r"got \[3\]: .*single input .*x\[None\]"),
    "no value for one input": (
        lambda: mlp(Standardised()),
        X[:1],
        ValueError,
        "NaN or infinite values.* has no value for 1 of these",
    ),
    "positions": (
        lambda: Own(lambda m, x: m.a(x)[:, :, None], a=nn.Linear(3, 2)),
        X,
        ValueError,
        r"\[\d, 2, 1\]: a family describes one label per input.* pick one, as h\[:, -1\]",
    ),
    "no T": (
        lambda: Own(lambda m, x: m.a(x)[:, :0], a=nn.Linear(3, 2)),
        X,
        ValueError,
        "the model returns no outputs: T must be at least 1",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # torch's, of what it imports, and of zero elements
@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("name", CAUSES)
def test_every_function_names_the_cause(name, function):
    make, x, error, message = CAUSES[name]
    model = make().double()
    model = model if name == "power iteration" else model.eval()
    zeros = torch.zeros(len(x), 2).double()
    with pytest.raises(error, match=message):
        CALLS[function][0](model, x, FAMILY.observed(zeros, zeros))


@pytest.mark.filterwarnings("ignore")  # torch's, of what it imports
@pytest.mark.parametrize("function", CALLS)
def test_a_compiled_network_is_the_one_that_was_compiled(function):
    for way in CALLS[function][:3]:
        plain, x, labels, _ = case("dropout")
        expected = numbers_in(way(plain, x, labels))
        if function == "plan":  # but for the time
            expected = expected[:3]
        compiled = torch.compile(plain)
        compiled.named_parameters = plain.named_parameters  # in whose names the functions are asked
        found = numbers_in(way(compiled, x, labels))
        assert_same(expected, found[:3] if function == "plan" else found, (function,))


@pytest.mark.parametrize("times", [3, pytest.param(7, marks=pytest.mark.full)])
@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("name", ["in place first", "counts its calls", "convolution"])
def test_the_callers_things_stay_where_a_call_breaks_off(name, function, times):
    for way in CALLS[function][:: 5 if len(CALLS[function]) > 5 else 1]:
        counted = Failing(-1)
        model, x, labels, _ = case(name)
        with contextlib.suppress(*REFUSALS), counted:
            way(model, x, labels)
        operations = -1 - counted.left
        for passes in range(3, operations, max(1, operations // times)):
            model, x, labels, _ = case(name)
            before, around = state_of(model, x), settings()
            with pytest.raises((KeyboardInterrupt, *REFUSALS)), Failing(passes):
                way(model, x, labels)
            assert_same(before, state_of(model, x), (function, passes))
            assert_same(around, settings(), (function, passes))


def test_unusual_settings_stay():
    """So that nothing is set to what it mostly is."""
    model, x, labels, _ = case("batch norm")
    backends = torch.backends
    fastpath = backends.mha.get_fastpath_enabled()
    backends.mha.set_fastpath_enabled(not fastpath)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_dtype(torch.float64)
    try:
        with (
            torch.no_grad(),
            torch.autograd.set_detect_anomaly(True, check_nan=False),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            before, around = state_of(model, x), settings()
            for function, ways in CALLS.items():
                for i, way in enumerate(ways[:: max(1, len(ways) // 3)]):  # slow in this mode
                    with contextlib.suppress(*REFUSALS):
                        way(model, x, labels)
                    assert_same(before, state_of(model, x), (function, i))
                    assert_same(around, settings(), (function, i))
    finally:
        backends.mha.set_fastpath_enabled(fastpath)
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)


def test_an_input_that_requires_gradients_gets_none():
    for function, ways in CALLS.items():
        for i, way in enumerate(ways):
            model, x, labels, _ = case("in place first")
            x.requires_grad_()
            before = state_of(model, x)
            try:
                result = way(model, x, labels)
            except REFUSALS:
                continue
            assert_same(before, state_of(model, x), (function, i))
            tensors = [t for t in leaves(result) if isinstance(t, Tensor)]
            assert not any(t.requires_grad for t in tensors), (function, i)


def leaves(result):
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, list | tuple):
        return [leaf for value in result for leaf in leaves(value)]
    return leaves(vars(result)) if dataclasses.is_dataclass(result) else [result]


# What comes of each of them. --------------------------------------------------------------------


FAMILIES = {
    "categorical": (fimlib.Categorical(), lambda h: torch.arange(len(h)) % h.shape[1]),
    "bernoulli": (fimlib.Bernoulli(), lambda h: (h > 0).double()),
    "poisson": (fimlib.Poisson(), lambda h: h.square().round()),
    "gaussian": (fimlib.Gaussian(), lambda h: h + 1),
    "gaussian head": (fimlib.GaussianHead(), lambda h: h[:, :2] + 1),
}


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_labels_keep_what_they_were_made_of(case, kind):
    family, make = FAMILIES[case]
    h = inputs(3, 4)
    y = make(h)
    given = y if kind == "tensor" else y.numpy()
    found = [family.observed(h, given), family.observed(h, y[:, None])]
    found.append(family.sample(h, 3, torch.Generator().manual_seed(0)))
    q = torch.softmax(h, 1)
    if case == "categorical":
        found.append(family.expected(h, q))
    D = torch.ones(3, 4, 2).double()
    before = [(labels.project(D), labels.mean_residual()) for labels in found]
    for t in (h, y, q):
        t.zero_()
    after = [(labels.project(D), labels.mean_residual()) for labels in found]
    assert_same(before, after, (case,))


def test_a_covariance_is_read_once():
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    family, h = fimlib.Gaussian(covariance), inputs(2, 2)
    before = family.covariance(h)
    covariance.zero_()
    assert torch.equal(family.covariance(h), before)


def test_a_stream_may_use_one_buffer_for_all_its_batches():
    model, x, _, _ = case("in place first")
    x = inputs(9, 3)

    def stream():
        buffer = torch.empty(3, 3).double()
        for part in x.split(3):
            yield buffer.copy_(part)

    found = fimlib.accumulate(model, stream(), FAMILY)
    expected = fimlib.accumulate(model, x, FAMILY)
    summary = fimlib.summarise(model, stream(), FAMILY)
    for name, I in expected.fisher_information().items():
        for joint in (found, summary.joint):
            assert torch.allclose(joint.fisher_information()[name], I, rtol=1e-12)


def test_a_module_that_works_in_place_first_is_differentiated_at_x():
    """The forward pass that confirms the layers is one at x, too."""
    model, x, _, _ = case("in place first")
    plain = nn.Sequential(nn.Hardswish(), *model[1:])
    for choice in choices():
        try:
            found = fimlib.differentiate(model, x, **choice)
        except NotImplementedError:
            assert choice in ({"engine": "functional", "order": 2},), choice
            continue
        for name, _ in model.named_parameters():
            expected = fimlib.differentiate(plain, x, order=1).jacobian(name)
            assert torch.allclose(found.jacobian(name), expected, rtol=1e-10, atol=1e-14)
