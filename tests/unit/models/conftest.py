"""Configurations of every family."""

import pytest

from tests.tiny_models import MODELS, tiny_config


@pytest.fixture
def make_config():
    """Return a function (name of a tiny model, **overrides) -> configuration, of four layers."""
    return lambda name, **sizes: tiny_config(name, **{"num_hidden_layers": 4, **sizes})


@pytest.fixture(params=MODELS)
def hf_config(request):
    return tiny_config(request.param)
