import torch

from megatron_vlm.checkpoint.open_model import open_model
from megatron_vlm.checkpoint.run_settings import read_run_settings
from megatron_vlm.checkpoint.tensors import read_tensor
from megatron_vlm.convert.families import llama
from megatron_vlm.convert.quantize.decoder_layer import DecoderLayer


def test_the_layers_compute_the_logits_of_our_model(make_run, model_config):
    settings = read_run_settings(make_run(model_config))
    ids = torch.randint(3, model_config.language.vocab_size, (1, 40), generator=torch.Generator().manual_seed(2))
    with open_model(settings) as model, torch.no_grad():
        none = torch.empty(0, dtype=torch.long)
        size = model_config.vision.image_size
        ours = model(ids, torch.empty(0, 3, size, size, dtype=torch.uint8), none, num_images=0)
    tensors = {}
    for rule in llama.rules(model_config.language):
        for layer in rule.layers:
            split = rule.transform.split(read_tensor(settings.checkpoint, rule.key, layer))
            tensors.update(zip(rule.names_of(layer), split, strict=True))
    layer, hidden = DecoderLayer(model_config.language), tensors["model.embed_tokens.weight"][ids]
    for number in range(model_config.language.num_layers):
        prefix = f"model.layers.{number}."
        hidden = layer(hidden, {name.split(".")[-2]: one for name, one in tensors.items() if name.startswith(prefix)})
    logits = layer.norm(hidden, tensors["model.norm.weight"]) @ tensors["lm_head.weight"].T
    # The same operations in float32; what is left is the order of additions.
    assert (logits[..., : ours.shape[-1]] - ours).abs().max() <= 2e-5
