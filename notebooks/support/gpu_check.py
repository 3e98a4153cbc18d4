"""Compare what fimlib computes on the CPU and on the GPU (`make gpu-check`).

Tolerances, relative to the largest entry of each tensor: 1e-9 where the network is float64, 1e-3
where it is float32 (moments are float64 in both). The network is the experiment's, with random
weights and inputs, so no data is needed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fimlib
from support.bench.networks import mlp

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def network() -> nn.Sequential:
    """784-128-64-32-10 with sigmoid, as in the experiment, weights from a fixed seed."""
    torch.manual_seed(0)
    return mlp(784, 128, 64, 32, 10).eval()


def quantities(net: nn.Module, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Everything that the experiment computes, on the device of the network."""
    family, derivs = fimlib.Categorical(), fimlib.differentiate(net, x)
    lam = fimlib.spectrum(family, derivs.outputs)
    yield from zip(lam._fields, lam, strict=True)
    yield "certified", fimlib.lambda_max(family, derivs.outputs, method="certified")
    bounds = fimlib.theorem_4_1(derivs, family, eigenvalues=lam)
    # The same labels on both devices: each device's own generator would draw others.
    weights = torch.arange(1.0, 11.0, dtype=torch.float64, device=x.device).expand(len(x), -1) / 55
    labels = fimlib.Labels(family, derivs.outputs.double(), weights, 55)
    diagonals = {
        "I": fimlib.fisher_information(derivs, family),
        "V1": fimlib.variance_i1(derivs, family),
        "V2": fimlib.variance_i2(derivs, family),
        "C12": fimlib.covariance_i1_i2(derivs, family),
        "I1": fimlib.estimate_i1(derivs, labels),
        "I2": fimlib.estimate_i2(derivs, labels),
        "V1 bound": bounds.variance_i1.upper,
        "V2 bound": bounds.variance_i2.upper,
    }
    for name, diagonal in diagonals.items():
        for parameter, tensor in diagonal.mean_over_inputs().items():
            yield f"{name} {parameter}", tensor


class Attention(nn.Module):
    """A layer of attention, a norm and a head, for the functional engine."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, length, 8] → [B, 3]."""
        z, _ = self.attention(x, x, x, need_weights=False)
        h: Tensor = self.head(self.norm(x + z).mean(1))
        return h


class Recurrent(nn.Module):
    """A recurrent layer and a head: cuDNN would refuse its backward pass in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.output = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, length, 8] → [B, 3]."""
        h: Tensor = self.output(self.recurrent(x)[0][:, -1])
        return h


def by_engine(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """I and the variances by every engine, and streamed, on a device."""
    torch.manual_seed(0)
    family, numbers = fimlib.Categorical(), torch.Generator().manual_seed(1)
    conv = [nn.Conv2d(1, 4, 5), nn.BatchNorm2d(4), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten()]
    for engine, net, shape, order in (
        ("layerwise", network(), (784,), 2),
        ("traced", nn.Sequential(*conv, nn.Linear(576, 10)).eval(), (1, 28, 28), 2),
        ("functional", Attention().eval(), (5, 8), 1),
        ("functional", Recurrent().eval(), (5, 8), 1),
    ):
        x = torch.rand(8, *shape, generator=numbers).to(device, dtype)
        net = net.to(device, dtype)
        derivs = fimlib.differentiate(net, x, engine=engine, order=order)
        found = {"I": fimlib.fisher_information, "V1": fimlib.variance_i1}
        found |= {"V2": fimlib.variance_i2} if order == 2 else {}
        joint = fimlib.accumulate(
            net, x, family, quantities=["Var_x I", *found], engine=engine, dtype=dtype, batch_size=3
        )
        streamed = joint.variance_i1(num_inputs=2)
        for parameter in streamed:
            for name, quantity in found.items():
                mean = quantity(derivs, family).mean_over_inputs()[parameter]
                yield f"{engine} {name} {parameter}", mean
            yield f"{engine} streamed V1 {parameter}", streamed[parameter]


def largest_differences(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Largest |device − CPU| of every quantity, relative to its largest entry."""
    x = torch.randn(64, 784, generator=torch.Generator().manual_seed(1)).to(dtype)
    net = network().to(dtype)
    on_cpu = dict(quantities(net, x)) | dict(by_engine("cpu", dtype))
    on_device = dict(quantities(copy.deepcopy(net).to(device), x.to(device)))
    on_device |= dict(by_engine(device, dtype))
    return {
        name: float((on_device[name].cpu() - value).abs().max())
        / max(float(value.abs().max()), 1e-300)
        for name, value in on_cpu.items()
    }


def main() -> int:
    """Print the largest differences; exit 1 where one is beyond its tolerance."""
    if not torch.cuda.is_available():
        print("gpu-check: there is no CUDA device here, so nothing was compared.")
        return 0
    print(f"gpu-check: {torch.cuda.get_device_name()}, torch {torch.__version__}")
    failed = False
    for dtype, tolerance in TOLERANCE.items():
        differences = largest_differences("cuda", dtype)
        name, worst = max(differences.items(), key=lambda item: item[1])
        verdict = "ok" if worst <= tolerance else "FAILED"
        failed |= worst > tolerance
        print(
            f"{dtype}: {len(differences)} quantities, largest relative difference {worst:.1e} "
            f"({name}), tolerance {tolerance:.0e}: {verdict}"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
