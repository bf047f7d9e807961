"""The exported adapter, as stock PEFT loads it, and its model card."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel, PromptTuningConfig
from transformers import AutoModelForCausalLM

from petals_tune.model.fingerprint import Fingerprint
from petals_tune.train.export import model_card
from petals_tune.train.result import Result
from petals_tune.train.run import run
from petals_tune.tuning.identity import Identity
from petals_tune.tuning.saved import base_of
from tests.train.conftest import Compose
from tests.train.tiny import LocalConnection


def test_stock_peft_loads_the_adapter(tiny_run: Compose, tiny_folder: Path, tmp_path: Path) -> None:
    """The logits of the exported adapter on the plain model are those of the trained tensors in the checkpoint."""
    run(tiny_run("personachat", "optimizer.lr=0.1", "tuning.init_text=count"), LocalConnection())
    adapter = tmp_path / "out" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    loaded = PeftModel.from_pretrained(base, adapter).eval()
    (trained,) = torch.load(tmp_path / "out" / "checkpoint.ckpt", weights_only=True)["state_dict"].values()
    ids = torch.arange(1, 9)[None]
    embedded = torch.cat([trained[None], base.get_input_embeddings()(ids)], dim=1)
    torch.testing.assert_close(loaded(input_ids=ids).logits, base(inputs_embeds=embedded).logits, rtol=0, atol=0)


def test_the_base_model_is_named_for_any_working_folder(
    tiny_run: Compose, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_folder.parent)
    run(tiny_run("personachat", f"model.source=./{tiny_folder.name}"), LocalConnection())
    adapter = tmp_path / "out" / "adapter"
    monkeypatch.chdir(tmp_path)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_folder)
    assert base_of(adapter) == str(tiny_folder)
    assert isinstance(AutoPeftModelForCausalLM.from_pretrained(adapter), PeftModel)


def test_the_embedded_model_is_named_for_peft_by_its_name_on_the_hub() -> None:
    identity = Identity(source="embedded", task="CAUSAL_LM", base=Fingerprint(config="", outside="", blocks=None))
    result = Result(name="x", base="embedded", data="y", headline="z", seed=0)
    card = model_card(PromptTuningConfig(num_virtual_tokens=2), result, identity, deep=False)
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert 'from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")' in card


def test_the_model_card_describes_the_adapter(tiny_run: Compose, tiny_folder: Path, tmp_path: Path) -> None:
    measured = run(tiny_run("sst2"), LocalConnection())
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    _, front_matter, text = card.split("---\n", 2)
    assert yaml.safe_load(front_matter) == {"library_name": "peft", "tags": ["petals_tune", "prompt-tuning"]}
    for phrase in (
        "step 6, the last",
        "soft-prompt (4 tokens)",
        str(tiny_folder),
        "Letters with a sentiment",
        "6 optimizer steps, seed 0",
    ):
        assert phrase in text
    assert f"{measured['after']['accuracy']:.4f} |" in text.split("after training")[1]
    code = (
        text.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "out" / "adapter"))
    )
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)
