"""Modules without weights, to be filled from a file or only counted."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from blip2.config import LanguageConfig, OPTConfig
from blip2.model.opt import OPT
from blip2.model.t5 import T5


@contextmanager
def skeleton() -> Generator[None]:
    """Modules made within lie on the meta device, and nothing draws initial weights for them.

    Drawing is what costs: on the meta device torch imports its compiler for it, a second and a half.
    """
    with torch.device("meta"), _Undrawn():
        yield


def build_language(config: LanguageConfig) -> OPT | T5:
    """The language model of a configuration."""
    return OPT(config) if isinstance(config, OPTConfig) else T5(config)


class _Undrawn(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
