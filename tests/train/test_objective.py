import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from petals_tune.data.collate import PADDING_SIDES, Batch, collate
from petals_tune.data.rows import IGNORED, Row
from petals_tune.errors import DataError
from petals_tune.train.objective import CausalLM, ClassHead, LabelWords, class_logits, load_model, supervised_logits
from petals_tune.tuning.deep_prompt import DeepPromptConfig
from petals_tune.tuning.support import tune
from tests.models import VOCABULARY, config_of, relative_error
from tests.raising import raises
from tests.train.tiny import WORDS, tiny_model, tiny_tokenizer

ADAPTERS = {
    "plain": None,
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "lora": LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False),
}


def net_with(adapter: str):
    config = ADAPTERS[adapter]
    return tiny_model() if config is None else get_peft_model(tiny_model(), config).eval()


def batch(padding_side: str, *, context: int = 2) -> Batch:
    rows = []
    for length in (5, 9, 7):
        ids = torch.randint(1, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        rows.append(Row(input_ids=ids, labels=[IGNORED] * context + ids[context:]))
    return collate(rows, pad_id=0, padding_side=padding_side)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_loss_is_the_librarys_own(adapter: str, padding_side: str) -> None:
    net = net_with(adapter)
    scores = CausalLM()(net, batch(padding_side))
    # With padding on the left, the library's own soft prompt is further from the text of shorter rows.
    torch.testing.assert_close(scores.loss, net(**batch("right")).loss, rtol=1e-6, atol=1e-6)
    assert scores.count == (5 - 2) + (9 - 2) + (7 - 2)


def test_a_soft_prompt_predicts_a_supervised_first_token_too() -> None:
    rows = batch("right", context=0)
    prompted, plain = net_with("prompt"), net_with("plain")
    assert CausalLM()(prompted, rows).count == 5 + 9 + 7
    assert CausalLM()(plain, rows).count == 4 + 8 + 6  # nothing comes before the first token
    torch.testing.assert_close(CausalLM()(prompted, rows).loss, prompted(**rows).loss)


def test_the_same_net_without_its_adapter() -> None:
    net, rows = net_with("prompt"), batch("right")
    with net.disable_adapter():
        torch.testing.assert_close(CausalLM()(net, rows).loss, net_with("plain")(**rows).loss)


def test_only_supervised_positions_reach_the_head_and_the_hook_is_gone_afterwards() -> None:
    net, rows = net_with("prompt"), batch("right")
    logits, targets = supervised_logits(net, rows)
    assert logits.shape == (15, 320)
    assert targets.tolist() == rows["labels"][rows["labels"] != IGNORED].tolist()
    assert net(**rows).logits.shape == (3, 3 + 9, 320)


def test_the_hook_is_gone_after_an_error() -> None:
    net, rows = net_with("plain"), batch("right")
    with raises(DataError, column="labels"):
        CausalLM()(net, rows | {"labels": torch.full_like(rows["labels"], IGNORED)})
    assert net(**rows).logits.shape == (3, 9, 320)


FAMILIES = ["llama", "gpt2", "opt", "bloom", "falcon alibi", "mistral", "mpt"]


@cache
def net_of(family: str, method: str, *, task: str = "CAUSAL_LM") -> Any:
    """A small model of a family; its sliding window of 4 positions is shorter than a row."""
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    net = auto.from_config(config_of(family)).requires_grad_(False).eval()
    if method == "plain":
        return net
    kind = DeepPromptConfig if method == "deep prompt" else PromptTuningConfig
    net = tune(net, kind(task_type=task, num_virtual_tokens=3, num_attention_heads=4)).eval()
    for name, parameter in net.named_parameters():
        if "prompt" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    return net


def rows_of_lengths(*lengths: int, classes: bool = False) -> list[Row]:
    """Rows of random tokens: all but the first two are supervised, or the last one alone."""
    rows = []
    for length in lengths:
        ids = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        context = length - 1 if classes else 2
        rows.append(Row(input_ids=ids, labels=[IGNORED] * context + ids[context:]))
    return rows


@pytest.mark.parametrize("method", ["plain", "prompt", "deep prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_logits_do_not_depend_on_its_batch(family: str, method: str) -> None:
    """Those of its tokens alone, from the library's own forward, with padding on either side."""
    net, rows = net_of(family, method), rows_of_lengths(4, 11, 7)
    alone = [net(input_ids=torch.tensor([row.input_ids])).logits[0, -len(row.input_ids) : -1] for row in rows]
    expected = torch.cat([logits[1:] for logits in alone])  # the first two tokens are not supervised
    for padding_side in PADDING_SIDES:
        logits, targets = supervised_logits(net, collate(rows, pad_id=0, padding_side=padding_side))
        assert relative_error(logits, expected) < 1e-6
        assert targets.tolist() == [token for row in rows for token in row.input_ids[2:]]


@pytest.mark.parametrize("method", ["plain", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "mistral"])
def test_a_rows_classes_do_not_depend_on_its_batch(family: str, method: str) -> None:
    net, rows = net_of(family, method, task="SEQ_CLS"), rows_of_lengths(4, 11, 7, classes=True)
    # One row without its label word, whose last position the library's heads read.
    expected = torch.cat([net(input_ids=torch.tensor([row.input_ids[:-1]])).logits for row in rows])
    for padding_side in PADDING_SIDES:
        logits, _ = class_logits(net, collate(rows, pad_id=0, padding_side=padding_side))
        assert relative_error(logits, expected) < 1e-6


@pytest.fixture
def two_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention with a mask rounds otherwise than without one, as on GPUs; on CPUs the bits of both are often equal."""
    attention = F.scaled_dot_product_attention

    def rounded(query: torch.Tensor, *others: torch.Tensor, attn_mask: Any = None, **options: Any) -> torch.Tensor:
        output = attention(query, *others, attn_mask=attn_mask, **options)
        return output if attn_mask is None else output.bfloat16().to(output.dtype)

    monkeypatch.setattr(F, "scaled_dot_product_attention", rounded)


@pytest.mark.parametrize("padding_side", PADDING_SIDES)
@pytest.mark.parametrize("method", ["plain", "prompt"])
@pytest.mark.parametrize(("family", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("llama", "SEQ_CLS")])
@pytest.mark.usefixtures("two_kernels")
def test_a_rows_logits_are_the_same_bits_whatever_its_mates_hold(
    family: str, task: str, method: str, padding_side: str
) -> None:
    net, classes = net_of(family, method, task=task), task == "SEQ_CLS"
    found = []
    for mates in ((4, 7), (11, 11), (9, 3)):  # without any padding in one of them
        rows = collate(rows_of_lengths(11, *mates, classes=classes), pad_id=0, padding_side=padding_side)
        assert rows["input_ids"].shape == (3, 11)
        logits, _ = class_logits(net, rows) if classes else supervised_logits(net, rows)
        found.append(logits[: 1 if classes else 11 - 2])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def reviews(words: list[str]) -> Batch:
    tokenizer = tiny_tokenizer()
    rows = []
    for number, word in enumerate(words):
        prompt = tokenizer("ab" * (number + 1))["input_ids"]
        (answer,) = tokenizer(word)["input_ids"]
        rows.append(Row(input_ids=[*prompt, answer], labels=[IGNORED] * len(prompt) + [answer]))
    return collate(rows, pad_id=0)


def test_label_words_compares_the_words_alone() -> None:
    net, rows = net_with("prompt"), reviews([WORDS[1], WORDS[0], WORDS[1]])
    scores = LabelWords(WORDS, tiny_tokenizer())(net, rows)

    ids = [tiny_tokenizer()(word)["input_ids"][0] for word in WORDS]
    logits = net(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, 3:, ids]  # text alone
    last = rows["attention_mask"].sum(dim=1) - 2  # the position before the label word
    choices, labels = logits[torch.arange(3), last], torch.tensor([1, 0, 1])
    torch.testing.assert_close(scores.loss, F.cross_entropy(choices, labels))
    torch.testing.assert_close(scores.metrics["accuracy"], (choices.argmax(dim=1) == labels).double().mean())


def test_label_words_refuses_a_label_that_is_none() -> None:
    with raises(DataError, seen=tiny_tokenizer()("a")["input_ids"][0]):
        LabelWords(WORDS, tiny_tokenizer())(net_with("plain"), reviews(["a"]))


def classifier(adapter: str):
    """A classifier with the tiny model's weights and a head that is initialized with the label words."""
    objective = ClassHead(WORDS, tiny_tokenizer())
    plain = tiny_model()
    plain.config.num_labels = 2
    net = AutoModelForSequenceClassification.from_config(plain.config).eval()
    net.model.load_state_dict(plain.model.state_dict())
    with torch.no_grad():
        net.score.weight.copy_(plain.lm_head.weight[objective._ids])
    net.config.pad_token_id = 0
    config = copy.deepcopy(ADAPTERS[adapter])
    if config is None:
        return objective, net
    config.task_type = "SEQ_CLS"
    return objective, get_peft_model(net, config).eval()


@pytest.mark.parametrize("adapter", ["plain", "lora", "prompt"])
def test_a_head_initialized_with_label_words_scores_as_they_do(adapter: str) -> None:
    rows = reviews([WORDS[1], WORDS[0], WORDS[1]])
    objective, net = classifier(adapter)
    language_model = net_with(adapter)
    trained = {name: value for name, value in language_model.named_parameters() if value.requires_grad}
    net.load_state_dict(trained, strict=False)
    words = LabelWords(WORDS, tiny_tokenizer())(language_model, rows)
    head = objective(net, rows)
    torch.testing.assert_close(head.loss, words.loss)
    assert head.metrics["accuracy"] == words.metrics["accuracy"]


@pytest.mark.parametrize("adapter", ["plain", "lora"])
def test_the_head_reads_what_the_library_pools(adapter: str) -> None:
    """Without the label word as input, the library pools the last token: the one before the word."""
    objective, net = classifier(adapter)
    rows = reviews([WORDS[1]])
    without = {name: rows[name][:, :-1] for name in ("input_ids", "attention_mask")}
    expected = F.cross_entropy(net(**without).logits, torch.tensor([1]))
    torch.testing.assert_close(objective(net, rows).loss, expected)


def test_a_trained_head_gets_gradients_and_goes_into_the_adapter() -> None:
    objective, net = classifier("lora")
    objective(net.train(), reviews(list(WORDS))).loss.backward()
    score = dict(net.named_parameters())["base_model.model.score.modules_to_save.default.weight"]
    assert score.grad is not None
    assert score.grad.abs().sum() > 0
    assert any(name.endswith("score.weight") for name in get_peft_model_state_dict(net))


def test_packed_rows_are_no_rows_for_a_head() -> None:
    objective, net = classifier("plain")
    rows = reviews([WORDS[1]])
    twice = {name: torch.cat([tensor, tensor], dim=1) for name, tensor in rows.items()}
    with raises(DataError, column="labels"):
        objective(net, twice)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_initialized_with_the_rows_of_the_language_model(tied: bool, tmp_path: Path) -> None:
    config = tiny_model().config
    config.tie_word_embeddings = tied
    whole = AutoModelForCausalLM.from_config(config)
    whole.save_pretrained(tmp_path)
    net = load_model(
        ClassHead(WORDS, tiny_tokenizer()),
        str(tmp_path),
        causal_lm=AutoModelForCausalLM,
        classifier=AutoModelForSequenceClassification,
    )
    ids = [tiny_tokenizer()(word)["input_ids"][0] for word in WORDS]
    torch.testing.assert_close(net.score.weight, whole.lm_head.weight[ids], rtol=0, atol=0)
    assert net.config.pad_token_id == tiny_tokenizer().pad_token_id
