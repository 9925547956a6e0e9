"""GGUF files; transformers, which reads the text part, computes the same. `tests/serving` has llama.cpp itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.checkpoint.tensors import read_tensor
from megatron_vlm.config import CheckpointError, UsageError
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.convert.export import export
from megatron_vlm.convert.files.model_card import CARD_NAME
from megatron_vlm.convert.formats.gguf import check_model
from megatron_vlm.convert.to_hf import ExportOptions
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.data.text.tokenizer_files import find_tokenizer
from tests.support.byte_pair import write_llama_3, write_smollm2
from tests.support.configs import tiny_model, tiny_model_with_tower
from tests.support.llava_logits import our_logits
from tests.support.parts import tiny_projector
from tests.support.sentence_piece import NUM_PIECES

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

GGUF = ExportOptions(format="gguf")
KEY = "model.vision_projection.encoder."


@pytest.fixture(scope="session")
def siglip():
    """Return a model that llama.cpp knows: siglip(projection)."""

    def make(projection="mlp2x_gelu"):
        model = tiny_model(vocab_size=NUM_PIECES)
        vision = tiny_model_with_tower("siglip", image_size=36).vision
        return replace(model, vision=vision, projection=make_projector(projection))

    return make


@pytest.fixture(scope="session")
def exported(make_run, siglip, tmp_path_factory):
    """A folder in the checkpoint's own type, only to be read."""
    folder = tmp_path_factory.mktemp("gguf") / "x"
    export(read_run_settings(make_run(siglip())), folder, GGUF)
    return folder


def read(path):
    reader = gguf.GGUFReader(path)
    return {tensor.name: tensor for tensor in reader.tensors}, reader


def test_transformers_computes_the_same_logits_of_text(make_run, siglip, exported):
    from transformers import AutoModelForCausalLM

    ids, _, ours = our_logits(make_run(siglip()), num_images=0)
    model = AutoModelForCausalLM.from_pretrained(exported, gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(input_ids=ids).logits[..., : ours.size(-1)]
    assert ours.std() > 0.3, "logits this small would agree by themselves"
    assert (ours - theirs).abs().max() <= 2e-5  # the order of additions inside kernels


def test_the_same_bytes_every_time_and_nothing_is_replaced_unasked(make_run, siglip, exported, tmp_path):
    settings = read_run_settings(make_run(siglip()))
    assert "llama-server --model" in export(settings, tmp_path / "again", GGUF)
    for name in ("model.gguf", "mmproj.gguf", CARD_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()
    assert len(list((tmp_path / "again").iterdir())) == 3
    with pytest.raises(UsageError, match="again exists; fix: name another one, or add --overwrite"):
        export(settings, tmp_path / "again", GGUF)


def test_a_linear_projection_becomes_two_layers_around_a_gelu_that_do_the_same(make_run, siglip, tmp_path):
    run = make_run(siglip("linear"))
    export(read_run_settings(run), tmp_path / "x", GGUF)
    tensors, _ = read(tmp_path / "x" / "mmproj.gguf")
    first, second = (
        torch.nn.Linear(*reversed(tensors[f"{name}.weight"].data.shape), dtype=torch.float64)
        for name in ("mm.0", "mm.2")
    )
    for layer, name in ((first, "mm.0"), (second, "mm.2")):
        layer.load_state_dict({kind: torch.tensor(tensors[f"{name}.{kind}"].data) for kind in ("weight", "bias")})
    checkpoint = read_run_settings(run).checkpoint
    weight, bias = (read_tensor(checkpoint, KEY + kind).double() for kind in ("weight", "bias"))
    features = torch.randn(50, weight.size(1), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for approximate in ("none", "tanh"):
        made = second(torch.nn.functional.gelu(first(features), approximate=approximate))
        torch.testing.assert_close(made, features @ weight.T + bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_only_matrices_are_in_a_small_type(dtype, make_run, siglip, exported, tmp_path):
    export(read_run_settings(make_run(siglip())), tmp_path / "x", replace(GGUF, dtype=dtype))
    small = gguf.GGMLQuantizationType["F16" if dtype == "float16" else "BF16"]
    for file in ("model.gguf", "mmproj.gguf"):
        tensors, _ = read(tmp_path / "x" / file)
        whole, _ = read(exported / file)
        for name, tensor in tensors.items():
            is_matrix = len(tensor.shape) > 1 and name != "v.position_embd.weight"
            is_convolution = name == "v.patch_embd.weight" and dtype == "bfloat16"
            assert (tensor.tensor_type == small) == (is_matrix and not is_convolution)
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_allclose(values, whole[name].data, rtol=2**-8, atol=1e-7)


def test_values_beyond_float16_are_refused(make_run, siglip, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "megatron_vlm.convert.formats.gguf.read_merged", lambda *args: read_tensor(args[0], *args[2:]).float() * 1e9
    )
    with pytest.raises(CheckpointError, match="holds values that float16 cannot hold.*--dtype bfloat16"):
        export(read_run_settings(make_run(siglip())), tmp_path / "x", replace(GGUF, dtype="float16"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tower", "projection", "reason"),
    [
        ("clip", "linear", r"#25814\) \(model.vision\); fix: use --format .*llava"),
        ("dinov2", "linear", r"no tower of type dinov2, only siglip"),
        ("siglip", "mlp_downsample", r"no projection of type mlp_downsample \(model.projection\); fix: "),
        ("siglip", "transformer_block", r"no projection of type transformer_block \(model.projection\); fix: "),
    ],
)
def test_what_the_graph_of_llama_cpp_cannot_hold_is_refused(tower, projection, reason):
    model = tiny_model_with_tower(tower)
    with pytest.raises(CheckpointError, match=f"the format gguf cannot hold the model: .*{reason}"):
        check_model(replace(model, projection=tiny_projector(projection)))


def test_a_tower_whose_matrices_look_alike_is_refused():
    model = tiny_model_with_tower("siglip")
    square = replace(model.vision, ffn_hidden_size=model.vision.hidden_size)
    with pytest.raises(CheckpointError, match="apart by their shape"):
        check_model(replace(model, vision=square))


def test_the_chat_template_has_the_text_of_training_with_the_markers_of_llama_cpp(exported):
    jinja2 = pytest.importorskip("jinja2")
    _, reader = read(exported / "model.gguf")
    template = jinja2.Template(reader.fields["tokenizer.chat_template"].contents())
    picture, text = {"type": "media_marker", "text": "<__media__>"}, {"type": "text", "text": "Which one?"}
    for content, wanted in (
        ([picture, picture, text], "USER: <__media__>\n<__media__>\nWhich one? ASSISTANT:"),
        ([text], "USER: Which one? ASSISTANT:"),
        ("Which __> one?", "USER: Which __> one? ASSISTANT:"),
        ("<__media_1__><__media_1__>Which one?", "USER: <__media_1__>\n<__media_1__>\nWhich one? ASSISTANT:"),
    ):
        assert template.render(messages=[{"role": "user", "content": content}]).endswith(wanted)


@pytest.mark.parametrize(("write", "name"), [(write_llama_3, "llama-bpe"), (write_smollm2, "smollm")])
def test_a_byte_pair_tokenizer_is_named_by_its_rules(write, name, make_run, siglip, tmp_path):
    write(tmp_path / "source")
    tokenizer, model = load_tokenizer(tmp_path / "source"), siglip()
    run = make_run(replace(model, language=replace(model.language, vocab_size=tokenizer.vocab_size)))
    settings = replace(read_run_settings(run), tokenizer=find_tokenizer(tmp_path / "source"))
    template = {"llama-bpe": "llama_3", "smollm": "chatml"}[name]
    export(settings, tmp_path / "x", replace(GGUF, template=template))
    _, reader = read(tmp_path / "x" / "model.gguf")
    assert reader.fields["tokenizer.ggml.pre"].contents() == name
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert tokens[: tokenizer.vocab_size] == [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    control = [token for token, kind in enumerate(reader.fields["tokenizer.ggml.token_type"].contents()) if kind == 3]
    assert [tokens[token] for token in control[-2:]] == ["<image>", "<pad>"]
