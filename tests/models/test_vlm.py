import pytest
import torch

from megatron_vlm.models.vlm import merge_image_embeddings


def test_images_are_written_at_their_places_and_nowhere_else():
    text = torch.arange(12.0).view(6, 1, 2)
    image = torch.tensor([[100.0, 101.0], [102.0, 103.0]])
    merged = merge_image_embeddings(text, image, torch.tensor([4, 1]))
    assert merged[:, 0, 0].tolist() == [0.0, 102.0, 4.0, 6.0, 100.0, 10.0]
    assert text[4, 0, 0] == 8.0


def test_embeddings_of_another_width_are_refused():
    with pytest.raises(ValueError, match="text has hidden_size 2, image 3"):
        merge_image_embeddings(torch.zeros(4, 1, 2), torch.zeros(1, 3), torch.tensor([0]))


def test_embeddings_without_a_place_are_refused():
    with pytest.raises(ValueError, match="2 image embeddings for 1 placeholders"):
        merge_image_embeddings(torch.zeros(4, 1, 2), torch.zeros(2, 2), torch.tensor([0]))
