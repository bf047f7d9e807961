"""A service with Tinker's interface over a tiny model on a swarm in this process; and the same training by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import tinker
import tokenizers
import torch
from starlette.types import ASGIApp
from tinker import types
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.service.decoding.decoder import Decoder
from petals_tune.service.errors import stopping
from petals_tune.service.metrics import Metrics
from petals_tune.service.remote import RemoteModel
from petals_tune.service.tinker.routes import Limits, Tinker
from petals_tune.service.tinker.runs.adapters import RemoteAdapters
from petals_tune.service.users.fairness import Fairness
from petals_tune.service.users.keys import Keys
from petals_tune.service.users.slots import Slots
from petals_tune.service.web.app import application
from tests.inprocess import in_process_swarm
from tests.models import VOCABULARY, plain_model, save_model
from tests.service.port import served

NAME, POSITIONS = "tiny/llama", 64
KEY = "tml-0123456789abcdef"
TEXTS = [[3, 9, 4, 1, 5], [8, 2, 7], [11, 12, 13, 14, 15, 16]]
ADAM = types.AdamParams(learning_rate=1e-3, eps=1e-8)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


@dataclass(frozen=True)
class TinySwarm:
    model: Any
    plain: Path  # the same model's folder


@contextmanager
def tiny_swarm(folder: Path, family: str = "llama", **limits: Any) -> Iterator[TinySwarm]:
    """A model of six blocks on two servers in this process, in float32."""
    place = save_model(folder, family, initializer_range=0.1)
    with in_process_swarm(place, "0:3", "3:6", **limits):
        model: Any = AutoDistributedModelForCausalLM.from_pretrained(str(place), initial_peers=["in process"])
        yield TinySwarm(model, place)
        model.remote_blocks.close()


def tokenizer() -> Any:
    """Token n is the word "wn"."""
    words = tokenizers.Tokenizer(WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words)


@dataclass
class Running:
    url: str
    tinker: Tinker
    loop: asyncio.AbstractEventLoop

    def client(self, key: str = KEY) -> tinker.ServiceClient:
        return tinker.ServiceClient(base_url=self.url, api_key=key)

    def call(self, work: Any) -> Any:
        """The result of a coroutine in the service's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)


@contextmanager
def running_tinker(
    folder: Path, model: Any, *, keys: Keys | None = None, limits: Limits | None = None, port: int = 0
) -> Iterator[Running]:
    """A service whose records are in `folder`, until the end of the block, when it stops as the command does."""
    slots = Slots(32)
    fairness, metrics = Fairness(slots=slots, most_in_flight=64, most_waiting=64), Metrics(slots)
    decoder = Decoder(RemoteModel(model), tokenizer(), fairness, metrics, vocabulary=VOCABULARY, ends=frozenset({0}))
    service = Tinker(
        folder,
        RemoteAdapters(model),
        decoder,
        fairness,
        metrics,
        names={NAME: POSITIONS},
        vocabulary=VOCABULARY,
        limits=limits or Limits(),
    )

    @asynccontextmanager
    async def opened() -> AsyncIterator[ASGIApp]:
        async with service.running():
            yield application(service.routes, keys or Keys(owners=None))
        decoder.close()

    def at_stop() -> None:
        service.stop()
        decoder.end(stopping())

    with served(opened, port=port, at_stop=at_stop) as running:
        yield Running(running.url, service, running.loop)


def datum(text: Sequence[int], **inputs: Sequence[float]) -> types.Datum:
    """A text whose tokens predict the next ones."""
    tensors = {"target_tokens": types.TensorData.from_torch(torch.tensor(text[1:]))}
    for name, values in inputs.items():
        tensors[name] = types.TensorData.from_torch(torch.tensor(values, dtype=torch.float32))
    return types.Datum(model_input=types.ModelInput.from_ints(list(text[:-1])), loss_fn_inputs=tensors)


DATA = [datum(text, weights=[1.0] * (len(text) - 1)) for text in TEXTS]


class Reference:
    """Training of the plain model with stock PEFT and torch, by hand."""

    def __init__(self, plain: Path, rank: int, seed: int, *, texts: Sequence[Sequence[int]] = TEXTS, lr: float = 1e-3):
        model = plain_model(plain).float()
        torch.manual_seed(seed)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=32, target_modules=MODULES)
        self.net, self._texts = peft.get_peft_model(model, config), texts
        trained = [each for each in self.net.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    def logprobs(self, text: Sequence[int]) -> torch.Tensor:
        logits = self.net(torch.tensor([text[:-1]])).logits[0]
        return logits.log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None]).flatten()

    def all_logprobs(self) -> list[torch.Tensor]:
        return [self.logprobs(text) for text in self._texts]

    def loss(self) -> torch.Tensor:
        return -torch.cat(self.all_logprobs()).sum()

    def gradient_norm(self) -> float:
        return torch.cat([p.grad.flatten() for p in self.net.parameters() if p.grad is not None]).norm().item()

    def step(self, loss: torch.Tensor | None = None) -> float:
        """Take a step down `loss`, that of all texts if none is given; return it."""
        loss = self.loss() if loss is None else loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def assert_like(output: types.ForwardBackwardOutput, expected: Sequence[torch.Tensor]) -> None:
    """Compare the log-probabilities of an output with those expected."""
    for found, each in zip(output.loss_fn_outputs, expected, strict=True):
        torch.testing.assert_close(found["logprobs"].to_torch(), each.detach(), atol=1e-5, rtol=1e-5)
