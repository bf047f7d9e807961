import pytest

from petals_tune.config import build, check, composed
from petals_tune.errors import ConfigError
from petals_tune.train.options import JoinedSwarm, LocalSwarm, prompt_tuning
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.tokens import secret_text
from tests.raising import raises
from tests.train.tiny import tiny_tokenizer


def spans(swarm: LocalSwarm, blocks: int) -> list[str]:
    return [str(span) for span in swarm.server_spans(blocks)]


def test_servers_get_equal_spans() -> None:
    assert spans(LocalSwarm(), 30) == ["0:15", "15:30"]
    assert spans(LocalSwarm(servers=3), 8) == ["0:2", "2:5", "5:8"]


def test_named_spans_may_overlap() -> None:
    assert spans(LocalSwarm(spans=["0:12", "8:24", "12:24"]), 24) == ["0:12", "8:24", "12:24"]


@pytest.mark.parametrize(
    ("swarm", "key", "seen"),
    [
        (LocalSwarm(servers=31), "swarm.servers", 31),
        (LocalSwarm(spans=["0:15"]), "swarm.spans", ["0:15"]),
        (LocalSwarm(spans=["2:9", "11:30"]), "swarm.spans", ["2:9", "11:30"]),
        (LocalSwarm(spans=["0:31"]), "swarm.spans", "0:31"),
        (LocalSwarm(spans=["0:12", 744]), "swarm.spans", 744),  # YAML reads an unquoted 12:24 in base 60
        (LocalSwarm(spans=["0-30"]), "swarm.spans", "0-30"),
    ],
)
def test_spans_that_cannot_work(swarm: LocalSwarm, key: str, seen: object) -> None:
    with raises(ConfigError, key=key, seen=seen):
        swarm.check(30)


def test_servers_get_the_blocks_that_are_not_local() -> None:
    assert spans(LocalSwarm(local_blocks=["0:2", "28:30"]), 30) == ["2:15", "15:28"]
    assert spans(LocalSwarm(local_blocks=["4:6"], servers=3), 8) == ["0:2", "2:4", "6:8"]
    assert spans(LocalSwarm(local_blocks=["3:4"], servers=1), 6) == ["0:6"]
    assert spans(LocalSwarm(local_blocks=["0:1", "3:4"], spans=["1:3", "4:6"]), 6) == ["1:3", "4:6"]
    with raises(ConfigError, key="swarm.spans", seen=["1:3"]):
        LocalSwarm(local_blocks=["0:1", "3:4"], spans=["1:3"]).check(6)
    with raises(ConfigError, key="swarm.servers", seen=2):
        LocalSwarm(local_blocks=["1:6"]).check(6)


@pytest.mark.parametrize(
    "swarm", [LocalSwarm(local_blocks=["0:31"]), JoinedSwarm(initial_peers=["x"], local_blocks=["0:31"])]
)
def test_local_blocks_that_the_model_does_not_have(swarm: LocalSwarm | JoinedSwarm) -> None:
    with raises(ConfigError, key="swarm.local_blocks", seen="0:31"):
        swarm.check(30)


@pytest.mark.parametrize("swarm", [[], ["swarm=join", "swarm.initial_peers=[x]"]])
def test_local_blocks_are_options_of_both_swarms(swarm: list[str]) -> None:
    cfg = composed(["recipe=sst2", *swarm, "swarm.local_blocks=[0:2,28:30]", "output_dir=out"])
    check(cfg)
    built = build(cfg.swarm, where="swarm")
    assert built.client_options()["local_blocks"] == ["0:2", "28:30"]
    assert built.client_options()["local_quantization"] == "int8"


def test_local_blocks_are_quantized_as_those_of_local_servers() -> None:
    assert composed(["recipe=sst2", "swarm.quantization=nf4"]).swarm.local_quantization == "nf4"


def test_servers_are_used_that_hold_what_was_asked_for() -> None:
    """A client of local servers asks for what it starts; one that joins takes any but what has to be named."""
    assert LocalSwarm(quantization="int8_activations").client_options()["quantization"] == "int8_activations"
    assert JoinedSwarm(initial_peers=["x"]).client_options()["quantization"] is None
    assert JoinedSwarm(initial_peers=["x"], quantization="nf4").client_options()["quantization"] == "nf4"


def test_a_span_typed_on_the_command_line_needs_no_quotes() -> None:
    assert composed(["recipe=sst2", "swarm.spans=[0:12,12:24]"]).swarm.spans == ["0:12", "12:24"]


def test_a_prompt_starts_from_a_text_or_from_words() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = "somewhere"
    text = prompt_tuning(tokenizer=tokenizer, tokens=3, init_text="count")
    assert (text.prompt_tuning_init, text.tokenizer_name_or_path) == ("TEXT", "somewhere")
    assert prompt_tuning(tokenizer=tokenizer, tokens=3).prompt_tuning_init == "SAMPLE_VOCAB"


def test_a_key_in_place_of_its_file_is_refused_before_it_is_written_anywhere_and_not_repeated() -> None:
    secret = secret_text(SigningKey(bytes(32)))
    with raises(ConfigError, key="swarm.token") as caught:
        JoinedSwarm(initial_peers=["x"], token=secret)
    assert secret not in str(caught.value)
    assert JoinedSwarm(initial_peers=["x"], token="a.token").client_options()["swarm_token"] == "a.token"
