"""Check the data of a run before it starts; needs neither torch nor a GPU."""

from megatron_vlm.config import ConfigError, TrainConfig
from megatron_vlm.config.blend import datasets_of
from megatron_vlm.data.loading.quarantine import check_quarantine
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.text.tokenizer import load_tokenizer


def check_data(config: TrainConfig) -> tuple[ShardedDataset, ...]:
    """Check that tokenizer, shards and model fit together.

    Returns:
        The datasets of `data.blend`, open; those of `data.validation` are only checked.

    Raises:
        ConfigError: the tokenizer cannot be read or has another vocabulary than the model; an image does not fit in a
            row; `prepare` made the images smaller than the model needs them; or `data.quarantine` names no file.
        DataError: a dataset is missing, damaged, or prepared with another tokenizer; or the file of `data.quarantine`
            has a line that is no id.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    vocab_size = config.model.language.vocab_size
    if tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            f"tokenizer has {tokenizer.vocab_size} pieces, model.language.vocab_size is {vocab_size}",
            where=config.data.tokenizer,
            fix=f"set model.language.vocab_size={tokenizer.vocab_size}, or data.tokenizer to the model's",
        )
    if config.data.quarantine is not None:
        check_quarantine(config.data.quarantine)
    datasets = []
    training = datasets_of(config.data.blend)
    for entry in (*training, *config.data.validation):
        dataset = ShardedDataset.open(entry.path)
        dataset.check_tokenizer(tokenizer.facts)
        _check_images(config, dataset)
        datasets.append(dataset)
    return tuple(datasets[: len(training)])


def _check_images(config: TrainConfig, dataset: ShardedDataset) -> None:
    if not dataset.manifest.counts.images:
        return
    vision, num_image_tokens = config.model.vision, config.model.constant_image_tokens
    # Where the number varies, data.overflow decides about the images that are too long.
    if num_image_tokens is not None and num_image_tokens >= config.data.seq_length:
        raise ConfigError(
            f"one image takes {num_image_tokens} tokens, data.seq_length is {config.data.seq_length}",
            fix=f"raise data.seq_length above {num_image_tokens}, or lower model.vision.image_size",
        )
    side = dataset.manifest.options.get("images", {}).get("resize_shorter_side")
    if side is not None and side < vision.image_size:
        raise ConfigError(
            f"images were made smaller at preparation, to {side} pixels; model.vision.image_size is "
            f"{vision.image_size}",
            where=str(dataset.folder),
            fix=f"prepare again with at least {vision.image_size}, or set model.vision.image_size={side}",
        )
