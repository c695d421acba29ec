"""The result of a probe for one topic: one line of the screen."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, ERROR = 'ok', 'warning', 'error'


@dataclass(frozen=True)
class ProbeResult:
    """The state of one topic."""

    topic: str  # what was looked at, in a word or two; the same in every run
    # `OK`; `WARNING` for what may matter to some runs; `ERROR` for what will break one
    verdict: str
    found: str  # what is there
    advice: str = ''  # what it would do to a run, and what to do about it; '' where all is well


def ok(topic: str, found: str) -> ProbeResult:
    """A topic that is as it should be."""
    return ProbeResult(topic, OK, found)


def warn(topic: str, found: str, advice: str = '') -> ProbeResult:
    """A topic to know of, which breaks no run by itself."""
    return ProbeResult(topic, WARNING, found, advice)


def fault(topic: str, found: str, advice: str) -> ProbeResult:
    """A topic that will break a run, with how, and what to do."""
    return ProbeResult(topic, ERROR, found, advice)
