"""Keeps a reference to the model that vLLM loads in this process, which a connector is not given.

A connector is made after the model was loaded; the `vllm.general_plugins` entry point runs before it.
"""

import torch

_MARK = "is_kept_by_cachetier"
_loaded: list[torch.nn.Module] = []


def keep_loaded_model() -> None:
    """From now on, remember the model that vLLM's loaders return. May be called repeatedly."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    original = BaseModelLoader.load_model
    if getattr(original, _MARK, False):
        return

    def load_model(self: BaseModelLoader, *arguments: object, **named: object) -> torch.nn.Module:
        model: torch.nn.Module = original(self, *arguments, **named)
        _loaded[:] = _loaded or [model]  # the first: drafters of speculative decoding come after the model itself
        return model

    setattr(load_model, _MARK, True)
    BaseModelLoader.load_model = load_model


def loaded_model() -> torch.nn.Module | None:
    """Return this process's model; None: the plugin did not run before it was loaded."""
    return _loaded[0] if _loaded else None
