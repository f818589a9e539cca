"""Asks a host for what the tests compare: `python -m tests.interventions.remote.asking FILE`.

It starts the host in a process of its own. A program, because nnsight changes torch for the whole process.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch

import interventions
from interventions import (
    Add,
    Interpolate,
    InterventionError,
    Location,
    Mean,
    Mixup,
    Rotation,
    Swap,
    Zero,
    interchange,
    intervene,
    logit_difference,
    record,
    run,
    run_to,
    sweep,
)
from tests.interventions.remote import hostile, tiny

HOST = Path(__file__).parent / "host.py"
PLACES = [Location(1), Location(2, "attention_pattern"), Location(0, "mlp_activation", dims=range(5)), Location(-1)]


class Doubled:
    """An operator of somebody's own, which no host knows."""

    def __call__(self, base, source, generator):
        return base * 2


def own_imports(output):
    from interventions import log_probability

    return log_probability(3)(output)


def drawn(seed: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(seed))}


def rotation() -> Rotation:
    return Rotation(4, width=32, seed=1)


def asked(model: Any, **where: Any) -> dict[str, Any]:
    """What every machine should answer alike; `where` says which."""
    base, source = drawn(0), drawn(1)
    answers: dict[str, Any] = {}
    ran = run(model, base, at=PLACES, **where)
    answers["run"] = [ran.logits, *(ran.activations[place] for place in PLACES)]
    answers["run_to"] = [run_to(model, base, at=PLACES[:2], **where).activations[place] for place in PLACES[:2]]
    answers["keep"] = run(model, base, keep=logit_difference(3, 4), **where).output
    answers["own words"] = run(model, base, keep=lambda output: interventions.probability(3)(output), **where).output
    answers["own imports"] = run(model, base, keep=own_imports, **where).output
    swaps = {
        "swap": (Location(1), {}),
        "one head": (Location(1, "query", heads=2), {"positions": [-1, 0]}),
        "pattern": (Location(0, "attention_pattern", heads=1), {}),
        "subspace": (Location(1, subspace=rotation()), {"positions": [[0], [3]], "source_positions": 2}),
        "several": ({Location(0): Doubled(), Location(1): Swap(), Location(2, "mlp_output"): Interpolate(0.3)}, {}),
        "function": ({Location(1): lambda base, source, generator: base + source}, {}),
        "mean": ({Location(1): Mean()}, {}),
    }
    for name, (at, settings) in swaps.items():
        after = interchange(model, base, source, at, record=[Location(2)], **settings, **where)
        answers[name] = [after.logits, after.activations[Location(2)]]
    generator = torch.Generator().manual_seed(3)
    noisy = [
        interchange(model, base, None, Location(1), op=Mixup(0.5), generator=generator, **where).logits for _ in "ab"
    ]
    answers["draws"] = [*noisy, generator.get_state()]
    answers["run as source"] = interchange(
        model, ran, run(model, source, at=[Location(1)], **where), Location(1), **where
    ).logits
    grid = sweep(
        model, base, source, [Location(i) for i in range(3)], metric=logit_difference(3, 4), positions=[0, 5], **where
    )
    answers["sweep"] = [grid.per_example, grid.baseline, grid.source]
    return answers


def traces(model: Any, trace: Callable, generate: Callable, **where: Any) -> dict[str, Any]:
    """What a block does to the user's own calls."""
    base, answers = drawn(0), {}
    steering = Add(torch.linspace(-1, 1, 32))
    with intervene(model, {Location(0): Doubled(), Location(1, subspace=rotation()): Zero()}, positions=[0, -1]):
        answers["own trace"] = trace(base)
    with intervene(model, layer=0, op=steering), intervene(model, layer=1, op=Swap(), source=drawn(1), **where):
        answers["nested"] = trace(base)
    with intervene(model, layer=1, op=steering, positions=-1, steps=[1, 2]):
        answers["generation"] = generate("w1 w2 w3")
    with intervene(model, Location(1, "value"), op=Zero(), positions=[0], steps=0):
        answers["values in the cache"] = generate("w7 w2 w9 w4")
    return answers


def errors(model: Any, url: str) -> dict[str, str]:
    base = drawn(0)

    def never(**where: Any) -> None:
        settings = {"max_new_tokens": 2, "do_sample": False, "remote": url}
        with intervene(model, op=Zero(), **where), model.generate("w1 w2", **settings) as tracer:
            tracer.result.save()

    def keeping() -> None:
        with record(model, Location(1)), model.trace(**base, remote=url):
            model.output.logits.save()

    def counted() -> None:
        with intervene(model, layer=1, op=Zero()) as handle, model.trace(**base, remote=url):
            model.output.logits.save()
        _ = handle.firings

    def checkpointed() -> None:
        from nnsight import NNsight

        network = tiny.network().train()
        network.gradient_checkpointing_enable({"use_reentrant": True})
        interchange(NNsight(network), base, None, Location(1, "mlp_output"), op=Zero())

    def nameless() -> None:
        other = tiny.traced()
        other.repo_id = ""
        run(other, base, remote=url)

    calls: dict[str, Callable] = {
        "a step that is never made": lambda: never(layer=1, steps=7),
        "a place that never runs": lambda: never(
            at=Location(module="transformer.h.0.attn", operation="self__upcast_and_reordered_attn_0")
        ),
        "an operation that is not there": lambda: run(model, base, [Location(1, operation="attn.nope_0")], remote=url),
        "an inner operation that is not there": lambda: run(
            model, base, [Location(1, operation="attn.attention_interface_1.nope_0")], remote=url
        ),
        "a position that is not there": lambda: interchange(
            model, base, drawn(1), Location(1), positions=9, remote=url
        ),
        "a record of a remote trace": keeping,
        "counts": counted,
        "a re-entrant checkpoint": checkpointed,
        "a model without a name": nameless,
    }
    return {name: _message(each) for name, each in calls.items()}


def _message(each: Callable) -> str:
    try:
        each()
    except InterventionError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(file: str) -> None:
    warnings.simplefilter("ignore")
    from nnsight.schema.config import CONFIG

    CONFIG.APP.REMOTE_LOGGING = False
    with tempfile.TemporaryDirectory() as elsewhere:
        host = subprocess.Popen([sys.executable, str(HOST), "0"], stdout=subprocess.PIPE, text=True, cwd=elsewhere)
        try:
            assert host.stdout is not None
            url = f"http://127.0.0.1:{host.stdout.readline().strip()}"
            model = tiny.traced()

            def trace(inputs, model=model, **where):
                with model.trace(**inputs, **where):
                    logits = model.output.logits.save()
                return logits

            def generate(text, model=model, **where):
                with model.generate(text, max_new_tokens=5, do_sample=False, **where) as tracer:
                    tokens = tracer.result.save()
                return tokens

            before = dict(vars(Swap))
            found: dict[str, Any] = {}
            for name, where in {"here": {}, "simulated": {"remote": "local"}, "host": {"remote": url}}.items():
                mine = {} if name == "here" else where
                found[name] = asked(model, **mine) | traces(
                    model, lambda x, m=mine: trace(x, **m), lambda x, m=mine: generate(x, **m)
                )
            found["errors"] = errors(model, url)
            tiny.network().save_pretrained(elsewhere)
            absent = tiny.traced(folder=elsewhere)
            found["absent"] = asked(absent, remote=url) | traces(
                absent, lambda x: trace(x, absent, remote=url), lambda x: generate(x, absent, remote=url), remote=url
            )
            found["loaded"] = absent.dispatched
            head = Location(operation="self_lm_head_0")
            found["model's own operation"] = [
                run(each, drawn(0), at=[head], remote=url).activations[head] for each in (model, absent)
            ]
            found["hostile"] = hostile.found(model, tiny.network(), url)
            found["left"] = json.loads(urlopen(f"{url}/health").read())["left"]
            found["edits"] = len(model._edits)
            after = dict(vars(Swap))
            found["touched"] = [name for name in before if before[name] is not after[name]]
        finally:
            host.kill()
    torch.save(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
