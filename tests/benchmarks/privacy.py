"""What an honest-but-curious server reads of a training batch, by the number of local blocks on each side.

    python tests/benchmarks/privacy.py [--public 20000] [--private 1500] [--searched 96]

The embedded model trains on the chat rows of `recipe=personachat`, without an adapter. Servers know the model's weights
and how such texts look: they fit their attacks on rows of other people ("public"), and attack the validation rows
("private"). Shares are of tokens.

With k local blocks the first server receives the output of block k - 1 (of the embeddings, for k = 0), and tells the
token of each position by
  nearest   the embedding with the largest cosine
  linear    a ridge regression of the embedding, fitted on public rows, then the same
  search    the candidate that gives the hidden state nearest to the received one when the k blocks run on it behind the
            tokens found so far; candidates are the best of the linear map. It needs the weights of the local blocks
With k local blocks the last server has the output of block L - k - 1 and the gradient there, and tells
  mask      which positions carry a loss, from the norm of the gradient, by a threshold fitted on public rows
  labels    the label there: the one whose gradient, through the model's public norm and head, has the largest cosine
  linear    the label there by a ridge regression of hidden state and gradient, fitted on public rows

Beside them stands what anybody guesses without looking: the most frequent answer of the mask, and the model's own
prediction of the label. The last line is JSON; its lists are in the order of `local_blocks`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.generation.session import Session
from petals_tune.blocks.loading import load_blocks
from petals_tune.config import build, composed
from petals_tune.data.rows import IGNORED, Row
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.convert import embedded_model
from petals_tune.wire.messages import Step
from petals_tune.wire.span import BlockSpan

LOCAL_BLOCKS = (0, 1, 2, 4, 8)  # on each side
LONGEST = 128  # tokens of a row
CANDIDATES = 64  # of a search
RIDGE = 1e-3  # of the mean variance


@dataclass(kw_only=True)
class Seen:
    """What crosses the borders between client and servers in one training step, N tokens: of all rows, in order."""

    ids: torch.Tensor  # (N,)
    labels: torch.Tensor  # (N,) the token that the loss at this position is about; IGNORED: it has no loss
    predicted: torch.Tensor  # the model's own predictions of the labels, where there are any
    first: dict[int, torch.Tensor]  # (N, H) input of block k
    last: dict[int, torch.Tensor]  # (N, H) output of block L - k - 1
    gradients: dict[int, torch.Tensor]  # (N, H) there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--public", type=int, default=20000, help="tokens that attacks are fitted on")
    parser.add_argument("--private", type=int, default=1500, help="tokens that are attacked")
    parser.add_argument("--searched", type=int, default=96, help="tokens that are searched for")
    options = parser.parse_args()
    started_s = time.monotonic()
    torch.manual_seed(0)
    folder = str(embedded_model())
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()
    public_rows, private_rows = rows(folder, options.public, options.private)
    public, private = observed(model, public_rows), observed(model, private_rows)
    figures = first_server(model, folder, public, private, private_rows, options.searched)
    figures |= last_server(model, public, private)
    print_table(figures)
    print(f"{len(public.ids)} public and {len(private.ids)} private tokens, {time.monotonic() - started_s:.0f} s")
    print(json.dumps({"local_blocks": LOCAL_BLOCKS, **figures, "load_average": os.getloadavg()[0]}))


def rows(folder: str, public: int, private: int) -> tuple[list[Row], list[Row]]:
    """Rows with so many tokens: of the training split, and of the validation split, which has other people."""
    cfg = composed(
        ["recipe=personachat", f"data.max_rows={public // 20}", f"data.max_tokens={LONGEST}", "output_dir=."]
    )
    data = build(cfg.data, where="data", tokenizer=AutoTokenizer.from_pretrained(folder))
    data.setup("fit")
    return list(until(data.train_split.rows, public)), list(until(data.validation_split.rows, private))


def until(all_rows: Sequence[Row], tokens: int) -> Iterator[Row]:
    for row in all_rows:
        if tokens <= 0:
            return
        tokens -= len(row.input_ids)
        yield row


def observed(model: Any, of_rows: Sequence[Row]) -> Seen:
    """Run a training step on each row, and keep what servers are sent."""
    total = model.config.num_hidden_layers
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in ("ids", "labels", "predicted")}
    first, last, gradients = ({k: [] for k in LOCAL_BLOCKS} for _ in range(3))
    inputs: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            inputs[number] = args[0]
            if number == total - max(LOCAL_BLOCKS):
                args[0].requires_grad_()  # the gradients in front of it are not looked at
            elif args[0].requires_grad:
                args[0].retain_grad()

        return hook

    layers = [*model.model.layers, model.model.norm]  # the norm's input is the output of the last block
    hooks = [layer.register_forward_pre_hook(keep(number)) for number, layer in enumerate(layers)]
    for row in of_rows:
        ids, labels = torch.tensor([row.input_ids]), F.pad(torch.tensor(row.labels)[1:], (0, 1), value=IGNORED)
        with_loss = labels != IGNORED
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden[0, with_loss])
        F.cross_entropy(logits, labels[with_loss]).backward()
        seen["ids"].append(ids[0])
        seen["labels"].append(labels)
        seen["predicted"].append(logits.argmax(-1).detach())
        for k in LOCAL_BLOCKS:
            first[k].append(inputs[k][0].detach())
            last[k].append(inputs[total - k][0].detach())
            grad = inputs[total - k].grad
            assert grad is not None
            gradients[k].append(grad[0])
    for hook in hooks:
        hook.remove()
    return Seen(
        **{name: torch.cat(parts) for name, parts in seen.items()},
        first={k: torch.cat(parts) for k, parts in first.items()},
        last={k: torch.cat(parts) for k, parts in last.items()},
        gradients={k: torch.cat(parts) for k, parts in gradients.items()},
    )


# The first server


def first_server(
    model: Any, folder: str, public: Seen, private: Seen, private_rows: Sequence[Row], searched: int
) -> dict[str, list[float]]:
    embeddings = model.get_input_embeddings().weight
    engine = Engine(
        load_blocks(Checkpoint(folder), BlockSpan(0, max(LOCAL_BLOCKS)), quantization="none", dtype=torch.float32)
    )
    figures: dict[str, list[float]] = {"first_nearest": [], "first_linear": [], "first_search": []}
    for k in LOCAL_BLOCKS:
        linear = Ridge.fit(public.first[k], embeddings[public.ids])
        nearest_ids = nearest(private.first[k], embeddings)
        linear_ids = nearest(linear(private.first[k]), embeddings)
        figures["first_nearest"].append(share(nearest_ids == private.ids))
        figures["first_linear"].append(share(linear_ids == private.ids))
        if k == 0:  # nothing to search for: the embedding is the state
            figures["first_search"].append(figures["first_nearest"][-1])
            continue
        found, start = [], 0
        for row in private_rows:
            length = min(len(row.input_ids), searched - sum(map(len, found)))
            if length <= 0:
                break
            states = private.first[k][start : start + length]
            found.append(search(engine, k, states, linear(states), embeddings) == private.ids[start : start + length])
            start += len(row.input_ids)
        figures["first_search"].append(share(torch.cat(found)))
    return figures


def search(
    engine: Engine, k: int, states: torch.Tensor, guesses: torch.Tensor, embeddings: torch.Tensor
) -> torch.Tensor:
    """The token ids of `states` (S, H) at the input of block `k`, one after the other; `guesses` (S, H) of embeddings.

    Each candidate is a row of one generation session on blocks 0:k. Once one is chosen, all rows get its caches.
    """
    session = Session(
        client="", span=BlockSpan(0, k), rows=CANDIDATES, max_length=len(states), adapter=None, adapter_version=None
    )
    chosen: list[int] = []
    order = None
    for position, (state, guess) in enumerate(zip(states, guesses, strict=True)):
        candidates = (F.normalize(guess[None]) @ F.normalize(embeddings).T)[0].topk(CANDIDATES).indices
        step = Step(session=0, hidden=embeddings[candidates][:, None], position=position, order=order)
        (output,) = engine.step([(session, step)])
        assert isinstance(output, torch.Tensor), output
        best = int((output[:, 0] - state).norm(dim=-1).argmin())
        order = torch.full((CANDIDATES,), best)
        chosen.append(int(candidates[best]))
    return torch.tensor(chosen)


# The last server


def last_server(model: Any, public: Seen, private: Seen) -> dict[str, list[float]]:
    head = model.get_output_embeddings().weight
    has_loss, public_has_loss = private.labels != IGNORED, public.labels != IGNORED
    wanted = private.labels[has_loss]
    figures: dict[str, list[float]] = {"last_mask": [], "last_labels": [], "last_linear": []}
    for k in LOCAL_BLOCKS:
        norms, public_norms = private.gradients[k].norm(dim=-1), public.gradients[k].norm(dim=-1)
        limit = threshold(public_norms, public_has_loss)
        figures["last_mask"].append(share((norms > limit) == has_loss))
        states, gradients = private.last[k][has_loss], private.gradients[k][has_loss]
        labels = torch.cat(
            [
                labels_through_head(model, state, grad)
                for state, grad in zip(states.split(32), gradients.split(32), strict=True)
            ]
        )
        figures["last_labels"].append(share(labels == wanted))
        linear = Ridge.fit(
            both(public.last[k][public_has_loss], public.gradients[k][public_has_loss]),
            head[public.labels[public_has_loss]],
        )
        figures["last_linear"].append(share(nearest(linear(both(states, gradients)), head) == wanted))
    guess = share(has_loss)
    return {
        **figures,
        "guess_mask": [max(guess, 1 - guess)] * len(LOCAL_BLOCKS),
        "guess_labels": [share(private.predicted == wanted)] * len(LOCAL_BLOCKS),
    }


def labels_through_head(model: Any, states: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """The label of each of `states` (N, H), for which the cross entropy behind norm and head has that gradient (N, H).

    The gradient is J^T (E[W] - W[label]), with the Jacobian J of the norm and the mean row of the head E[W] under the
    predicted probabilities; cosines with all candidates need the products of W with a few vectors alone.
    """
    norm, head = model.model.norm, model.get_output_embeddings().weight
    scale, width = norm.weight, states.shape[1]
    root = (states.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()  # (N, 1)

    def pull_back(rows: torch.Tensor) -> torch.Tensor:
        """J^T of (N, H)."""
        scaled = rows * scale
        return scaled / root - states * (scaled * states).sum(-1, keepdim=True) / (width * root**3)

    mean = F.softmax(norm(states) @ head.T, dim=-1) @ head  # (N, H)
    base = pull_back(mean)
    along = states * scale @ head.T  # (N, V): h^T D w

    def products(vectors: torch.Tensor) -> torch.Tensor:
        """<v, J^T w> for each of `vectors` (N, H) and each row w of the head: (N, V)."""
        return vectors * scale @ head.T / root - along * (vectors * states).sum(-1, keepdim=True) / (width * root**3)

    squares = (head * scale).pow(2).sum(-1)[None] / root**2  # |J^T w|^2, (N, V)
    squares = squares - along**2 * (2 / (width * root**4) - states.pow(2).sum(-1, keepdim=True) / (width**2 * root**6))
    lengths = (base.pow(2).sum(-1, keepdim=True) - 2 * products(base) + squares).clamp(min=1e-20).sqrt()
    return (((base * gradients).sum(-1, keepdim=True) - products(gradients)) / lengths).argmax(-1)


def both(states: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """(N, 2 H): each of unit length, since a gradient's is that of the batch."""
    return torch.cat([F.normalize(states), F.normalize(gradients)], dim=-1)


def threshold(values: torch.Tensor, is_above: torch.Tensor) -> float:
    """The limit that tells most of `is_above` right."""
    ordered, index = values.sort()
    marked = is_above[index].long()
    # Right with a limit behind the i-th value: those below without a mark, and those above with one.
    right = (1 - marked).cumsum(0) + marked.sum() - marked.cumsum(0)
    return float(ordered[int(right.argmax())]) if int(right.max()) > int(marked.sum()) else -1.0


@dataclass(frozen=True)
class Ridge:
    """A linear map of inputs, each scaled to unit length."""

    weights: torch.Tensor
    mean: torch.Tensor
    target_mean: torch.Tensor

    @classmethod
    def fit(cls, inputs: torch.Tensor, targets: torch.Tensor) -> Ridge:
        x, y = F.normalize(inputs).double(), F.normalize(targets).double()
        mean, target_mean = x.mean(0), y.mean(0)
        x, y = x - mean, y - target_mean
        gram = x.T @ x
        weight = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        return cls(torch.linalg.solve(gram + weight, x.T @ y).float(), mean.float(), target_mean.float())

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return (F.normalize(inputs) - self.mean) @ self.weights + self.target_mean


def nearest(vectors: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The row of `table` with the largest cosine to each of `vectors`."""
    rows_of_unit = F.normalize(table).T
    return torch.cat([(part @ rows_of_unit).argmax(-1) for part in vectors.split(256)])


def share(right: torch.Tensor) -> float:
    return round(right.float().mean().item(), 4)


def print_table(figures: dict[str, list[float]]) -> None:
    print("local blocks on each side | " + " | ".join(f"{k:>6}" for k in LOCAL_BLOCKS))
    for name, values in figures.items():
        print(f"{name:<25} | " + " | ".join(f"{value:>6.1%}" for value in values))


if __name__ == "__main__":
    main()
