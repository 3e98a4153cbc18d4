"""The networks that are measured, with random weights and inputs from fixed seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

import fimlib
from fimlib.families import Positions

Loss = Callable[[Tensor, Tensor], Tensor]
BATCHES = (1, 32, 1000)
CLASSES = fimlib.Categorical()


@dataclass(frozen=True)
class Network:
    """A network to measure."""

    title: str  # what it is, in words
    shape: tuple[int, ...]  # of one input
    make: Callable[[], nn.Module]  # weights from torch's generator
    outputs: int  # T, for one input
    batches: Sequence[int] = BATCHES  # B, the inputs
    family: fimlib.Family = CLASSES  # of its labels
    loss: Loss = nn.functional.cross_entropy  # the mean over the batch, as in training


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with sigmoids between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


def lenet(
    size: int, channels: tuple[int, int], hidden: Sequence[int], kernel: int
) -> nn.Sequential:
    """Two convolutions with average pooling, three linear layers, sigmoids; size × size pixels."""
    side, layers = size, []
    for n_in, n_out in pairwise((1, *channels)):
        layers += [nn.Conv2d(n_in, n_out, kernel), nn.Sigmoid(), nn.AvgPool2d(2)]
        side = (side - kernel + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), *mlp(channels[-1] * side**2, *hidden))


class Residual(nn.Module):
    """Two 3×3 convolutions with batch norms, beside a shortcut."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(*normed(n_in, n_out, 3, stride), *normed(n_out, n_out, 3)[:2])
        same = (n_in, stride) == (n_out, 1)
        self.shortcut = nn.Sequential(*([] if same else normed(n_in, n_out, 1, stride)[:2]))
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, H, W] to [B, n_out, H / stride, W / stride]."""
        h: Tensor = self.last(self.inner(x) + self.shortcut(x))
        return h


def normed(n_in: int, n_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution, a batch norm, and a ReLU."""
    convolution = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(n_out), nn.ReLU()]


def resnet(width: int, stages: int, blocks: int, size: int) -> nn.Sequential:
    """A ResNet for small images; every stage after the first has twice the width."""
    layers, n_in = normed(3, width, 3), width
    for stage in range(stages):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(Residual(n_in, width * 2**stage, stride))
            n_in = width * 2**stage
    pool = nn.AvgPool2d(size // 2 ** (stages - 1))
    return nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(n_in, 10))


class Transformer(nn.Module):
    """Tokens with learnt positions through encoder layers.

    With a vocabulary: causal, and logits of the next word at each position by the same embedding.
    Else: of image patches to 10 classes.
    """

    def __init__(
        self, width: int, heads: int, depth: int, tokens: int, vocabulary: int = 0, patch: int = 0
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Embedding(vocabulary, width) if vocabulary else nn.Linear(patch**2, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, nn.functional.gelu, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = None if vocabulary else nn.Linear(width, 10)
        if vocabulary:
            nn.init.normal_(self.embed.weight, std=0.02)
        self.register_buffer(
            "mask", nn.Transformer.generate_square_subsequent_mask(tokens) if vocabulary else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Words [B, L] to [B, L, V], or images [B, H, W] to [B, 10]."""
        if self.head is not None:
            p = self.patch
            x = x.unfold(1, p, p).unfold(2, p, p).flatten(3).flatten(1, 2)
        h = self.embed(x) + self.position
        for layer in self.layers:
            h = layer(h, src_mask=self.mask)
        h = self.norm(h)
        if self.head is None:
            return nn.functional.linear(h, self.embed.weight)
        out: Tensor = self.head(h.mean(1))
        return out


def decoder(code: int, channels: int, size: int) -> nn.Sequential:
    """From a code [code, 1, 1] to size × size numbers, by transposed convolutions."""
    return nn.Sequential(
        nn.ConvTranspose2d(code, channels, size // 4),
        nn.Sigmoid(),
        nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1),
        nn.Sigmoid(),
        nn.ConvTranspose2d(channels // 2, 1, 4, 2, 1),
        nn.Flatten(),
    )


def of_widths(widths: Sequence[int], title: str = "") -> Network:
    """An MLP of these widths."""
    text = "-".join(map(str, widths))
    return Network(f"{title}{text}", (widths[0],), lambda: mlp(*widths), widths[-1])


def gpt(
    title: str, shape: tuple[int, int, int], tokens: int, vocabulary: int, batches: Sequence[int]
) -> Network:
    """A language model, one label at each position; shape: width, heads, layers."""
    return Network(
        title,
        (tokens,),
        lambda: Transformer(*shape, tokens, vocabulary),
        tokens * vocabulary,
        batches,
        Positions(fimlib.Categorical(), vocabulary),
        lambda h, y: nn.functional.cross_entropy(h.flatten(0, 1), y.flatten()),
    )


def regression(title: str, shape: tuple[int, int, int], batches: Sequence[int]) -> Network:
    """A decoder with Gaussian outputs of variance 1."""
    return Network(
        title,
        (shape[0], 1, 1),
        lambda: decoder(*shape),
        shape[-1] ** 2,
        batches,
        fimlib.Gaussian(),
        nn.functional.mse_loss,
    )


FULL = {
    "mlp": of_widths([784, 128, 64, 32, 10], "MLP "),
    "wide": of_widths([784, 1024, 1024, 1024, 10], "wide MLP "),
    "lenet": Network("LeNet", (1, 28, 28), lambda: lenet(28, (6, 16), [120, 84, 10], 5), 10),
    "resnet": Network(
        "ResNet-18 for 32×32 images", (3, 32, 32), lambda: resnet(64, 4, 2, 32), 10, (1, 8)
    ),
    "vit": Network(
        "vision transformer, 64 tokens", (32, 32), lambda: Transformer(56, 4, 2, 64, patch=4), 10
    ),
    "gpt": gpt("GPT, 64 positions, 2,000 words", (128, 4, 4), 64, 2000, (1, 8)),
    "decoder": regression("decoder with 4,096 outputs", (16, 8, 64), (1,)),
}
QUICK = {
    "mlp": of_widths([12, 8, 6, 4, 3], "tiny MLP "),
    "wide": of_widths([12, 16, 16, 16, 3], "tiny wide MLP "),
    "lenet": Network("tiny LeNet", (1, 10, 10), lambda: lenet(10, (2, 3), [6, 5, 3], 3), 3),
    "resnet": Network("tiny ResNet", (3, 8, 8), lambda: resnet(2, 2, 1, 8), 10),
    "vit": Network("tiny ViT", (4, 4), lambda: Transformer(4, 2, 1, 4, patch=2), 10),
    "gpt": gpt("tiny GPT", (4, 2, 1), 3, 5, (1, 4)),
    "decoder": regression("tiny decoder", (2, 2, 4), (1, 4)),
}


def network(key: str | Sequence[int], *, quick: bool = False) -> Network:
    """A network by its name, or an MLP by its widths."""
    return (QUICK if quick else FULL)[key] if isinstance(key, str) else of_widths(key)


def problem(network: Network, batch: int, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The network in eval mode, inputs and targets, all on the device; always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network.make().eval()
        x = torch.rand(batch, *network.shape)
        if isinstance(network.family, Positions):
            x = torch.randint(network.family.size, (batch, *network.shape))
            y = x.roll(-1, 1)
        elif isinstance(network.family, fimlib.Gaussian):
            y = torch.rand(batch, network.outputs)
        else:
            y = torch.randint(network.outputs, (batch,))
    return model.to(device), x.to(device), y.to(device)
