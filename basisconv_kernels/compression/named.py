"""A user's network, by ``module:function``, and its trained weights, from files that are read without running code."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn


def read_weights(path: Path) -> dict[str, Tensor]:
    """The ``state_dict`` in a file, without running any code of it.

    Accepted are safetensors files, and files of ``torch.save`` that hold a ``state_dict`` or a mapping with one under
    the key ``state_dict``; a ``module.`` in front of every name is removed.

    Args:
        path (Path): ``*.safetensors``; any other ending is read with ``torch.load(weights_only=True)``.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            found: Any = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to load the file unsafely, which no message of ours passes on.
        raise ValueError(
            f"weights: {path.name} holds something else than plain tensors, which is not loaded"
        ) from error
    except (safetensors.SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"weights: {path.name} cannot be read: {first_line(error)}") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"weights: {path.name} must hold a state_dict, names and tensors")
    prefixed = all(name.startswith("module.") for name in found)
    return {name.removeprefix("module.") if prefixed else name: value for name, value in found.items()}


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill a network from a file; every name and shape must fit.

    Raises:
        ValueError: they do not; names the first of them.
    """
    state = read_weights(path)
    own = network.state_dict()
    wrong = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"weights: {path.name} does not fit: {name} is {list(state[name].shape)} in the file and "
            f"{list(own[name].shape)} in the network ({len(wrong)} such)"
        )
    missing, unexpected = network.load_state_dict(state, strict=False)
    if missing or unexpected:
        parts = [f"the file lacks {_some(missing)}"] if missing else []
        parts += [f"the network has no {_some(unexpected)}"] if unexpected else []
        raise ValueError(f"weights: {path.name} does not fit: {'; '.join(parts)}")


def from_function(name: str, weights: Path | None) -> nn.Module:
    """The network that a user's function without arguments returns, in eval mode, its weights from a file if given.

    Args:
        name (str): ``"package.module:function"``, importable from here or from the working directory. Random initial
            weights are those of seed 0.
        weights (Path, optional): as for ``read_weights``.

    Raises:
        ImportError, TypeError, ValueError: what is wrong with the function or the file.
    """
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(f"--model: {module_name!r} cannot be imported from here: {error}") from error
    finally:
        sys.path.pop(0)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ImportError(f"--model: module {module_name!r} has no function {attribute!r}")
    torch.manual_seed(0)
    model = function()
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model: {name} must return a torch.nn.Module, it returned a {type(model).__name__}")
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
