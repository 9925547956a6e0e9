import json
import shutil
from dataclasses import replace

import pytest
import torch

from megatron_vlm.config import ConfigError
from megatron_vlm.convert.compare_logits import compare_logits, draw_samples, reason_without_logits
from megatron_vlm.convert.opened_weights import open_weights
from megatron_vlm.convert.verify import MAX_KL


def test_a_wrong_activation_shows_in_the_logits(make_run, model_config, exported, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_act"] = "gelu"
    (folder / "config.json").write_text(json.dumps(config))
    run = open_weights(make_run(model_config))
    theirs = replace(run, path=folder, settings=None)
    assert compare_logits(run, theirs).mean_kl > MAX_KL


@pytest.mark.parametrize(("name", "what"), [("image_size", "image sizes"), ("vocab_size", "vocabularies")])
def test_models_that_cannot_see_the_same_input_are_refused(name, what, make_run, model_config):
    run = open_weights(make_run(model_config))
    section = "vision" if name == "image_size" else "language"
    part = getattr(run.model, section)
    other = replace(run, model=replace(run.model, **{section: replace(part, **{name: 2 * getattr(part, name)})}))
    with pytest.raises(ConfigError, match=f"the models have {what} of"):
        compare_logits(run, other)


def test_samples_are_the_same_for_a_seed_and_have_no_to_three_images(model_config):
    samples = draw_samples(model_config, 5, min_positions=1)
    assert [len(one.pixels) for one in samples] == [0, 1, 2, 3]
    again = draw_samples(model_config, 5, min_positions=1)
    assert all(torch.equal(one.input_ids, two.input_ids) for one, two in zip(samples, again, strict=True))


def test_a_folder_that_no_class_of_transformers_loads_is_told(exported, tmp_path):
    weights = open_weights(exported)
    assert reason_without_logits(weights) is None
    (tmp_path / "config.json").write_text('{"architectures": ["LlavaLlamaModel"]}')
    assert reason_without_logits(replace(weights, path=tmp_path)) == "transformers has no class LlavaLlamaModel"
