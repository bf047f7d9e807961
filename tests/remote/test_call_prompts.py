"""prompts= of a call of blocks: the numbers and gradients of the plain model's blocks with the prompts added."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import ConfigError
from petals_tune.model.families import family_of
from petals_tune.model.nested import decoder_of
from petals_tune.tuning.deep_prompt import DeepPromptConfig, with_deep_prompts
from tests.inprocess import in_process_swarm
from tests.models import plain_model, relative_error, save_model
from tests.parity import remote
from tests.raising import raises

TOLERANCE = 1e-5
ROWS, LENGTH, PROMPT, WIDTH, BLOCKS = 2, 7, 3, 32, 6


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HIDDEN = noise(ROWS, LENGTH, WIDTH, seed=1)
PROMPTS = noise(BLOCKS, PROMPT, WIDTH, seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = save_model(tmp_path_factory.mktemp("models") / "llama", "llama")
    with in_process_swarm(folder, "0:2", "3:6"):
        yield folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return plain_model(folder)


def connected(folder: Path) -> Any:
    return remote(AutoDistributedModelForCausalLM, folder, local_blocks=["2:3"], local_quantization="none")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Any]:
    with connected(folder) as loaded:
        yield loaded


@pytest.fixture
def tunable(folder: Path) -> Iterator[Any]:
    with connected(folder) as loaded:
        yield loaded


def expected(plain: Any, hidden: torch.Tensor, prompts: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The blocks of transformers, one after the other; `prompts` (stop - start, P, H) or (stop - start, B, P, H)."""
    decoder = decoder_of(plain)
    positions = torch.arange(hidden.shape[1])[None]
    rotary = decoder.rotary_emb(hidden, positions)
    for block, prompt in zip(list(family_of(decoder).blocks_of(decoder).children())[start:stop], prompts, strict=True):
        first = hidden[:, : prompt.shape[-2]] + prompt
        hidden = torch.cat([first, hidden[:, prompt.shape[-2] :]], dim=1)
        output = block(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


@pytest.mark.parametrize(
    ("shape", "start", "stop"),
    [
        *(("(L, P, H)", *span) for span in ((0, 6), (1, 4), (2, 3), (4, 5))),
        ("(L, 1, P, H)", 0, 6),
        ("(L, B, P, H)", 1, 4),
    ],
)
def test_numbers_and_gradients_are_those_of_the_plain_blocks(model, plain, start, stop, shape):
    grad, results = noise(ROWS, LENGTH, WIDTH, seed=3), []
    prompts = PROMPTS[start:stop]
    if shape == "(L, 1, P, H)":
        prompts = prompts[:, None]
    elif shape == "(L, B, P, H)":
        prompts = torch.stack([prompts, noise(*prompts.shape, seed=4)], dim=1)
    for here in (True, False):
        hidden, own = (each.clone().requires_grad_() for each in (HIDDEN, prompts))
        if here:
            output = expected(plain, hidden, own, start, stop)
        else:
            output = model.remote_blocks[start:stop](hidden, prompts=own)
        output.backward(grad)
        results.append((output.detach(), hidden.grad, own.grad))
    for wanted, found in zip(*results, strict=True):
        assert relative_error(found, wanted) <= TOLERANCE


def test_rows_that_share_one_tensor_share_its_gradient(model, plain):
    """As Petals' users expand one set of prompts to the batch."""
    gradients = []
    for run in (lambda p: expected(plain, HIDDEN, p, 0, 6), lambda p: model.remote_blocks(HIDDEN, prompts=p)):
        own = PROMPTS.clone().requires_grad_()
        run(own[:, None].expand(-1, ROWS, -1, -1)).sum().backward()
        gradients.append(own.grad)
    assert relative_error(gradients[1], gradients[0]) <= TOLERANCE


def test_prompts_in_the_first_step_of_a_session(model, plain):
    for start, stop in ((0, 6), (1, 4)):
        prompts = PROMPTS[start:stop]
        with model.remote_blocks[start:stop].inference_session(max_length=16) as session:
            for given in (prompts, 2 * prompts):
                found = [session.step(HIDDEN[:, :4], prompts), session.step(HIDDEN[:, 4:])]
                wanted = expected(plain, HIDDEN, prompts, start, stop)
                assert relative_error(torch.cat(found, dim=1), wanted) <= TOLERANCE
                session.position = PROMPT
                assert relative_error(session.step(HIDDEN[:, PROMPT:]), wanted[:, PROMPT:]) <= TOLERANCE
                with raises(ConfigError, key="rollback", seen=PROMPT - 1):
                    session.position = PROMPT - 1
                with raises(ConfigError, key="prompts", seen=LENGTH):
                    session.step(HIDDEN[:, :1], prompts)
                session.position = 0
                prompts = 2 * given
            assert relative_error(session.step(HIDDEN), expected(plain, HIDDEN, 0 * prompts, start, stop)) <= TOLERANCE


def test_prompts_beside_a_trained_adapter(tunable, folder):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    gradients = []
    for here in (True, False):
        base = plain_model(folder) if here else tunable
        torch.manual_seed(1)
        net = peft.get_peft_model(base, config).eval()
        own = PROMPTS.clone().requires_grad_()
        output = expected(base, HIDDEN, own, 0, 6) if here else base.remote_blocks(HIDDEN, prompts=own)
        output.sum().backward()
        trained = [parameter.grad for parameter in net.parameters() if parameter.requires_grad]
        gradients.append([output.detach(), own.grad, *trained])
    assert len(gradients[0]) == 2 + 2 * BLOCKS
    for wanted, found in zip(*gradients, strict=True):
        assert relative_error(found, wanted) <= TOLERANCE


@pytest.mark.parametrize(
    "prompts",
    [
        PROMPTS[:5],
        PROMPTS[:, :, :16],
        PROMPTS[0],
        PROMPTS.long(),
        noise(BLOCKS, LENGTH + 1, WIDTH, seed=0),
        noise(BLOCKS, 3, PROMPT, WIDTH, seed=0),
        PROMPTS[:, :0],
    ],
    ids=lambda each: f"{tuple(each.shape)} {each.dtype}",
)
def test_prompts_that_do_not_fit_are_refused(model, prompts):
    with raises(ConfigError, key="prompts", seen=tuple(prompts.shape)):
        model.remote_blocks(HIDDEN, prompts=prompts)


def test_prompts_of_two_kinds_are_refused(tunable):
    with_deep_prompts(tunable, DeepPromptConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for blocks in (tunable.remote_blocks[:2], tunable.remote_blocks[2:3]):
        with raises(ConfigError, key="prompts", seen=blocks.span.start):
            blocks(HIDDEN, prompts=PROMPTS[: len(blocks)])


def test_prompts_of_single_rows_are_no_first_step(model):
    with model.remote_blocks.inference_session(max_length=16) as session:
        prompts = torch.stack([PROMPTS, 2 * PROMPTS], dim=1)
        with raises(ConfigError, key="prompts", seen=tuple(prompts.shape)):
            session.step(HIDDEN, prompts)
