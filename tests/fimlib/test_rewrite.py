"""Torch's functions in other words: the same values, and derivatives of the first two orders."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from strategies import inputs
from test_activations import DEFINITIONS, NEAR, exact
from torch import nn

from fimlib.engines.rewrite import RULES, elementwise, rewritten

CHANNELS = inputs(6, 1)[:, 0]
WIDTHS = inputs(5, 1)[:, 0] + 2
WEIGHT = inputs(3, 25).view(3, 5, 5)
ATTENTION = nn.MultiheadAttention(5, 1, batch_first=True).double().eval().requires_grad_(False)
BATCH_NORM = nn.BatchNorm1d(6).double().eval()
nn.init.uniform_(BATCH_NORM.running_var, 0.5, 2)
INDEX = torch.tensor([[0, 2], [2, 2], [5, 1]])

SEEN = inputs(6, 6, seed=3) > -0.5
SEEN[1] = False  # a position that sees nothing
SHIFT = inputs(6, 6, seed=4).masked_fill(inputs(6, 6, seed=5) > 1, -torch.inf)

# Functions of a tensor [4, 6, 5].
FUNCTIONS = {
    "layer norm": lambda s: F.layer_norm(s, (5,), WIDTHS, WIDTHS),
    "layer norm of two axes": lambda s: F.layer_norm(s, (6, 5)),
    "layer norm as a module": nn.LayerNorm(5, eps=0.1).double(),
    "rms norm": lambda s: F.rms_norm(s, (5,), WIDTHS),
    "rms norm as a module": nn.RMSNorm(5, eps=0.1).double(),
    "group norm": lambda s: F.group_norm(s, 3, CHANNELS, CHANNELS),
    "group norm of vectors": lambda s: F.group_norm(s[:, :, 0], 2),
    "instance norm": lambda s: F.instance_norm(s, weight=CHANNELS, bias=CHANNELS),
    "instance norm as a module": nn.InstanceNorm1d(6, affine=True).double(),
    "instance norm of kept statistics": nn.InstanceNorm1d(6, track_running_stats=True)
    .double()
    .eval(),
    "batch norm": BATCH_NORM,
    "weight norm": lambda s: torch._weight_norm(s[0], s[1, :, :1], 0),
    "var": lambda s: s.var(1),
    "var of two axes": lambda s: torch.var(s, (0, 2), keepdim=True, correction=0),
    "var of all": lambda s: s.var(),
    "var of all, biased": lambda s: s.var(False),
    "var by positions": lambda s: s.var(1, False, True),
    "std": lambda s: s.std(-1),
    "std by names": lambda s: torch.std(s, dim=1, unbiased=False),
    "var and mean": lambda s: torch.cat(torch.var_mean(s, 1, correction=0)),
    "std and mean": lambda s: torch.stack(torch.std_mean(s)),
    "norm": lambda s: s.norm(),
    "norm of an axis": lambda s: s.norm(dim=1),
    "norm of degree 3": lambda s: s.norm(3, dim=1, keepdim=True),
    "largest": lambda s: s.norm(float("inf"), 1),
    "norm of degree 1": lambda s: torch.norm(s, 1),
    "Frobenius": lambda s: torch.norm(s, "fro", dim=(1, 2)),
    "linalg norm": lambda s: torch.linalg.norm(s, dim=1),
    "linalg norm of matrices": lambda s: torch.linalg.norm(s, "fro", dim=(1, 2)),
    "vector norm": lambda s: torch.linalg.vector_norm(s, 2.5, (1, 2)),
    "normalize": lambda s: F.normalize(s, dim=2),
    "normalize by sums": lambda s: F.normalize(s, p=1.0),
    "cosine similarity": lambda s: F.cosine_similarity(s, s.flip(0)),
    "distance": lambda s: F.pairwise_distance(s, s.flip(1)),
    "softmax": lambda s: s.softmax(1),
    "softmax as a function": lambda s: F.softmax(s, -1),
    "softmin": nn.Softmin(1),
    "softmax of large numbers": lambda s: (s + 800).softmax(1),
    "log-softmax": lambda s: F.log_softmax(s, 1),
    "logsumexp": lambda s: s.logsumexp((0, 1)),
    "logsumexp of large numbers": lambda s: torch.logsumexp(800 + s, 1, True),
    "logaddexp": lambda s: torch.logaddexp(s, 9 * s.flip(1)),
    "addcmul": lambda s: torch.addcmul(s, s, s.flip(0), value=0.5),
    "addcdiv": lambda s: s.addcdiv(s, 2 + s.flip(0) ** 2, value=0.5),
    "lerp": lambda s: torch.lerp(s, s.flip(0), 0.3),
    "lerp by itself": lambda s: s.lerp(s.flip(0), s),
    "prod": lambda s: s.prod(1),
    "prod of all": lambda s: s[0].prod(),
    "prod, kept": lambda s: s.prod(2, keepdim=True),
    "bilinear": lambda s: F.bilinear(s, s.flip(0), WEIGHT),
    "circular": lambda s: F.pad(s, (1, 2), mode="circular"),
    "circular, two axes": lambda s: F.pad(s[None], (1, 0, 2, 3), mode="circular"),
    "cut off by circular padding": lambda s: F.pad(s, (-1, 2), mode="circular"),
    "lp pool": lambda s: F.lp_pool1d(s, 2.0, 2),
    "local response norm": lambda s: F.local_response_norm(s, 3),
    "glu": lambda s: F.glu(s, 1),
    "attention": lambda s: ATTENTION(s, s, s)[0],
    "dot products": lambda s: F.scaled_dot_product_attention(s, s.sin(), s.cos()),
    "causal": lambda s: F.scaled_dot_product_attention(s, s, s, is_causal=True, scale=0.3),
    "masked": lambda s: F.scaled_dot_product_attention(s, s, s.sin(), attn_mask=SEEN),
    "shifted": lambda s: F.scaled_dot_product_attention(s, s, s, attn_mask=SHIFT),
    "grouped": lambda s: F.scaled_dot_product_attention(
        s[None], s[None, :2], s[None, 2:], enable_gqa=True
    ),
    "leaky, in place": lambda s: F.leaky_relu(s.sin(), -0.5, inplace=True),
    "leaky, in place by its own name": lambda s: F.leaky_relu_(s.sin(), -0.5),
    "elu, in place by its own name": lambda s: F.elu_(s.sin(), -0.5),
    "celu, in place by its own name": lambda s: torch.celu_(s.sin(), 0.7),
    "all distances": lambda s: torch.cdist(s, s.flip(0)),
    "distances of rows": lambda s: F.pdist(s[0]),
    "sum of a bag": lambda s: F.embedding_bag(INDEX, s[0], mode="sum"),
    "mean of a bag": lambda s: F.embedding_bag(INDEX, s[0], padding_idx=2),
    "maximum of a bag": lambda s: F.embedding_bag(INDEX, s[0], mode="max"),
    "weighted bag": lambda s: F.embedding_bag(
        INDEX, s[0], mode="sum", per_sample_weights=s[1, :3, :2].sin()
    ),
    "bags by offsets": lambda s: F.embedding_bag(
        INDEX.flatten(), s[0], torch.tensor([0, 2, 4]), mode="sum"
    ),
    "in place": lambda s: F.silu(s.sin(), inplace=True) + s.cos().sigmoid_(),
    **{name: module.eval() for name, (module, *_) in DEFINITIONS.items()},
}


def forward_twice(f, s, v):
    """The first and second derivatives of f along v, forward over forward."""
    return torch.func.jvp(lambda s: torch.func.jvp(f, (s,), (v,))[1], (s,), (v,))


def reverse_twice(f, s, v):
    """The same, by rows of rows."""
    s = s.clone().requires_grad_()
    z = f(s).flatten()
    first, second = torch.zeros_like(z), torch.zeros_like(z)
    for i in range(z.numel()):
        (row,) = torch.autograd.grad(z[i], s, create_graph=True)
        first[i] = (row * v).sum().detach()
        if row.requires_grad:
            (of_row,) = torch.autograd.grad(
                (row * v).sum(), s, retain_graph=True, materialize_grads=True
            )
            second[i] = (of_row * v).sum()
    return first.detach(), second


def same(f):
    def run(s):
        with rewritten():
            return f(s)

    return run


@pytest.mark.parametrize("case", FUNCTIONS)
def test_values_and_derivatives_in_all_modes(case):
    f = FUNCTIONS[case]
    if isinstance(f, nn.Module):
        f.requires_grad_(False)
    s, v = inputs(24, 5).view(4, 6, 5), inputs(25, 5)[1:].view(4, 6, 5).flip(0)
    with torch.no_grad():
        assert torch.allclose(same(f)(s), f(s), rtol=1e-12, atol=1e-14)
    first, second = forward_twice(same(f), s, v)
    step = 1e-5
    plus, minus = (forward_twice(same(f), s + e * step * v, v)[0] for e in (1, -1))
    scale = float(second.abs().max()) + 1
    assert float(((f(s + step * v) - f(s - step * v)) / (2 * step) - first).abs().max()) < 1e-6
    assert float(((plus - minus) / (2 * step) - second).abs().max()) < 1e-6 * scale
    together = torch.vmap(lambda v: forward_twice(same(f), s, v))(torch.stack([v, 2 * v]))
    assert torch.allclose(together[0][0], first, rtol=1e-11, atol=1e-13)
    assert torch.allclose(together[1][1], 4 * second, rtol=1e-11, atol=1e-12)
    back = reverse_twice(same(f), s, v)
    for ours, expected in zip(back, (first, second), strict=True):
        assert torch.allclose(ours, expected.flatten(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_activations_keep_all_digits_in_all_modes(name):
    module, definition, *kinks = DEFINITIONS[name]
    points = torch.tensor([s for s in NEAR if s not in kinks], dtype=torch.float64)
    each = [exact(definition, s.item()) for s in points]
    first, second = torch.tensor(each, dtype=torch.float64).T
    ones, f = torch.ones_like(points), same(module.eval())
    s = points.clone().requires_grad_()
    (one,) = torch.autograd.grad(f(s).sum(), s, create_graph=True)
    two = torch.zeros_like(one)
    if one.requires_grad:
        (two,) = torch.autograd.grad(one.sum(), s, materialize_grads=True)
    for found in ((one, two), forward_twice(f, points, ones)):
        for ours, expected in zip(found, (first, second), strict=True):
            assert torch.allclose(ours, expected, rtol=3e-12, atol=1e-300)


def test_torch_s_own_norm_is_wrong_in_forward_mode():
    """Why it is written out; where torch has mended it, ``rewritten`` may do less."""
    s, v = inputs(4, 5), inputs(5, 5)[1:]
    wrong = forward_twice(lambda s: F.layer_norm(s, (5,)), s, v)[1]
    right = reverse_twice(lambda s: F.layer_norm(s, (5,)), s, v)[1].view(4, 5)
    assert float((wrong - right).abs().max()) > 1e-3
    assert torch.allclose(
        forward_twice(same(lambda s: F.layer_norm(s, (5,))), s, v)[1], right, rtol=1e-10, atol=1e-13
    )


def test_norms_at_0_have_the_derivative_that_torch_takes():
    s = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    for f in (lambda s: s.norm(dim=1), lambda s: s.std(1), lambda s: F.normalize(s)):
        found, expected = (torch.autograd.grad(g(s).sum(), s)[0] for g in (same(f), f))
        assert torch.equal(found, expected)


def test_what_the_rules_do_not_know_is_left_to_torch():
    with rewritten():
        out = torch.empty(3)
        torch.sigmoid(torch.zeros(3), out=out)
        assert torch.equal(out, torch.full((3,), 0.5))
        assert torch.sigmoid(torch.tensor([0])).item() == 0.5
        assert torch.equal(torch.tensor([2, 3]).prod(), torch.tensor(6))
        assert torch.linalg.norm(torch.eye(2), 2).item() == pytest.approx(1)
        with pytest.raises(TypeError):
            F.layer_norm(torch.zeros(3))
        with pytest.raises(RuntimeError, match="[Pp]adding"):
            F.pad(torch.zeros(1, 1, 3), (4, 4), mode="circular")
        norm = nn.BatchNorm1d(2)
        norm(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)))
    assert norm.num_batches_tracked == 1
    assert norm.running_mean.any()


def test_batch_statistics_are_those_of_torch():
    norm, s = nn.BatchNorm1d(6, track_running_stats=False).double(), inputs(4, 6)
    assert torch.equal(same(norm)(s), norm(s))


def test_within_the_mode_only():
    assert elementwise not in RULES
    s = torch.tensor([40.0], dtype=torch.float64, requires_grad=True)
    inside, outside = (torch.autograd.grad(f(s), s)[0] for f in (same(torch.tanh), torch.tanh))
    assert inside > 0
    assert outside == 0
