"""One model, called from several threads at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import ConfigError
from tests.inprocess import in_process_swarm
from tests.models import VOCABULARY, plain_model, relative_error, save_model
from tests.raising import raises

THREADS, CALLS, LENGTH = 4, 25, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


def test_each_thread_has_the_masks_and_hidden_states_of_its_own_calls(folder):
    """Every thread hides another number of positions, and every second one asks for hidden states."""
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (THREADS, 1, LENGTH), generator=drawn)
    masks = [(torch.arange(LENGTH) >= number).long()[None] for number in range(THREADS)]
    plain, begin = plain_model(folder), Barrier(THREADS)

    def call(model: torch.nn.Module, number: int) -> torch.Tensor:
        with torch.no_grad():
            states = bool(number % 2)
            output = model(
                input_ids=ids[number], attention_mask=masks[number], use_cache=False, output_hidden_states=states
            )
        assert (output.hidden_states is not None) is states
        return output.logits[:, number:]

    expected = [call(plain, number) for number in range(THREADS)]
    with in_process_swarm(folder, "0:2", "2:6"), ThreadPoolExecutor(THREADS) as pool:
        model = AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=["in process"])

        def calls(number: int) -> float:
            begin.wait()
            return max(relative_error(call(model, number), expected[number]) for _ in range(CALLS))

        assert max(pool.map(calls, range(THREADS))) <= 1e-5
        model.remote_blocks.close()


def test_a_second_thread_cannot_open_a_session_that_generate_would_mix_up(folder):
    ids = torch.randint(VOCABULARY, (1, LENGTH))
    with in_process_swarm(folder, "0:6"), ThreadPoolExecutor(1) as pool:
        model = AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=["in process"])

        def generated(**options: object) -> torch.Tensor:
            return model.generate(ids, max_new_tokens=3, do_sample=False, **options)

        def open_another() -> None:
            with model.inference_session(max_length=16):
                pass

        def generated_in_one_of_its_own() -> torch.Tensor:
            with model.remote_blocks.new_session(max_length=16) as session:
                return generated(past_key_values=session)

        with model.inference_session(max_length=16):
            with raises(ConfigError, key="inference_session"):
                pool.submit(open_another).result()
            expected = generated()
            assert torch.equal(pool.submit(generated_in_one_of_its_own).result(), expected)
            assert torch.equal(pool.submit(generated).result(), expected), "a thread that streams, say"
        pool.submit(open_another).result()
        model.remote_blocks.close()


def test_two_threads_cannot_generate_in_one_session_at_once(folder):
    """The second one would go on with, or close, the text of the first."""
    inside, go_on = Event(), Event()

    class Held(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            inside.set()
            assert go_on.wait(60)

        def end(self) -> None:
            pass

    ids = torch.randint(VOCABULARY, (1, LENGTH))
    with in_process_swarm(folder, "0:6"), ThreadPoolExecutor(1) as pool:
        model = AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=["in process"])

        def generated(**options: object) -> torch.Tensor:
            return model.generate(ids, max_new_tokens=3, do_sample=False, **options)

        with model.inference_session(max_length=16):
            expected = generated()
            running = pool.submit(generated, streamer=Held())
            assert inside.wait(60)
            with raises(ConfigError, key="past_key_values"):
                generated()
            with raises(ConfigError, key="past_key_values"):
                generated(adapter=None)
            go_on.set()
            assert torch.equal(running.result(), expected)
            assert torch.equal(generated(), expected)
        model.remote_blocks.close()
