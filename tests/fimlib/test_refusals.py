"""What is refused, and what no longer is: right values, or one cause and a remedy that works.

Every row is a network and a call. Where there is an answer, it agrees with difference quotients of
the outputs. Where there is none, the message names the cause; all that it advises is done here.
"""

import ast
import copy
import functools
import re
import threading
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lying import CutSine, EnlargedSine, Sine, SineWithRules
from strategies import inputs
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import fimlib
from fimlib import differentiate
from fimlib.engines import forward_mode
from fimlib.engines.model import private_copy

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning"),
]
MOST = 380  # characters of a message
X, IDS = inputs(3, 4), torch.tensor([[0, 3, 1, 1], [2, 2, 4, 0], [1, 4, 0, 3]])
STEPS = (2e-3, 2e-4)


class Own(nn.Module):
    """A forward() of one's own over a few layers."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.how = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.how(self, x)


def mid(f, **parts):
    """A function between two layers."""
    return Own(lambda m, x: m.b(f(m, m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 2), **parts)


def plain(f):
    return mid(lambda _, s: f(s))


def row(*modules):
    return nn.Sequential(nn.Linear(4, 4), *modules, nn.Linear(4, 2))


def last(f):
    """A function of the outputs."""
    return Own(lambda m, x: f(m.a(x)), a=nn.Linear(4, 2))


def looked_up(f=lambda m, x: m.e(x).mean(1), **options):
    table = nn.Embedding(5, 3, **options)
    return Own(lambda m, x: m.o(f(m, x).tanh()), e=table, o=nn.Linear(3, 2))


def bag(**options):
    parts = {"e": nn.EmbeddingBag(5, 3, **options), "n": nn.LayerNorm(3), "o": nn.Linear(3, 2)}
    return Own(lambda m, x: m.o(m.n(m.e(x)).tanh()), **parts)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


# Networks. --------------------------------------------------------------------------------------


class Ste(nn.Module):
    def forward(self, x):
        return x + (torch.sign(x) - x).detach()


class NoCopy(nn.Module):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x):
        return x.sin()


class NoForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    return net


def borrowed_bias():
    """A bias made of another layer's outside forward()."""
    net = row(nn.Tanh())
    del net[0]._parameters["bias"]
    net[0].bias = net[2].bias.repeat(2) * 2
    return net


def without_grad(m, x):
    with torch.no_grad():
        z = m.a(x).tanh()
    return m.b(z)


def hooked():
    net = row(nn.Tanh())
    net[1].register_forward_hook(lambda _module, _args, out: 2 * out)
    return net


def hooked_backward():
    net = row(nn.Tanh())
    net[1].register_full_backward_hook(lambda _module, grads, _: (grads[0].clamp(-9, 9),))
    return net


def compiled_and_hooked():
    compiled = torch.compile(row(nn.Tanh()))
    compiled.register_forward_hook(lambda _module, _args, out: 2 * out)
    return compiled


def replaced():
    net = row(nn.Tanh())
    net[1].forward = torch.sin
    return net


def replaced_by_closure():
    net = row(nn.Tanh())
    before = net[0].forward
    net[0].forward = lambda x: before(x).sin()
    return net


def replaced_by_partial():
    """As accelerate does it."""
    net = row(nn.Tanh())
    net[0].before = net[0].forward
    net[0].forward = functools.partial(lambda m, x: m.before(x).sin(), net[0])
    return net


def pruned():
    net = row(nn.Tanh())
    prune.l1_unstructured(net[0], "weight", 0.5)
    return net


def weight_normed():
    net = row(nn.Tanh())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that there is a newer one
        nn.utils.weight_norm(net[0])
    return net


def unit(s):
    """Matrices that can be inverted."""
    return 3 * torch.eye(4).to(s) + s[:, :, None] * s[:, None]


def overwritten(s):
    s = s.sin()
    s[:, 0] += 3 * s[:, 1]
    return s


def heads(s):
    """[B, 2 heads, 2 positions, 1]."""
    return s.view(-1, 2, 2, 1)


class Gpt(nn.Module):
    """Three blocks of width 8; the table of tokens is the last layer's weight, too."""

    def __init__(self, width=8, tokens=5, length=4, blocks=3):
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 2, width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(blocks)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length).to(self.norm.weight)
        z = self.tokens(x) + self.places.weight[:length]
        for block in self.blocks:
            z = block(z, src_mask=mask, is_causal=True)
        return self.head(self.norm(z))[:, -1]


class Attention(nn.Module):
    """Multihead attention over two positions, by whatever masks."""

    def __init__(self, **masks):
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)
        self.head, self.masks = nn.Linear(4, 2), masks

    def forward(self, x):
        z = x.view(len(x), 2, 2)
        masks = {
            k: torch.tensor(v).expand(len(x), -1) if k == "key_padding_mask" else torch.tensor(v)
            for k, v in self.masks.items()
        }
        return self.head(self.attention(z, z, z, **masks)[0].flatten(1))


class Padded(nn.Module):
    """An encoder that is told which positions are none."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(2, 1, 3, 0.0, batch_first=True)
        self.table, self.encoder = (
            nn.Embedding(5, 2),
            nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
        )
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        z = self.encoder(self.table(x), src_key_padding_mask=x == 0)
        return self.head(z.masked_fill((x == 0)[..., None], 0.0).sum(1))


def encoder_layer(**options):
    layer = nn.TransformerEncoderLayer(2, 1, 3, 0.0, batch_first=True, **options)
    return Own(lambda m, x: m.o(m.l(x.view(-1, 2, 2)).flatten(1)), l=layer, o=nn.Linear(4, 2))


def recurrent(kind):
    cell = kind(2, 3, batch_first=True)
    return Own(lambda m, x: m.o(m.r(x.view(-1, 2, 2))[0][:, -1]), r=cell, o=nn.Linear(3, 2))


def lora():
    base = nn.Linear(4, 4).requires_grad_(False)
    adapter = {"down": nn.Linear(4, 1, bias=False), "up": nn.Linear(1, 4, bias=False)}
    return Own(
        lambda m, x: m.head((m.base(x) + m.up(m.down(x))).softmax(1)),
        base=base,
        head=nn.Linear(4, 2),
        **adapter,
    )


def experts():
    parts = {"gate": nn.Linear(4, 2), "p": nn.Linear(4, 2), "q": nn.Linear(4, 2)}

    def forward(m, x):
        weights = m.gate(x).softmax(1)
        return weights[:, :1] * m.p(x).tanh() + weights[:, 1:] * m.q(x).tanh()

    return Own(forward, **parts)


def scan():
    """A state-space model, step by step."""

    def forward(m, x):
        state = x.new_zeros(len(x), 3)
        for one in x.unbind(1):
            state = m.decay.sigmoid() * state + one[:, None] * m.drive
        return m.out(state)

    return Own(forward, decay=parameter(3), drive=parameter(3), out=nn.Linear(3, 2))


def checkpointed():
    return Own(
        lambda m, x: m.o(checkpoint(m.block, x, use_reentrant=False)),
        block=nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh()),
        o=nn.Linear(3, 2),
    )


# The table. -------------------------------------------------------------------------------------


@dataclass
class Case:
    """A call.

    Attributes:
        build: The network.
        x: The inputs.
        says: What the message says, by a pattern; None: there is an answer.
        advice: What the message advises, as in ``ADVICE``; "" nothing.
        mended: The network after a piece of advice in words.
        options: Of ``differentiate``.
    """

    build: Any
    x: Any = field(default_factory=lambda: X)
    says: str | None = None
    advice: str = ""
    mended: Any = None
    options: dict = field(default_factory=dict)


def right(build, x=X, **options):
    return Case(build, x, options=options)


def refused(build, says, advice="", x=X, mended=None, **options):
    return Case(build, x, says, advice, mended, options)


CUT = "autograd's derivative is not the derivative"
MIXES = "depend on the others of the batch"
IN_PLACE = {
    "elu": lambda s: F.elu(s, -0.5, inplace=True),
    "elu_": lambda s: F.elu_(s, -0.5),
    "celu": lambda s: F.celu(s, 0.5, inplace=True),
    "leaky_relu": lambda s: F.leaky_relu(s, -0.5, inplace=True),
    "leaky_relu_": lambda s: F.leaky_relu_(s, -0.5),
    "rrelu": lambda s: F.rrelu(s, -0.5, -0.2, inplace=True),
    "exp_": torch.exp_,
    "mul_": lambda s: s.mul_(s.clone()),
}
ELEMENTWISE_OR_LINEAR = {
    "glu": lambda s: torch.cat([F.glu(s), F.glu(s.sin())], 1),
    "addcmul": lambda s: torch.addcmul(s, s.sin(), s, value=0.3),
    "diag_embed": lambda s: torch.diag_embed(s).sum(1),
    "channel_shuffle": lambda s: F.channel_shuffle(s[..., None, None], 2).flatten(1),
    "lp_pool": lambda s: F.lp_pool1d(s[:, None], 2, 1).flatten(1),
    "log_softmax": lambda s: s.log_softmax(1),
    "a power of both": lambda s: s.exp() ** s,
    "overwritten": overwritten,
}
GENERAL = {
    "solve": lambda s: torch.linalg.solve(unit(s), s),
    "inverse": lambda s: (torch.linalg.inv(unit(s)) @ s[..., None])[..., 0],
    "cholesky": lambda s: torch.linalg.cholesky(unit(s)).sum(1),
    "logdet": lambda s: torch.logdet(unit(s))[:, None] * s,
    "fft": lambda s: torch.fft.fft(s).abs(),
    "cumprod": lambda s: s.cumprod(1),
    "scatter": lambda s: torch.zeros_like(s).scatter(
        1, IDS[:1, :3].expand(len(s), -1) % 4, s[:, :3]
    ),
    "grid_sample": lambda s: (
        F.grid_sample(s.view(-1, 1, 2, 2), s.view(-1, 1, 2, 2).tanh(), align_corners=True)
        .flatten(1)
        .repeat(1, 2)
    ),
    "cdist": lambda s: torch.cdist(s[:, None], unit(s)).flatten(1),
    "bessel_i0": torch.special.i0,
    "vmap": torch.vmap(lambda a: a.sin() * a.mean()),
    "a gradient": torch.vmap(torch.func.grad(lambda a: a.sin().sum() * a.mean())),
    "a function of one's own": Sine.apply,
    "with both rules": SineWithRules.apply,
    "causal": lambda s: F.scaled_dot_product_attention(
        heads(s), heads(s), heads(s), is_causal=True
    ).flatten(1),
}
FIRST = {"order": 1}
CASES = {
    # Answers.
    **{f"in place, {n}": right(lambda f=f: plain(f)) for n, f in IN_PLACE.items()},
    **{
        f"in place after a norm, {n}": right(
            lambda f=f: mid(lambda m, s: f(m.n(s)), n=nn.LayerNorm(4))
        )
        for n, f in IN_PLACE.items()
    },
    **{n: right(lambda f=f: plain(f)) for n, f in (ELEMENTWISE_OR_LINEAR | GENERAL).items()},
    "circular": right(
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 4)),
            nn.Conv1d(1, 1, 1),
            nn.Sigmoid(),
            nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular"),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(8, 2),
        )
    ),
    "shared layer": right(lambda: Own(lambda m, x: m.a(m.a(x).tanh()), a=nn.Linear(4, 4))),
    "tied": right(tied),
    "layer norm": right(lambda: row(nn.LayerNorm(4), nn.Tanh())),
    "one index for each input": right(lambda: looked_up(lambda m, x: m.e(x[:, 0])), IDS),
    "sparse table": right(lambda: looked_up(sparse=True), IDS),
    "sum of a bag": right(lambda: bag(mode="sum"), IDS),
    "mean of a bag": right(lambda: bag(mode="mean"), IDS),
    "maximum of a bag": right(lambda: bag(mode="max"), IDS),
    "padded bag": right(lambda: bag(padding_idx=1), IDS),
    "padded table": right(lambda: looked_up(padding_idx=1), IDS),
    "padded table, first order": right(lambda: looked_up(padding_idx=1), IDS, **FIRST),
    "pruned": right(pruned),
    "weight norm": right(weight_normed),
    "weight norm as a parametrisation": right(
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)
        )
    ),
    "hook": right(hooked),
    "replaced forward": right(replaced),
    "compiled": right(lambda: torch.compile(row(nn.Tanh()))),
    "a part without use": right(lambda: mid(lambda _, s: s.tanh(), c=nn.Linear(3, 3))),
    "head on a frozen backbone": right(
        lambda: Own(without_grad, a=nn.Linear(4, 4), b=nn.Linear(4, 2)), layers=["b"]
    ),
    "encoder layer": right(encoder_layer),
    "encoder layer, norm first": right(lambda: encoder_layer(norm_first=True, activation="gelu")),
    "padding mask": right(Padded, IDS + 1 - (IDS == 4).long() * 5),
    "attention": right(Attention),
    "masked attention": right(lambda: Attention(attn_mask=[[False, True], [False, False]])),
    "padded attention": right(lambda: Attention(key_padding_mask=[False, True])),
    "rnn": right(lambda: recurrent(nn.RNN)),
    "gru": right(lambda: recurrent(nn.GRU)),
    "lstm": right(lambda: recurrent(nn.LSTM)),
    "adapter": right(lora),
    "experts": right(experts),
    "state space": right(scan),
    "checkpoint": right(checkpointed),
    # Not the derivative.
    "straight through": refused(
        lambda: row(Ste()), rf"'1' \(Ste\): {CUT}.*straight-through", "layers"
    ),
    "straight through, first order": refused(
        lambda: row(Ste()), rf"'1' \(Ste\): {CUT}", "layers", **FIRST
    ),
    "detached gate": refused(
        lambda: plain(lambda s: s * s.sigmoid().detach() + s**2), f"Own: {CUT}", "layers"
    ),
    "detached mean": refused(
        lambda: plain(lambda s: s.sin() + s.mean(1, keepdim=True).detach()), f"Own: {CUT}", "layers"
    ),
    "another backward": refused(lambda: plain(EnlargedSine.apply), f"Own: {CUT}", "layers"),
    "no second backward": refused(
        lambda: plain(CutSine.apply),
        "second derivative is not the derivative of the first",
        "layers",
    ),
    "no_grad": refused(
        lambda: Own(without_grad, a=nn.Linear(4, 4), b=nn.Linear(4, 2)),
        "cuts it off|cuts the",
        "layers",
    ),
    "detached outputs": refused(lambda: last(torch.detach), CUT),
    "no derivative in torch": refused(
        lambda: plain(lambda s: torch.special.zeta(s.exp() + 1.5, s.exp() + 1)),
        "torch cannot differentiate Own: .*'zeta' is not implemented",
        "layers",
    ),
    "a table that shrinks": refused(
        lambda: looked_up(max_norm=0.1), "'e.weight' is changed by the forward pass", x=IDS
    ),
    # More than one input.
    "batch mean": refused(
        lambda: plain(lambda s: s - s.mean(0)),
        MIXES,
        mended=lambda: plain(lambda s: s - s.mean(1, True)),
    ),
    "batch mean, first order": refused(lambda: plain(lambda s: s - s.mean(0)), MIXES, **FIRST),
    "batch median": refused(
        lambda: Own(lambda m, x: m.b(x * (x > x.median())), b=nn.Linear(4, 2)), MIXES
    ),
    "batch norm by the batch": refused(
        lambda: plain(lambda s: F.batch_norm(s, None, None, training=True)), MIXES
    ),
    "batch norm without statistics": refused(
        lambda: row(nn.BatchNorm1d(4, track_running_stats=False)),
        r"'1' \(BatchNorm1d\) has no running statistics",
        mended=lambda: row(nn.BatchNorm1d(4)),
    ),
    # Chance, and modes.
    "noise": refused(
        lambda: plain(lambda s: s + torch.randn(())),
        "draws random numbers",
        mended=lambda: plain(lambda s: s),
    ),
    "dropout": refused(
        lambda: row(nn.Dropout(0.5)).train(), r"'1' \(Dropout\).*training mode", "eval"
    ),
    "batch norm": refused(lambda: row(nn.BatchNorm1d(4)).train(), r"'1' \(BatchNorm1d\)", "eval"),
    "narrowed": refused(
        lambda: plain(lambda s: s.float().sin().double()),
        "computes in torch.float32.*remove the cast",
        mended=lambda: plain(torch.sin),
    ),
    # What cannot be seen.
    "backward hook": refused(hooked_backward, "'1' .*has a backward hook", "remove"),
    "hook, layerwise": refused(hooked, "'1' .*has a hook", "engine", engine="layerwise"),
    "hook on a compiled network": refused(
        compiled_and_hooked,
        r"register it on model\._orig_mod",
        "_orig_mod",
    ),
    "replaced forward, backpack": refused(
        replaced, "'1' .*replaced forward", "engine", engine="backpack"
    ),
    "replaced forward, out of a closure": refused(
        replaced_by_closure,
        "'0.weight', .*replaced forward.*make it an attribute",
        mended=replaced_by_partial,
    ),
    "offloaded": refused(
        lambda: row(nn.Tanh()).to("meta"),
        "'0.weight' is on the meta device.*without offloading",
        mended=lambda: row(nn.Tanh()),
    ),
    "data parallel": refused(lambda: nn.DataParallel(row(nn.Tanh())), "DataParallel", "module"),
    "compiled inside": refused(
        lambda: nn.Sequential(torch.compile(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2)),
        "'0' is compiled",
        "_orig_mod",
    ),
    "not to be copied": refused(
        lambda: row(NoCopy()), r"'1' \(NoCopy\) cannot be copied", mended=lambda: row(nn.Tanh())
    ),
    "borrowed bias": refused(borrowed_bias, r"module '0' \(Linear\), in its 'bias', uses a tensor"),
    "borrowed bias, functional": refused(
        borrowed_bias, r"module '0' \(Linear\), in its 'bias'", engine="functional"
    ),
    # Engines by name.
    "tied, layerwise": refused(tied, "same tensor", "engine", engine="layerwise"),
    "tied, traced": refused(tied, "same tensor", "engine", engine="traced"),
    "tied, backpack": refused(tied, "same tensor", "engine", engine="backpack", order=1),
    "glu, layerwise": refused(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.GLU(), nn.Linear(2, 2)),
        r"'1' \(GLU\)",
        "engine",
        engine="layerwise",
    ),
    "glu, backpack": refused(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.GLU(), nn.Linear(2, 2)),
        r"'1' \(GLU\)",
        "engine",
        engine="backpack",
    ),
    "own forward, backpack": refused(
        lambda: plain(torch.tanh), "own forward", "engine", engine="backpack"
    ),
    "own forward, layerwise": refused(
        lambda: plain(torch.tanh), "layerwise engine", "engine", engine="layerwise"
    ),
    "shared, traced": refused(
        lambda: Own(lambda m, x: m.b(m.a(m.a(x).tanh())), a=nn.Linear(4, 4), b=nn.Linear(4, 2)),
        "both factors of this product depend on parameter 'a",
        "engine",
        engine="traced",
    ),
    # Outputs.
    "positions": refused(
        lambda: Own(lambda m, x: m.a(x.view(-1, 2, 2)), a=nn.Linear(2, 2)),
        r"got \[3, 2, 2\]",
        "h[:, -1]",
    ),
    "images": refused(
        lambda: Own(lambda m, x: m.a(x.view(-1, 1, 2, 2)), a=nn.Conv2d(1, 2, 1)),
        r"got \[3, 2, 2, 2\]",
        "h.mean((2, 3))",
    ),
    "one number": refused(lambda: last(lambda h: h[:, 0]), r"got \[3\]", "h[:, None]"),
    "a loss": refused(
        lambda: last(torch.sum), r"got \[\].*no loss", mended=lambda: last(torch.sin)
    ),
    "dict": refused(lambda: last(lambda h: {"h": h}), "got a dict", mended=lambda: last(torch.sin)),
    "tuple": refused(lambda: last(lambda h: (h, h)), "got a tuple", mended=lambda: last(torch.sin)),
    "turned": refused(lambda: last(lambda h: h.T), r"got \[2, 3\].*first axis must count"),
    "no outputs": refused(lambda: last(lambda h: h[:, :0]), "T must be at least 1"),
    "labels": refused(
        lambda: last(lambda h: h.argmax(1, keepdim=True)),
        "int64.*argmax",
        mended=lambda: last(torch.sin),
    ),
    "sparse outputs": refused(lambda: last(lambda h: h.to_sparse()), "sparse"),
    "logarithm of negative numbers": refused(
        lambda: last(lambda h: (-h.abs()).log()), "NaN or infinite"
    ),
    # Inputs.
    "one index, no axis": refused(
        lambda: looked_up(lambda m, x: m.e(x[:, 0])),
        r"shape \[B, \.\.\.\]",
        "x[:, None]",
        IDS[:, 0],
    ),
    "one input": refused(lambda: row(nn.Tanh()), r"got \[4\]", "x[None]", X[0]),
    "one image": refused(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(2, 2)),
        r"fails in module '2' \(Linear\) on an input of shape \[1, 2, 2\]",
        "x[None]",
        X[:1].view(1, 2, 2),
    ),
    "wrong width": refused(lambda: row(nn.Tanh()), "expects inputs of shape", "", X[:, :3]),
    "wrong width, own forward": refused(
        lambda: plain(torch.tanh), r"in module 'a' \(Linear\)", "", X[:, :3]
    ),
    "images for a linear layer": refused(
        lambda: row(nn.Tanh()), "expects inputs of shape", "Flatten", X.view(3, 2, 2)
    ),
    "float inputs": refused(lambda: row(nn.Tanh()), "convert one of them", "to", X.float()),
    "integers for a linear layer": refused(lambda: row(nn.Tanh()), "'0' .Linear.", "to", IDS),
    "half": refused(lambda: row(nn.Tanh()).half(), "derivatives need float32", "double", X),
    "sparse inputs": refused(lambda: row(nn.Tanh()), "sparse", "to_dense", X.to_sparse()),
    "no inputs": refused(lambda: row(nn.Tanh()), "there are no inputs", "", X[:0]),
    "NaN": refused(lambda: row(nn.Tanh()), "input holds NaN", "", X * float("nan")),
    "index beyond the table": refused(
        looked_up, r"in module 'e' \(Embedding\).*IndexError", "", IDS + 1
    ),
    "numbers for a table": refused(looked_up, r"in module 'e' \(Embedding\)", "", X),
    "a dict of inputs": refused(lambda: row(nn.Tanh()), "must be a tensor, got dict", "", {"x": X}),
    # Errors of the caller's own.
    "AttributeError": refused(lambda: mid(lambda m, _: m.nothing), "AttributeError.*no attribute"),
    "KeyError": refused(lambda: plain(lambda _: {}["mine"]), "KeyError: 'mine'"),
    "IndexError": refused(lambda: plain(lambda s: s[:, [7]]), "IndexError: index 7"),
    "TypeError": refused(lambda: plain(lambda s: s + "a"), "TypeError: unsupported operand"),
    "no forward": refused(NoForward, "missing the required .forward."),
    "root at 0": refused(lambda: plain(lambda s: s.relu().sqrt()), "no finite derivative|is NaN"),
    "no width": refused(
        lambda: nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 2)), "'0.weight' has no entries"
    ),
    "no parameters": refused(nn.Tanh, "no parameters"),
    "unknown layer": refused(
        lambda: row(nn.Tanh()), r"no layer '1'.*there are: '0', '2'", layers=["1"]
    ),
    "unknown engine": refused(lambda: row(nn.Tanh()), "choose one of: auto", engine="mine"),
}


# What a message advises, as it is written there, and how it is done. -----------------------------


def with_outputs(f):
    return lambda model, x, options, _: (Own(lambda m, x: f(m.net(x)), net=model), x, options)


def with_option(name, read):
    return lambda model, x, options, match: (model, x, {**options, name: read(match)})


def unwrapped(model, x, options, _):
    if hasattr(model, "_orig_mod"):
        model._orig_mod._forward_hooks.update(model._forward_hooks)
        model._forward_hooks.clear()
        return model, x, options
    model = copy.copy(model)
    for name, child in model.named_children():
        if hasattr(child, "_orig_mod"):
            setattr(model, name, child._orig_mod)
    return model, x, options


def unhooked(model, x, options, _):
    for module in model.modules():
        module._backward_hooks.clear()
    return model, x, options


def flattened(model, x, options, _):
    return nn.Sequential(nn.Flatten(), *model), x, dict(options)


def of_type(model, x, options, _):
    return model, x.to(next(model.parameters())), options


ADVICE = {
    "layers": (r"layers=(\[.*?\])", with_option("layers", lambda m: ast.literal_eval(m[1]))),
    "order": (r"order=(1)", with_option("order", lambda m: int(m[1]))),
    "engine": (r"engine='(\w+)'", with_option("engine", lambda m: m[1])),
    "x[:, None]": (r"x\[:, None\]", lambda model, x, o, _: (model, x[:, None], o)),
    "x[None]": (r"x\[None\]", lambda model, x, o, _: (model, x[None], o)),
    "to_dense": (r"x\.to_dense\(\)", lambda model, x, o, _: (model, x.to_dense(), o)),
    "to": (r"\.to\((\.\.\.|torch\.\w+)\)", of_type),
    "double": (r"model\.double\(\)", lambda model, x, o, _: (model.double(), x.double(), o)),
    "float": (r"model\.float\(\)", lambda model, x, o, _: (model.float(), x.float(), o)),
    "eval": (r"model\.eval\(\)", lambda model, x, o, _: (model.eval(), x, o)),
    "module": (r"model\.module", lambda model, x, o, _: (model.module, x, o)),
    "_orig_mod": (r"_orig_mod", unwrapped),
    "remove": (r"handle\.remove\(\)", unhooked),
    "Flatten": (r"nn\.Flatten\(\)", flattened),
    "h[:, None]": (r"h\[:, None\]", with_outputs(lambda h: h[:, None])),
    "h[:, -1]": (r"h\[:, -1\] of \[B, L, V\]", with_outputs(lambda h: h[:, -1])),
    "h.mean((2, 3))": (
        r"h\.mean\(\(2, 3\)\) of \[B, C, H, W\]",
        with_outputs(lambda h: h.mean((2, 3))),
    ),
}
OF_OTHER_OUTPUTS = {"h[:, -1]": "h.mean((2, 3))", "h.mean((2, 3))": "h[:, -1]"}


def built(build, dtype=torch.float64):
    torch.manual_seed(3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = build()
    finally:
        torch.set_default_dtype(before)
    is_trained = any(
        m.training and isinstance(m, nn.Dropout | nn.BatchNorm1d) for m in model.modules()
    )
    return model if is_trained and build not in BUILT_FOR_USE else model.eval()


BUILT_FOR_USE = [c.mended for c in CASES.values() if c.mended] + [
    CASES["batch norm without statistics"].build
]


def quotients(model, x, step, names):
    """J and S of every entry, by five values of the outputs."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        middle = model(x.clone()).clone()
        for name in names:
            p = model.get_parameter(name)
            numbers, J, S = p.data.view(-1), [], []
            for i in range(p.numel()):
                before, h = numbers[i].clone(), {}
                for k in (-2, -1, 1, 2):
                    numbers[i] = before + k * step
                    h[k] = model(x.clone()).clone()
                numbers[i] = before
                J.append((h[-2] - 8 * h[-1] + 8 * h[1] - h[2]) / (12 * step))
                S.append((-h[-2] + 16 * h[-1] - 30 * middle + 16 * h[1] - h[2]) / (12 * step**2))
            shape = (*middle.shape, *p.shape)
            yield name, torch.stack(J, -1).view(shape), torch.stack(S, -1).view(shape)


def check_answer(model, x, options, tolerance=1e-6):
    """J and S by fimlib agree with difference quotients, by either step (kinks may be near)."""
    found = differentiate(model, x, **options)
    names = {n for block in found.blocks for n in block.inputs}
    wide = private_copy(getattr(model, "_orig_mod", model)).double()
    z = x.double() if x.is_floating_point() else x
    left = {}
    for step in STEPS:
        for name, J, S in quotients(wide, z, step, names):
            wrong = (found.jacobian(name) - J).abs() > tolerance * (1 + J.abs().max())
            if options.get("order", 2) == 2 and found.engine in (
                "layerwise",
                "traced",
                "functional",
            ):
                wrong |= (found.second(name) - S).abs() > 10 * tolerance * (1 + S.abs().max())
            left[name] = wrong & left.get(name, torch.ones_like(wrong))
    assert left.keys() == names
    assert not [n for n, wrong in left.items() if wrong.any()]


def advised(message):
    """What a message advises, by the keys of ``ADVICE``."""
    return [name for name, (pattern, _) in ADVICE.items() if re.search(pattern, message)]


def follow(name, message, model, x, options):
    pattern, act = ADVICE[name]
    return act(model, x, options, re.search(pattern, message))


def message_of(model, x, options):
    with pytest.raises((ValueError, NotImplementedError, TypeError)) as caught:
        differentiate(model, x, **options)
    return str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.says is None])
def test_there_is_an_answer(name):
    case = CASES[name]
    check_answer(built(case.build), case.x, case.options)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.says is not None])
def test_one_cause_and_a_remedy_that_works(name):
    case = CASES[name]
    model = built(case.build)
    message = message_of(model, case.x, case.options)
    assert re.search(case.says, message), message
    assert len(message) <= MOST, message
    assert "\n" not in message
    assert len(re.findall(r"\w[).'\]]*\. [A-Z]", message)) <= 2, message  # three sentences
    found = advised(message)
    if found[:2] == ["h[:, -1]", "h.mean((2, 3))"]:  # said of two kinds of outputs
        found.remove(OF_OTHER_OUTPUTS[case.advice])
    if case.advice:
        assert case.advice in found, message
    else:
        assert not found, message
    for advice in found:
        model, x, options = follow(advice, message, built(case.build), case.x, case.options)
        check_answer(
            model, x, options, 1e-3 if next(model.parameters()).dtype != torch.float64 else 1e-6
        )
    if case.mended:
        check_answer(built(case.mended), case.x, case.options)


def test_there_are_rows_of_every_kind():
    assert len(CASES) >= 100
    assert {c.advice for c in CASES.values()} == {"", *ADVICE} - {"order", "float"}
    assert sum(c.says is None for c in CASES.values()) >= 50


def test_many_parameters_are_refused_with_their_cost_and_what_works(monkeypatch):
    monkeypatch.setattr(forward_mode, "MANY_PARAMETERS", 40)
    message = message_of(built(lambda: recurrent(nn.GRU)), X, {})
    assert re.search(
        r"one pass for each of 71 parameters, about a second for these 3 inputs", message
    )
    assert advised(message) == ["layers", "engine"]
    for advice in advised(message):
        check_answer(*follow(advice, message, built(lambda: recurrent(nn.GRU)), X, {}))


@pytest.mark.parametrize(
    "build", [lambda: row(Ste()), lambda: plain(lambda s: s - s.mean(0))], ids=["cut", "mixed"]
)
def test_cost_does_not_hide_another_cause(monkeypatch, build):
    monkeypatch.setattr(forward_mode, "MANY_PARAMETERS", 5)
    message = message_of(built(build), X, {})
    assert re.search(f"{CUT}|{MIXES}", message)
    assert "engine=" not in message


FAMILY = fimlib.Gaussian()
OTHER_CALLS = {
    "accumulate": lambda m, x: fimlib.accumulate(m, x, FAMILY),
    "summarise": lambda m, x: fimlib.summarise(m, x, FAMILY, num_probes=3),
    "plan": lambda m, x: fimlib.plan(m, x),
    "fisher_matrix": lambda m, x: fimlib.fisher_matrix(
        m, x, FAMILY, parameters=[next(n for n, _ in m.named_parameters())]
    ),
    "hutchinson": lambda m, x: fimlib.hutchinson_variance_i2(m, x, FAMILY, num_probes=3),
}


@pytest.mark.parametrize("call", OTHER_CALLS)
@pytest.mark.parametrize(
    "name",
    ["straight through", "positions", "backward hook", "one image", "KeyError", "batch mean"],
)
def test_other_functions_say_the_same(call, name):
    case = CASES[name]
    message = message_of(built(case.build), case.x, case.options)
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        OTHER_CALLS[call](built(case.build), case.x)
    start = re.sub(r"\d", "#", message).split(":")[0].split(" on ")[0]
    assert start in re.sub(r"\d", "#", str(caught.value))


TRANSFORMERS = {
    "encoder layer": (encoder_layer, X),
    "norm first": (lambda: encoder_layer(norm_first=True, activation="gelu"), X),
    "padding mask": (Padded, CASES["padding mask"].x),
    "masked attention": (CASES["masked attention"].build, X),
    "lstm": (lambda: recurrent(nn.LSTM), X),
    "gru": (lambda: recurrent(nn.GRU), X),
    "experts": (experts, X),
    "adapter": (lora, X),
    "checkpoint": (checkpointed, X),
    "tied tables": (lambda: Gpt(4, blocks=1), IDS[:1]),
}


@pytest.mark.long
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_in_single_precision_too(name):
    build, x = TRANSFORMERS[name]
    x = x.float() if x.is_floating_point() else x
    check_answer(built(build, torch.float32), x, {}, 1e-3)


@pytest.mark.long
def test_a_small_language_model():
    """1,400 parameters in three blocks; some of every kind are compared."""
    model, one = built(Gpt), IDS[:1]
    found = differentiate(model, one)
    assert found.engine == "functional"
    assert sum(p.numel() for p in model.parameters()) > 1_000
    for name in ("tokens.weight", "blocks.1.self_attn.in_proj_weight", "norm.weight"):
        parameter = model.get_parameter(name)
        for i in (0, parameter.numel() - 1):
            slopes = []
            for shift in (1e-5, 0, -1e-5):
                moved = copy.deepcopy(model)
                moved.get_parameter(name).data.view(-1)[i] += shift
                with sdpa_kernel(SDPBackend.MATH):
                    h = moved(one)[0]
                p = moved.get_parameter(name)
                slopes.append(
                    torch.stack(
                        [torch.autograd.grad(y, p, retain_graph=True)[0].flatten()[i] for y in h]
                    )
                )
            J, S = (D(name)[0].flatten(1)[:, i] for D in (found.jacobian, found.second))
            assert torch.allclose(J, slopes[1], rtol=1e-9, atol=1e-11)
            assert torch.allclose(S, (slopes[0] - slopes[2]) / 2e-5, rtol=1e-5, atol=1e-7)
