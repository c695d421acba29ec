"""Functions that a setting names as 'package.module:function'."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from typing import Any

from internvl_ds.errors import ConfigError, shown


def load_factory(key: str, value: str) -> Callable[..., Any]:
    """Imports the function that the value of a key names.

    Raises:
        ConfigError: for another form, a module that cannot be imported, or no such function.
    """
    module_name, colon, function_name = value.partition(':')
    if not (module_name and colon and function_name):
        raise ConfigError(f"{key} {value!r} is not of the form 'package.module:function'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f'{key} {value!r}: {error}') from error
    except Exception as error:  # of the module itself
        raise failed(f'{key} {value!r}: importing {module_name}', error) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f'{key} {value!r}: {module_name} has no function {function_name}')
    return function


def failed(what: str, error: Exception) -> ConfigError:
    """The error of a user's own code: one line, with the place that raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = shown(f'{type(error).__name__}: {error}')
    return ConfigError(f'{what} failed: {text} ({place.filename}, line {place.lineno})')
