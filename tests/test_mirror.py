"""The tree of tests mirrors the source: petals_tune/net/stream.py is tested in tests/net/test_stream.py.

A source file without a test file of its own name is listed in `TESTED_ELSEWHERE`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TESTED_ELSEWHERE = {
    "petals_tune/__main__.py": "tests/train/test_sweep.py",
    "petals_tune/cli.py": "tests/test_config.py",
    "petals_tune/train/measure.py": "tests/test_evaluate.py",
    "petals_tune/train/parts.py": "tests/train/test_run.py",
    # Rooms that are still being rebuilt.
    "petals_tune/blocks/adapters.py": "tests/remote/test_lora.py",
    "petals_tune/blocks/graphs.py": "tests/servers/stores/test_leases.py",
    "petals_tune/blocks/kv_cache.py": "tests/servers/stores/test_sessions.py",
    "petals_tune/blocks/quantized_cache.py": "tests/blocks/test_loading.py",
    "petals_tune/model/families.py": "tests/remote/test_families.py",
    "petals_tune/model/packaged.py": "tests/model/test_convert.py",
    "petals_tune/net/dht_auth.py": "tests/net/test_hivemind_p2p.py",
    "petals_tune/net/stats.py": "tests/net/test_stream.py",
    "petals_tune/remote/auto.py": "tests/remote/test_petals_api.py",
    "petals_tune/remote/function.py": "tests/remote/test_leases.py",
    "petals_tune/remote/prompted.py": "tests/tuning/test_deep_prompt.py",
    "petals_tune/remote/session.py": "tests/remote/test_generation.py",
    "petals_tune/remote/skeleton.py": "tests/remote/test_families.py",
    "petals_tune/swarm/chain.py": "tests/faults/test_training_faults.py",
    "petals_tune/swarm/client.py": "tests/faults/test_lost_servers.py",
    "petals_tune/swarm/hand_over.py": "tests/faults/test_handovers.py",
    "petals_tune/swarm/sums.py": "tests/remote/test_lora.py",
    "petals_tune/swarm/trace.py": "tests/faults/test_generation.py",
    "petals_tune/swarm/uploads.py": "tests/remote/test_lora.py",
    "petals_tune/swarm/verify.py": "tests/faults/test_liars.py",
    "petals_tune/wire/adapter.py": "tests/wire/test_messages.py",
    "petals_tune/wire/signing.py": "tests/wire/test_tokens.py",
    "servers/__main__.py": "tests/servers/test_options.py",
    "servers/command.py": "tests/servers/test_options.py",
    "servers/dht.py": "tests/e2e/test_private_swarm.py",
    "servers/health/__main__.py": "tests/e2e/test_health.py",
    "servers/health/table.py": "tests/servers/health/test_report.py",
    "servers/health/watch.py": "tests/e2e/test_health.py",
    "servers/health/web.py": "tests/e2e/test_health.py",
    "servers/listening.py": "tests/e2e/test_health.py",
    "servers/metrics.py": "tests/e2e/test_health.py",
    "servers/scheduling/compute_thread.py": "tests/servers/requests/test_handler.py",
    "servers/scheduling/step_batcher.py": "tests/servers/requests/test_handler.py",
    "servers/server.py": "tests/e2e/test_lifetimes.py",
    "servers/stores/adapters.py": "tests/servers/requests/test_handler.py",
    "servers/stores/budget.py": "tests/servers/requests/test_admission.py",
}

SOURCES = sorted(
    path.relative_to(ROOT)
    for room in ("petals_tune", "servers")
    for path in (ROOT / room).rglob("*.py")
    if path.name != "__init__.py"
)


def expected_test(source: Path) -> Path:
    folder = source.parent.relative_to("petals_tune") if source.parts[0] == "petals_tune" else source.parent
    return Path("tests") / folder / f"test_{source.name}"


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_a_source_file_has_a_test_file(source: Path) -> None:
    own, elsewhere = expected_test(source), TESTED_ELSEWHERE.get(source.as_posix())
    if (ROOT / own).is_file():
        assert elsewhere is None, f"{own} exists: remove {source} from TESTED_ELSEWHERE"
    else:
        assert elsewhere is not None, f"{own} does not exist: write it, or add {source} to TESTED_ELSEWHERE"
        assert (ROOT / elsewhere).is_file(), f"{source} is said to be tested in {elsewhere}, which does not exist"


def test_the_list_has_no_file_that_does_not_exist() -> None:
    assert not TESTED_ELSEWHERE.keys() - {source.as_posix() for source in SOURCES}
