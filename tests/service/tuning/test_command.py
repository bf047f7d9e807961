from dataclasses import replace

import pytest

from petals_tune.config import check_arguments, composed
from petals_tune.errors import ConfigError
from petals_tune.service.tuning.command import Recipe, overrides, swarm_options
from petals_tune.train.options import JoinedSwarm, LocalSwarm
from tests.raising import raises
from tests.service.tuning.test_store import job

PEERS = ["/ip4/127.0.0.1/tcp/1/p2p/QmA", "/ip4/127.0.0.1/tcp/2/p2p/QmB"]


@pytest.fixture(scope="module")
def recipe():
    return Recipe.of(
        "tune_my_data",
        source="/models/it's mine",
        revision=None,
        swarm=LocalSwarm(quantization="nf4", verify=0.5, local_blocks=["0:2"]),
        peers=PEERS,
        max_tokens=2048,
    )


def composed_of(recipe, folder, made=None, **more):
    command = recipe.command(made or job(held_out_share=0.2), folder, starts_from=None, place=0, **more)
    assert command[1:4] == ["-P", "-m", "petals_tune"]
    check_arguments(command[4:])
    return composed(command[4:])


def test_the_command_line_is_the_recipe_over_the_swarm_of_the_service(recipe, tmp_path):
    plain = composed(["recipe=tune_my_data", "swarm=join", "swarm.initial_peers=[x]"])
    cfg = composed_of(recipe, tmp_path)
    assert (recipe.batch_size, recipe.learning_rate) == (plain.data.batch_size, plain.optimizer.lr)
    assert cfg.tuning == plain.tuning
    assert (cfg.objective, cfg.schedule) == (plain.objective, plain.schedule)
    assert cfg.swarm == {
        **plain.swarm,
        "initial_peers": PEERS,
        "quantization": "nf4",
        "verify": 0.5,
        "local_blocks": ["0:2"],
    }
    assert cfg.model == {"source": "/models/it's mine", "revision": None}
    assert cfg.optimizer.lr == plain.optimizer.lr * 0.5
    assert (cfg.trainer.max_epochs, cfg.trainer.max_steps) == (3, -1)
    assert (cfg.data.batch_size, cfg.data.max_tokens, cfg.seed) == (4, 2048, 1)
    assert cfg.data.source.columns._target_ == "petals_tune.data.columns.Chats"
    assert (cfg.data.source.path, cfg.data.source.held_out_share) == (str(tmp_path / "data" / "train.jsonl"), 0.2)
    assert (cfg.logger, cfg.exit_with_stdin, cfg.ckpt_path) == ({}, True, None)


def test_a_validation_file_an_adapter_to_start_from_and_a_checkpoint(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.ckpt").touch()
    command = recipe.command(job(), tmp_path, starts_from=tmp_path / "adapter", place=0)
    cfg = composed(command[4:])
    assert (cfg.data.source.path, cfg.data.source.validation_split) == (str(tmp_path / "data"), "validation")
    assert cfg.tuning.init_from == str(tmp_path / "adapter")
    assert cfg.ckpt_path == str(tmp_path / "run" / "checkpoint.ckpt")


def test_in_a_private_swarm_each_job_has_a_token_of_its_own(recipe, tmp_path):
    private = replace(recipe, private=True, tokens=("a.token", "b.token"))
    command = private.command(job(held_out_share=0.2), tmp_path, starts_from=None, place=1)
    assert composed(command[4:]).swarm.token == "b.token"
    private.check(2)
    replace(private, tokens=()).check(3)  # no job is taken
    with raises(ConfigError, key="tuning.tokens", seen=2):
        private.check(3)


def test_the_services_own_token_is_not_handed_on():
    swarm = JoinedSwarm(initial_peers=["x"], token="mine.token", identity_path="mine.identity", quantization="int8")
    found = swarm_options(swarm, PEERS)
    assert "token" not in found
    assert "identity_path" not in found
    assert (found["initial_peers"], found["quantization"]) == (PEERS, "int8")


def test_a_recipe_that_is_none_is_refused_at_the_start():
    with raises(ConfigError, key="recipe"):
        Recipe.of("nothing", source="x", revision=None, swarm=LocalSwarm(), peers=PEERS, max_tokens=8)


def test_a_text_stays_what_it_is():
    texts = ["it's", "a\\", "a\\'b", "${x}", "a,b=c: [1]{2}", "'\\", "ft:base::1", "744", "null", "", " é ", "\\\\'"]
    cfg = composed(
        ["recipe=tune_my_data", *overrides({f"+data.source.where.t{n}": each for n, each in enumerate(texts)})]
    )
    assert list(cfg.data.source.where.values()) == texts
