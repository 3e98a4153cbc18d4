"""Report, figures and the book's choice of runs, on a table whose answers are known."""

import json
import re
import shutil
from xml.etree import ElementTree

import nbformat
import numpy as np
import pandas as pd
import pytest
from support import book, claims, figures, reference, report, results, runs

# Three layers, the last one the output, at epochs 0 and 1.
QUANTITIES = {
    ("I", "I1", "I2", "V1", "V1_upper", "V1_certified", "V2", "V2_upper", "V1_sample"): {
        (0, "1"): (1, 1.1, 1, 1, 40, 50, 2, 8, 0),
        (0, "2"): (2, 2, 2.4, 2, 120, 140, 8, 80, 1),
        (0, "3"): (10, 9, 10, 4, 12, 13, 0, 0, 1),
        (1, "1"): (4, 4, 6, 9, 450, 500, 3, 9, 1),
        (1, "2"): (1, 1, 1, 1, 100, 111, 4, 100, 1),
        (1, "3"): (4, 5, 4, 4, 44, 48, 0, 0, 1),
    },
    ("parameters", "I_violations", "V1_violations", "V2_violations"): {
        (0, "1"): (10, 0, 0, 0),
        (0, "2"): (20, 1, 0, 0),
        (0, "3"): (30, 0, 0, 0),
        (1, "1"): (10, 0, 4, 0),
        (1, "2"): (20, 0, 0, 2),
        (1, "3"): (30, 0, 0, 0),
    },
}
# What else the claims read, the same everywhere.
OTHERS = {
    "I_lower": 0, "V1_lower": 0, "V2_lower": 0, "C12": 0.5, "I1_minus_I2_squared": 4,
    "I1_negative": 0, "I2_negative": 3, "I_upper": 9, "I_squared": 16,
}  # fmt: skip
OF_THE_NETWORK = {"largest_probability": 0.15, "sum_of_squares": 0.1}
PARAMETERS = {
    "hidden": [8, 6], "activation": "Sigmoid", "dropout": 0.5, "optimizer": "Adam",
    "learning_rate": 0.001, "batch_size": 128, "epochs": 1, "num_samples": 100, "train_limit": 0,
}  # fmt: skip
SPECS = runs.specs()
ALL = tuple(SPECS)
PAPER = [name for name, spec in SPECS.items() if spec.experiment == book.PAPER]
NUMBER = sum(claim.whose == "paper" for claim in claims.load_claims())


def table(name, accuracy=0.9, **scales):
    rows = [
        (name, epoch, layer, quantity, value * scales.get(quantity, 1))
        for quantities, cells in QUANTITIES.items()
        for (epoch, layer), numbers in cells.items()
        for quantity, value in zip(quantities, numbers, strict=True)
    ]
    rows += [(name, e, k, q, v) for e in (0, 1) for k in "123" for q, v in OTHERS.items()]
    rows += [(name, e, results.NETWORK, q, v) for e in (0, 1) for q, v in OF_THE_NETWORK.items()]
    rows += [(name, e, results.NETWORK, "test_accuracy", a) for e, a in ((0, 0.1), (1, accuracy))]
    return pd.DataFrame(rows, columns=results.COLUMNS)


def make(
    folder, name, values=None, *, counts=True, is_mnist=True, experiment=None, machine=None,
    **parameters,
):  # fmt: skip
    """A finished run, as the runner leaves it."""
    spec = SPECS.get(name)
    experiment = experiment or (spec.experiment if spec else book.PAPER)
    seed = {"seed": spec.parameters["seed"]} if spec and "seed" in spec.parameters else {}
    record = {
        "parameters": PARAMETERS | seed | parameters, "experiment": experiment, "counts": counts,
        "data": {"title": "MNIST", "digest": "0" * 64, "is_mnist": is_mnist}, "input_index": 7,
        "network": "784-9-10, Tanh",
        "title": f"Run {name}", "commit": "abc", "started": "2000-01-01T00:00:00Z", "seconds": 1.0,
        "machine": machine or {"processor": "P", "threads": 1, "device": "cpu"},
        "versions": {"torch": "2"},
    }  # fmt: skip
    (folder / name).mkdir(parents=True, exist_ok=True)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1", id="first")])
    nbformat.write(notebook, folder / name / "notebook.ipynb")
    if values is not None:
        values.to_csv(folder / name / "values.csv", index=False)
    files = {"files": results.file_digests(folder / name)}
    results.save(folder / name, None, record | files)
    return results.Run(name, folder / name, record)


def make_all(folder, names=ALL, **changes):
    for name in names:
        make(folder, name, table(name) if name in PAPER else None, **changes)
    return folder


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A complete reference."""
    return make_all(tmp_path_factory.mktemp("complete") / "reference")


@pytest.fixture
def here(tmp_path, monkeypatch, complete):
    """A folder for runs, beside a complete reference."""
    monkeypatch.setattr(report, "REFERENCE", shutil.copytree(complete, tmp_path / "reference"))
    return tmp_path / "here"


@pytest.fixture
def group(tmp_path):
    return {
        "a": make(tmp_path, "a", table("a", 0.8), seed=0),
        "b": make(tmp_path, "b", table("b", 0.9), seed=1),
    }


# By hand, for the five seeds of Figure 1, all alike; what needs other experiments is not judged.
EXPECTED = {
    "a": ("7, 0 of 5 within", "not judged"),
    "b-v1-figure-1": ("62 (45 to 80), 10 of 10 within; 5 of 5 networks throughout", "reproduced"),
    "b-v2-figure-1": ("10 (3.5 to 18), 5 of 10 within; 0 of 5 networks throughout", "in part"),
    "c": ("0.38 (0.25 to 3), 15 of 20 within; 0 of 5 networks throughout", "in part"),
    "d-zero": ("0, 5 of 5 within", "reproduced"),
    "d-largest": ("1.2 (0.44 to 2), 5 of 10 within; 0 of 5 networks throughout", "in part"),
    "d-scale": ("0.42 (0.035 to 5), 20 of 50 within", "depends on a choice"),
    "g": ("0.2 (0.1 to 0.3), 5 of 10 within; 0 of 5 networks throughout", "in part"),
    "min-at-start": ("–", "not judged"),
    "small": ("–", "not decidable"),
}


@pytest.fixture(scope="module")
def decisions(tmp_path_factory):
    found = results.load(make_all(tmp_path_factory.mktemp("decided") / "own", PAPER))
    return {d.claim.id: d for d in report.decide(found)}


def test_numbers_and_verdicts_by_hand(decisions):
    found = {key: (report.ours(d), d.verdict) for key, d in decisions.items() if key in EXPECTED}
    assert found | {"min-at-start": ("–", "not judged")} == EXPECTED
    assert report.tolerance(decisions["b-v1-figure-1"]) == "25 to 100"
    assert report.said(decisions["c"]) == "in part (15 of 20)"
    assert report.said(decisions["d-scale"]) == (
        "depends on the reading and N: of 10 settings 4 reproduced, 6 not reproduced"
    )
    assert report.rests_on(decisions["c"]).startswith(". *Rests on one test image per network")
    assert report.rests_on(decisions["d-zero"]) == ""
    assert report.tolerance(decisions["c"]) == "0 to 1"
    assert report.tolerance(decisions["d-largest"]) == "≥ 1"
    assert report.tolerance(decisions["min-at-start"]) == "≤ 0"
    assert report.tolerance(decisions["a"]) == "0"


def test_the_table_of_the_terminal(decisions):
    lines = report.as_text(decisions.values()).splitlines()
    assert len(lines) == len(decisions)
    assert max(map(len, lines)) <= report.WIDTH
    for line, (key, d) in zip(lines, decisions.items(), strict=True):
        assert line.split()[0] == key
        assert d.verdict in line
    found = report.counts(decisions.values())
    assert report.tally(decisions.values()).startswith(
        f"{found['mathematical'].total()} mathematical claims: "
    )
    silent = sum(not claim.quantity for claim in claims.load_claims())
    assert sum(kind.total() for kind in found.values()) + silent == NUMBER


def test_the_pages_show_every_claim_and_every_case(tmp_path, monkeypatch):
    found = results.load(make_all(tmp_path / "own", PAPER))
    page = report.report_page(found, {}, "a test")
    by_id = {d.claim.id: d for d in report.decide(found)}
    assert all(f"(`{key}`)" in page for key, d in by_id.items() if d.claim.quantity)
    assert all(d.claim.note in page for d in by_id.values() if not d.claim.quantity)
    rows = [line for line in page.splitlines() if line.startswith("| **")]
    assert all(line.replace("\\|", "").count("|") == 5 for line in rows)
    folded = page[page.index("dropdown} c: ") :].split("::::")[0]
    assert folded.count("**3**") == 5  # layer 1, epoch 1, of every seed
    assert "no reference run" in page
    assert "There is no" not in report.report_page(found, found, "a test")
    monkeypatch.setattr(report, "REFERENCE", tmp_path / "own")
    assert "the reference results themselves" in report.report_page(found, found, "a test")
    section = report.section_5_3(found, "a test")
    assert "(`b-v1-figure-1`)" in section
    assert "(`eq-10`)" not in section
    landing = report.landing(found, "a test")
    numbers = "0.38 (0.25 to 3), 15 of 20 within 0 to 1; 0 of 5 networks throughout"
    assert f"*The hidden layers* V₁/V₂: {numbers}. **in part (15 of 20)**" in landing
    assert "largest V₂ there: 5 of 5 are 0. **reproduced**" in landing
    assert report.tally(by_id.values()) in landing
    cells = pd.Series([0.0, 0.0, 1.0])
    broken = [d._replace(cells=cells) if d.claim.id == "d-zero" else d for d in by_id.values()]
    monkeypatch.setattr(report, "decide", lambda _: broken)
    assert "largest V₂ there: 2 of 3 are 0." in report.landing(found, "a test")


def test_verdicts_by_choice(monkeypatch):
    """The tables of what depends on a choice, and of questions that were changed."""
    by_id = {claim.id: claim for claim in claims.load_claims()}
    index = pd.MultiIndex.from_tuples(
        [
            (w, "p", d, k)
            for w in ("default weights", "Xavier weights")
            for d in "ab"
            for k in (0, 1)
        ],
        names=["weights", "dropout", "optimizer", "layer"],
    )
    decisions = [
        claims.Decision(claim, pd.Series([0, 0, 0, 9, 0, 0, 9, 9], index), claims.DEPENDS)
        for key, claim in by_id.items()
        if key in report.LOG_SIGMOID
    ]
    monkeypatch.setattr(report, "decide", lambda _: decisions)
    fades, most = "✓ 2 of 2", "✗ 0 of 2"
    assert report.log_sigmoid({}).splitlines()[2:] == [
        f"| default weights, p, a | {' | '.join([fades] * 3 + [most] + [fades] * 2)} |",
        f"| default weights, p, b | {' | '.join(['◐ 1 of 2'] * 6)} |",
        f"| Xavier weights, p, a | {' | '.join([fades] * 3 + [most] + [fades] * 2)} |",
        f"| Xavier weights, p, b | {' | '.join([most] * 3 + [fades] + [most] * 2)} |",
    ]
    assert report.said(decisions[0]) == (
        "depends on the initial weights, dropout and the optimiser: default weights, p, a "
        "reproduced (2/2); default weights, p, b in part (1/2); Xavier weights, p, a reproduced "
        "(2/2); Xavier weights, p, b not reproduced (0/2)"
    )
    monkeypatch.setattr(report, "MANY", 3)
    assert report.said(decisions[0]).endswith(
        ": of 4 settings 2 reproduced, 1 in part, 1 not reproduced"
    )
    rows = report.changes(decisions).splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == [d.claim.was for d in decisions]
    ours = decisions[0]._replace(claim=decisions[0].claim._replace(whose="ours"))
    assert "a question of ours" in report.changes([ours])
    empty = [d._replace(cells=pd.Series(dtype=float)) for d in decisions]
    monkeypatch.setattr(report, "decide", lambda _: empty)
    assert "not been trained" in report.log_sigmoid({})


def test_one_run_that_does_not_count_takes_the_verdicts(tmp_path):
    folder = make_all(tmp_path / "own", PAPER)
    make(folder, PAPER[2], table(PAPER[2]), counts=False, is_mnist=False)
    found = results.load(folder)
    assert {d.verdict for d in report.decide(found)} == {"not judged", "not decidable"}
    assert report.warning(found) == "NOT MNIST: MNIST"
    assert "NOT MNIST" in book.shown(found, "")


def test_one_label(tmp_path):
    values = table("a").query("quantity != 'V1_sample'")
    one = make(tmp_path, "a", values, num_samples=1)
    assert r"$\sqrt{V_1}$ at N = 1" not in drawn(figures.figure_1(values, one.record))[2]


def test_layers_are_numbers(tmp_path):
    """With eleven layers the last is 11, not 9."""
    extra = [table("a").query("layer == '2'").assign(layer=str(k)) for k in range(3, 11)]
    values = pd.concat([table("a").replace({"layer": {"3": "11"}}), *extra])
    run = make(tmp_path, "a", values)
    by_id = {d.claim.id: d for d in report.decide({"a": run})}
    assert by_id["d-zero"].cells.tolist() == [0]
    assert len(by_id["c"].cells) == 2 * 10
    titles = [f"layer {k}" for k in range(1, 12)]
    figure = figures.figure_1(values, run.record)
    assert [ax.get_title() for ax in figure.axes[:11]] == [*titles[:-1], "layer 11 (output)"]
    figure = figures.variance_ratios({"a": values})
    assert [ax.get_title() for ax in figure.axes] == titles[:-1]


def drawn(figure):
    """The labelled lines of every panel, as numbers by label."""
    return [
        {
            line.get_label(): list(line.get_ydata())
            for line in ax.lines
            if not line.get_label().startswith("_")
        }
        for ax in figure.axes
    ]


def layer(k):
    """What figure_1 should draw of a layer: above, below."""
    names, cells = next(iter(QUANTITIES.items()))
    q = {name: np.array([cells[e, k][j] for e in (0, 1)]) for j, name in enumerate(names)}
    above = {
        "Fisher information I": q["I"],
        r"$\sqrt{V_1}$": q["V1"] ** 0.5,
        r"bound of $\sqrt{V_1}$": q["V1_upper"] ** 0.5,
        "certified bound": q["V1_certified"] ** 0.5,
    }
    below = {r"log(UB/$V_1$)": np.log(q["V1_upper"] / q["V1"])}
    if k == "3":
        return above | {r"$\sqrt{V_1}$ at N = 1": 10 * q["V1"] ** 0.5}, below
    above |= {r"$\sqrt{V_2}$": q["V2"] ** 0.5, r"bound of $\sqrt{V_2}$": q["V2_upper"] ** 0.5}
    return above, below | {r"log(UB/$V_2$)": np.log(q["V2_upper"] / q["V2"])}


def test_relative_errors_are_norms_over_a_layer():
    """By hand: √(N V / mean of I²) with N = 4, and a gap where I is 0."""
    rows = [
        ("a", 0, "1", quantity, value)
        for quantity, value in (("V1", 9), ("V2", 16), ("I", 5), ("I_squared", 36))
    ]
    rows += [("a", 0, "2", q, 0 if q == "I_squared" else 1) for q in ("V1", "V2", "I", "I_squared")]
    values = pd.DataFrame(rows, columns=results.COLUMNS)
    errors = figures.relative_errors({"a": (values, 4)})
    assert errors.loc[1].to_numpy().tolist() == [[1.0, pytest.approx(4 / 3)]]
    assert errors.loc[2].isna().all(axis=None)


def test_every_line_of_figure_1(group):
    run = group["a"]
    figure = figures.figure_1(run.values, run.record)
    panels = drawn(figure)
    for k in range(3):
        for panel, expected in zip((panels[k], panels[3 + k]), layer(str(k + 1)), strict=True):
            assert panel.keys() == expected.keys()
            for label, numbers in expected.items():
                assert panel[label] == pytest.approx(numbers), (k, label)
    # By hand, for one panel of each kind.
    assert panels[0][r"$\sqrt{V_1}$"] == [1, 3]
    assert panels[0][r"bound of $\sqrt{V_1}$"] == pytest.approx([40**0.5, 450**0.5])
    assert panels[3][r"log(UB/$V_2$)"] == pytest.approx([np.log(4), np.log(3)])
    assert panels[2][r"$\sqrt{V_1}$ at N = 1"] == [20, 20]
    # Every line has its label, once: beside it, or in a legend where there is no room.
    written = [text.get_text() for ax in figure.axes for text in ax.texts]
    legend = [text.get_text() for found in figure.legends for text in found.get_texts()]
    labels = {label for panel in panels for label in panel}
    assert sorted(written + legend) == sorted([*labels, "$V_2 = 0$"])
    assert "$V_2 = 0$" in [text.get_text() for text in figure.axes[2].texts]


def test_an_activated_output_shows_its_v2(group):
    values = group["a"].values
    at = (values.layer == "3") & values.quantity.isin(["V2", "V2_upper"])
    values.loc[at, "value"] = 5.0
    figure = figures.figure_1(values, group["a"].record)
    assert drawn(figure)[2][r"$\sqrt{V_2}$"] == pytest.approx([5**0.5] * 2)
    assert not any("= 0" in text.get_text() for text in figure.axes[2].texts)


def test_every_line_of_the_variance_ratios(group):
    tables = {name: run.values for name, run in group.items()}
    tables["b"].loc[tables["b"].quantity == "V1", "value"] *= 2
    first, second = drawn(figures.variance_ratios(tables))
    assert first == {"a": [0.5, 3], "b": [1, 6]}
    assert second == {"a": [0.25, 0.25], "b": [0.5, 0.5]}


def test_any_number_of_seeds_has_its_line():
    tables = {f"seed {k}": table("a") for k in range(16)}
    drawn = figures.variance_ratios(tables).axes[0].lines
    lines = [line for line in drawn if line.get_label() in tables]
    looks = {str(figures.line_style(k)) for k in range(40)}
    assert len(lines) == len(tables)
    assert len(looks) == 40


def test_the_caption_says_what_made_the_figure(group):
    """Input, N, the network as built, not as parameters name it; the rest is in the passport."""
    text = figures.caption(group["a"].record)
    for part in ("Test input 7;", "N = 100 labels", "784-9-10, Tanh"):
        assert part in text
    assert "our choices" in text
    assert "Sigmoid" not in text


def test_other_settings_are_not_mixed(group, tmp_path):
    other = make(tmp_path, "other", table("other"), epochs=20, seed=5)
    with pytest.raises(ValueError, match="runs of experiment 'sigmoid' differ in epochs"):
        report.decide(group | {"other": other})


def drifted(name, size):
    """A table whose values are off by factors; of one seed always the same ones."""
    values = table(name)
    factors = np.random.default_rng(int(name[-1])).lognormal(sigma=size, size=len(values))
    return values.assign(value=values.value * factors)


@pytest.fixture
def both(tmp_path):
    """A reference of five seeds that differ, and the same runs made again."""
    for folder in ("reference", "own"):
        for name in PAPER:
            make(tmp_path / folder, name, drifted(name, 0.1))
    return tmp_path


def compared(folder):
    return report.compare(results.load(folder / "own"), results.load(folder / "reference"))


def test_what_is_equal_has_not_moved(both):
    rows = compared(both)
    assert [row.figure for row in rows] == [
        "Figure 1",
        *(f"Figure {n}" for n in ("I", "II", "III", "IV")),
    ]
    assert {(row.how, row.moved, row.text) for row in rows} == {("exact", False, "identical")}
    assert report.summary(rows, []).startswith("Of 5 runs 5 are identical")


def test_one_changed_number_of_the_reference_moves_exactly_its_figure(both):
    values = drifted(PAPER[2], 0.1)
    values.loc[7, "value"] *= 2
    make(both / "reference", PAPER[2], values)
    rows = compared(both)
    moved = [row for row in rows if row.moved]
    assert [row.figure for row in moved] == ["Figure II"]
    assert moved[0].text.startswith(f"1 of {len(values)} values, at most by a factor of 2")
    assert "Figure II." in report.summary(rows, moved)


@pytest.mark.parametrize(("size", "moves"), [(0.01, False), (1.0, True)])
def test_another_machine_is_measured_against_the_seeds(both, size, moves):
    values = drifted(PAPER[0], 0.1)
    factors = np.random.default_rng(9).lognormal(sigma=size, size=len(values))
    elsewhere = {"processor": "Q", "threads": 1, "device": "cpu"}
    make(both / "own", PAPER[0], values.assign(value=values.value * factors), machine=elsewhere)
    first = compared(both)[0]
    assert (first.moved, first.how) == (moves, "log scale, against the seeds")
    assert "two seeds of the reference differ by" in first.text


@pytest.mark.parametrize(("factor", "moves"), [(1 + 1e-8, False), (1 + 1e-4, True)])
def test_without_other_seeds_rounding_is_granted(tmp_path, factor, moves):
    elsewhere = {"processor": "Q", "threads": 1, "device": "cpu"}
    values = table(PAPER[0])
    make(tmp_path / "reference", PAPER[0], values)
    other = values.assign(value=values.value * factor)
    make(tmp_path / "own", PAPER[0], other, machine=elsewhere)
    (row,) = compared(tmp_path)
    assert (row.moved, row.how) == (moves, "up to 1e-06")


def test_other_settings_are_not_compared(both):
    make(both / "own", PAPER[0], table(PAPER[0]), epochs=20)
    first = compared(both)[0]
    assert (first.moved, first.how) == (False, "none: other settings")
    assert first.text == "epochs: 20 against 1"


def test_a_table_without_a_quantity_is_told_without_traceback(here, capsys):
    make_all(here)
    make(here, PAPER[0], table(PAPER[0]).query("quantity != 'I2'"))
    assert report.main(["--results", str(here)]) == 1
    assert f"{here / PAPER[0] / 'values.csv'} is not whole" in capsys.readouterr().err


def test_mixed_settings_are_told_without_traceback(here, capsys):
    make_all(here)
    make(here, PAPER[0], table(PAPER[0]), epochs=2)
    assert report.main(["--results", str(here)]) == 1
    assert "differ in epochs" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "lost", "record"])
def test_a_damaged_run_is_none(here, capsys, damage):
    path = make_all(here) / PAPER[0] / "values.csv"
    if damage == "cut":
        path.write_text(path.read_text()[:-200])
    elif damage == "lost":
        path.unlink()
    else:
        path.with_name("record.json").write_text("{")
    assert report.main(["--results", str(here)]) == 0
    said = capsys.readouterr()
    assert f"{len(ALL) - 1} runs" in said.out
    assert f"not finished: {PAPER[0]}" in said.out
    assert "b-v1" in said.out
    assert re.match(r"\d+ mathematical claims: ", said.out.splitlines()[-1])
    main, _ = book.sources(here)
    assert set(folders(main).values()) == {"reference"}


def folders(group):
    return {name: run.folder.parent.name for name, run in group.items()}


def test_the_book_shows_own_results_if_complete(here):
    main, aside = book.sources(make_all(here))
    assert folders(main) == dict.fromkeys(ALL, "here")
    assert not aside


def test_the_book_fills_gaps_beside_section_5_3(here):
    main, aside = book.sources(make_all(here, PAPER))
    assert folders(main) == dict.fromkeys(ALL, "reference") | dict.fromkeys(PAPER, "here")
    assert not aside


def test_the_book_shows_the_reference_if_runs_are_missing(here):
    main, aside = book.sources(make_all(here, PAPER[1:]))
    assert folders(main) == dict.fromkeys(ALL, "reference")
    assert not aside


def test_the_book_puts_what_does_not_count_apart(here):
    make_all(here)
    make(here, PAPER[1], table(PAPER[1]), counts=False, train_limit=600)
    main, aside = book.sources(here)
    assert folders(main) == dict.fromkeys(ALL, "reference")
    assert folders(aside) == {PAPER[1]: "here"}


def test_the_book_at_smoke_size(here):
    names = tuple(name for name in runs.specs(smoke=True) if name in PAPER)
    make_all(here, names, counts=False, train_limit=600)
    main, aside = book.sources(here, smoke=True)
    assert folders(main) == dict.fromkeys(ALL, "reference")
    assert folders(aside) == dict.fromkeys(names, "here")


def test_another_experiment_does_not_demote_the_real_one(here, monkeypatch, tmp_path):
    known = runs.specs()
    extra = runs.Spec("extra", "Extra", runs.NOTEBOOKS / "mnist.ipynb", {}, "extra")
    plans = {"runs": known | {"extra": extra}, "large": {}}
    monkeypatch.setattr(runs, "specs", lambda section="runs", **_: plans[section])
    make_all(here)
    make(here, "extra", table("extra"), counts=False, experiment="extra", train_limit=600)
    main, aside = book.sources(here)
    assert folders(main) == dict.fromkeys(known, "here")
    assert folders(aside) == {"extra": "here"}
    monkeypatch.setattr(book, "GENERATED", tmp_path / "generated")
    for part in (book.explorers, "write_explorers"), (book, "draw_values"), (book, "save_pictures"):
        monkeypatch.setattr(*part, lambda *_: {})  # figures that this test does not look at
    book.prepare(main, aside)
    page = nbformat.read(tmp_path / "generated/not-counted/extra.ipynb", as_version=4)
    assert page.cells[0].source.startswith("# SMOKE SIZE")
    assert page.cells[1].source == "1 + 1"  # the notebook had no title to replace
    assert "V₁/V₂: 0.38 (0.25 to 3)" in (tmp_path / "generated/landing.md").read_text()


def test_the_book_needs_a_reference_or_results(here, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "REFERENCE", tmp_path / "nowhere")
    with pytest.raises(book.BookError, match="no reference run"):
        book.sources(here)


def test_every_picture_of_the_reference_is_whole():
    drawn = [
        svg
        for notebook in report.REFERENCE.glob("*/notebook.ipynb")
        for cell in nbformat.read(notebook, as_version=4).cells
        for output in cell.get("outputs", [])
        if (svg := output.get("data", {}).get(figures.SVG))
    ]
    assert drawn
    for svg in drawn:
        ElementTree.fromstring(svg)  # raises unless its tags match


def test_nothing_is_judged_at_smoke_size(here, capsys):
    make_all(here, PAPER)
    assert report.main(["--results", str(here)]) == 0
    assert claims.YES in capsys.readouterr().out.split("claims:")[-1]
    assert report.main(["--results", str(here), "--smoke"]) == 0
    tally = capsys.readouterr().out.split("mathematical claims: ")[-1]
    assert not any(verdict in tally for verdict in (claims.YES, claims.PARTLY, claims.NO))


def test_the_sweep_is_counted_by_activation(tmp_path):
    names = ("checks", "I_violations", "V1_violations", "V2_violations", "lower_positive")
    shares = ("V1_vacuous", "V1_zero", "V2_vacuous", "V2_zero")
    numbers = dict(zip(names + shares, (100, 1, 2, 4, 8, 10, 20, 30, 40), strict=True))
    rows = [
        (f"{activation}-8x8-SGD-0.1-seed-{seed}", 3, layer, name, number * (activation == "Tanh"))
        for activation in ("Tanh", "ReLU") for seed in (0, 1) for layer in ("1", "2")
        for name, number in numbers.items()
    ]  # fmt: skip
    rows = [(*r[:4], 100 if r[3] == "checks" else r[4]) for r in rows]
    run = make(tmp_path, "s", pd.DataFrame(rows, columns=results.COLUMNS), experiment="sweep")
    lines = report.sweep({"s": run}).splitlines()
    assert lines[2:] == [
        "| ReLU | 1,200 | 0 | 0 | 0.00% | 0.00% | 0.00% | 0.00% |",
        "| Tanh | 1,200 | 28 | 32 | 10.00% | 20.00% | 30.00% | 40.00% |",
    ]
    assert "not been run" in report.sweep({})


def test_publish(here, tmp_path):
    names = reference.publish(make_all(here), tmp_path / "target")
    assert names == list(ALL)
    assert set(results.load(tmp_path / "target")) == set(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": False}, "not of the full, real MNIST"),
        ({"epochs": 2}, "differ in epochs"),
    ],
)
def test_publish_refuses(here, tmp_path, change, message):
    make_all(here)
    make(here, PAPER[-1], table(PAPER[-1]), **change)
    with pytest.raises(ValueError, match=message):
        reference.publish(here, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_publish_refuses_what_is_not_finished(here, tmp_path):
    others = [name for name in ALL if name != PAPER[0]]
    with pytest.raises(ValueError, match=f"not finished: {PAPER[0]}"):
        reference.publish(make_all(here, others), tmp_path / "target")


def test_the_page_names_the_settings_of_the_reference():
    page = (results.ROOT / "book" / "section-5-3.md").read_text(encoding="utf-8")
    paths = sorted((results.ROOT / "data" / "reference").glob("sigmoid-*/record.json"))
    settings = [json.loads(path.read_text(encoding="utf-8"))["parameters"] for path in paths]
    seeds = [p["seed"] for p in settings]
    assert seeds == list(range(len(seeds)))
    assert f"**seeds 0 to {seeds[-1]}**" in page
    for p in settings:
        assert f"784 – **{' – '.join(map(str, p['hidden']))}** – 10 |" in page
        assert f"**rate {p['dropout']}, before the last layer" in page
        assert (
            f"{p['epochs']} epochs, **{p['optimizer']}, learning rate {p['learning_rate']}, "
            in page
        )
        assert f"batches of {p['batch_size']}**" in page
        assert f"$N =$ **{p['num_samples']:,}**" in page
        assert (p["activation"], p["input_index"]) == ("Sigmoid", "random")


def test_what_figure_1_shows_is_told(group):
    """Ten of the hidden layers' numbers stand in QUANTITIES: V₁ and V₂, and their bounds."""
    wide = group["a"].values.pivot(index=["layer", "epoch"], columns="quantity", values="value")
    hidden = wide.loc[["1", "2"]]
    below = sum(a < b for a, b in zip(hidden.V1, hidden.V2, strict=True))
    assert figures.count_below([group["a"].values] * 2) == (2 * below, 8)
    text = figures.seen(group["a"].values)
    assert f"V1 is the smaller of the two at {below} of 4 points" in text
    assert "V2 is 0 in layer 3." in text
