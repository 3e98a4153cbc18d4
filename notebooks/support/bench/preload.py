"""Imports that take seconds, made once in the process from which all measuring ones are forked."""

import contextlib
import importlib

for name in ("gpt2", "llama", "bert", "t5"):
    with contextlib.suppress(Exception):  # then the network's own row says what is missing
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
with contextlib.suppress(Exception):
    importlib.import_module("peft")
