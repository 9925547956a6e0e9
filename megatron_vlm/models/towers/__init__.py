"""Vision towers: each module builds the tower configured by the module of the same name in `config/towers/`.

A module defines

    build(config: Config, computation: Computation, groups: ReplicaGroups) -> Replicated

The tower maps pixels (uint8[n, 3, H, W] as loaded, or float if already normalised) to features
float[n, p, feature_size]: the patches row by row, after the class token if it is kept (`Grid.num_prefix_tokens`).
`groups.tensor` is the tensor-parallel group of its layers, and `groups.own` stands for any other. By default the first
is a group of one, too: every rank holds the whole tower and encodes some of the images. With
`parallel.vision_tensor_parallel`, its ranks encode the same images. A rank without images calls the tower with one
black image of `image_size` pixels a side and keeps nothing of the features, which therefore must be finite.

The parameters named in `split_parameters` of the settings are marked as megatron-core marks them
(`tensor_model_parallel`); those without the mark are the same on every rank.

Every parameter must be used by the call of the module that holds it, here as in projectors and adapters: megatron-core
waits for the weights of a module when it is called.
"""
