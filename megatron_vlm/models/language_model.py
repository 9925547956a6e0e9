"""The Llama-2 decoder: megatron-core's GPTModel, with logits only at positions with a loss."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.config import LanguageConfig, ParallelConfig
from megatron_vlm.config.pipeline import parse_layout
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.context_parallel import ContextParams
from megatron_vlm.models.layers.cross_entropy import cross_entropy
from megatron_vlm.models.layers.embedding import accumulate_in_place
from megatron_vlm.models.layers.gradients import end_gradient
from megatron_vlm.models.layers.linear import ColumnLinear
from megatron_vlm.models.layers.rotary import positions_in_samples, rotary_table
from megatron_vlm.models.layers.row_kinds import RowKinds, sort_rows
from megatron_vlm.models.layers.specs import Backend, language_block_spec, rotates_by_table
from megatron_vlm.models.layers.vocabulary import clear_rows, count_rows, exclude_ids
from megatron_vlm.platform import device
from megatron_vlm.platform.machine import check_fp8_backend


def language_transformer_config(
    language: LanguageConfig, parallel: ParallelConfig, computation: Computation, backend: Backend
) -> TransformerConfig:
    """Return megatron-core's config for the decoder, including the parallel layout.

    Raises:
        ConfigError: FP8 without the layers of transformer-engine.
    """
    check_fp8_backend(computation.fp8, backend)
    return TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.query_groups,
        kv_channels=language.head_channels,
        layernorm_epsilon=language.layernorm_epsilon,
        init_method_std=language.init_method_std,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        apply_rope_fusion=backend == "transformer_engine",
        **_parallel_arguments(parallel),
        **computation.fp8_arguments(),
        **computation.recompute_arguments(),
        **{**computation.common_arguments(), "bias_activation_fusion": can_fuse_swiglu()},
    )


def can_fuse_swiglu() -> bool:
    """Return whether megatron-core's fused SwiGLU pays: torch.compile makes one kernel of four on a GPU.

    It also keeps its input only, 3 ffn_hidden_size activations a token in place of 5.
    """
    return device.can_compile_kernels()


def _parallel_arguments(parallel: ParallelConfig) -> dict[str, Any]:
    virtual, layout = parallel.num_model_chunks, parallel.pipeline_model_parallel_layout
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual,
        "context_parallel_size": parallel.context_parallel_size,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        # As lists: megatron-core logs a string.
        "pipeline_model_parallel_layout": layout and [list(chunk) for chunk in parse_layout(layout)],
        "sequence_parallel": parallel.sequence_parallel,
        "overlap_p2p_comm": parallel.overlap_p2p_comm,
        "batch_p2p_comm": not parallel.overlap_p2p_comm,
        # Only old versions of torch need the whole device to be waited for after every send and receive.
        "batch_p2p_sync": False,
        # With a virtual pipeline, gloo may still be sending an output in the background; freeing it would let it be
        # overwritten (measured on the CPU: the loss changes). Without one, the schedules wait for each send first.
        "deallocate_pipeline_outputs": parallel.pipeline_model_parallel_size > 1 and virtual is None,
    }


class LanguageModel(GPTModel):
    """GPTModel whose output layer computes logits only at the positions in `label_index`.

    In rows with images most positions have no loss, and their logits over the whole vocabulary are the largest
    computation of a step that can be skipped. With sequence parallelism the hidden states are gathered first, because
    the chosen positions are spread unevenly over the ranks.
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
            # Image embeddings are written into the full sequence before it is scattered.
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
        )
        self.num_predicted_ids = language_config.vocab_size
        self.rotates_by_table = rotates_by_table(config, backend)
        self.sorts_rows = False
        """Whether the layers treat image positions otherwise; an adapter sets it."""
        self.input_learns = True
        """Whether something before this stage's layers learns."""
        tied = language_config.share_embeddings_and_output_weights
        if pre_process and not tied:
            accumulate_in_place(self.embedding.word_embeddings)
        if post_process and not tied and not config.gradient_accumulation_fusion:
            self.output_layer: ColumnLinear = ColumnLinear.in_place_of(self.output_layer)
        if post_process and config.sequence_parallel:
            # `_select_positions` gathers the full sequence; its backward pass reduce-scatters the partial gradients.
            self.output_layer.sequence_parallel = False
            self.output_layer.disable_grad_reduce = True
        self._clear_rounding(language_config, tied)

    def _clear_rounding(self, language: LanguageConfig, tied: bool) -> None:
        """Clear the rows that round the vocabulary up; weight decay would move others."""
        weights = [self.embedding.word_embeddings.weight] if self.pre_process else []
        weights += [self.output_layer.weight] if self.post_process and not tied else []
        for weight in weights:
            clear_rows(weight, language.num_token_ids, self.pg_collection.tp.rank())

    def forward(
        self,
        decoder_input: Tensor | None,
        *,
        image_token_index: Tensor | None = None,
        labels: Tensor | None = None,
        label_index: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: Any = None,
    ) -> Tensor:
        """Run the decoder layers of this stage, and the output layer on the last one.

        GPTModel.forward has no way to pass `label_index` to the output layer, so this method calls its three steps
        directly. The positions stay an argument throughout, so a recomputed or replayed forward pass uses those of its
        own micro-batch.

        Args:
            decoder_input: float[s, b, h], the embeddings, on the first stage; None on later stages, which use
                `set_input_tensor`.
            image_token_index: int64[m], image positions in the flattened sequence [s * b]; None for no images.
            labels: int64[1, k], one per position in `label_index`; None to get logits.
            label_index: int64[k], the positions to compute logits for; None for all.
            packed_seq_params: boundaries of the samples; None for a batch of samples of equal length.
            inference_context: megatron-core's key/value cache.

        Returns:
            On the last stage, with labels: the loss of each label, float[1, k]. Without labels: logits,
            float[b, s or k, v], for the ids of the tokenizer among this rank's padded_vocab_size / tp; with a cache
            only those of the last position, over the full vocabulary. On earlier stages: hidden states.
        """
        rows = self._sort_rows(decoder_input, image_token_index)
        sequence_len_offset, received = None, self.decoder.input_tensor
        if not self.pre_process and not self.input_learns:
            self.decoder.set_input_tensor(received.detach())
        if self.rotates_by_table and inference_context is None:
            rotary_pos_emb = self._rotary_table(decoder_input, packed_seq_params)
        else:
            decoder_input, rotary_pos_emb, _, _, sequence_len_offset, _ = self._preprocess(
                None, None, decoder_input, inference_context, packed_seq_params
            )
        hidden_states = self.decoder(
            hidden_states=decoder_input,
            attention_mask=None,
            inference_context=inference_context,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            sequence_len_offset=sequence_len_offset,
            attention_bias=rows,
        )
        if not self.pre_process and not self.input_learns and received.requires_grad:
            hidden_states = end_gradient(hidden_states, received)
        if self.post_process:
            hidden_states = self._select_positions(hidden_states, label_index)
        output = self._postprocess(
            hidden_states=hidden_states,
            input_ids=None,
            position_ids=None,
            labels=labels,
            rotary_pos_emb=rotary_pos_emb,
            rotary_pos_cos=None,
            rotary_pos_sin=None,
            inference_context=inference_context,
            runtime_gather_output=True if inference_context is not None else None,
        )
        if not self.post_process or labels is not None:
            return output
        tp_rank = self.pg_collection.tp.rank() if inference_context is None else 0
        return output[..., : count_rows(output.size(-1), self.num_predicted_ids, tp_rank)]

    def _sort_rows(self, decoder_input: Tensor | None, image_token_index: Tensor | None) -> RowKinds | None:
        """Return the kinds of the rows where the layers need them, and there is an image."""
        if not self.sorts_rows or image_token_index is None or not image_token_index.numel():
            return None
        received: Any = decoder_input if self.pre_process else self.decoder.input_tensor
        length, batch_size = received.shape[:2]
        if self.config.sequence_parallel:
            length *= self.pg_collection.tp.size()
        return sort_rows(image_token_index, length * batch_size)

    def _rotary_table(self, decoder_input: Tensor | None, packed_seq_params: PackedSeqParams | None) -> Tensor:
        """Return the rotary table of this micro-batch for all layers of this stage."""
        rotary = self.rotary_pos_emb
        num_positions = rotary.get_rotary_seq_len(None, self.decoder, decoder_input, self.config)
        if isinstance(packed_seq_params, ContextParams):
            positions = packed_seq_params.position_ids
        elif packed_seq_params is None:
            positions = torch.arange(num_positions, dtype=torch.int32, device=torch.cuda.current_device())
        else:
            positions = positions_in_samples(num_positions, packed_seq_params.cu_seqlens_q)
        if rotary.inv_freq.device != positions.device:
            rotary.inv_freq = rotary.inv_freq.to(positions.device)  # once a run: megatron-core makes it on the CPU
        return rotary_table(positions, rotary.inv_freq, self.config.params_dtype)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the loss of each label, float[1, k]; megatron-core's is for a vocabulary that ranks share.

        Args:
            labels: int64[1, k].
            logits: float[k, 1, padded_vocab_size / tp]; overwritten for ids that are never predicted.
        """
        # Outside of the graph, where the gradient would be copied: it is zero at these logits anyway.
        exclude_ids(logits.detach(), self.num_predicted_ids, self.pg_collection.tp.rank())
        if self.pg_collection.tp.size() > 1 or self.config.cross_entropy_loss_fusion:
            return super().compute_language_model_loss(labels, logits)
        return cross_entropy(logits.transpose(0, 1), labels)

    def _select_positions(self, hidden_states: Tensor, label_index: Tensor | None) -> Tensor:
        """Return the hidden states at the positions to compute logits for, float[k, 1, h]."""
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states)
        return hidden_states if label_index is None else hidden_states.index_select(0, label_index)
