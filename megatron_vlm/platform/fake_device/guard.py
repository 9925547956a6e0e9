"""Compile and load the library that gives torch's CPU build a guard for CUDA devices.

A CUDA build of torch has its own. The library is compiled once for each version of torch, into a cache folder.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import logging
import os
import runpy
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_vlm.config import ConfigError

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("cuda_guard.cpp")
_FLAGS = ("-O1", "-shared", "-fPIC", "-std=c++20")
_COMPILERS = ("c++", "g++", "clang++")
_READ_ABI = "import torch; print(int(torch._C._GLIBCXX_USE_CXX11_ABI))"
_loaded: list[ctypes.CDLL] = []


def load_guard() -> None:
    """Make torch's autograd accept CUDA devices in this process; call it before torch is imported.

    Raises:
        ConfigError: torch is a CPU build, and there is no compiler or it fails.
        RuntimeError: torch is already imported.
    """
    # Compiled parts of megatron-core run as plain Python: a fake tensor has nothing that a compiled kernel could read.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    path = build_guard()
    if path is None or _loaded:
        return
    if "torch" in sys.modules:
        raise RuntimeError("load_guard() must run before torch is imported")
    try:
        _loaded.append(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
    except OSError as error:
        raise ConfigError(
            f"the stand-in for CUDA does not load: {error}", fix=f"delete {path} and run the command again"
        ) from None


def build_guard() -> Path | None:
    """Return the library, compiled if it is not in the cache; None if torch needs none.

    Raises:
        ConfigError: there is no compiler, or it fails.
    """
    torch_folder = _torch_folder()
    facts = runpy.run_path(str(torch_folder / "version.py"))
    if facts["cuda"] is not None:
        return None
    source = _SOURCE.read_bytes()
    digest = hashlib.sha256(source + repr((_FLAGS, str(torch_folder))).encode()).hexdigest()[:12]
    path = _cache_folder() / f"cuda_guard-torch{facts['__version__']}-{digest}.so"
    if not path.exists():
        _compile(torch_folder, facts["__version__"], path)
    return path


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ConfigError("torch is not installed", fix="pip install torch")
    return Path(spec.origin).parent


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "megatron_vlm"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only home folder, or none
        folder = None
    if folder is None or not os.access(folder, os.W_OK):
        folder = _private_folder(Path(tempfile.gettempdir()) / f"megatron_vlm_{os.getuid()}")
    return folder


def _private_folder(folder: Path) -> Path:
    """Make a folder in a place that all users share; what lies in it is loaded as code, so it must be this user's."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(
            "the folder for the compiled stand-in for CUDA is not a private folder of this user",
            where=str(folder),
            fix="set XDG_CACHE_HOME to a folder of your own",
        )
    return folder


def _compile(torch_folder: Path, version: str, path: Path) -> None:
    """Compile into a file beside `path`, then rename it: other processes see the whole library or none."""
    compiler = _find_compiler(version)
    logger.info("compiling the stand-in for CUDA for torch %s, once", version)
    abi = subprocess.run([sys.executable, "-c", _READ_ABI], capture_output=True, text=True, check=True).stdout.strip()
    descriptor, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(descriptor)
    command = [compiler, *_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={abi}", f"-I{torch_folder / 'include'}", str(_SOURCE)]
    command += [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder / 'lib'}", "-o", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), f"exit {done.returncode}")
            raise ConfigError(
                f"{compiler} cannot compile the stand-in for CUDA: {first}",
                fix="install a C++20 compiler (g++ 10 or later), or name one in CXX",
            )
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _find_compiler(version: str) -> str:
    named = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, (named,) if named else _COMPILERS)), None)
    if found is None:
        raise ConfigError(
            f"torch {version} is a CPU build, on which a rehearsal needs a C++ compiler once; "
            f"found no {named or ', '.join(_COMPILERS)}",
            fix="install g++, name a compiler in CXX, or use a CUDA build of torch",
        )
    return found
