"""What the measurements say: targets, tables, and the page of the book."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from support import results, runs
from support.bench.agreement import TOLERANCE
from support.bench.candidates import CANDIDATES
from support.bench.measure import Row
from support.bench.targets import TARGETS, Found, large, ratio, verdict

FOUND = results.ROOT / "data" / "bench.json"
MISSING = "There are no measurements yet: `make bench` makes them, in about twenty minutes.\n"
EXACT = [k for k, c in CANDIDATES.items() if c.computes == "I" and c.name != "fimlib"]
OURS = [key for key, candidate in CANDIDATES.items() if candidate.name == "fimlib"]


def targets(found: Found) -> str:
    """The table of targets, and why some are missed."""
    judged = [(t, *verdict(t, found)) for t in TARGETS]
    lines = table(
        ["one thread", "target", "measured", "verdict"],
        [
            [t.text, f"{'≤' if t.at_most else '≥'} {t.bound:g}", text, word]
            for t, text, word, _ in judged
        ],
    )
    reasons = [f"* {t.text}: {t.limit}" for t, _, _, missed in judged if missed]
    why = ["", "Why targets are missed, and what the limit is:", "", *reasons] if reasons else []
    return "\n".join([lines, *why, ""])


# Tables.


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of even width, so that it reads in a terminal too."""
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    rule = ["-" * max(width, 3) for width in widths]
    rows = [
        "| " + " | ".join(c.ljust(max(w, 3)) for c, w in zip(row, widths, strict=True)) + " |"
        for row in [head, rule, *body]
    ]
    return "\n".join(rows) + "\n"


def cell(row: Row | None, threads: str) -> str:
    """What came of one measurement."""
    if row is None or (row["status"] == "measured" and threads not in row["times"]):
        return ""
    if row["status"] == "skipped":
        return f"skipped: {row['why']}"
    if row["status"] == "not installed":
        return f"not installed: `{row['why']}`"
    if row["status"] != "measured":
        return "failed"
    if not row.get("agrees", True):
        return "other values"
    timed = row["times"][threads]
    few = "" if timed["repetitions"] >= 10 else f", n = {timed['repetitions']}"
    first = f"first {digits(timed['first'])} ×"
    cost = f"{digits(timed['ratio'])} ×"
    if row["candidate"] == "unit":
        cost = duration(timed["seconds"])
    return f"{cost}, {memory(timed['memory_mb'])}{few}; {first}"


def duration(seconds: float) -> str:
    """Seconds to two digits, in a unit that suits."""
    for least, size, name in ((7200, 3600, "h"), (120, 60, "min"), (1, 1, "s"), (1e-3, 1e-3, "ms")):
        if seconds >= least:
            digits = ".3g" if seconds < 1000 * size else ",.0f"
            return f"{seconds / size:{digits}} {name}"
    return f"{seconds / 1e-6:.3g} µs"


def memory(mb: float) -> str:
    """Megabytes, or gigabytes."""
    return f"{mb / 1000:,.3g} GB" if mb >= 1000 else f"{mb:,.0f} MB"


def digits(x: float) -> str:
    """Three digits, or all before the point.

    >>> digits(1.994), digits(17.76), digits(2190.4)
    ('1.99', '17.8', '2,190')
    """
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def values(rows: Sequence[Row]) -> str:
    """How far a candidate's values are from the exact ones."""
    known = [row for row in rows if "difference" in row]
    if not known:
        return ""
    worst = max(row["difference"] for row in known)
    if not all(row["agrees"] for row in known):
        return f"**differs: {worst:.1g}**"
    if CANDIDATES[known[0]["candidate"]].estimate:
        return f"estimate, off by {worst:.{0 if worst > 0.01 else 1}%}"
    return f"{worst:.0e}"


def peers(rows: Sequence[Row], threads: str) -> str:
    """The first table for one network and device: a line per candidate, a column per batch."""
    batches = sorted({row["batch"] for row in rows})
    head = ["", "computes", *(f"B = {b:,}" for b in batches), "difference"]
    body = []
    for key in (k for k in CANDIDATES if any(row["candidate"] == k for row in rows)):
        own = {row["batch"]: row for row in rows if row["candidate"] == key}
        candidate = CANDIDATES[key]
        cells = [cell(own.get(b), threads) for b in batches]
        name = f"**{candidate.name}**" if key in OURS else candidate.name
        body.append([name, candidate.computes, *cells, values([*own.values()])])
    failures = [
        f"* {CANDIDATES[r['candidate']].name}, B = {r['batch']:,}: {r['why']}"
        for r in rows
        if r["status"] == "failed"
    ]
    return "\n".join([table(head, body), *failures, ""] if failures else [table(head, body)])


def costs(rows: Sequence[Row]) -> str:
    """The second table: one thing varied at a time, ours only."""
    parts = []
    for series in dict.fromkeys(row["series"] for row in rows):
        own = [row for row in rows if row["series"] == series]
        points = list(dict.fromkeys(row["point"] for row in own))
        keys = list(dict.fromkeys(row.get("line", row["candidate"]) for row in own))
        at = {(row.get("line", row["candidate"]), row["point"]): row for row in own}
        names = [CANDIDATES[k].computes if k in CANDIDATES else str(k) for k in keys]
        body = [
            [name, *(cell(at.get((key, p)), "1") for p in points)]
            for name, key in zip(names, keys, strict=True)
        ]
        parts.append(table([series, *(f"{p:,}" for p in points)], body))
    return "\n".join(parts)


def approximate(found: Found) -> str:
    """The fourth table: approximate S, its time and its error by layer, beside the exact S."""
    parts, rows = [], found["approximate"]
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        layers = list(next((r["errors"] for r in own if "errors" in r), {}))
        head = [title(found, network), "time, memory", *(f"layer {name}" for name in layers)]
        body = [
            [
                "exact" if row["candidate"] == "ours-v2" else CANDIDATES[row["candidate"]].name,
                cell(row, "1"),
                *(percent(row.get("errors", {}).get(name, 0.0)) for name in layers),
            ]
            for row in own
        ]
        parts.append(table(head, body))
    return "\n".join(parts)


def confirmation(found: Found) -> str:
    """The fifth table: what the check of a first batch adds to it."""
    if "check" not in found:
        return ""
    head = ["network", "B", "J: next batch", "+ check", "J and S: next batch", "+ check"]
    cells: dict[tuple[str, int], list[str]] = {}
    for row in found["check"]["rows"]:
        if "check" in row:
            shown = [f"{digits(row[k])} ×" for k in ("next", "check")]
            cells.setdefault((row["network"], row["batch"]), []).extend(shown)
    body = [[title(found, n), f"{b:,}", *c] for (n, b), c in cells.items() if len(c) == 4]
    return (
        "## What the check costs\n\n"
        "The first batch of a call is compared with the network itself ([how](engines.md)); the "
        "next ones are not.\n\n" + table(head, body) + "\n" + machine(found["check"])
    )


def percent(error: float) -> str:
    """A relative error; what is rounding is called exact."""
    return "exact" if error < TOLERANCE else f"{error:.2g}" if error > 10 else f"{error:.1%}"


def title(found: Found, network: str) -> str:
    """A network in words."""
    return str(found.get("networks", {}).get(network, f"MLP {network}"))


# The page.


def read_benchmark(path: Path = FOUND) -> Found | None:
    """What ``make bench`` found last; None if that was nothing, or by the rules of before."""
    if not path.is_file():
        return None
    found: Found = json.loads(path.read_text(encoding="utf-8"))
    is_new = all("first" in t for r in found["peers"] for t in r.get("times", {}).values())
    return found if is_new else None


def meaning(found: Found) -> str:
    """What it means for a reader, a sentence for each network where it was measured."""
    sentences = []
    for network in found["networks"]:
        batch = large(found, network)
        ours = ratio(found, "ours-fisher", network, batch)
        others = {k: r for k in EXACT if (r := ratio(found, k, network, batch))}
        if ours and others:
            nearest = min(others, key=lambda k: others[k])
            sentences.append(
                f"* {title(found, network)}, B = {batch:,}: the exact diagonal takes "
                f"{digits(ours)} training steps, and {digits(others[nearest])} with "
                f"{CANDIDATES[nearest].name}, the fastest other way."
            )
    return "\n".join(sentences) + "\n"


def machine(found: Found) -> str:
    """Where and when it was measured."""
    record = found["record"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    where = record["machine"]
    gpu = f", {where['gpu']}" if where.get("gpu") else ""
    return (
        f"Measured on {record['started'][:10]} at commit {record['commit']}, in "
        f"{duration(record['seconds'])}, on {where['processor']}, {where['cores']} cores{gpu}, "
        f"load {record['load']:.2g} before the start. Versions: {versions}.\n"
    )


def benchmark_page(found: Found | None) -> str:
    """The part of ``book/benchmark.md`` that comes from the measurements."""
    if found is None:
        return MISSING
    old = found["record"]["source"] != runs.fimlib_digest()
    parts = [
        *(["*`fimlib` has changed since; `make bench` brings this up to date.*\n"] if old else []),
        machine(found),
        "## What it means\n",
        meaning(found),
        "## Targets\n",
        "They were set before these measurements.\n",
        targets(found),
        "## Beside other libraries\n",
        *(tabs(found, network) for network in found["networks"]),
    ]
    parts += [
        "## What the cost depends on\n",
        costs(found["costs"]),
        "## Approximate second derivatives\n",
        approximate(found),
        confirmation(found),
    ]
    return "\n".join(parts)


def tabs(found: Found, network: str) -> str:
    """One network's tables, one tab for each number of threads, and for the GPU."""
    rows = [row for row in found["peers"] if row["network"] == network]
    kinds = dict.fromkeys((r["device"], t) for r in rows for t in r.get("times", {"1": None}))
    tabs = []
    for device, threads in sorted(kinds):
        name = "one thread" if threads == "1" else f"{threads} threads"
        shown = peers([r for r in rows if r["device"] == device], threads)
        tabs.append(f"::::{{tab-item}} {'GPU' if device == 'cuda' else name}\n\n{shown}\n::::")
    return "\n".join([f"### {title(found, network)}\n", ":::::{tab-set}", *tabs, ":::::", ""])


def terminal(found: Found) -> str:
    """The same for a terminal, where there are no tabs."""
    lines = []
    for line in benchmark_page(found).splitlines():
        if line.startswith("::::{tab-item} "):
            lines.append(line.removeprefix("::::{tab-item} ") + ":")
        elif not line.startswith(":::"):
            lines.append(line)
    return "\n".join(lines)
