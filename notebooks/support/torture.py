"""``make bench TORTURE=1``: small networks that go wrong, the right I, and what libraries answer.

The right value comes from difference quotients of the outputs, each input by itself, in float64: it
needs no autograd. A network whose outputs for one input are no function of that input has none.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset

import fimlib
from support import results
from support.bench import candidates, tables
from support.bench.networks import Network

FOUND = results.ROOT / "data" / "torture.json"
TOLERANCE = 1e-5  # relative, of a tensor's norm
STEP = 1e-3  # of a difference quotient of fourth order, in units of the parameter's size
INPUTS = 4
PACKAGES = (
    "torch",
    "backpack-for-pytorch",
    "nngeometry",
    "curvlinops-for-pytorch",
    "laplace-torch",
)
LAPLACE = "laplace-torch"
Diagonal = dict[str, Tensor]
CLASSES = fimlib.Categorical()


@dataclass(frozen=True)
class Trap:
    """A network, and what is hard about it."""

    group: str  # of the page
    what: str  # the network, in a few words
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]  # makes its inputs, [B, ...]
    hard: str  # what may go wrong
    refused: bool = False  # whether fimlib has to refuse it
    training: bool = False  # whether it stays in training mode


# The right value.


def outputs_alone(model: nn.Module, x: Tensor) -> Tensor:
    """Of each input by itself, [B, T]."""
    with torch.no_grad():
        return torch.cat([model(one[None].clone()) for one in x])


def is_function_of_each(trap: Trap) -> bool:
    """Whether an input's outputs are the same alone, in the batch, and once more."""
    model, x = problem(trap)
    with torch.no_grad():
        whole, again = (model(x.clone()) for _ in range(2))
    try:
        alone = outputs_alone(model, x)
    except ValueError:  # of batch norm, which takes no single input
        return False
    return all(torch.allclose(whole, h, rtol=1e-9, atol=1e-12) for h in (again, alone))


def right(trap: Trap) -> Diagonal | None:
    """The mean of I over the inputs; None where it does not exist."""
    if not is_function_of_each(trap):
        return None
    model, x = problem(trap)
    h = outputs_alone(model, x).nan_to_num(neginf=-1e9)  # p = 0 in either case
    found = {}
    for name, parameter in model.named_parameters():
        numbers = parameter.data.view(-1)
        size = max(float(numbers.square().mean().sqrt()), 0.1)
        columns = [slope(model, x, numbers, i, STEP * size) for i in range(len(numbers))]
        J = torch.stack(columns, 2)  # [B, T, numel]
        found[name] = CLASSES.information(h, J).mean(0).view(parameter.shape)
    return found


def slope(model: nn.Module, x: Tensor, flat: Tensor, i: int, step: float) -> Tensor:
    """∂h along one entry, [B, T], from four values of h."""
    before = flat[i].clone()
    at = {}
    for k in (-2, -1, 1, 2):
        flat[i] = before + k * step
        at[k] = outputs_alone(model, x)
    flat[i] = before
    found = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)
    return found.masked_fill(at[1].isinf(), 0.0)  # of a class that cannot occur


# The answers.


def ours(model: nn.Module, x: Tensor, _: Network) -> Diagonal:
    """``fimlib.accumulate``."""
    return fimlib.accumulate(model, x, CLASSES, quantities=["I"]).fisher_information()


def dense_curvlinops(model: nn.Module, x: Tensor, _: Network) -> Diagonal:
    """The diagonal of curvlinops' Gauss–Newton matrix, which equals I for these losses."""
    from curvlinops import GGNLinearOperator

    parameters = list(model.parameters())
    batch = [(x, torch.zeros(len(x), dtype=torch.long))]
    operator = GGNLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, batch, check_deterministic=False
    )
    identity = torch.eye(operator.shape[1], dtype=torch.float64)
    return candidates.split(model, (operator @ identity).diagonal())


def laplace_diagonal(model: nn.Module, x: Tensor, _: Network) -> Diagonal:
    """The precision that laplace-torch adds to the prior's, over the number of inputs."""
    laplace = importlib.import_module("laplace")
    data = TensorDataset(x, torch.zeros(len(x), dtype=torch.long))
    model.requires_grad_()  # it reports what is trained
    fitted = laplace.Laplace(
        model, "classification", subset_of_weights="all", hessian_structure="diag"
    )
    fitted.fit(DataLoader(data, batch_size=len(x)))
    return candidates.split(model, fitted.H / len(x))


def of(prepare: candidates.Prepare) -> Callable[[nn.Module, Tensor, Network], Diagonal]:
    """A candidate of the benchmark."""

    def answer(model: nn.Module, x: Tensor, network: Network) -> Diagonal:
        y = torch.zeros(len(x), dtype=torch.long)
        return prepare(model, network)(x, y)["I"]

    return answer


LIBRARIES: Mapping[str, Callable[[nn.Module, Tensor, Network], Diagonal]] = {
    "fimlib": ours,
    "torch.func": of(candidates.jacobians),
    "BackPACK": of(candidates.backpack_fisher(monte_carlo=False)),
    "nngeometry": of(candidates.nngeometry_fisher(monte_carlo=False)),
    "curvlinops": dense_curvlinops,
    LAPLACE: laplace_diagonal,
}


def installed() -> list[str]:
    """The libraries that can be asked; laplace-torch is installed by hand."""
    try:
        importlib.import_module("laplace")
    except (ImportError, RuntimeError) as error:  # of torchvision beside another torch
        print(f"{LAPLACE} is left out: {error}", flush=True)
        return [library for library in LIBRARIES if library != LAPLACE]
    return list(LIBRARIES)


def problem(trap: Trap) -> tuple[nn.Module, Tensor]:
    """The network and its inputs, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = trap.make().double().train(trap.training)
        x = trap.inputs()
    return model, x.double() if x.is_floating_point() else x


def answer(trap: Trap, library: str, expected: Diagonal | None) -> dict[str, Any]:
    """What a library says: right, wrong, refused, with the seconds that it took.

    "no value" is a number where none exists; a refusal is any exception.
    """
    model, x = problem(trap)
    width = problem(trap)[0](x.clone()).shape[1]
    network = Network(trap.what, tuple(x.shape[1:]), trap.make, width)
    with quietly():
        start = time.perf_counter()
        try:
            found = LIBRARIES[library](model, x, network)
        except ImportError:
            raise
        except Exception as error:  # of any kind, from any library
            said = str(error).strip().splitlines() or [""]
            return {"answer": "refused", "why": f"{type(error).__name__}: {said[0]}"[:200]}
        seconds = time.perf_counter() - start
    if expected is None:
        return {"answer": "no value", "seconds": seconds}
    off = distance(found, expected)
    verdict = "right" if off <= TOLERANCE else "wrong"
    told = off if math.isfinite(off) else None  # which JSON knows
    return {"answer": verdict, "seconds": seconds, "distance": told}


@contextmanager
def quietly() -> Iterator[None]:
    """In float64, which some libraries take from torch's default; what they print is left out."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def distance(found: Diagonal, expected: Diagonal) -> float:
    """The largest over the tensors, ‖found − expected‖ / ‖expected‖; infinite for NaN."""
    most = max(float(t.norm()) for t in expected.values()) or 1.0
    worst = 0.0
    for name, t in expected.items():
        own = found.get(name, torch.zeros_like(t)).detach().double()
        off = float((own - t).norm()) / max(float(t.norm()), 1e-9 * most)
        worst = max(worst, off if math.isfinite(off) else math.inf)
    return worst


# The networks.


class By(nn.Module):
    """Layers, and a function of them and the input."""

    def __init__(self, forward: Callable[..., Tensor], **layers: Any) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            if isinstance(layer, nn.Parameter | nn.Module):
                setattr(self, name, layer)
            else:
                self.register_buffer(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """The function."""
        return self.function(self, x)


def around(module: nn.Module, width: int = 4, inner: int | None = None) -> nn.Sequential:
    """A module between two linear layers."""
    inner = inner or width
    return nn.Sequential(nn.Linear(3, width), module, nn.Tanh(), nn.Linear(inner, 3))


def images(module: nn.Module, features: int) -> nn.Sequential:
    """A module between a convolution and a linear layer, on images of 6 × 6."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), module, nn.Flatten(), nn.Linear(features, 3)
    )


def vectors() -> Tensor:
    """[B, 3]."""
    return torch.randn(INPUTS, 3)


def pictures() -> Tensor:
    """[B, 1, 6, 6]."""
    return torch.randn(INPUTS, 1, 6, 6)


def words() -> Tensor:
    """[B, 5]."""
    return torch.randint(1, 7, (INPUTS, 5))


def rows() -> Tensor:
    """[B, 5, 3]."""
    return torch.randn(INPUTS, 5, 3)


class Doubled(torch.autograd.Function):
    """x², whose backward() is twice too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Squares."""
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Twice the derivative."""
        found: Tensor = 4 * ctx.saved_tensors[0] * grad
        return found


doubled: Any = Doubled.apply


class Counts(nn.Module):
    """Another function at every call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Scales by the number of calls."""
        self.calls += 1
        return x * self.calls


def tied_transpose(m: Any, x: Tensor) -> Tensor:
    """A weight, and its transpose."""
    h: Tensor = torch.tanh(x @ m.w) @ m.w.T
    return h


def scan(m: Any, x: Tensor) -> Tensor:
    """A state that decays at a learned rate, row by row."""
    state = x.new_zeros(len(x), 3)
    for row in x.unbind(1):
        state = torch.sigmoid(m.rate) * state + m.into(row)
    h: Tensor = m.out(state)
    return h


def hyper(m: Any, x: Tensor) -> Tensor:
    """Weights that another layer computes from the input."""
    weight = m.makes(x).view(-1, 3, 3)
    return torch.einsum("bij,bj->bi", weight, torch.tanh(x))


def experts(m: Any, x: Tensor, hard: bool) -> Tensor:
    """Two linear experts, mixed by a gate, or one of them chosen."""
    gate = m.gate(x).softmax(1)
    if hard:
        gate = gate * (gate == gate.amax(1, keepdim=True))
    h: Tensor = gate[:, :1] * m.a(x) + gate[:, 1:] * torch.tanh(m.b(x))
    return h


def attend(m: Any, x: Tensor, mask: bool = False) -> Tensor:
    """Attention over the rows, and their mean."""
    padding = torch.arange(x.shape[1]).expand(x.shape[:2]) >= 4 if mask else None
    z, _ = m.attention(x, x, x, key_padding_mask=padding, need_weights=False)
    h: Tensor = m.out((x + z).mean(1))
    return h


def class_token(m: Any, x: Tensor) -> Tensor:
    """A learned row in front of the others."""
    z = torch.cat([m.token.expand(len(x), 1, 3), x + m.places], 1)
    z, _ = m.attention(z, z, z, need_weights=False)
    h: Tensor = m.out(z[:, 0])
    return h


def attention() -> nn.MultiheadAttention:
    """One head of width 3."""
    return nn.MultiheadAttention(3, 1, batch_first=True)


def in_place(m: Any, x: Tensor) -> Tensor:
    """Writes to the input, to a view, and adds in place."""
    x.mul_(2)
    z = m.a(x)
    z.view(-1)[:].tanh_()
    z += x
    h: Tensor = m.b(z)
    return h


def lora(m: Any, x: Tensor) -> Tensor:
    """A frozen weight with a product of two small ones added."""
    h: Tensor = m.out(torch.tanh(m.base(x) + x @ m.A @ m.B))
    return h


def unet(m: Any, x: Tensor) -> Tensor:
    """Down, up, and a skip."""
    a = torch.tanh(m.first(x))
    b = functional.interpolate(torch.tanh(m.down(functional.avg_pool2d(a, 2))), scale_factor=2)
    h: Tensor = m.out(torch.cat([a, b], 1)).mean((2, 3))
    return h


def squeeze(m: Any, x: Tensor) -> Tensor:
    """Channels scaled by a gate of their means."""
    z = torch.tanh(m.conv(x))
    gate = torch.sigmoid(m.gate(z.mean((2, 3))))
    h: Tensor = m.out((z * gate[:, :, None, None]).flatten(1))
    return h


def checkpointed(m: Any, x: Tensor) -> Tensor:
    """Recomputed in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    h: Tensor = m.b(checkpoint(lambda z: torch.tanh(m.a(z)), x, use_reentrant=False))
    return h


def pair(**more: Any) -> dict[str, Any]:
    """Two linear layers a and b."""
    return {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), **more}


def changed(change: Callable[[nn.Module], object]) -> nn.Sequential:
    """Two linear layers, the first of which is changed."""
    net = around(nn.Identity())
    change(net[0])
    return net


def scaled_logits(scale: float) -> nn.Sequential:
    """Logits so large that the softmax is sure, or not."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), By(lambda _, h: scale * h))


def masked_logits(value: float) -> nn.Sequential:
    """The last class cannot occur."""
    mask = torch.tensor([0.0, 0.0, value])
    return nn.Sequential(nn.Linear(3, 3), By(lambda m, h: h + m.mask, mask=mask))


def dead() -> nn.Sequential:
    """All ReLUs are off."""
    first = nn.Linear(3, 4)
    first.bias.data.fill_(-9.0)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(4, 3))


CUT = "autograd's derivative is not that of the values"
MIXED = "an input's outputs depend on the others, on the calls, or on chance"


def traps() -> Iterator[Trap]:
    """All of them."""

    def image(what: str, module: Callable[[], nn.Module], features: int, hard: str) -> Trap:
        return Trap("Images", what, lambda: images(module(), features), pictures, hard)

    yield image("adaptive pooling, 6 → 4", lambda: nn.AdaptiveAvgPool2d(4), 32, "uneven bins")
    yield image("overlapping max pooling", lambda: nn.MaxPool2d(3, 2), 8, "one pixel in two bins")
    yield image("power pooling", lambda: nn.LPPool2d(2, 2), 18, "a root of a sum of squares")
    for mode in ("circular", "reflect", "replicate"):
        yield image(
            f"convolution with {mode} padding",
            partial(nn.Conv2d, 2, 2, 3, padding=1, padding_mode=mode),
            72,
            "a pixel enters at several places",
        )
    yield image(
        "grouped, strided, dilated convolution",
        lambda: nn.Conv2d(2, 4, 2, stride=2, dilation=2, groups=2),
        16,
        "index arithmetic",
    )
    yield image("transposed convolution", lambda: nn.ConvTranspose2d(2, 1, 2, 2), 144, "the same")
    yield image("pixel unshuffle", lambda: nn.PixelUnshuffle(2), 72, "a permutation")
    yield image("channel shuffle", lambda: nn.ChannelShuffle(2), 72, "a permutation")
    yield image("unfold", lambda: nn.Unfold(2, stride=2), 72, "patches as columns")
    yield Trap(
        "Images",
        "U-Net",
        lambda: By(
            unet,
            first=nn.Conv2d(1, 2, 3, padding=1),
            down=nn.Conv2d(2, 2, 1),
            out=nn.Conv2d(4, 3, 1),
        ),
        pictures,
        "a skip, and an upsampling",
    )
    yield Trap(
        "Images",
        "squeeze and excitation",
        lambda: By(squeeze, conv=nn.Conv2d(1, 2, 3, 2), gate=nn.Linear(2, 2), out=nn.Linear(8, 3)),
        pictures,
        "products of activations",
    )
    group = "Branches and shared weights"

    def dense(what: str, make: Callable[[], nn.Module], hard: str, **more: Any) -> Trap:
        return Trap(group, what, make, vectors, hard, **more)

    yield dense(
        "parallel branches", lambda: By(lambda m, x: m.a(x) + torch.tanh(m.b(x)), **pair()), "a sum"
    )
    yield dense(
        "concatenation",
        lambda: By(
            lambda m, x: m.c(torch.cat([m.a(x).tanh(), m.b(x)], 1)), **pair(c=nn.Linear(6, 3))
        ),
        "two sources",
    )
    yield dense(
        "a layer used twice",
        lambda: By(lambda m, x: m.a(m.a(x).tanh()), a=nn.Linear(3, 3)),
        "its derivatives add before they are squared",
    )
    yield dense(
        "a weight and its transpose",
        lambda: By(tied_transpose, w=nn.Parameter(torch.randn(3, 4))),
        "the same",
    )
    yield dense("weight norm", lambda: changed(parametrizations.weight_norm), "a computed weight")
    yield dense(
        "spectral norm", lambda: changed(parametrizations.spectral_norm), "a computed weight"
    )
    yield dense(
        "a pruned layer",
        lambda: changed(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
        "a masked weight",
    )
    yield dense(
        "LoRA",
        lambda: By(
            lora,
            base=nn.Linear(3, 4),
            A=nn.Parameter(torch.randn(3, 1)),
            B=nn.Parameter(torch.randn(1, 4)),
            out=nn.Linear(4, 3),
        ),
        "parameters outside of layers",
    )
    yield dense(
        "weights from another layer",
        lambda: By(hyper, makes=nn.Linear(3, 9)),
        "a weight of each input's own",
    )
    yield dense(
        "experts, mixed",
        lambda: By(lambda m, x: experts(m, x, False), **pair(gate=nn.Linear(3, 2))),
        "products",
    )
    yield dense(
        "experts, one chosen",
        lambda: By(lambda m, x: experts(m, x, True), **pair(gate=nn.Linear(3, 2))),
        "a choice for every input",
    )
    yield dense("gated linear unit", lambda: around(nn.GLU(), 8, 4), "half gates the other half")
    yield dense(
        "a scalar parameter",
        lambda: By(
            lambda m, x: m.scale * m.a(x).tanh(),
            a=nn.Linear(3, 3),
            scale=nn.Parameter(torch.tensor(0.7)),
        ),
        "broadcast over everything",
    )
    yield dense(
        "in-place operations, also on the input",
        lambda: By(in_place, **pair()),
        "what a layer kept is overwritten",
    )
    yield dense(
        "in-place activation first",
        lambda: nn.Sequential(nn.ReLU(True), nn.Linear(3, 3)),
        "the caller's input",
    )
    yield dense("a layer that is never used", lambda: By(lambda m, x: m.a(x), **pair()), "I = 0")
    yield dense(
        "a frozen first layer",
        lambda: changed(lambda layer: layer.requires_grad_(False)),
        "no gradient is kept",
    )
    yield dense(
        "checkpointed block", lambda: By(checkpointed, **pair()), "the forward pass runs twice"
    )
    group = "Norms"
    yield dense("layer norm", lambda: around(nn.LayerNorm(4)), "units depend on each other")
    yield dense(
        "layer norm of one number", lambda: around(nn.LayerNorm((1,)), 1), "I = 0 before it"
    )
    yield dense("group norm", lambda: around(nn.GroupNorm(2, 4)), "the same")
    yield Trap(
        group,
        "instance norm",
        lambda: images(nn.InstanceNorm2d(2, affine=True), 72),
        pictures,
        "the same",
    )
    yield dense("batch norm in eval mode", lambda: around(nn.BatchNorm1d(4)), "a linear layer then")
    yield dense("root mean square norm", lambda: around(nn.RMSNorm(4)), "the same")
    yield dense(
        "batch norm in training mode",
        lambda: around(nn.BatchNorm1d(4)),
        MIXED,
        refused=True,
        training=True,
    )
    group = "Sequences"

    def text(what: str, make: Callable[[], nn.Module], hard: str) -> Trap:
        return Trap(group, what, make, words, hard)

    def series(what: str, make: Callable[[], nn.Module], hard: str) -> Trap:
        return Trap(group, what, make, rows, hard)

    table = partial(nn.Embedding, 7, 3)
    yield text(
        "embedding",
        lambda: By(lambda m, x: m.out(m.t(x).mean(1)), t=table(), out=nn.Linear(3, 3)),
        "a row for each word",
    )
    yield text(
        "embedding with a padding index",
        lambda: By(lambda m, x: m.t(x).sum(1), t=table(padding_idx=1)),
        "autograd gives that row no gradient",
    )
    yield text(
        "sparse embedding",
        lambda: By(lambda m, x: m.t(x).sum(1), t=table(sparse=True)),
        "sparse gradients",
    )
    yield text(
        "embedding bag",
        lambda: By(lambda m, x: m.t(x).tanh(), t=nn.EmbeddingBag(7, 3)),
        "a mean of rows",
    )
    yield text(
        "tied embedding",
        lambda: By(lambda m, x: m.t(x).mean(1).tanh() @ m.t.weight.T, t=table()),
        "the table is the last layer, too",
    )
    yield series(
        "LSTM",
        lambda: By(
            lambda m, x: m.out(m.r(x)[0][:, -1]),
            r=nn.LSTM(3, 3, batch_first=True),
            out=nn.Linear(3, 3),
        ),
        "weights at every step",
    )
    yield series(
        "GRU in both directions",
        lambda: By(
            lambda m, x: m.r(x)[0].mean(1), r=nn.GRU(3, 2, batch_first=True, bidirectional=True)
        ),
        "the same",
    )
    yield series(
        "attention", lambda: By(attend, attention=attention(), out=nn.Linear(3, 3)), "products"
    )
    yield series(
        "attention with padding",
        lambda: By(lambda m, x: attend(m, x, True), attention=attention(), out=nn.Linear(3, 3)),
        "a mask",
    )
    yield series(
        "class token and places",
        lambda: By(
            class_token,
            token=nn.Parameter(torch.randn(1, 1, 3)),
            places=nn.Parameter(torch.randn(5, 3)),
            attention=attention(),
            out=nn.Linear(3, 3),
        ),
        "broadcast parameters, a slice",
    )
    yield series(
        "a state with a learned decay",
        lambda: By(
            scan, rate=nn.Parameter(torch.randn(3)), into=nn.Linear(3, 3), out=nn.Linear(3, 3)
        ),
        "a loop",
    )
    yield series(
        "Fourier layer",
        lambda: By(
            lambda m, x: (
                torch.fft.irfft(torch.fft.rfft(x, dim=1) * m.filter[:, None], n=5, dim=1).mean(1)
                @ m.w
            ),
            filter=nn.Parameter(torch.randn(3)),
            w=nn.Parameter(torch.randn(3, 3)),
        ),
        "complex numbers in between",
    )
    yield series(
        "graph convolution",
        lambda: By(
            lambda m, x: m.out((m.links @ m.a(x)).tanh().mean(1)),
            **pair(out=nn.Linear(3, 3), links=torch.eye(5).roll(1, 0) / 2),
        ),
        "a fixed matrix",
    )
    yield series(
        "running sums",
        lambda: By(lambda m, x: m.a(x).cumsum(1).tanh().mean(1), a=nn.Linear(3, 3)),
        "every step sees those before",
    )
    group = "Outputs"
    yield dense("logits × 10", lambda: scaled_logits(10), "large numbers")
    yield dense("logits × 1e8", lambda: scaled_logits(1e8), "the network is sure, I = 0")
    yield dense("a class masked by −1e9", lambda: masked_logits(-1e9), "p = 0")
    yield dense("a class masked by −∞", lambda: masked_logits(-math.inf), "−∞ · 0 is NaN")
    yield dense("1,000 classes", lambda: nn.Linear(3, 1000), "as many passes")
    yield dense("two classes", lambda: nn.Linear(3, 2), "the least number")
    yield dense("dead ReLUs", dead, "I = 0 before them")
    yield dense(
        "log-softmax as the last layer",
        lambda: nn.Sequential(nn.Linear(3, 3), nn.LogSoftmax(1)),
        "a shift by each input's own number",
    )
    group = "No answer"

    def refused(what: str, module: Callable[[], nn.Module], hard: str, **more: Any) -> Trap:
        return dense(what, lambda: around(module()), hard, refused=True, **more)

    yield refused(
        "straight-through estimator", lambda: By(lambda _, s: s + (s.sign() - s).detach()), CUT
    )
    yield refused("a detached factor", lambda: By(lambda _, s: s * s.sigmoid().detach()), CUT)
    yield refused(
        "a number read by item()",
        lambda: By(
            lambda _, s: torch.cat([row / (1 + row.abs().max().item()) for row in s.split(1)])
        ),
        CUT,
    )
    yield refused("a wrong backward()", lambda: By(lambda _, s: doubled(s)), CUT)
    yield refused("minus the batch's mean", lambda: By(lambda _, s: s - s.mean(0)), MIXED)
    yield refused("times the batch's largest number", lambda: By(lambda _, s: s * s.max()), MIXED)
    yield refused("a function that counts its calls", Counts, MIXED)
    yield refused("dropout in training mode", nn.Dropout, MIXED, training=True)
    yield refused("dropout by hand", lambda: By(lambda _, s: functional.dropout(s, 0.5)), MIXED)
    yield refused(
        "bfloat16 in between",
        lambda: By(lambda _, s: s.bfloat16().tanh().to(s)),
        "rounded to three digits",
    )


# The page.


def measure() -> dict[str, Any]:
    """What each library says of each network."""
    started = time.time()
    torch.set_num_threads(1)
    rows, libraries = [], installed()
    for trap in traps():
        expected = right(trap)
        said = {library: answer(trap, library, expected) for library in libraries}
        rows.append({"network": trap.what, "has_value": expected is not None, "answers": said})
        print(f"{trap.what}: {', '.join(map(shown, said.values()))}", flush=True)
    made = results.record({}, {}, started, torch.device("cpu"))
    packages = [p for p in PACKAGES if p != LAPLACE or LAPLACE in libraries]
    versions = {package: results.version(package) for package in packages}
    kept = ("started", "seconds", "commit")
    return {"record": {k: made[k] for k in kept} | {"versions": versions}, "rows": rows}


def shown(said: Mapping[str, Any]) -> str:
    """A cell: right, wrong and by how much, refused, or a number where there is none."""
    if said["answer"] == "wrong":
        off = said["distance"]
        if off is None:
            return "**NaN**"
        return "**wrong**, far off" if off > 10 else f"**wrong**, {off:.0%}".replace("%", " %")
    return "**a number**" if said["answer"] == "no value" else str(said["answer"])


def page(found: Mapping[str, Any] | None) -> str:
    """The counts, and a table for every group."""
    if found is None:
        return "Nothing was tried yet: `make bench TORTURE=1` does it in a minute.\n"
    made = {row["network"]: row for row in found["rows"]}
    libraries = list(found["rows"][0]["answers"])
    head = ["network", "what is hard", *libraries]
    groups: dict[str, list[list[str]]] = {}
    for trap in traps():
        said = made[trap.what]["answers"]
        cells = [trap.what, trap.hard, *(shown(said[library]) for library in libraries)]
        groups.setdefault(trap.group, []).append(cells)
    parts = [counts(found["rows"])]
    for group, body in groups.items():
        parts += [f"## {group}\n", tables.table(head, body)]
    versions = ", ".join(f"{k} {v}" for k, v in found["record"]["versions"].items())
    return "\n".join([*parts, f"Measured with {versions}.\n"])


def counts(rows: list[dict[str, Any]]) -> str:
    """How often each library was right, wrong, and refused."""
    body, libraries = [], list(rows[0]["answers"])
    for library in libraries:
        said = [row["answers"][library]["answer"] for row in rows]
        kinds = [said.count(kind) for kind in ("right", "refused", "wrong", "no value")]
        seconds = [
            row["answers"][library]["seconds"]
            for row in rows
            if all(row["answers"][other]["answer"] == "right" for other in libraries)
        ]
        time_of = f"{1e3 * statistics.median(seconds):.0f} ms" if seconds else ""
        body.append([library, *map(str, kinds), time_of])
    head = ["library", "right", "refused", "wrong", "a number where none exists", "median time"]
    return tables.table(head, body)


if __name__ == "__main__":
    results.write_text(FOUND, json.dumps(measure(), indent=1, ensure_ascii=False) + "\n")
