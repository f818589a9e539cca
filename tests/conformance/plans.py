"""One way to call a model."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

SIZE, LENGTH, SIDE = 2, 7, 4
GUESSES = (1, 4, 8, 10, 16)


class Plan:
    """One way to call a model: the names of the arguments, and which of the shapes that each may have."""

    def __init__(self, model: nn.Module, names: Sequence[str], variant: int) -> None:
        self.config, self.names, self.variant, self.tried = model.config, names, variant, [0]
        inner = (getattr(self.config, name, None) for name in getattr(self.config, "sub_configs", {}))
        self.configs = [self.config, *(one for one in inner if one is not None)]

    def placeholders_from(self, message: str) -> bool:
        """Take the number of placeholder tokens from an error of the model, in tokens or in numbers."""
        match = re.search(r"tokens:? \D*(\d+)\D*features:? \D*(\d+)", message)
        if match is None:
            return False
        count = int(match[2]) // SIZE
        left = [
            n for n in (count // self.setting("hidden_size", default=64), count) if 0 < n < 600 and n not in self.tried
        ]
        self.tried += left[:1]
        return bool(left)

    def another_guess(self) -> bool:
        """Try the next usual number of placeholder tokens, for a model whose error does not say how many it needs."""
        medium = any("pixel" in name or "feature" in name or name == "input_values" for name in self.names)
        left = [n for n in GUESSES if n not in self.tried] if medium and "input_ids" in self.names else []
        self.tried += left[:1]
        return bool(left)

    def setting(self, *names: str, default: Any = None) -> Any:
        """The first of the settings that the configuration or one below it has."""
        return next(iter(self.settings(*names)), default)

    def settings(self, *names: str) -> list:
        found = (getattr(config, name, None) for name in names for config in self.configs)
        return [value for value in found if value is not None]

    def number(self, *names: str, default: int) -> int:
        """The first of the settings that is a whole number."""
        return next((value for value in self.settings(*names) if isinstance(value, int)), default)

    def pick(self, *options: Any) -> Any:
        return options[min(self.variant, len(options) - 1)]
