"""The explorers show what fimlib computes and what the runs hold, and nothing else."""

import csv
import json
import math
import random
import re

import pytest
import torch
from support import explorers, report, results

import fimlib

BOOK = results.ROOT / "book"
EXACT, LOWER = "lambda-max-m", "lower-m"


@pytest.fixture(scope="module")
def data():
    return explorers.softmax()


@pytest.fixture(scope="module")
def reference():
    return results.load(report.REFERENCE)


def afresh(sigma):
    """Every number of the explorer at one softmax vector, by the names of its rows."""
    family, h = fimlib.Categorical(), sigma.log().clamp_min(-800)[None]
    exact, sigma = fimlib.spectrum(family, h), sigma[None]
    return {
        "lambda-max-i": exact.max_cov,
        "sigma-max": sigma.max(),
        "spread": 1 - (sigma**2).sum(),
        "theorem-5-2-i": fimlib.theorem_5_2(sigma).max_cov,
        "lambda-max-m": fimlib.lambda_max(family, h),
        "lower-m": fimlib.lambda_max(family, h, method="lower"),
        "certified-m": fimlib.lambda_max(family, h, method="certified"),
        "corollary-4-2": fimlib.corollary_4_2(family, h).upper,
        "proposition-4-3": fimlib.proposition_4_3(family, h),
        "corollary-q-1": fimlib.bounds.corollary_q_1(sigma),
        "theorem-5-2-m": fimlib.theorem_5_2(sigma).max_outer,
    }


def test_every_value_of_the_triangle_is_fimlibs(data):
    three = data["three"]
    assert len(three["at"]) == 31 * 32 / 2
    corners = [three["at"].index(place) for place in ([30, 0], [15, 15], [10, 10], [28, 1])]
    for k in corners + random.Random(3).sample(range(len(three["at"])), 12):
        i, j = three["at"][k]
        sigma = torch.tensor([i, j, 30 - i - j], dtype=torch.float64) / 30
        assert three["sigma"][k] == pytest.approx(sigma.tolist(), abs=1e-14)
        cov = torch.diag(sigma) - torch.outer(sigma, sigma)
        expected = torch.linalg.eigvalsh(cov).flip(0).tolist()
        assert three["eigenvalues"][k] == pytest.approx(expected, abs=1e-14)
        for name, value in afresh(sigma).items():
            assert three[name][k] == pytest.approx(float(value), rel=1e-9, abs=1e-13), (i, j, name)


def test_every_value_over_the_temperature_is_fimlibs(data):
    ten = data["ten"]
    assert (ten["temperature"][0], ten["temperature"][-1]) == pytest.approx((0.1, 100))
    for k in random.Random(4).sample(range(len(ten["temperature"])), 5):
        ratio = math.exp(-1 / ten["temperature"][k])
        sigma = torch.tensor([ratio**c for c in range(10)], dtype=torch.float64)
        sigma = sigma / sigma.sum()
        assert ten["sigma"][k] == pytest.approx(sigma.tolist(), rel=1e-12)
        for name, value in afresh(sigma).items():
            assert ten[name][k] == pytest.approx(float(value), rel=1e-8, abs=1e-15), (k, name)


def test_values_by_hand(data):
    three = data["three"]
    uniform, half = (three["at"].index(place) for place in ([10, 10], [15, 15]))
    assert three[EXACT][uniform] == pytest.approx(1 / 18)  # (1 − 2/C)²/(C − 1)
    assert three[EXACT][half] == three["certified-m"][half] == 0
    assert three["theorem-5-2-m"][half] == 1


def test_the_value_lies_between_its_bounds_and_the_smallest_is_named(data):
    for columns in data.values():
        for k, exact in enumerate(columns[EXACT]):
            upper = {name: columns[name][k] for name in explorers.UPPER}
            assert columns[LOWER][k] <= exact * (1 + 1e-9) + 1e-15
            assert exact <= min(upper.values()) * (1 + 1e-9) + 1e-15
            least = columns["tightest"][k]
            assert upper[least[0]] == pytest.approx(min(upper.values()), rel=1e-11)
            others = [upper[name] for name in upper if name not in least]
            assert all(value > upper[least[0]] for value in others)
            del upper["certified-m"]
            assert upper[columns["tightest-of-paper"][k][0]] == pytest.approx(min(upper.values()))


def test_equal_bounds_are_all_named():
    columns = {"a": [1.0, 2.0], "b": [1.0 + 1e-14, 1.0], "c": [3.0, 1.5]}
    assert explorers.tightest(columns, ("a", "b", "c")) == [["a", "b"], ["b"]]


ROOTED = {
    "sd-1": "V1", "sd-1-bound": "V1_upper", "sd-1-certified": "V1_certified",
    "sd-2": "V2", "sd-2-bound": "V2_upper",
}  # fmt: skip


@pytest.mark.parametrize("name", ["sigmoid-seed-0", "log-sigmoid-seed-3"])
def test_every_value_of_a_run_stands_in_its_table(reference, name):
    """Against the bare file, read without pandas."""
    shown = explorers.figure_1(reference[name])
    with (report.REFERENCE / name / "values.csv").open() as file:
        table = {
            (row["layer"], int(row["epoch"]), row["quantity"]): float(row["value"])
            for row in csv.DictReader(file)
        }
    labels = reference[name].record["parameters"]["num_samples"]
    assert [x["output"] for x in shown["layers"]] == [False] * (len(shown["layers"]) - 1) + [True]
    for layer in shown["layers"]:
        for k, epoch in enumerate(layer["epochs"]):
            q = {quantity: v for (a, e, quantity), v in table.items()
                 if (a, e) == (str(layer["layer"]), epoch)}  # fmt: skip
            expected = {"fisher": q["I"], "fisher-bound": q["I_upper"]}
            expected |= {key: q[quantity] ** 0.5 for key, quantity in ROOTED.items()}
            expected["log-ratio-1"] = math.log(q["V1_upper"] / q["V1"])
            if layer["output"]:
                assert q["V2"] == 0
                expected["sd-1-one-label"] = (q["V1"] * labels) ** 0.5
                del expected["sd-2"], expected["sd-2-bound"]
            else:
                expected["log-ratio-2"] = math.log(q["V2_upper"] / q["V2"])
            assert layer.keys() == expected.keys() | {"layer", "output", "epochs"}
            for key, value in expected.items():
                assert layer[key][k] == pytest.approx(value, rel=1e-12), (layer["layer"], key)
    sure = [table["network", epoch, "largest_probability"] for epoch in layer["epochs"]]
    assert shown["largest-probability"] == sure


@pytest.fixture(scope="module")
def written(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    return folder, explorers.write_explorers(reference, folder)


def test_what_is_written_can_be_read_back(written, reference, data):
    folder, made = written
    found = {}
    for name in ("softmax", "figure-1"):
        text = (folder / f"explore-{name}.html").read_text(encoding="utf-8")
        [content] = re.findall(
            rf'<script type="application/json" id="data-{name}">(.*)</script>', text
        )
        found[name] = json.loads(content)
    assert found["softmax"] == data
    counted = [r.name for r in reference.values() if r.record["experiment"] in report.LIKE_FIGURE_1]
    names = [run["name"] for run in found["figure-1"]["runs"]]
    assert sorted(names) == sorted(counted)
    assert names[0] == "sigmoid-seed-0"
    assert [run.name for run in made["explore-figure-1.svg"]] == names


def test_every_row_of_the_pages_has_its_numbers(data, reference):
    rows = set(re.findall('data-row="([^"]+)"', (BOOK / "explore-softmax.md").read_text()))
    for columns in data.values():
        text = {"sigma", "eigenvalues", "tightest", "tightest-of-paper", "at", "temperature"}
        assert rows == columns.keys() - text
    rows = set(re.findall('data-row="([^"]+)"', (BOOK / "explore-figure-1.md").read_text()))
    layers = explorers.figure_1(reference["sigmoid-seed-0"])["layers"]
    assert rows == set().union(*layers) - {"layer", "output", "epochs"}


def test_what_to_try_tells_the_data(written, data):
    """The sentences themselves: they hold for these numbers, whatever the numbers are."""
    three, ten = data["three"], data["ten"]
    beaten = [k for k, names in enumerate(three["tightest"]) if "certified-m" not in names]
    assert {tuple(sorted([*three["at"][k], 30 - sum(three["at"][k])])) for k in beaten} == {
        (1, 1, 28)
    }
    first = [a <= b for a, b in zip(ten["sigma-max"], ten["spread"], strict=True)]
    assert first == sorted(first)  # it changes once, from the second term to the first
    folder, _ = written
    softmax = (folder / "explore-softmax.md").read_text()
    assert f"at {len(beaten)} of the 496 softmax vectors" in " ".join(softmax.split())
    figure_1 = " ".join((folder / "explore-figure-1.md").read_text().split())
    assert re.search(r"\d+ of 315 times with sigmoid, \d+ of 420 times with log-sigmoid", figure_1)
    assert "In 10 of 10 runs there is no vermilion line" in figure_1
