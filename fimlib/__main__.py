"""``python -m fimlib``: how wrong a saved network's diagonal Fisher is, in one table.

``python -m fimlib estimate`` estimates it, for networks of any size, and saves it.

Examples::

    python -m fimlib mynet:build --weights state.pt --inputs x.npy
    python -m fimlib model.pt --trust --inputs x.pt --family gaussian --json
    python -m fimlib estimate mynet:build --weights state.pt --inputs x.npy --output I.safetensors
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import math
import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fimlib._files import check_path
from fimlib.estimates import Estimate
from fimlib.families.base import Family
from fimlib.families.categorical import Categorical
from fimlib.families.gaussian import Gaussian, GaussianHead
from fimlib.families.independent import Bernoulli, Poisson
from fimlib.precision import BY_VARIANCE
from fimlib.projections import DRAWS, PASSES, SQUARES, estimate
from fimlib.summary.measure import BUDGET, NUM_PROBES, Summary, summarise

Found = TypeVar("Found", Summary, Estimate)

FAMILIES: dict[str, Callable[[], Family]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "gaussian": Gaussian,
    "gaussian-head": GaussianHead,
}
# What fimlib, torch and the network itself raise at what a user passes.
USERS = (
    ValueError, TypeError, NotImplementedError, RuntimeError, ImportError, AttributeError,
    IndexError, KeyError, OSError, SyntaxError, pickle.UnpicklingError,
)  # fmt: skip


class UsageError(Exception):
    """What was asked for cannot be done; the message says why and what to do."""


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit status 2 with one line on what is wrong, if something is."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may not know Î₁
    words = sys.argv[1:] if argv is None else argv
    is_estimate = words[:1] == ["estimate"]
    arguments = (
        estimate_parser().parse_args(words[1:]) if is_estimate else parser().parse_args(words)
    )
    try:
        (run_estimate if is_estimate else run_summary)(arguments)
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UsageError, *USERS) as error:
        kind = "" if isinstance(error, UsageError | ValueError) else f"{type(error).__name__}: "
        tell("error", f"{kind}{error}")
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def run_summary(arguments: argparse.Namespace) -> None:
    """Print what ``summarise`` finds."""
    if arguments.plot:
        check_plot(arguments.plot)
    found = with_warnings(
        arguments,
        lambda model, x, family: summarise(
            model, x, family,
            num_samples=arguments.num_samples, relative_error=arguments.relative_error,
            confidence=arguments.confidence, rule=arguments.rule,
            layers=of_layers(arguments.layers), engine=arguments.engine,
            num_probes=arguments.num_probes, budget=arguments.budget,
        ),
    )  # fmt: skip
    print(json.dumps(as_json(found), indent=1) if arguments.json else found, flush=True)
    if arguments.plot:
        found.plot().savefig(arguments.plot)


def run_estimate(arguments: argparse.Namespace) -> None:
    """Print what ``estimate`` finds, and save it."""
    if arguments.output:
        check_path(arguments.output)
        if arguments.checkpoint and arguments.checkpoint.resolve() == arguments.output.resolve():
            raise UsageError("--output and --checkpoint need a file each.")
    found = with_warnings(
        arguments,
        lambda model, x, family: estimate(
            model, x, family,
            estimator=arguments.estimator, squares=arguments.squares, passes=arguments.passes,
            relative_error=arguments.relative_error, batch_size=arguments.batch_size,
            layers=of_layers(arguments.layers), seed=arguments.seed,
            checkpoint=arguments.checkpoint,
        ),
    )  # fmt: skip
    if arguments.output:
        found.save(arguments.output)
    print(json.dumps(estimate_as_json(found), indent=1) if arguments.json else found, flush=True)


def of_layers(names: list[str] | None) -> list[str] | str | None:
    """As the functions take them."""
    return "trainable" if names == ["trainable"] else names


def with_warnings(
    arguments: argparse.Namespace, ask: Callable[[nn.Module, Tensor, Family], Found]
) -> Found:
    """The answer for the model and the inputs; warnings are told in a line each."""
    model = load_model(arguments.model, arguments.weights, trust=arguments.trust)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: tell("warning", str(message))
        found = ask(model, load_inputs(arguments.inputs, model), FAMILIES[arguments.family]())
    if arguments.weights is None and not Path(arguments.model).exists():
        tell("note", f"without --weights, these are the weights that {arguments.model} gives.")
    return found


def tell(kind: str, message: str) -> None:
    """One line beside the table."""
    print(f"python -m fimlib: {kind}: {' '.join(message.split())}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """What can be asked for."""
    p = argparse.ArgumentParser(
        prog="python -m fimlib",
        description="How far estimates of a network's diagonal Fisher information are off, which "
        "estimator is the better one, and how many labels it takes; layer by layer.",
        epilog="python -m fimlib estimate --help: the estimate itself, for networks of any size.",
    )
    add_common(p)
    p.add_argument("--num-samples", type=int, default=1, metavar="N", help="labels per input (1)")
    p.add_argument("--relative-error", type=float, default=0.1, metavar="ε", help="wanted (0.1)")
    p.add_argument("--confidence", type=float, default=0.95, metavar="P", help="wanted (0.95)")
    p.add_argument(
        "--rule", choices=BY_VARIANCE, default="chebyshev", help="for labels needed (chebyshev)"
    )
    p.add_argument("--engine", default="auto", help="see fimlib.differentiate")
    p.add_argument(
        "--num-probes", type=int, metavar="M",
        help=f"estimate V₂ from so many, as {NUM_PROBES}, where no exact one is known",
    )  # fmt: skip
    p.add_argument(
        "--budget", type=float, default=BUDGET, metavar="S", help=f"seconds ({BUDGET:.0f})"
    )
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw it into a .svg, .png or .pdf")
    return p


def estimate_parser() -> argparse.ArgumentParser:
    """What can be asked for after the word ``estimate``; defaults are those of the function."""
    p = argparse.ArgumentParser(
        prog="python -m fimlib estimate",
        description="The diagonal Fisher information of a network of any size, estimated by random "
        "projections, with standard errors.",
    )
    add_common(p)
    p.add_argument("--estimator", choices=DRAWS, default="signs", help="which vectors (signs)")
    p.add_argument("--squares", choices=SQUARES, default="batch", help="of what (batch)")
    p.add_argument("--passes", type=int, metavar="K", help=f"through the inputs ({PASSES})")
    p.add_argument("--relative-error", type=float, metavar="ε", help="stop there")
    p.add_argument(
        "--batch-size", type=int, default=256, metavar="B", help="inputs at a time (256)"
    )
    p.add_argument("--seed", type=int, default=0, help="of the random vectors (0)")
    p.add_argument("--output", type=Path, metavar="FILE", help="for fimlib.load (safetensors)")
    p.add_argument("--checkpoint", type=Path, metavar="FILE", help="go on from here when run again")
    return p


def add_common(p: argparse.ArgumentParser) -> None:
    """The network, its inputs, and what of them is wanted."""
    p.add_argument(
        "model",
        metavar="MODEL",
        help="package.module:build, where build() makes the network (or is one); or a file of "
        "torch.save(model), which needs --trust. It is put into eval mode.",
    )
    p.add_argument("--inputs", required=True, type=Path, help="a .pt tensor, a .npy or .npz array")
    p.add_argument(
        "--weights",
        type=Path,
        help="a state_dict for the network of build(); without it, the weights that build() gives, "
        "which are mostly random",
    )
    p.add_argument(
        "--trust",
        action="store_true",
        help="load MODEL as a pickle, which runs whatever code the file holds: only for files "
        "whose origin you know",
    )
    p.add_argument(
        "--family",
        choices=FAMILIES,
        default="categorical",
        help="what the outputs mean (categorical: logits of classes); gaussian has the identity as "
        "its covariance",
    )
    p.add_argument("--layers", nargs="+", metavar="NAME", help="modules to look at; default: all")
    p.add_argument("--json", action="store_true", help="for machines; inf is null there")


def load_model(name: str, weights: Path | None, *, trust: bool) -> nn.Module:
    """The network, in eval mode."""
    if Path(name).exists():
        if weights is not None:
            raise UsageError("--weights belongs to package.module:build; a file has its weights.")
        model = load_pickle(Path(name), trust=trust)
    elif ":" in name:
        model = build(name)
    else:
        raise UsageError(
            f"there is no file {name}; give the path of a saved network, or package.module:build."
        )
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} is a {type(model).__name__}, not a torch.nn.Module.")
    if weights is not None:
        state = load_tensors(weights)
        if not isinstance(state, dict):
            raise UsageError(f"{weights} is a {type(state).__name__}, no state_dict.")
        model.load_state_dict(state)
    return model.eval()


def build(name: str) -> Any:
    """What ``package.module:build`` is, or returns."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{name}: {error}. It must be importable from here: run in its folder, or set "
            "PYTHONPATH."
        ) from error
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise UsageError(
            f"{name} is of type {type(found).__name__}: name a function without arguments that "
            "returns the network, or the network itself."
        )
    return found()


def load_pickle(path: Path, *, trust: bool) -> Any:
    """A whole module from a file of ``torch.save(model)``."""
    if not trust:
        raise UsageError(
            f"{path} is taken as a pickled module, and loading one runs whatever code it holds. "
            "Add --trust if you know where it comes from; safer is package.module:build with "
            "--weights, a state_dict, which holds no code."
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{path}: {error}. The network's class must be importable from here: run in the folder "
            "of its module, or set PYTHONPATH; a class of a notebook or script cannot be."
        ) from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise UsageError(f"{path} was not written by torch.save: {error}") from error
    if isinstance(found, dict):
        raise UsageError(
            f"{path} holds a dict, as of model.state_dict(): weights without a network. Give "
            f"package.module:build --weights {path}."
        )
    return found


def load_tensors(path: Path) -> Any:
    """A file of ``torch.save`` that holds tensors and nothing else: no code is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise UsageError(
            f"{path} cannot be read as tensors of torch.save; it may hold other objects, which "
            "would run code: save a state_dict or a tensor."
        ) from error


def load_inputs(path: Path, model: nn.Module) -> Tensor:
    """The inputs [m, ...], floating-point ones in the network's dtype, on its device."""
    if path.suffix in (".npy", ".npz"):
        try:
            with path.open("rb") as file:
                found = one_array(np.load(file, allow_pickle=False), path)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path} holds no plain array of numbers: {error}") from error
        try:
            x = torch.as_tensor(found)
        except TypeError as error:
            raise UsageError(f"{path} holds {found.dtype}, no numbers that torch takes.") from error
    elif path.suffix in (".pt", ".pth"):
        x = load_tensors(path)
    else:
        raise UsageError(f"{path}: inputs are a .pt, .npy or .npz file.")
    if not isinstance(x, Tensor):
        raise UsageError(f"{path} holds a {type(x).__name__}: save one tensor of shape [m, ...].")
    like = next(model.parameters(), x)
    return x.to(like.device, like.dtype if x.is_floating_point() else None)


def one_array(found: Any, path: Path) -> Any:
    """The array of a .npy file, or the one of a .npz file."""
    if isinstance(found, np.ndarray):
        return found
    names = list(found)
    if len(names) != 1 and "x" not in names:
        listed = ", ".join(names) or "nothing"
        raise UsageError(f"{path} holds {listed}: keep one array, or name it x.")
    return found["x" if "x" in names else names[0]]


def check_plot(path: Path) -> None:
    """Raise an error if no figure can be saved there, before anything is computed."""
    try:
        import matplotlib as mpl
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install matplotlib.") from error
    mpl.use("agg")  # no window
    if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise UsageError(f"--plot {path}: give it an ending such as .svg, .png or .pdf.")
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise UsageError(f"--plot {path}: there is no such folder, or it cannot be written.")


def as_json(s: Summary) -> dict[str, Any]:
    """The summary in plain numbers; what no number of samples reaches is null."""
    return {
        "family": type(s.joint.family).__name__,
        **{key: value for key, value in vars(s).items() if key not in ("layers", "joint")},
        "layers": [{k: plain(v) for k, v in x._asdict().items()} for x in s.layers],
    }


def estimate_as_json(found: Estimate) -> dict[str, Any]:
    """The estimate without the values of each parameter, which --output saves."""
    return {
        **{n: plain(v) for n, v in vars(found).items() if n not in ("value", "standard_error")},
        "layers": {
            layer: {k: plain(v) for k, v in numbers._asdict().items()}
            for layer, numbers in found.layers.items()
        },
    }


def plain(value: Any) -> Any:
    """A number for JSON, which knows no infinite ones."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
