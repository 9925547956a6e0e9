"""Vision towers: each module builds the tower configured by the module of the same name in `config/towers/`.

A module defines

    build(config: Config, computation: Computation, groups: ReplicaGroups) -> Replicated

The tower maps pixels (uint8[n, 3, H, W] as loaded, or float if already normalised) to features
float[n, p, feature_size], with the patches row by row. Every rank holds the whole tower and encodes some of the images,
so `groups.own` is the tensor-parallel group of its layers.
"""
