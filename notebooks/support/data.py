"""The images that the networks are trained on: MNIST, or a stand-in that says it is one.

MNIST is looked for in the folder that `MNIST_DIR` names, else in `data/mnist`, where it is
downloaded if it is not there. Every byte is checked against known SHA-256 values. Where MNIST
cannot be had, `resolve` falls back to the digits bundled with scikit-learn, and says so loudly.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import sys
import textwrap
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import requests

from support import results

DATA_DIR = results.ROOT / "data" / "mnist"
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
TIMEOUT = (5.0, 15.0)  # seconds to connect to a mirror, and to wait for its next bytes
RETRIES = 2  # how often a mirror that answers is asked again for a file

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


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set, split into training and test images."""

    name: str  # "mnist" or "digits"
    title: str  # for people; that of a stand-in says that it is not MNIST
    is_mnist: bool  # whether these are the images of the paper's experiment
    train_images: npt.NDArray[np.float32]  # [n, pixels], row after row, in [0, 1]
    train_labels: npt.NDArray[np.int64]  # [n], in 0, ..., num_classes - 1
    test_images: npt.NDArray[np.float32]
    test_labels: npt.NDArray[np.int64]
    image_shape: tuple[int, int]  # height and width in pixels
    num_classes: int
    digest: str  # SHA-256 (hex) over the bytes of the four parts, for the record of a run


def load(name: str) -> Dataset:
    """Load "mnist" or "digits" from this machine; nothing is ever downloaded here.

    Raises:
        DataError: MNIST is missing or damaged, or there is no data set of this name.

    >>> load("digits").train_images.shape
    (1437, 64)
    """
    if name == "digits":
        from sklearn.datasets import load_digits  # here, for it takes a while to import
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
        split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
        return _dataset(name, split[0], split[2], split[1], split[3], white=16)
    if name != "mnist":
        raise DataError(f"There is no data set {name!r}: choose mnist or digits.")
    folder = find_mnist()
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
    return str(path.relative_to(results.ROOT) if path.is_relative_to(results.ROOT) else path)


def _locate(folder: Path, name: str) -> Path | None:
    """Find a file of MNIST under any of the names that it goes by."""
    names = (f"{stem}{end}" for stem in (name, name.replace("-idx", ".idx")) for end in (".gz", ""))
    # os.path.isfile, unlike Path.is_file, takes a folder that may not be entered for empty.
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)


def find_mnist() -> Path | None:
    """Find the folder that holds all four files of MNIST (their bytes are not checked yet).

    It is the one that `MNIST_DIR` names, else `data/mnist`, if that lacks no file.

    Raises:
        DataError: The named folder lacks a file: who names a folder wants no other data.
    """
    named = os.environ.get("MNIST_DIR")
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
        raw = _decompress(path.read_bytes())
        actual = hashlib.sha256(raw).hexdigest()
    except ValueError as error:
        actual = f"none, for {error}"
    except OSError as error:
        raise DataError(f"{_show(path)} cannot be read: {error}. Make it readable.") from error
    if actual == SHA256[name]:
        return raw
    for other in [other for other in SHA256 if SHA256[other] == actual]:
        raise DataError(
            f"{_show(path)} is another file of MNIST: {other}.\n"
            "Nothing was replaced. Give every file its own name, and run again."
        )
    raise DataError(
        f"{_show(path)} is damaged or is not MNIST's file.\n"
        f"    expected SHA-256 of the decompressed bytes: {SHA256[name]}\n"
        f"    actual:                                     {actual}\n"
        "Nothing was replaced. Delete the file and fetch it again (`make reproduce` does so "
        f"in {_show(DATA_DIR)})."
    )


def _decompress(raw: bytes) -> bytes:
    """Decompress by content, not by name: browsers and servers decompress a .gz on the way.

    Raises:
        ValueError: The bytes are damaged.
    """
    try:
        return gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"it does not decompress: {error}") from error


def download_mnist() -> Path:
    """Download the files of MNIST that `data/mnist` lacks; return that folder.

    Each file appears there, decompressed, once it is complete and checked, so that an interrupted
    download goes on with the missing files.

    Raises:
        DownloadError: No mirror delivers MNIST's bytes.
        DataError: The folder holds a damaged file, or cannot be written to.
    """
    failures = []
    for name in SHA256:
        if path := _locate(DATA_DIR, name):
            _read(path, name)
    for mirror in MIRRORS:
        try:
            _download_from(mirror)
        except requests.RequestException as error:
            status = getattr(error.response, "status_code", "")
            failures.append(f"    {mirror}: {type(error).__name__} {status}".rstrip())
        except ValueError:  # from pooch, which compares the SHA-256
            failures.append(f"    {mirror}: delivered other bytes than MNIST's")
        except OSError as error:
            raise _unwritable(DATA_DIR, error) from error
        else:
            return DATA_DIR
    raise DownloadError(
        "MNIST cannot be downloaded:\n"
        + "\n".join(failures)
        + "\nCheck the network (behind a proxy, set HTTPS_PROXY) and run again.\n"
        + BRING_MNIST
    )


def _download_from(mirror: str) -> None:
    """Download from one mirror what `data/mnist` lacks."""
    import pooch  # here, since its progress bar warns on import inside a notebook

    over_http = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)

    def decompressed(url: str, output: str, _pooch: pooch.Pooch) -> None:
        over_http(url, output, None)
        raw = _decompress(Path(output).read_bytes())
        Path(output).unlink()  # nobody but its owner could read it
        Path(output).write_bytes(raw)

    urls = {name: f"{mirror}{name}.gz" for name in SHA256 if not _locate(DATA_DIR, name)}
    registry = {name: SHA256[name] for name in urls}
    fetcher = pooch.create(DATA_DIR, mirror, registry=registry, urls=urls, retry_if_failed=RETRIES)
    # Once, without retries: where there is no network, nobody waits long for the stand-in.
    requests.head(next(iter(urls.values())), timeout=TIMEOUT).raise_for_status()
    for name in urls:
        fetcher.fetch(name, downloader=decompressed)


def _unwritable(folder: Path, error: OSError) -> DataError:
    """Say what to do about a folder that cannot be written to."""
    return DataError(
        f"Cannot write into {_show(folder)}: {error.strerror or error}.\n"
        "Free some disk space or make the folder writable, and run again."
    )


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


def resolve(dataset: str = "auto") -> str:
    """Choose "mnist" or "digits" for a run; download MNIST if need be; announce a stand-in.

    Args:
        dataset: "mnist"; "digits", the stand-in; or "auto": MNIST, and the stand-in, with a
            notice, only if MNIST is not on this machine and cannot be downloaded.

    Raises:
        DataError: There is no such choice; MNIST is insisted on and cannot be had, or cannot be
            written; a named folder lacks files; a file is damaged.
    """
    if dataset not in CHOICES:
        raise DataError(f"DATASET={dataset} is none of the choices: {', '.join(CHOICES)}.")
    if dataset == "digits":
        print(f"Stand-in data as asked for: {TITLES['digits']}.", flush=True)
        return "digits"
    try:
        folder = find_mnist() or download_mnist()
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
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                results.write_text(file, f"{choice}\n")
            except OSError as error:
                raise _unwritable(file.parent, error) from error
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. Finished files are kept: run again to go on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
