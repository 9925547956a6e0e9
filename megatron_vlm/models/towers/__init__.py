"""Vision towers: each module builds the tower whose settings are in the module of that name in `config/towers/`.

A module offers

    build(config: Config, computation: Computation, groups: ReplicaGroups) -> Replicated

The result maps pixels, uint8[n, 3, H, W] as loaded or float already normalised, to features float[n, p, feature_size],
patches row by row. Every rank holds the whole tower and encodes some of the images, so its layers take `groups.own` as
their tensor-parallel group.
"""
