"""What a probe says of one topic: one line of the screen."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, ERROR = 'ok', 'warning', 'error'


@dataclass(frozen=True)
class ProbeResult:
    """One thing looked at.

    Attributes:
        topic: what was looked at, in a word or two; the same in every run.
        verdict: `OK`; `WARNING` for what may matter to some runs; `ERROR` for what will break one.
        found: what is there.
        advice: what it would do to a run, and what to do about it; '' where all is well.
    """

    topic: str
    verdict: str
    found: str
    advice: str = ''


def ok(topic: str, found: str) -> ProbeResult:
    """A topic that is as it should be."""
    return ProbeResult(topic, OK, found)


def warn(topic: str, found: str, advice: str = '') -> ProbeResult:
    """A topic that one should know of, and that breaks no run by itself."""
    return ProbeResult(topic, WARNING, found, advice)


def fault(topic: str, found: str, advice: str) -> ProbeResult:
    """A topic that will break a run, with how, and what to do."""
    return ProbeResult(topic, ERROR, found, advice)
