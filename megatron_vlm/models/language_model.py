"""The Llama-2 decoder: megatron-core's GPTModel with logits only where there is a loss."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.config import LanguageConfig
from megatron_vlm.models.layers.specs import Backend, language_block_spec


class LanguageModel(GPTModel):
    """GPTModel whose output layer sees only the positions of `label_index`.

    With images most positions of a row have no loss; their logits over the whole vocabulary are the largest part of a
    step that can be left out. Under sequence parallelism the hidden states are gathered first, since the chosen
    positions fall unevenly on the ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        language_config: LanguageConfig,
        backend: Backend,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config,
            language_block_spec(config, backend, vp_stage),
            vocab_size=language_config.padded_vocab_size,
            max_sequence_length=language_config.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=language_config.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=int(language_config.rotary_base),
            # Images are written over the whole sequence before it is scattered.
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
        )
        self.label_index: Tensor | None = None
        if post_process:
            if config.sequence_parallel:
                # The gather below brings the whole sequence and, backwards, reduce-scatters the partial gradients.
                self.output_layer.sequence_parallel = False
                self.output_layer.disable_grad_reduce = True
            self.output_layer.register_forward_pre_hook(self._select_positions)

    def _select_positions(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Keep the hidden states float[t, 1, h] whose logits are wanted."""
        hidden_states, *rest = inputs
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states)
        if self.label_index is not None:
            hidden_states = hidden_states.index_select(0, self.label_index)
        return (hidden_states, *rest)
