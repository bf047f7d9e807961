"""What the Petals API promises, by the servers' own code in this process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from petals_tune import DistributedBloomForCausalLM
from petals_tune.errors import ConfigError
from petals_tune.tuning.deep_prompt import deep_prompts
from tests.models import BLOCKS, VOCABULARY, masks, plain_model, relative_error
from tests.raising import raises

TOLERANCE = 1e-5
ROWS, LENGTH, PROMPT = 3, 8, 4
IDS = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def calls(model: Any) -> int:
    return model.remote_blocks.stats.calls


@pytest.mark.parametrize("tuning_mode", ["ptune", "deep_ptune"])
def test_the_example_of_the_petals_readme_runs_and_learns(folder, tuning_mode):
    torch.manual_seed(0)
    model = DistributedBloomForCausalLM.from_pretrained(
        str(folder), tuning_mode=tuning_mode, pre_seq_len=PROMPT, initial_peers=[]
    )
    try:
        inputs = IDS[:1]
        outputs = model.generate(inputs, max_new_tokens=5)
        assert torch.equal(outputs[:, :LENGTH], inputs)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        losses, before = [], calls(model)
        for input_ids, labels in [(IDS, IDS)] * 4:
            optimizer.zero_grad()
            logits = model.forward(input_ids).logits
            assert logits.shape == (ROWS, LENGTH, VOCABULARY), "without the prompt's positions"
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        steps = 4 * 2 * 2  # four steps, two servers, forward and backward: one micro-batch and no call besides
        uploads = (4 + 4) * 2 if tuning_mode == "deep_ptune" else 0  # a new version at each step, and its gradients
        assert calls(model) - before <= steps + uploads
        assert model.remote_blocks.stats.recomputations == 0
        prompts = deep_prompts(model.get_base_model())
        assert (prompts is not None and bool(prompts.any())) == (tuning_mode == "deep_ptune")
    finally:
        model.remote_blocks.close()


# Custom paths: the blocks as a module of their own.


def hidden_states() -> torch.Tensor:
    return torch.randn(ROWS, LENGTH, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_slices_of_slices_and_single_blocks_run_the_same_blocks(model):
    blocks, hidden = model.remote_blocks, hidden_states()
    wanted = blocks(hidden)
    one_by_one = hidden
    for block in blocks:
        one_by_one = block(one_by_one)
    pieces = blocks[1:6][2:5](blocks[1:3](blocks[:1](hidden)))
    assert relative_error(one_by_one, wanted) <= TOLERANCE
    assert relative_error(pieces, wanted) <= TOLERANCE
    assert [len(blocks), len(blocks[1:4]), len(list(blocks[1:4]))] == [BLOCKS, 3, 3]


def test_a_local_module_between_two_spans_is_trained(model):
    torch.manual_seed(0)
    path = torch.nn.Sequential(model.remote_blocks[:3], torch.nn.Linear(32, 32), model.remote_blocks[3:])
    hidden = hidden_states()
    path(hidden).square().mean().backward()
    assert [name for name, p in path.named_parameters() if p.grad is not None] == ["1.weight", "1.bias"]
    assert hidden.grad is not None
    path.double().float()
    assert not any(p.requires_grad for p in model.remote_blocks.parameters())

    base, plain = plain_model(Path(model.name_or_path)).base_model, hidden_states()
    kept = list(base.h)
    base.h = torch.nn.ModuleList([*kept[:3], _AsLayer(path[1]), *kept[3:]])
    base.word_embeddings_layernorm = base.ln_f = torch.nn.Identity()
    base(inputs_embeds=plain, use_cache=False).last_hidden_state.square().mean().backward()
    assert relative_error(hidden.grad, plain.grad) <= TOLERANCE


class _AsLayer(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        return (self.inner(hidden),)


def test_blocks_by_hand_take_a_mask(model):
    mask = masks(ROWS, LENGTH)["left"]
    base = model.transformer
    with torch.no_grad():
        wanted = base(input_ids=IDS, attention_mask=mask).last_hidden_state
        entered = base.word_embeddings_layernorm(base.word_embeddings(IDS))
        given = base.ln_f(model.remote_blocks(entered, attention_mask=mask))
        unmasked = base.ln_f(model.remote_blocks(entered))
    assert relative_error(given, wanted) <= TOLERANCE
    assert relative_error(unmasked, wanted) > 1e-2
    with raises(ConfigError, key="attention_mask"):
        model.remote_blocks(entered, attention_mask=mask[:, None])


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True, "use_cache": True}, "use_cache"),
        ({"output_hidden_states": [1, 2]}, "output_hidden_states"),
    ],
)
def test_what_servers_do_not_send_is_refused_by_name(model, options, key):
    with torch.no_grad(), raises(ConfigError, key=key):
        model(IDS, **options)
    with torch.no_grad():
        assert model(IDS).logits.shape == (ROWS, LENGTH, VOCABULARY)  # and the model still works


def test_hidden_states_are_off_unless_asked_for_by_the_config_too(model):
    assert model(IDS).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(IDS).hidden_states) == BLOCKS + 1
