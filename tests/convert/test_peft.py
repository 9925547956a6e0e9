"""LoRA to PEFT folders and back, with the logits of each; PEFT itself takes part where it is installed."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.checkpoint.tensors import hash_weights
from megatron_vlm.config import CheckpointError, UsageError
from megatron_vlm.config.adapters.lora import Config
from megatron_vlm.config.adapters.visual_expert import Config as VisualExpert
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.convert.export import export
from megatron_vlm.convert.files.model_card import CARD_NAME
from megatron_vlm.convert.from_peft import import_adapter
from megatron_vlm.convert.to_hf import ExportOptions
from tests.support.llava_logits import load_llava, our_logits
from tests.support.random_run import write_random_adapter

# Same weights in fp32: what is left is the order of additions inside kernels.
TOLERANCE = 2e-5
PEFT = ExportOptions(format="peft")
ADAPTER = Config(rank=4, alpha=6.0, dropout=0.1)
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def adapt(make_run, model_config, tokenizer_path, tmp_path):
    """Return a run with random weights of an adapter: adapt(adapter, learned=part)."""

    def make(adapter=ADAPTER, **options):
        model = replace(model_config, adapter=adapter)
        write_random_adapter(tmp_path / "adapted", make_run(model_config), model, tokenizer_path, **options)
        return tmp_path / "adapted"

    return make


@pytest.fixture
def base(make_run, model_config):
    return make_run(model_config)


@pytest.fixture
def folder(adapt, tmp_path):
    """A PEFT folder."""
    export(read_run_settings(adapt()), tmp_path / "peft", PEFT)
    return tmp_path / "peft"


def change(folder, settings=(), tensors=lambda tensors: tensors):
    """Write a folder again with other settings and tensors."""
    path = folder / SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), **dict(settings)}))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors(load_file(folder / WEIGHTS)).items()}, folder / WEIGHTS
    )


def assert_same_logits(run, other):
    *_, expected = our_logits(run)
    *_, found = our_logits(other)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def peft_logits(model, run):
    ids, pixels, ours = our_logits(run)
    with torch.no_grad():
        theirs = model.eval()(input_ids=ids, pixel_values=pixels).logits
    return theirs[..., : ours.size(-1)], ours  # theirs also has those of image and padding


def test_the_card_of_an_adapter_counts_what_is_in_the_folder(folder):
    card = (folder / CARD_NAME).read_text()
    num_values = sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values())
    assert f"; {num_values:,} are in this folder |" in card
    assert "library_name: peft" in card
    assert "| adapter | lora |" in card
    assert "--verify" not in card


@pytest.mark.parametrize("learned", ["vision_projection", ""])
def test_a_lora_of_the_code_of_llava_is_read(adapt, base, tmp_path, learned):
    export(read_run_settings(adapt(learned=learned)), tmp_path / "peft", PEFT)
    import_adapter(tmp_path / "peft", base, tmp_path / "expected")
    tensors, pairs, rest = load_file(tmp_path / "peft" / WEIGHTS), {}, {}
    for name, tensor in tensors.items():
        theirs = name.replace("model.language_model.", "model.").replace("multi_modal_projector", "mm_projector")
        theirs = theirs.replace("linear_1", "0").replace("linear_2", "2")
        (pairs if ".lora_" in name else rest)[theirs] = tensor
    (tmp_path / "peft" / WEIGHTS).unlink()
    torch.save(pairs, tmp_path / "peft" / "adapter_model.bin")
    torch.save(rest, tmp_path / "peft" / "non_lora_trainables.bin")
    import_adapter(tmp_path / "peft", base, tmp_path / "run")
    runs = [read_run_settings(tmp_path / name).checkpoint for name in ("expected", "run")]
    assert hash_weights(runs[0]) == hash_weights(runs[1])


def test_safetensors_count_where_pickled_weights_are_there_too(folder, base, tmp_path):
    import_adapter(folder, base, tmp_path / "expected")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    torch.save(zeros, folder / "adapter_model.bin")
    import_adapter(folder, base, tmp_path / "run")
    runs = [read_run_settings(tmp_path / name).checkpoint for name in ("expected", "run")]
    assert hash_weights(runs[0]) == hash_weights(runs[1])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"projection": make_projector("mlp_downsample")}, "type mlp_downsample .* fix: export to the format vila$"),
        (
            {"adapter": VisualExpert()},
            "adapter visual_expert, PEFT holds LoRA .* fix: no format .* keep its checkpoint",
        ),
    ],
)
def test_a_model_that_peft_cannot_adapt_is_refused(adapt, tmp_path, part, message):
    settings = read_run_settings(adapt())
    with pytest.raises(CheckpointError, match=message):
        export(replace(settings, model=replace(settings.model, **part)), tmp_path / "peft", PEFT)


@pytest.mark.parametrize("learned", ["vision_projection", ""])
@pytest.mark.parametrize("ranks", [{}, {"linear_qkv": 12}])
def test_peft_computes_the_logits_of_an_exported_adapter(adapt, exported, tmp_path, learned, ranks):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    run = adapt(replace(ADAPTER, ranks=ranks), learned=learned)
    assert export(read_run_settings(run), tmp_path / "peft", PEFT) == "PeftModel.from_pretrained"
    theirs, ours = peft_logits(peft.PeftModel.from_pretrained(load_llava(exported), tmp_path / "peft"), run)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True, "rank_pattern": {"k_proj": 5}, "alpha_pattern": {"up_proj": 9}}]
)
def test_an_imported_adapter_has_the_logits_of_peft(base, exported, tmp_path, settings):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|gate_proj|up_proj|down_proj)",
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
        **settings,
    )
    model = peft.get_peft_model(load_llava(exported), lora)
    torch.nn.init.normal_(model.base_model.model.model.multi_modal_projector.modules_to_save.default.linear_1.bias)
    model.save_pretrained(tmp_path / "peft")
    import_adapter(tmp_path / "peft", base, tmp_path / "run")
    theirs, ours = peft_logits(model, tmp_path / "run")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_export_and_import_keep_the_logits(adapt, folder, base, tmp_path):
    model = import_adapter(folder, base, tmp_path / "back")
    assert model.adapter == replace(ADAPTER, ranks={"linear_qkv": 12, "linear_fc1": 8})
    assert_same_logits(tmp_path / "adapted", tmp_path / "back")
    export(read_run_settings(tmp_path / "back"), tmp_path / "again", PEFT)
    import_adapter(tmp_path / "again", base, tmp_path / "twice")
    assert_same_logits(tmp_path / "adapted", tmp_path / "twice")


def test_some_of_the_fused_matrices_may_be_adapted(folder, base, tmp_path):
    def without_k(tensors):
        return {name: tensor for name, tensor in tensors.items() if "k_proj" not in name and "down" not in name}

    change(folder, tensors=without_k)
    model = import_adapter(folder, base, tmp_path / "back")
    assert model.adapter.targets == ("linear_qkv", "linear_proj", "linear_fc1")
    assert model.adapter.ranks == {"linear_qkv": 8, "linear_fc1": 8}


def test_the_folder_names_only_the_decoder_and_the_projection(folder):
    settings = json.loads((folder / SETTINGS).read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 6, 0.1)
    assert settings["modules_to_save"] == ["multi_modal_projector"]
    names = set(load_file(folder / WEIGHTS))
    start = "base_model.model.model."
    assert f"{start}language_model.layers.3.self_attn.q_proj.lora_A.weight" in names
    assert {name.removeprefix(start).split(".")[0] for name in names} == {"language_model", "multi_modal_projector"}


def test_weights_are_written_in_the_type_that_is_asked_for(adapt, tmp_path):
    export(read_run_settings(adapt()), tmp_path / "peft", replace(PEFT, dtype="bfloat16"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "peft" / WEIGHTS).values()} == {torch.bfloat16}


def test_what_a_peft_folder_cannot_hold_is_not_exported(adapt, base, folder, tmp_path):
    with pytest.raises(UsageError, match="exists"):
        export(read_run_settings(tmp_path / "adapted"), folder, PEFT)
    with pytest.raises(CheckpointError, match="the model has no LoRA"):
        export(read_run_settings(base), tmp_path / "x", PEFT)
    with pytest.raises(CheckpointError, match=r"model.vision_model.* learned beside LoRA and projection"):
        export(read_run_settings(adapt(learned="vision_model")), tmp_path / "x", PEFT)
    assert not (tmp_path / "x").exists()


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def dropped(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, dict, "peft_type is IA3, not LORA"),
        ({}, renamed("language_model.layers.0.self_attn", "vision_tower.layers.0.self_attn"), "is neither LoRA of the"),
        ({}, renamed("multi_modal_projector.linear_1.bias", "lm_head.weight"), "tensor base_model.model.model.lm_head"),
        ({}, dropped("layers.2.self_attn.v_proj"), "adapt q_proj, k_proj, v_proj with different ranks, or not all"),
        ({}, dropped("layers.2.self_attn.v_proj.lora_B"), r"layers.2.self_attn.v_proj.weight has no lora_B"),
        ({}, dropped("lora"), "no matrix of the decoder is adapted"),
        (
            {},
            lambda tensors: {name: tensor[:, 1:] if "lora_A" in name else tensor for name, tensor in tensors.items()},
            r"A \[4, 63\] and B \[64, 4\] do not fit a matrix of 64 x 64",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(folder, base, tmp_path, settings, tensors, message):
    change(folder, settings, tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        import_adapter(folder, base, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_linear_projection_comes_back_and_must_be_whole(make_run, model_config, tokenizer_path, tmp_path):
    from megatron_vlm.config.projectors import make_projector

    model = replace(model_config, projection=make_projector("linear"))
    run = make_run(model)
    write_random_adapter(tmp_path / "adapted", run, replace(model, adapter=ADAPTER), tokenizer_path)
    export(read_run_settings(tmp_path / "adapted"), tmp_path / "peft", PEFT)
    import_adapter(tmp_path / "peft", run, tmp_path / "back")
    assert_same_logits(tmp_path / "adapted", tmp_path / "back")
    change(tmp_path / "peft", tensors=dropped("linear_2.weight"))
    with pytest.raises(CheckpointError, match="the projection is incomplete"):
        import_adapter(tmp_path / "peft", run, tmp_path / "again")


def test_a_base_with_an_adapter_is_refused(adapt, folder, tmp_path):
    with pytest.raises(CheckpointError, match="the base has an adapter of type lora already"):
        import_adapter(folder, tmp_path / "adapted", tmp_path / "run")


def test_a_run_that_has_a_checkpoint_is_not_written_over(folder, base, tmp_path):
    import_adapter(folder, base, tmp_path / "run")
    with pytest.raises(UsageError, match="already has a checkpoint"):
        import_adapter(folder, base, tmp_path / "run")
    assert find_checkpoint(tmp_path / "run").is_dir()
