"""Talk to a tuned model in the terminal: python -m petals_tune.chat adapter=outputs/.../adapter"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import hydra
from omegaconf import DictConfig
from pydantic import Field

from petals_tune.cli import errors_reported
from petals_tune.config import Model, Section, build, check_arguments, folder_of
from petals_tune.errors import ConfigError

CONFIG_NAME = "chat"


@dataclass(frozen=True, kw_only=True)
class Chat:
    """All options of a chat; conf/chat.yaml says what each is for."""

    model: Model
    adapter: str | None
    swarm: Section
    persona: list[str]
    prompt: str | None
    max_new_tokens: Annotated[int, Field(ge=1)]
    max_length: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    seed: Annotated[int, Field(ge=0)]


def main() -> None:
    """python -m petals_tune.chat adapter=FOLDER [key=value ...]"""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    arguments = [_as_override(argument) for argument in sys.argv[1:]]
    sys.argv[1:] = arguments
    with errors_reported():
        check_arguments(arguments, config_name=CONFIG_NAME, schema=Chat)
        chat()


@hydra.main(version_base="1.3", config_path=str(folder_of("conf")), config_name=CONFIG_NAME)
def chat(cfg: DictConfig) -> None:
    """Read turns from the terminal or a pipe, and answer each; one turn only with `prompt`."""
    with errors_reported(), _opened(cfg) as (model, tokenizer):
        turns = _turns(cfg.prompt)
        with model.inference_session(max_length=cfg.max_length) as session:
            talk(model.answering, tokenizer, session, cfg, turns)


def talk(model: Any, tokenizer: Any, session: Any, cfg: DictConfig, turns: Iterator[str]) -> None:
    """Answer every turn. The session keeps its caches from turn to turn, and only new tokens are sent."""
    from transformers import TextStreamer, set_seed

    from petals_tune.data.rows import chat_ids, persona_message

    set_seed(cfg.seed)
    messages = persona_message(list(cfg.persona))
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = chat_ids(messages, tokenizer)
        if ids.shape[1] + cfg.max_new_tokens > cfg.max_length:
            raise ConfigError(
                f"this chat has {ids.shape[1]} tokens and may have max_length={cfg.max_length}; "
                f"start anew, or with max_length={2 * cfg.max_length}"
            )
        sampling = {"temperature": cfg.temperature, "top_p": cfg.top_p} if cfg.temperature else {}
        output = model.generate(
            input_ids=ids,
            max_new_tokens=cfg.max_new_tokens,
            do_sample=cfg.temperature > 0,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **sampling,
        )
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer.strip()})
