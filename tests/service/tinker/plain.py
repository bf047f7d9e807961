"""A service with Tinker's interface over a plain model in this process, with stock PEFT."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import tokenizers
import torch
import uvicorn
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from tokenizers.models import WordLevel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from petals_tune.service.app import application
from petals_tune.service.decoding.decoder import Decoder
from petals_tune.service.metrics import Metrics
from petals_tune.service.tinker.routes import Tinker
from petals_tune.service.tinker.sampling import Sampling
from petals_tune.service.tinker.store import Store
from petals_tune.service.users.fairness import Fairness
from petals_tune.service.users.keys import Keys
from petals_tune.service.users.slots import Slots

NAME, VOCABULARY, POSITIONS = "tiny/llama", 64, 128
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def lora_config(lora: Any) -> peft.LoraConfig:
    modules = [*(ATTENTION if lora.train_attn else []), *(MLP if lora.train_mlp else [])]
    return peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.rank, target_modules=[*modules, *(["lm_head"] if lora.train_unembed else [])]
    )


class PlainTrained:
    """Adapters on one model, one call at a time: PEFT's active adapter is the whole model's."""

    def __init__(self) -> None:
        self.net: Any = None
        self.lock = threading.RLock()

    def _calling(self, ids: torch.Tensor, adapter: str | None, **options: Any) -> Any:
        if adapter is None:
            with self.net.disable_adapter():
                return self.net(ids, **options)
        self.net.set_adapter(adapter)
        return self.net(ids, **options)

    def create(self, adapter: str, lora: Any) -> None:
        with self.lock, torch.random.fork_rng():
            torch.manual_seed(lora.seed or 0)
            if self.net is None:
                self.net = peft.get_peft_model(tiny_model(), lora_config(lora), adapter_name=adapter)
            else:
                self.net.add_adapter(adapter, lora_config(lora))

    def parameters(self, adapter: str) -> dict[str, Any]:
        with self.lock:
            self.net.set_adapter(adapter)
            found = {name: each for name, each in self.net.named_parameters() if f".{adapter}." in name}
            for each in found.values():
                each.requires_grad_(True)
            return {name.replace(f".{adapter}.", "."): each for name, each in found.items()}

    def logprobs(self, adapter: str, data: Any) -> list[torch.Tensor]:
        found = []
        with self.lock:
            for datum in data:
                logits = self._calling(torch.tensor([datum.ids]), adapter).logits[0]
                found.append(logits.log_softmax(-1).gather(1, torch.tensor(datum.targets)[:, None]).flatten())
        return found

    def save(self, adapter: str, folder: Path) -> None:
        from safetensors.torch import save_file

        with self.lock:
            tensors = get_peft_model_state_dict(self.net, adapter_name=adapter)
            save_file({name: each.contiguous() for name, each in tensors.items()}, folder / "adapter_model.safetensors")
            self.net.peft_config[adapter].save_pretrained(folder)

    def load(self, adapter: str, folder: Path) -> None:
        with self.lock:
            set_peft_model_state_dict(self.net, peft.utils.load_peft_weights(str(folder)), adapter_name=adapter)

    def remove(self, adapter: str) -> None:
        with self.lock:
            self.net.delete_adapter(adapter)

    def load_for_sampling(self, adapter: str, folder: Path) -> None:
        with self.lock:
            if self.net is None:
                self.net = peft.PeftModel.from_pretrained(tiny_model(), str(folder), adapter_name=adapter)
            else:
                self.net.load_adapter(str(folder), adapter)

    def all_logits(self, ids: Any, adapter: str | None) -> torch.Tensor:
        with self.lock:
            return self._calling(torch.tensor([list(ids)]), adapter).logits[0]

    def open(self, adapter: str | None, max_length: int, cancelled: threading.Event) -> Any:
        return _Text(self, adapter, DynamicCache())


class _Text:
    def __init__(self, model: PlainTrained, adapter: str | None, cache: DynamicCache):
        self._model, self._adapter, self._cache = model, adapter, cache

    def logits(self, ids: Any) -> torch.Tensor:
        with self._model.lock:
            options = {"past_key_values": self._cache, "use_cache": True}
            return self._model._calling(torch.tensor([list(ids)]), self._adapter, **options).logits[0, -1]

    def fork(self) -> Any:
        return _Text(self._model, self._adapter, copy.deepcopy(self._cache))

    def close(self) -> None:
        pass


def tokenizer() -> Any:
    """Token n is the word "wn"."""
    words = tokenizers.Tokenizer(WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words)


@contextmanager
def running_tinker(folder: Path, model: PlainTrained, *, keys: Keys | None = None) -> Iterator[str]:
    """The URL of a service whose records are in `folder`."""
    started, found = threading.Event(), {}

    async def serve() -> None:
        store, slots = Store(folder / "service.sqlite"), Slots(64)
        fairness = Fairness(slots=slots, most_in_flight=64, most_waiting=64)
        metrics = Metrics(slots)
        decoder = Decoder(model, tokenizer(), fairness, metrics, vocabulary=VOCABULARY, ends=frozenset({0}))
        sampling = Sampling(decoder, model, name=NAME, most_positions=POSITIONS)
        tinker = Tinker(store, folder, model, sampling, fairness, metrics, names={NAME: POSITIONS})
        app = application(tinker.routes, keys or Keys(owners=None))
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
        server = found["server"] = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        found["port"] = server.servers[0].sockets[0].getsockname()[1]
        started.set()
        await task
        await tinker.close()
        store.close()
        decoder.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(30)
    try:
        yield f"http://127.0.0.1:{found['port']}"
    finally:
        found["server"].should_exit = True
        thread.join(30)
        assert not thread.is_alive()
