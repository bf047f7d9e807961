"""The whole service over a swarm in this process, with a tiny chat model and real adapters."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from starlette.types import ASGIApp
from transformers import AutoModelForCausalLM, AutoTokenizer

from petals_tune.config import composed
from petals_tune.remote.auto import AutoDistributedModelForCausalLM
from petals_tune.service.remote import RemoteText
from petals_tune.service.run import Core, service
from petals_tune.service.users.keys import Keys
from petals_tune.service.web.app import application
from petals_tune.tuning.saved import load_tokenizer
from tests.inprocess import InProcessSwarm, in_process_swarm
from tests.service.port import served
from tests.train.tiny import tiny_model, tiny_tokenizer

# As Hermes and Qwen have it.
TEMPLATE = """\
{%- if tools %}<|system|>tools:{% for tool in tools %}{{ tool | tojson }}{% endfor %}
write <tool_call> and JSON
{% endif %}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
NAME = "tiny"


def save_chat_model(folder: Path) -> Path:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, model: Path, *, seed: int, kind: str = "lora") -> Path:
    """An adapter that changes what the model says."""
    torch.manual_seed(seed)
    config: Any = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    if kind == "lora":
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    net = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    net.save_pretrained(folder)
    return folder


class Plain:
    """The same model in this process: what is right."""

    def __init__(self, model: Path):
        self.folder = model
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)

    @functools.cache  # noqa: B019  # of one module's tests
    def model(self, adapter: Path | None = None) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(self.folder)
        return model.eval() if adapter is None else peft.PeftModel.from_pretrained(model, str(adapter)).eval()

    def text(self, prompt: str, count: int, adapter: Path | None = None, **options: Any) -> str:
        """Greedy text of transformers' own generate."""
        tokens = self.tokens(self.tokenizer(prompt).input_ids, count, adapter, **options)
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def tokens(self, prompt: Sequence[int], count: int, adapter: Path | None = None, **options: Any) -> list[int]:
        ids = torch.tensor([list(prompt)])
        output = self.model(adapter).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            **{"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.eos_token_id, **options},
        )[0]
        return output[ids.shape[1] :].tolist()


class Gate:
    """Holds the first text that comes to its step number `step` until it is opened: the fault is in its middle."""

    def __init__(self, monkeypatch: Any, step: int):
        self._open, self.held = threading.Event(), threading.Event()
        steps: dict[int, int] = {}
        plain = RemoteText.logits

        def logits(text: RemoteText, ids: Any) -> torch.Tensor:
            steps[id(text)] = steps.get(id(text), 0) + 1
            if steps[id(text)] == step and not self.held.is_set():
                self.held.set()
                assert self._open.wait(60)
            return plain(text, ids)

        monkeypatch.setattr(RemoteText, "logits", logits)

    def open(self) -> None:
        self._open.set()


@dataclass(frozen=True, kw_only=True)
class Serving:
    url: str
    model: Any  # over the swarm
    core: Core
    loop: asyncio.AbstractEventLoop  # of the service
    swarm: InProcessSwarm


@contextmanager
def serving(
    folder: Path, *overrides: str, spans: tuple[str, ...] = ("0:1", "1:2"), keys: Keys | None = None, port: int = 0
) -> Iterator[Serving]:
    """The service over a swarm of `spans`, until the end of the block; `overrides` are options of the command."""
    cfg = composed([f"model.source='{folder}'", f"name={NAME}", *overrides], config_name="service")
    with ExitStack() as stack:
        swarm = stack.enter_context(in_process_swarm(folder, *spans))
        model: Any = AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=["in this process"])
        stack.callback(model.remote_blocks.close)
        tokenizer = load_tokenizer(str(folder), None)
        cores: list[Core] = []

        @asynccontextmanager
        async def opened() -> AsyncIterator[ASGIApp]:
            async with service(cfg, model, tokenizer) as (core, routes):
                cores.append(core)
                yield application(routes, keys or Keys(owners=None), metrics=core.metrics)

        def at_stop() -> None:
            for each in cores[0].at_stop:
                each()

        running = stack.enter_context(served(opened, port=port, at_stop=at_stop))
        yield Serving(url=running.url, model=model, core=cores[0], loop=running.loop, swarm=swarm)
