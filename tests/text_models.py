"""Small language models of Hugging Face's transformers, randomly initialized, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, TOKENS, CLASSES = 97, 72, 5


def _made(kind: type, config: Any, attention: str) -> nn.Module:
    config._attn_implementation = attention
    torch.manual_seed(3)
    return kind(config).eval()  # type: ignore[no-any-return]


def bert(attention: str = "sdpa", **changes: Any) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=80,
        num_labels=CLASSES,
        initializer_range=0.2,
        **changes,
    )
    return _made(transformers.BertForSequenceClassification, config, attention)


def distilbert(attention: str = "sdpa", **changes: Any) -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=80,
        num_labels=CLASSES,
        initializer_range=0.2,
        **changes,
    )
    return _made(transformers.DistilBertForSequenceClassification, config, attention)


def gpt2(attention: str = "sdpa", **changes: Any) -> nn.Module:
    """Input and output embeddings are one tensor."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=80,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
        **changes,
    )
    return _made(transformers.GPT2LMHeadModel, config, attention)


def llama(attention: str = "sdpa", **changes: Any) -> nn.Module:
    """Rotary positions, RMSNorm, SwiGLU and grouped-query attention."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=80,
        initializer_range=0.2,
        **changes,
    )
    return _made(transformers.LlamaForCausalLM, config, attention)


def vit(attention: str = "sdpa", **changes: Any) -> nn.Module:
    """65 tokens: its mask, which hides nothing, is too large for constant folding."""
    config = transformers.ViTConfig(
        image_size=64,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=CLASSES,
        initializer_range=0.2,
        **changes,
    )
    return _made(transformers.ViTForImageClassification, config, attention)


def gpt2_classifier(attention: str = "sdpa", **changes: Any) -> nn.Module:
    """Classifies by the logits of the last token that is no padding (token 0)."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=1,
        n_head=4,
        n_positions=80,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        num_labels=CLASSES,
        initializer_range=0.2,
        **changes,
    )
    return _made(transformers.GPT2ForSequenceClassification, config, attention)


def llama_classifier(attention: str = "sdpa", **changes: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=80,
        pad_token_id=3,
        num_labels=CLASSES,
        initializer_range=0.2,
        **changes,
    )
    return _made(transformers.LlamaForSequenceClassification, config, attention)


class LastToken(nn.Module):
    """A classifier that finds the last token by the length of its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = torch.relu(self.body(self.table(input_ids)))
        return self.head(x[torch.arange(x.shape[0]), attention_mask.sum(1) - 1])


class MeanPooled(nn.Module):
    """A sentence encoder: the mean over the tokens that the mask leaves, then a linear layer."""

    def __init__(self, attention: str = "sdpa") -> None:
        super().__init__()
        self.encoder = bert(attention).bert
        self.encoder.pooler = None
        self.head = nn.Linear(32, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).expand(hidden.size()).float()
        return self.head((hidden * mask).sum(1) / torch.clamp(mask.sum(1), min=1e-9))


def mean_pooled(attention: str = "sdpa") -> nn.Module:
    return _made(lambda config: MeanPooled(attention), transformers.BertConfig(), attention)


MODELS: dict[str, Callable[[str], nn.Module]] = {
    "bert": bert,
    "distilbert": distilbert,
    "mean_pooled": mean_pooled,
    "gpt2": gpt2,
    "llama": llama,
    "vit": vit,
}
CAUSAL = ("gpt2", "llama")


def batch(name: str, samples: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """(inputs, targets): texts of several lengths, padded behind, targets of padding −100 for causal models."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        images = torch.randn(samples, 3, 64, 64, generator=generator)
        return {"pixel_values": images}, torch.randint(0, CLASSES, (samples,), generator=generator)
    ids = torch.randint(0, VOCABULARY, (samples, TOKENS), generator=generator)
    mask = torch.ones(samples, TOKENS, dtype=torch.int64)
    for sample in range(1, samples):
        mask[sample, int(torch.randint(3, TOKENS + 1, (), generator=generator)) :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name in CAUSAL:
        return inputs, torch.randint(0, VOCABULARY, ids.shape, generator=generator).where(mask == 1, -100)
    return inputs, torch.randint(0, CLASSES, (samples,), generator=generator)
