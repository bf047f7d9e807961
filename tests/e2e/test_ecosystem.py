"""The examples of docs/ecosystem.md, as they stand and on the whole model in this process: the same numbers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.inprocess import in_process_swarm
from tests.models import relative_error
from tests.train.tiny import tiny_model, tiny_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "ecosystem.md").read_text()
EXAMPLES = {
    section.partition("\n")[0]: section.partition("```python\n")[2].partition("```")[0]
    for section in PAGE.split("\n## ")
    if "```python" in section
}
SETUP = EXAMPLES.pop("Setup")
SLOW = {"TRL: KTOTrainer", "TRL: ORPOTrainer", "TRL: RewardTrainer"}
TRAINERS = [
    pytest.param(heading, marks=pytest.mark.slow) if heading in SLOW else heading
    for heading in EXAMPLES
    if "Trainer" in heading
]
METHODS = [heading for heading in EXAMPLES if heading.startswith("PEFT")]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small Llama with a head of its own, hosted by two servers."""
    config = tiny_model().config
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ecosystem")
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with in_process_swarm(folder, "0:1", "1:2"):
        yield folder


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def plain(code: str) -> str:
    """The same code with transformers' own classes."""
    code = code.replace("from petals_tune import AutoDistributed", "from transformers import AutoDistributed")
    return code.replace("AutoDistributedModel", "AutoModel").replace(", initial_peers=peers", "")


def run_example(heading: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The names that an example leaves: over the swarm, and of the plain model."""
    left = []
    for change in (str, plain):
        names: dict[str, Any] = {"folder": str(folder), "peers": []}
        torch.manual_seed(0)
        exec(change(SETUP), names)
        names["model"].requires_grad_(False)
        torch.manual_seed(1)
        exec(change(EXAMPLES[heading]), names)
        left.append(names)
    return left[0], left[1]


def close(names: dict[str, Any]) -> None:
    for name in ("model", "classifier"):
        if name in names:
            names[name].remote_blocks.close()


@pytest.mark.parametrize("heading", TRAINERS)
def test_a_trainer_logs_the_losses_of_the_plain_model(heading: str, folder: Path) -> None:
    given, wanted = run_example(heading, folder)
    logs = [names["trainer"].state.log_history[:-1] for names in (given, wanted)]
    if heading == "TRL: GRPOTrainer":
        # Later samples are other draws: the swarm's client takes a number for the servers' dropout masks.
        assert [log["reward"] < 0 for log in logs[0]] == [True] * 3
        logs = [log[:1] for log in logs]
    for name in ("loss", "grad_norm"):
        assert [log[name] for log in logs[0]] == pytest.approx([log[name] for log in logs[1]], rel=TOLERANCE, abs=1e-7)
    close(given)


@pytest.mark.parametrize("heading", METHODS)
def test_a_method_has_the_numbers_of_the_plain_model(heading: str, folder: Path) -> None:
    given, wanted = run_example(heading, folder)
    found, expected = (step(names["net"], tasks="multitask" in heading) for names in (given, wanted))
    assert found.keys() == expected.keys()
    assert len(expected) > 2, "nothing is trained"
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) <= TOLERANCE, name
    close(given)


def step(net: Any, *, tasks: bool) -> dict[str, torch.Tensor]:
    """Loss, logits and gradients of one step, with trained parameters none of which is where it started."""
    random = torch.Generator().manual_seed(3)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
    ids = torch.randint(40, 60, (4, 9), generator=random)  # the trained tokens are among them
    output = net(input_ids=ids, labels=ids, **({"task_ids": torch.tensor([0, 1, 1, 0])} if tasks else {}))
    output.loss.backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **gradients}


def test_a_swap_of_adapters_uploads_nothing_twice(folder: Path) -> None:
    names, _ = run_example("PEFT: swapped adapters", folder)
    net, stats, sent = names["net"].eval(), names["model"].remote_blocks.stats, []
    for adapter in ("first", "second", "first", "second"):
        net.set_adapter(adapter)
        before = stats.sent_bytes
        with torch.no_grad():
            net(input_ids=torch.full((1, 4), 48))
        sent.append(stats.sent_bytes - before)
    weights = sum(p.nbytes for name, p in net.named_parameters() if "lora_" in name)
    assert sent[0] + sent[1] - sent[2] - sent[3] >= weights
    close(names)


@pytest.mark.slow
def test_a_run_of_transformers_goes_on_from_its_checkpoint(folder: Path) -> None:
    given, _ = run_example("transformers.Trainer", folder)
    whole = given["trainer"]
    last = [p.detach().clone() for p in whole.model.parameters() if p.requires_grad]
    state = whole.train(resume_from_checkpoint="outputs/ecosystem/checkpoint-2")
    assert state.global_step == 3
    for found, expected in zip((p for p in whole.model.parameters() if p.requires_grad), last, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    close(given)


# Beside the example's: answers that are generated, and the perplexity of whole texts.
GENERATED = {
    "task": "answers",
    "output_type": "generate_until",
    "doc_to_choice": None,
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["!"], "max_gen_toks": 4, "do_sample": False},
}
WHOLE = {
    "task": "texts",
    "output_type": "loglikelihood_rolling",
    "doc_to_choice": None,
    "doc_to_text": "",
    "doc_to_target": "text",
}


@pytest.mark.slow
def test_the_harness_scores_the_swarm_as_the_plain_model(folder: Path) -> None:
    given, wanted = run_example("lm-evaluation-harness", folder)
    answers = []
    for names in (given, wanted):
        tasks = [names["counting"] | other for other in ({}, GENERATED, WHOLE)]
        evaluated = names["simple_evaluate"](
            names["HFLM"](pretrained=names["model"], tokenizer=names["tokenizer"], batch_size=4),
            tasks=tasks,
            task_manager=names["own_tasks"],
            bootstrap_iters=0,
        )
        assert evaluated["n-samples"].keys() == {"counting", "answers", "texts"}
        answers.append({task: [row["resps"] for row in rows] for task, rows in evaluated["samples"].items()})
    assert answers[0]["answers"] == answers[1]["answers"]
    for task in ("counting", "texts"):
        assert numbers(answers[0][task]) == pytest.approx(numbers(answers[1][task]), rel=TOLERANCE)
    scores = [names["scores"]["results"]["counting"] for names in (given, wanted)]
    assert scores[0] == scores[1]
    assert 0 < scores[0]["acc,none"] < 1
    close(given)


def numbers(answers: Any) -> list[float]:
    """All numbers in nested lists and tuples."""
    if isinstance(answers, list | tuple):
        return [number for answer in answers for number in numbers(answer)]
    return [float(answers)] if isinstance(answers, int | float) else []
