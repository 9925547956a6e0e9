import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.checkpoint.tensors import hash_weights, list_tensors, read_tensor, write_weights
from megatron_vlm.config import CheckpointError, ConfigError, UsageError, load_section
from megatron_vlm.config.towers.s2 import Config as ScaledConfig
from megatron_vlm.convert.from_hf import ImportOptions, import_model, import_parts
from megatron_vlm.convert.to_hf import export_model
from tests.support.configs import tiny_model_with_tower
from tests.support.llama_folders import copy_with_config, save_llama
from tests.support.sentence_piece import NUM_PIECES

WEIGHTS = "model.safetensors"
TOLERANCE = 2e-5


@pytest.fixture
def changed_copy(tmp_path):
    """Copy a folder and change its tensors: changed_copy(folder, change)."""

    def copy(folder, change):
        target = tmp_path / folder.name
        shutil.copytree(folder, target)
        save_file(change(load_file(target / WEIGHTS)), target / WEIGHTS, metadata={"format": "pt"})
        return target

    return copy


def assert_logits_of_llama(run, llama_dir):
    from transformers import LlamaForCausalLM

    ids = torch.randint(3, NUM_PIECES, (1, 40), generator=torch.Generator().manual_seed(0))
    none = torch.zeros(0, dtype=torch.long)
    with open_model(read_run_settings(run)) as model, torch.no_grad():
        ours = model(ids, torch.zeros(0, 3, 32, 32), none, num_images=0)[..., :NUM_PIECES]
        theirs = LlamaForCausalLM.from_pretrained(llama_dir)(ids).logits
    assert theirs.std() > 0.3
    assert (ours - theirs).abs().max() <= TOLERANCE


def test_imported_llama_computes_the_logits_of_transformers(imported, llama_dir):
    assert_logits_of_llama(imported, llama_dir)


def test_imported_tower_computes_the_features_of_transformers(imported, clip_dir):
    from transformers import CLIPVisionModel

    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with open_model(read_run_settings(imported)) as model, torch.no_grad():
        ours = model.vision_model(pixels)
        theirs = CLIPVisionModel.from_pretrained(clip_dir)(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert theirs.std() > 0.3
    # Features reach 150; both differ from float64 by 3e-4.
    assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()


def test_imported_run_exports_and_loads(imported, tmp_path):
    from transformers import LlavaForConditionalGeneration

    export_model(read_run_settings(imported), tmp_path / "hf")
    _, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("name", ["embedding.word_embeddings", "output_layer"])
def test_rows_of_image_and_padding_hold_the_mean_of_the_others_and_the_rest_is_zero(imported, name):
    rows = read_tensor(read_run_settings(imported).checkpoint, f"model.language_model.{name}.weight")
    assert rows.shape[0] == 448
    assert torch.allclose(rows[NUM_PIECES : NUM_PIECES + 2], rows[:NUM_PIECES].mean(0), atol=1e-7)
    assert not rows[NUM_PIECES + 2 :].any()


def test_rows_that_a_llava_pads_its_vocabulary_with_are_left_out(exported, changed_copy, tmp_path):
    names = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")

    def pad(tensors):
        return {
            n: torch.nn.functional.pad(t, (0, 0, 0, 62), value=9.0) if n in names else t for n, t in tensors.items()
        }

    padded = changed_copy(exported, pad)
    config = json.loads((padded / "config.json").read_text())
    config["text_config"]["vocab_size"] += 62
    (padded / "config.json").write_text(json.dumps(config))
    for name, folder in (("first", exported), ("second", padded)):
        import_model(folder, tmp_path / name)
    first, second = (hash_weights(read_run_settings(tmp_path / name).checkpoint) for name in ("first", "second"))
    assert first == second


def test_the_projection_is_drawn_with_the_scale_of_a_new_model(imported):
    checkpoint = read_run_settings(imported).checkpoint
    first = read_tensor(checkpoint, "model.vision_projection.encoder.linear_fc1.weight")
    second = read_tensor(checkpoint, "model.vision_projection.encoder.linear_fc2.weight")
    assert first.std().item() == pytest.approx(0.02, rel=0.15)
    assert second.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.15)
    assert not read_tensor(checkpoint, "model.vision_projection.encoder.linear_fc1.bias").any()


def test_the_seed_decides_the_projection(llama_dir, clip_dir, tmp_path, imported):
    hashes = set()
    for seed in (1234, 1):
        import_parts(llama_dir, clip_dir, tmp_path / f"{seed}", ImportOptions(projection="mlp2x_gelu", seed=seed))
        hashes.add(hash_weights(read_run_settings(tmp_path / f"{seed}").checkpoint))
    assert len(hashes) == 2
    assert hash_weights(read_run_settings(imported).checkpoint) in hashes


def test_export_after_import_of_a_llava_gives_the_same_file(exported, tmp_path):
    import_model(exported, tmp_path / "run")
    export_model(read_run_settings(tmp_path / "run"), tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (exported / WEIGHTS).read_bytes()
    for name in ("config.json", "tokenizer.json", "generation_config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "again" / name).read_text()) == json.loads((exported / name).read_text())


def test_import_after_export_gives_the_same_weights(make_run, model_config, exported, tmp_path):
    import_model(exported, tmp_path / "run")
    ours, theirs = (read_run_settings(run).checkpoint for run in (make_run(model_config), tmp_path / "run"))
    assert hash_weights(ours) == hash_weights(theirs)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("vision_tower.vision_model.", "vision_tower."),  # files of transformers 5
        ("vision_tower.vision_model.", "model.vision_tower."),  # its names in memory
        ("vision_tower.", "model.vision_tower."),
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
)
def test_names_of_other_versions_of_transformers_are_read(
    old, new, exported, changed_copy, tmp_path, make_run, model_config
):
    folder = changed_copy(exported, lambda tensors: {n.replace(old, new): t for n, t in tensors.items()})
    import_model(folder, tmp_path / "run")
    ours, theirs = (read_run_settings(run).checkpoint for run in (make_run(model_config), tmp_path / "run"))
    assert hash_weights(ours) == hash_weights(theirs)


def test_a_tower_saved_by_transformers_5_is_read(llama_dir, clip_dir, changed_copy, imported, tmp_path):
    renamed = changed_copy(clip_dir, lambda tensors: {n.removeprefix("vision_model."): t for n, t in tensors.items()})
    import_parts(llama_dir, renamed, tmp_path / "run", ImportOptions(projection="mlp2x_gelu"))
    ours, theirs = (read_run_settings(run).checkpoint for run in (imported, tmp_path / "run"))
    assert hash_weights(ours) == hash_weights(theirs)


def test_a_whole_clip_model_is_read(llama_dir, clip_dir, imported, tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

    vision = CLIPVisionModel.from_pretrained(clip_dir)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 50}, vision_config=vision.config.to_dict()))
    clip.vision_model.load_state_dict(vision.vision_model.state_dict())
    clip.save_pretrained(tmp_path / "clip")
    import_parts(llama_dir, tmp_path / "clip", tmp_path / "run", ImportOptions(projection="mlp2x_gelu"))
    ours, theirs = (read_run_settings(run).checkpoint for run in (imported, tmp_path / "run"))
    assert hash_weights(ours) == hash_weights(theirs)


def test_pytorch_model_bin_and_several_files_are_read(llama_dir, clip_dir, imported, tmp_path):
    from transformers import CLIPVisionModel, LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(llama_dir)
    llama.save_pretrained(tmp_path / "llama", max_shard_size="60KB", safe_serialization=False)
    assert len(list((tmp_path / "llama").glob("pytorch_model-*.bin"))) > 1
    shutil.copy(llama_dir / "tokenizer.model", tmp_path / "llama")
    CLIPVisionModel.from_pretrained(clip_dir).save_pretrained(tmp_path / "clip", max_shard_size="20KB")
    assert len(list((tmp_path / "clip").glob("model-*.safetensors"))) > 1
    import_parts(tmp_path / "llama", tmp_path / "clip", tmp_path / "run", ImportOptions(projection="mlp2x_gelu"))
    ours, theirs = (read_run_settings(run).checkpoint for run in (imported, tmp_path / "run"))
    assert hash_weights(ours) == hash_weights(theirs)


def test_tied_embeddings_are_read(clip_dir, tokenizer_path, tmp_path):
    llama_dir = tmp_path / "llama"
    save_llama(llama_dir, tokenizer_path, tie_word_embeddings=True)
    import_parts(llama_dir, clip_dir, tmp_path / "run", ImportOptions())
    assert_logits_of_llama(tmp_path / "run", llama_dir)


def test_half_precision_weights_load_into_a_model_of_full_precision(clip_dir, tokenizer_path, tmp_path):
    from transformers import LlamaForCausalLM

    llama_dir = tmp_path / "llama"
    save_llama(llama_dir, tokenizer_path)
    LlamaForCausalLM.from_pretrained(llama_dir, dtype=torch.float16).save_pretrained(llama_dir)
    import_parts(llama_dir, clip_dir, tmp_path / "run", ImportOptions())
    LlamaForCausalLM.from_pretrained(llama_dir).float().save_pretrained(llama_dir)
    assert_logits_of_llama(tmp_path / "run", llama_dir)


@pytest.mark.distributed
def test_a_new_projection_has_the_type_of_the_weights(llama_dir, clip_dir, changed_copy, tmp_path):
    halves = [
        changed_copy(folder, lambda tensors: {name: one.bfloat16() for name, one in tensors.items()})
        for folder in (llama_dir, clip_dir)
    ]
    import_parts(*halves, tmp_path / "run", ImportOptions())
    assert {dtype for _, dtype in list_tensors(find_checkpoint(tmp_path / "run")).values()} == {torch.bfloat16}


def test_imported_weights_load_at_another_layout(imported, workers, tmp_path):
    from tests.support.configs import tiny_run

    settings = read_run_settings(imported)
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    config = tiny_run(str(tmp_path / "sharded"), parallel=layout, model=settings.model)
    workers.run("tests.convert.jobs:save_again", 4, config=config, weights=str(imported))
    sharded = read_run_settings(tmp_path / "sharded", tokenizer=str(settings.tokenizer))
    assert hash_weights(sharded.checkpoint) == hash_weights(settings.checkpoint)


def test_the_model_section_of_a_config_must_fit(llama_dir, clip_dir, imported, tmp_path):
    from megatron_vlm.config import ModelConfig

    model = load_section(ModelConfig, imported / "config.yaml", "model")
    wrong = replace(model, language=replace(model.language, ffn_hidden_size=64, rotary_base=7.0))
    message = (
        r"model.language.ffn_hidden_size=64, the folder has 48; model.language.rotary_base=7.0, the folder has 5000"
    )
    with pytest.raises(CheckpointError, match=message):
        import_parts(llama_dir, clip_dir, tmp_path / "run", ImportOptions(), wrong)


def test_a_config_may_choose_another_feature_layer(llama_dir, clip_dir, imported, tmp_path):
    from megatron_vlm.config import ModelConfig

    model = load_section(ModelConfig, imported / "config.yaml", "model")
    model = replace(model, vision=replace(model.vision, feature_layer=-1))
    import_parts(llama_dir, clip_dir, tmp_path / "run", ImportOptions(), model)
    key = "model.vision_model.decoder.layers.mlp.linear_fc1.weight"
    assert read_tensor(read_run_settings(tmp_path / "run").checkpoint, key).size(0) == 3


def test_a_tower_is_imported_for_several_scales(llama_dir, clip_dir, imported, tmp_path):
    model = read_run_settings(imported).model
    model = replace(model, vision=ScaledConfig(scales=(32, 64), tower=model.vision))
    import_parts(llama_dir, clip_dir, tmp_path / "run", ImportOptions(), model)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with open_model(read_run_settings(imported)) as plain, torch.no_grad():
        expected = plain.vision_model(pixels)
    with open_model(read_run_settings(tmp_path / "run")) as scaled, torch.no_grad():
        assert torch.equal(scaled.vision_model.tower(pixels), expected)
        assert scaled.vision_model(torch.randn(1, 3, 64, 64)).shape == (1, 16, 48)


def test_settings_of_a_tower_inside_another_are_compared(llama_dir, clip_dir, imported, tmp_path):
    model = read_run_settings(imported).model
    tower = replace(model.vision, layernorm_epsilon=1e-6)
    model = replace(model, vision=ScaledConfig(scales=(32,), tower=tower))
    with pytest.raises(CheckpointError, match=r"model.vision.layernorm_epsilon=1e-06, the folder has 1e-05"):
        import_parts(llama_dir, clip_dir, tmp_path / "run", ImportOptions(), model)


def test_missing_unexpected_and_misshapen_tensors_are_named(llama_dir, clip_dir, changed_copy, tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra.weight"] = torch.zeros(3)
        tensors["lm_head.weight"] = torch.zeros(7, 32)
        return tensors

    message = (
        r"1 missing: model.norm.weight; 1 unexpected: model.extra.weight; "
        r"1 of another shape: lm_head.weight \[7, 32\] instead of \[400, 32\]"
    )
    with pytest.raises(CheckpointError, match=message):
        import_parts(changed_copy(llama_dir, change), clip_dir, tmp_path / "run", ImportOptions())


def test_a_run_with_a_checkpoint_is_not_overwritten(llama_dir, clip_dir, imported):
    with pytest.raises(UsageError, match="already has a checkpoint"):
        import_parts(llama_dir, clip_dir, imported, ImportOptions())


def test_two_imports_into_one_run_at_once_do_not_harm_each_other(llama_dir, clip_dir, imported, tmp_path, monkeypatch):
    def second_import(*args, **kwargs):
        monkeypatch.undo()
        with pytest.raises(ConfigError, match="another job uses this run folder"):
            import_parts(llama_dir, clip_dir, tmp_path / "run", ImportOptions(projection="linear"))
        return write_weights(*args, **kwargs)

    monkeypatch.setattr("megatron_vlm.convert.from_hf.write_weights", second_import)
    import_parts(llama_dir, clip_dir, tmp_path / "run", ImportOptions(projection="mlp2x_gelu"))
    ours, theirs = (read_run_settings(run).checkpoint for run in (imported, tmp_path / "run"))
    assert hash_weights(ours) == hash_weights(theirs)


def test_a_folder_of_another_kind_is_refused(llama_dir, tmp_path):
    with pytest.raises(CheckpointError, match="model_type is llama, not clip_vision_model or clip"):
        import_parts(llama_dir, llama_dir, tmp_path / "run", ImportOptions())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_bias": True}, "the language model has attention_bias=True"),
        ({"rope_interleaved": True}, "the language model has rope_interleaved=True"),
        ({"hidden_act": "gelu"}, "the language model has hidden_act=gelu"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"scales its rotary positions \(linear\)"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, r"scales its rotary positions \(llama3\)"),
        ({"rope_theta": 0.5}, "has the rotary base 0.5"),
        ({"vocab_size": 100}, "tokenizer has 400 pieces, the embedding 100 rows"),
    ],
)
def test_a_llama_with_a_part_that_ours_has_not_is_refused(settings, message, llama_dir, clip_dir, tmp_path):
    folder = copy_with_config(llama_dir, tmp_path / "llama", settings)
    with pytest.raises(CheckpointError, match=message):
        import_parts(folder, clip_dir, tmp_path / "run", ImportOptions())


LLAMA_KEYS = ["vocab_size", "hidden_size", "num_hidden_layers", "rms_norm_eps", "rope_theta"]
CLIP_KEYS = ["hidden_size", "image_size", "layer_norm_eps", "hidden_act"]


@pytest.mark.parametrize("value", [[1], "abc", {"a": 1}])
@pytest.mark.parametrize("key", [*LLAMA_KEYS, *(f"clip:{key}" for key in CLIP_KEYS)])
def test_a_setting_of_another_type_is_an_error_of_its_file(key, value, llama_dir, clip_dir, tmp_path):
    kind, _, name = key.rpartition(":")
    folder = copy_with_config(clip_dir if kind else llama_dir, tmp_path / "odd", {name: value})
    with pytest.raises(CheckpointError, match=r"odd/config.json"):
        import_parts(*((llama_dir, folder) if kind else (folder, clip_dir)), tmp_path / "run", ImportOptions())


@pytest.mark.parametrize("name", ["architectures", "rope_scaling", "quantization_config"])
def test_a_number_for_a_list_or_a_section_is_an_error_of_the_file(name, llama_dir, clip_dir, tmp_path):
    folder = copy_with_config(llama_dir, tmp_path / "odd", {name: 5})
    with pytest.raises(CheckpointError, match=r"a setting has a value of a wrong type: 'int' object .*odd/config.json"):
        import_parts(folder, clip_dir, tmp_path / "run", ImportOptions())


def test_settings_that_are_nested_too_deeply_are_an_error_of_the_file(llama_dir, clip_dir, tmp_path):
    folder = copy_with_config(llama_dir, tmp_path / "odd", {})
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"file cannot be read: .*odd/config.json"):
        import_parts(folder, clip_dir, tmp_path / "run", ImportOptions())


def test_a_tower_with_an_unknown_activation_is_refused(llama_dir, clip_dir, tmp_path):
    folder = copy_with_config(clip_dir, tmp_path / "clip", {"hidden_act": "relu"})
    with pytest.raises(CheckpointError, match="the tower has hidden_act=relu"):
        import_parts(llama_dir, folder, tmp_path / "run", ImportOptions())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer=\[-2, -1\]"),
        ({"image_token_index": 440}, f"tokenizer has {NUM_PIECES} tokens, the image token is 440"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act=relu"),
        ({"projector_hidden_act": "linear"}, "second layer of a linear projection is not the identity"),
        (
            {"vision_config": {"model_type": "vit_mae"}},
            r"model_type is vit_mae, not .* \(vision_config of .*config.json\)",
        ),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "model_type is llama, not llava"),
    ],
)
def test_a_llava_that_ours_cannot_be_is_refused(settings, message, exported, tmp_path):
    folder = copy_with_config(exported, tmp_path / "llava", settings)
    with pytest.raises(CheckpointError, match=message):
        import_model(folder, tmp_path / "run")


def test_a_llava_that_cuts_off_a_patch_is_refused(make_run, model_config, tmp_path):
    run = make_run(replace(model_config, vision=tiny_model_with_tower("siglip").vision))
    export_model(read_run_settings(run), tmp_path / "hf")
    folder = copy_with_config(tmp_path / "hf", tmp_path / "llava", {"vision_feature_select_strategy": "default"})
    with pytest.raises(CheckpointError, match="vision_feature_select_strategy=default cuts off a patch"):
        import_model(folder, tmp_path / "run")


def test_a_missing_tokenizer_is_said(llama_dir, clip_dir, tmp_path, caplog):
    shutil.copytree(llama_dir, tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.model").unlink()
    with caplog.at_level(logging.WARNING):
        import_parts(tmp_path / "llama", clip_dir, tmp_path / "run", ImportOptions())
    assert "no tokenizer in" in caplog.text


def test_colours_come_from_the_folder(llama_dir, clip_dir, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(clip_dir, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    model = import_parts(llama_dir, folder, tmp_path / "run", ImportOptions())
    assert model.vision.image_mean == (0.5, 0.5, 0.5)
    assert model.vision.image_std == (0.25, 0.25, 0.25)


MEASURE = """
import re, sys
from pathlib import Path
from megatron_vlm.platform.device import prepare_process
prepare_process()
from megatron_vlm.convert.from_hf import ImportOptions, import_parts

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before = memory("VmRSS")
import_parts(*map(Path, sys.argv[1:]), ImportOptions())
print(memory("VmHWM") - before)
"""


def write_large_llama(folder, *, as_pickle: bool) -> int:
    """Write a Llama of many small layers in two files; return the size of its weights [bytes]."""
    hidden, ffn, layers = 512, 2048, 36
    config = {"model_type": "llama", "vocab_size": NUM_PIECES, "hidden_size": hidden, "intermediate_size": ffn}
    config |= {"num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8}
    shapes = {"model.embed_tokens": (NUM_PIECES, hidden), "lm_head": (NUM_PIECES, hidden), "model.norm": (hidden,)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"}
        shapes |= {f"{name}mlp.gate_proj": (ffn, hidden), f"{name}mlp.up_proj": (ffn, hidden)}
        shapes |= {f"{name}mlp.down_proj": (hidden, ffn), f"{name}input_layernorm": (hidden,)}
        shapes |= {f"{name}post_attention_layernorm": (hidden,)}
    tensors = {f"{name}.weight": torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    stem, save = ("pytorch_model-{}.bin", torch.save) if as_pickle else ("model-{}.safetensors", save_file)
    names = list(tensors)
    halves = {stem.format(1): names[: len(names) // 2], stem.format(2): names[len(names) // 2 :]}
    for file, half in halves.items():
        save({name: tensors[name] for name in half}, folder / file)
    index = "pytorch_model.bin.index.json" if as_pickle else "model.safetensors.index.json"
    weight_map = {name: file for file, half in halves.items() for name in half}
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("as_pickle", [False, True])
def test_memory_does_not_grow_with_the_model(clip_dir, tmp_path, as_pickle):
    size = write_large_llama(tmp_path / "llama", as_pickle=as_pickle)
    command = [sys.executable, "-c", MEASURE, tmp_path / "llama", clip_dir, tmp_path / "run"]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert size > 300e6
    assert grown < 0.25 * size, f"{grown / 1e6:.0f} MB for weights of {size / 1e6:.0f} MB"


def test_a_folder_may_mix_types(llama_dir, clip_dir, changed_copy, imported, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    mixed = changed_copy(llama_dir, lambda tensors: {**tensors, name: tensors[name].double()})
    import_parts(mixed, clip_dir, tmp_path / "run", ImportOptions(projection="mlp2x_gelu"))
    key = "model.language_model.decoder.layers.mlp.linear_fc2.weight"
    ours, theirs = (read_tensor(read_run_settings(run).checkpoint, key) for run in (imported, tmp_path / "run"))
    assert theirs.dtype == torch.float64
    assert torch.equal(ours.double(), theirs)
