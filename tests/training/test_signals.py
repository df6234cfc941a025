"""Requests to stop, where there are several processes: jax tells the others."""

import os
import signal

import jax
import pytest
from jax.experimental import multihost_utils

from lm2_jax.training.signals import StopSignals


@pytest.fixture
def told(monkeypatch):
    """As if there were two processes; signals that this one sends, behind which both are to stop."""
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("lm2_jax.training.signals.os.kill", lambda process, number: sent.append((process, number)))
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: bool(sent) and step == 7)
    return sent


def test_ctrl_c_at_one_process_is_told_to_all(told):
    with StopSignals() as stop:
        assert not stop.requested(5)
        signal.raise_signal(signal.SIGINT)
        assert told == [(os.getpid(), signal.SIGTERM)], "which jax catches"
        assert not stop.requested(6), "others may have passed it"
        assert stop.requested(7)
    assert stop.caught == signal.SIGINT


def test_a_second_ctrl_c_interrupts_at_once(told):
    with StopSignals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert len(told) == 1


def test_sigterm_is_left_to_jax(told):
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGTERM) is before
        told.append("another process has been asked to stop")
        assert stop.requested(7)
    assert stop.caught == signal.SIGTERM
