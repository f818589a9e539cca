"""Objectives on hidden states: last hidden states, first tokens, hints at chosen layers, and attention maps.

With hidden states h of student and teacher at mapped locations, and attention maps Q = Σ_c A_c² of feature maps A,

    Cosine = 1 − cos(h_s, h_t), token by token       DistilBERT: Sanh et al. 2019 (arXiv:1910.01108), section 3
    PKD = ‖h_s / ‖h_s‖ − h_t / ‖h_t‖‖² / width       of the first token: Sun et al. 2019 (arXiv:1908.09355), section 3.2
    FitNets = MSE(W h_s, h_t), W a regressor         Romero et al. 2014 (arXiv:1412.6550), section 2.2
    AT = mean (Q_s / ‖Q_s‖ − Q_t / ‖Q_t‖)²           Zagoruyko, Komodakis 2016 (arXiv:1612.03928), section 3.1.
"""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import DistillError, checked, refuse_unless_positive
from distill.interchange.mapping import Entry, depth
from distill.losses import attention_transfer, cosine, hint, patient
from distill.models.loss_masks import SOURCE, checked_tokens
from distill.objectives.objective import About, Objective
from distill.objectives.regressors import (
    Layers,
    format_layers,
    key_of,
    match_features,
    refuse_no_layers,
    regress,
    regressors_for,
)
from distill.objectives.step import Reads, Step, average_loss, zero_of
from interventions import InterventionError, Location, Model, architecture, keep_on_host, on_host


@checked
class Cosine(Objective):
    """1 − cosine between the last hidden states of student and teacher, token by token. Term `cosine`.

    Sanh et al. 2019 (DistilBERT, arXiv:1910.01108), section 3. Both models have the same width there.

    Args:
        at: the location compared in both. None is the last hidden states, as the published code of DistilBERT and of
            DIITO has them: after the norm behind the last block where a model has one, else the output of that block.
        tokens: `"labelled"` or `"all"`, as for `KD`.
    """

    about = About(("cosine",), "1 − cos(h_s, h_t), mean over labelled tokens", "Sanh et al. 2019, arXiv:1910.01108")

    def __init__(self, at: Location | None = None, *, tokens: str = "labelled") -> None:
        super().__init__()
        self.at, self.tokens = at, checked_tokens(tokens, "Cosine")
        self._places = None if at is None else (at, at)

    def reads(self, mapping: Sequence[Entry]) -> Reads:
        """Return the compared location of both models."""
        return Reads() if self._places is None else Reads(self._places[:1], self._places[1:])

    def prepare(self, step: Step, rows: int) -> None:
        """Find the last hidden states of both models, where no location was given."""
        self._places = (self.at, self.at) if self.at is not None else _last_hidden(step)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the term `cosine`."""
        above, below = self._places or _last_hidden(step)
        student, teacher = step.student.vectors(below), step.taught.vectors(above)
        mask = step.mask(student, below, self.tokens)
        return {"cosine": average_loss(step, partial(cosine, mask=mask), student, teacher, mask)}

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        shown = [] if self.at is None else [f"at={str(self.at)!r}"]
        return ", ".join(shown + _tokens_setting(self.tokens))


@checked
class PKD(Objective):
    """Patient knowledge distillation: squared error of the L2-normalised first token, layer by layer. Term `pkd`.

    The first token is the first that counts; an example without any is left out.

    Sun et al. 2019 (arXiv:1908.09355), section 3.2. Both models have the same width.

    Args:
        layers: {teacher location: student location}. None: for each pair of the mapping its last teacher location and
            its last student location, without the last block of the teacher, whose effect the answers show.
        tokens: `"labelled"` or `"all"`, as for `KD`.
    """

    about = About(
        ("pkd",),
        "‖h_s/‖h_s‖ − h_t/‖h_t‖‖² / width of the first token, mean over layers and examples",
        "Sun et al. 2019, arXiv:1908.09355",
    )

    def __init__(self, layers: Layers | None = None, *, tokens: str = "labelled") -> None:
        super().__init__()
        self.layers, self.tokens = layers, checked_tokens(tokens, "PKD")

    def reads(self, mapping: Sequence[Entry]) -> Reads:
        """Return the compared locations of both models."""
        layers = _ends(mapping) if self.layers is None else self.layers
        return Reads(tuple(layers), tuple(layers.values()))

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the term `pkd`."""
        layers = _below_last(step) if self.layers is None else self.layers
        if not layers:
            raise DistillError(
                "PKD() compares the layers of a mapping and there is none below the last; give "
                "PKD({Location(1): Location(0)})."
            )
        masks, pairs = [], []
        for above, below in layers.items():
            states, teacher_states = step.student.vectors(below), step.taught.vectors(above)
            mask = step.mask(states, below, self.tokens)
            masks.append(mask)
            teacher_mask = step.mask_of_teacher(teacher_states, above, self.tokens)
            pairs.append((_first_token(states, mask), _first_token(teacher_states, teacher_mask)))
        student, teacher = (torch.stack(side, 1) for side in zip(*pairs, strict=True))
        given = [mask for mask in masks if mask is not None]
        if not given:
            return {"pkd": step.mean(patient(student, teacher))}
        is_left = torch.stack([on_host(mask).bool().any(1) for mask in given]).all(0)
        rows = is_left.nonzero()[:, 0].to(student.device, non_blocking=True)
        value = patient(student[rows], teacher[rows]) if len(rows) else zero_of(student)
        kinds = [step.kind_of(mask) for mask in given]
        return {"pkd": step.mean(value, next((kind for kind in kinds if SOURCE not in kind), kinds[0]))}

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        return ", ".join(
            ([] if self.layers is None else [f"layers={format_layers(self.layers)}"]) + _tokens_setting(self.tokens)
        )


@checked
class FitNets(Objective):
    """Hints: mean squared error between the student's features, behind a regressor, and the teacher's. Term `hint`.

    Where the widths differ a linear regressor is made and trained with the student (for feature maps a convolution of
    1 × 1); where they agree the features are compared as they are. Of feature maps of different sizes the larger is
    averaged down to the smaller. The losses of several layers are added.

    Romero et al. 2014 (FitNets, arXiv:1412.6550), section 2.2; the weight 100 is that of RepDistiller's runs.

    Args:
        layers: {teacher location: student location}. None: the middle layers of both, as in the paper.
        lr: the learning rate of the regressors; None is the schedule's.
        regressors: {teacher location: module} of your own, from the student's vectors to the teacher's.
        tokens: `"labelled"` or `"all"`, as for `KD`.
    """

    about = About(
        ("hint",),
        "mean of (W h_s − h_t)² over all entries of labelled tokens, sum over layers",
        "Romero et al. 2014, arXiv:1412.6550",
    )

    def __init__(
        self,
        layers: Layers | None = None,
        *,
        lr: float | None = None,
        regressors: Mapping[Location, nn.Module] | None = None,
        tokens: str = "labelled",
    ) -> None:
        super().__init__()
        refuse_unless_positive("FitNets", lr=lr)
        self.layers, self.lr, self.tokens = layers, lr, checked_tokens(tokens, "FitNets")
        refuse_no_layers(layers, "FitNets")
        self._given = dict(regressors or {})
        odd = [at for at in self._given if layers is not None and at not in layers]
        if odd:
            raise DistillError(
                f"FitNets(regressors=…) names {odd[0]}, which is none of the teacher's layers: "
                f"{', '.join(map(str, layers or ()))}; use the same text for a place in both."
            )
        self.regressors = nn.ModuleDict({key_of(at): module for at, module in self._given.items()})
        self._middle: Layers = {}

    @property
    def weights(self) -> Mapping[str, float]:
        """The published weight: 100."""
        return {"hint": 100.0}

    def reads(self, mapping: Sequence[Entry]) -> Reads:
        """Return the compared locations of both models."""
        return Reads(tuple(self._layers), tuple(self._layers.values()))

    def prepare(self, step: Step, rows: int) -> None:
        """Find the middle layers where none were given, and make the regressors."""
        if self.layers is None:
            sides = [Location(depth(run.model) // 2) for run in (step.taught, step.student)]
            self._middle = {sides[0]: sides[1]}
        self.regressors = regressors_for(step, self._layers, "FitNets", self._given)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the term `hint`."""
        losses = []
        for above, below in self._layers.items():
            student, teacher = match_features(step.student, below, step.taught, above, "FitNets")
            mask = step.mask(student, below, self.tokens)
            mapped = regress(self.regressors, above, student)
            losses.append(average_loss(step, partial(hint, mask=mask), mapped, teacher, mask))
        return {"hint": torch.stack(losses).sum()}

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        settings = [] if self.layers is None else [f"layers={format_layers(self.layers)}"]
        return ", ".join(settings + ([f"lr={self.lr}"] if self.lr is not None else []) + _tokens_setting(self.tokens))

    @property
    def _layers(self) -> Layers:
        """The compared layers, given or the middle ones."""
        return self._middle if self.layers is None else self.layers


@checked
class AT(Objective):
    """Attention transfer: squared difference of the L2-normalised attention maps. Term `at`.

    The map of a feature map is the sum over its channels of the squares; of a transformer the attention patterns take
    the place of the feature map, the heads that of the channels. Of feature maps of different sizes the larger is
    averaged down to the smaller. The losses of several layers are added.

    Zagoruyko, Komodakis 2016 (arXiv:1612.03928), section 3.1; the weight 1000 is that of the published code.

    Args:
        layers: teacher location → student location, with `[batch, channel, height, width]` or
            `[batch, head, query, key]` there, as `Location(module="layer2")` or `Location(3, "attention_pattern")`.
            None: the attention patterns of the last layers of each side of the mapping.
        tokens: which queries count: `"labelled"` or `"all"`, as for `KD`. Their keys are all that are no padding.
    """

    about = About(
        ("at",),
        "mean over positions of (Q_s/‖Q_s‖ − Q_t/‖Q_t‖)², Q = Σ_c A_c², sum over layers",
        "Zagoruyko, Komodakis 2016, arXiv:1612.03928",
    )

    def __init__(self, layers: Layers | None = None, *, tokens: str = "labelled") -> None:
        super().__init__()
        refuse_no_layers(layers, "AT")
        self.layers, self.tokens = layers, checked_tokens(tokens, "AT")

    @property
    def weights(self) -> Mapping[str, float]:
        """The published weight: 1000."""
        return {"at": 1000.0}

    def reads(self, mapping: Sequence[Entry]) -> Reads:
        """Return the locations of the maps of both models."""
        layers = self._layers(mapping)
        return Reads(tuple(layers), tuple(layers.values()))

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the term `at`."""
        layers = self._layers(step.mapping)
        if not layers:
            raise DistillError(
                "AT() compares the attention of the layers of a mapping and there is none; give a mapping='full', or "
                "AT({Location(3, 'attention_pattern'): Location(1, 'attention_pattern')})."
            )
        losses, made = [], cache(_pairs_of_tokens)  # most layers have the same masks
        for above, below in layers.items():
            student, teacher = step.student.activations[below], step.taught.activations[above]
            queries, keys = _masks_of_tokens(step, below, student, self.tokens)
            pairs = made(student.shape, queries, keys)
            none = pairs is not None and not bool(on_host(pairs).any())
            value = zero_of(student) if none else attention_transfer(student, teacher, pairs)
            losses.append(step.mean(value, step.kind_of(queries)))
        return {"at": torch.stack(losses).sum()}

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        return ", ".join(
            ([] if self.layers is None else [f"layers={format_layers(self.layers)}"]) + _tokens_setting(self.tokens)
        )

    def _layers(self, mapping: Sequence[Entry]) -> Layers:
        """Return the compared layers: the given ones, else the attention patterns of the layers of the mapping."""
        if self.layers is not None:
            return self.layers
        return {
            Location(above.layer, "attention_pattern", stack=above.stack): Location(
                below.layer, "attention_pattern", stack=below.stack
            )
            for above, below in _ends(mapping).items()
            if above.layer is not None and below.layer is not None
        }


def last_hidden(model: Model) -> Location:
    """Return the location of the last hidden states: behind the norm after the blocks, else after the last block."""
    normed = Location(site="final_norm")
    try:
        architecture(model).place(normed)
    except InterventionError:
        return Location(-1)
    return normed


def _last_hidden(step: Step) -> tuple[Location, Location]:
    """Return the locations of the last hidden states of teacher and student."""
    return last_hidden(step.taught.model), last_hidden(step.student.model)


def _first_token(states: Tensor, mask: Tensor | None) -> Tensor:
    """Return the states of the first token that counts, `[batch, width]`; states of examples as they are."""
    if states.ndim == 2:
        return states
    if mask is None:
        return states[:, 0]
    return states[torch.arange(len(states), device=states.device), mask.long().argmax(1)]


def _tokens_setting(tokens: str) -> list[str]:
    """Return the setting `tokens` for printing, where it is not the default."""
    return ["tokens='all'"] if tokens == "all" else []


def _masks_of_tokens(step: Step, at: Location, maps: Tensor, tokens: str) -> tuple[Tensor | None, Tensor | None]:
    """Return which queries of attention patterns count, and which keys, each `[batch, token]`."""
    if "attention_pattern" not in (at.site, at.io):
        return None, None
    of_one_head = maps[:, 0]
    return step.mask(of_one_head, at, tokens), step.mask_of_keys(of_one_head.transpose(1, 2), at)


def _pairs_of_tokens(shape: torch.Size, queries: Tensor | None, keys: Tensor | None) -> Tensor | None:
    """Return which pairs of query and key count in maps of a shape, `[batch, query, key]`; None if all do."""
    if queries is None and keys is None:
        return None
    masks = [None if mask is None else on_host(mask) for mask in (queries, keys)]
    pairs = _pairs(shape, queries, keys)
    here = all(copy is mask for copy, mask in zip(masks, (queries, keys), strict=True))
    return pairs if here else keep_on_host(pairs, lambda: _pairs(shape, *masks))


def _pairs(shape: torch.Size, queries: Tensor | None, keys: Tensor | None) -> Tensor:
    """Return the pairs on the device of the masks, of which one is given at least."""
    given: Any = keys if queries is None else queries
    kept = torch.ones(shape[0], *shape[2:], dtype=torch.bool, device=given.device)
    kept = kept if queries is None else kept & queries.bool()[:, :, None]
    return kept if keys is None else kept & keys.bool()[:, None]


def _ends(mapping: Sequence[Entry]) -> dict[Location, Location]:
    """Return {last teacher location: last student location} of the pairs of a mapping."""
    return {pair.teacher[-1]: pair.student[-1] for pair in mapping}


def _below_last(step: Step) -> dict[Location, Location]:
    """Return the same for the mapping of a step, without the last blocks of the teacher."""
    found = architecture(step.taught.model)
    last = [stack.blocks[-1] for stack in found.stacks]
    return {above: below for above, below in _ends(step.mapping).items() if found.place(above).module not in last}
