"""Projections: each module builds the one whose settings are in the module of that name in `config/projectors/`.

A module offers

    build(config: Config, computation: Computation, groups: ReplicaGroups, *,
          input_size: int, output_size: int, init_method_std: float) -> Replicated

The result maps features float[n, p, input_size] to embeddings float[n, tokens, output_size], with as many tokens as the
settings' `token_grid` says. Every rank holds the whole projection.
"""
