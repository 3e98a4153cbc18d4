"""Progress of a computation that may take long."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm

SECONDS_BEFORE_PROGRESS = 2.0


def progress(total: int | None, task: str, unit: str) -> tqdm[NoReturn]:
    """A bar that appears after some seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without widgets gets a bar of characters
        from tqdm.auto import tqdm
    return tqdm(total=total, desc=task, unit=f" {unit}", delay=SECONDS_BEFORE_PROGRESS, leave=False)
