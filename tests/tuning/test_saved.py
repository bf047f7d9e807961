"""Adapters as folders: what PEFT wrote anywhere is loaded whole, or refused with a reason."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from petals_tune.errors import ConfigError, UnsupportedAdapter
from petals_tune.model.fingerprint import Fingerprint
from petals_tune.tuning import deep_prompt
from petals_tune.tuning.deep_prompt import DeepPromptConfig, save_deep_prompts
from petals_tune.tuning.identity import FILE, Identity
from petals_tune.tuning.saved import (
    CONFIG_FILE,
    adapter_folder,
    base_of,
    check_adapter,
    choose_base,
    head_rows,
    load_adapter,
    load_tokenizer,
)
from petals_tune.tuning.support import tune
from tests.raising import raises
from tests.train.tiny import save_tiny, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IDS = torch.arange(1, 9)[None]
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "up_proj"]),
    "ia3": lambda: IA3Config(
        task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "deep prompt": lambda: DeepPromptConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def model(**changes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, initializer_range=0.2, **{**sizes, **changes})
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def classifier(num_labels: int = 3) -> LlamaForSequenceClassification:
    config = model().config
    config.num_labels, config.pad_token_id = num_labels, 0
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).requires_grad_(False).eval()


@pytest.fixture(params=CONFIGS)
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """The folder of an adapter whose tensors are all random, and the logits with it."""
    net = tune(model(), CONFIGS[request.param]()).eval()
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    net.save_pretrained(tmp_path / "adapter")
    if request.param == "deep prompt":
        save_deep_prompts(net.get_base_model(), tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path / "adapter", net(input_ids=IDS).logits


@pytest.mark.parametrize("trainable", [False, True])
def test_what_was_saved_is_loaded_for_use_and_for_training(trained: tuple[Path, torch.Tensor], trainable: bool) -> None:
    folder, expected = trained
    net = load_adapter(model(), folder, trainable=trainable)
    assert net.training is False or trainable
    torch.testing.assert_close(net(input_ids=IDS).logits, expected, rtol=0, atol=0)
    left = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert bool(left) is trainable
    if trainable:
        net(input_ids=IDS, labels=IDS).loss.backward()
        assert all(parameter.grad is not None for parameter in net.parameters() if parameter.requires_grad)


def test_an_adapter_of_another_model_is_refused(trained: tuple[Path, torch.Tensor]) -> None:
    folder, _ = trained
    with raises(ConfigError, key="adapter", seen=folder):
        load_adapter(model(hidden_size=16), folder)


def lora_folder(folder: Path) -> Path:
    get_peft_model(model(), CONFIGS["lora"]()).save_pretrained(folder)
    return folder


def test_a_shorter_or_longer_model_is_refused(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path)
    for blocks in (1, 3):
        with raises(ConfigError, key="adapter") as caught:
            load_adapter(model(num_hidden_layers=blocks), folder)
        assert all(".layers." in name for name in caught.value.seen)


def test_a_missing_tensor_is_refused_where_peft_only_warns(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, file)
    PeftModel.from_pretrained(model(), folder)
    with raises(ConfigError, key="adapter") as caught:
        load_adapter(model(), folder)
    assert [name for name in caught.value.seen if "lora_B" in name] == caught.value.seen != []


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"half of it")
    with raises(ConfigError, key="adapter", seen=folder):
        load_adapter(model(), folder)


def test_what_servers_cannot_honour_is_refused(tmp_path: Path) -> None:
    get_peft_model(model(), LoraConfig(task_type="CAUSAL_LM", use_dora=True)).save_pretrained(tmp_path)
    with raises(UnsupportedAdapter, key="tuning.use_dora"):
        load_adapter(model(), tmp_path)


def save_random(folder: Path, config: PeftConfig, *, rows: int | None = None) -> torch.Tensor:
    """Save a random adapter, of a classifier for SEQ_CLS, with an optionally resized vocabulary; return its logits."""
    base = classifier() if config.task_type == "SEQ_CLS" else model()
    if rows is not None:
        base.resize_token_embeddings(rows)
    net = get_peft_model(base, config).eval()
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    net.save_pretrained(folder, save_embedding_layers="auto" if rows is None else True)
    with torch.no_grad():
        return net(input_ids=IDS).logits


@pytest.mark.parametrize("method", ["lora", "prompt", "ia3"])
def test_the_head_of_a_classifier_is_loaded_and_never_left_random(method: str, tmp_path: Path) -> None:
    config = CONFIGS[method]()
    config.task_type = TaskType.SEQ_CLS
    expected = save_random(tmp_path, config)
    assert head_rows(tmp_path) == 3
    torch.testing.assert_close(load_adapter(classifier(), tmp_path)(input_ids=IDS).logits, expected, rtol=0, atol=0)
    with raises(ConfigError, key="adapter"):
        load_adapter(model(), tmp_path)  # it would be left out
    with raises(ConfigError, key="adapter"):
        load_adapter(classifier(num_labels=2), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "score" not in name}, file)
    with raises(ConfigError, key="adapter"):
        load_adapter(classifier(), tmp_path)
    with raises(ConfigError, key="adapter", seen=tmp_path):
        head_rows(tmp_path)


@pytest.mark.parametrize("trained", [None, ["embed_tokens", "lm_head"]])
def test_a_resized_vocabulary_is_loaded(trained: list[str] | None, tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"], modules_to_save=trained)
    expected = save_random(tmp_path, config, rows=70)
    torch.testing.assert_close(load_adapter(model(), tmp_path)(input_ids=IDS).logits, expected, rtol=0, atol=0)


def test_trained_tokens_are_loaded(tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"], trainable_token_indices=[2, 5])
    expected = save_random(tmp_path, config)
    torch.testing.assert_close(load_adapter(model(), tmp_path)(input_ids=IDS).logits, expected, rtol=0, atol=0)


def test_a_soft_prompt_of_another_width_is_refused_before_a_server_starts(tmp_path: Path) -> None:
    save_random(tmp_path / "adapter", CONFIGS["prompt"]())
    model(hidden_size=16).save_pretrained(tmp_path / "narrow")
    model().save_pretrained(tmp_path / "right")
    check = {"task": "CAUSAL_LM", "named": "x"}
    assert check_adapter(tmp_path / "adapter", source=str(tmp_path / "right"), **check) is None
    with raises(ConfigError, key="adapter", seen=tmp_path / "adapter"):
        check_adapter(tmp_path / "adapter", source=str(tmp_path / "narrow"), **check)


def test_a_folder_with_two_methods_is_refused(tmp_path: Path) -> None:
    lora_folder(tmp_path)
    (tmp_path / deep_prompt.FILE).touch()
    with raises(ConfigError, key="adapter", seen=tmp_path):
        check_adapter(tmp_path, task="CAUSAL_LM", source="x", named="x")


def test_adapters_inside_a_folder_are_named(tmp_path: Path) -> None:
    lora_folder(tmp_path / "formal")
    lora_folder(tmp_path / "casual")
    with raises(ConfigError, key="adapter", seen=tmp_path) as caught:
        adapter_folder(tmp_path)
    assert "casual, formal" in str(caught.value)


def test_a_tokenizer_beside_the_adapter_goes_first(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    adapter = lora_folder(tmp_path / "adapter")
    assert len(load_tokenizer(str(tmp_path / "model"), adapter)) == len(tiny_tokenizer())
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    assert len(load_tokenizer(str(tmp_path / "model"), adapter)) == len(tiny_tokenizer()) + 1


def test_a_folder_or_a_name_without_an_adapter(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "nowhere", "nobody/nothing"):
        with raises(ConfigError, key="adapter", seen=source):
            adapter_folder(source)


def test_the_adapter_names_its_model(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"base_model_name_or_path": "some/model"}))
    assert base_of(tmp_path) == "some/model"
    given = {"source": None, "revision": None}
    assert choose_base(tmp_path, **given) == ("some/model", None)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"base_model_name_or_path": "some/model", "revision": "v1"}))
    assert choose_base(tmp_path, **given) == ("some/model", "v1")
    base = Fingerprint(config="", outside="", blocks=None)
    Identity(source="own/model", revision="v2", task="CAUSAL_LM", base=base).save(tmp_path)
    assert choose_base(tmp_path, **given) == ("own/model", "v2")
    assert choose_base(tmp_path, **given | {"revision": "v3"}) == ("own/model", "v3")
    assert choose_base(tmp_path, **given | {"source": "third/model"}) == ("third/model", None)
    (tmp_path / FILE).unlink()
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"base_model_name_or_path": None}))
    with raises(ConfigError, key="model.source"):
        base_of(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("half of")
    with raises(ConfigError, key="adapter", seen=tmp_path / CONFIG_FILE):
        base_of(tmp_path)
