"""What the command line's SPEC means: ``package.module:factory``, a ``.onnx`` file, or ``hf:DIR``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edge_razor.errors import UsageError

if TYPE_CHECKING:
    import torch


def load_spec(spec: str, *, causal: bool = False, classes: int | None = None) -> torch.nn.Module | Path:
    """The model that ``spec`` names: the module that the factory returns, the path of an ONNX file, or the Hugging Face
    model in a directory (`load_hugging_face`).

    Modules are looked up in the current directory first, as ``python -m`` does.

    Raises:
        UsageError: the file, module or factory does not exist, fails, or returns something else than an nn.Module.
    """
    if spec.startswith("hf:"):
        return load_hugging_face(Path(spec.removeprefix("hf:")), causal=causal, classes=classes)
    if spec.endswith(".onnx"):
        path = Path(spec)
        if not path.is_file():
            raise UsageError(f"no such file: {spec}")
        return path
    module_name, colon, factory_name = spec.partition(":")
    if not colon or not module_name or not factory_name:
        raise UsageError(f"{spec!r} is neither a .onnx file nor package.module:factory nor hf:DIRECTORY")
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        where = f"module {error.name}" if error.name else "module"
        raise UsageError(f"cannot import {module_name} from {directory}: no {where}") from error
    except Exception as error:
        raise UsageError(f"importing {module_name} failed: {type(error).__name__}: {error}") from error
    factory: object = module
    for part in factory_name.split("."):
        if not hasattr(factory, part):
            raise UsageError(f"{module_name} has no {factory_name!r}")
        factory = getattr(factory, part)
    return _build(spec, factory)


def load_hugging_face(directory: Path, *, causal: bool = False, classes: int | None = None) -> torch.nn.Module:
    """The model that ``save_pretrained`` wrote to ``directory``, without any access to the network.

    Args:
        causal: with the head of a causal language model; else of a classifier of texts or images.
        classes: outputs of the classifier; None: as many as the model was saved with.

    Raises:
        UsageError: transformers is not installed, there is no such model, or it has no such head.
    """
    if not (directory / "config.json").is_file():
        raise UsageError(f"{directory}: holds no config.json; give the directory that save_pretrained wrote")
    try:
        import transformers
    except ImportError as error:
        raise UsageError("hf: needs the package transformers; install it beside edge-razor[export]") from error
    import torch

    heads = ("AutoModelForCausalLM",) if causal else (
        "AutoModelForSequenceClassification",
        "AutoModelForImageClassification",
    )  # fmt: skip
    options = {} if classes is None or causal else {"num_labels": classes, "ignore_mismatched_sizes": True}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        for head in heads:
            kind = getattr(transformers, head)
            if type(config) in kind._model_mapping:
                model = kind.from_pretrained(directory, local_files_only=True, dtype=torch.float32, **options)
                if getattr(model.config, "pad_token_id", None) is None:
                    model.config.pad_token_id = getattr(model.config, "eos_token_id", None)
                return model
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or ["it cannot be read"])[0]
        raise UsageError(f"{directory}: {reason}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    wanted = "causal language model" if causal else "classifier"
    raise UsageError(f"{directory}: transformers has no {wanted} of type {config.model_type}")


def _build(spec: str, factory: object) -> torch.nn.Module:
    import torch

    if isinstance(factory, torch.nn.Module):
        return factory
    if not callable(factory):
        raise UsageError(f"{spec} is a {type(factory).__name__}; it must be a function that returns an nn.Module")
    try:
        model = factory()
    except Exception as error:
        raise UsageError(f"{spec}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"{spec}() returned a {type(model).__name__}; it must return an nn.Module")
    return model
