"""Talk to a tuned model in the terminal: python -m petals_tune.chat adapter=outputs/.../adapter"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import hydra
from omegaconf import DictConfig
from pydantic import Field

from petals_tune.chat_adapters import ChatAdapters, parse_adapters
from petals_tune.cli import quiet_libraries, report_errors
from petals_tune.config import Section, TunedModel, build, check_arguments, folder_of
from petals_tune.errors import ConfigError

if TYPE_CHECKING:
    from petals_tune.data.examples import Message
    from petals_tune.tuning.identity import Prompting

CONFIG_NAME = "chat"


@dataclass(frozen=True, kw_only=True)
class Chat:
    """All options of a chat; conf/chat.yaml documents them."""

    adapter: str | None
    adapters: list[str]
    model: TunedModel
    swarm: Section
    persona: list[str]
    system: str | None
    prompt: str | None
    max_new_tokens: Annotated[int, Field(ge=1)]
    max_length: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0)] | None
    top_p: Annotated[float, Field(gt=0, le=1)] | None
    seed: Annotated[int, Field(ge=0)]
    draft: str


def main() -> None:
    """python -m petals_tune.chat adapter=FOLDER [--prompt TEXT] [key=value ...]"""
    quiet_libraries()
    sys.argv[1:] = arguments = with_prompt_key(sys.argv[1:])
    with report_errors():
        check_arguments(arguments, config_name=CONFIG_NAME, schema=Chat)
        chat()


@hydra.main(version_base="1.3", config_path=str(folder_of("conf")), config_name=CONFIG_NAME)
def chat(cfg: DictConfig) -> None:
    """Answer the prompt, or each line of the terminal, or all of a pipe."""
    with report_errors():
        several, first = parse_adapters(cfg.adapters, cfg.adapter)
        if cfg.adapter is None and first is None and cfg.model.source is None:
            raise ConfigError(
                "say whom to talk to: adapter=outputs/.../adapter, or model=default for the bare model", key="adapter"
            )
        from petals_tune.tuning.saved import adapter_folder, choose_base  # slow; a mistyped key should not wait for it

        folders = {name: adapter_folder(folder) for name, folder in several.items()}
        adapter = folders[first] if first else None if cfg.adapter is None else adapter_folder(cfg.adapter)
        base, revision = cfg.model.source, cfg.model.revision
        if adapter is not None:
            base, revision = choose_base(adapter, source=base, revision=revision)
        trained = None if adapter is None else trained_prompting(adapter)
        adapters = ChatAdapters(folders, {name: trained_prompting(each) for name, each in folders.items()}, first)
        with open_model(cfg, adapter, base, trained, revision=revision, several=folders) as (model, tokenizer):
            talk(model, tokenizer, cfg, read_turns(cfg.prompt), trained, adapters)


def trained_prompting(adapter: Path) -> Prompting | None:
    """Return how the adapter was trained to be asked, with a hint where that is not one text; None: unknown."""
    from petals_tune.tuning.identity import Identity

    identity = Identity.read(adapter)
    if identity is None:
        return None
    if identity.prompting.per_row and not identity.prompting.persona:
        print("the adapter was trained with a system text for each row: give one with system=TEXT", file=sys.stderr)
    return identity.prompting


def with_prompt_key(arguments: Sequence[str]) -> list[str]:
    """Replace `--prompt TEXT` and `--prompt=TEXT` with Hydra's key, quoted so that any text is possible."""
    rest, replaced = iter(arguments), []
    for argument in rest:
        flag, equals, text = argument.partition("=")
        if flag == "--prompt":
            text = text if equals else next(rest, "")
            argument = f"prompt='{_escape(text)}'"
        replaced.append(argument)
    return replaced


def _escape(text: str) -> str:
    """Escape `text` for single quotes: `${` for OmegaConf, quotes for Hydra, and backslashes before either."""
    without_interpolation = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + (match[2] and "\\'"), without_interpolation)


@contextmanager
def open_model(
    cfg: DictConfig,
    adapter: Path | None,
    base: str,
    trained: Prompting | None = None,
    *,
    revision: str | None = None,
    several: Mapping[str, Path] = MappingProxyType({}),
) -> Iterator[tuple[Any, Any]]:
    """Open the swarm of `cfg` and yield (model, tokenizer); the end of the block closes a local swarm.

    several: adapters by name, `adapter` among them, which calls choose from; none: all calls have `adapter`

    Raises ConfigError for an adapter with a classification head, or of another model, and for two system texts.
    """
    from petals_tune.model.checkpoint import Checkpoint
    from petals_tune.model.convert import model_folder
    from petals_tune.model.families import family_of, placeholder_model
    from petals_tune.remote.auto import AutoDistributedModelForCausalLM
    from petals_tune.remote.speculative.choice import check_draft_name
    from petals_tune.train.options import open_swarm
    from petals_tune.train.quiet import silence_known_warnings
    from petals_tune.tuning.saved import check_adapter, load_adapter, load_tokenizer, saved_config, saved_vocabulary
    from petals_tune.tuning.support import check_config

    silence_known_warnings()
    check_draft_name(cfg.draft)
    if cfg.persona and cfg.system is not None:
        raise ConfigError("persona and system are both a system text: give one of them", key="system", seen=cfg.system)
    given = list(several.values()) or ([] if adapter is None else [adapter])
    for folder in given:
        if saved_config(folder).task_type == "SEQ_CLS":
            raise ConfigError(
                f"{folder} classifies and cannot talk; python -m petals_tune.evaluate adapter={folder} recipe=NAME "
                "measures it",
                key="adapter",
                seen=folder,
            )
    source = model_folder(base, revision)
    for folder in given:
        check_config(saved_config(folder))
        check_adapter(folder, task="CAUSAL_LM", source=source, revision=revision, named=base)
        if several and saved_vocabulary(folder) is not None:
            text = f"{folder} has a vocabulary of its own: talk to it alone, with adapter={folder}"
            raise ConfigError(text, key="adapters", seen=folder)
    blocks = family_of(placeholder_model(Checkpoint(source, revision=revision).config)).total_blocks
    swarm = build(cfg.swarm, where="swarm")
    swarm.check(blocks)
    tokenizer: Any = load_tokenizer(source, adapter, revision)
    if trained is not None and trained.form == "chat" and not several:
        tokenizer.chat_template = trained.chat_template
    # On stderr: stdout has the answers alone, for a pipe.
    print(f"{swarm.describe_opening(blocks)} ...", file=sys.stderr, flush=True)
    with open_swarm(swarm, source, blocks, revision) as peers:
        model: Any = AutoDistributedModelForCausalLM.from_pretrained(
            source, revision=revision, initial_peers=peers, **swarm.client_options()
        )
        try:
            for name, folder in several.items():
                model.adapters.load(name, folder)
            yield model if adapter is None or several else load_adapter(model, adapter), tokenizer
        finally:
            model.remote_blocks.close()


def read_turns(prompt: str | None) -> Iterator[str]:
    """Yield `prompt`, or all of a pipe as one turn, or the lines of a terminal until Ctrl-D or Ctrl-C."""
    if prompt is not None:
        yield prompt
        return
    if not reads_terminal(prompt):
        yield sys.stdin.read().strip()
        return
    print("Say something; Ctrl-C stops an answer, Ctrl-D ends the chat.", flush=True)
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line:
            yield line


def talk(
    model: Any,
    tokenizer: Any,
    cfg: DictConfig,
    turns: Iterator[str],
    trained: Prompting | None = None,
    adapters: ChatAdapters | None = None,
) -> None:
    """Print an answer to each turn, token by token, in one session, whose KV caches save sending old tokens again.

    The model is asked as its adapter was `trained` to be; None: as a bare model, in a chat without a system text. Of
    several `adapters`, a turn may choose another, which sees the chat so far behind a system text of its own.
    Raises ConfigError where the chat has no room for another answer.
    """
    import torch
    from transformers import TextStreamer, set_seed

    from petals_tune.data.checks import check_vocabulary
    from petals_tune.sampling import generation_options
    from petals_tune.tuning.identity import Prompting

    set_seed(cfg.seed)
    base, adapters, template = base_model(model), adapters or ChatAdapters(), tokenizer.chat_template
    messages: list[Message] = []
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def begin(trained: Prompting | None) -> tuple[Prompting, Any]:
        """Ask as an adapter was `trained` to be asked from now on; return that, and the options of generation."""
        if adapters.folders:
            tokenizer.chat_template = trained.chat_template if trained and trained.form == "chat" else template
        trained = trained or Prompting()
        messages[:] = [*first_messages(cfg, trained), *(each for each in messages if each["role"] != "system")]
        new = 1 if trained.form == "label" else cfg.max_new_tokens  # a label is one token
        options = generation_options(base, tokenizer, max_new_tokens=new, temperature=cfg.temperature, top_p=cfg.top_p)
        return trained, options

    trained, generation = begin(trained)
    with base.inference_session(max_length=cfg.max_length) as session:
        for turn in turns:
            if adapters.follow(turn):
                trained, generation = begin(adapters.trained[str(adapters.name)])
                continue
            if trained.form != "chat":
                messages.clear()  # a text or a label's text stands alone
            messages.append({"role": "user", "content": turn})
            prompt = prompt_ids(messages, tokenizer, trained)
            check_vocabulary(prompt, tokenizer, base.config.get_text_config().vocab_size)
            ids = torch.tensor([prompt])
            length = ids.shape[1] + cfg.max_new_tokens
            if length > cfg.max_length:
                raise ConfigError(
                    f"the chat is {ids.shape[1]} tokens long and the next answer may take {cfg.max_new_tokens}: "
                    f"start again, with max_length={2 * length} for a longer one",
                    key="max_length",
                    seen=cfg.max_length,
                )
            with stop_on_interrupt() if reads_terminal(cfg.prompt) else nullcontext() as stop:
                output = model.generate(
                    input_ids=ids,
                    generation_config=generation,
                    streamer=streamer,
                    stopping_criteria=stop,
                    draft=cfg.draft,
                    **adapters.options,
                )
            answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer.strip()})
        if (drafts := getattr(session, "speculation", None)) is not None:
            print(drafts.describe(), file=sys.stderr)


def first_messages(cfg: DictConfig, trained: Prompting) -> list[Message]:
    """Return the turns before the first question: the persona or the system text of `cfg`, else the adapter's own."""
    from petals_tune.data.chitchat import persona_message

    if cfg.persona:
        return [persona_message(cfg.persona)]
    system = trained.system if cfg.system is None else cfg.system
    return [{"role": "system", "content": system}] if system else []


def prompt_ids(messages: Sequence[Message], tokenizer: Any, trained: Prompting) -> list[int]:
    """Encode the prompt of the next answer, with the token ids that training had before it."""
    from petals_tune.data.rows import context_ids
    from petals_tune.data.tokens import encode

    if trained.form == "chat":
        return context_ids(messages, tokenizer)
    text = messages[-1]["content"]
    if trained.form == "label":
        text = (trained.template or "{text}").replace("{text}", " ".join(text.split()))
    return encode(text, tokenizer, begin=True)


def reads_terminal(prompt: str | None) -> bool:
    """Whether a person types the turns at a terminal."""
    return prompt is None and sys.stdin.isatty()


@contextmanager
def stop_on_interrupt() -> Iterator[list[Callable[..., bool]]]:
    """Yield stopping criteria for `generate`: the first Ctrl-C ends the answer after a token, a second interrupts."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield [lambda ids, scores, **_: stopped]
    finally:
        signal.signal(signal.SIGINT, before)


def base_model(model: Any) -> Any:
    """Return the model inside, where PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


if __name__ == "__main__":
    main()
