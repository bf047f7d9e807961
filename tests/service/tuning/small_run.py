"""A small program in the place of a recipe: `small_run.py FOLDER MODE STEPS`. It writes what a run writes.

MODE is `done`, `held` (it waits before its last step), `bad` (an error of the user's) or `gone` (the swarm is away).
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

folder, mode, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
run = folder / "run"
checkpoint = run / "checkpoint.ckpt"
done = int(checkpoint.read_text()) if checkpoint.exists() else 0


def stop(*_: object) -> None:
    checkpoint.write_text(str(done))
    print("interrupted", file=sys.stderr)
    os._exit(130)


def watch_stdin() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


signal.signal(signal.SIGTERM, stop)
threading.Thread(target=watch_stdin, daemon=True).start()
if mode == "bad":
    sys.exit(f"error: row 3 is wrong in {folder}/data/train.jsonl")
if mode == "gone":
    print("error: no server", file=sys.stderr)
    sys.exit(os.EX_TEMPFAIL)
run.mkdir(exist_ok=True)
(run / "config.yaml").write_text("model: {source: tiny}\n")
with (run / "metrics.csv").open("a" if done else "w", newline="") as file:
    if not done:
        print("epoch,step,train/loss,val/loss", "0,0,,4.5", sep="\n", file=file, flush=True)
    while done < steps:
        if mode == "held" and done == steps - 1:
            child = subprocess.Popen(["sleep", "600"])
            (folder / "child").write_text(str(child.pid))
            while not (folder / "go").exists():
                time.sleep(0.02)
            child.kill()
            child.wait()
        print(f"0,{done},{4 - done}.25,", file=file, flush=True)
        done += 1
    print(f"0,{done},,1.5", file=file, flush=True)
(run / "adapter").mkdir(exist_ok=True)
(run / "adapter" / "adapter_config.json").write_text("{}")
(run / "adapter" / "adapter_model.safetensors").write_bytes(b"tensors")
(run / "replies.json").write_text(json.dumps([{"prompt": "Hi", "person": "Ho", "before": "A", "after": "B"}]))
(run / "result.json").write_text(json.dumps({"tokens": 100 * steps}))
