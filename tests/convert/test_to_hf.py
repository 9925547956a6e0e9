import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.checkpoint.tensors import hash_weights, list_tensors
from megatron_vlm.config import CheckpointError, ConfigError, LanguageConfig, StorageError, UsageError
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.convert.files.processor import write_processor
from megatron_vlm.convert.from_hf import import_model
from megatron_vlm.convert.to_hf import ExportOptions, export_model
from megatron_vlm.data.loading.pixels import decode_image
from megatron_vlm.data.text.tokenizer import load_tokenizer
from tests.support.configs import tiny_model, tiny_model_with_tower, tiny_run
from tests.support.llava_logits import load_llava, our_logits, random_batch
from tests.support.parts import tiny_projector
from tests.support.sentence_piece import NUM_PIECES

# Same weights, same operations in fp32: what is left is the order of additions inside kernels.
LOGIT_TOLERANCE = 2e-5
NAME = "model.safetensors"


def assert_same_logits(run, folder) -> None:
    ids, pixels, ours = our_logits(run)
    with torch.no_grad():
        theirs = load_llava(folder)(input_ids=ids, pixel_values=pixels).logits[..., : ours.size(-1)]
    assert ours.std() > 0.3, "logits this small would agree by themselves"
    assert (ours - theirs).abs().max() <= LOGIT_TOLERANCE


@pytest.mark.parametrize("projection", ["linear", "mlp2x_gelu"])
def test_transformers_computes_the_same_logits(projection, make_run, model_config, tmp_path):
    run = make_run(replace(model_config, projection=make_projector(projection)))
    export_model(read_run_settings(run), tmp_path / "hf")
    assert_same_logits(run, tmp_path / "hf")


def test_a_narrow_linear_projection_is_exported_as_servers_take_it_and_read_back(
    make_run, model_config, with_vision, tmp_path
):
    narrow = with_vision(replace(model_config, projection=make_projector("linear")), hidden_size=30)
    run = make_run(narrow)
    export_model(read_run_settings(run), tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["projector_hidden_act"] == "relu"
    assert_same_logits(run, tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "again")
    ours, again = (read_run_settings(folder) for folder in (run, tmp_path / "again"))
    assert again.model.projection == narrow.projection
    assert hash_weights(again.checkpoint) == hash_weights(ours.checkpoint)


@pytest.mark.parametrize(
    ("type", "fix"),
    [
        ("downsample", "no format holds"),
        ("mlp_downsample", "export to the format vila$"),
        ("transformer_block", "no format holds"),
    ],
)
def test_a_projection_that_the_format_cannot_hold_is_refused(type, fix, make_run, model_config, tmp_path):
    model = replace(model_config, projection=tiny_projector(type))
    settings = replace(read_run_settings(make_run(model_config)), model=model)
    with pytest.raises(
        CheckpointError, match=f"of type {type} does not fit the format llava.*linear or mlp2x_gelu.*{fix}"
    ):
        export_model(settings, tmp_path / "hf")


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_transformers_computes_the_same_logits_with_other_activations(
    activation, make_run, model_config, with_vision, tmp_path
):
    run = make_run(with_vision(model_config, activation=activation, feature_layer=-1))
    export_model(read_run_settings(run), tmp_path / "hf")
    assert_same_logits(run, tmp_path / "hf")


def test_transformers_computes_the_same_logits_with_the_class_token(make_run, model_config, with_vision, tmp_path):
    run = make_run(with_vision(model_config, drop_class_token=False))
    export_model(read_run_settings(run), tmp_path / "hf")
    assert_same_logits(run, tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "again")
    assert hash_weights(read_run_settings(tmp_path / "again").checkpoint) == hash_weights(
        read_run_settings(run).checkpoint
    )
    assert not read_run_settings(tmp_path / "again").model.vision.drop_class_token
    assert generate_from_processor(tmp_path / "hf")


@pytest.mark.parametrize(
    ("type", "settings"),
    [
        ("siglip", {"image_size": 36}),  # 4 pixels belong to no patch
        ("dinov2", {"post_norm": False, "position_grid": 7}),
        ("dinov2", {"post_norm": False, "drop_class_token": False, "feature_layer": -2}),
    ],
)
def test_transformers_computes_the_same_logits_with_another_tower(type, settings, make_run, model_config, tmp_path):
    run = make_run(replace(model_config, vision=tiny_model_with_tower(type, **settings).vision))
    export_model(read_run_settings(run), tmp_path / "hf")
    assert_same_logits(run, tmp_path / "hf")
    assert generate_from_processor(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "again")
    ours, again = (read_run_settings(folder) for folder in (run, tmp_path / "again"))
    assert hash_weights(again.checkpoint) == hash_weights(ours.checkpoint)
    assert again.model.constant_image_tokens == ours.model.constant_image_tokens


@pytest.mark.parametrize(
    ("type", "settings", "reason"),
    [
        ("dinov2", {}, r"Llava takes features before the last norm \(model.vision.post_norm\)"),
        ("dinov2", {"post_norm": False, "num_registers": 4}, "Llava gives the registers to the projection"),
        ("internvit", {}, "Llava cannot call InternVLVisionModel"),
    ],
)
def test_a_tower_that_the_format_cannot_hold_is_refused(type, settings, reason, make_run, model_config, tmp_path):
    vision = tiny_model_with_tower(type, **settings).vision
    run = replace(read_run_settings(make_run(model_config)), model=replace(model_config, vision=vision))
    with pytest.raises(CheckpointError, match=f"a tower of type {type} does not fit the format llava: .*{reason}"):
        export_model(run, tmp_path / "hf")


def test_transformers_computes_the_same_logits_with_tied_embeddings(make_run, tmp_path):
    run = make_run(tiny_model(vocab_size=NUM_PIECES, share_embeddings_and_output_weights=True, rotary_base=5e5))
    export_model(read_run_settings(run), tmp_path / "hf")
    assert_same_logits(run, tmp_path / "hf")


@pytest.mark.distributed
def test_a_checkpoint_of_two_by_two_ranks_exports_like_one_of_one(
    make_run, model_config, exported, tmp_path, workers, tokenizer_path
):
    run = make_run(model_config)
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    sharded = tiny_run(str(tmp_path / "sharded"), parallel=layout, model=model_config)
    workers.run("tests.convert.jobs:save_again", 4, config=sharded, weights=str(run))
    settings = read_run_settings(tmp_path / "sharded", tokenizer=str(tokenizer_path))
    export_model(settings, tmp_path / "hf")
    assert (tmp_path / "hf" / NAME).read_bytes() == (exported / NAME).read_bytes()
    for format in ("vila", "vila-flat"):
        of_one, of_four = tmp_path / f"{format}-1", tmp_path / f"{format}-4"
        export_model(read_run_settings(run), of_one, ExportOptions(format=format))
        export_model(settings, of_four, ExportOptions(format=format))
        assert_same_files(of_one, of_four)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("format", ["llava", "vila", "vila-flat"])
def test_a_checkpoint_of_three_stages_exports_the_same_files(format, make_run, tmp_path, workers, tokenizer_path):
    model = tiny_model(vocab_size=NUM_PIECES, num_layers=6)
    run, options = make_run(model), ExportOptions(format=format)
    sharded = tiny_run(str(tmp_path / "sharded"), parallel={"pipeline_model_parallel_size": 3}, model=model)
    workers.run("tests.convert.jobs:save_again", 3, config=sharded, weights=str(run))
    export_model(read_run_settings(run), tmp_path / "of_one", options)
    settings = read_run_settings(tmp_path / "sharded", tokenizer=str(tokenizer_path))
    export_model(settings, tmp_path / "of_three", options)
    assert_same_files(tmp_path / "of_one", tmp_path / "of_three")


def assert_same_files(first, second) -> None:
    content = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (first, second)
    ]
    for files in content:
        del files["README.md"]  # tells of the run, which is another one
    assert content[0] == content[1]
    assert any(name.endswith(".safetensors") for name in content[0])


def test_a_large_model_is_written_in_several_files(make_run, model_config, tmp_path):
    run = make_run(model_config)
    export_model(read_run_settings(run), tmp_path / "hf", ExportOptions(max_shard_bytes=200_000))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert_same_logits(run, tmp_path / "hf")


def test_dtype_bfloat16_halves_the_weights(make_run, model_config, exported, tmp_path):
    run = make_run(model_config)
    export_model(read_run_settings(run), tmp_path / "hf", ExportOptions(dtype="bfloat16"))
    assert (tmp_path / "hf" / NAME).stat().st_size < 0.55 * (exported / NAME).stat().st_size
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_transformers_never_generates_ids_beyond_the_tokenizer(model_config, exported):
    ids, pixels = random_batch(model_config)
    pixels = pixels / 255
    model = load_llava(exported)
    with torch.no_grad():
        model.lm_head.weight[NUM_PIECES:] += 5.0  # without suppression these would win
        made = model.generate(
            input_ids=ids.repeat(4, 1),
            pixel_values=pixels.repeat(4, 1, 1, 1),
            attention_mask=torch.ones_like(ids).repeat(4, 1),
            max_new_tokens=12,
            do_sample=True,
            temperature=5.0,
        )
    new = made[:, ids.size(1) :]
    assert (new[new != model.generation_config.pad_token_id] < NUM_PIECES).all()


def generate_from_processor(folder) -> int:
    """Return the number of tokens that transformers generates from what the processor of a folder returns."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    image = PILImage.open(io.BytesIO(picture(40, 30)))
    inputs = processor(images=image, text="USER: <image>\na cat ASSISTANT:", return_tensors="pt")
    made = load_llava(folder).generate(**inputs, max_new_tokens=2, do_sample=False)
    return made.size(1) - inputs["input_ids"].size(1)


def test_transformers_generates_from_what_the_processor_returns(exported):
    assert generate_from_processor(exported)


def picture(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    PILImage.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("aspect", ["pad", "square", "resize"])
def test_processor_makes_the_pixels_of_training(aspect, make_run, model_config, tmp_path):
    from transformers import AutoProcessor

    run = make_run(model_config)
    export_model(read_run_settings(run, image_aspect=aspect), tmp_path / "hf")
    encoded, vision = picture(57, 41), model_config.vision
    ours = decode_image(encoded, image_size=vision.image_size, aspect=aspect, mean=vision.image_mean)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    theirs = processor.image_processor(PILImage.open(io.BytesIO(encoded)), return_tensors="np")["pixel_values"][0]
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (vision.image_mean, vision.image_std))
    difference = np.abs((theirs * std + mean) * 255 - ours)
    # Two implementations of the same bicubic filter on uint8: rounding, see data/loading/pixels.py.
    assert difference.max() < 2.01
    assert difference.mean() < 0.05


@pytest.mark.parametrize(
    "text",
    [
        "Two dogs; 3 cats - \u00e9t\u00e9 \u4f60\u597d \U0001f600!",
        "a  b   c",
        "line\nbreak\n\nand\ttab",
        "",
        "x",
        "0123456789",
    ],
)
def test_tokenizer_json_cuts_text_as_sentencepiece_does(text, exported, tokenizer_path):
    from transformers import AutoTokenizer

    theirs, tokenizer = AutoTokenizer.from_pretrained(exported), load_tokenizer(tokenizer_path)
    ours = tokenizer.encode(text)
    assert theirs("<s>" + text)["input_ids"] == [tokenizer.bos_id, *ours]
    assert theirs.decode(ours) == text


def test_an_unknown_format_lists_what_there_is(make_run, model_config, tmp_path):
    settings = read_run_settings(make_run(model_config))
    with pytest.raises(UsageError, match="unknown export format 'llama'; fix: choose one of llava"):
        export_model(settings, tmp_path / "hf", ExportOptions(format="llama"))


def test_an_existing_folder_is_refused(make_run, model_config, tmp_path):
    (tmp_path / "hf").mkdir()
    with pytest.raises(UsageError, match="hf exists; fix: name another one, or add --overwrite"):
        export_model(read_run_settings(make_run(model_config)), tmp_path / "hf")


def test_overwrite_replaces_an_existing_folder(make_run, model_config, tmp_path):
    (tmp_path / "hf").mkdir()
    for name in ("config.json", "old"):
        (tmp_path / "hf" / name).write_text("{}")
    export_model(read_run_settings(make_run(model_config)), tmp_path / "hf", ExportOptions(overwrite=True))
    assert not (tmp_path / "hf" / "old").exists()
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_a_damaged_checkpoint_is_refused(make_run, model_config, tmp_path):
    shutil.copytree(make_run(model_config), tmp_path / "run")
    settings = read_run_settings(tmp_path / "run")
    file = next(settings.checkpoint.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: .*distcp has the wrong checksum"):
        export_model(settings, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_checkpoint_of_another_model_is_refused_by_the_names_of_its_tensors(make_run, model_config, tmp_path):
    settings = read_run_settings(make_run(model_config))
    language = replace(model_config.language, num_layers=2, share_embeddings_and_output_weights=True)
    wrong = replace(settings, model=replace(model_config, language=language))
    with pytest.raises(
        CheckpointError, match=r"1 unexpected: model\.language_model\.output_layer\.weight; 6 of another"
    ):
        export_model(wrong, tmp_path / "hf")


def test_a_vocabulary_padded_by_another_version_exports_the_same_files(
    make_run, model_config, exported, tmp_path, monkeypatch
):
    run = make_run(model_config)
    monkeypatch.setattr(LanguageConfig, "padded_vocab_size", property(lambda self: 960))
    export_model(read_run_settings(run), tmp_path / "hf")
    assert_same_files(exported, tmp_path / "hf")


def test_a_tokenizer_of_another_size_is_refused(make_run, tmp_path):
    run = make_run(tiny_model(vocab_size=NUM_PIECES + 7))
    with pytest.raises(CheckpointError, match=f"tokenizer has {NUM_PIECES} pieces, the model {NUM_PIECES + 7}"):
        export_model(read_run_settings(run), tmp_path / "hf")


def test_a_full_disk_is_one_line_and_leaves_no_folder(make_run, model_config, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_vlm.convert.families.llava.write_json", fail)
    with pytest.raises(StorageError, match="export not written: No space left on device"):
        export_model(read_run_settings(make_run(model_config)), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_two_exports_to_one_folder_at_once_do_not_harm_each_other(
    make_run, model_config, exported, tmp_path, monkeypatch
):
    settings = read_run_settings(make_run(model_config))

    def second_export(*args, **kwargs):
        monkeypatch.undo()
        with pytest.raises(ConfigError, match="another process writes this folder"):
            export_model(settings, tmp_path / "hf", ExportOptions(overwrite=True))
        return write_processor(*args, **kwargs)

    monkeypatch.setattr("megatron_vlm.convert.families.llava.write_processor", second_export)
    export_model(settings, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (tmp_path / "hf" / NAME).read_bytes() == (exported / NAME).read_bytes()


def test_one_layer_is_read_alone(make_run, model_config):
    from megatron_vlm.checkpoint.tensors import read_tensor

    checkpoint = read_run_settings(make_run(model_config)).checkpoint
    key = "model.language_model.decoder.layers.mlp.linear_fc1.weight"
    assert list_tensors(checkpoint)[key][0][0] == 4
    whole = read_tensor(checkpoint, key)
    assert torch.equal(read_tensor(checkpoint, key, 2), whole[2])
