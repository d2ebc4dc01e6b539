"""What the command line's SPEC means: ``package.module:factory`` or a ``.onnx`` file."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edge_razor.errors import UsageError

if TYPE_CHECKING:
    import torch


def load_spec(spec: str) -> torch.nn.Module | Path:
    """The model that ``spec`` names: the module that the factory returns, or the path of an ONNX file.

    Modules are looked up in the current directory first, as ``python -m`` does.

    Raises:
        UsageError: the file, module or factory does not exist, fails, or returns something else than an nn.Module.
    """
    if spec.endswith(".onnx"):
        path = Path(spec)
        if not path.is_file():
            raise UsageError(f"no such file: {spec}")
        return path
    module_name, colon, factory_name = spec.partition(":")
    if not colon or not module_name or not factory_name:
        raise UsageError(f"{spec!r} is neither a .onnx file nor package.module:factory")
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
