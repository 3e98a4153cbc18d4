"""The page "What does this code compute?": its sentences hold in the reference."""

import pytest
from support import in_use, report, results

NAMES = [way.__name__ for way in in_use.WAYS]
LOST = {"last_example", "last_batch", "one_mean_for_each_tensor"}


@pytest.fixture(scope="module")
def values():
    """Quantity → formula → value."""
    found = results.load(report.REFERENCE)["audit"].values
    return {q: dict(zip(own.layer, own.value, strict=True)) for q, own in found.groupby("quantity")}


def test_every_formula_is_recognised(values):
    assert set(values["right"]) == set(NAMES)
    assert all(values["right"].values())


def test_sizes_differ_by_five_powers_of_ten(values):
    ratios = values["ratio"].values()
    assert 1 / 450 < min(ratios) < 1 / 350
    assert 350 < max(ratios) < 450
    assert max(ratios) / min(ratios) > 1e5


def test_the_order_differs_less(values):
    assert {n for n, rank in values["rank"].items() if rank < 0.95} == LOST


def test_the_largest_entries_differ_more(values):
    kept = {n: share for n, share in values["overlap"].items() if n not in {"exact", *LOST}}
    assert min(kept.values()) > 0.65
    assert max(kept.values()) < 0.91
    assert kept["sampled"] < sorted(kept.values())[len(kept) // 2]
    assert all(values["overlap"][n] < 0.6 for n in LOST)
