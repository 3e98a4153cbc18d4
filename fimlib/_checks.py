"""Checks of arguments that several functions take."""

from __future__ import annotations

import numbers
from collections.abc import Collection

import torch


def check_integer(value: int, name: str, at_least: int = 1, *, remedy: str = "") -> int:
    """The value, if it is an integer ≥ ``at_least``; else a ValueError that says so."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < at_least:
        end = f": {remedy}" if remedy else "."
        raise ValueError(f"{name} must be an integer ≥ {at_least}, got {value!r}{end}")
    return int(value)


def check_num_samples(num_samples: int, at_least: int = 1) -> int:
    """N, the number of labels per input."""
    return check_integer(num_samples, "num_samples (N)", at_least)


def check_estimator(estimator: object) -> int:
    """The index j of Î_j: 1 or 2."""
    if isinstance(estimator, bool) or estimator not in (1, 2):
        raise ValueError(f"estimator must be 1 (Î₁) or 2 (Î₂), got {estimator!r}.")
    return 1 if estimator == 1 else 2


def check_choice(value: str, name: str, known: Collection[str]) -> str:
    """The value, if it is one of those that are known."""
    if value not in tuple(known):  # which may be a dict, and the value a list
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}.")
    return value


def check_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype of contractions: one of the two that make sense, or no choice."""
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be None, torch.float64 or torch.float32, got {dtype!r}.")
    return dtype
