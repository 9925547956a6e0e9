"""Small copies of every preset compute the logits of transformers: groups, rotary base, norms and ties are kept."""

import json
import shutil

import pytest
import torch
import yaml

from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.checkpoint.tensors import read_tensor
from megatron_vlm.config import LanguageConfig, load_section
from megatron_vlm.config.presets import preset_names
from megatron_vlm.convert.from_hf import ImportOptions, import_parts
from tests.support.byte_pair import LLAMA_3_CONTROL, write_llama_3
from tests.support.sentence_piece import NUM_PIECES

# float32: the same products in kernels that add in another order; logits reach 5.
TOLERANCE = 1e-5
NONE = torch.zeros(0, dtype=torch.long)


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder)
    return folder


def published_like(name, tmp_path):
    """Return config.json of a decoder with two key/value heads, or two heads without groups, and otherwise `name`."""
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump({"language": {"preset": name}}))
    preset = load_section(LanguageConfig, tmp_path / "preset.yaml", "language")
    heads = 2 * preset.num_attention_heads // preset.query_groups
    return {
        "vocab_size": NUM_PIECES,
        "hidden_size": 8 * heads,
        "intermediate_size": 24 * heads,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": preset.max_position_embeddings,
        "rope_theta": preset.rotary_base,
        "rms_norm_eps": preset.layernorm_epsilon,
        "tie_word_embeddings": preset.share_embeddings_and_output_weights,
        "initializer_range": (8 * heads) ** -0.5,
    }


def save_llama(folder, tokenizer_path, settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.save_pretrained(folder)
    shutil.copyfile(tokenizer_path, folder / "tokenizer.model")
    return model


@pytest.mark.parametrize("name", preset_names(LanguageConfig.PRESETS))
def test_small_copy_of_a_preset_computes_the_logits_of_transformers(name, clip_dir, tokenizer_path, tmp_path):
    settings = published_like(name, tmp_path)
    theirs = save_llama(tmp_path / "llama", tokenizer_path, settings)
    language = import_parts(tmp_path / "llama", clip_dir, tmp_path / "run", ImportOptions()).language
    assert language.share_embeddings_and_output_weights == settings["tie_word_embeddings"]
    assert (language.rotary_base, language.layernorm_epsilon) == (settings["rope_theta"], settings["rms_norm_eps"])
    ids = torch.randint(3, NUM_PIECES, (1, 60), generator=torch.Generator().manual_seed(0))
    with open_model(read_run_settings(tmp_path / "run")) as model, torch.no_grad():
        ours = model(ids, torch.zeros(0, 3, 16, 16), NONE, num_images=0)
        expected = theirs(ids).logits
    assert expected.std() > 0.3
    assert (ours - expected).abs().max() <= TOLERANCE


def test_settings_written_are_those_read_back(tmp_path):
    from megatron_vlm.convert.families import llama

    for name in preset_names(LanguageConfig.PRESETS):
        (tmp_path / "preset.yaml").write_text(yaml.safe_dump({"language": {"preset": name}}))
        preset = load_section(LanguageConfig, tmp_path / "preset.yaml", "language")
        written = json.loads(json.dumps(llama.config_to_hf(preset)))
        assert written["vocab_size"] == preset.vocab_size + 2
        read = llama.config_from_hf(written, where="config.json", vocab_size=preset.vocab_size)
        assert (read.query_groups, read.head_channels) == (preset.query_groups, preset.head_channels)
        for field in ("num_layers", "hidden_size", "ffn_hidden_size", "rotary_base", "max_position_embeddings"):
            assert getattr(read, field) == getattr(preset, field), (name, field)


def test_new_control_tokens_of_a_tokenizer_get_the_mean_of_the_other_rows(clip_dir, tokenizer_path, tmp_path, caplog):
    theirs = save_llama(tmp_path / "llama", tokenizer_path, published_like("llama3-8b", tmp_path))
    (tmp_path / "llama" / "tokenizer.model").unlink()
    write_llama_3(tmp_path / "llama")
    with caplog.at_level("INFO"):
        model = import_parts(tmp_path / "llama", clip_dir, tmp_path / "run", ImportOptions())
    assert model.language.vocab_size == NUM_PIECES + len(LLAMA_3_CONTROL)
    assert f"new tokens, which get the mean of the other rows: {', '.join(LLAMA_3_CONTROL)}" in caplog.text
    weights = {"output_layer": theirs.lm_head.weight, "embedding.word_embeddings": theirs.model.embed_tokens.weight}
    for name, weight in weights.items():
        rows = read_tensor(read_run_settings(tmp_path / "run").checkpoint, f"model.language_model.{name}.weight")
        assert torch.equal(rows[:NUM_PIECES], weight)
        assert torch.allclose(rows[NUM_PIECES : model.language.num_token_ids], weight.mean(0), atol=1e-7)
