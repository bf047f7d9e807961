"""Recipe files of Tinker's cookbook, as they are, against the service; their figures beside plain PEFT's.

Nothing of the cookbook is changed: command-line arguments and environment variables are all that is set.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from tests.service.cookbook.conftest import Kitchen, Ran
from tests.service.cookbook.gateway import chatml
from tests.service.cookbook.hub_data import ANSWER, PAIRS, QUESTIONS, SUFFIX, TALKS


def logprobs(net: Any, tokenizer: Any, question: str, answer: str) -> torch.Tensor:
    """Log-probabilities of the tokens of an answer, the end of its turn among them."""
    prompt = tokenizer(chatml([{"role": "user", "content": question}], reply=True)).input_ids
    ids = torch.tensor([prompt + tokenizer(f"{answer}<|im_end|>").input_ids])
    found = net(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).flatten()
    return found[len(prompt) - 1 :]


def talk_loss(net: Any, tokenizer: Any, rows: Dataset) -> float:
    """The mean over talks of the mean loss of a token of the answer."""
    with torch.no_grad():
        losses = [-logprobs(net, tokenizer, talk[0]["content"], talk[1]["content"]).mean() for talk in rows["messages"]]
    return torch.stack(losses).mean().item()


def test_sl_loop(kitchen: Kitchen, tuned: Ran) -> None:
    assert [line["step"] for line in tuned.metrics] == [0, 1, 2]
    rows = Dataset.from_list([{"messages": talk} for talk in TALKS]).shuffle(seed=0)
    before = [None, *(tuned.checkpoints[name]["state_path"] for name in ("000001", "000002"))]
    for step, (line, path) in enumerate(zip(tuned.metrics, before, strict=True)):
        batch = rows.select(range(4 * step, 4 * step + 4))
        loss = talk_loss(kitchen.net(path), kitchen.tokenizer, batch)
        assert line["train_mean_nll"] == pytest.approx(loss, abs=1e-4)
        assert line["grad_norm"] > 0
    final = kitchen.net(tuned.checkpoints["final"]["state_path"])
    assert talk_loss(final, kitchen.tokenizer, rows) < 0.7 * talk_loss(kitchen.net(), kitchen.tokenizer, rows)


@pytest.mark.slow
def test_sl_loop_goes_on_where_it_was_interrupted(kitchen: Kitchen) -> None:
    options = {"batch_size": 4, "lora_rank": 4, "learning_rate": 1e-2, "save_every": 1}
    kitchen.recipe("sl_loop.py", "resumed", max_steps=2, **options)
    file = kitchen.folder / "resumed" / "checkpoints.jsonl"
    lines = file.read_text().splitlines()
    file.write_text(lines[0] + "\n")  # as if it had ended behind the first checkpoint
    ran = kitchen.recipe("sl_loop.py", "resumed", **options)
    assert [line["step"] for line in ran.metrics] == [0, 1, 1, 2]
    once, again = ran.metrics[1:3]
    assert again["train_mean_nll"] == pytest.approx(once["train_mean_nll"], abs=1e-5)
    assert again["grad_norm"] == pytest.approx(once["grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["importance_sampling", "cispo", "gspo"])
def test_rl_loop(kitchen: Kitchen, loss: str) -> None:
    ran = kitchen.recipe(
        "rl_loop.py",
        f"rl_{loss}",
        batch_size=2,
        group_size=16,
        max_tokens=8,
        lora_rank=4,
        learning_rate=4e-3,
        loss_fn=loss,
    )
    assert [line["step"] for line in ran.metrics] == [0, 1, 2, 3]
    assert all(0 <= line["reward/total"] <= 1 for line in ran.metrics)
    assert ran.metrics[0]["reward/total"] > 0
    assert ran.metrics[0]["grad_norm"] > 0

    def right(net: Any) -> float:
        """The mean log-probability of the right answers."""
        with torch.no_grad():
            each = [logprobs(net, kitchen.tokenizer, q + SUFFIX, f"\\boxed{{{ANSWER}}}").sum() for q in QUESTIONS]
        return torch.stack(each).mean().item()

    assert right(kitchen.net(ran.checkpoints["final"]["state_path"])) > right(kitchen.net()) + 0.1


@pytest.mark.slow
def test_rl_loop_with_the_loss_whose_formula_is_not_public(kitchen: Kitchen) -> None:
    with pytest.raises(AssertionError, match="stable_reinforce"):
        kitchen.recipe("rl_loop.py", "refused", batch_size=2, group_size=2, max_tokens=4)


@pytest.mark.slow
def test_dpo(kitchen: Kitchen, tuned: Ran) -> None:
    """Three steps from the weights of another run, beside the same steps in plain PEFT and torch."""
    start = tuned.checkpoints["000001"]["state_path"]
    options = {"dataset": "hhh", "batch_size": 2, "learning_rate": 1e-2, "load_checkpoint_path": start}
    ran = kitchen.recipe("preference/dpo/train.py", "dpo", **options)
    assert ran.metrics[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
    net, reference = kitchen.net(start), kitchen.net(start)
    trained = [each for each in net.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    rows = Dataset.from_list(PAIRS).shuffle(seed=0).shuffle(seed=0)  # by the builder, and by the first epoch
    for step, line in enumerate(ran.metrics):
        losses = []
        for pair in rows.select(range(2 * step, 2 * step + 2)):
            _, question, good = pair["chosen"].replace("Human: ", "").replace("Assistant: ", "").split("\n\n")
            bad = pair["rejected"].split("Assistant: ")[1]
            chosen, rejected = (
                logprobs(net, kitchen.tokenizer, question, answer).sum()
                - logprobs(reference, kitchen.tokenizer, question, answer).sum().detach()
                for answer in (good, bad)
            )
            losses.append(-F.logsigmoid(0.1 * (chosen - rejected)))
        loss = torch.stack(losses).mean()
        assert line["dpo_loss"] == pytest.approx(loss.item(), abs=1e-4)
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 3)
        optimizer.step()
        optimizer.zero_grad()
    assert len(ran.metrics) == 3
