"""One script with the real `openai` and `tinker` packages over one gateway, which is stopped in the middle."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
import tinker
import torch
from tinker import types

from petals_tune.model.convert import embedded_model
from tests.processes import LONG_S
from tests.service.swarm import NAME, Plain, save_adapter, save_chat_model, serving
from tests.service.tinker.tiny import KEY, Reference, assert_like, datum

LINES = ("The cat sat on the mat.", "A swarm has many servers.", "One, two, three, four.")
TOKENS = 8
START_S = 300.0  # servers load torch and the model, on a machine that may be busy


@dataclass
class Script:
    """What a user does, and what a plain model in this process says of it."""

    url: str
    folder: Path  # of the plain model
    adapters: dict[str, Path]
    lr: float = 1e-3
    plain: Plain = field(init=False)

    def __post_init__(self) -> None:
        self.plain = Plain(self.folder)
        texts = [self.plain.tokenizer(line).input_ids for line in LINES]
        self.texts = texts
        self.data = [datum(text, weights=[1.0] * (len(text) - 1)) for text in texts]
        self.reference = Reference(self.folder, 8, 5, texts=texts, lr=self.lr)
        self.adam = types.AdamParams(learning_rate=self.lr, eps=1e-8)
        self.losses: list[float] = []

    def chat(self) -> None:
        """Chat, a stream, and two adapters."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        messages: Any = [{"role": "user", "content": "Hello there"}]
        asked: Any = {"messages": messages, "max_tokens": TOKENS, "temperature": 0}
        prompt = self.plain.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for name, adapter in {NAME: None, **self.adapters}.items():
            expected = self.plain.text(prompt, TOKENS, adapter)
            assert client.chat.completions.create(model=name, **asked).choices[0].message.content == expected
            stream = client.chat.completions.create(model=name, **asked, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected

    def begin(self) -> None:
        self.service = tinker.ServiceClient(base_url=self.url, api_key=KEY)
        self.training = self.service.create_lora_training_client(base_model=NAME, rank=8, seed=5).result()

    def tune(self, steps: int) -> None:
        for _ in range(steps):
            output, stepped = (
                self.training.forward_backward(self.data, "cross_entropy"),
                self.training.optim_step(self.adam),
            )
            assert_like(output.result(LONG_S), self.reference.all_logprobs())
            self.losses.append(self.reference.step())
            assert output.result().metrics["loss:sum"] == pytest.approx(self.losses[-1], rel=1e-5)
            stepped.result(LONG_S)

    def sample(self) -> None:
        """From the tuned weights, greedily."""
        sampler = self.training.save_weights_and_get_sampling_client().result(LONG_S)
        prompt = self.texts[0][:4]
        params = types.SamplingParams(max_tokens=6, temperature=0, stop=[])
        (sequence,) = sampler.sample(types.ModelInput.from_ints(prompt), 1, params).result(LONG_S).sequences
        ids, expected = list(prompt), []
        with torch.no_grad():
            for _ in range(6):
                logprobs = self.reference.net(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                ids.append(int(logprobs.argmax()))
                expected.append(logprobs.max().item())
        assert list(sequence.tokens) == ids[len(prompt) :]
        assert list(sequence.logprobs) == pytest.approx(expected, abs=1e-4)
        self.complete(prompt, expected)

    def complete(self, prompt: list[int], expected: list[float]) -> None:
        """From the same weights by OpenAI's interface; its answers end where the model ends them."""
        path = self.training.save_weights_for_sampler("final").result(LONG_S).path
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)
        assert path in [model.id for model in client.models.list()]
        answer = client.completions.create(model=path, prompt=prompt, max_tokens=6, temperature=0, logprobs=0)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs
        assert logprobs.token_logprobs == pytest.approx(expected[: len(logprobs.token_logprobs)], abs=1e-4)

    def first_half(self) -> None:
        self.chat()
        self.begin()
        self.tune(5)
        self.training.forward_backward(self.data[:1], "cross_entropy").result(LONG_S)  # its gradients outlive the stop

    def second_half(self) -> None:
        """The clients of the first half go on, behind a restart of the gateway."""
        (-self.reference.logprobs(self.texts[0]).sum()).backward()
        self.training.optim_step(self.adam).result(LONG_S)
        self.reference.optimizer.step()
        self.reference.optimizer.zero_grad()
        self.tune(5)
        self.sample()
        self.chat()
        assert self.losses[-1] < self.losses[0]
        self.service.close("success").result()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_a_script_over_a_gateway_that_is_stopped_in_the_middle(tmp_path):
    folder, port = save_chat_model(tmp_path / "model"), free_port()
    adapters = {name: save_adapter(tmp_path / "adapters" / name, folder, seed=seed) for seed, name in enumerate("ab")}
    options = [f"folder='{tmp_path}/data'", f"adapters='{tmp_path}/adapters'"]
    script = Script(f"http://127.0.0.1:{port}", folder, adapters)
    with serving(folder, *options, port=port):
        script.first_half()
    with serving(folder, *options, port=port):
        script.second_half()


@contextmanager
def gateway(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`python -m petals_tune.serve`, once it serves; it is told to stop at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "petals_tune.serve", *arguments], stderr=subprocess.PIPE, text=True
    )
    lines: list[str] = []

    def follow() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)

    threading.Thread(target=follow, daemon=True).start()
    try:
        served = re.compile(r"http://\S+")
        deadline_s = time.monotonic() + START_S
        while not any(map(served.search, list(lines))) and process.poll() is None:
            assert time.monotonic() < deadline_s, lines
            time.sleep(0.1)
        assert process.poll() is None, lines
        yield process
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(LONG_S) == 0, lines
    finally:
        process.kill()


@pytest.mark.swarm
@pytest.mark.slow
def test_the_same_over_the_command_and_the_embedded_model(tmp_path):
    folder, port = Path(embedded_model()), free_port()
    adapters = {name: save_adapter(tmp_path / "adapters" / name, folder, seed=seed) for seed, name in enumerate("ab")}
    arguments = [
        f"name={NAME}",
        f"port={port}",
        "swarm.quantization=none",
        f"folder='{tmp_path}/data'",
        f"adapters='{tmp_path}/adapters'",
    ]
    # A low rate: rounding grows with each step, and 1e-5 is asked for behind ten.
    script = Script(f"http://127.0.0.1:{port}", folder, adapters, lr=1e-4)
    with gateway(*arguments):
        script.first_half()
    with gateway(*arguments):
        script.second_half()
