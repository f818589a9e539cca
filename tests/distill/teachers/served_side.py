"""What needs nnsight, in the program `python -m tests.distill.teachers.served_side`, which answers with `ANSWERS`.

Importing nnsight patches torch for the whole process; so it is imported inside functions, and the tests can collect
this file.
"""

import copy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import (
    CRD,
    DIITO,
    KD,
    PKD,
    Cosine,
    DistillError,
    InContext,
    Objective,
    Retries,
    Schedule,
    Served,
    Sobolev,
    fit,
    from_layers,
    interchange_accuracy,
)
from distill.teachers.retries import is_of_network
from interventions import Location, Mixup
from tests.distill.tiny_models import QUIET, VOCABULARY, gpt2_lm, spread, text, weights
from tests.interventions.remote import tiny
from tests.other_process import serve

MAPPING = {Location(1): Location(0), Location(2, dims=range(8)): Location(1, dims=range(8))}
OBJECTIVES: dict[str, Callable[[], list[Objective]]] = {
    "kd and diito": lambda: [KD(), DIITO()],
    "in context": lambda: [KD(), DIITO(InContext(0.3), match=[KD(), Cosine()])],
    "mixup": lambda: [KD(), DIITO(None, op=Mixup(0.5))],
    "features": lambda: [KD(), PKD()],
}
TEACHERS = ("traced", "served", "remote")
MODELS = ("torch", "traced")
SGD = Schedule(optimizer="sgd")
"""AdamW makes large steps of a gradient that is 0 but for rounding, as that of key biases is."""


@cache
def answer(name: str) -> Any:
    """Return one of `ANSWERS`; the first time it is computed."""
    return ANSWERS[name]()


def network() -> nn.Module:
    return spread(gpt2_lm(4, dropout=0.1)).train()  # whoever teaches does so in eval mode


def language_model(module: nn.Module) -> Any:
    from nnsight import TransformersModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w0")
    return TransformersModel(module, task="text-generation", tokenizer=tokenizer)


def teacher(kind: str, **settings: Any) -> Any:
    from nnsight import NNsight

    if kind == "torch":
        return network()
    if kind == "traced":
        return NNsight(network())
    return Served(language_model(network()), remote="local" if kind == "remote" else False, **settings)


def student() -> nn.Module:
    return from_layers(network(), 2)


def fitted(by: Any, objective: list[Objective], **settings: Any) -> dict[str, Any]:
    learner = student()
    result = fit(
        by, learner, "full", text(labels=False), objective=objective, steps=4, batch_size=5, lr=0.1,
        schedule=SGD, console=QUIET, **settings,
    )  # fmt: skip
    modes = [module.training for module in copy.copy(network_in(by)).modules()]
    return {"terms": result.records[-1].terms, "weights": weights(learner), "is in train mode": all(modes)}


def network_in(by: Any) -> nn.Module:
    from distill.models.inputs import network_of

    return network_of(by)


def measured(by: Any, below: str) -> dict[str, Any]:
    from nnsight import NNsight

    learner: Any = student().eval()
    learner = NNsight(learner) if below == "traced" else learner
    found = interchange_accuracy(by, learner, MAPPING, text(labels=False), pairs=40)
    return {"text": str(found), "requests": getattr(by, "requests", None)}


def largest() -> dict[str, Any]:
    """The same training by the 8 largest of 40 logits, here and where the model is."""
    found = {}
    for kind in ("served", "remote"):
        by = teacher(kind, top_k=8)
        found[kind] = fitted(by, [KD(), DIITO()])["weights"]
    return found


def flaky() -> dict[str, Any]:
    """A host that fails twice in three times, as nnsight says so."""
    import httpx
    from nnsight.intervention.backends.remote import RemoteError

    import interventions

    calls, pauses, run = [0], list[float](), interventions.run

    def failing(model: Any, *args: Any, **settings: Any) -> Any:
        if isinstance(model, nn.Module):  # the student, which is here
            return run(model, *args, **settings)
        calls[0] += 1
        if calls[0] % 3 == 1:
            raise httpx.ConnectError("connection refused")
        if calls[0] % 3 == 2:
            raise RemoteError("Failed to send request: timed out") from httpx.ReadTimeout("timed out")
        return run(model, *args, **settings)

    interventions.run = failing
    try:
        by = teacher("remote", retries=Retries(2, sleep=pauses.append))
        return {"weights": fitted(by, [KD(), DIITO()])["weights"], "pauses": pauses, "requests": by.requests}
    finally:
        interventions.run = run


def on_a_host() -> dict[str, Any]:
    """A model that is never loaded here, on a host without our packages that is killed and started again."""
    from nnsight.schema.config import CONFIG

    CONFIG.APP.REMOTE_LOGGING = False
    network = tiny.network()
    mask = torch.arange(8) < torch.tensor([8, 5, 6, 8, 7, 4, 8, 8, 6, 5])[:, None]
    ids = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    data = {"input_ids": ids, "attention_mask": mask.long()}

    def learnt(by: Any) -> dict[str, Any]:
        learner = from_layers(network, 1)
        fit(
            by,
            learner,
            "full",
            data,
            objective=[KD(), DIITO()],
            steps=3,
            batch_size=5,
            lr=0.1,
            schedule=SGD,
            console=QUIET,
        )
        measure = from_layers(network, 2).eval()
        accuracy = interchange_accuracy(by, measure, {Location(1): Location(0)}, data, pairs=20)
        return {"weights": weights(learner), "accuracy": str(accuracy)}

    with tempfile.TemporaryDirectory() as elsewhere:
        network.save_pretrained(elsewhere)
        hosts = [host := started("0", elsewhere)]
        assert host.stdout is not None
        port = host.stdout.readline().strip()
        pauses: list[float] = []

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 2:
                hosts.append(new := started(port, elsewhere))
                assert new.stdout is not None
                new.stdout.readline()

        try:
            absent = tiny.traced(folder=elsewhere)
            where = f"http://127.0.0.1:{port}"
            served = Served(absent, remote=where, cache=f"{elsewhere}/answers", retries=Retries(4, sleep=sleep))
            first = served.run({name: column[:4] for name, column in data.items()}).logits
            host.kill()
            host.wait()
            found = learnt(served)
        finally:
            for each in hosts:
                each.kill()
        again = Served(absent, remote=where, cache=f"{elsewhere}/answers")
        kept = again.run({name: column[:4] for name, column in data.items()}).logits
        return {
            "plain": learnt(network), "served": found, "pauses": pauses, "loaded": absent.dispatched,
            "kept": torch.equal(first, kept) and again.requests == 0,
        }  # fmt: skip


def started(port: str, folder: str) -> Any:
    command = [sys.executable, str(Path(tiny.__file__).parent / "host.py"), port]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)


def without_graphs() -> dict[str, Any]:
    """A host that keeps no graphs: which positions are seen is not known."""
    by = teacher("remote")
    send = by._send
    by._send = lambda request, *, graded=False: send(request)
    batch = text(labels=False).batch([0, 1])
    base = by.run({name: batch[name] for name in ("input_ids", "attention_mask")})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        masks = by.seen(base, [Location(1)], torch.ones(base.logits.shape[:2]))
    return {"said": [str(each.message) for each in said], "shape": tuple(masks[0].shape), "all": bool(masks[0].all())}


def errors() -> dict[str, bool]:
    """Which errors, as nnsight raises them, are of the network."""
    import httpx
    from nnsight.intervention.backends.remote import RemoteError
    from nnsight.schema.response import ResponseModel

    request = httpx.Request("POST", "http://host")
    found: dict[str, BaseException] = {
        "job": RemoteError("IndexError: index 5 is out of range"),
        "refused": RemoteError("Failed to send request: no such model"),
        "lost": RemoteError("Failed to send request: ..."),
        "busy": RemoteError("Failed to send request: try later"),
    }
    found["refused"].__cause__ = httpx.HTTPStatusError("", request=request, response=httpx.Response(422))
    found["busy"].__cause__ = httpx.HTTPStatusError("", request=request, response=httpx.Response(503))
    found["lost"].__cause__ = httpx.RemoteProtocolError("server disconnected")
    try:
        ResponseModel.model_validate_json("")
    except ValueError as error:
        found["closed"] = error
    return {name: is_of_network(error) for name, error in found.items()}


def refused(case: Callable[[], Any]) -> str:
    """What the error says of what does not work."""
    try:
        case()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def student_of_nnsight() -> None:
    from nnsight import NNsight

    fit(network(), NNsight(student()), "full", text(labels=False), console=QUIET)


def not_remotable() -> None:
    from nnsight import NNsight

    Served(NNsight(network()), remote="local").run({"input_ids": torch.ones(1, 2).long()})


def stale() -> None:
    folder = tempfile.mkdtemp() + "/answers"
    Served(language_model(network()), remote="local", cache=folder)
    other = network()
    with torch.no_grad():
        last: Tensor = list(other.parameters())[-1]
        last.add_(1.0)
    try:
        Served(language_model(other), remote="local", cache=folder)
    except DistillError as error:
        raise error


REFUSED: dict[str, Callable[[], Any]] = {
    "student": student_of_nnsight,
    "derivatives": lambda: fitted(teacher("remote"), [Sobolev()]),
    "features": lambda: fitted(teacher("remote"), [CRD()]),
    "stale": stale,
    "not remotable": not_remotable,
}
ANSWERS: dict[str, Callable[[], Any]] = {
    **{
        f"fit {name} {kind}": lambda name=name, kind=kind: fitted(teacher(kind), OBJECTIVES[name]())
        for name in OBJECTIVES
        for kind in ("torch", *TEACHERS)
    },
    **{
        f"accuracy {above} {below}": lambda above=above, below=below: measured(teacher(above), below)
        for above in ("torch", *TEACHERS)
        for below in MODELS
    },
    "top k": largest,
    "flaky": flaky,
    "graphs": without_graphs,
    "errors": errors,
    "host": on_a_host,
    **{f"refused {name}": lambda case=case: refused(case) for name, case in REFUSED.items()},
}


if __name__ == "__main__":
    warnings.simplefilter("error", category=UserWarning)
    warnings.filterwarnings("ignore", module="nnsight|transformers|torch")
    serve(answer)
