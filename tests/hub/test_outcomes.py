import pytest

from hf_immunize.errors import HubError
from hf_immunize.hub.push import name_outcome, retried


def failing(times, outcome):
    calls = []

    def call():
        calls.append(None)
        if len(calls) <= times:
            raise HubError("no", outcome)
        return len(calls)

    return call


@pytest.mark.parametrize("outcome", ["rate_limited", "server_error", "unreachable"])
def test_passing_trouble_is_tried_again(outcome):
    assert retried(failing(3, outcome), "push", sleep=lambda seconds: None) == 4


@pytest.mark.parametrize("outcome", ["unauthorized", "forbidden", "not_found", "conflict", "rejected", "offline"])
def test_lasting_trouble_is_not(outcome):
    with pytest.raises(HubError):
        retried(failing(1, outcome), "push", sleep=lambda seconds: pytest.fail("waited"))


def test_waits_grow():
    waits = []
    retried(failing(3, "server_error"), "push", sleep=waits.append)
    assert waits == [1.0, 2.0, 4.0]


def test_gives_up_after_the_last_attempt():
    with pytest.raises(HubError):
        retried(failing(4, "server_error"), "push", sleep=lambda seconds: None)


def test_cause_of_an_error_counts():
    error = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    error.__cause__ = ConnectionResetError("reset")
    assert name_outcome(error, "push").outcome == "unreachable"


def test_bug_keeps_its_own_name():
    assert name_outcome(KeyError("x"), "push") is None
    with pytest.raises(KeyError):
        retried({}.popitem, "push")
