"""Triton's interpreter without work of which it does not use the results: in half the time."""

import dataclasses
import functools
from types import SimpleNamespace


def quicken():
    """Changes the interpreter of this process; its results stay the same."""
    from triton import language
    from triton.runtime import interpreter

    # Whether each sum and product of integers overflows is asserted in debug mode alone.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # What a launch has patched, each function that its kernel calls would patch again.
    patch = interpreter._patch_lang
    modules = (language, language.core)

    @functools.cache
    def modules_of(function):
        return [m for m in modules if any(value is m for value in function.__globals__.values())]

    def patch_once(function):
        if any(language.core.is_builtin(module.load) for module in modules_of(function)):
            return patch(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once
