"""The tree of tests mirrors the source: petals_tune/net/stream.py is tested in tests/net/test_stream.py.

A source file without a test file of its own name is listed in `TESTED_ELSEWHERE`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TESTED_ELSEWHERE = {
    "petals_tune/__main__.py": "tests/train/test_sweep.py",
    "petals_tune/blocks/generation/session.py": "tests/blocks/generation/test_memory.py",
    "petals_tune/blocks/generation/sizes.py": "tests/blocks/generation/test_probe.py",
    "petals_tune/blocks/generation/step_cache.py": "tests/blocks/generation/test_states.py",
    "petals_tune/blocks/passes.py": "tests/blocks/test_finite.py",
    "petals_tune/blocks/quantization/int8_linear.py": "tests/blocks/test_kernels.py",
    "petals_tune/data/chat_format.py": "tests/data/test_chat_rows.py",
    "petals_tune/data/examples.py": "tests/data/test_encoding.py",
    "petals_tune/hydra_errors.py": "tests/test_config.py",
    "petals_tune/model/stored.py": "tests/model/test_checkpoint.py",
    "petals_tune/remote/adapters/choice.py": "tests/remote/adapters/test_calls.py",
    "petals_tune/remote/backbone.py": "tests/remote/test_blocks.py",
    "petals_tune/remote/model_call.py": "tests/remote/test_threads.py",
    "petals_tune/service/tinker/bodies.py": "tests/service/tinker/test_routes.py",
    "petals_tune/service/tinker/checkpoints.py": "tests/service/tinker/test_routes.py",
    "petals_tune/service/tinker/listing.py": "tests/service/tinker/test_routes.py",
    "petals_tune/service/tinker/promises.py": "tests/service/tinker/runs/test_live.py",
    "petals_tune/service/tinker/records.py": "tests/service/tinker/test_store.py",
    "petals_tune/service/tinker/runs/run.py": "tests/service/tinker/test_routes.py",
    "petals_tune/service/tinker/runs/training.py": "tests/service/tinker/test_routes.py",
    "petals_tune/service/tinker/sampling.py": "tests/service/tinker/test_routes.py",
    "petals_tune/service/tinker/sessions.py": "tests/service/tinker/test_routes.py",
    "petals_tune/service/tinker/wire.py": "tests/service/tinker/test_routes.py",
    "petals_tune/service/tuning/paging.py": "tests/service/tuning/test_routes.py",
    "petals_tune/train/measure.py": "tests/test_evaluate.py",
    "servers/__main__.py": "tests/servers/test_main.py",
    "servers/health/__main__.py": "tests/e2e/test_health.py",
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
