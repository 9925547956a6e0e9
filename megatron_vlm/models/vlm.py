"""The vision-language model: tower, projection and decoder; image embeddings replace their placeholders."""

from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.models.language_model import LanguageModel
from megatron_vlm.models.layers.image_parallel import ImageGroups, gather_features
from megatron_vlm.models.layers.replicas import Replicated


def merge_image_embeddings(text: Tensor, image: Tensor, image_token_index: Tensor) -> Tensor:
    """Replace placeholder embeddings by image embeddings.

    Args:
        text: float[s, b, h]; not modified.
        image: float[m, h]; all images of the micro-batch in reading order, token by token.
        image_token_index: int64[m]; position of each row of `image` in the flattened sequence [s * b].

    Returns:
        float[s, b, h] with the dtype of `text`.

    Raises:
        ValueError: text and image differ in h, or image and image_token_index in m.

    Source: LLaVA, arXiv:2304.08485, section 4.1.
    """
    if text.shape[-1] != image.shape[-1]:
        raise ValueError(f"text has hidden_size {text.shape[-1]}, image {image.shape[-1]}; check vision_projection")
    if image.size(0) != image_token_index.numel():
        raise ValueError(f"{image.size(0)} image embeddings for {image_token_index.numel()} placeholders")
    flat = text.flatten(0, 1).index_copy(0, image_token_index, image.to(text.dtype))
    return flat.view(text.shape)


class VisionLanguageModel(MegatronModule):
    """One pipeline stage of the model; the first stage holds tower, projection and embedding.

    The first stage calls tower, projection and embedding for every micro-batch, in the order in which they are
    registered, whatever the micro-batch holds: megatron-core gathers weights when a module is called and reduces
    gradients when they are ready, so all ranks of a data-parallel group must do both in one order.

    Args:
        config: megatron-core's config of the decoder; the schedules read it from the outermost module.
        vision: tower and projection; None on later stages.
        language_model: the decoder layers of this stage.
        image_size: side of the square input image of the tower [pixels].
    """

    vision_model: Replicated
    vision_projection: Replicated

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vision: tuple[Replicated, Replicated] | None,
        language_model: LanguageModel,
        image_size: int,
    ) -> None:
        super().__init__(config=config)
        if vision is not None:
            self.vision_model, self.vision_projection = vision
            self.image_groups = ImageGroups.of_this_rank(self.vision_model.groups)
        self.language_model = language_model
        self.image_size, self.tp_group = image_size, language_model.pg_collection.tp
        # megatron-core's schedules, gradient reduction and checkpoints read these from the outermost module.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = language_model.pre_process, language_model.post_process
        self.vp_stage = language_model.vp_stage
        self.share_embeddings_and_output_weights = language_model.share_embeddings_and_output_weights

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        """Set the output of the previous stage as the input of this one."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Return the embedding weights that first and last stage share, if they are tied."""
        return self.language_model.shared_embedding_or_output_weight()

    def encode_images(self, pixel_values: Tensor, num_images: int) -> Tensor:
        """Encode this rank's share of the images and gather the embeddings of all images.

        Args:
            pixel_values: uint8[share, 3, H, W]; see `gather_features` for how images are shared out.
            num_images: images of the whole micro-batch.

        Returns:
            float[num_images * p, h]; in reading order.
        """
        local = self._encode_share(pixel_values)
        return gather_features(local, num_images, self.image_groups).flatten(0, 1)

    def _encode_share(self, pixel_values: Tensor) -> Tensor:
        """Return float[share, p, h]; an empty share comes from a blank image of which nothing is kept.

        The weights are gathered for it and get gradients of zero, as those of the other ranks get theirs.
        """
        if pixel_values.size(0):
            return self.vision_projection(self.vision_model(pixel_values))
        blank = pixel_values.new_zeros((1, 3, self.image_size, self.image_size))
        return self.vision_projection(self.vision_model(blank))[:0]

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        image_token_index: Tensor,
        num_images: int,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Embed text and images; the arguments are those of `forward`.

        Returns:
            float[s, b, h]; with sequence parallelism the slice of this rank, float[s / tp, b, h].
        """
        image = self.encode_images(pixel_values, num_images)
        if image_index is not None:
            image = image.index_select(0, image_index)
        text = self.language_model.embedding(input_ids=input_ids, position_ids=None)  # [s, b, h]
        merged = merge_image_embeddings(text, image, image_token_index)
        if self.config.sequence_parallel:
            merged = scatter_to_sequence_parallel_region(merged)
        return merged

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        image_token_index: Tensor,
        *,
        num_images: int,
        labels: Tensor | None = None,
        label_index: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        image_index: Tensor | None = None,
        inference_context: object | None = None,
    ) -> Tensor:
        """Run this stage on one micro-batch.

        Args:
            input_ids: int64[b, s]; b is 1 for packed rows.
            pixel_values: uint8[share, 3, H, W]; this rank's share of the images; used on the first stage only.
            image_token_index: int64[m]; positions of the placeholders in the flattened sequence [s * b].
            num_images: images of the whole micro-batch.
            labels: int64[1, s], IGNORE_INDEX where there is no loss; None to get logits.
            label_index: int64[k]; positions with a loss; required with labels.
            packed_seq_params: boundaries of the samples; None for a batch of samples of equal length.
            image_index: int64[m]; which rows of the embeddings of all images stand there; None for all num_images * p.
            inference_context: megatron-core's key/value cache.

        Returns:
            On the last stage, with labels: the loss of each label, float[1, k]. Without labels: logits,
            float[b, s, v], see `LanguageModel.forward`. On earlier stages: hidden states.
        """
        embeddings = None
        if self.pre_process:
            embeddings = self.embed(input_ids, pixel_values, image_token_index, num_images, image_index)
        if not self.post_process:
            labels = None
        elif labels is not None and label_index is not None:
            labels = labels.index_select(1, label_index)
        return self.language_model(
            embeddings,
            image_token_index=image_token_index,
            labels=labels,
            label_index=label_index,
            packed_seq_params=packed_seq_params,
            inference_context=inference_context,
        )
