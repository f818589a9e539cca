"""The sources of writes that are not read where they are written: in another model, elsewhere, or stored."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.execution.writes import Source
from interventions.locations import Location, as_location
from interventions.models.architectures import Architecture, architecture
from interventions.models.calls import parameters_of
from interventions.models.places import Place
from interventions.models.wrappers import Model, is_traced, module_of, unwrapped
from interventions.names import shown

_IDS = ("input_ids", "decoder_input_ids")
_RAISED = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError)


@checked
@dataclass(frozen=True, eq=False)
class Stored:
    """Stored activations, e.g. from a file, as a source: `source=Stored({Location(3): tensor})`.

    Attributes:
        activations: {location: the whole activation there}, as `run(model, inputs).activations[location]` is.
        mask: which of their tokens are real, `[batch, token]`, so that positions are counted as in the inputs of the
            run; None is all of them.

    Raises:
        InterventionError: no dict of locations and tensors.

    >>> import torch
    >>> from interventions import Location, Stored, interchange
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    >>> kept = Stored({Location(module="0"): torch.tensor([[1.0, 2.0, -3.0]])})
    >>> interchange(net, torch.zeros(1, 2), kept, Location(module="0")).logits
    tensor([[1., 2., 0.]])
    """

    activations: Any
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        given = self.activations
        if not isinstance(given, Mapping) or not given or not all(isinstance(each, Tensor) for each in given.values()):
            raise InterventionError(
                f"Stored({type(given).__name__}) does not say where its activations belong; write "
                "Stored({Location(3): tensor})."
            )
        if self.mask is not None and not _is_mask(self.mask):
            raise InterventionError(
                f"Stored(mask={shown(self.mask)}) does not say which tokens are real; give the attention mask "
                "[batch, token] of the run."
            )
        object.__setattr__(self, "activations", {as_location(at): state for at, state in given.items()})

    def held(self, places: Iterable[Location]) -> dict[Location, Source]:
        """Return the stored activations at the locations as sources.

        Raises:
            InterventionError: nothing is stored for one of them.
        """
        absent = [location for location in places if location not in self.activations]
        if absent:
            raise InterventionError(
                f"nothing is stored for {absent[0]}: the activations are those of "
                f"{', '.join(map(str, self.activations))}; add it, or say which one is taken: "
                f"source_at={{{absent[0]!r}: {next(iter(self.activations))!r}}}."
            )
        return {location: Source([self.activations[location]], self.mask) for location in places}


def _is_mask(mask: Tensor) -> bool:
    """Return whether a tensor is an attention mask `[batch, token]` of zeros and ones."""
    if mask.ndim != 2 or not mask.numel() or mask.is_complex() or mask.is_meta or mask.layout != torch.strided:
        return False
    return bool(((mask == 0) | (mask == 1)).all())


@dataclass(frozen=True, eq=False)
class Origin:
    """The model and the locations at which sources are read, where these differ from those written.

    Attributes:
        model: the model that runs on the sources.
        at: {location written: location read}; for other locations both are the same.
    """

    model: nn.Module
    at: Mapping[Location, Location] = field(default_factory=dict)

    def location(self, written: Location) -> Location:
        """Return the location at which the source of a written location is read."""
        return self.at.get(written, written)

    @property
    def found(self) -> Architecture:
        """The architecture of the model that runs on the sources."""
        return architecture(self.model)

    def place(self, written: Location) -> Place:
        """Return the place at which the source of a written location is read."""
        return self.found.place(self.location(written))


def origin_of(
    model: Model, source: object, source_model: Any, source_at: Any, written: Iterable[Location]
) -> Origin | None:
    """Return where the sources of the written locations are read; None if in the model itself, at the same locations.

    Args:
        model: the model that is written.
        source: the sources that the user gives.
        source_model: the model that runs on the sources; None is `model`.
        source_at: {location written: location read}, or one location for all that are written.
        written: the locations that are written.

    Raises:
        InterventionError: either of them without a source; a model of nnsight; or a location that is not written.
    """
    if source_model is None and source_at is None:
        return None
    name = "source_at" if source_model is None else "source_model"
    if source is None:
        raise InterventionError(f"{name}= says where a source is read, and none was given; pass source=inputs.")
    if source_model is not None and not is_traced(source_model) and not isinstance(source_model, nn.Module):
        raise InterventionError(
            f"source_model={source_model!r} is no model; pass the one that the source is run on: source_model=other."
        )
    if is_traced(model) or (source_model is not None and is_traced(source_model)):
        raise InterventionError(
            f"{name}= is for torch models, and one of nnsight takes part; read first, and give what was read: "
            "source=Stored({Location(3): run(other, inputs, at=[Location(6)]).activations[Location(6)]})."
        )
    places = list(written)
    if source_at is None:
        read = {}
    elif isinstance(source_at, Mapping):
        if not source_at:
            raise InterventionError("source_at={} names no location; write {written: read}, or leave it out.")
        read = {as_location(place): as_location(there) for place, there in source_at.items()}
    else:
        read = dict.fromkeys(places, as_location(source_at))
    unused = [location for location in read if location not in places]
    if unused:
        raise InterventionError(
            f"source_at names {unused[0]}, and nothing is written there; its keys are those of at: "
            f"{', '.join(map(str, places))}."
        )
    return Origin(module_of(model if source_model is None else source_model), read)


@contextmanager
def check_source_inputs(given: object, model: Model) -> Iterator[None]:
    """Run a source through its model in the block; raise a short error for one that looks like an activation.

    Raises:
        InterventionError: the source is no inputs of the model.
    """
    description = (
        f"a tensor {list(given.shape)} of {given.dtype}" if isinstance(given, Tensor) else "a dict of locations"
    )
    if isinstance(given, int | float) or (hasattr(given, "__array__") and not isinstance(given, Tensor)):
        raise InterventionError(
            f"the source is a {type(given).__name__}, and no inputs of this {type(model).__name__}; give inputs as for "
            "the base, a Run, or Stored({Location(3): tensor}) of a tensor, torch.as_tensor(…)."
        )
    advice = "an activation that was kept is a source as Stored: source=Stored({Location(3): tensor})."
    takes = list(parameters_of(unwrapped(module_of(model))[-1]))
    is_named = isinstance(given, Mapping) and any(_is_place(key) for key in given if key not in takes)
    if is_named or (isinstance(given, Tensor) and given.is_floating_point() and takes and takes[0] in _IDS):
        raise InterventionError(f"the source is {description}, and no inputs of this {type(model).__name__}; {advice}")
    try:
        yield
    except InterventionError:
        raise
    except _RAISED as error:
        if not isinstance(given, Tensor):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InterventionError(
            f"the source is {description} and was taken for inputs of this {type(model).__name__}, which fails "
            f"({reason}); {advice}"
        ) from error


def _is_place(key: object) -> bool:
    """Return whether a key is a location, or the text of one."""
    if not isinstance(key, str):
        return isinstance(key, Location)
    try:
        Location.parse(key)
    except InterventionError:
        return False
    return True
