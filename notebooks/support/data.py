"""The images that the networks are trained on: MNIST, or a stand-in that says it is one.

MNIST is looked for in the folder that `MNIST_DIR` names, else in `data/mnist`, where it is
downloaded if it is not there. Every byte is checked against known SHA-256 values. Where MNIST
cannot be had, `resolve` falls back to the digits bundled with scikit-learn, and says so loudly.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import math
import os
import queue
import sys
import tempfile
import textwrap
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import requests
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

REPOSITORY = Path(__file__).resolve().parents[2]
DATA_DIR = REPOSITORY / "data" / "mnist"
CHOICES = ("auto", "mnist", "digits")
TITLES = {"mnist": "MNIST", "digits": "scikit-learn 8x8 digits (NOT MNIST)"}

# Of the decompressed bytes: copies of MNIST differ in their gzip headers, never in these.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MIRRORS = [
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
]
PROBE_SECONDS = 15.0  # for all mirrors together to give a sign of life
TIMEOUT = (5.0, 15.0)  # seconds to connect to a mirror, and to wait for its next bytes
ROUNDS = 3  # how often each mirror is asked for a file
PAUSE = 1.0  # seconds before the next mirror is asked

BRING_MNIST = f"""\
To bring MNIST yourself, put its four files, gzipped (.gz) or not, into one folder:
    {"  ".join(list(SHA256)[:2])}
    {"  ".join(list(SHA256)[2:])}
and run
    make reproduce MNIST_DIR=/folder/with/idx/files
For a notebook opened by itself, set the environment variable MNIST_DIR to that folder."""


class DataError(Exception):
    """The data cannot be had as asked; the message says why and what to do."""


class DownloadError(DataError):
    """MNIST cannot be downloaded: the only error that the stand-in may take the place of."""


class NoNetworkError(DownloadError):
    """No mirror gave a sign of life."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set, split into training and test images.

    Attributes:
        name: "mnist" or "digits".
        title: The name for people; that of a stand-in says that it is not MNIST.
        is_mnist: Whether these are the images of the paper's experiment.
        train_images: float32 in [0, 1], shape [n, pixels], rows of the image one after another.
        train_labels: int64 in 0, ..., num_classes - 1, shape [n].
        test_images: Like `train_images`.
        test_labels: Like `train_labels`.
        image_shape: Height and width in pixels.
        num_classes: The number of classes.
        digest: SHA-256 (hex) over the bytes of the four parts, for the record of a run.
    """

    name: str
    title: str
    is_mnist: bool
    train_images: npt.NDArray[np.float32]
    train_labels: npt.NDArray[np.int64]
    test_images: npt.NDArray[np.float32]
    test_labels: npt.NDArray[np.int64]
    image_shape: tuple[int, int]
    num_classes: int
    digest: str


def load(name: str, *, mnist_dir: str | Path | None = None) -> Dataset:
    """Load a data set from this machine; nothing is ever downloaded here.

    Args:
        name: "mnist" or "digits".
        mnist_dir: Folder of MNIST's files; by default `MNIST_DIR`, else `data/mnist`.

    Raises:
        DataError: MNIST is missing or damaged, or there is no data set of this name.

    >>> load("digits").train_images.shape
    (1437, 64)
    """
    if name == "digits":
        digits = load_digits()
        images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
        split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
        return _dataset(name, split[0], split[2], split[1], split[3], white=16)
    if name != "mnist":
        raise DataError(f"There is no data set {name!r}: choose mnist or digits.")
    folder = find_mnist(mnist_dir)
    if folder is None:
        raise DataError(
            f"MNIST is not in {_show(DATA_DIR)}: `make reproduce` downloads it.\n{BRING_MNIST}"
        )
    return _dataset(name, *map(_parse_idx, _read_mnist(folder)), white=255)


def _dataset(name: str, *parts: npt.NDArray[np.uint8], white: int) -> Dataset:
    """Scale the images and measure the digest of [train, test] x [images, labels]."""
    train_images, test_images = (
        np.divide(images.reshape(len(images), -1), white, dtype=np.float32) for images in parts[::2]
    )
    train_labels, test_labels = (labels.astype(np.int64) for labels in parts[1::2])
    return Dataset(
        name=name,
        title=TITLES[name],
        is_mnist=name == "mnist",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        image_shape=(parts[0].shape[1], parts[0].shape[2]),
        num_classes=10,
        digest=hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest(),
    )


def _parse_idx(raw: bytes) -> npt.NDArray[np.uint8]:
    """Read IDX: two zeros, type, number of axes, each axis' length (big-endian int32), data."""
    axes = raw[3]
    shape = np.frombuffer(raw, ">i4", count=axes, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _show(path: Path) -> str:
    """Name a path as the user knows it: inside the repository, from its root."""
    return str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path)


def _locate(folder: Path, name: str) -> Path | None:
    """Find a file of MNIST under any of the names that it goes by."""
    names = (f"{stem}{end}" for stem in (name, name.replace("-idx", ".idx")) for end in (".gz", ""))
    # os.path.isfile, unlike Path.is_file, takes a folder that may not be entered for empty.
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)


def find_mnist(mnist_dir: str | Path | None = None) -> Path | None:
    """Find the folder that holds all four files of MNIST (their bytes are not checked yet).

    Args:
        mnist_dir: The folder; by default the one that `MNIST_DIR` names, else `data/mnist`.

    Returns:
        The folder, or None if nobody named one and `data/mnist` lacks a file.

    Raises:
        DataError: The named folder lacks a file: who names a folder wants no other data.
    """
    named = mnist_dir or os.environ.get("MNIST_DIR")
    folder = Path(named).expanduser() if named else DATA_DIR
    missing = [name for name in SHA256 if _locate(folder, name) is None]
    if missing and named:
        raise DataError(
            f"The folder named for MNIST, {folder.absolute()}, lacks (or keeps unreadable):\n"
            f"    {', '.join(missing)}\nPut the files there, gzipped (.gz) or not, name their "
            f"folder, or leave MNIST_DIR out\nto have MNIST downloaded to {_show(DATA_DIR)}."
        )
    return None if missing else folder


def _read_mnist(folder: Path) -> list[bytes]:
    """Read and check the four files, in the order of `SHA256`."""
    return [_read(_locate(folder, name) or folder / name, name) for name in SHA256]


def _read(path: Path, name: str) -> bytes:
    """Read one file, decompress it if need be, and refuse it unless its SHA-256 is MNIST's."""
    try:
        raw = path.read_bytes()
        # By content, not by name: browsers and servers decompress a .gz on the way.
        raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
        actual = hashlib.sha256(raw).hexdigest()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        actual = f"none, for it does not decompress: {error}"
    except OSError as error:
        raise DataError(f"{_show(path)} cannot be read: {error}. Make it readable.") from error
    if actual in SHA256.values() and actual != SHA256[name]:
        other = next(known for known, digest in SHA256.items() if digest == actual)
        raise DataError(f"{_show(path)} holds {other}: give the files their own names.")
    if actual != SHA256[name]:
        raise DataError(
            f"{_show(path)} is damaged or is not MNIST's file.\n"
            f"    expected SHA-256 of the decompressed bytes: {SHA256[name]}\n"
            f"    actual:                                     {actual}\n"
            "Nothing was replaced. Delete the file and fetch it again (`make reproduce` does so "
            f"in {_show(DATA_DIR)})."
        )
    return raw


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Give a folder beside the final files, whence `os.replace` moves them in one step."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=folder) as scratch:
            yield Path(scratch)
    except OSError as error:
        raise DataError(
            f"Cannot write into {_show(folder)}: {error.strerror or error}.\n"
            "Free some disk space or make the folder writable, and run again."
        ) from error


def _probe(mirror: str) -> str:
    """Ask a mirror for a sign of life: the reason why there is none, "" if there is."""
    try:
        url = f"{mirror}{next(iter(SHA256))}.gz"
        requests.head(url, timeout=PROBE_SECONDS, allow_redirects=True).raise_for_status()
    except Exception as error:  # whatever the network or the proxy settings come up with
        return type(error).__name__
    return ""


def _living_mirrors() -> list[str]:
    """List the mirrors, first the one that answered first.

    A timeout of `requests` does not cover a name server that never answers, so the mirrors are
    asked in threads that nobody waits for beyond `PROBE_SECONDS`.
    """
    answers: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    for mirror in MIRRORS:
        threading.Thread(
            target=lambda mirror=mirror: answers.put((mirror, _probe(mirror))), daemon=True
        ).start()
    end = time.monotonic() + PROBE_SECONDS
    failures = dict.fromkeys(MIRRORS, f"no answer within {math.ceil(PROBE_SECONDS)} s")
    for _ in MIRRORS:
        try:
            mirror, failure = answers.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            break
        if not failure:
            return [mirror, *(other for other in MIRRORS if other != mirror)]
        failures[mirror] = failure
    reasons = "\n".join(f"    {mirror}: {failure}" for mirror, failure in failures.items())
    raise NoNetworkError(
        f"MNIST cannot be downloaded, no mirror can be reached:\n{reasons}\n"
        f"Check the network (behind a proxy, set HTTPS_PROXY) and run again.\n{BRING_MNIST}"
    )


def _fetch(name: str, mirrors: Sequence[str], scratch: Path) -> Path:
    """Download one file into `scratch` from the first mirror that delivers the right bytes."""
    path = scratch / f"{name}.gz"
    import pooch  # here, since its progress bar warns on import inside a notebook

    download = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)
    failures = []
    for mirror in [*mirrors] * ROUNDS:
        print(f"Downloading {path.name} from {mirror}", flush=True)
        try:
            download(mirror + path.name, str(path), None)
            _read(path, name)
        except requests.RequestException as error:
            status = getattr(error.response, "status_code", "")
            failures.append(f"    {mirror}: {type(error).__name__} {status}")
        except DataError:
            failures.append(f"    {mirror}: delivered other bytes than MNIST's")
        else:
            return path
        time.sleep(PAUSE)
    reasons = "\n".join(dict.fromkeys(failures))  # each once, in order
    raise DownloadError(
        f"{path.name} cannot be downloaded:\n{reasons}\nRun again later.\n{BRING_MNIST}"
    )


def download_mnist(target: str | Path | None = None) -> Path:
    """Download the files of MNIST that `target` lacks, and check them.

    Each file gets its final name once it is complete and checked, so that an interrupted
    download goes on with the missing files.

    Args:
        target: The folder to download to; by default `data/mnist`.

    Returns:
        The folder, holding all four files.

    Raises:
        NoNetworkError: No mirror answers (noticed within `PROBE_SECONDS`).
        DownloadError: No mirror delivers MNIST's bytes.
        DataError: The folder holds a damaged file, or cannot be written to.
    """
    folder = Path(target or DATA_DIR)
    present = {name: path for name in SHA256 if (path := _locate(folder, name))}
    for name, path in present.items():
        _read(path, name)
    if missing := [name for name in SHA256 if name not in present]:
        mirrors = _living_mirrors()
        with _scratch(folder) as scratch:
            for name in missing:
                os.replace(_fetch(name, mirrors, scratch), folder / f"{name}.gz")
    return folder


def _notice(reason: str) -> str:
    """Draw the box that nobody overlooks."""
    text = (
        "THIS IS NOT MNIST\n\n"
        "MNIST could not be had. This run is on a stand-in, scikit-learn's bundled 8x8 digits.\n"
        "None of its results is a result on MNIST, and none of the paper's claims counts.\n\n"
        f"{reason}\n\n"
        "DATASET=mnist forbids the stand-in: the run then stops here instead."
    )
    wrap = textwrap.TextWrapper(94, subsequent_indent="    ", break_on_hyphens=False).wrap
    box = [f"## {part:<94} ##" for line in text.splitlines() for part in wrap(line) or [""]]
    return "\n".join(["", "#" * 100, *box, "#" * 100, ""])


def resolve(dataset: str = "auto", *, mnist_dir: str | Path | None = None) -> str:
    """Decide on the data of a run; download MNIST if need be; say so if it is a stand-in.

    Args:
        dataset: "mnist"; "digits", the stand-in; or "auto": MNIST, and the stand-in, with a
            notice, only if MNIST is not on this machine and cannot be downloaded.
        mnist_dir: Folder of MNIST's files; by default `MNIST_DIR`, else `data/mnist`.

    Returns:
        "mnist" (found and checked) or "digits".

    Raises:
        DataError: There is no such choice; a named folder lacks files; a file is damaged; the
            download cannot be written; or MNIST is insisted on and cannot be had.
    """
    if dataset not in CHOICES:
        raise DataError(f"DATASET={dataset} is none of the choices: {', '.join(CHOICES)}.")
    if dataset == "digits":
        print(f"Stand-in data as asked for: {TITLES['digits']}.", flush=True)
        return "digits"
    try:
        folder = find_mnist(mnist_dir) or download_mnist()
    except DownloadError as error:
        if dataset == "mnist":
            raise
        print(_notice(str(error)), flush=True)
        return "digits"
    _read_mnist(folder)  # a damaged file is refused now rather than in the midst of a run
    return "mnist"


def _describe(data: Dataset) -> str:
    """Say in one line what was found where."""
    where = _show(find_mnist() or DATA_DIR) if data.is_mnist else "scikit-learn"
    size = f"{len(data.train_images)} training and {len(data.test_images)} test images"
    shape = "x".join(map(str, data.image_shape))
    return f"{data.title}, from {where}: {size} of {shape}, SHA-256 {data.digest[:12]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Get the data of a run ready; return 0, 1 if they cannot be had, 130 if interrupted."""
    parser = argparse.ArgumentParser("python -m support.data", description="Get the data ready.")
    parser.add_argument("--dataset", default="auto", help="auto (default), mnist or digits")
    parser.add_argument("--print-choice-to", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        choice = resolve(arguments.dataset)
        print(_describe(load(choice)), flush=True)
        if file := arguments.print_choice_to:
            with _scratch(file.parent) as scratch:
                (scratch / file.name).write_text(f"{choice}\n")
                os.replace(scratch / file.name, file)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. Finished files are kept: run again to go on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
