"""Folders of tiny Llama models, and copies of folders with other settings."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.support.sentence_piece import NUM_PIECES


def save_llama(folder: Path, tokenizer_path: Path, **settings: Any) -> Path:
    """Save a Llama with grouped queries, heads wider than hidden_size / heads, and a rotary base of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": NUM_PIECES,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "rope_theta": 5000.0,
            "initializer_range": 0.3,
            "max_position_embeddings": 512,
            **settings,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copyfile(tokenizer_path, folder / "tokenizer.model")
    return folder


def copy_with_config(folder: Path, target: Path, settings: dict[str, Any], *without: str) -> Path:
    """Copy a folder with other settings in its config.json, and without some."""
    shutil.copytree(folder, target)
    config = {**json.loads((target / "config.json").read_text()), **settings}
    (target / "config.json").write_text(json.dumps({n: value for n, value in config.items() if n not in without}))
    return target
