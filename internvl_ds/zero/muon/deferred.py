"""Has DeepSpeed's own Muon compiled where it is used: not by every engine that is made."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from internvl_ds.zero.wrapper import replaced

_MUON = 'deepspeed.runtime.zero.muon.original_muon'


def import_muon() -> None:
    """Imports DeepSpeed's Muon, which it does for every engine, without torch's compiler.

    Its functions are decorated with ``torch.compile``, which imports Inductor at once: 1.4 s in
    every rank. They are compiled at their first call instead.
    """
    if _MUON in sys.modules:
        return
    from deepspeed.runtime import compiler

    real = compiler.compile

    def compile_later(*args: Any, **settings: Any) -> Callable[[Any], Any]:
        def decorate(function: Any) -> Any:
            compiled = functools.cache(lambda: real(*args, **settings)(function))

            @functools.wraps(function)
            def call(*a: Any, **more: Any) -> Any:
                # Within another that is compiled it is a part of that one.
                return (function if torch.compiler.is_compiling() else compiled())(*a, **more)

            return call

        return decorate

    with replaced(compiler, 'compile', compile_later):
        try:
            importlib.import_module(_MUON)
        except ModuleNotFoundError:  # of a DeepSpeed that has none
            return
