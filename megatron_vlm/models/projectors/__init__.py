"""Projections: each module builds the projection configured by the module of the same name in `config/projectors/`.

A module defines

    build(config: Config, computation: Computation, groups: ReplicaGroups, *,
          patches: Grid, input_size: int, output_size: int, init_method_std: float) -> Replicated

The projection maps features float[n, p, input_size], in the order of the grid `patches`, to embeddings
float[n, tokens, output_size]; `token_grid` of the settings gives the number of tokens. Every rank holds the whole
projection.
"""
