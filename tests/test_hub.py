"""Adapters, models and data sets by their names on a hub, through the real client libraries."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.hub import Hub
from tests.train.tiny import save_tiny

SCRIPT = """
import json, sys
from pathlib import Path
from petals_tune.config import composed
from petals_tune.errors import PetalsTuneError
from petals_tune.evaluate import Evaluation
from petals_tune.merge import merge_adapter
from petals_tune.train.measure import evaluate_adapter
from petals_tune.train.run import run
from tests.train.tiny import LocalConnection

out = Path(sys.argv[1])
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


@pytest.fixture
def hub(tmp_path: Path):
    base, adapter, rows = save_tiny(tmp_path / "base"), tmp_path / "adapter", tmp_path / "rows"
    net = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=2))
    net.peft_config["default"].base_model_name_or_path = "tiny/llama"
    net.save_pretrained(adapter)
    rows.mkdir()
    for split, size in {"train": 30, "validation": 6, "test": 5}.items():
        asked = [{"prompt": f"{split} {n}?", "answer": f"{n}!"} for n in range(size)]
        (rows / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    with Hub(models={"tiny/llama": base, "tiny/adapter": adapter}, datasets={"tiny/rows": rows}).serving() as hub:
        yield hub


def test_everything_goes_by_name(hub: Hub, tmp_path: Path) -> None:
    said = [json.loads(line) for line in hub.known_to(SCRIPT, tmp_path) if line.startswith("{")]
    whole, streamed, trained, no_adapter, nothing = said
    assert whole["loss"] == pytest.approx(streamed["loss"], rel=1e-5)
    assert trained["trained"]
    assert "tiny/llama on the hub has no adapter_config.json" in no_adapter["said"]
    assert "adapter tiny/nothing is neither a folder nor an adapter that the hub gave" in nothing["said"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.hidden_size == 32
    assert hub.downloads["adapter_model.safetensors"] == 1
    assert hub.downloads["model.safetensors"] == 1
