"""The peers of `train_step.py`: other ways to do the same optimizer step from the same weights and micro-batches.

All take the rows as packed micro-batches (`VLMBatch`), and tensors under their Hugging Face names. Each trains with
gradient accumulation over the rows of a step, a loss summed over labels and divided by the labels of the whole step,
clipping, and AdamW.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vlm.config import IGNORE_INDEX, ModelConfig, OptimizerConfig
from megatron_vlm.config.towers.clip import Config as ClipConfig
from megatron_vlm.convert.families import clip, llama
from megatron_vlm.data.loading.batch import VLMBatch

Kind = Literal["llava", "llava_small", "dense_mask", "label_logits", "plain"]
NAMES: dict[Kind, str] = {
    "llava": "LLaVA's loop, 16 samples a batch",
    "llava_small": "LLaVA's loop, 4 samples a batch",
    "dense_mask": "transformers packed, dense mask",
    "label_logits": "transformers packed, logits at labels",
    "plain": "plain PyTorch",
}
TRANSFORMERS: tuple[Kind, ...] = ("llava", "llava_small", "dense_mask", "label_logits")
# LLaVA's recipes have 16 and more on a GPU. Fewer pad less, but are more backward passes.
_LLAVA_BATCHES: dict[Kind, int] = {"llava": 16, "llava_small": 4}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all ways to do a step have in common."""

    model: ModelConfig
    optimizer: OptimizerConfig
    freeze_tower: bool


class Peer:
    """One way to do a step."""

    def __init__(self, kind: Kind, setting: Setting, weights: dict[str, dict[str, Tensor]]) -> None:
        assert isinstance(setting.model.vision, ClipConfig)
        self.kind, self.setting = kind, setting
        self.projection = _Projection(setting.model)
        self.projection.load_state_dict(weights["projection"])
        self.tower: nn.Module
        self.decoder: Any
        language = weights["language"]
        # As ours, no peer predicts the placeholder of images or padding.
        language["lm_head.weight"] = language["lm_head.weight"][: setting.model.language.vocab_size]
        if kind == "plain":
            self.tower, self.decoder = _PlainTower(setting.model.vision), _PlainDecoder(setting.model)
            self.tower.load_state_dict(_join_projections(weights["vision"], ("q_proj", "k_proj", "v_proj"), "qkv"))
            joined = _join_projections(language, ("q_proj", "k_proj", "v_proj"), "qkv")
            self.decoder.load_state_dict(_join_projections(joined, ("gate_proj", "up_proj"), "gate_up"))
        else:
            self.tower, self.decoder = _HuggingFaceTower(setting.model.vision), _hugging_face_decoder(setting.model)
            self.tower.tower.load_state_dict(weights["vision"], strict=False)
            self.decoder.load_state_dict(language)
        self.tower.requires_grad_(not setting.freeze_tower)
        self.parameters = [p for part in (self.tower, self.projection, self.decoder) for p in part.parameters()]
        self.parameters = [p for p in self.parameters if p.requires_grad]
        settings = setting.optimizer
        self.adam = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
            # LLaVA's Trainer uses "adamw_torch", which on the CPU updates one parameter after the other.
            fused=kind in ("label_logits", "plain"),
        )

    def step(self, batches: Sequence[VLMBatch]) -> tuple[float, float]:
        """Do one optimizer step over the micro-batches and return loss and gradient norm."""
        num_labels = sum(batch.label_index.numel() for batch in batches)
        total = torch.zeros(())
        for loss_sum in self._losses(batches):
            loss = loss_sum / num_labels
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.setting.optimizer.clip_grad)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return float(total), float(norm)

    def _losses(self, batches: Sequence[VLMBatch]) -> Iterator[Tensor]:
        """Yield the summed loss of each batch of this way."""
        if self.kind in _LLAVA_BATCHES:
            size, samples = _LLAVA_BATCHES[self.kind], self._samples(batches)
            yield from (self._loss_llava(samples[start : start + size]) for start in range(0, len(samples), size))
        else:
            yield from (getattr(self, f"_loss_{self.kind}")(batch) for batch in batches)

    def _samples(self, batches: Sequence[VLMBatch]) -> list["_Sample"]:
        """Return the samples of all rows, one by one."""
        language, samples = self.setting.model.language, []
        per_image = self.setting.model.fixed_image_tokens("the benchmark")
        for batch in batches:
            assert batch.pixel_values is not None
            lengths, used = batch.cu_seqlens.diff().tolist(), 0
            for ids, labels in zip(batch.input_ids[0].split(lengths), batch.labels[0].split(lengths), strict=True):
                if int(ids[0]) != language.pad_token_id:
                    images = int((ids == language.image_token_id).sum()) // per_image
                    samples.append(_Sample(ids, labels, batch.pixel_values[used : used + images]))
                    used += images
        return samples

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return float[num_images, p, h]."""
        vision = self.setting.model.vision
        assert isinstance(vision, ClipConfig)
        mean, std = (torch.tensor(value).view(3, 1, 1) * 255 for value in (vision.image_mean, vision.image_std))
        pixels = (pixel_values.float() - mean) / std
        with torch.set_grad_enabled(not self.setting.freeze_tower):
            features = self.tower(pixels)
        return self.projection(features)

    def _embed_packed(self, batch: VLMBatch, embedding: nn.Module) -> Tensor:
        """Return float[t, h]."""
        text = embedding(batch.input_ids[0])
        if batch.pixel_values is None or not batch.num_images:
            return text
        return text.index_copy(0, batch.image_token_index, self.encode_images(batch.pixel_values).flatten(0, 1))

    def _loss_plain(self, batch: VLMBatch) -> Tensor:
        lengths = batch.cu_seqlens.diff().tolist()
        hidden = self.decoder(self._embed_packed(batch, self.decoder.embed_tokens), lengths)
        return self._loss_at_labels(hidden, batch)

    def _loss_at_labels(self, hidden: Tensor, batch: VLMBatch) -> Tensor:
        logits = self.decoder.lm_head(hidden.index_select(0, batch.label_index))
        return F.cross_entropy(logits, batch.labels[0, batch.label_index], reduction="sum")

    def _loss_dense_mask(self, batch: VLMBatch) -> Tensor:
        arguments = self._packed_arguments(batch)
        output = self.decoder(**arguments, labels=_unshifted(batch.labels[0])[None], num_items_in_batch=1)
        return output.loss

    def _loss_label_logits(self, batch: VLMBatch) -> Tensor:
        hidden = self.decoder.model(**self._packed_arguments(batch)).last_hidden_state[0]
        return self._loss_at_labels(hidden, batch)

    def _packed_arguments(self, batch: VLMBatch) -> dict[str, Any]:
        lengths = batch.cu_seqlens.diff().long()
        segments = torch.arange(len(lengths)).repeat_interleave(lengths)
        mask = (segments[:, None] == segments[None]).tril()[None, None]
        positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
        embeddings = self._embed_packed(batch, self.decoder.model.embed_tokens)
        return {"inputs_embeds": embeddings[None], "attention_mask": mask, "position_ids": positions[None]}

    def _loss_llava(self, samples: Sequence["_Sample"]) -> Tensor:
        """LLaVA's prepare_inputs_labels_for_multimodal: embeddings are concatenated sample by sample, then padded."""
        image_token_id = self.setting.model.language.image_token_id
        per_image = self.setting.model.fixed_image_tokens("the benchmark")
        pixels = torch.cat([sample.pixel_values for sample in samples])
        images = iter(self.encode_images(pixels)) if len(pixels) else iter(())
        embeddings = [self._embed_sample(sample.input_ids, images, image_token_id, per_image) for sample in samples]
        padded = nn.utils.rnn.pad_sequence(embeddings, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(one)) for one in embeddings], batch_first=True).bool()
        targets = [_unshifted(sample.labels) for sample in samples]
        labels = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX)
        return self.decoder(inputs_embeds=padded, attention_mask=mask, labels=labels, num_items_in_batch=1).loss

    def _embed_sample(self, ids: Tensor, images: Any, image_token_id: int, per_image: int) -> Tensor:
        is_image = ids == image_token_id
        text = self.decoder.model.embed_tokens(ids[~is_image])
        pieces, taken, position = [], 0, 0
        while position < len(ids):
            if is_image[position]:
                pieces.append(next(images))
                position += per_image
                continue
            following = is_image[position:].nonzero()
            length = int(following[0]) if len(following) else len(ids) - position
            pieces.append(text[taken : taken + length])
            taken, position = taken + length, position + length
        return torch.cat(pieces)


class _Sample(NamedTuple):
    """A sample with its labels and its images."""

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor


def _unshifted(labels: Tensor) -> Tensor:
    """Return the labels where transformers wants them, which shifts them itself: each at the position of its token."""
    return torch.cat([labels.new_full((1,), IGNORE_INDEX), labels[:-1]])


class _Projection(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(model.vision.feature_size, model.language.hidden_size)
        self.linear_2 = nn.Linear(model.language.hidden_size, model.language.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class _HuggingFaceTower(nn.Module):
    def __init__(self, vision: ClipConfig) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        self.tower = CLIPVisionModel(CLIPVisionConfig(**clip.config_to_hf(vision), attn_implementation="sdpa"))
        self.tower.vision_model.post_layernorm.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def _hugging_face_decoder(model: ModelConfig) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    language = model.language
    settings = {**llama.config_to_hf(language), "use_cache": False}
    decoder = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="sdpa"))
    decoder.lm_head = nn.Linear(language.hidden_size, language.vocab_size, bias=False)
    decoder.config.vocab_size = language.vocab_size
    return decoder


def _join_projections(tensors: dict[str, Tensor], parts: tuple[str, ...], name: str) -> dict[str, Tensor]:
    """Join matrices that are multiplied with the same input, so that there is one product."""
    joined = {key: value for key, value in tensors.items() if not any(f".{part}." in key for part in parts)}
    for key in tensors:
        if f".{parts[0]}." in key:
            theirs = [tensors[key.replace(parts[0], part)] for part in parts]
            joined[key.replace(parts[0], name)] = torch.cat(theirs)
    return joined


class _PlainAttention(nn.Module):
    def __init__(self, hidden_size: int, heads: int, *, bias: bool, output: str) -> None:
        super().__init__()
        self.heads, self.output = heads, output
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=bias)
        self.add_module(output, nn.Linear(hidden_size, hidden_size, bias=bias))

    def project(self, x: Tensor) -> Tensor:
        return getattr(self, self.output)(x)


class _PlainDecoderAttention(_PlainAttention):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        both, value = self.qkv(x).view(len(x), 3, self.heads, -1).split([2, 1], dim=1)  # [t, 2 or 1, n, d]
        (query, key), value = _rotate(both, cos, sin).unbind(1), value[:, 0]
        outputs = [
            F.scaled_dot_product_attention(*(s.transpose(0, 1)[None] for s in sample), is_causal=True)
            for sample in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        ]
        return self.project(torch.cat([one[0].transpose(0, 1) for one in outputs]).flatten(1))


class _PlainTowerAttention(_PlainAttention):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [b, n, s, d]
        return self.project(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class _PlainMLP(nn.Module):
    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class _PlainDecoderLayer(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        language = model.language
        self.input_layernorm = nn.RMSNorm(language.hidden_size, language.layernorm_epsilon)
        self.post_attention_layernorm = nn.RMSNorm(language.hidden_size, language.layernorm_epsilon)
        self.self_attn = _PlainDecoderAttention(
            language.hidden_size, language.num_attention_heads, bias=False, output="o_proj"
        )
        self.mlp = _PlainMLP(language.hidden_size, language.ffn_hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, lengths)
        return x + self.mlp(self.post_attention_layernorm(x))


class _PlainDecoder(nn.Module):
    """A Llama decoder under Hugging Face's names, with joined projections."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        language = model.language
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(language.num_token_ids, language.hidden_size)
        self.model.layers = nn.ModuleList(_PlainDecoderLayer(model) for _ in range(language.num_layers))
        self.model.norm = nn.RMSNorm(language.hidden_size, language.layernorm_epsilon)
        self.lm_head = nn.Linear(language.hidden_size, language.vocab_size, bias=False)
        channels = language.head_channels
        frequencies = language.rotary_base ** -(torch.arange(0, channels, 2).float() / channels)
        angles = torch.outer(torch.arange(language.max_position_embeddings).float(), frequencies).repeat(1, 2)
        self.cos, self.sin = angles.cos()[:, None, None], angles.sin()[:, None, None]

    @property
    def embed_tokens(self) -> nn.Module:
        return self.model.embed_tokens

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        positions = torch.cat([torch.arange(length) for length in lengths])
        cos, sin = self.cos[positions], self.sin[positions]
        for layer in self.model.layers:
            x = layer(x, cos, sin, lengths)
        return self.model.norm(x)


class _PlainTowerLayer(nn.Module):
    def __init__(self, vision: ClipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(vision.hidden_size, vision.layernorm_epsilon)
        self.layer_norm2 = nn.LayerNorm(vision.hidden_size, vision.layernorm_epsilon)
        self.self_attn = _PlainTowerAttention(
            vision.hidden_size, vision.num_attention_heads, bias=True, output="out_proj"
        )
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(vision.hidden_size, vision.ffn_hidden_size)
        self.mlp.fc2 = nn.Linear(vision.ffn_hidden_size, vision.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        hidden = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))


class _PlainTower(nn.Module):
    """A CLIP tower under Hugging Face's names, with joined projections."""

    def __init__(self, vision: ClipConfig) -> None:
        super().__init__()
        self.vision_model = tower = nn.Module()
        tower.embeddings = nn.Module()
        tower.embeddings.class_embedding = nn.Parameter(torch.empty(vision.hidden_size))
        tower.embeddings.patch_embedding = nn.Conv2d(
            3, vision.hidden_size, vision.patch_size, vision.patch_size, bias=False
        )
        tower.embeddings.position_embedding = nn.Embedding(vision.position_grid**2 + 1, vision.hidden_size)
        tower.pre_layrnorm = nn.LayerNorm(vision.hidden_size, vision.layernorm_epsilon)
        tower.encoder = nn.Module()
        tower.encoder.layers = nn.ModuleList(_PlainTowerLayer(vision) for _ in range(vision.num_layers_run))

    def forward(self, pixels: Tensor) -> Tensor:
        tower = self.vision_model
        patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        classes = tower.embeddings.class_embedding.expand(len(patches), 1, -1)
        x = torch.cat([classes, patches], dim=1) + tower.embeddings.position_embedding.weight
        x = tower.pre_layrnorm(x)
        for layer in tower.encoder.layers:
            x = layer(x)
        return x[:, 1:]
