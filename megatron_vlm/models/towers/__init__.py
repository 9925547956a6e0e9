"""Vision towers: each module builds the tower configured by the module of the same name in `config/towers/`.

A module defines

    build(config: Config, computation: Computation, groups: ReplicaGroups) -> Replicated

The tower maps pixels (uint8[n, 3, H, W] as loaded, or float if already normalised) to features
float[n, p, feature_size]: the patches row by row, after the class token if it is kept (`Grid.num_prefix_tokens`). Every
rank holds the whole tower and encodes some of the images, so `groups.own` is the tensor-parallel group of its layers. A
rank without images calls the tower with one black image of `image_size` pixels a side and keeps nothing of the
features, which therefore must be finite.

Every parameter must be used by the call of the module that holds it, here as in projectors and adapters: megatron-core
waits for the weights of a module when it is called.
"""
