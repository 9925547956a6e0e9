"""Images of a task, decoded for the vision tower; each file is decoded once."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_vlm.config import DataError, TowerConfig
from megatron_vlm.config.prepare import ImageRules
from megatron_vlm.data.images.checking import check_image
from megatron_vlm.data.loading.pixels import Aspect, decode_image
from megatron_vlm.data.rejects import RejectError

_NUM_THREADS = 4
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class PictureReader:
    """Reads image files.

    Args:
        vision: image size and mean colour of the tower.
        aspect: how an image becomes a square, as in training.
    """

    vision: TowerConfig
    aspect: Aspect

    def read(self, paths: Sequence[Path]) -> np.ndarray:
        """Return uint8[n, 3, H, W].

        Raises:
            DataError: a file is missing or is not an image; names it.
        """
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            pictures = list(threads.map(self._read_one, paths))
        size = self.vision.image_size
        return np.stack(pictures) if pictures else np.zeros((0, 3, size, size), dtype=np.uint8)

    def _read_one(self, path: Path) -> np.ndarray:
        try:
            encoded = path.read_bytes()
        except OSError as error:
            raise DataError(f"image cannot be read: {error.strerror}", where=str(path), fix="check the path") from None
        try:
            return decode_image(
                encoded, image_size=self.vision.image_size, aspect=self.aspect, mean=self.vision.image_mean
            )
        except DataError as error:
            raise DataError(error.what, where=str(path), fix="replace the file") from None


def check_pictures(paths: Sequence[Path]) -> None:
    """Check that all files exist and are complete images, before anything slow starts.

    The structure of a file is checked, not its pixels; see `check_image`.

    Raises:
        DataError: counts the missing or the damaged ones and names the first.
    """
    distinct = list(dict.fromkeys(paths))
    if missing := [str(path) for path in distinct if not path.is_file()]:
        raise DataError(
            f"{len(missing)} of {len(distinct)} images are missing, e.g. {', '.join(missing[:_SHOWN])}",
            fix="name their folder with --images",
        )
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        found = tqdm(threads.map(_damage, distinct), "check", len(distinct), unit="image", leave=False, disable=None)
        damaged = [what for what in found if what is not None]
    if damaged:
        raise DataError(
            f"{len(damaged)} of {len(distinct)} images cannot be read, e.g. {'; '.join(damaged[:_SHOWN])}",
            fix="replace the files",
        )


def _damage(path: Path) -> str | None:
    try:
        check_image(path.read_bytes(), ImageRules())
    except OSError as error:
        return f"{path}: {error.strerror}"
    except RejectError as error:
        return f"{path}: {error.what}"
    return None
