import pytest
import torch

from megatron_vlm.models.layers.image_parallel import ImageGroups, gather_features

pytestmark = pytest.mark.distributed


def gathered(num_images: int) -> tuple[list[float], list[float]]:
    """Gather this rank's images; return the features of all, and the gradient that comes back to this rank's."""
    group, rank, size = torch.distributed.group.WORLD, torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = -(-num_images // size)
    first, last = min(rank * share, num_images), min((rank + 1) * share, num_images)
    local = torch.arange(first, last, dtype=torch.float32).view(-1, 1, 1).expand(-1, 2, 3).clone().requires_grad_()
    own = torch.distributed.new_group([rank], use_local_synchronization=True)
    features = gather_features(local, num_images, ImageGroups(group, own, group))
    assert features.shape == (num_images, 2, 3)
    # Every rank computes the same loss of all images, as the decoder does.
    (features * torch.arange(1, num_images + 1).view(-1, 1, 1)).sum().backward()
    return features[:, 0, 0].tolist(), local.grad[:, 1, 2].tolist()


@pytest.mark.parametrize("num_images", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_rank_gets_all_images_in_order_and_its_own_gradients_back(workers, world_size, num_images):
    answers = workers.run("tests.models.layers.test_image_parallel:gathered", world_size, num_images=num_images)
    assert all(features == list(range(num_images)) for features, _ in answers)
    # Scaled by the ranks: the gradients of the tower's weights are averaged over them afterwards.
    gradients = [gradient / world_size for _, mine in answers for gradient in mine]
    assert gradients == list(range(1, num_images + 1))
