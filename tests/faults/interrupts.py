"""KeyboardInterrupt at every line of `interventions` while blocks open, run and close: what is left on the model?

`python -m tests.faults.interrupts` tries every line of every subject and prints the figures of docs/reliability.md.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import interventions
from interventions import Location, Zero, interchange, intervene, record, run
from interventions.hooks.replacements import lock
from tests.interventions.promises.attentions import net, traces
from tests.interventions.tiny_models import MIDDLE, answer, batch, make

PACKAGE = str(Path(interventions.__file__).parent)
TOUCHING = (
    *("scopes.py", "installation.py", "replacements.py", "methods.py", "checkpointing.py", "compiled.py", "taps.py"),
    *("attention_taps.py", "attention.py", "endings.py", "recordings.py", "frames.py", "answers.py"),
)


# --- what is interrupted ----------------------------------------------------------------------------------------------


def plain(model: nn.Module) -> None:
    place = Location(module=MIDDLE["cnn"])
    with intervene(model, place, op=Zero()), record(model, Location(module="fc", io="input")):
        answer(model, batch("cnn"))


def resumed(model: nn.Module) -> None:
    interchange(model, run(model, batch("gpt2")), batch("gpt2", 2), Location(1), record=Location(2))


def interface(model: nn.Module) -> None:
    with intervene(model, [Location(1, "attention_scores"), Location(1, "key")], op=Zero()):
        answer(model, batch("llama"))


def own_attention(model: nn.Module) -> None:
    with intervene(model, Location(1, "attention_pattern"), op=Zero()):
        answer(model, batch("llama"))


def nested(model: nn.Module) -> None:
    first, second = (intervene(model, Location(1, site), op=Zero()) for site in ("query", "block_output"))
    with first, second, record(model, Location(2)):
        answer(model, batch("llama"))


def fetched(model: nn.Module) -> None:
    with intervene(model, Location(0), op=Zero()):
        assert run(model, batch("llama")).activations[Location(1, "query")] is not None


def generation(model: nn.Module) -> None:
    with intervene(model, Location(1, "value"), op=Zero(), steps=slice(1, None)):
        model.generate(**batch("llama"), max_new_tokens=2, do_sample=False)


def checkpointed(model: nn.Module) -> None:
    with intervene(model, Location(1, "attention_output"), op=Zero()):
        loss = answer(model, batch("llama")).sum()
        loss.backward()


def checkpointing() -> nn.Module:
    model = make("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


SUBJECTS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], None]]] = {
    "plain hooks": (lambda: make("cnn"), plain),
    "resumed interchange": (lambda: make("gpt2"), resumed),
    "attention interface": (lambda: make("llama"), interface),
    "fused attention": (lambda: net(True), own_attention),
    "written-out attention": (lambda: net(False), own_attention),
    "nested blocks": (lambda: make("llama"), nested),
    "fetched activation": (lambda: make("llama"), fetched),
    "generate with steps": (lambda: make("llama"), generation),
    "gradient checkpointing": (checkpointing, checkpointed),
}


# --- interrupts -------------------------------------------------------------------------------------------------------


@dataclass
class Lines:
    """Notes the lines that run in frames of the package, and raises at those whose numbers are `fatal`."""

    fatal: tuple[int, ...] = ()
    ran: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not is_ours(frame):
            return None
        if event == "line":
            self.ran.append((Path(frame.f_code.co_filename).name, frame.f_lineno))
            if len(self.ran) - 1 in self.fatal:
                raise KeyboardInterrupt
        return self

    def _again(self, frame: FrameType | None, event: str, _: Any) -> None:
        """Go on after the first interrupt: Python stops tracing where a trace function raises."""
        if sys.gettrace() is None:
            while frame is not None:
                if is_ours(frame):
                    frame.f_trace = self
                frame = frame.f_back
            sys.settrace(self)

    @contextmanager
    def running(self) -> Iterator[None]:
        before, unraisable = sys.gettrace(), sys.unraisablehook
        sys.unraisablehook = lambda _: None  # an interrupt while a generator is closed for want of references
        sys.settrace(self)
        sys.setprofile(self._again if len(self.fatal) > 1 else None)
        try:
            yield
        finally:
            sys.setprofile(None)
            sys.settrace(before)
            sys.unraisablehook = unraisable


def is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(PACKAGE)


def lines_of(block: Callable[[nn.Module], None], model: nn.Module) -> list[tuple[str, int]]:
    """The lines that run, in their order."""
    block(model)  # what is computed once a class or a model, is
    lines = Lines()
    with lines.running():
        block(model)
    return lines.ran


def points(ran: list[tuple[str, int]], most: int | None = None) -> list[int]:
    """Where to interrupt: at the first and last time of each line; where the model is touched, at the second too."""
    times: dict[tuple[str, int], list[int]] = {}
    for number, line in enumerate(ran):
        times.setdefault(line, []).append(number)
    chosen = sorted(
        {
            number
            for (file, _), numbers in times.items()
            for number in (numbers[0], numbers[1 % len(numbers)] if file in TOUCHING else numbers[0], numbers[-1])
        }
    )
    return chosen if most is None else chosen[:: max(1, len(chosen) // most)]


def leftovers(model: nn.Module, block: Callable[[nn.Module], None], *fatal: int) -> list[str]:
    """What is left after interrupts at the lines of these numbers, first while the exception is still at hand."""
    random = torch.get_rng_state()
    before, lines, left = state(model), Lines(fatal), []
    try:
        with lines.running():
            block(model)
    except KeyboardInterrupt:
        torch.set_rng_state(random)  # a train run draws
        left += [f"while handled: {name}" for name, now in state(model).items() if now != before[name]]
    torch.set_rng_state(random)
    left += [name for name, now in state(model).items() if now != before[name]]
    return [f"{lines.ran[fatal[0]]}: {each}" for each in left]


def state(model: nn.Module) -> dict[str, object]:
    """Everything that may be left behind: on the model, in torch, in transformers, and of ours."""
    names = ("model", "generate", "attention", "interface", "modes", "random", "graded", "open", "overrides")
    return {**dict(zip(names, traces(model), strict=True)), "the lock is free": lock_is_free()}


def lock_is_free() -> bool:
    found: list[bool] = []

    def attempt() -> None:
        if lock.acquire(timeout=0.1):
            lock.release()
            found.append(True)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return bool(found)


def main() -> None:
    tried, left = 0, []
    for name, (make_model, block) in SUBJECTS.items():
        model = make_model()
        ran = lines_of(block, model)
        once = [(each,) for each in points(ran)]
        twice = [(each, each + further) for each in points(ran, 20) for further in (1, 2, 3, 5, 8, 13, 34, 89, 144)]
        found = [each for fatal in (*once, *twice) for each in leftovers(model, block, *fatal)]
        tried, left = tried + len(once) + len(twice), left + found
        print(
            f"{name}: {len(once)} lines, {len(twice)} with a second interrupt, left: {found or 'nothing'}", flush=True
        )
    print(f"tried {tried}, left something {len(left)}")


if __name__ == "__main__":
    main()
