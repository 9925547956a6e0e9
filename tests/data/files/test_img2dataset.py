import shutil

from megatron_vlm.config.prepare import ImageRules
from megatron_vlm.config.sources.pairs import Options as PairOptions
from megatron_vlm.data.files.img2dataset import is_shard_table
from megatron_vlm.data.sources.image_store import ImageReader
from megatron_vlm.data.sources.pairs.source import find_source as find_pair_source


def test_suffixes_in_capitals_are_read_as_others(coyo, make_table):
    table = make_table(coyo / "00000.parquet", {"key": ["000000000"], "caption": ["own"], "url": ["u"]})
    assert is_shard_table(table)
    capitals = coyo.with_name("capitals")
    capitals.mkdir()
    for path in coyo.iterdir():
        shutil.copy(path, capitals / f"{path.stem}{path.suffix.upper()}")
    assert is_shard_table(capitals / "00000.PARQUET")
    sources = [find_pair_source((folder,), PairOptions(), None) for folder in (coyo, capitals)]
    shown = []
    for source in sources:
        assert [path.stem for path in source.inputs] == ["00000", "00001"]
        images = ImageReader(None, ImageRules())
        shown.append([found.document for path in source.inputs for found in source.read(path, images)])
    assert shown[0] == shown[1]
    assert len(shown[0]) == 8
