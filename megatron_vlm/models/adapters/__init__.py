"""Adapters: each module adds the weights configured by the module of the same name in `config/adapters/`.

A module defines

    apply(config: Config, model: VisionLanguageModel) -> None
    start(config: Config, model: VisionLanguageModel) -> None

`apply` is called for every chunk of a built model, after parts have been frozen and before gradient buffers exist, and
adds submodules to the parts in `config.parts`; later pipeline stages have only the decoder. The new weights learn.
`start` is called once in a run, for every chunk, after the weights of the base have been loaded: here weights get the
values that depend on those of the base.

Checkpoints of a run with an adapter hold, under the names that they get here, the weights that learn: those of the
adapter and of the parts that are not frozen. The rest stays in the checkpoint that the run started from, its base
(`checkpoint/base.py`).

In the decoder, they must be split over the tensor-parallel
ranks or carry the attributes megatron-core expects (`sequence_parallel`, `tensor_model_parallel`). In a vision part,
they are whole on every rank, and `build_model` marks them.

Add submodules to a decoder layer rather than to its MLP: megatron-core's MLP expects every child to have a
`sharded_state_dict`, which plain torch modules do not have.
"""
