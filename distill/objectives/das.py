"""Distributed alignment search (DAS): learn in which directions of a frozen network a variable of a causal model lies.

A learned subspace at a location of the network N is aligned with a variable v of the causal model H. For a base b and a
source s, the coordinates in the subspace are interchanged, and the subspace is trained so that the network answers as
the causal model does after the same interchange,

    L = Σ_entries CE(N(b; Π(v) ← N(s)), H(b; v ← H(s))).

Geiger et al. 2023 (arXiv:2303.02536), section 3. With learned boundaries, the share of the dims that is replaced is a
term of its own: Wu et al. 2023 (arXiv:2305.08809), section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.causal.values import moved
from distill.interchange.mapping import Entry
from distill.interchange.swap import Ran, encoded, places_of, source_of, swapped
from distill.objectives.iit import answer_loss, base_and_source, generator_on_cpu
from distill.objectives.objective import About, Objective
from distill.objectives.step import Reads, Step


class DAS(Objective):
    """Distributed alignment search on a causal model. Terms: `das` and, for learned choices of dims, `size`.

    Every step draws a source for each example and interchanges every entry of the mapping, one at a time. `das` is the
    sum over the entries of the cross-entropy of the network's answers under those of the causal model, so that each
    entry is learned as it would be alone; `size` is the sum of the shares of dims that the subspaces replace.

    Geiger et al. 2023 (arXiv:2303.02536), section 3; `size`: Wu et al. 2023 (arXiv:2305.08809), section 3.
    """

    about = About(
        ("das", "size"),
        "Σ_entries CE(N(b; Π(v) ← N(s)), H(b; v ← H(s))); size: Σ shares of the dims replaced",
        "Geiger et al. 2023, arXiv:2303.02536",
        "student: a source run, one counterfactual run an entry, of several a base run up to their places",
    )

    compares_runs = False

    def reads(self, mapping: Sequence[Entry]) -> Reads:
        """Return no locations: sources are runs of their own."""
        return Reads()

    @property
    def interchanges(self) -> bool:
        """True: its counterfactual runs resume from the base run."""
        return True

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the terms of all entries of the mapping."""
        model, network, mapping = step.causal, step.network, step.mapping
        rows, device = len(step.batch[model.inputs[0]]), step.batch[model.inputs[0]].device
        base, source = base_and_source(step, rows, generator_on_cpu(step.generator))
        answers = [model.answers(model.interchange(base, {entry.teacher: source})) for entry in mapping]
        base, source = moved(base, device), moved(source, device)
        with torch.no_grad():
            taken = source_of(model, network, source, mapping)
        if len(mapping) == 1:  # its counterfactual is a run of the base, of which no other is needed
            shared = Ran(base, encoded(model, network, base))
        elif "student" in vars(step):  # another objective of the step has run it
            shared = Ran(base, step.student)
        else:
            shared = source_of(model, network, base, mapping, resumable=True)
        losses = [
            answer_loss(model, swapped(model, network, entry, shared, taken), base, wanted)
            for entry, wanted in zip(mapping, answers, strict=True)
        ]
        terms = {"das": step.mean(torch.stack(losses).sum())}
        sizes = [at.subspace.size for at in places_of(step.mapping) if hasattr(at.subspace, "size")]
        return terms | ({"size": torch.stack(sizes).sum()} if sizes else {})
