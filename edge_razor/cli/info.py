"""`info`: what a bundle holds."""

from __future__ import annotations

from pathlib import Path

from edge_razor.bundle import Bundle
from edge_razor.units import format_bytes

from .tables import print_pairs

__all__ = ["run", "show"]


def run(path: Path) -> None:
    with Bundle(path) as bundle:
        show(bundle)


def show(bundle: Bundle) -> None:
    """Prints the summary table of an opened bundle."""
    manifest = bundle.manifest
    sizes = {name: spec.end - spec.begin for name, spec in bundle.tensors.items()}
    elements = {name: size // bundle.tensors[name].dtype.itemsize for name, size in sizes.items()}
    trained = sum(elements[name] for name in manifest.trainable)
    rows = [("bundle", str(bundle.path)), ("made by", manifest.producer)]
    for spec in manifest.inputs:
        rows.append((f"input {spec.name}", " x ".join(["N", *map(str, spec.shape)])))
    rows.append((f"output {manifest.output.name}", " x ".join(["N", *map(str, manifest.output.shape)])))
    smoothing = f", label smoothing {manifest.label_smoothing:g}" if manifest.label_smoothing else ""
    rows.append(("loss", manifest.loss + smoothing))
    rows.append(
        ("weights", f"{len(sizes)} tensors, {sum(elements.values()):,} values, {format_bytes(sum(sizes.values()))}")
    )
    rows.append(("trainable", f"{manifest.trainable_spec}: {len(manifest.trainable)} tensors, {trained:,} values"))
    if manifest.classes is not None:
        shown = ", ".join(manifest.classes[:8]) + (", …" if len(manifest.classes) > 8 else "")
        rows.append(("classes", f"{len(manifest.classes)}: {shown}"))
    if manifest.preprocessing is not None:
        p = manifest.preprocessing
        rows.append(("images", f"shorter side {p.resize}, crop {p.crop}, {p.interpolation}"))
        rows.append(("normalization", f"mean {_numbers(p.mean)}, std {_numbers(p.std)}"))
    if manifest.text is not None:
        rows.append(("tokenizer", f"table of {manifest.text.vocabulary} tokens, padding {manifest.text.pad}"))
    if manifest.buckets:
        rows.append(("texts", " or ".join(map(str, manifest.buckets)) + " tokens"))
    if manifest.lora is not None:
        lora = manifest.lora
        rows.append(("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, on {len(lora.layers)} layers"))
    rows.append(("id", bundle.id[:16]))
    print_pairs(rows)


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{v:.3f}" for v in values)
