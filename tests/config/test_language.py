import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.config import ConfigError, LanguageConfig

LANGUAGE = {
    "vocab_size": 32000,
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 11008,
    "num_attention_heads": 32,
}


def test_added_tokens_of_llama_2_are_those_of_llava():
    language = LanguageConfig(**LANGUAGE)
    assert (language.image_token_id, language.pad_token_id, language.padded_vocab_size) == (32000, 32001, 32064)


@given(st.integers(1, 10**6))
def test_padded_vocabulary_holds_the_added_tokens_in_whole_blocks(vocab_size):
    language = LanguageConfig(**{**LANGUAGE, "vocab_size": vocab_size})
    assert language.padded_vocab_size % 64 == 0
    assert vocab_size + 2 <= language.padded_vocab_size < vocab_size + 2 + 64


def test_every_tensor_parallelism_that_splits_the_heads_splits_the_vocabulary():
    smollm2 = {"vocab_size": 49152, "hidden_size": 576, "num_attention_heads": 9, "num_query_groups": 3}
    assert LanguageConfig(**{**LANGUAGE, **smollm2}).padded_vocab_size == 49536 == 9 * 64 * 86


def test_heads_and_groups_follow_from_the_width_by_default():
    language = LanguageConfig(**LANGUAGE)
    assert (language.query_groups, language.head_channels) == (32, 128)


def test_heads_and_groups_can_be_set():
    language = LanguageConfig(**LANGUAGE, num_query_groups=8, kv_channels=64)
    assert (language.query_groups, language.head_channels) == (8, 64)


def test_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"model.language.hidden_size=4096 is not a multiple of .*=30"):
        LanguageConfig(**{**LANGUAGE, "num_attention_heads": 30})


def test_width_need_not_divide_where_the_head_has_a_size_of_its_own():
    assert LanguageConfig(**{**LANGUAGE, "num_attention_heads": 30, "kv_channels": 128}).head_channels == 128


def test_groups_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(ConfigError, match=r"num_attention_heads=32 is not a multiple of num_query_groups=5"):
        LanguageConfig(**LANGUAGE, num_query_groups=5)


@pytest.mark.parametrize("sizes", [{"kv_channels": 7}, {"hidden_size": 32 * 5}])
def test_head_of_an_odd_size_which_has_no_rotary_pairs_is_refused(sizes):
    with pytest.raises(ConfigError, match=r"the size of a head is \d, an odd number"):
        LanguageConfig(**{**LANGUAGE, **sizes})


def test_spread_of_the_initial_weights_that_is_negative_is_refused():
    with pytest.raises(ConfigError, match="model.language.init_method_std=-0.1 is negative"):
        LanguageConfig(**LANGUAGE, init_method_std=-0.1)


SIZES = ["vocab_size", "num_layers", "hidden_size", "num_attention_heads", "rotary_base", "layernorm_epsilon"]


@pytest.mark.parametrize("name", SIZES)
def test_size_of_the_decoder_that_is_not_positive_is_refused(name):
    with pytest.raises(ConfigError, match=f"model.language.{name}=0 is not positive"):
        LanguageConfig(**{**LANGUAGE, name: 0})


def test_parameters_of_llama_2_7b():
    language = LanguageConfig(**LANGUAGE)
    layer = language.layer_weights + language.layer_norms
    total = 32 * layer + 2 * language.embedding_weights + language.hidden_size
    # the published model has 6,738,415,616, with 32,000 rows in both embeddings
    assert total == 6_738_415_616 + 2 * 64 * 4096


def test_operations_grow_with_tokens_pairs_and_labels_each_on_its_own():
    language = LanguageConfig(**LANGUAGE, num_query_groups=8)
    layer = language.layer_operations(num_tokens=10, attention_pairs=55)
    assert (layer.entry, layer.inner, layer.attention) == (0, 2 * 10 * language.layer_weights, 4 * 55 * 4096)
    assert language.output_operations(num_labels=7).inner == 2 * 7 * 4096 * 32064
