"""The cookbook's sl_loop.py against the service, and what its users do with a run and its checkpoints.

Nothing of the cookbook is changed: command-line arguments and environment variables are all that is set. The commands
are the SDK's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from datasets import Dataset
from peft import PeftModel
from tinker.cli.exceptions import TinkerCliError
from tinker_cookbook import weights
from transformers import AutoModelForCausalLM

from tests.service.cookbook.chatml import KEY, NAME, chatml
from tests.service.cookbook.conftest import Kitchen, Ran
from tests.service.cookbook.hub_data import QUESTIONS, SUFFIX, TALKS
from tests.service.cookbook.plain import talk_loss


def test_sl_loop(kitchen: Kitchen, tuned: Ran) -> None:
    assert [line["step"] for line in tuned.metrics] == [0, 1, 2]
    rows = Dataset.from_list([{"messages": talk} for talk in TALKS]).shuffle(seed=0)
    before = [None, *(tuned.checkpoints[name]["state_path"] for name in ("000001", "000002"))]
    for step, (line, path) in enumerate(zip(tuned.metrics, before, strict=True)):
        batch = rows.select(range(4 * step, 4 * step + 4))
        loss = talk_loss(kitchen.net(path), kitchen.tokenizer, batch)
        assert line["train_mean_nll"] == pytest.approx(loss, abs=1e-4)
        assert line["loss"] == pytest.approx(line["train_mean_nll"], rel=1e-5)  # what the service measured
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


def test_runs_and_models_are_listed(kitchen: Kitchen, tuned: Ran) -> None:
    (run,) = [
        each for each in json.loads(kitchen.tinker("run", "list"))["runs"] if each["training_run_id"] == tuned.run_id
    ]
    assert (run["base_model"], run["lora_rank"], run["corrupted"]) == (NAME, 4, False)
    assert run["last_checkpoint"]["tinker_path"] == tuned.checkpoints["final"]["state_path"]
    assert tuned.run_id in kitchen.tinker("run", "info", tuned.run_id)
    assert NAME in kitchen.tinker("model", "list")
    assert "accessible: yes" in kitchen.tinker("auth", "status")


def test_checkpoints_are_listed_changed_downloaded_and_deleted(kitchen: Kitchen, tuned: Ran) -> None:
    def listed(run: str) -> dict[str, dict[str, object]]:
        found = json.loads(kitchen.tinker("checkpoint", "list", "--run-id", run))["checkpoints"]
        return {each["tinker_path"]: each for each in found}

    saved = [each for record in tuned.checkpoints.values() for name, each in record.items() if name.endswith("_path")]
    assert sorted(listed(tuned.run_id)) == sorted(saved)
    final = tuned.checkpoints["final"]["state_path"]
    with tinker.ServiceClient(base_url=kitchen.url, api_key=KEY) as service:
        training = service.create_training_client_from_state(final).result()
        path = training.save_state("mine").result().path
    kitchen.tinker("checkpoint", "publish", path)
    kitchen.tinker("checkpoint", "set-ttl", path, "--remove")
    found = listed(training.model_id)[path]
    assert (found["public"], found["expires_at"]) == (True, None)
    kitchen.tinker("checkpoint", "unpublish", path)
    kitchen.tinker("checkpoint", "set-ttl", path, "--ttl", "7200")
    found = listed(training.model_id)[path]
    assert (found["public"], found["expires_at"] is None) == (False, False)

    kitchen.tinker("checkpoint", "download", path, "--output", str(kitchen.folder / "downloaded"))
    (adapter,) = (kitchen.folder / "downloaded").iterdir()
    assert_logits(kitchen, final, PeftModel.from_pretrained(kitchen.net(), str(adapter)))

    kitchen.tinker("checkpoint", "delete", path, "--yes")
    assert listed(training.model_id) == {}
    with pytest.raises(TinkerCliError):
        kitchen.tinker("checkpoint", "info", path)


def test_weights_are_downloaded_encrypted_and_merged(
    kitchen: Kitchen, tuned: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tinker_cookbook.weights: the cookbook asks for files that it alone can decrypt."""
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    path, adapter, merged = tuned.checkpoints["final"]["state_path"], tmp_path / "adapter", tmp_path / "merged"
    weights.download(tinker_path=path, output_dir=str(adapter), base_url=kitchen.url)
    assert (adapter / "adapter_model.safetensors").stat().st_size < 100_000  # LoRA alone, no weights of the model
    assert_logits(kitchen, path, PeftModel.from_pretrained(kitchen.net(), str(adapter)))
    weights.build_hf_model(base_model=str(kitchen.model_folder), adapter_path=str(adapter), output_path=str(merged))
    assert_logits(kitchen, path, AutoModelForCausalLM.from_pretrained(merged))


def assert_logits(kitchen: Kitchen, path: str, found: torch.nn.Module) -> None:
    """Assert that a model has the logits of plain PEFT with the checkpoint at `path`."""
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = kitchen.net(path)(ids).logits
        torch.testing.assert_close(found(ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(kitchen.net()(ids).logits, expected, atol=1e-2)


def test_answers_end_as_renderers_expect(kitchen: Kitchen) -> None:
    """At their stop texts or tokens and at the model's own end; with none at all, not even there."""
    question = chatml([{"role": "user", "content": QUESTIONS[0] + SUFFIX}], reply=True)
    end = kitchen.tokenizer.eos_token_id
    with tinker.ServiceClient(base_url=kitchen.url, api_key=KEY) as service:
        sampler = service.create_sampling_client(base_model=NAME)

        def answer(stop: Any) -> Any:
            prompt = tinker.ModelInput.from_ints(kitchen.tokenizer(question).input_ids)
            options = tinker.SamplingParams(max_tokens=12, temperature=0, stop=stop)
            return sampler.sample(prompt, num_samples=1, sampling_params=options).result().sequences[0]

        for stop in (None, ["\n\nUser:"], [end]):  # of qwen3_instruct, and of role_colon for base models
            found = answer(stop)
            assert (found.stop_reason, found.tokens[-1]) == ("stop", end)
            assert kitchen.tokenizer.decode(found.tokens).startswith("\\boxed{")
        found = answer(["oxe"])
        assert found.stop_reason == "stop"
        assert "oxe" in kitchen.tokenizer.decode(found.tokens)
        assert end not in found.tokens
        assert (answer([]).stop_reason, len(answer([]).tokens)) == ("length", 12)
