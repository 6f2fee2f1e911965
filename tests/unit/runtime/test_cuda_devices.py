"""A device that is not there, has no memory left, or is lost in the middle of an answer."""

import logging
from typing import Any

import pytest
import torch

from runtime.alone import Alone
from runtime.cuda.devices import is_device_fault, usable_device
from runtime.engine import Segment
from runtime.errors import DeviceLost, ExpertLost, InvalidInput, RuntimeFault

PROMPT = [5, 17, 99, 3, 42, 7]


def test_names() -> None:
    assert usable_device("cpu") == ("cpu", "")
    for name in ("gpu", "meta", "cuda:x"):
        with pytest.raises(InvalidInput, match="is no device"):
            usable_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_where_there_is_no_device_the_processor_computes_and_says_so(
    checkpoint: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        alone = Alone(checkpoint("qwen3_moe"), device="cuda:0", max_tokens=64)
    assert "cuda:0 cannot be used" in caplog.text
    assert "cuda:0 cannot be used" in alone.fallen
    assert alone.segment.trunk.device.type == "cpu"


def test_what_is_a_fault_of_a_device() -> None:
    assert is_device_fault(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_device_fault(DeviceLost("gone"))
    assert is_device_fault(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_device_fault(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_device_fault(ExpertLost(0, 1, ["damaged"]))


def fail_once(monkeypatch: pytest.MonkeyPatch, after: int, error: Exception) -> None:
    """Let the step after so many fail."""
    step, done = Segment.step, [0]

    def failing(self: Segment, *args: Any, **options: Any) -> torch.Tensor:
        done[0] += 1
        if done[0] == after:
            raise error
        return step(self, *args, **options)

    monkeypatch.setattr(Segment, "step", failing)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), DeviceLost("it does not answer")])
def test_an_answer_goes_on_when_its_device_is_lost(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    alone = Alone(checkpoint("qwen3_moe"), max_tokens=64)
    want = list(alone.generate(PROMPT, max_tokens=12, stop_ids=frozenset()))
    fail_once(monkeypatch, 6, error)
    alone._device = "cuda:0"  # as far as anybody knows
    with caplog.at_level(logging.WARNING):
        assert list(alone.generate(PROMPT, max_tokens=12, stop_ids=frozenset())) == want
    assert str(error) in alone.fallen
    assert "the processor computes instead" in caplog.text


def test_other_errors_are_not_the_device_s(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Alone(checkpoint("qwen3_moe"), max_tokens=64)
    alone._device = "cuda:0"
    fail_once(monkeypatch, 3, RuntimeFault("something else"))
    with pytest.raises(RuntimeFault, match="something else"):
        list(alone.generate(PROMPT, max_tokens=12))
