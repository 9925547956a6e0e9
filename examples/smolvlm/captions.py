"""Write real pictures with captions as a corpus: Tux Paint's stamps, photographs and drawings that children paint with.

    python -m smolvlm.captions OUTPUT

- `OUTPUT/raw/pairs/00000.tar`: pictures and captions, key by key, as img2dataset writes them
- `OUTPUT/raw/heldout.json`: pictures for `smolvlm.measure`, which no training sees

The pictures come from the Debian package tuxpaint-stamps-default (GPL-2), which is downloaded and unpacked, not
installed. Letters, digits and other series of signs are left out.
"""

import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGE = "tuxpaint-stamps-default"
DOWNLOADS = Path("runs/smolvlm/downloads")
NUM_HELD_OUT = 64
_STAMPS = "usr/share/tuxpaint/stamps"
_SIGNS = {"alphabets", "numbers", "symbols"}
"""Folders whose captions name letters and digits."""
_SEED = 1234


def fetch_stamps(downloads: Path) -> Path:
    """Download and unpack the package, unless that is done, and return the folder of the stamps."""
    folder = downloads / PACKAGE
    if not (folder / ".complete").exists():
        for tool in ("apt-get", "dpkg"):
            if shutil.which(tool) is None:
                sys.exit(f"{tool} not found; unpack Debian's {PACKAGE} into {folder} and touch {folder}/.complete")
        downloads.mkdir(parents=True, exist_ok=True)
        if not list(downloads.glob(f"{PACKAGE}_*.deb")):
            subprocess.run(["apt-get", "download", PACKAGE], cwd=downloads, check=True)
        (file, *_) = downloads.glob(f"{PACKAGE}_*.deb")
        subprocess.run(["dpkg", "-x", file, folder], check=True)
        (folder / ".complete").touch()
    return folder / _STAMPS


def read_pairs(stamps: Path) -> list[tuple[Path, str]]:
    """Return pictures and English captions, sorted by path; one picture for each caption."""
    pairs: dict[str, Path] = {}
    for picture in sorted(stamps.rglob("*.png")):
        text = picture.with_suffix(".txt")
        if _SIGNS.isdisjoint(picture.relative_to(stamps).parts) and text.exists():
            caption = text.read_text(encoding="utf-8").partition("\n")[0].strip()
            if caption:
                pairs.setdefault(caption, picture)
    return sorted(((picture, caption) for caption, picture in pairs.items()), key=lambda pair: pair[0])


def write_tar(pairs: list[tuple[Path, str]], path: Path) -> None:
    """Write pictures and captions under running keys."""
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for number, (picture, caption) in enumerate(pairs):
            for suffix, content in (("png", picture.read_bytes()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def main() -> None:
    """Write the corpus, unless it is there."""
    raw = Path(sys.argv[1]) / "raw"
    if (raw / "heldout.json").exists():
        return
    pairs = read_pairs(fetch_stamps(DOWNLOADS))
    random.Random(_SEED).shuffle(pairs)
    held_out, training = pairs[:NUM_HELD_OUT], pairs[NUM_HELD_OUT:]
    shutil.rmtree(raw, ignore_errors=True)
    write_tar(training, raw / "pairs" / "00000.tar")
    records = [{"image": str(picture.resolve()), "caption": caption} for picture, caption in held_out]
    (raw / "heldout.json").write_text(json.dumps(records, indent=1) + "\n")
    print(f"{raw}: {len(training)} pairs for training, {len(held_out)} held out")


if __name__ == "__main__":
    main()
