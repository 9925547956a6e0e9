from megatron_vlm.config.grid import Grid
from megatron_vlm.config.towers.internvit import Config


def test_parameters_of_internvit_6b_448():
    # InternVLVisionModel with the sizes of OpenGVLab/InternViT-6B-448px-V1-2 has 5,536,496,000
    assert Config().num_parameters == 5_536_496_000
    assert Config().constant_grid == Grid(32, 32)


def test_parameters_of_internvit_300m_448():
    # InternVLVisionModel with the sizes of OpenGVLab/InternViT-300M-448px has 304,012,288
    small = {"num_layers": 24, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 16}
    tower = Config(**small, normalization="LayerNorm", qk_layernorm=False, add_qkv_bias=True)
    assert tower.num_parameters == 304_012_288
