"""Adapters, models and data sets by their names on a hub, through the real client libraries."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.hub import Hub
from tests.train.tiny import save_tiny, tiny_model

SCRIPT = """
import json, sys
from pathlib import Path
from petals_tune.config import composed
from petals_tune.errors import PetalsTuneError
from petals_tune.evaluate import Evaluation
from petals_tune.merge import merge_adapter
from petals_tune.train.measure import evaluate_adapter
from petals_tune.train.run import run
from tests.train.conftest import tiny_config
from tests.train.tiny import LocalConnection

out = Path(sys.argv[1])
"""

BY_NAME = """
by_name = ["recipe=tune_my_data", "data.source.path=tiny/rows", "data.source.validation_split=validation", "logger=csv",
           "data.source.test_split=test", f"output_dir={out / 'run'}", "data.max_rows=8", "trainer.max_steps=2"]
for streaming in ("false", "true"):
    cfg = composed([*by_name, "adapter=tiny/adapter", "split=test", f"data.source.streaming={streaming}"],
                   config_name="evaluate")
    metrics = evaluate_adapter(cfg, LocalConnection(), schema=Evaluation)
    print(json.dumps({"loss": metrics["adapter"]["loss"]}))
after = run(composed([*by_name, "tuning.init_from=tiny/adapter", "model=of_adapter"]), LocalConnection())
print(json.dumps({"trained": (out / "run" / "adapter" / "adapter_model.safetensors").exists()}))
merge_adapter("tiny/adapter", out / "merged")
for adapter in ("tiny/llama", "tiny/nothing"):
    try: merge_adapter(adapter, out / "no")
    except PetalsTuneError as error: print(json.dumps({"said": str(error)}))
"""

AT_A_REVISION = """
from petals_tune.chat import open_model
from petals_tune.remote.auto import AutoDistributedModelForCausalLM
from petals_tune.train.options import LocalSwarm
from petals_tune.tuning.saved import choose_base
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch
from transformers import AutoModelForCausalLM

def evaluated(recipe, *overrides):
    cfg = composed([f"recipe={recipe}", f"adapter={out}/{recipe}/adapter", f"output_dir={out}/eval", *overrides],
                   config_name="evaluate")
    cfg.data.source = {"_target_": "tests.train.tiny.TinyTalk"}
    return evaluate_adapter(cfg, LocalConnection(), schema=Evaluation)["adapter"]["loss"]

found = {}
for recipe in ("personachat", "personachat_lora"):
    cfg = tiny_config("tiny/moved", out / recipe, recipe, "model.revision=old", "trainer.max_steps=3")
    found[recipe] = [run(cfg, LocalConnection())["after"]["loss"], evaluated(recipe)]
try: evaluated("personachat", "model.source=tiny/moved")
except PetalsTuneError as error: found["main"] = error.key

merge_adapter(out / "personachat_lora" / "adapter", out / "merged")

def local(source, *, revision, initial_peers, **_):
    model = AutoModelForCausalLM.from_pretrained(source, revision=revision)
    model.remote_blocks = SimpleNamespace(close=lambda: None)
    return model

adapter = out / "personachat" / "adapter"
base, revision = choose_base(adapter, source=None, revision=None)
with (patch.object(LocalSwarm, "open", return_value=nullcontext(["peer"])) as opened,
      patch.object(AutoDistributedModelForCausalLM, "from_pretrained", local),
      open_model(composed([], config_name="chat"), adapter, base, revision=revision) as (model, _)):
    found["chat"] = [[*opened.call_args.args, opened.call_args.kwargs], model.config.intermediate_size]
(out / "found.json").write_text(json.dumps(found))
"""

CHAT = """
import os
from pathlib import Path
import sys
folder, adapter = sys.argv[1:]
os.environ["PETALS_TUNE_CACHE"] = str(Path(folder) / "cache")
from petals_tune.chat import main
sys.argv = ["chat", f"adapter={adapter}", "prompt=1?", "max_new_tokens=3", "temperature=0", "swarm.quantization=none"]
main()
"""


def retuned() -> LlamaForCausalLM:
    """The tiny model with other blocks and the same embeddings, as merged LoRA would leave it."""
    model = tiny_model()
    model.model.layers[0].self_attn.q_proj.weight.data += 0.01
    return model


def narrow() -> LlamaForCausalLM:
    config = tiny_model().config
    config.intermediate_size = 48
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def hub_and_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Callable[[str, Path], list[str]]]]:
    """A hub. The main branch of tiny/moved has another shape and no tokenizer, that of tiny/retuned other blocks."""
    folder = tmp_path_factory.mktemp("hub")
    base, adapter, rows = save_tiny(folder / "base"), folder / "adapter", folder / "rows"
    net = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=2))
    net.peft_config["default"].base_model_name_or_path = "tiny/llama"
    net.save_pretrained(adapter)
    rows.mkdir()
    for split, size in {"train": 30, "validation": 6, "test": 5}.items():
        asked = [{"prompt": f"{split} {n}?", "answer": f"{n}!"} for n in range(size)]
        (rows / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    narrow().save_pretrained(folder / "narrow")
    retuned().save_pretrained(folder / "retuned", max_shard_size="20KB")
    tiny_model().save_pretrained(folder / "sharded", max_shard_size="20KB")
    main = {"tiny/moved": folder / "narrow", "tiny/retuned": folder / "retuned"}
    hub = Hub(
        models={"tiny/llama": base, "tiny/adapter": adapter, **main},
        datasets={"tiny/rows": rows},
        old={"tiny/moved": base, "tiny/retuned": folder / "sharded"},
    )
    with hub.serving(), hub.one_process(folder) as run:
        yield hub, run


@pytest.fixture
def hub(hub_and_process: tuple[Hub, Callable[[str, Path], list[str]]]) -> Hub:
    hub, _ = hub_and_process
    hub.forget()
    return hub


@pytest.fixture
def with_hub(
    hub_and_process: tuple[Hub, Callable[[str, Path], list[str]]], tmp_path: Path
) -> Callable[[str], list[str]]:
    """Run a script with `tmp_path` as its argument, in a process that knows the hub; returns the lines it printed."""
    return lambda script: hub_and_process[1](SCRIPT + script, tmp_path)


def test_everything_goes_by_name(hub: Hub, with_hub: Callable[[str], list[str]], tmp_path: Path) -> None:
    said = [json.loads(line) for line in with_hub(BY_NAME) if line.startswith("{")]
    whole, streamed, trained, no_adapter, nothing = said
    assert whole["loss"] == pytest.approx(streamed["loss"], rel=1e-5)
    assert trained["trained"]
    assert "tiny/llama on the hub has no adapter_config.json" in no_adapter["said"]
    assert "adapter tiny/nothing is neither a folder nor an adapter that the hub gave" in nothing["said"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.hidden_size == 32
    assert hub.downloads["adapter_model.safetensors"] == 1
    assert hub.downloads["model.safetensors"] == 1


def test_a_revision_with_other_blocks_is_another_model_and_they_are_not_downloaded(
    hub: Hub, with_hub: Callable[[str], list[str]]
) -> None:
    script = """
from petals_tune.model.fingerprint import Fingerprint
main, old, commit = (Fingerprint.of("tiny/retuned", revision) for revision in (None, "old", "b" * 40))
print(main.blocks, main.outside == old.outside, main.difference(old), old.difference(commit))
"""
    assert with_hub(script) == ["None True files of weights None"]
    weights = json.loads((hub.old["tiny/retuned"] / "model.safetensors.index.json").read_text())["weight_map"]
    assert hub.shards == {file for name, file in weights.items() if ".layers." not in name}
    assert hub.shards < set(weights.values())


def test_an_adapter_is_evaluated_merged_and_talked_to_at_the_revision_that_it_was_trained_at(
    with_hub: Callable[[str], list[str]], tmp_path: Path
) -> None:
    with_hub(AT_A_REVISION)
    found = json.loads((tmp_path / "found.json").read_text())
    for recipe in ("personachat", "personachat_lora"):
        trained, evaluated = found[recipe]
        assert evaluated == pytest.approx(trained, rel=1e-6)
        adapter = tmp_path / recipe / "adapter"
        for file, source in {"adapter_config.json": "base_model_name_or_path", "petals_tune.json": "source"}.items():
            saved = json.loads((adapter / file).read_text())
            assert (saved[source], saved["revision"]) == ("tiny/moved", "old")
        assert 'from_pretrained("tiny/moved", revision="old")' in (adapter / "README.md").read_text()
    assert found["main"] == "model.source"
    assert found["chat"] == [["tiny/moved", 2, {"revision": "old"}], 64]
    merged, plain = load_file(tmp_path / "merged" / "model.safetensors"), tiny_model().state_dict()
    unchanged = "model.layers.1.mlp.up_proj.weight"
    assert merged[unchanged].equal(plain[unchanged])


@pytest.mark.slow
def test_servers_of_a_chat_have_the_revision_of_its_adapter(hub: Hub, tmp_path: Path) -> None:
    net = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", r=2))
    net.peft_config["default"].base_model_name_or_path = "tiny/moved"
    net.peft_config["default"].revision = "old"
    net.save_pretrained(tmp_path / "adapter")
    answer = hub.known_to(CHAT.replace("sys.argv[1:]", f"sys.argv[1], {str(tmp_path / 'adapter')!r}"), tmp_path)
    assert answer
