"""The networks of the table "Networks of today", with random weights and inputs.

Those of transformers and peft need these packages, which no other part of the project needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fimlib
from fimlib.families import Heads, Positions
from support.bench import networks
from support.bench.networks import CLASSES, Transformer, lenet, resnet

Batch = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A network, a batch of its inputs, and what its outputs mean."""

    title: str  # what it is, in words
    make: Callable[[], nn.Module]  # weights from torch's generator
    batch: Callable[[], Batch]
    family: fimlib.Family = CLASSES  # of its labels
    # What ``accumulate``, ``estimate`` and ``summarise`` need beyond model, inputs and family:
    options: Mapping[str, Any] = field(default_factory=dict)  # ``forward`` and ``layers``
    packages: tuple[str, ...] = ()  # what pip calls the libraries that it needs, apart from torch

    def inputs(self, batch: Batch) -> Tensor | list[Batch]:
        """What fimlib gets: a tensor, or a list of batches of any kind."""
        return batch if isinstance(batch, Tensor) else [batch]

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the network makes of a batch."""
        forward = self.options.get("forward")
        h: Tensor = model(batch) if forward is None else forward(model, batch)
        return h

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of the batch, as in training, with labels 0."""
        return loss(self.family, self.outputs(model, batch))


def loss(family: fimlib.Family, h: Tensor) -> Tensor:
    """Cross-entropy of classes, squares of numbers; of several heads, their sum."""
    if isinstance(family, Heads):
        parts = h.split([size for _, size in family.heads.values()], dim=1)
        own = [loss(f, part) for (f, _), part in zip(family.heads.values(), parts, strict=True)]
        return torch.stack(own).sum()
    if isinstance(family, Positions):
        return loss(family.family, family.flatten(h).reshape(-1, family.size))
    if isinstance(family, fimlib.Categorical):
        return nn.functional.cross_entropy(h, torch.zeros(len(h), dtype=torch.long))
    return h.square().mean()


# Modules.


class TwoHeads(nn.Module):
    """A body with two linear layers behind it, one for classes and one for numbers."""

    def __init__(self, body: nn.Module, width: int, classes: int, numbers: int) -> None:
        super().__init__()
        self.body = body
        self.classes, self.numbers = nn.Linear(width, classes), nn.Linear(width, numbers)

    def forward(self, x: Tensor) -> Tensor:
        """To [B, classes + numbers]."""
        h = torch.sigmoid(self.body(x))
        return torch.cat([self.classes(h), self.numbers(h)], 1)


class UNet(nn.Module):
    """Convolutions down to half the size and up again, with a shortcut; classes at each pixel."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.down, self.inner = convolution(3, width), convolution(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.joined, self.head = convolution(2 * width, width), nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, classes, H, W]."""
        h = self.down(x)
        inner = self.up(self.inner(nn.functional.avg_pool2d(h, 2)))
        out: Tensor = self.head(self.joined(torch.cat([h, inner], 1)))
        return out


def convolution(n_in: int, n_out: int) -> nn.Sequential:
    """3×3, a group norm, a ReLU."""
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1), nn.GroupNorm(2, n_out), nn.ReLU())


class Experts(nn.Module):
    """A mixture of experts: each word goes through two of them."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, width] to the same."""
        scores, chosen = self.gate(x).topk(2)
        weights = torch.zeros_like(self.gate(x)).scatter(-1, chosen, scores.softmax(-1))
        for weight, expert in zip(weights.unbind(-1), self.experts, strict=True):
            x = x + weight[..., None] * expert(x)
        return x


class StateSpace(nn.Module):
    """A selective state-space layer in the manner of Mamba, one step after the other."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.step, self.write = nn.Linear(width, width), nn.Linear(width, states)
        self.read, self.log_rate = nn.Linear(width, states), nn.Parameter(torch.rand(width, states))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, width] to the same."""
        u, gate = self.into(x).chunk(2, -1)
        step, write, read = nn.functional.softplus(self.step(u)), self.write(u), self.read(u)
        state, out = torch.zeros(()), []
        for t in range(x.shape[1]):
            pace = step[:, t, :, None]
            added = pace * u[:, t, :, None] * write[:, t, None]
            state = torch.exp(-pace * self.log_rate.exp()) * state + added
            out.append((state * read[:, t, None]).sum(-1))
        mixed: Tensor = self.out(torch.stack(out, 1) * nn.functional.silu(gate))
        return x + mixed


class MeanOver(nn.Module):
    """The mean over the positions."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, width] to [B, width]."""
        return x.mean(1)


def of_experts(width: int, words: int) -> nn.Sequential:
    """A language model of one layer of attention and one of experts."""
    attention = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True)
    return nn.Sequential(
        nn.Embedding(words, width), attention, Experts(width, 4), nn.Linear(width, words)
    )


def of_states(row: int, width: int) -> nn.Sequential:
    """A classifier of images, row by row."""
    layers = [StateSpace(width, 4), StateSpace(width, 4)]
    return nn.Sequential(nn.Linear(row, width), *layers, MeanOver(), nn.Linear(width, 10))


# Models of transformers and peft, by their configurations.


def of_transformers(name: str, kind: str, words: int, width: int, **more: Any) -> nn.Module:
    """A model with random weights, as GPT2LMHeadModel, with two layers and two heads."""
    library = importlib.import_module("transformers")
    sizes = {"vocab_size": words, "hidden_size": width}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(library, f"{name}Config")(**sizes, **layers, **more)
    model: nn.Module = getattr(library, f"{name}{kind}")(config)
    return model


def with_adapters(model: nn.Module) -> nn.Module:
    """GPT-2, frozen, with adapters of rank 4 on its attention."""
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    adapted: nn.Module = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # 0 at first, so that A has no derivative
            nn.init.normal_(parameter, std=0.02)
    return adapted


# Batches, and what the networks make of them.


def texts(count: int, length: int, words: int) -> dict[str, Tensor]:
    """Random words; every second text ends a quarter earlier, in padding."""
    ids, mask = torch.randint(1, words, (count, length)), torch.ones(count, length).long()
    mask[::2, length - length // 4 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of a model of transformers."""
    h: Tensor = model(**batch).logits
    return h


def words_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Those at every position, [B, L, V]; 0 at padding, which then counts nothing."""
    return logits(model, batch) * batch["attention_mask"][..., None]


def plain_words(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same for a causal model that takes words alone."""
    h: Tensor = model(batch["input_ids"])
    return h * batch["attention_mask"][..., None]


# The tasks.


def vision(quick: bool) -> dict[str, Task]:
    """Networks for images."""

    def task(title: str, make: Callable[[], nn.Module], *shape: int, **more: Any) -> Task:
        return Task(title, make, lambda: torch.rand(*shape), **more)

    known = {key: networks.network(key, quick=quick) for key in ("mlp", "lenet", "vit")}
    both = Heads({"class": (CLASSES, 10), "box": (fimlib.Gaussian(), 4)})
    pixels = Positions(CLASSES, 3, class_dim=1)
    body = partial(lenet, *((10, (2, 3), [6, 5], 3) if quick else (28, (6, 16), [120, 84], 5)))
    images, channels, side, edge, wide = (2, 4, 4, 4, 5) if quick else (16, 16, 28, 12, 84)
    return {
        **{key: task(n.title, n.make, 2 * images, *n.shape) for key, n in known.items()},
        "resnet": task("ResNet-8", partial(resnet, channels, 3, 1, 32), channels // 2, 3, 32, 32),
        "states": task(
            "state-space layers, row by row", partial(of_states, side, side), images, side, side
        ),
        "two-heads": task(
            "LeNet with two heads", lambda: TwoHeads(body(), wide, 10, 4),
            *(2 * images, *known["lenet"].shape), family=both,
        ),
        "unet": task("U-Net", partial(UNet, channels // 2, 3), 4, 3, edge, edge, family=pixels),
    }  # fmt: skip


def language(quick: bool) -> dict[str, Task]:
    """Networks for texts; those of transformers have two layers."""
    count, length, words, width = (2, 4, 6, 4) if quick else (4, 8, 50, 48)
    batch = partial(texts, count, length, words)
    twice: dict[str, Any] = {"intermediate_size": 2 * width}

    def task(title: str, make: Callable[[], nn.Module], forward: object, **more: Any) -> Task:
        """With a word at each position, unless ``more`` says otherwise."""
        usual = {"batch": batch, "family": Positions(CLASSES, words)}
        return Task(title, make, **{**usual, "options": {"forward": forward}, **more})

    def ready(name: str, kind: str = "ForCausalLM", **more: Any) -> Callable[[], nn.Module]:
        return partial(of_transformers, name, kind, words, width, **more)

    gpt2, needs = ready("GPT2", "LMHeadModel"), ("transformers",)
    found = {
        "gpt": task("GPT", partial(Transformer, width, 2, 2, length, words), plain_words),
        "experts": Task(
            "mixture of experts", partial(of_experts, width // 2, words),
            lambda: batch()["input_ids"], Positions(CLASSES, words),
        ),
        "gpt2": task("GPT-2", gpt2, words_of, packages=needs),
        "lora": task(
            "GPT-2 with LoRA", lambda: with_adapters(gpt2()), words_of, packages=(*needs, "peft"),
            options={"forward": words_of, "layers": "trainable"},
        ),
        "llama": task(
            "Llama", ready("Llama", num_key_value_heads=1, **twice), words_of, packages=needs
        ),
        "bert": task(
            "BERT", ready("Bert", "ForSequenceClassification", num_labels=3, **twice), logits,
            packages=needs, family=CLASSES,
        ),
        "t5": task(
            "T5", ready("T5", "ForConditionalGeneration", d_kv=width // 2, d_ff=2 * width), logits,
            packages=needs, batch=lambda: {**batch(), "decoder_input_ids": batch()["input_ids"]},
        ),
    }  # fmt: skip
    if not quick:
        large = networks.network("gpt")
        found["large"] = task(
            large.title, large.make, plain_words, batch=partial(texts, 8, 64, 2000),
            family=large.family,
        )  # fmt: skip
    return found


def tasks(quick: bool = False) -> dict[str, Task]:
    """All of them, by their keys."""
    return vision(quick) | language(quick)


def problem(task: Task) -> tuple[nn.Module, Batch]:
    """The network in eval mode, and a batch; always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return task.make().eval(), task.batch()
