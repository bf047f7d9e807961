"""The tree of errors says of each what to do with it."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
from transformers import AutoConfig

from petals_tune import errors
from petals_tune.config import check_arguments
from petals_tune.errors import AccessDenied, ConfigError, Fault, PetalsTuneError, Retriable, UnsupportedModel
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.families import family_of, placeholder_model
from petals_tune.net.members import Members, load_identity
from petals_tune.wire.signing import SigningKey
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tokens import issue, public_text, token_text
from tests.raising import raises


def all_errors(root: type[PetalsTuneError] = PetalsTuneError) -> Iterator[type[PetalsTuneError]]:
    for kind in root.__subclasses__():
        yield kind
        yield from all_errors(kind)


@pytest.mark.parametrize("kind", sorted(set(all_errors()), key=lambda kind: kind.__name__))
def test_each_error_says_whose_fault_it_is_stands_in_the_drawn_tree_and_travels_between_processes(kind):
    assert kind.fault in get_args(Fault)
    assert f" {kind.__name__} " in errors.__doc__ or f"`{kind.__name__}`" in errors.__doc__
    assert pickle.loads(pickle.dumps(kind("text"))).args == ("text",)


def test_fields_have_defaults_travel_between_processes_and_are_declared():
    error = errors.ConfigError("text", key="swarm.attempts", seen=-1)
    assert (error.key, error.seen, str(error)) == ("swarm.attempts", -1, "text")
    assert vars(pickle.loads(pickle.dumps(error))) == {"key": "swarm.attempts", "seen": -1}
    assert errors.ConfigError("text").key == ""
    with pytest.raises(AssertionError):
        errors.ConfigError("text", kye="swarm.attempts")


def test_what_is_tried_again_is_never_the_users_own_fault():
    retried = [kind for kind in all_errors() if issubclass(kind, Retriable) and kind is not Retriable]
    assert len(retried) >= 9
    assert not [kind for kind in retried if kind.fault == "yours"]


OWNER, ALICE, HOST = (SigningKey(bytes([number]) * 32) for number in range(3))


def command_line(line: str) -> Callable[[], object]:
    return lambda: check_arguments(line.split())


def token(name: str, **claims: object) -> Callable[[], object]:
    """Start as alice with this token."""

    def read() -> object:
        given = issue(OWNER, **{"name": name, "peer": ALICE.peer, "hosts": False, "expires_s": 2**39, **claims})
        Path(f"{name}.token").write_text(token_text(given))
        return Members.with_token(f"{name}.token", ALICE)

    return read


def public_key_alone() -> object:
    Path("swarm.pub").write_text(public_text(OWNER))
    return Members.with_key("swarm.pub", None, HOST)


# Whole texts, here alone: of what users meet most often. All other tests know an error by its class and its fields.
TEXTS: dict[str, tuple[Callable[[], object], type[PetalsTuneError], str]] = {
    "an option that is misspelt": (
        command_line("recipe=sst2 tuning.token=16"),
        ConfigError,
        "tuning.token is no option (did you mean tuning.tokens?); tuning has tokens, init_text, usual_lr, init_from",
    ),
    "a value of another type": (
        command_line("recipe=sst2 trainer.max_steps=abc"),
        ConfigError,
        "trainer.max_steps is 'abc': it must be a valid integer",
    ),
    "an argument that is no option": (
        command_line("sst2"),
        ConfigError,
        "cannot read the argument 'sst2': options are written KEY=VALUE; --help lists them",
    ),
    "a swarm without addresses": (
        command_line("recipe=sst2 swarm=join"),
        ConfigError,
        "swarm.initial_peers has no value: give the addresses that a running server prints, as in "
        "swarm.initial_peers=[/ip4/10.0.0.5/tcp/31337/p2p/Qm...]",
    ),
    "text that is no span": (
        lambda: BlockSpan.parse("12-24"),
        ConfigError,
        "blocks='12-24' is not a span; write start:stop with start < stop, as in \"0:12\"",
    ),
    "a span that YAML read as a number": (
        lambda: BlockSpan.parse(744),
        ConfigError,
        'blocks=744 is a number, not a span: YAML reads 12:24 so; quote it: blocks: "12:24"',
    ),
    "a folder that is not there": (
        lambda: Checkpoint("./nowhere").config,
        UnsupportedModel,
        "model.source=./nowhere: there is no such folder; give one with config.json and safetensors files, or the name "
        "of a model on the hub",
    ),
    "a folder without config.json": (
        lambda: Checkpoint(".").config,
        UnsupportedModel,
        "model.source=.: the folder has no config.json; save the model with model.save_pretrained(folder), or convert "
        "a GGUF file with: python -m petals_tune.model.convert FILE.gguf FOLDER",
    ),
    "a model that cannot be split": (
        lambda: family_of(placeholder_model(AutoConfig.for_model("t5", d_model=8, num_layers=1, vocab_size=8))),
        UnsupportedModel,
        "model_type='t5' is an encoder and a decoder; decoders alone can be split, such as BLOOM or Llama",
    ),
    "a token that has expired": (
        token("alice", expires_s=1),
        AccessDenied,
        "the token of alice has expired: ask the swarm's owner for a new one,  "
        f"python -m servers.keys issue --name alice --peer {ALICE.peer}",
    ),
    "somebody else's token": (
        token("bob", peer=HOST.peer),
        AccessDenied,
        f"the token of bob was issued to peer {HOST.peer}, and this is {ALICE.peer}: use the identity file that it was "
        "issued for",
    ),
    "a server without a token": (
        public_key_alone,
        ConfigError,
        "swarm.key=swarm.pub is the public key, which cannot sign tokens: this server needs a token of its own, "
        "swarm.token=FILE\n  the swarm's owner makes it:  python -m servers.keys issue --name NAME --hosts "
        f"--peer {HOST.peer}",
    ),
    "a file in a folder that is not there": (
        lambda: load_identity("nowhere/my.identity", make=True),
        ConfigError,
        "identity_path=nowhere/my.identity cannot be written: No such file or directory; its folder has to be there",
    ),
}


@pytest.mark.parametrize("mistake", TEXTS)
def test_a_mistake_has_this_text(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, kind, text = TEXTS[mistake]
    with raises(kind) as caught:
        make()
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text,\n  a command\tand a tab", "plain text,\n  a command\tand a tab"),
        ("\x1b[2J\x9b31m\x07\r\0", "?[2J?31m???"),
        ("\u202eabc\u2066\u200b\ufeff\u2028", "?abc????"),
        ("\ud800", "?"),
        ("日本語 é \u3000 \xa0 😀", "日本語 é \u3000 \xa0 😀"),
    ],
)
def test_no_error_carries_control_characters_to_a_terminal(text, shown):
    assert str(PetalsTuneError(text)) == shown
