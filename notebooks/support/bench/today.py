"""``make bench TODAY=1``: networks of today × calls, with time, memory and the error reached."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import fimlib
from fimlib.estimates import Estimate, LayerEstimate, layer_of
from support import results
from support.bench import architectures, measure, tables
from support.bench.architectures import Batch, Task
from support.bench.measure import Row

FOUND = results.ROOT / "data" / "today.json"
ROUNDING = 1e-5  # of float32, relative to the sum of a layer
ENOUGH = 3, 1.0  # later calls, or seconds that they take together
LIMIT_SECONDS = 90.0  # of the CPU, for a first call; `summarise` may take 60 and finish a batch
SMALLEST_STEP = 1.0  # MB, of which multiples are shown
STEPS = 5  # training steps in turn with each of them
Exact = Mapping[str, "np.ndarray[Any, Any]"]  # parameter → I
Values = tuple[object, float | None]  # what a call returns; the error that it states


@dataclass(frozen=True)
class Call:
    """A call of the README."""

    text: str  # in the table
    function: Callable[..., Values]  # one of those below
    options: Mapping[str, Any] = field(default_factory=dict)  # beyond those of the network


def estimated(*network: Any, **options: Any) -> Values:
    """I by random passes."""
    found = fimlib.estimate(*network, **options)
    return found, found.relative_error


def accumulated(*network: Any, **options: Any) -> Values:
    """I, exactly."""
    joint = fimlib.accumulate(*network, **options)
    return joint.fisher_information(), None


def summarised(*network: Any, **options: Any) -> Values:
    """The error √(Σ V₁ / Σ I²) of Î₁ with one label per input, over all parameters."""
    joint = (summary := fimlib.summarise(*network, **options)).joint
    variance, I = joint.label_variance(1), joint.fisher_information()
    noise = sum(float(v.sum()) for v in variance.values()) / summary.num_inputs
    return None, math.sqrt(noise / sum(float(v.square().sum()) for v in I.values()))


EXACT = "exact"
CALLS = {
    "signs": Call("`estimate`", estimated),
    "input": Call("`estimate`, per input", estimated, {"squares": "input"}),
    "importance": Call("`estimate`, importance", estimated, {"estimator": "importance"}),
    EXACT: Call("`accumulate`, $I$", accumulated, {"quantities": ["I"]}),
    "v1": Call("`accumulate`, $I$ and $\\mathcal{V}_1$", accumulated, {"quantities": ["I", "V1"]}),
    "summary": Call("`summarise`", summarised),
}
ESTIMATES = ("signs", "input", "importance")


def run(task: Task, key: str, model: nn.Module, batch: Batch) -> Values:
    """A call as in the README."""
    call = CALLS[key]
    return call.function(model, task.inputs(batch), task.family, **task.options, **call.options)


# One cell, in a process of its own.


def cell(name: str, key: str, quick: bool, exact: Exact | None) -> tuple[Row, Exact | None]:
    """A row of the table; for the exact call also I, with which the estimates are compared."""
    task = architectures.tasks(quick)[name]
    seen: list[Any] = []
    row = measure.within_limits(
        lambda: measured(task, key, exact, seen, quick),
        " ".join(task.packages),
        LIMIT_SECONDS,
        of_cpu=True,
    )
    I = {n: t.numpy() for n, t in seen[0].items()} if key == EXACT and seen else None
    return {"network": name, "call": key, **row}, I


def measured(task: Task, key: str, exact: Exact | None, seen: list[Any], quick: bool) -> Row:
    """The first call, the later ones in turn with the unit, and the error reached.

    ``seen`` gets what the first call returns. If ``quick``, there is one later call only.
    """
    measure.prepare_torch(1)
    model, batch = architectures.problem(task)
    outputs = task.outputs(model, batch)
    about = {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "inputs": len(outputs),
        "outputs": outputs[0].numel(),
    }
    del outputs
    stated: list[float | None] = []

    def fresh() -> Callable[[], None]:
        own = copy.deepcopy(model)

        def call() -> None:
            value, error = run(task, key, own, batch)
            if not stated:
                seen.append(value)
                stated.append(error)

        return call

    stepped = copy.deepcopy(model)

    def step() -> None:
        stepped.zero_grad()
        task.loss(stepped, batch).backward()

    def are_enough(times: Sequence[float]) -> bool:
        return quick or len(times) >= ENOUGH[0] or sum(times) > ENOUGH[1]

    meter = measure.Meter("cpu", time.process_time)  # other programs do not disturb it much
    try:
        timed = measure.calls(meter, fresh, step, are_enough, STEPS)
    except (NotImplementedError, ValueError) as error:
        return {"status": "refused", "why": str(error), **about}
    compared = compare(seen[0], exact) if key in ESTIMATES and exact else {}
    return {"status": "measured", **about, **timed, "stated": stated[0], **compared}


def compare(found: Estimate, exact: Exact) -> Row:
    """How far an estimate is from the exact I.

    Returns:
        "error": ‖Î − I‖ / ‖I‖ over all parameters; "z": how many of its standard errors the sum of
        the worst layer is off, on the logarithmic scale of ``Estimate.interval``; "layer": that
        layer; "layers": how many there are.
    """
    apart = sum(float(((found.value[n].numpy() - I) ** 2).sum()) for n, I in exact.items())
    size = sum(float((I**2).sum()) for I in exact.values())
    totals: dict[str, float] = {}
    for name, I in exact.items():
        totals[layer_of(name)] = totals.get(layer_of(name), 0.0) + float(I.sum())
    off = {layer: standard_errors(found.layers[layer], total) for layer, total in totals.items()}
    worst = max(off, key=lambda layer: off[layer])
    return {
        "error": math.sqrt(apart / size), "z": off[worst], "layer": worst, "layers": len(off)
    }  # fmt: skip


def standard_errors(one: LayerEstimate, right: float) -> float:
    """How many of its standard errors the sum of a layer is off, on a logarithmic scale.

    >>> round(standard_errors(LayerEstimate(2.0, 0.1, 0.0), 2.2103418), 3)
    2.0
    """
    if abs(one.total - right) <= ROUNDING * right:
        return 0.0
    if min(one.total, one.standard_error, right) <= 0:
        return math.inf
    return abs(math.log(right / one.total)) * one.total / one.standard_error


# All cells.


def rows(quick: bool, attempt: Callable[..., Any], of: Sequence[str] | None = None) -> list[Row]:
    """Every call of every network; the exact one comes first, to compare the estimates with it."""
    found = []
    for name in of or [*architectures.tasks(quick)]:
        own: dict[str, Row] = {}
        exact = None
        for key in (EXACT, *(k for k in CALLS if k != EXACT)):
            head = {"network": name, "call": key}
            out_of_reach = own.get(EXACT, {}).get("status") == "skipped" and key not in ESTIMATES
            result = (own[EXACT], None) if out_of_reach else attempt(cell, name, key, quick, exact)
            row, I = result if isinstance(result, tuple) else (result, None)
            exact = exact or I
            own[key] = row | head
            print(f"today, {name}, {key}: {shown(own[key])[0]}", flush=True)
        found += [own[key] for key in CALLS]
    return found


def shown(row: Row) -> list[str]:
    """The cells of a line: time, memory, the error stated, the error made, standard errors."""
    if row["status"] == "not installed":
        return [f"needs `{row['why']}`", "", "", "", ""]
    if row["status"] == "refused":
        return [f"refused: {first_words(row['why'])}", "", "", "", ""]
    if row["status"] != "measured":
        return [f"{row['status']}: {first_words(row['why'])}", "", "", "", ""]
    errors = [f"{row[k]:.2g}" if row.get(k) is not None else "" for k in ("stated", "error")]
    if row["call"] in (EXACT, "v1"):
        errors = ["exact", ""]
    off = f"{row['z']:.1f}" if "z" in row else ""
    return [f"{tables.digits(row['ratio'])} ×", memory(row), *errors, off]


def memory(row: Row) -> str:
    """MB, and in units of a training step where that takes enough to be measured."""
    mb, unit = row["memory_mb"], row["unit_memory_mb"]
    shown = tables.memory(mb)
    return f"{shown}, {tables.digits(mb / unit)} ×" if unit >= SMALLEST_STEP else shown


def first_words(why: str) -> str:
    """The first sentence or clause of a message, on one line.

    >>> first_words("batch 1: it needs classes; got one. Take signs.")
    'batch 1: it needs classes'
    """
    for end in (";", ". ", "\n"):
        why = why.split(end)[0]
    return why.replace("|", "\\|")


# The page.


def read(path: Path = FOUND) -> Row | None:
    """What ``make bench`` found last, by default with ``TODAY=1``."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def page(found: Mapping[str, Any] | None) -> str:
    """The table, and what follows from it."""
    if found is None:
        return "There are no measurements yet: `make bench TODAY=1` makes them in some minutes.\n"
    return "\n".join([verdict(found["rows"]), table(found), tables.machine(found)])


def verdict(all_rows: Sequence[Row]) -> str:
    """How far the estimates are off, in the worst layer of all."""
    compared = [r for r in all_rows if "z" in r]
    if not compared:
        return ""
    worst = max(compared, key=lambda r: r["z"])
    title = architectures.tasks()[worst["network"]].title
    return (
        f"{len(compared)} estimates could be compared with the exact $I$, in "
        f"{sum(r['layers'] for r in compared):,} sums over layers. The farthest of them is "
        f"{worst['z']:.1f} standard errors off ({title}, {CALLS[worst['call']].text}).\n"
    )


def table(found: Mapping[str, Any]) -> str:
    """A line for each call, under the name of its network."""
    head = ["network", "call", "time", "memory", "stated", "error", "SE"]
    body = []
    for name, task in architectures.tasks(found["record"]["quick"]).items():
        own = [row for row in found["rows"] if row["network"] == name]
        names = [*title(task, own), *[""] * len(own)]
        for text, row in zip(names, own, strict=False):
            body.append([text, CALLS[row["call"]].text, *shown(row)])
    return tables.table(head, body)


def title(task: Task, own: Sequence[Row]) -> list[str]:
    """What a network is, in the first cells of its lines."""
    known = next((row for row in own if "parameters" in row), None)
    if known is None:
        return [f"**{task.title}**", labels(task.family)]
    timed = next((row for row in own if "unit" in row), None)
    lines = [
        f"**{task.title}**",
        f"{labels(task.family)}, T = {known['outputs']:,}",
        f"{known['parameters']:,} parameters, B = {known['inputs']}",
    ]
    if timed:
        step = f"{tables.duration(timed['unit'])}, {tables.memory(timed['unit_memory_mb'])}"
        lines.append(f"a step: {step}")
    return lines


def labels(family: fimlib.Family) -> str:
    """A family as one would write it.

    >>> labels(fimlib.families.Positions(fimlib.Categorical(), 3))
    '`Positions(Categorical)`'
    """
    inside = ", ".join(dict.fromkeys(type(f).__name__ for f in getattr(family, "families", [])))
    return f"`{type(family).__name__}{f'({inside})' if inside else ''}`"


def intervals(found: Mapping[str, Any] | None) -> str:
    """How often intervals of 95 % held a layer's sum, as a table."""
    if found is None:
        return page(None)
    measured = found["coverage"]
    passes = list(dict.fromkeys(row["passes"] for row in measured))
    body = []
    for case in dict.fromkeys(row["case"] for row in measured):
        for kind in dict.fromkeys(row["estimator"] for row in measured):
            own = [r for r in measured if (r["case"], r["estimator"]) == (case, kind)]
            shares = [[r["share"] for r in own if r["passes"] == k] for k in passes]
            p = own[0]["probability"]
            body.append([f"{case}, p = {p:.3g}", kind, *map(spread, shares)])
    return tables.table(["network", "vectors", *(f"{k} passes" for k in passes)], body)


def spread(shares: Sequence[float]) -> str:
    """From the least to the largest, in percent.

    >>> spread([0.957, 0.94])
    '94 to 96 %'
    """
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"
