import contextlib

import pytest
import torch

from petals_tune.blocks.devices import hardware
from petals_tune.blocks.devices.hardware import check_alive, device_kind, find_devices, has_bfloat16
from petals_tune.errors import ConfigError, DeviceFailed
from tests.pretend_device import failed_gpu, pretended_gpus
from tests.raising import raises

GB = 2**30


@pytest.mark.parametrize("device", ["cuda:99", "toaster", "meta"])
def test_a_device_that_is_not_there_is_said_before_anything_is_joined(device):
    with raises(ConfigError, key="device", seen=device):
        find_devices(device)
    with pretended_gpus(), raises(ConfigError, key="device", seen="toaster"):
        find_devices(["cuda:0", "toaster"])


def test_auto_is_the_gpu_with_the_most_free_memory_and_elsewhere_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_devices("auto") == ("cpu",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ({"cuda:1": 7 * GB}.get(device, GB), 8 * GB))
    assert find_devices("auto") == ("cuda:1",)


def test_devices_by_name_have_their_numbers():
    assert find_devices("cpu") == find_devices(["cpu"]) == ("cpu",)
    with pretended_gpus():
        assert find_devices("cuda") == ("cuda:0",)
        assert find_devices(["cuda:1", "cuda:0"]) == ("cuda:1", "cuda:0")


@pytest.mark.parametrize("devices", [[], ["cuda:0", "cuda"], ["cuda:0", "cpu"], ["cpu", "cpu"]])
def test_several_devices_are_different_gpus(devices):
    with pretended_gpus(), raises(ConfigError, key="device", seen=devices):
        find_devices(devices)


def test_a_device_is_named_with_its_hardware():
    with pretended_gpus():
        assert hardware.device_name("cuda:1") == "cuda:1, pretended GPU"
    assert hardware.device_name("cpu").startswith("cpu, ")


def test_bfloat16_is_a_question_to_the_card(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(asked.append(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert not has_bfloat16("cuda:1")
    assert asked == ["cuda:1"]
    assert has_bfloat16("cpu")


def test_a_device_that_computes_nothing_more_is_found():
    with pretended_gpus():
        check_alive(["cuda:0", "cuda:1"])
        with failed_gpu("cuda:1"):
            check_alive(["cuda:0", "cpu"])
            with raises(DeviceFailed, device="cuda:1"):
                check_alive(["cuda:0", "cuda:1"])


def test_a_card_without_free_memory_is_no_failed_one(monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "ones", full)
    check_alive(["cuda:0"])


def test_the_kind_of_a_device_is_that_of_its_arithmetic(monkeypatch):
    assert [device_kind(each) for each in ("cpu", "cuda", "cuda:1", "mps")] == ["cpu", "cuda", "cuda", "mps"]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert device_kind("cuda:0") == "rocm"
