import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from petals_tune.adapters import METHODS
from petals_tune.adapters.base import linear_features


def test_methods_are_registered_by_their_names_on_the_wire():
    names = ("lora", "expert_lora", "ia3", "prompt")
    assert {name: method.name for name, method in METHODS.items()} == {name: name for name in names}


def test_features_of_linears_of_every_kind():
    assert linear_features(nn.Linear(4, 3)) == (4, 3)
    assert linear_features(Conv1D(3, 4)) == (4, 3)
    assert linear_features(nn.Embedding(4, 3)) is None
    with torch.device("meta"):
        assert linear_features(nn.Linear(4, 3)) == (4, 3)
