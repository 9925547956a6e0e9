"""Adapters: each module adds the weights whose settings are in the module of that name in `config/adapters/`.

A module offers

    apply(config: Config, model: VisionLanguageModel) -> None

It is called for every chunk of a built model, after the frozen parts are frozen and before gradients are set up, and
changes the modules of the parts that `config.parts` names; a later pipeline stage has the decoder only. The weights it
adds learn, and stand in checkpoints under the names that they get here. Added to a decoder layer, they are split over
the tensor-parallel ranks or marked as megatron-core wants it (`sequence_parallel`, `tensor_model_parallel`); added to a
vision part, they are whole on every rank, and the caller marks them (`mark_replicated`).
"""
