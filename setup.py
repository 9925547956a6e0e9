"""Package definition; the tested versions of every direct dependency are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron_vlm",
    version="0.1.0",
    description="Distributed pretraining of visual language models on megatron-core",
    long_description=Path(__file__).with_name("README.md").read_text()
    if Path(__file__).with_name("README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_vlm", "megatron_vlm.*"]),
    package_data={"megatron_vlm": ["**/*.yaml", "**/*.css", "**/*.cpp"]},
    install_requires=[
        # The first with attention for packed samples on a GPU; the images of NVIDIA hold pre-releases.
        "torch>=2.10.0a0",
        # platform/host.py and the spec modules follow one minor version; tests/platform guards the step to the next.
        "megatron-core>=0.16.1,<0.17",
        "numpy>=1.26",
        "pyyaml>=6.0",
        "sentencepiece>=0.2",
        "tokenizers>=0.22,<0.24",
        "pillow>=10.3",
        "simplejpeg>=1.8",
        "safetensors>=0.4",
        "psutil>=5.9",  # megatron-core saves no checkpoint without it, and does not ask for it
        "tqdm>=4.66",
        "tensorboard>=2.16",
        "pyarrow>=15",
        "scipy>=1.11",
        "matplotlib>=3.8",
        "fsspec>=2024.2",
    ],
    extras_require={
        # GPUs of compute capability below 9.0 gain from flash-attn, which builds against the installed torch:
        # pip install flash-attn --no-build-isolation
        "gpu": ["transformer-engine[pytorch]>=2.9"],
        # PEFT is for the tests that it loads what is exported.
        "hf": ["transformers>=4.57,<6", "peft>=0.21"],
        # For `convert to-hf --format gguf`.
        "gguf": ["gguf>=0.17"],
        "ray": ["ray>=2.9"],
        "wandb": ["wandb>=0.18"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "gguf>=0.17",
            "aiohttp>=3.9",  # fsspec's driver of http:// and https://
            "ruff>=0.8",
            "mypy>=1.13",
            "pre-commit>=3.5",
            "types-PyYAML",
            "types-tqdm",
            "types-psutil",
        ],
    },
    entry_points={"console_scripts": ["megatron-vlm = megatron_vlm.cli.main:main"]},
)
