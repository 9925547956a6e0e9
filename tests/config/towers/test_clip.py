from megatron_vlm.config.towers.clip import Config


def test_parameters_of_clip_vit_l_14_336():
    # CLIPVisionModel of openai/clip-vit-large-patch14-336 has 303,507,456, with a norm after the last layer
    tower = Config(num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, feature_layer=-1)
    assert tower.num_parameters == 303_507_456 - 2 * 1024
