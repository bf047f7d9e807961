"""Further recipe files of Tinker's cookbook, as they are, against the service; their figures beside plain PEFT's."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from tests.service.cookbook.conftest import Kitchen, Ran
from tests.service.cookbook.hub_data import ANSWER, PAIRS, QUESTIONS, SUFFIX, TALKS
from tests.service.cookbook.plain import logprobs, talk_loss

pytestmark = pytest.mark.slow


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


def test_rl_loop_with_the_loss_whose_formula_is_not_public(kitchen: Kitchen) -> None:
    """stable_reinforce is the recipe's default."""
    with pytest.raises(AssertionError, match=r"BadRequestError: .*record_stability_info.*stable_reinforce"):
        kitchen.recipe("rl_loop.py", "refused", batch_size=2, group_size=2, max_tokens=4)
    assert not (kitchen.folder / "refused" / "metrics.jsonl").exists()


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


def test_supervised_training_with_evaluations_and_rolling_checkpoints(kitchen: Kitchen, tuned: Ran) -> None:
    """tinker_cookbook.supervised.train, by its recipe chat_sl: it goes on from weights, and evaluates by sampling."""
    start = tuned.checkpoints["final"]["state_path"]
    ran = kitchen.recipe(
        "chat_sl/train.py",
        "chat_sl",
        batch_size=4,
        learning_rate=1e-3,
        eval_every=1,
        save_every=2,
        rolling_save_every=1,
        load_checkpoint_path=start,
    )
    held_out = Dataset.from_list([{"messages": talk} for talk in TALKS[:4]])
    assert len(ran.metrics) == 3
    assert ran.metrics[0]["test/nll"] == pytest.approx(
        talk_loss(kitchen.net(start), kitchen.tokenizer, held_out), abs=1e-4
    )
    after = talk_loss(kitchen.net(ran.checkpoints["final"]["state_path"]), kitchen.tokenizer, held_out)
    assert ran.metrics[0]["test/nll"] > ran.metrics[2]["test/nll"] > after
    listed = json.loads(kitchen.tinker("checkpoint", "list", "--run-id", ran.run_id))["checkpoints"]
    kept = [ran.checkpoints[name] for name in ("000002", "final")]  # 000001 was a rolling one
    assert {each["tinker_path"] for each in listed} == {
        each[path] for each in kept for path in ("state_path", "sampler_path")
    }


def test_reinforcement_learning_samples_with_the_weights_that_it_trains(kitchen: Kitchen) -> None:
    """tinker_cookbook.rl.train, by its recipe math_rl: it logs how far samplers and trained weights are apart."""
    ran = kitchen.recipe(
        "math_rl/train.py",
        "math_rl",
        env="gsm8k",
        groups_per_batch=4,
        group_size=4,
        max_steps=2,
        max_tokens=8,
        lora_rank=4,
        learning_rate=1e-3,
        loss_fn="importance_sampling",
        compute_post_kl=True,
        eval_every=0,
    )
    steps = [line for line in ran.metrics if "optim/kl_sample_train_v2" in line]
    assert len(steps) == 2
    assert all(abs(line["optim/kl_sample_train_v2"]) < 1e-8 for line in steps)
    assert all(line["kl_pre_post_v2"] > 1e-6 for line in steps)
