import pytest
import torch

from petals_tune.adapters.prompt import BlockPrompt, Prompt
from petals_tune.errors import RequestRefused
from petals_tune.wire.adapter import AdapterPart
from tests.raising import raises

WIDTH = 4
BLOCK = torch.nn.Identity()


def part(*shapes: tuple[int, ...], **fields) -> AdapterPart:
    return AdapterPart(block=5, method="prompt", tensors=[torch.randn(shape) for shape in shapes], **fields)


def test_prompts_have_to_fit_the_hidden_states():
    Prompt().check(part((3, WIDTH)), BLOCK, hidden_size=WIDTH)
    for wrong in ([], [(3, WIDTH + 1)], [(WIDTH,)], [(1, 3, WIDTH)], [(3, WIDTH), (3, WIDTH)]):
        with raises(RequestRefused, block=5):
            Prompt().check(part(*wrong), BLOCK, hidden_size=WIDTH)
    with raises(RequestRefused, block=5, module="mlp"):
        Prompt().check(part((3, WIDTH), module="mlp"), BLOCK, hidden_size=WIDTH)


@pytest.mark.parametrize("length", [3, 7])
def test_they_are_added_to_the_first_positions_on_servers_and_clients_alike(length):
    prompt, hidden = part((3, WIDTH)), torch.randn(2, length, WIDTH)
    expected = hidden.clone()
    expected[:, :3] += prompt.tensors[0]
    torch.testing.assert_close(Prompt().change_input(prompt, hidden, training=True), expected, rtol=0, atol=0)
    (local, kept), _ = BlockPrompt(prompt.tensors[0], "default", is_first=True).add(BLOCK, (hidden, "more"), {})
    torch.testing.assert_close(local, expected, rtol=0, atol=0)
    assert kept == "more"
    assert Prompt().least_positions(prompt) == 3


def test_a_client_sends_its_own_parameter():
    layer = BlockPrompt(torch.randn(3, WIDTH), "default", is_first=True)
    ((sent, parameters),) = Prompt().collect(layer, block=2, path="deep_prompt", names=None)
    assert (sent.block, sent.module) == (2, "")
    assert parameters[0] is layer.prompt
    assert torch.equal(sent.tensors[0], layer.prompt)
