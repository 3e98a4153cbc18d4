"""Networks, inputs, softmax vectors and interruptions that the tests share."""

from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Cube(nn.Module):
    """An activation that no library has a name for."""

    def forward(self, s):
        return s**3 / 3 + torch.sin(s)


class Call(nn.Module):
    """A forward pass written out, ``forward(self, x)``, over modules and parameters by name."""

    def __init__(self, forward, seed=0, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)
        torch.manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)
        for module in self.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        self.double().eval()

    def forward(self, x):
        return self.run(self, x)


class Failing(TorchDispatchMode):
    """Lets so many operations pass, and then breaks."""

    def __init__(self, passes):
        super().__init__()
        self.left = passes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return func(*args, **(kwargs or {}))


def mlp(widths, activation, seed=0, scale=1.0, **linear):
    """Dense network in float64, eval mode, with weights large enough to be non-linear."""
    torch.manual_seed(seed)
    layers = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out, **linear), activation()]
    net = nn.Sequential(*layers[:-1]).double().eval()
    for parameter in net.parameters():
        parameter.data.mul_(scale)
    return net


def inputs(batch, width, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, width, generator=generator, dtype=torch.float64)


ADVERSARIAL = {
    "uniform C=2": [0.5, 0.5],
    "uniform C=10": [0.1] * 10,
    "half-half": [0.5, 0.5 - 1e-9, 5e-10, 5e-10],
    "two near half, C=10": [0.49, 0.49] + [0.0025] * 8,
    "certain 1 - 1e-3": [1 - 1e-3] + [1e-3 / 9] * 9,
    "certain 1 - 1e-12": [1 - 1e-12] + [1e-12 / 9] * 9,
    "geometric C=100": [0.8**k for k in range(100)],
    "C=2 skew": [0.999, 0.001],
}


def logits_of(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()[None]


@st.composite
def logits(draw, max_classes=12):
    """Random logits [1, C] at scales from near-uniform to near-certain."""
    num_classes = draw(st.integers(2, max_classes))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 3.0, 10.0, 30.0]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(1, num_classes, generator=generator, dtype=torch.float64)
