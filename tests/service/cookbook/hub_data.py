"""What the recipes of Tinker's cookbook take from the hub: small data sets with the columns of the real ones.

Source of names and columns: tinker-cookbook 0.6.1, recipes/sl_loop.py, rl_loop.py, preference/datasets.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

SUFFIX = " Provide a numerical answer without units, written inside \\boxed{}."  # of rl_loop.py's questions
ANSWER = "3"  # to all questions
_THINGS = ("apples", "books", "stones", "pens", "cups", "hats", "keys", "birds")
_FACTS = (
    ("What color is the sky?", "Blue."),
    ("What color is grass?", "Green."),
    ("What color is snow?", "White."),
    ("What color is coal?", "Black."),
    ("What do cows drink?", "Water."),
    ("What do bees make?", "Honey."),
)

TALKS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": f"{question} {ask}"}, {"role": "assistant", "content": answer}]
    for ask in ("Be brief.", "One word.")
    for question, answer in _FACTS
]
QUESTIONS = [f"Ann has 1 of the {thing} and gets 2 more. How many {thing} has she?" for thing in _THINGS]
PAIRS = [
    {"chosen": f"\n\nHuman: {question}\n\nAssistant: {good}", "rejected": f"\n\nHuman: {question}\n\nAssistant: {bad}"}
    for (question, good), (_, bad) in zip(_FACTS, (*_FACTS[1:], _FACTS[0]), strict=True)
]


def write_datasets(folder: Path) -> dict[str, Path]:
    """Folders of data sets, by their names on the hub."""
    talks = [
        {"prompt": talk[0]["content"], "prompt_id": str(number), "messages": talk, "category": "Open QA"}
        for number, talk in enumerate(TALKS)
    ]
    problems = [{"question": each, "answer": f"1 + 2 = <<1+2=3>>3.\n#### {ANSWER}"} for each in QUESTIONS]
    return {
        "HuggingFaceH4/no_robots": _write(folder / "no_robots", train=talks, test=talks[:4]),
        "openai/gsm8k": _write(folder / "gsm8k", config="main", train=problems, test=problems[:2]),
        "Anthropic/hh-rlhf": _write(folder / "hh-rlhf", train=PAIRS, test=PAIRS[:2]),
    }


def _write(folder: Path, *, config: str = "default", **splits: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    card = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, rows in splits.items():
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
        card += [f"  - split: {split}", f"    path: {split}.parquet"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder
