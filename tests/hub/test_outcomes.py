import pytest

from hf_immunize.errors import HubError
from hf_immunize.hub.load import name_outcome, retried


@pytest.fixture
def waits(monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


def failing(times, outcome):
    calls = []

    def call():
        calls.append(None)
        if len(calls) <= times:
            raise HubError("no", outcome)
        return len(calls)

    return call


@pytest.mark.parametrize("outcome", ["rate_limited", "server_error", "unreachable"])
def test_passing_trouble_is_tried_again_with_growing_waits_and_not_for_ever(outcome, waits):
    assert retried(failing(3, outcome), "push") == 4
    assert waits == [1.0, 2.0, 4.0]
    with pytest.raises(HubError):
        retried(failing(4, outcome), "push")


@pytest.mark.parametrize("outcome", ["unauthorized", "forbidden", "not_found", "conflict", "rejected", "offline"])
def test_lasting_trouble_is_not(outcome, waits):
    with pytest.raises(HubError):
        retried(failing(1, outcome), "push")
    assert not waits


def test_cause_of_an_error_counts():
    error = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    assert name_outcome(error, "push").outcome == "unreachable"
    error.__cause__ = TimeoutError("late")
    assert name_outcome(error, "push").outcome == "timed_out"


def test_bug_keeps_its_own_name():
    assert name_outcome(KeyError("x"), "push") is None
    with pytest.raises(KeyError):
        retried({}.popitem, "push")
