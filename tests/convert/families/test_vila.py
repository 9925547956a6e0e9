"""VILA's three folders: in and out to the bit, whichever tower and projection; what has no place in them is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.checkpoint.tensors import hash_weights
from megatron_vlm.config import CheckpointError, ModelConfig, UsageError
from megatron_vlm.convert.family import check_fits, find_tower_family
from megatron_vlm.convert.from_hf import import_model
from megatron_vlm.convert.to_hf import ExportOptions, export_model
from megatron_vlm.convert.verify import verify_models
from tests.support.configs import tiny_model, tiny_model_with_tower
from tests.support.parts import tiny_projector
from tests.support.sentence_piece import NUM_PIECES
from tests.support.vila import language_model, projection, save_three_folders, tower

VILA = ExportOptions(format="vila")
slow = pytest.mark.slow


def model_of(type: str, projector: str, *, tied: bool = False, order: str | None = None, **settings) -> ModelConfig:
    return replace(
        tiny_model(vocab_size=NUM_PIECES, share_embeddings_and_output_weights=tied),
        vision=tiny_model_with_tower(type, **settings).vision,
        projection=tiny_projector(projector, **({} if order is None else {"token_order": order})),
    )


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(model_of("siglip", "mlp_downsample", image_size=38, order="column"), id="vila1.5", marks=slow),
        pytest.param(model_of("s2", "mlp_downsample", order="column"), id="vila1.5-s2"),
        pytest.param(model_of("internvit", "mlp_downsample", order="column"), id="vila1.5-40b", marks=slow),
        # The architecture of examples/smolvlm
        pytest.param(model_of("dinov2", "mlp_downsample", tied=True, position_grid=7), id="smolvlm"),
        pytest.param(
            model_of("dinov2", "linear", post_norm=False, num_registers=3, activation="swiglu"), id="dinov2", marks=slow
        ),
        pytest.param(model_of("radio", "mlp2x_gelu", position_grid=6), id="radio"),
        pytest.param(model_of("clip", "mlp2x_gelu", drop_class_token=False), id="clip", marks=slow),
    ],
)
def test_a_checkpoint_comes_back_to_the_bit(model, make_run, tmp_path):
    run = read_run_settings(make_run(model))
    export_model(run, tmp_path / "hf", VILA)
    import_model(tmp_path / "hf", tmp_path / "again")
    again = read_run_settings(tmp_path / "again")
    assert hash_weights(again.checkpoint) == hash_weights(run.checkpoint)
    assert again.model.projection == model.projection
    assert again.model.vision.constant_grid == model.vision.constant_grid
    assert again.model.vision.image_size == model.vision.image_size
    assert again.model.language.vocab_size == NUM_PIECES
    # What the layers compute, too: only layers that do not run may be missing.
    free = find_tower_family(getattr(model.vision, "tower", model.vision).type).FREE - {"image_size", "post_norm"}
    inner = [getattr(one.vision, "tower", one.vision) for one in (model, again.model)]
    differing = {name for name in inner[0].__dataclass_fields__ if getattr(inner[0], name) != getattr(inner[1], name)}
    assert differing <= {*free, "num_layers", "summary_tokens"}


@pytest.fixture(scope="module")
def published(tmp_path_factory, tokenizer_path):
    """A folder as VILA-1.5 saves it, and its modules."""
    folder = tmp_path_factory.mktemp("published") / "vila"
    torch.manual_seed(4)
    language, vision, layers = language_model(NUM_PIECES), tower("Siglip"), projection("mlp_downsample").eval()
    save_three_folders(folder, language, vision, layers, "mlp_downsample")
    shutil.copy(tokenizer_path, folder / "llm" / "tokenizer.model")
    return folder, language, vision, layers


def test_a_published_folder_computes_what_its_parts_do_and_goes_out_again(published, tmp_path):
    folder, language, vision, layers = published
    model = import_model(folder, tmp_path / "run")
    assert model.projection.token_order == "column"
    generator = torch.Generator().manual_seed(6)
    pixels = torch.randn(20, 3, 38, 38, generator=generator)
    texts = torch.randint(3, NUM_PIECES, (20, 50), generator=generator)
    settings = read_run_settings(tmp_path / "run")
    with torch.no_grad(), open_model(settings) as ours:
        features = layers(vision(pixels, output_hidden_states=True).hidden_states[-2])
        embedded = language.get_input_embeddings()(texts)
        inputs = torch.cat([features, embedded], 1)
        theirs = language(inputs_embeds=inputs).logits.double().log_softmax(-1)
        placeholders = torch.full((1, features.size(1)), model.language.image_token_id)
        for image, text, wanted in zip(pixels, texts, theirs, strict=True):
            ids = torch.cat([placeholders, text[None]], 1)
            logits = ours(ids, image[None], torch.arange(features.size(1)), num_images=1)
            found = logits[0, :, :NUM_PIECES].double().log_softmax(-1)
            # 1,180 positions in float32: the same products, summed in another order
            assert (wanted.exp() * (wanted - found)).sum(-1).mean() <= 1e-7
            assert torch.equal(wanted.argmax(-1), found.argmax(-1))
    export_model(settings, tmp_path / "hf", VILA)
    for part in ("llm", "vision_tower", "mm_projector"):
        before, after = (load_file(path / part / "model.safetensors") for path in (folder, tmp_path / "hf"))
        before = {name.removeprefix("vision_model."): one for name, one in before.items()}
        after = {name.removeprefix("vision_model."): one for name, one in after.items()}
        for name, tensor in after.items():
            if not name.startswith("post_layernorm."):  # the features do not pass it: the identity
                assert torch.equal(tensor[: len(before[name])], before[name]), name
        unused = set(before) - set(after)
        assert all(name.startswith(("encoder.layers.2.", "head.")) for name in unused)


def test_each_folder_of_an_export_loads_alone_and_config_says_what_servers_read(make_run, tmp_path):
    import transformers

    export_model(read_run_settings(make_run(model_of("s2", "mlp_downsample"))), tmp_path / "hf", VILA)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["s2"], config["s2_scales"], config["s2_max_split_size"]) == (True, "32,64", 32)
    assert config["mm_hidden_size"] == 72
    assert config["model_dtype"] == "torch.float32"
    assert config["mm_projector_cfg"]["mm_projector_type"] == "mlp_downsample_2x2_fix"  # row by row
    for part in ("llm", "vision_tower", "mm_projector"):
        settings = config[f"{part}_cfg"]
        assert settings["_name_or_path"].split("/")[-1] == part
        assert settings == json.loads((tmp_path / "hf" / part / "config.json").read_text())
    for name, part in (("AutoModelForCausalLM", "llm"), ("AutoModel", "vision_tower")):
        _, info = getattr(transformers, name).from_pretrained(tmp_path / "hf" / part, output_loading_info=True)
        assert not any(info.values()), info
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf" / "vision_tower")
    assert dict(processor.size) == {"height": 64, "width": 64}
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf" / "llm").bos_token_id == 1


def test_two_formats_of_one_checkpoint_are_the_same_model(make_run, model_config, exported, tmp_path):
    export_model(read_run_settings(make_run(model_config)), tmp_path / "hf", VILA)
    found = verify_models(exported, tmp_path / "hf")
    found.check(exported, tmp_path / "hf")
    assert found.weights.num_equal == found.weights.num_tensors > 40
    assert found.skipped == "transformers has no class LlavaLlamaModel"


@pytest.mark.parametrize(
    ("format", "model", "message"),
    [
        ("llava", model_of("dinov2", "mlp_downsample"), "type dinov2 does not fit .* fix: export to the format vila$"),
        ("llava", model_of("s2", "linear"), "type s2 .* sees an image at one size .* to the format vila or vila-flat$"),
        ("llava", model_of("clip", "mlp_downsample"), "type mlp_downsample .* fix: export to the format vila$"),
        ("vila", model_of("clip", "downsample"), "downsample does not fit VILA's formats, .* no format holds"),
        ("vila", model_of("clip", "transformer_block"), "transformer_block does not fit VILA's formats, .* no format"),
        ("vila-flat", model_of("siglip", "linear"), "type siglip .* those of CLIP .* to the format llava or vila$"),
        ("vila-flat", model_of("clip", "mlp_downsample"), "type mlp_downsample .* to the format vila$"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_and_those_that_can_are_named(format, model, message):
    with pytest.raises(CheckpointError, match=message):
        check_fits(format, model)


def test_a_tower_that_is_not_in_the_folder_is_asked_for_and_taken_from_another(published, tmp_path):
    shutil.copytree(published[0], tmp_path / "vila")
    shutil.move(tmp_path / "vila" / "vision_tower", tmp_path / "siglip")
    with pytest.raises(
        CheckpointError, match=r"the tower .* is not in the folder .* fix: name its folder with --vision"
    ):
        import_model(tmp_path / "vila", tmp_path / "run")
    import_model(tmp_path / "vila", tmp_path / "run", tower=tmp_path / "siglip")
    import_model(published[0], tmp_path / "whole")
    hashes = [hash_weights(read_run_settings(tmp_path / name).checkpoint) for name in ("run", "whole")]
    assert hashes[0] == hashes[1]
    with pytest.raises(UsageError, match="has a tower of its own"):
        import_model(published[0], tmp_path / "more", tower=tmp_path / "siglip")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"s2": True, "s2_scales": "38,76", "s2_max_split_size": 76}, "s2_max_split_size=76, but the tower sees 38"),
        ({"mm_vision_select_layer": -9}, "feature_layer=-9"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(settings, message, published, tmp_path):
    shutil.copytree(published[0], tmp_path / "vila")
    config = json.loads((tmp_path / "vila" / "config.json").read_text())
    (tmp_path / "vila" / "config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(Exception, match=message):
        import_model(tmp_path / "vila", tmp_path / "run")
