"""Random networks as code to paste.

``draw(seed)`` gives a script that defines ``model``, ``x`` and ``family``: blocks at random, drawn
as code, tried out one after the other, and kept where they run. All numbers of an input are its
own, and the outputs are smooth almost everywhere. With ``traps=True`` one block breaks a rule.
"""

from __future__ import annotations

import copy
import inspect
import random
import re
import warnings
from dataclasses import dataclass, field

import lying
import torch
from torch import nn

MAX_PARAMETERS, MAX_UNITS = 64, 48

# A block draws what __init__ does and what forward does, "#" being its number.


def module(expression):
    return f"self.m# = {expression}", "z = self.m#(z)"


def lines(*forward):
    return "", "\n".join(forward)


def parameters(*shapes):
    pairs = zip("pqr", shapes, strict=False)
    made = [f"self.{name}# = nn.Parameter(torch.randn({list(shape)}))" for name, shape in pairs]
    return "\n".join(made)


def words(text):
    return text.split()


def tuple_of(*sizes):
    return "(" + ", ".join(map(str, sizes)) + ("," if len(sizes) == 1 else "") + ")"


ACTIVATIONS = words("""
    ELU(0.7) ELU() Hardshrink(0.3) Hardsigmoid() Hardtanh(-0.8,0.9) Hardswish() LeakyReLU(0.2)
    LogSigmoid() PReLU() ReLU() ReLU6() RReLU() SELU() CELU(0.75) CELU() GELU() Sigmoid() SiLU()
    GELU(approximate="tanh") Mish() Softplus() Softplus(2.0,1.5) Softshrink(0.2) Softsign() Tanh()
    Tanhshrink() Threshold(0.1,0.3) Tanh() Sigmoid() Softplus() SiLU() GELU()
    ELU(inplace=True) Hardsigmoid(inplace=True) Hardtanh(inplace=True) Hardswish(inplace=True)
    LeakyReLU(0.2,inplace=True) ReLU(inplace=True) ReLU6(inplace=True) RReLU(inplace=True)
    SELU(inplace=True) CELU(inplace=True) SiLU(inplace=True) Mish(inplace=True)
    Threshold(0.1,0.3,inplace=True)""")
FUNCTIONS = words("""
    torch.tanh(z) torch.sigmoid(z) torch.sin(z) torch.cos(z) torch.erf(z) torch.atan(z)
    torch.asinh(z) torch.sinh(z)/3 torch.exp(z/2) torch.log(z**2+0.4) torch.log1p(z**2)
    torch.expm1(z/2) torch.sqrt(z**2+0.3) torch.rsqrt(z**2+0.5) torch.abs(z) z.square() z**3/3 z**2
    F.relu(z) F.silu(z) F.softplus(z) F.gelu(z) F.mish(z) F.elu(z) F.selu(z) F.celu(z)
    F.hardswish(z) F.hardsigmoid(z) F.leaky_relu(z,0.1) F.logsigmoid(z) F.softsign(z)
    F.tanhshrink(z) F.softshrink(z,0.2) F.hardshrink(z,0.2) F.hardtanh(z) F.relu6(z)
    F.threshold(z,0.1,0.2) z.clamp(-0.7,0.9) z.clamp_min(0.1) torch.where(z>0,z,z**2)
    torch.maximum(z,-z/2) torch.reciprocal(1+z**2) z/(1+z.abs()) 1/(1+z.exp()) z*torch.sigmoid(z)
    torch.atan2(z,1+z**2) torch.hypot(z,1+z) torch.logaddexp(z,z/2) torch.xlogy(z,1+z**2)
    torch.special.expit(z) torch.sinc(z/3) z-z.sin() (z.abs()+0.5)**1.5 (z**2+0.3)**torch.sigmoid(z)
    2**z torch.polygamma(1,z**2+1) torch.lgamma(z**2+1) torch.tan(z/4) torch.erfc(z) torch.i0(z)
    torch.cosh(z)/2 torch.lerp(z,z**2,0.3) torch.addcmul(z,z,z.sin(),value=0.5) z.frac()
    torch.addcdiv(z,z,1+z**2,value=0.5) torch.special.ndtr(z) z+z.round() torch.remainder(z,0.7)""")
WRITES = words("""
    z=F.relu_(z) z=z.tanh_() z=z.sigmoid_() z.mul_(0.7) z.add_(0.3) z=F.elu_(z) z.exp_() z.sin_()
    z=F.leaky_relu_(z,0.2) z[:,0]+=3 z[:,0]*=-2 z[...,-1]=1.5 z[:,0]=z[:,-1]**2 z[:,1:]-=z[:,:1]
    z.clamp_(-1,1) z[z<0]=0.2 z.masked_fill_(z>1,0.5) z.pow_(2) z.neg_() z.div_(1.7)
    z[:,-1].tanh_() z[...,:1].mul_(0.4) z.index_fill_(1,torch.tensor([0]),0.3) z.copy_(z**2)
    z.index_add_(1,torch.tensor([0]),z[:,-1:])""")
OVER_UNITS = words("""
    z.softmax(D) z.log_softmax(D) z-z.mean(D,keepdim=True) z/z.norm(dim=D,keepdim=True)
    F.normalize(z,dim=D) z.cumsum(D) z.cumprod(D) z.logcumsumexp(D) z.flip(D) z.roll(1,D)
    z-z.roll(1,D) z*z.sum(D,keepdim=True) z/(1+z.var(D,keepdim=True)) z-z.logsumexp(D,keepdim=True)
    z.sort(D).values z.cummax(D).values z*z.amax(D,keepdim=True) z.topk(2,D).values F.softmin(z,D)
    z.std(D,keepdim=True)*z torch.cat([z,z.sin()],D) torch.cat([z,-z],D) F.glu(z,D)
    z-z.median(D,keepdim=True).values z.unfold(D,2,1).sum(-1) z.narrow(D,0,2) z.chunk(2,D)[0]
    z.repeat_interleave(2,D) z.index_select(D,torch.tensor([1,0])) z.select(D,0).unsqueeze(D)
    z.prod(D,keepdim=True)+z torch.stack([z,z**2],D).flatten(1,2) z.diff(dim=D)
    z.unbind(D)[0].unsqueeze(D)*z F.cosine_similarity(z,z.roll(1,D)+1,dim=D).unsqueeze(D)*z""")
REARRANGED = words("""
    z.transpose(1,-1) z.flip(-1) z[:,::2] z[...,1:] z[:,[0,-1,0]] z.repeat(1,*[2]*(z.ndim-1))
    torch.diag_embed(z) z[:,None] z.expand(-1,2,*[-1]*(z.ndim-2)) z.flatten(1) z.reshape(len(z),-1)
    z.triu() z.tril() z.movedim(1,-1) torch.rot90(z,1,(-1,1)) z.take_along_dim(z.argsort(1),1)
    z.gather(1,z.argmax(1,keepdim=True)) F.pad(z,(1,1),value=0.3) F.pad(z,(1,1),mode="circular")
    F.pad(z,(1,1),mode="reflect") torch.einsum("bi,bj->bij",z,z) z.view(len(z),2,-1)
    z.view(len(z),3,-1) torch.einsum("bij,bkj->bik",z,z) z@z.mT torch.bmm(z,z.transpose(1,2))
    torch.cdist(z,z+1) torch.linalg.vector_norm(z,dim=-1) F.interpolate(z,3,mode="linear")
    z.diagonal(dim1=1,dim2=2) (z@z.mT).softmax(-1)@z
    torch.linalg.solve(torch.eye(z.shape[1]).to(z)*4+z@z.mT,z)""")
REDUCTIONS = words("""
    z.flatten(1) z.flatten(1) z.flatten(1) z.mean(-1) z.sum(1) z.amax(-1) z[:,-1] z[...,0]
    z.logsumexp(-1) z.norm(dim=-1) z.prod(-1) z.mean(1) z.max(-1).values z.var(-1) z.amin(1)""")
# Of a parameter that is broadcast.
BROADCAST = words("""
    z*P z+P z-P.square() z/(1+P**2) z*torch.sigmoid(P) torch.addcmul(z,z,P) torch.tanh(z*P) P*z+P
    (z.abs()+0.5)**P torch.where(z>0,z,P*z) torch.maximum(z,P) torch.logaddexp(z,P)
    torch.lerp(z,z**2,P)""")
# Of a parameter [k, n]; of two, [k] and [n]; of one [n, n].
WEIGHTS = words("""
    F.linear(z,torch.tanh(P)) F.linear(z,P/P.norm(dim=1,keepdim=True)) F.linear(z,P.softmax(-1))
    F.linear(z,P-P.mean()) torch.einsum("...i,ji->...j",z,P) z@P.mT F.linear(z,P,P.sum(1))
    F.linear(z,P*(P>0)) F.linear(F.linear(z,P),P.mT)""")
OUTER = words("""
    F.linear(z,torch.outer(P,Q)) F.linear(z*Q,P[:,None].sin()*Q) (z*Q).sum(-1,keepdim=True)*P""")
SQUARE = words("""
    z@torch.matrix_exp((P-P.mT)/2) torch.linalg.solve(4*torch.eye(len(P)).to(z)+P,z.mT).mT
    z@(P@P.mT) F.linear(torch.tanh(F.linear(z,P)),P)""")
# Of one or two linear layers that keep the number of units.
GATES = words("""
    torch.sigmoid(M(z))*N(z) M(z)*N(z) M(z)/(1+N(z)**2) z+M(F.silu(N(z))) M(z).softmax(-1)*N(z)
    (M(z)**2+0.4)**torch.tanh(N(z)) torch.lerp(N(z),z,torch.sigmoid(M(z)))""")
SHARED = words("""
    M(torch.tanh(M(z))) M(M(z)) z+M(z.sin()+M(z)) M(z)*M(z.flip(-1)) torch.sigmoid(M(z))*M(z)
    F.linear(F.softplus(M(z)),M.weight.mT)""")
# Of an earlier z.
SKIPS = words("""
    z+s z*torch.sigmoid(s) torch.cat([z,s],1) z*s z-s/2 torch.cat([s,z],-1) torch.maximum(z,s)
    torch.lerp(z,s,0.3) s.add_(z) z@s.mT torch.where(s>0,z,s)""")
PAIR = "self.m# = nn.Linear({n}, {n})\nself.n# = nn.Linear({n}, {n})"


def expression(text, **names):
    """A line that replaces z; single letters stand for what they are given."""
    for letter, name in names.items():
        text = re.sub(rf"\b{letter}\b", name, text)
    return f"z = {text}"


def activation(r):
    return f"nn.{r.choice(ACTIVATIONS)}"


def linear(r, shape):
    return module(f"nn.Linear({shape[-1]}, {r.randint(1, 4)}, bias={r.random() < 0.8})")


def act(r, _):
    return module(activation(r))


def function(r, _):
    return lines(expression(r.choice(FUNCTIONS)))


def write(r, _):
    line = r.choice(WRITES)
    return lines("z = z.clone()", line) if r.random() < 0.7 else lines(line)


def over_units(r, shape):
    return lines(expression(r.choice(OVER_UNITS), D=str(r.randint(1, len(shape)))))


def rearranged(r, _):
    return lines(expression(r.choice(REARRANGED)))


def convolution(r, shape):
    d, c = len(shape) - 1, shape[0]
    if d not in (1, 2, 3):
        return None
    groups = r.choice([g for g in (1, 1, 2, 3) if c % g == 0])
    several = r.random() < 0.3

    def size(low, high):
        sizes = [r.randint(low, high) for _ in range(d)]
        return tuple_of(*sizes) if several and d > 1 else sizes[0]

    options = {"stride": size(1, 2), "padding": size(0, 2), "dilation": size(1, 2)}
    if r.random() < 0.3:
        kind, options["output_padding"] = f"ConvTranspose{d}d", size(0, 1)
    else:
        mode = r.choice(["zeros", "zeros", "circular", "reflect", "replicate"])
        kind, options["padding_mode"] = f"Conv{d}d", repr(mode)
        if r.random() < 0.2:
            options |= {"padding": repr(r.choice(["same", "valid"])), "stride": 1}
    chosen = {k: v for k, v in options.items() if r.random() < 0.6}
    chosen |= {"groups": groups, "bias": r.random() < 0.7}
    sizes = f"{c}, {groups * r.randint(1, 2)}, {size(1, 3 if d < 3 else 2)}"
    return module(f"nn.{kind}({sizes}, {', '.join(f'{k}={v}' for k, v in chosen.items())})")


def norm(r, shape):
    d, c, n = len(shape) - 1, shape[0], shape[-1]
    names = [f"LayerNorm({list(shape)})", f"LayerNorm({n})", f"RMSNorm({n})"]
    names += [f"LayerNorm({n}, elementwise_affine=False)", f"LocalResponseNorm({r.randint(1, 3)})"]
    names += [f"GroupNorm({g}, {c})" for g in (1, 2, 3) if c % g == 0]
    names += [f"BatchNorm{max(d, 1)}d({c})"] * 2 + [f"BatchNorm{max(d, 1)}d({c}, affine=False)"]
    if d:
        names += [f"InstanceNorm{d}d({c}, affine={r.random() < 0.5})"]
        names += [f"InstanceNorm{d}d({c}, affine=True, track_running_stats=True)"]
    return module(f"nn.{r.choice(names)}")


def pool(r, shape):
    d = len(shape) - 1
    k, s, p = r.randint(2, 3), r.randint(1, 2), r.randint(0, 1)
    uneven = tuple_of(*[r.randint(1, 3) for _ in range(d)])
    arguments = [f"Avg_({k}, {s}, {p})", f"Avg_({k}, {s}, {p}, count_include_pad=False)"]
    arguments += [
        f"Max_({k}, {s}, {p})",
        f"Max_({k}, {s}, ceil_mode=True)",
        "Max_(2, 1, dilation=2)",
    ]
    arguments += [f"Avg_({k}, {s}, ceil_mode=True)", f"AdaptiveAvg_({uneven})", "AdaptiveAvg_(2)"]
    arguments += [f"AdaptiveMax_({uneven})", f"LP_(2, {k})", f"LP_(3, {k}, {s})"]
    return module("nn." + r.choice(arguments).replace("_", f"Pool{d}d", 1)) if 1 <= d <= 3 else None


def view(r, shape):
    d, n = len(shape) - 1, shape.numel()
    axis, mode = r.choice([-1, 1]), r.choice(["nearest", "linear", "bilinear"])
    names = words("""
        Flatten() Identity() Dropout(0.4) LogSoftmax(-1) ChannelShuffle(2) PixelShuffle(2)
        PixelUnshuffle(2) Softmax2d() Unfold(2) Dropout1d(0.3) AlphaDropout(0.2) Softmin(1)
        Upsample(scale_factor=1.5,mode="bicubic",align_corners=True)""")
    names += [f"Softmax({axis})", f"GLU({axis})", f"Upsample(scale_factor=2, mode={mode!r})"]
    pads = ("Reflection", "Replication", "Zero", "Circular")
    names += [f"{kind}Pad{max(d, 1)}d(1)" for kind in pads] + [f"ConstantPad{max(d, 1)}d(1, 0.5)"]
    names += [f"Unflatten(1, ({k}, {n // k}))" for k in (2, 3) if d == 0 and n % k == 0] * 3
    return module(f"nn.{r.choice(names)}")


def broadcast(r, shape):
    sizes = [n if r.random() < 0.6 else 1 for n in shape][r.randint(0, len(shape) - 1) :]
    return parameters(sizes), expression(r.choice(BROADCAST), P="self.p#")


def computed(r, shape):
    n, k = shape[-1], r.randint(1, 3)
    codes, *sizes = r.choice([(WEIGHTS, (k, n)), (OUTER, (k,), (n,)), (SQUARE, (n, n))])
    return parameters(*sizes), expression(r.choice(codes), P="self.p#", Q="self.q#")


def two_inputs(r, shape):
    sizes = f"{shape[-1]}, {shape[-1]}, {r.randint(1, 2)}"
    return f"self.m# = nn.Bilinear({sizes})", f"z = self.m#(z, {r.choice(['z', 'z.sin()'])})"


def gate(r, shape):
    forward = expression(r.choice(GATES), M="self.m#", N="self.n#")
    return PAIR.format(n=shape[-1]), forward


def again(r, shape):
    return PAIR.format(n=shape[-1]).split("\n")[0], expression(r.choice(SHARED), M="self.m#")


def tied(r, shape):
    same = ["self.n#.weight = self.m#.weight", "self.n#.bias = self.m#.bias", "self.n# = self.m#"]
    forward = f"z = self.n#({r.choice(['torch.tanh', 'F.silu', 'F.relu'])}(self.m#(z)))"
    return f"{PAIR.format(n=shape[-1])}\n{r.choice(same)}", forward


def nested(r, shape):
    n, k = shape[-1], r.randint(1, 3)
    inner = f"nn.Sequential(nn.Linear({n}, {k}), {activation(r)}, nn.Linear({k}, {n}))"
    return f"self.m# = {inner}", r.choice(["z = self.m#(z)", "z = z + self.m#(z)"])


def attention(r, shape):
    if len(shape) != 2 or shape[-1] > 4:
        return None
    n, heads, plus = shape[-1], r.choice([1, 1, 2]), r.choice(["", "z + "])
    causal = "attn_mask=torch.ones(z.shape[1], z.shape[1]).triu(1).bool()"
    how = r.choice(["", f", {causal}", ", need_weights=False", ", average_attn_weights=False"])
    bias = f"bias={r.random() < 0.5}"
    kind = r.choice(["torch", "fused", "own", "layer"])
    if kind == "torch":
        made = f"nn.MultiheadAttention({n}, {heads}, {bias}, batch_first=True)"
        return f"self.m# = {made}", f"z = {plus}self.m#(z, z, z{how})[0]"
    if kind == "fused":
        made, split = f"nn.Linear({n}, {3 * n}, {bias})", "q, k, v = self.m#(z).chunk(3, -1)"
        attend = f"F.scaled_dot_product_attention(q, k, v, is_causal={r.random() < 0.4})"
        return f"self.m# = {made}", f"{split}\nz = {plus}{attend}"
    if kind == "own":
        made, split = f"nn.Linear({n}, {2 * n}, {bias})", "q, k = self.m#(z).chunk(2, -1)"
        return f"self.m# = {made}", f"{split}\nz = {plus}(q @ k.mT / 2).softmax(-1) @ z"
    options = f"activation={r.choice(['relu', 'gelu'])!r}, norm_first={r.random() < 0.5}"
    sizes = f"{n}, {heads}, {r.randint(1, 2)}"
    return module(f"nn.TransformerEncoderLayer({sizes}, 0.0, {options}, batch_first=True)")


def recurrent(r, shape):
    if len(shape) != 2:
        return None
    n, k = shape[-1], r.randint(1, 2)
    if r.random() < 0.25:
        loop = f"s = z.new_zeros(len(z), {k})\nfor t in range(z.shape[1]):\n"
        loop += "    s = self.m#(z[:, t], s)\nz = s"
        return f"self.m# = nn.{r.choice(['GRUCell', 'RNNCell'])}({n}, {k})", loop
    options = f"batch_first=True, bidirectional={r.random() < 0.2}, bias={r.random() < 0.8}"
    kinds = [f"LSTM({n}, {k}", f"GRU({n}, {k}", f"RNN({n}, {k}", f"RNN({n}, {k}, 1, 'relu'"]
    kinds += [f"LSTM({n}, 2, proj_size=1"]
    last = r.choice(["", "[:, -1]"])
    return f"self.m# = nn.{r.choice(kinds)}, {options})", f"z = self.m#(z)[0]{last}"


def parametrised(r, shape):
    n, k = shape[-1], r.randint(1, 3)
    convolves = len(shape) == 2 and r.random() < 0.5
    layer = f"nn.Conv1d({shape[0]}, {k}, 2)" if convolves else f"nn.Linear({n}, {k})"
    how = r.choice(["weight_norm", "weight_norm", "spectral_norm"])
    return module(f"nn.utils.parametrizations.{how}({layer})")


def skip(r, _):
    name = r.choice(["s0", "s1"])
    return lines(expression(r.choice(SKIPS), s=name) if r.random() < 0.7 else f"{name} = z")


def unused(r, _):
    code = ["nn.Linear(2, 1)", "nn.BatchNorm1d(1)", "nn.Conv1d(1, 1, 1)"]
    return f"self.m# = {r.choice(code)}", "pass"


def frozen(_, shape):
    return module(f"nn.Linear({shape[-1]}, 2).requires_grad_(False)")


BLOCKS = {linear: 10, act: 12, function: 8, write: 4, over_units: 5, convolution: 12, norm: 6}
BLOCKS |= {pool: 5, view: 6, rearranged: 5, broadcast: 4, computed: 4, two_inputs: 1, gate: 4}
BLOCKS |= {again: 4, tied: 3, nested: 3, attention: 16, recurrent: 8, parametrised: 3, skip: 16}
BLOCKS |= {unused: 1, frozen: 1}
# What may stand in an nn.Sequential of torch's own modules.
MODULES = (linear, act, convolution, norm, pool, view, parametrised)

CLASSES = {
    function.__name__: inspect.getsource(function)
    for function in (lying.DoubledSquare, lying.CutCube, lying.OnceSine, lying.Sine)
}


def on(statement, code):
    """A line under a ``with``; where ``self.plain`` is set, without."""
    return f"with {statement}:\n    {code}"


# Kind → what __init__ and forward do. ``self.plain`` is set in a copy that says what is right.
COUNTER = "self.register_buffer('count#', torch.zeros((), dtype=torch.long))"
AUTOCAST = "torch.autocast('cpu', torch.bfloat16, enabled=not self.plain)"
COUNT = "self.count# += 1"
SPREAD = ".view(-1, *[1] * (z.ndim - 1))"
TRAPS = {
    "detach": [
        "z = z.detach() + z / 2",
        "z = z * torch.sigmoid(z).detach()",
        "z = z.detach()",
        "z = z * torch.sigmoid(z).detach() + z**2",
    ],
    "detached mean": [
        "z = z + z.mean(-1, keepdim=True).detach()",
        "z = torch.sin(z) + z.mean(1, keepdim=True).detach()",
        "z = z - z.amax(-1, keepdim=True).detach() / 2",
    ],
    "data": ["z = z + z.data.sin()", "z = z * z.data", "z.data.mul_(1.5)"],
    "no_grad": [on("torch.no_grad()", "z = z.sin()"), on("torch.no_grad()", "z = z * 1.5")],
    "numpy": ["z = z * torch.from_numpy(z.detach().numpy().copy())"],
    "straight-through": [
        "z = z + (torch.sign(z) - z).detach()",
        "z = z + (torch.round(z) - z).detach()",
        "z = z + ((z > 0).to(z) - torch.sigmoid(z)).detach()",
    ],
    "wrong backward": ["z = DoubledSquare.apply(z)"],
    "backward cut off": ["z = CutCube.apply(z)"],
    "once differentiable": ["z = OnceSine.apply(z)"],
    "own function": ["z = Sine.apply(z)"],
    "batch mean": [
        "z = z - z.mean(0, keepdim=True)",
        "z = z - z.mean(0, keepdim=True).detach()",
        "z = z - 0.01 * z.mean(0)",
        "z = z / (1 + z.std(0, correction=0))",
    ],
    "batch median": [
        "z = z * (z > z.median())",
        "z = z * (z >= z.median(0).values)",
        "z = z + (z > z.mean())",
        "z = z * (z >= z.max())",
    ],
    "batch order": [
        f"z = z + torch.arange(len(z)).to(z){SPREAD}",
        "z = z.cumsum(0)",
        "z = z.flip(0)",
        "z = z + len(z)",
    ],
    "batch statistics": [
        ("self.m# = nn.BatchNorm1d(z.shape[1], track_running_stats=False)", "z = self.m#(z)")
    ],
    "silent counter": [(COUNTER, COUNT)],
    "kept activation": ["self.kept = z.detach()", "self.kept = z"],
    "float32": [
        "z = z.sin() if self.plain else z.float().sin().to(z)",
        "z = z if self.plain else z.float().to(z)",
    ],
    "autocast": [
        ("self.m# = nn.Linear(z.shape[-1], 2)", on(AUTOCAST, "z = self.m#(z).to(z)")),
        (
            "self.p# = nn.Parameter(torch.randn(z.shape[-1], 2))",
            on(AUTOCAST, "z = z @ self.p# if self.plain else (z.float() @ self.p#.float()).to(z)"),
        ),
    ],
    "padding index": [
        (
            "self.m# = nn.Embedding(3, 2, padding_idx=1)",
            f"z = z + self.m#((z.flatten(1)[:, :2] > 0).long()).flatten(1).sum(1){SPREAD}",
        ),
        (
            "self.p# = nn.Parameter(torch.randn(2, 2))",
            "how# = {} if self.plain else {'padding_idx': 1, 'scale_grad_by_freq': True}\n"
            "i# = (z.flatten(1)[:, :2] > 0).long()\n"
            f"z = z + F.embedding(i#, self.p#, **how#).flatten(1).sum(1){SPREAD}",
        ),
    ],
    # Only a refusal is right of these.
    "counter": [
        (COUNTER, f"{COUNT}\nz = z * (1 + 0.1 * self.count#)"),
        (COUNTER, f"{COUNT}\nz = z + (self.count# > 1)"),
    ],
    "noise": [
        "z = z + 0.1 * torch.randn_like(z)",
        "z = F.dropout(z, 0.4)",
        "z = z * (1 + 1e-3 * torch.rand(()))",
    ],
}
HOPELESS = ("counter", "noise")
BLINDS = {
    "large output": "z = z * torch.tensor([{scale}] + [1.0] * (z.shape[1] - 1)).to(z)",
    "large offset": "z = z + torch.tensor([{scale}] + [0.0] * (z.shape[1] - 1)).to(z)",
    "masked class": "z = z + torch.tensor([-{scale}] + [0.0] * (z.shape[1] - 1)).to(z)",
    "masked for good": "z = torch.cat([z, z.new_full((len(z), 1), -{scale})], 1)",
}


@dataclass
class Case:
    """A network as code.

    Attributes:
        seed: Of the draw.
        source: Defines ``model``, ``x``, ``family`` and, for some traps, ``truth``, the model that
            says what is right.
        traps: Their kinds.
    """

    seed: int
    source: str
    traps: tuple[str, ...] = ()
    scope: dict = field(default_factory=dict)

    @property
    def model(self):
        return self.scope["model"]

    @property
    def x(self):
        return self.scope["x"]

    @property
    def family(self):
        return self.scope["family"]

    @property
    def truth(self):
        return self.scope.get("truth", self.model)


HEADER = """import copy

import torch
import torch.nn.functional as F
from torch import nn

import fimlib

torch.manual_seed({seed})
"""
FOOTER = """
model = {model}.double().eval()
for parameter in model.parameters():
    fan_in = max(1, parameter[:1].numel()) if parameter.ndim > 1 else 1
    parameter.data = {gain} * torch.randn(parameter.shape, dtype=torch.float64) / fan_in**0.5
for m in model.modules():
    if getattr(m, "running_mean", None) is not None:
        m.running_mean.normal_()
        m.running_var.uniform_(0.5, 2)
"""


STYLES = ["graph"] * 6 + ["modules"] * 3 + ["dense"]
INPUTS = ["vector"] * 3 + ["sequence"] * 5 + ["signal"] * 2 + ["image"] * 3 + ["volume"]
INPUTS += ["tokens", "tokens", "index"]


class Drawing:
    """A network that grows block by block, each tried out on two inputs."""

    def __init__(self, r, style):
        self.r, self.style, self.sequential = r, style, style != "graph"
        self.probe = nn.Module()
        self.probe.plain = False
        self.scope = {"torch": torch, "nn": nn, "F": nn.functional, "self": self.probe}
        for text in CLASSES.values():
            exec(text, self.scope)
        self.steps = []

    @property
    def shape(self):
        return self.scope["z"].shape[1:]

    def start(self, kind):
        """Draw the input; what makes it is code."""
        r = self.r
        sizes = {
            "vector": (r.randint(2, 4),),
            "sequence": (r.randint(2, 4), r.randint(1, 3)),
            "signal": (r.randint(1, 3), r.randint(3, 6)),
            "image": (r.randint(1, 2), r.randint(3, 5), r.randint(3, 5)),
            "volume": (1, r.randint(2, 3), r.randint(2, 3), r.randint(2, 3)),
            "tokens": (r.randint(2, 4),),
            "index": (1,),
        }[kind]
        shape = ", ".join(map(str, sizes))
        self.input = f"x = torch.randn(B, {shape}, dtype=torch.float64)"
        self.scope["z"] = torch.randn(2, *sizes)
        if kind in ("tokens", "index"):
            self.input = f"x = torch.randint(4, (B, {shape}))"
            self.scope["z"] = torch.randint(4, (2, *sizes))
            self.take(self.embedding(kind))

    def embedding(self, kind):
        k, mode = self.r.randint(1, 3), self.r.choice(["sum", "mean", "max"])
        if kind == "index":
            return f"self.m# = nn.Embedding(4, {k})", "z = self.m#(z[:, 0])"
        bag = f"nn.EmbeddingBag(4, {k}, mode={mode!r})"
        return module(self.r.choice([f"nn.Embedding(4, {k})"] * 2 + [bag]))

    def take(self, step, most=MAX_PARAMETERS):
        """Keep a step if it runs and the network stays small."""
        if step is None:
            return False
        number = str(len(self.steps))
        shape = self.scope["z"].shape
        made, forward = (text.replace("#", number) for text in step)
        made = re.sub(r"z\.shape\[(-?\d)\]", lambda m: str(shape[int(m[1])]), made)
        before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in self.scope.items()}
        probe = copy.copy(self.probe)  # whose modules may be others, and are not called in training
        held = vars(self.probe).items()
        probe.__dict__ = {k: dict(v) if isinstance(v, dict) else v for k, v in held}
        self.scope["self"] = probe
        try:
            exec(made, self.scope)
            probe.eval()
            with torch.no_grad():
                exec(forward, self.scope)
            z = self.scope["z"]
            size = sum(p.numel() for p in probe.parameters())
            fits = z.is_floating_point() and z.ndim > 1 and len(z) == 2 and size <= most
            fits = fits and 0 < z[0].numel() <= MAX_UNITS and bool(z.isfinite().all())
        except Exception:  # whatever a block raises at a shape that it does not fit
            fits = False
        if not fits:
            self.scope = before
            return False
        self.probe = probe
        self.steps.append((made, forward))
        return True

    def grow(self, depth):
        """Blocks at random, as many as fit of so many."""
        if self.style == "graph":
            blocks = BLOCKS
        elif self.style == "dense":
            blocks = {linear: 6, act: 6, function: self.r.choice([0, 2])}
        else:
            blocks = {b: w for b, w in BLOCKS.items() if b in MODULES}
            if self.r.random() < 0.4:
                blocks |= {function: 5, over_units: 2, broadcast: 2, write: 2}
        for _ in range(depth):
            self.any_of(blocks)

    def any_of(self, blocks):
        for _ in range(8):
            (block,) = self.r.choices(list(blocks), list(blocks.values()))
            if self.take(block(self.r, self.shape), MAX_PARAMETERS - 12):
                return

    def finish(self):
        """One row of outputs for every input."""
        r = self.r
        while len(self.shape) > 1:
            code = f"z = {r.choice(REDUCTIONS)}"
            step = module("nn.Flatten()") if self.sequential or "flatten" in code else lines(code)
            self.take(step)
        n = self.shape[0]
        if n > 4 or r.random() < 0.85:
            for k in (r.randint(1, 4), 2, 1):
                if self.take(module(f"nn.Linear({n}, {k})"), MAX_PARAMETERS + 12):
                    break
        if r.random() < 0.1:
            self.any_of({act: 1, norm: 1} if self.sequential else {act: 1, norm: 1, over_units: 1})

    def code(self):
        """The classes, and the expression that makes the model."""
        text = "".join(f"\n\n{c}" for n, c in CLASSES.items() if f" {n}.apply" in str(self.steps))
        if not self.sequential:
            made = "\n".join(m for m, _ in self.steps if m)
            return text + network("Net", made, "\n".join(f for _, f in self.steps)), "Net()"
        parts = []
        for number, (made, forward) in enumerate(self.steps):
            plain = re.fullmatch(r"self\.m\d+ = (.*)", made)
            if plain and forward == f"z = self.m{number}(z)":
                parts.append(plain[1])
            else:
                text += network(f"Own{number}", made, forward)
                parts.append(f"Own{number}()")
        return text, "nn.Sequential(\n    " + ",\n    ".join(parts) + ",\n)"


def network(name, made, forward):
    def indent(text):
        return "\n".join(f"        {line}" for line in text.splitlines())

    plain = "        self.plain = False\n" if "self.plain" in forward else ""
    return (
        f"\n\nclass {name}(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"{plain}{indent(made)}\n\n    def forward(self, z):\n{indent(forward)}\n        return z\n"
    ).replace("\n\n\n    def forward", "\n\n    def forward")


def attempt(seed, number, traps):
    """A script, or None if it does not run."""
    r = random.Random(f"{seed} {number} {traps}")
    style = r.choice(["graph", "graph", "dense", "modules"] if traps else STYLES)
    drawing = Drawing(r, style)
    drawing.start("vector" if style == "dense" else r.choice(INPUTS))
    found = ()
    if traps:
        drawing.grow(r.randint(1, 3))
        kind = list(TRAPS)[seed % len(TRAPS)]
        step = r.choice(TRAPS[kind])
        if not drawing.take(step if isinstance(step, tuple) else lines(step)):
            return None
        found = (kind,)
        drawing.grow(r.randint(0, 2))
    else:
        drawing.grow(r.choice([1, 2, 3, 4, 5, 6, 8]))
    drawing.finish()
    if traps and r.random() < 0.4:
        kind, code = r.choice(list(BLINDS.items()))
        if drawing.take(lines(code.format(scale=r.choice(["1e4", "1e5", "1e6"])))):
            found += (kind,)
    text, model = drawing.code()
    source = HEADER.format(seed=seed) + text
    source += FOOTER.format(model=model, gain=r.choice([0.6, 0.9, 1.2]))
    source += f"B = {r.choice([2, 3, 4]) if traps else r.choice([1, 2, 2, 3])}\n{drawing.input}\n"
    if "self.plain" in source:
        source += "truth = copy.deepcopy(model)\nfor m in truth.modules():\n    m.plain = True\n"
    if r.random() < 0.3:
        source += "for parameter in list(model.parameters())[::2]:\n"
        source += r.choice(
            [
                "    parameter.grad = torch.ones_like(parameter)\n",
                "    parameter.requires_grad_(False)\n",
            ]
        )
    case = Case(seed, source, found)
    run(case)
    with torch.no_grad():
        h = copy.deepcopy(case.truth)(case.x.clone())
    if not is_fine(case, h):
        return None
    case.source += family_of(r, h)
    run(case)
    return case


def is_fine(case, h):
    """Whether the outputs are numbers of a use, and, unless it is a trap, each input's own."""
    if h.ndim != 2 or len(h) != len(case.x) or not h.isfinite().all() or h.shape[1] > 5:
        return False
    if set(case.traps) & set(HOPELESS):
        return is_fickle(case)
    if case.traps:
        return not is_steep(case, h)
    alone = torch.cat([copy.deepcopy(case.model)(one.clone()) for one in case.x.split(1)])
    if h.abs().max() > 50 or not torch.allclose(h, alone, rtol=1e-9, atol=1e-12):
        return False
    own = copy.deepcopy(case.model).requires_grad_()
    sizes = []
    for x in (case.x, *case.x.split(1)):  # which torch may refuse, after writes into a view
        h = own(x.clone()).sum()
        J = torch.autograd.grad(h, list(own.parameters()), allow_unused=True)
        sizes.append(max(float(g.abs().max()) for g in J if g is not None))
    return 1e-4 < sizes[0] < 1e3


def is_steep(case, h):
    """Whether weights that move by 10⁻⁶ move the outputs by 10⁻³: no quotient is the derivative."""
    own = copy.deepcopy(case.truth)
    generator = torch.Generator().manual_seed(0)
    for p in own.parameters():
        p.data += 1e-6 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    with torch.no_grad():
        return bool(((own(case.x.clone()) - h).abs() > 1e-3).any())


def is_fickle(case):
    """Whether a network gives other outputs each time."""
    own = copy.deepcopy(case.model)
    first, second = (own(case.x.clone()).detach() for _ in range(2))
    return bool(((first - second).abs() > 1e-5 * (1 + first.abs())).any())


def family_of(r, h):
    """Code for a family that the outputs fit."""
    T, largest = h.shape[1], float(h.max())
    names = ["Gaussian()", "Bernoulli()"]
    names += ["Categorical()"] * (3 if T > 1 else 0)
    names += ["Poisson()"] if T <= 2 and largest < 2 else []
    names += ["GaussianHead()"] * 2 if T % 2 == 0 and float(h[:, T // 2 :].abs().max()) < 4 else []
    if r.random() < 0.15 and T <= 4:
        root = f"root = torch.randn({T}, {T}, dtype=torch.float64)\n"
        return root + "family = fimlib.Gaussian(root @ root.mT + torch.eye(len(root)))\n"
    return f"family = fimlib.{r.choice(names)}\n"


def run(case):
    case.scope = {"__name__": "fuzz"}
    exec(compile(case.source, f"<fuzz {case.seed}>", "exec"), case.scope)


def draw(seed, traps=False):
    """The network of a seed."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(1000):
            torch.manual_seed(number)
            try:
                case = attempt(seed, number, traps)
            except Exception:  # whatever torch says of a network that does not run
                continue
            if case is not None:
                return case
    raise RuntimeError(f"seed {seed}: no network runs")
