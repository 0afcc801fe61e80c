"""The sliced InstructBLIP with a classification head, and the LoRA bridge over its cut layers."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    InstructBlipConfig,
    InstructBlipPreTrainedModel,
    InstructBlipQFormerModel,
    InstructBlipVisionModel,
    T5Model,
)
from transformers.initialization import no_init_weights
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.t5.modeling_t5 import T5Attention

from bridgeblip import InputError
from bridgeblip.bridge.base import (
    EMBEDDINGS,
    LM_HEAD,
    BridgeBlipConfig,
    open_base,
    slice_config,
    source_name,
    stored_dtype,
)
from bridgeblip.bridge.settings import DEFAULT_DECODER_LAYERS
from bridgeblip.files import without
from bridgeblip.machine import NonFiniteError, first_non_finite_module
from bridgeblip.training.losses import choice_loss


class SingleTokenSelfAttention(T5Attention):
    """T5 self-attention over a single token: a softmax over one key is 1, so only o(v(x)) is left.

    q, k and the position bias stay as weights, without work.
    """

    def forward(self, hidden_states: torch.Tensor, position_bias=None, **ignored):
        return self.o(self.v(hidden_states)), position_bias, None


class FusableSelfAttention(T5Attention):
    """T5 self-attention whose position bias (1, heads, queries, keys) has its keys side by side.

    T5 leaves the heads side by side, which every fused kernel refuses: a GPU then writes out all
    scores. The numbers are the same.
    """

    def compute_bias(self, *args, **kwargs):
        return super().compute_bias(*args, **kwargs).contiguous()


class BridgeBlipForMultipleChoice(InstructBlipPreTrainedModel):
    """InstructBLIP with a sliced decoder and a linear head over the choices where text generation
    was.

    The decoder reads one start token; its last hidden state goes to the head (EncT5, Liu et al.
    2021, is the closest precedent). Only LoRA adapters and the head are ever trained: all other
    modules stay in ``eval()``, dropout included, whatever ``train()`` says, so that cached and
    uncached features, one process and two, give the same numbers.
    """

    config: BridgeBlipConfig
    config_class = BridgeBlipConfig
    main_input_name = "pixel_values"
    _tied_weights_keys: ClassVar = {
        "language_model.encoder.embed_tokens.weight": "language_model.shared.weight",
        "language_model.decoder.embed_tokens.weight": "language_model.shared.weight",
    }
    # Of the bridge, once it is there.
    adapter_dropouts: Sequence[nn.Module] = ()
    # Share of the target that training spreads evenly over the choices that exist.
    label_smoothing = 0.0
    accepts_loss_kwargs = (
        False  # the loss is a mean over the batch: Trainer must divide by the accumulation steps
    )

    def __init__(self, config: BridgeBlipConfig):
        super().__init__(config)
        self.vision_model = InstructBlipVisionModel._from_config(config.vision_config)
        self.query_tokens = nn.Parameter(
            torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size)
        )
        self.qformer = InstructBlipQFormerModel._from_config(config.qformer_config)
        self.language_projection = nn.Linear(
            config.qformer_config.hidden_size, config.text_config.hidden_size
        )
        for linear in [*self.qformer.modules(), self.language_projection]:
            if isinstance(linear, nn.Linear):
                linear.register_forward_pre_hook(_make_contiguous)
        self.language_model = T5Model._from_config(config.text_config)
        first, *_ = self.language_model.encoder.block  # the others take its bias
        first.layer[0].SelfAttention.__class__ = FusableSelfAttention
        for block in self.language_model.decoder.block:
            block.layer[0].SelfAttention.__class__ = SingleTokenSelfAttention
        self.head = nn.Linear(config.text_config.hidden_size, config.num_choices)
        self.loss_type = (
            "ForSequenceClassification"  # transformers guesses it from the class name, and warns
        )
        self.post_init()
        self.eval()

    def train(self, mode: bool = True):
        """Set the training flag; of the modules below, only the adapters' dropout follows it.

        Returns at once if nothing changes: walking two thousand modules costs a step more time than
        a GPU needs for it. Adapters that were put on since begin in training mode, so as long as
        none is known all modules are looked at.
        """
        if mode == self.training and self.adapter_dropouts:
            return self
        super().train(False)
        self.training = mode
        named = self.named_modules()
        self.adapter_dropouts = [module for name, module in named if "lora_dropout" in name]
        for module in self.adapter_dropouts:
            module.train(mode)
        return self

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the vision tower: (B, 3, S, S) normalised pictures to (B, patches + 1, vision
        width)."""
        dtype = self.vision_model.embeddings.patch_embedding.weight.dtype
        return self.vision_model(pixel_values=pixel_values.to(dtype)).last_hidden_state

    def encode(
        self,
        image_embeds: torch.Tensor,
        qformer_input_ids: torch.Tensor,
        qformer_attention_mask: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Return the encoder's states (B, queries + L, T5 width): all that the decoder sees of a
        question.

        Args:
            image_embeds: (B, patches + 1, vision width), from ``encode_image``.
            qformer_input_ids: (B, Lq) prompt in the Q-Former's vocabulary; its mask is 1 on real
                tokens.
            input_ids: (B, queries + L) image placeholders and prompt in T5's vocabulary; mask
                likewise.
        """
        queries = self.query_tokens.expand(image_embeds.shape[0], -1, -1)
        query_mask = qformer_attention_mask.new_ones(queries.shape[:2])
        seen_mask = torch.cat([query_mask, qformer_attention_mask], dim=1)
        like_seen = image_embeds[:, :1].expand(-1, seen_mask.shape[1], -1)
        # The instruction goes to the Q-Former as well: this is what makes it InstructBLIP and not
        # BLIP-2.
        seen = self.qformer(
            input_ids=qformer_input_ids,
            attention_mask=_attention_mask(self.qformer, like_seen, seen_mask),
            query_embeds=queries,
            encoder_hidden_states=image_embeds,
        ).last_hidden_state[:, : queries.shape[1]]
        pictured = self.language_projection(seen)  # (B, queries, T5 width)
        embeds = self.get_input_embeddings()(input_ids)
        is_image = (input_ids == self.config.image_token_index).unsqueeze(-1)
        embeds = embeds.masked_scatter(is_image, pictured.to(embeds.dtype))
        return self.language_model.encoder(
            inputs_embeds=embeds,
            attention_mask=_attention_mask(self.language_model, embeds, attention_mask),
        ).last_hidden_state

    def decode(self, encoder_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, choices) of what ``encode`` gives; the mask is that of
        ``input_ids``."""
        start = torch.full(
            (encoder_states.shape[0], 1),
            self.config.text_config.decoder_start_token_id,
            dtype=torch.long,
            device=encoder_states.device,
        )
        decoded = self.language_model.decoder(
            input_ids=start,
            encoder_hidden_states=encoder_states,
            encoder_attention_mask=_attention_mask(
                self.language_model, encoder_states[:, :1], attention_mask, encoder_states
            ),
            use_cache=False,
        ).last_hidden_state  # (B, 1, T5 width)
        return self.head(decoded[:, 0].to(self.head.weight.dtype))

    def score(
        self,
        image_embeds: torch.Tensor,
        qformer_input_ids: torch.Tensor,
        qformer_attention_mask: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Return the logits (B, choices) of questions about encoded pictures; takes what ``encode``
        does."""
        states = self.encode(
            image_embeds, qformer_input_ids, qformer_attention_mask, input_ids, attention_mask
        )
        return self.decode(states, attention_mask)

    def forward(
        self,
        attention_mask: torch.Tensor,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        encoder_states: torch.Tensor | None = None,
        choice_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Return logits (B, choices), in fp32, and the mean cross-entropy if ``labels`` (B,) are
        given.

        Pictures come as ``pixel_values`` or already encoded as ``image_embeds``; pictures and
        prompts together already encoded as ``encoder_states``. Where ``choice_mask`` (B, choices)
        is False there is no such choice: its logit is minus infinity.

        Raises:
            NonFiniteError: if a logit is not finite; not while training, where asking would wait
                for the GPU in every step, and the loss tells.
        """
        texts = (qformer_input_ids, qformer_attention_mask, input_ids, attention_mask)

        def run() -> torch.Tensor:
            states = encoder_states
            if states is None:
                embeds = self.encode_image(pixel_values) if image_embeds is None else image_embeds
                states = self.encode(embeds, *texts)
            return self.decode(states, attention_mask).float()

        with without_autocast(self):
            logits = run()
            if not self.training and not torch.isfinite(logits).all():
                raise NonFiniteError(
                    f"the logits are not finite; the first module with a NaN or infinite output is "
                    f"{first_non_finite_module(self, run)!r}. In float16, use bfloat16 or float32; "
                    f"while training, lower the learning rate."
                )
        if choice_mask is not None:
            logits = logits.masked_fill(~choice_mask, float("-inf"))
        smoothing = self.label_smoothing if self.training else 0.0
        loss = choice_loss(logits, labels, smoothing) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _make_contiguous(linear: nn.Linear, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """The Q-Former cuts queries and text out of one tensor. Of a linear that is given such a slice,
    torch copies the weights for every row of the batch, and in bfloat16 it rounds before the bias,
    too, unless the batch has one row."""
    return (inputs[0].contiguous(),)


def _attention_mask(
    module: nn.Module, queries: torch.Tensor, mask: torch.Tensor, keys: torch.Tensor | None = None
) -> torch.Tensor:
    """A mask (B, L) of 0 and 1 in the form that ``module`` attends with. Made by transformers
    itself, it would first be read back to see whether there is any padding."""
    return create_bidirectional_mask(
        module.config,
        queries,
        mask,
        encoder_hidden_states=keys,
        allow_is_bidirectional_skip=False,
    )


def without_autocast(model: nn.Module) -> torch.autocast:
    """Every weight has the format it computes well in: autocast would take T5's ``wo`` from fp32
    back to fp16, where it overflows."""
    return torch.autocast(next(model.parameters()).device.type, enabled=False)


AutoConfig.register("bridgeblip", BridgeBlipConfig)
AutoModel.register(BridgeBlipConfig, BridgeBlipForMultipleChoice)


def empty_model(config: BridgeBlipConfig) -> BridgeBlipForMultipleChoice:
    """Return the sliced model without any weight in memory: names and shapes only."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        return BridgeBlipForMultipleChoice(config)


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of an unbridged model by name, the shared embeddings once."""
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if "embed_tokens" not in name}


def load_sliced(
    base: str | Path,
    letter_ids: Sequence[int],
    layers: Sequence[int] = DEFAULT_DECODER_LAYERS,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> BridgeBlipForMultipleChoice:
    """Return the sliced model, reading only the kept tensors; nothing is trained yet.

    The cut decoder layers never exist in memory, nor does the LM head but for the rows of
    ``letter_ids``, one row a choice, which start the head.
    In half precision the head stays in fp32, in fp16 T5's overflowing products too.

    Raises:
        InputError: if the layers can't be kept, or the base is no InstructBLIP with a T5 or lacks a
            tensor.
    """
    reader = open_base(base, revision, device)
    config = slice_config(InstructBlipConfig.from_pretrained(reader.folder), layers)
    model = empty_model(config)
    own = without(own_parameters(model), "head.weight", "head.bias")
    source_of = {name: source_name(name, config.kept_decoder_layers) for name in own}
    read = reader.read(list(source_of.values()), lambda name: stored_dtype(name, dtype))
    state = {name: read.pop(source) for name, source in source_of.items()}
    for name, parameter in own.items():
        if state[name].shape != parameter.shape:
            raise InputError(
                f"tensor {source_of[name]!r} of the base has shape {tuple(state[name].shape)}; "
                f"its config.json asks for {tuple(parameter.shape)}"
            )
    state |= _start_head(reader, config, letter_ids, dtype)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if unexpected or any("embed_tokens" not in name for name in missing):
        raise RuntimeError(f"slicing left tensors over: missing {missing}, unexpected {unexpected}")
    model.language_model.set_input_embeddings(model.language_model.shared)
    model.requires_grad_(False)
    return model.to(device).eval()  # moves the few buffers; all weights are there


def _start_head(reader, config, letter_ids, dtype) -> dict[str, torch.Tensor]:
    if len(letter_ids) != config.num_choices:
        raise InputError(
            f"{len(letter_ids)} letter ids for {config.num_choices} choices: expected one each"
        )
    tied = LM_HEAD not in reader.shard_of and config.text_config.tie_word_embeddings
    weight = reader.read_rows(EMBEDDINGS if tied else LM_HEAD, letter_ids)
    if config.text_config.scale_decoder_outputs:  # T5 1.0, with a tied LM head
        weight = weight * config.text_config.d_model**-0.5
    kept = stored_dtype("head.weight", dtype)
    return {
        "head.weight": weight.to(kept),
        "head.bias": torch.zeros(config.num_choices, device=weight.device, dtype=kept),
    }
