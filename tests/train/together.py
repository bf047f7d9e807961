"""Plain Python, as a user would write it: several processes tune one adapter over one local swarm, a private one.

    python -m tests.train.together MODEL_FOLDER OUT_FOLDER            (which holds the keys)
    python -m tests.train.together MODEL_FOLDER OUT_FOLDER resumed    (trains a local model in two parts, and whole)

Lightning starts this program again for each further process.
"""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from petals_tune import AutoDistributedModelForCausalLM, local_swarm
from petals_tune.data.module import TextData
from petals_tune.remote.skeleton import is_placeholder
from petals_tune.train.callbacks import NewestCheckpoint
from petals_tune.train.module import FineTuner
from petals_tune.train.objective import CausalLM
from tests.train.tiny import TinyTalk, tiny_tokenizer

STEPS = 3
LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])


def tuner(model: nn.Module, **lora: Any) -> FineTuner:
    torch.manual_seed(1)
    return FineTuner(get_peft_model(model, replace(LORA, **lora)), CausalLM(), partial(torch.optim.SGD, lr=1.0))


def talk(batch_size: int, *, length_buckets: bool = True) -> TextData:
    return TextData(TinyTalk(), tokenizer=tiny_tokenizer(), batch_size=batch_size, length_buckets=length_buckets)


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"accelerator": "cpu", "max_steps": STEPS, "enable_checkpointing": False, **options},
    )


def main(model_folder: str, out: Path) -> None:
    private = [f"swarm.key='{out}/swarm.key'"]
    with local_swarm(model_folder, spans=["0:1", "1:2"], quantization="none", overrides=private) as peers:
        model = AutoDistributedModelForCausalLM.from_pretrained(
            model_folder, initial_peers=peers, swarm_token=str(out / "alice.token")
        )
        run = trainer(out, strategy="ddp", devices=2, accumulate_grad_batches=2)
        module, data = tuner(model), talk(batch_size=3, length_buckets=False)
        run.fit(module, datamodule=data)
        (tested,) = run.test(module, datamodule=data, verbose=False)
        placeholder = all(
            is_placeholder(weight)
            for name, weight in model.remote_blocks.named_parameters()
            if "lora_" not in name and weight.numel() > 1
        )
        facts = f"placeholder={placeholder} sent={model.remote_blocks.stats.sent_bytes} loss={tested['test/loss']:.9f}"
        (out / f"rank_{run.global_rank}.txt").write_text(facts)
        if run.is_global_zero:
            save_file(
                {name: value.detach() for name, value in module.trained_parameters()}, out / "trained.safetensors"
            )
        run.strategy.barrier()
        model.remote_blocks.close()


def resumed(model_folder: str, out: Path) -> None:
    """Train a local model with dropout for 4 steps, and again with a stop after 2; each rank has other numbers."""

    def fit(folder: Path, steps: int, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
        newest = NewestCheckpoint(str(folder / "checkpoint.ckpt"))
        options = {"max_steps": steps, "callbacks": [newest], "enable_checkpointing": True}
        run = trainer(folder, strategy="ddp", devices=2, accumulate_grad_batches=2, **options)
        module = tuner(AutoModelForCausalLM.from_pretrained(model_folder), lora_dropout=0.3)
        torch.rand(run.global_rank + (checkpoint is not None))  # what was drawn before is not the same
        run.fit(module, datamodule=talk(batch_size=3, length_buckets=False), ckpt_path=checkpoint)
        run.strategy.barrier()
        return {name: value.detach().clone() for name, value in module.trained_parameters()}

    whole = fit(out / "whole", 4)
    fit(out / "parts", 2)
    parts = fit(out / "parts", 4, out / "parts" / "checkpoint.ckpt")
    same = all(torch.equal(value, parts[name]) for name, value in whole.items())
    (out / f"resumed_{os.environ['LOCAL_RANK']}.txt").write_text(f"same={same}")


if __name__ == "__main__":
    (resumed if "resumed" in sys.argv else main)(sys.argv[1], Path(sys.argv[2]))
