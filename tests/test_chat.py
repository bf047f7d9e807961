"""The chat command: its arguments, and a conversation over a local swarm."""

import dataclasses
import io
import signal
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from petals_tune.chat import CONFIG_NAME, Chat, open_model, read_turns, stop_on_interrupt, talk, with_prompt_key
from petals_tune.config import check, composed
from petals_tune.data.chitchat import persona_message
from petals_tune.data.examples import Example, LabelledText
from petals_tune.data.rows import context_ids, rows_of
from petals_tune.errors import ConfigError
from petals_tune.model.convert import embedded_model
from petals_tune.model.fingerprint import Fingerprint
from petals_tune.tuning.identity import Identity, Prompting
from tests.raising import raises
from tests.train.tiny import save_tiny, tiny_model, tiny_tokenizer


def config(*overrides: str) -> DictConfig:
    cfg = composed(overrides, config_name=CONFIG_NAME)
    check(cfg, schema=Chat)
    return cfg


@pytest.mark.parametrize("text", ["Hi!", 'it\'s "me", a=b', "${x} [1, {2}] \\ \\${y} \\' end\\", "two\nlines", ""])
@pytest.mark.parametrize("form", ["two words", "one word"])
def test_any_text_can_be_a_prompt(text, form):
    arguments = ["--prompt", text] if form == "two words" else [f"--prompt={text}"]
    cfg = config(*with_prompt_key(["seed=3", *arguments, "temperature=0"]))
    assert (cfg.prompt, cfg.seed, cfg.temperature) == (text, 3, 0)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["top_p=0"], "top_p"),
        (["model=nobody"], "model"),
        (["swarm=join"], "swarm.initial_peers"),
        (["presona=[x]"], "presona"),
    ],
)
def test_a_mistake_is_an_error_before_a_server_starts(overrides, key):
    with raises(ConfigError, key=key):
        config(*overrides)


def test_a_pipe_is_one_turn(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert list(read_turns(None)) == ["two\nlines"]
    assert list(read_turns("hello")) == ["hello"]


def test_a_model_can_be_named_instead_of_an_adapter():
    assert config("model=default").model.source == "embedded"
    assert config("model.source=some/folder").model.source == "some/folder"
    assert config("adapter=x").model.source is None


@pytest.mark.parametrize("leaves", [EOFError, KeyboardInterrupt])
def test_a_terminal_is_read_until_the_person_leaves(monkeypatch, leaves):
    lines = iter(["hello", "  ", "bye", leaves])

    def read(_: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", read)
    assert list(read_turns(None)) == ["hello", "bye"]


def test_a_draft_that_cannot_be_loaded_is_refused_before_a_server_starts(tmp_path):
    with (
        raises(ConfigError, key="draft", seen=str(tmp_path)),
        open_model(config(f"draft={tmp_path}"), None, "embedded"),
    ):
        pass


def test_an_adapter_that_classifies_is_refused_before_a_server_starts(tmp_path):
    LoraConfig(task_type="SEQ_CLS").save_pretrained(tmp_path)
    with raises(ConfigError, key="adapter", seen=tmp_path), open_model(config(), tmp_path, "embedded"):
        pass


def test_an_adapter_of_another_model_is_refused_before_a_server_starts(tmp_path):
    base = Fingerprint.of(str(save_tiny(tmp_path / "tiny")))
    LoraConfig(task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    other = dataclasses.replace(base, blocks="another")
    Identity(source="x", task="CAUSAL_LM", base=other).save(tmp_path / "adapter")
    opened = open_model(config(), tmp_path / "adapter", str(tmp_path / "tiny"))
    with raises(ConfigError, key="model.source", seen=str(tmp_path / "tiny")), opened:
        pass


class Local:
    """The embedded model without a swarm, with the method of a remote model that a chat needs."""

    def __init__(self, model: Any):
        self._model = model
        self.config = model.config
        self.seen: list[torch.Tensor] = []

    def inference_session(self, max_length: int) -> Any:
        return nullcontext()

    def generate(self, input_ids: torch.Tensor, draft: str, **options: Any) -> torch.Tensor:
        assert draft == "none"
        self.seen.append(input_ids)
        return self._model.generate(input_ids=input_ids, **options)


@pytest.fixture(scope="module")
def local_model() -> tuple[Local, Any]:
    folder = embedded_model()
    return Local(AutoModelForCausalLM.from_pretrained(folder).eval()), AutoTokenizer.from_pretrained(folder)


def test_turns_accumulate_in_the_format_of_training_and_answers_are_printed(local_model, capsys):
    model, tokenizer = local_model
    cfg = config("persona=[I play the cello.]", "max_new_tokens=5", "temperature=0")
    talk(model, tokenizer, cfg, iter(["Hi!", "And you?"]))
    first, second = model.seen[-2:]
    messages = [persona_message(["I play the cello."]), {"role": "user", "content": "Hi!"}]
    assert first[0].tolist() == context_ids(messages, tokenizer)
    assert torch.equal(second[:, : first.shape[1]], first)
    answers = capsys.readouterr().out
    assert tokenizer.decode(second[0, first.shape[1] :][:3]).strip() in answers


class Recorded:
    """Answers nothing, and keeps the prompts."""

    def __init__(self) -> None:
        self.config = LlamaConfig(vocab_size=1000)
        self.seen: list[list[int]] = []
        self.drafts: list[str] = []
        self.options: Any = None

    def inference_session(self, max_length: int) -> Any:
        return nullcontext()

    def generate(self, input_ids: torch.Tensor, generation_config: Any, draft: str, **options: Any) -> torch.Tensor:
        self.seen.append(input_ids[0].tolist())
        self.drafts.append(draft)
        self.options = generation_config
        return input_ids


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE], ids=["transcript", "chat template"])
@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_a_question_is_asked_as_in_training(system, chat_template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    context = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": "Why?"}]
    (row,) = rows_of(Example(context=tuple(context), answer="So."), tokenizer, 999)
    model = Recorded()
    talk(model, tokenizer, config(), iter(["Why?"]), Prompting(system=system))
    assert model.seen == [row.prompt_ids]
    if system is None:  # as a bare model
        talk(model, tokenizer, config(), iter(["Why?"]))
        assert model.seen[1] == row.prompt_ids


def test_an_answer_ends_at_the_turns_end_of_the_template():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>", "<end_of_turn>")
    plain = tiny_model()
    head = torch.nn.Linear(plain.config.hidden_size, plain.config.vocab_size)
    torch.nn.init.zeros_(head.weight)
    head.bias.data.zero_()[tokenizer.convert_tokens_to_ids("<end_of_turn>")] = 1  # which is all that it says
    plain.set_output_embeddings(head)
    lengths = []

    class Counted(Local):
        def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
            output = super().generate(input_ids, **options)
            lengths.append(output.shape[1] - input_ids.shape[1])
            return output

    talk(Counted(plain), tokenizer, config("max_new_tokens=12", "temperature=0"), iter(["Hi"]))
    assert lengths == [1]


def test_a_token_beyond_the_embeddings_is_refused():
    tokenizer, model = tiny_tokenizer(), Recorded()
    tokenizer.add_tokens("zzz")
    model.config.vocab_size = len(tokenizer) - 1
    with raises(ConfigError, key="model.source", seen=len(tokenizer) - 1):
        talk(model, tokenizer, config(), iter(["Why?", "zzz"]))
    assert len(model.seen) == 1


def test_persona_and_system_go_before_the_adapters_own_text():
    tokenizer, model, own = tiny_tokenizer(), Recorded(), Prompting(system="Answer briefly.")
    talk(model, tokenizer, config("persona=[I sing.]"), iter(["Why?"]), own)
    talk(model, tokenizer, config("system=Answer in verse.", "draft=lookup"), iter(["Why?"]), own)
    assert model.drafts == ["none", "lookup"]
    question = {"role": "user", "content": "Why?"}
    verse = {"role": "system", "content": "Answer in verse."}
    assert model.seen == [context_ids([first, question], tokenizer) for first in (persona_message(["I sing."]), verse)]
    with raises(ConfigError, key="system", seen="x"), open_model(config("persona=[I sing.]", "system=x"), None, "none"):
        pass


def test_labels_and_plain_texts_are_asked_without_a_chat():
    tokenizer, model = tiny_tokenizer(), Recorded()
    talk(model, tokenizer, config(), iter(["so  good", "bad"]), Prompting(form="label", template="{text}\nLabel:"))
    prompts = ["so good\nLabel:", "bad\nLabel:"]
    rows = [rows_of(LabelledText(prompt=prompt, word=" positive"), tokenizer, 99)[0] for prompt in prompts]
    assert model.seen == [row.prompt_ids for row in rows]
    assert model.options.max_new_tokens == 1
    talk(model, tokenizer, config(), iter(["Once upon"]), Prompting(form="text"))
    assert model.seen[2] == tokenizer("Once upon")["input_ids"]


def test_ctrl_c_on_a_terminal_stops_the_answer_and_the_chat_goes_on(local_model, monkeypatch):
    class Interrupted(Local):
        def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
            def press(ids: torch.Tensor, *_: Any, **__: Any) -> bool:
                if ids.shape[1] == input_ids.shape[1] + 2:
                    signal.raise_signal(signal.SIGINT)
                return False

            options["stopping_criteria"] = [press, *options["stopping_criteria"]]
            return super().generate(input_ids, **options)

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    model, tokenizer = Interrupted(local_model[0]._model), local_model[1]
    cfg = config("max_new_tokens=30", "temperature=0")
    talk(model, tokenizer, cfg, iter(["Tell me a story.", "And then?"]))
    first, second = model.seen
    answer = tokenizer.decode(second[0, first.shape[1] : first.shape[1] + 2])
    messages = [
        {"role": "user", "content": "Tell me a story."},
        {"role": "assistant", "content": answer.strip()},
        {"role": "user", "content": "And then?"},
    ]
    assert second[0].tolist() == context_ids(messages, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_twice_interrupts_an_answer_that_does_not_come():
    with stop_on_interrupt() as (stopped,):
        assert not stopped(None, None)
        signal.raise_signal(signal.SIGINT)
        assert stopped(None, None)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_chat_that_is_too_long_is_an_error(local_model):
    model, tokenizer = local_model
    with raises(ConfigError, key="max_length", seen=20):
        talk(model, tokenizer, config("max_length=20", "max_new_tokens=5"), iter(["Hi!"]))
