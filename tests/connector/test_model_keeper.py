"""The model that vLLM's loaders return is remembered, whatever else the plugin's entry point is called for."""

import pytest
import torch

from cachetier_connector import model_keeper
from cachetier_connector.model_keeper import keep_loaded_model, loaded_model


class Loaders:
    """vLLM's base class of loaders with another `load_model`, and what that was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader

        self.calls: list[tuple] = []

        class Loader(BaseModelLoader):
            def __init__(self) -> None:
                """As little as it takes."""

            def download_model(self, model_config): ...

            def load_weights(self, model, model_config): ...

        def load_model(loader, *arguments, **named):
            self.calls.append((*arguments, named))
            return torch.nn.Linear(1, len(self.calls))

        monkeypatch.setattr(BaseModelLoader, "load_model", load_model)
        monkeypatch.setattr(model_keeper, "_loaded", [])
        self.loader = Loader()


@pytest.fixture
def loaders(monkeypatch):
    return Loaders(monkeypatch)


def test_without_the_plugin_no_model_is_known(loaders):
    loaders.loader.load_model("config")
    assert loaded_model() is None


def test_the_first_model_is_remembered_and_every_loader_works_as_before(loaders):
    """Those that come after it draft for it."""
    keep_loaded_model()
    model = loaders.loader.load_model("config", prefix="p")
    assert loaded_model() is model
    drafter = loaders.loader.load_model("other")
    assert drafter is not model
    assert loaded_model() is model
    assert loaders.calls == [("config", {"prefix": "p"}), ("other", {})]


def test_a_plugin_that_is_called_again_wraps_nothing_twice(loaders):
    keep_loaded_model()
    wrapped = type(loaders.loader).load_model
    keep_loaded_model()
    assert type(loaders.loader).load_model is wrapped
