"""Merging of adapters into a whole model: its logits, what it keeps, and the errors of what cannot be merged."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from petals_tune.errors import ConfigError, UnsupportedAdapter, UnsupportedModel
from petals_tune.merge import merge_adapter
from petals_tune.model.fingerprint import Fingerprint
from petals_tune.tuning.identity import Identity, Prompting
from tests.models import save_model
from tests.packed_models import fp8_model
from tests.raising import raises
from tests.train.tiny import save_tiny, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IDS = torch.arange(1, 9)[None]
ROWS = 330  # of a resized vocabulary; the model's has 320

MakeConfig = Callable[..., PeftConfig]


def lora(modules: str = "q_proj", **options: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": modules.split(), **options})


def ia3(**options: Any) -> IA3Config:
    modules = {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return IA3Config(**{"task_type": "CAUSAL_LM", **modules, **options})


METHODS: dict[str, MakeConfig] = {
    "LoRA": lora,
    "rsLoRA": lambda: lora(use_rslora=True),
    "DoRA": lambda: lora(use_dora=True),
    "LoRA with biases": lambda: lora(bias="all"),
    "IA3": ia3,
    "LoHa": lambda: LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    "OFT": lambda: OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=4, r=0),
    "trainable tokens": lambda: TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[3, 4]),
    "LoRA and trainable tokens": lambda: lora(trainable_token_indices=[3, 4]),
    "a trained norm": lambda: lora(modules_to_save=["norm"]),
}
UNTIED: dict[str, MakeConfig] = {
    "LoRA on the head": lambda: lora("q_proj lm_head"),
    "LoRA on the embeddings": lambda: lora("q_proj embed_tokens"),
    "a trained head": lambda: lora(modules_to_save=["lm_head"]),
    "trained embeddings": lambda: lora(modules_to_save=["embed_tokens"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def save_adapter(base: Path, folder: Path, config: PeftConfig, *, rows: int | None = None) -> torch.Tensor:
    """Save a random adapter of `base` to `folder`; return the logits with it."""
    classifies = config.task_type == "SEQ_CLS"
    model: Any = (
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        if classifies
        else AutoModelForCausalLM.from_pretrained(base)
    )
    if rows is not None:
        model.resize_token_embeddings(rows)
    torch.manual_seed(1)
    net = get_peft_model(model, config).eval()
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    net.peft_config["default"].base_model_name_or_path = str(base)
    net.save_pretrained(folder, save_embedding_layers="auto" if rows is None else True)
    with torch.no_grad():
        return net(input_ids=IDS).logits


def merged_logits(adapter: Path, output: Path, auto: Any = AutoModelForCausalLM) -> tuple[torch.Tensor, Any]:
    """Merge, load the result from disk with nothing missing, and compute its logits."""
    merge_adapter(str(adapter), output)
    model, info = auto.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits, model


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


def test_lora_on_experts_is_merged(base: Path, tmp_path: Path) -> None:
    mixture = save_model(tmp_path / "mixture", "qwen3_moe", num_hidden_layers=2, mlp_only_layers=[])
    for file in base.glob("*token*"):
        (mixture / file.name).write_bytes(file.read_bytes())
    config = lora("q_proj", target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    expected = save_adapter(mixture, tmp_path / "adapter", config)
    found, _ = merged_logits(tmp_path / "adapter", tmp_path / "merged")
    assert_equal(found, expected)
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(mixture)(input_ids=IDS).logits, expected, atol=1e-2)


@pytest.mark.parametrize("method", [*METHODS, *UNTIED])
def test_the_merged_model_computes_what_the_adapter_does(base: Path, tmp_path: Path, method: str) -> None:
    expected = save_adapter(base, tmp_path / "adapter", (METHODS | UNTIED)[method]())
    found, model = merged_logits(tmp_path / "adapter", tmp_path / "merged")
    assert_equal(found, expected)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert not torch.allclose(plain(input_ids=IDS).logits, expected, atol=1e-2)
    assert model.config.tie_word_embeddings is (method in METHODS)


def test_the_tokenizer_is_saved_as_it_was_trained_with_and_nothing_is_overwritten(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(base, tmp_path / "adapter", lora())
    asked = Prompting(system="Be brief.", chat_template="{{ messages }}")
    identity = Identity(source=str(base), task="CAUSAL_LM", base=Fingerprint.of(str(base)), prompting=asked)
    identity.save(tmp_path / "adapter")
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert "'Be brief.'" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("ab")["input_ids"]
    assert tokenizer.chat_template == "{{ messages }}"
    with raises(ConfigError, key="output", seen=tmp_path / "merged"):
        merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")


@pytest.mark.parametrize("make", [lora, ia3], ids=["LoRA", "IA3"])
def test_a_classifier_keeps_its_head_and_labels(base: Path, tmp_path: Path, make: MakeConfig) -> None:
    expected = save_adapter(base, tmp_path / "adapter", make(task_type="SEQ_CLS"))
    identity = Identity(
        source=str(base), task="SEQ_CLS", base=Fingerprint.of(str(base)), labels=(" bad", " fair", " good")
    )
    identity.save(tmp_path / "adapter")
    found, model = merged_logits(tmp_path / "adapter", tmp_path / "merged", AutoModelForSequenceClassification)
    assert_equal(found, expected)
    assert model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert model.config.pad_token_id == tiny_tokenizer().pad_token_id


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_packed_base_becomes_full_weights(base: Path, tmp_path: Path, task: str) -> None:
    packed = fp8_model(base, tmp_path / "fp8")
    for file in base.glob("*token*"):
        (packed / file.name).write_bytes(file.read_bytes())
    expected = save_adapter(packed, tmp_path / "adapter", lora(task_type=task))
    auto = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    found, model = merged_logits(tmp_path / "adapter", tmp_path / "merged", auto)
    assert_equal(found, expected)
    assert not hasattr(model.config, "quantization_config")
    kinds = {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()}
    assert kinds == {torch.float32}


def test_a_packed_base_that_lacks_tensors_is_refused(base: Path, tmp_path: Path) -> None:
    packed = fp8_model(base, tmp_path / "fp8")
    save_adapter(packed, tmp_path / "adapter", lora())
    tensors = load_file(packed / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, packed / "model.safetensors")
    with raises(UnsupportedModel, key="model.source", seen=["model.norm.weight"]):
        merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_resized_vocabulary_is_kept_with_its_tokenizer(base: Path, tmp_path: Path, trained: bool) -> None:
    config = lora(modules_to_save=["lm_head", "embed_tokens"] if trained else None)
    expected = save_adapter(base, tmp_path / "adapter", config, rows=ROWS)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    found, model = merged_logits(tmp_path / "adapter", tmp_path / "merged")
    assert_equal(found, expected)
    assert found.shape[-1] == model.config.vocab_size == ROWS
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")("<new>")["input_ids"]) == 1


def test_weights_are_rounded_once(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter", lora())
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "whole")
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "rounded", dtype="bfloat16")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).state_dict()
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype="auto").state_dict()
    for name, tensor in rounded.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, whole[name].to(torch.bfloat16)), name


def test_weights_that_do_not_fit_the_dtype_are_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter", lora(modules_to_save=["norm"]))
    name, file = "base_model.model.model.norm.weight", tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[name][3] = 1e6
    save_file(tensors, file)
    with raises(ConfigError, key="dtype", seen="float16"):
        merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged", dtype="float16")
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_merged_is_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with raises(UnsupportedAdapter, key="adapter", seen=str(tmp_path / "prompt")):
        merge_adapter(str(tmp_path / "prompt"), tmp_path / "merged")
    lora(task_type="TOKEN_CLS").save_pretrained(tmp_path / "tags")
    with raises(UnsupportedAdapter, key="adapter", seen="TOKEN_CLS"):
        merge_adapter(str(tmp_path / "tags"), tmp_path / "merged")
    save_adapter(base, tmp_path / "lora", lora())
    with raises(UnsupportedModel, key="model.source", seen=str(tmp_path / "nowhere")):
        merge_adapter(str(tmp_path / "lora"), tmp_path / "merged", model=str(tmp_path / "nowhere"))
    identity = Identity(source=str(base), task="CAUSAL_LM", base=replace(Fingerprint.of(str(base)), blocks="another"))
    identity.save(tmp_path / "lora")
    with raises(ConfigError, key="model.source", seen=str(base)):
        merge_adapter(str(tmp_path / "lora"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
