import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from petals_tune.data.module import TextData
from petals_tune.train.callbacks import format_reply, greedy_reply
from petals_tune.train.module import FineTuner
from petals_tune.train.objective import CausalLM
from petals_tune.train.run import run
from tests.train.conftest import Compose
from tests.train.tiny import LocalConnection, TinyTalk, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_a_reply_is_the_most_likely_continuation() -> None:
    net = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    data = TextData(TinyTalk(), tokenizer=tiny_tokenizer(), sampled_replies=1)
    (sample,) = data.samples

    ids = torch.tensor([sample.prompt_ids])
    with torch.no_grad():
        for _ in range(5):
            next_id = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, next_id], dim=1)
    expected = data.tokenizer.decode(ids[0, len(sample.prompt_ids) :], skip_special_tokens=True).strip()
    tuner = FineTuner(net, CausalLM(), torch.optim.SGD)
    assert greedy_reply(tuner.eval(), data, sample.prompt_ids, max_new_tokens=5) == expected


def test_without_a_terminal_progress_is_plain_lines(tiny_run: Compose, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny_run("sst2", "callbacks.progress.lines=3"), LocalConnection())
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/6", "4/6", "6/6"]
    assert all(word in lines[0] for word in ("loss", "tokens/s", "swarm", "s left"))
    assert "\r" not in printed.out + printed.err


def test_formatted_replies_line_up() -> None:
    reply = {"prompt": "Hi\nthere", "person": "a", "before": "", "after": "c"}
    assert format_reply(reply) == "dialogue  Hi\n          there\nperson    a\nbefore\nafter     c"
