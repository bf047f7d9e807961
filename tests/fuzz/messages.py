"""Fuzz all that reads bytes of strangers, with coverage as the guide: messages, frames, records, tokens, identities.

    pip install 'petals_tune[fuzz]'
    python tests/fuzz/messages.py --seconds 60

Any bytes are read or raise ProtocolError (ConfigError for files); anything else is a find, and ends the run with the
input that did it. Prints one line a target, and JSON as the last line.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TARGETS = ("messages", "hello", "frames", "records", "tokens", "identities")
LARGEST = 4096  # bytes of an input


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("--target", choices=TARGETS, help=argparse.SUPPRESS)  # a process of its own: libFuzzer exits
    given = parser.parse_args()
    if given.target is not None:
        fuzz(given.target, given.seconds)
        return
    tried = {}
    for target in TARGETS:
        command = [sys.executable, __file__, "--target", target, "--seconds", str(given.seconds)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        counted = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
        if done.returncode or counted is None:
            sys.exit(f"{target}: a find\n{done.stderr[-4000:]}")
        tried[target] = int(counted[1])
        print(f"{target:<12}{tried[target]:>12,} inputs, none but read or refused", flush=True)
    print(json.dumps({"inputs": tried, "total": sum(tried.values()), "finds": 0}))


def fuzz(target: str, seconds: int) -> None:
    """Fuzz one target; does not return."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import atheris

    with atheris.instrument_imports(include=["petals_tune"]):
        from petals_tune.errors import AccessDenied, ConfigError, ProtocolError
        from petals_tune.wire import codec, frames, records, signing, tokens

    from tests.wire.test_messages import EXAMPLES, RECORD
    from tests.wire.test_tokens import ALICE, TOKEN

    def feed(data: bytes) -> None:
        reader = frames.Assembler(max_message_bytes=1000, max_open_bytes=2000)
        size = frames.HEADER.size
        while len(data) >= size:
            length, message_id, remaining = frames.read_header(data[:size])
            reader.feed(message_id, data[size : size + length], remaining)
            assert reader.open_bytes <= 2000
            data = data[size + length :]

    framed = b"".join(bytes(part) for pair in frames.cut(1, bytes(300)) for part in pair)
    encoded = [codec.encode(example) for example in EXAMPLES]
    read, seeds = {
        "messages": (codec.decode, encoded),
        "hello": (codec.decode_hello, encoded),
        "frames": (feed, [framed, 2 * framed]),
        "records": (records.decode_record, [records.encode_record(RECORD)]),
        "tokens": (tokens.verify, [TOKEN.encoded]),
        "identities": (signing.identity_from, [signing.identity_bytes(ALICE)]),
    }[target]

    def one_input(data: bytes) -> None:
        with contextlib.suppress(AccessDenied, ConfigError, ProtocolError):
            read(data)

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds):
            Path(corpus, str(number)).write_bytes(seed)
        options = [f"-max_total_time={seconds}", f"-max_len={LARGEST}", "-print_final_stats=1", "-verbosity=0"]
        atheris.Setup([sys.argv[0], corpus, *options, "-artifact_prefix=/dev/null"], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
