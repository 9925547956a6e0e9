"""Data that cannot be used is refused before a run starts."""

import dataclasses

import pytest

from megatron_vlm.config import (
    BlendEntry,
    ConfigError,
    DataConfig,
    DataError,
    LanguageConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainingConfig,
)
from megatron_vlm.config.prepare import ImageRules
from megatron_vlm.config.towers.clip import Config as ClipConfig
from megatron_vlm.data.loading.checks import check_data
from megatron_vlm.data.shards.manifest import load_manifest, save_manifest
from megatron_vlm.data.shards.writer import write_dataset


def make_config(tokenizer_path, folder, *, vocab_size: int, seq_length: int = 64, image_size: int = 28) -> TrainConfig:
    sizes = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
    return TrainConfig(
        stage="align",
        run_dir="unused",
        model=ModelConfig(
            language=LanguageConfig(vocab_size=vocab_size, **sizes), vision=ClipConfig(image_size=image_size, **sizes)
        ),
        data=DataConfig(tokenizer=str(tokenizer_path), blend=(BlendEntry(path=str(folder)),), seq_length=seq_length),
        optimizer=OptimizerConfig(lr=1e-3),
        training=TrainingConfig(global_batch_size=1, train_iters=1),
    )


@pytest.fixture
def dataset(folder, make_samples, tokenizer):
    write_dataset(folder, make_samples(5), dataset_name="tiny", tokenizer=tokenizer.facts)
    return folder


def test_matching_data_is_opened(dataset, tokenizer_path, tokenizer):
    (found,) = check_data(make_config(tokenizer_path, dataset, vocab_size=tokenizer.vocab_size))
    assert len(found) == 5


def test_missing_tokenizer_is_refused(dataset):
    with pytest.raises(ConfigError, match="tokenizer cannot be read"):
        check_data(make_config("nowhere.model", dataset, vocab_size=400))


def test_vocabulary_of_another_model_is_refused(dataset, tokenizer_path):
    with pytest.raises(ConfigError, match=r"tokenizer has 400 pieces, model\.language\.vocab_size is 500"):
        check_data(make_config(tokenizer_path, dataset, vocab_size=500))


def test_shards_of_another_tokenizer_are_refused(folder, make_samples, tokenizer, tokenizer_path):
    other = dataclasses.replace(tokenizer.facts, name="other.model", sha256="0" * 64)
    write_dataset(folder, make_samples(5), dataset_name="tiny", tokenizer=other)
    with pytest.raises(DataError, match=r"other\.model .*not with tiny\.model"):
        check_data(make_config(tokenizer_path, folder, vocab_size=tokenizer.vocab_size))


def test_datasets_of_the_validation_are_checked_too(dataset, tmp_path, make_samples, tokenizer, tokenizer_path):
    other = dataclasses.replace(tokenizer.facts, name="other.model", sha256="0" * 64)
    write_dataset(tmp_path / "validation", make_samples(5), dataset_name="tiny", tokenizer=other)
    config = make_config(tokenizer_path, dataset, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, validation=(BlendEntry(path=str(tmp_path / "validation")),)),
        training=dataclasses.replace(config.training, validation_interval=1),
    )
    with pytest.raises(DataError, match=r"other\.model .*not with tiny\.model"):
        check_data(config)


def test_missing_folder_is_refused(tmp_path, tokenizer_path, tokenizer):
    with pytest.raises(DataError, match="does not exist"):
        check_data(make_config(tokenizer_path, tmp_path / "nowhere", vocab_size=tokenizer.vocab_size))


def test_damaged_manifest_is_refused(dataset, tokenizer_path, tokenizer):
    (dataset / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="manifest cannot be read"):
        check_data(make_config(tokenizer_path, dataset, vocab_size=tokenizer.vocab_size))


def test_row_that_holds_no_image_is_refused(dataset, tokenizer_path, tokenizer):
    config = make_config(tokenizer_path, dataset, vocab_size=tokenizer.vocab_size, seq_length=4)
    with pytest.raises(ConfigError, match=r"one image takes 4 tokens, data\.seq_length is 4"):
        check_data(config)


def test_images_made_smaller_than_the_model_wants_are_refused(dataset, tokenizer_path, tokenizer):
    options = {"images": dataclasses.asdict(ImageRules(resize_shorter_side=14))}
    save_manifest(dataclasses.replace(load_manifest(dataset), options=options), dataset)
    with pytest.raises(ConfigError, match=r"to 14 pixels; model\.vision\.image_size is 28"):
        check_data(make_config(tokenizer_path, dataset, vocab_size=tokenizer.vocab_size))


def test_quarantine_that_is_no_list_of_ids_is_refused(dataset, tokenizer_path, tokenizer, tmp_path):
    config = make_config(tokenizer_path, dataset, vocab_size=tokenizer.vocab_size)
    (tmp_path / "pictures.txt").write_text("3\ncat.jpg\n")
    for name, error, message in (("ids.txt", ConfigError, "No such file"), ("pictures.txt", DataError, "'cat.jpg'")):
        quarantine = str(tmp_path / name)
        with pytest.raises(error, match=message):
            check_data(dataclasses.replace(config, data=dataclasses.replace(config.data, quarantine=quarantine)))
