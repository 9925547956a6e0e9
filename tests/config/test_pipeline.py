import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_vlm.config import ConfigError, ParallelConfig, TrainConfig, load_config
from megatron_vlm.config.pipeline import count_layers, parse_layout, place_layers

PP2 = {"pipeline_model_parallel_size": 2}
OVERLAP = {"overlap_p2p_comm": True}


def layout_of(layout, pp=2, **settings):
    return ParallelConfig(pipeline_model_parallel_size=pp, pipeline_model_parallel_layout=layout, **settings)


def parsed_by_megatron_core(layout):
    """Return its names of the layers of each chunk; None if it refuses the layout."""
    spelled = layout if isinstance(layout, str) else [list(chunk) for chunk in layout]
    try:
        parsed = PipelineParallelLayerLayout(spelled, 1)
    except AssertionError:
        return None
    (stage,) = parsed.layout
    return tuple(tuple(layer.name for layer in chunk) for chunk in stage)


def parsed(layout):
    try:
        return parse_layout(layout)
    except ConfigError:
        return None


# One in two of these is a layout; the others are near misses.
PIECES = st.sampled_from(["E", "t", "tt", "|", "L", ",", "t*3", "t*0", "(t|)*2", "(tt,|)*3", "(t*2|)*2", "|*2"])
ANY = st.sampled_from([*"EtL|,()*0123 x"])


@given(st.lists(PIECES, max_size=12).map("".join))
def test_strings_are_read_as_megatron_core_reads_them(text):
    assert parsed(text) == parsed_by_megatron_core(text)


@given(st.lists(st.one_of(PIECES, ANY), max_size=10).map("".join))
def test_strings_that_megatron_core_refuses_are_refused(text):
    assert parsed(text) == parsed_by_megatron_core(text)


@given(
    st.lists(st.lists(st.sampled_from(["decoder", " Decoder", "LOSS", "embedding", "t", ""]), max_size=3), min_size=1)
)
def test_lists_are_read_as_megatron_core_reads_them(chunks):
    layout = tuple(map(tuple, chunks))
    assert parsed(layout) == parsed_by_megatron_core(layout)


@pytest.mark.parametrize(
    ("layout", "pp"),
    [
        ("Et*3|t*4|t*3L", 3),
        ("Ettt|tL", 2),
        ("E|tt|ttL", 3),
        ("Et|tt||tL", 2),
        ("Ettt|(tt|)*5L", 7),
        ((("embedding", "decoder"), ("decoder", "decoder", "loss")), 2),
    ],
)
def test_every_chunk_has_the_layers_that_megatron_core_gives_it(layout, pp):
    spelled = layout if isinstance(layout, str) else [list(chunk) for chunk in layout]
    theirs = PipelineParallelLayerLayout(spelled, pp)
    counts, first = count_layers(layout), 0
    placed = place_layers(counts, pp)
    # Their `get_layer_id_list` asks the running job for its rank; this is what it counts up.
    for number in range(len(counts)):
        stage, chunk = number % pp, number // pp
        num_layers = theirs.layout[stage][chunk].count(LayerType.decoder)
        assert placed[stage][chunk] == range(first, first + num_layers)
        first += num_layers


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[(0, 1)], [(2, 3)]]),
        ({"num_layers_in_first_pipeline_stage": 1}, [[(0,)], [(1, 2, 3)]]),
        ({"virtual_pipeline_model_parallel_size": 2, **OVERLAP}, [[(0,), (2,)], [(1,), (3,)]]),
        ({"pipeline_model_parallel_layout": "Et*3|tL"}, [[(0, 1, 2)], [(3,)]]),
        ({"pipeline_model_parallel_layout": "E|t|tt|tL", **OVERLAP}, [[(), (1, 2)], [(0,), (3,)]]),
    ],
)
def test_layers_of_every_kind_of_split(settings, expected):
    placed = ParallelConfig(**PP2, **settings).chunk_layers(4)
    assert [[tuple(chunk) for chunk in stage] for stage in placed] == expected


def test_a_layout_says_how_many_chunks_a_stage_has():
    assert layout_of("Ett|ttL").num_model_chunks is None
    assert layout_of("Et|t|t|tL", **OVERLAP).num_model_chunks == 2
    assert layout_of("Et|t|t|tL", virtual_pipeline_model_parallel_size=2, **OVERLAP).num_model_chunks == 2
    assert ParallelConfig(**PP2, virtual_pipeline_model_parallel_size=2, **OVERLAP).num_model_chunks == 2


@pytest.mark.parametrize(
    ("layout", "settings", "message"),
    [
        (
            "Etx|tL",
            {},
            r"layout has 'x', which is not one of E \(embedding\), t \(decoder\), L \(loss\); fix: use letters",
        ),
        ("Et |tL", {}, "layout has ' ', which is not one of"),
        ((("t",), ("loss",)), {}, "layout has 't', which is not one of"),
        ("Et|mL", {}, "layout has 'm': no model here has such layers; fix: remove it"),
        ((("embedding",), ("Encoder", "loss")), {}, "layout has 'Encoder': no model here has such layers"),
        ("E(t*9|)*99999L", {}, "layout has more than 100000 letters; fix: repeat fewer"),
        ("Et*" + "9" * 5000 + "|L", {}, "layout has more than 100000 letters"),
        ("Et|t|tL", {}, "layout has 3 chunks, which is not a multiple of pipeline_model_parallel_size=2"),
        ("Et|tL", {"pp": 1}, "layout needs pipeline_model_parallel_size > 1"),
        (
            "Et|tL",
            {"virtual_pipeline_model_parallel_size": 2},
            "layout means virtual_pipeline_model_parallel_size=1, which is 2; fix: remove",
        ),
        ("tt|tL", {}, "embedding must begin the first chunk, and stand nowhere else; fix: write E, then a t for each"),
        ("tE|tL", {}, "embedding must begin the first chunk"),
        ("Et|EtL", {}, "embedding must begin the first chunk, and stand nowhere else"),
        ("|EtL", {}, "embedding must begin the first chunk"),
        ("Et|tLt", {}, "loss must end the last chunk"),
        ("EtL|t", {}, "loss must end the last chunk"),
        ("Ett||tL", {"pp": 3}, "layout leaves stage 1 without a layer; fix: give it one, or use fewer stages"),
        ("Et|tL", {"num_layers_in_first_pipeline_stage": 1}, "num_layers_in_first_pipeline_stage are both set"),
        ("Et|t|t|tL", {}, "virtual pipeline over 2 stages without overlap_p2p_comm"),
        ("Ett|tL", OVERLAP, "overlap_p2p_comm needs virtual_pipeline_model_parallel_size or such a layout"),
    ],
)
def test_layouts_that_cannot_be_are_refused(layout, settings, message):
    with pytest.raises(ConfigError, match=message):
        layout_of(layout, **settings)


@pytest.mark.parametrize("layout", ["|Et|tL", "Et|tL|"])
def test_megatron_core_takes_a_layout_that_it_does_not_build(layout):
    PipelineParallelLayerLayout(layout, 3).validate_layer_layout(num_layers=2, mtp_num_layers=None)
    with pytest.raises(ConfigError, match="must (begin the first|end the last) chunk"):
        layout_of(layout, pp=3)


@pytest.mark.parametrize(
    "spelled", ["Et*31|tL", "[[embedding, decoder], [decoder, loss]]", "[[embedding], [decoder, Decoder, loss]]"]
)
def test_strings_and_lists_come_from_overrides(spelled):
    overrides = ["parallel.pipeline_model_parallel_size=2", f"parallel.pipeline_model_parallel_layout={spelled}"]
    parallel = load_config(TrainConfig, "examples/vila_7b/pretrain.yaml", overrides).parallel
    assert sum(count_layers(parallel.pipeline_model_parallel_layout)) == {"E": 32}.get(spelled[0], 2)


@pytest.mark.parametrize("spelled", ["3", "[embedding, loss]", "[[embedding], 3]", "{E: 1}", "true"])
def test_other_values_are_refused_in_one_line(spelled):
    overrides = ["parallel.pipeline_model_parallel_size=2", f"parallel.pipeline_model_parallel_layout={spelled}"]
    with pytest.raises(ConfigError, match=r"pipeline_model_parallel_layout\S*=.* is not (str|a list|text)"):
        load_config(TrainConfig, "examples/vila_7b/pretrain.yaml", overrides)
