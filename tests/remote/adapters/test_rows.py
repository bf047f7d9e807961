"""One adapter for each row of a batch: outputs in the order of the rows, and gradients of each row's adapter."""

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from petals_tune import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
from petals_tune.errors import ConfigError
from tests.models import relative_error
from tests.raising import raises
from tests.remote.adapters.conftest import IDS, METHODS, generated

ROWS = ("lora", None, "prompt", "head", "lora", "deep", "ia3")
LABELS = torch.where(torch.arange(IDS.shape[1]) < torch.tensor([[0], [3], [1], [6], [2], [5], [4]]), -100, IDS)
MASK = (torch.arange(IDS.shape[1]) < torch.tensor([[6], [5], [6], [4], [6], [6], [6]])).long()


def alone(saved, labels: torch.Tensor = LABELS, **options):
    """Of in-process PEFT, row by row: the text's logits, the sum of the losses of all tokens, and their number."""
    logits, losses, count = [], [], 0
    for row, name in enumerate(ROWS):
        one = slice(row, row + 1)
        net = saved.plain(name, **options) if name else saved.plain(name)
        output = net(input_ids=IDS[one], attention_mask=MASK[one], use_cache=False)
        prompt = output.logits.shape[1] - IDS.shape[1]
        wanted = labels[one] if prompt else labels[one, 1:]  # behind a prompt, the first token is predicted too
        given = output.logits[:, prompt - 1 : -1] if prompt else output.logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(given.flatten(0, 1), wanted.flatten(), reduction="sum"))
        count += int((wanted != -100).sum())
        logits.append(output.logits[:, prompt:])
    return torch.cat(logits), sum(losses), count


def test_outputs_are_in_the_order_of_the_rows(saved, shared):
    logits, losses, count = alone(saved)
    output = shared(input_ids=IDS, attention_mask=MASK, labels=LABELS, adapters=ROWS)
    real = MASK.bool()
    assert relative_error(output.logits[real], logits[real]) <= 1e-5
    assert relative_error(output.loss, losses / count) <= 1e-5
    given = shared(input_ids=IDS, attention_mask=MASK, labels=LABELS, adapters=ROWS, num_items_in_batch=count)
    assert relative_error(given.loss, losses / count) <= 1e-5
    equal = shared(input_ids=IDS, adapters=["ia3"] * len(ROWS)).logits
    assert torch.equal(equal, shared(input_ids=IDS, adapter="ia3").logits)


def test_each_adapter_gets_the_gradients_of_its_own_rows(saved, model):
    nets = {name: model.adapters.load(name, saved.folders[name], trainable=True) for name in METHODS}
    for net in nets.values():
        net.eval()
    model(input_ids=IDS, attention_mask=MASK, labels=LABELS, adapters=ROWS).loss.backward()
    assert all(parameter.grad is None for parameter in nets["other"].parameters()), "it has no row"
    total = alone(saved)[2]
    for name in set(ROWS) - {None}:
        plain = saved.plain(name, trainable=True).eval()
        rows = [row for row, each in enumerate(ROWS) if each == name]
        own = {key: p.grad for key, p in nets[name].named_parameters() if p.requires_grad}
        if name == "head":  # all labels of its row are masked
            assert all(gradient is None for gradient in own.values())
            continue
        for row in rows:
            one = slice(row, row + 1)
            output = plain(input_ids=IDS[one], attention_mask=MASK[one], labels=LABELS[one], use_cache=False)
            prompt = output.logits.shape[1] > IDS.shape[1]
            (output.loss * int((LABELS[one] if prompt else LABELS[one, 1:]).ne(-100).sum()) / total).backward()
        for key, parameter in plain.named_parameters():
            if parameter.requires_grad:
                assert relative_error(own[key], parameter.grad) <= 1e-5, (name, key)


@pytest.mark.slow
def test_training_mode_gives_each_row_what_it_gets_alone(saved, model):
    for name in METHODS:
        model.adapters.load(name, saved.folders[name], trainable=True)
    together = model(input_ids=IDS, adapters=ROWS).logits
    for row, name in enumerate(ROWS):
        one = model(input_ids=IDS[row : row + 1], adapter=name).logits[:, -IDS.shape[1] :]
        assert relative_error(together[row : row + 1], one) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": [40, 83]},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"num_beams": 2, "num_return_sequences": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_texts_are_in_the_order_of_the_rows(saved, shared, options):
    found = generated(shared, IDS, adapters=ROWS, **options)
    copies = options.get("num_return_sequences", 1)
    for row, name in enumerate(ROWS):
        one = generated(saved.plain(name), IDS[row : row + 1], use_cache=name != "deep", **options)
        own = found[row * copies : (row + 1) * copies]
        assert torch.equal(own[:, : one.shape[1]], one), name
        assert not own[:, one.shape[1] :].any(), "padding"


@pytest.mark.slow
def test_sampling_is_reproducible(shared):
    options = {"max_new_tokens": 4, "do_sample": True, "pad_token_id": 0}
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(shared.generate(IDS, adapters=ROWS, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [{"adapters": "lora"}, {"adapters": ROWS[:3]}, {"adapters": []}], ids=str)
def test_another_number_of_names_is_refused(shared, options):
    for call in (shared, shared.generate):
        with raises(ConfigError, key="adapters"):
            call(input_ids=IDS, **options)


@pytest.mark.parametrize(
    "name", ["past_key_values", "output_hidden_states", "shift_labels", "use_cache", "inputs_embeds"]
)
def test_a_call_refuses_what_is_for_one_adapter(shared, name):
    with raises(ConfigError, key=name):
        shared(input_ids=IDS, adapters=ROWS, **{name: True})


@pytest.mark.parametrize("name", ["past_key_values", "streamer", "return_dict_in_generate", "inputs_embeds", "draft"])
def test_generation_refuses_what_is_for_one_adapter(shared, name):
    with raises(ConfigError, key=name):
        shared.generate(IDS, adapters=ROWS, **{name: IDS})


def test_generation_refuses_an_open_session(shared):
    with shared.inference_session(max_length=16), raises(ConfigError, key="adapters"):
        shared.generate(IDS, adapters=ROWS)


@pytest.mark.slow
def test_rows_through_local_blocks_and_servers(saved, swarm):
    local = AutoDistributedModelForCausalLM.from_pretrained(
        str(saved.model), initial_peers=["in process"], local_blocks=["0:1", "4:6"], local_quantization="none"
    )
    for name, folder in saved.folders.items():
        local.adapters.load(name, folder, trainable=True).eval()
    logits, losses, count = alone(saved)
    output = local(input_ids=IDS, attention_mask=MASK, labels=LABELS, adapters=ROWS)
    assert relative_error(output.logits[MASK.bool()], logits[MASK.bool()]) <= 1e-5
    assert relative_error(output.loss, losses / count) <= 1e-5
    output.loss.backward()
    for name in ("lora", "ia3", "deep"):
        assert all(p.grad is not None for p in local.adapters[name].parameters() if p.requires_grad), name
    found = generated(local, IDS, adapters=ROWS)
    assert torch.equal(found[:1], generated(saved.plain("lora"), IDS[:1]))
    local.remote_blocks.close()


def test_classifiers_have_a_head_for_each_adapter(saved, swarm, tmp_path):
    options = {"num_labels": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoDistributedModelForSequenceClassification.from_pretrained(
        str(saved.model), initial_peers=["in process"], **options
    )
    plain, labels = {}, torch.tensor([2, 0, 1, 1])
    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)
        config = peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, target_modules=["q_proj"])
        base = AutoModelForSequenceClassification.from_pretrained(str(saved.model), **options)
        net = peft.get_peft_model(base, config)
        net.save_pretrained(str(tmp_path / name))
        plain[name] = net.eval()
        model.adapters.load(name, tmp_path / name)
    rows = ["two", "one", "one", "two"]
    output = model(input_ids=IDS[:4], labels=labels, adapters=rows)
    expected = torch.cat([plain[name](input_ids=IDS[row : row + 1]).logits for row, name in enumerate(rows)])
    assert relative_error(output.logits, expected) <= 1e-5
    assert relative_error(output.loss, torch.nn.functional.cross_entropy(expected, labels)) <= 1e-5
    model.remote_blocks.close()
