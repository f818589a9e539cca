"""`fit_lens`: the training of a tuned lens, by the machinery of the logit lens."""

from collections.abc import Iterator

import torch
from torch import Tensor

from interventions.analysis.data_batches import batches_of
from interventions.arguments import checked
from interventions.endings import with_gradients, without_gradients
from interventions.errors import InterventionError
from interventions.execution.run import Run
from interventions.execution.stamps import unchanged
from interventions.lenses.logit_lens import divergence, logits_at, real_answers
from interventions.lenses.tuned_lens import TunedLens, check_one_width, new_lens, states_of
from interventions.locations import Location
from interventions.models.wrappers import Model, is_traced, module_of
from interventions.runs import check_eval, run


@checked
def fit_lens(
    model: Model,
    batches: object,
    *,
    steps: int = 250,
    lr: float = 1e-3,
    seed: int = 0,
    batch_size: int | None = None,
    stack: str | None = None,
) -> TunedLens:
    """Train a tuned lens: one affine translator for each layer, so that the lens answers as the model does.

    Belrose et al. 2023 (arXiv:2303.08112), section 3. Each step takes one batch, drawn by the seed, and one step of
    Adam on KL(model ‖ lens), averaged over the real tokens and summed over the layers; the model is frozen. A layer
    whose translator is no better than the logit lens on all of the data in the end keeps the logit lens, so that on
    these data no layer is worse.

    Args:
        model: a torch model in eval mode.
        batches: inputs of the model, batch by batch, or rows, as for `mean_of`; they are held in memory.
        steps: the number of steps.
        lr: the learning rate of Adam.
        seed: of the order of the batches.
        batch_size: how many rows are read at a time, as for `mean_of`.
        stack: which list of blocks, as for `logit_lens`.

    Returns:
        A TunedLens, for `logit_lens(model, inputs, lens=…)`.

    Raises:
        InterventionError: no batches; a number of steps below 1, or a learning rate that is not positive; and as
            `logit_lens`.
    """
    if steps < 1 or not 0 < lr < float("inf"):
        raise InterventionError(f"steps={steps}, lr={lr} train nothing; write steps=250, lr=1e-3.")
    if is_traced(model):
        raise InterventionError("fit_lens trains on a torch model; pass the one that this model of nnsight wraps.")
    check_eval(model)
    network = module_of(model)
    layers = states_of(network, stack)
    inputs = [batch.inputs() for batch in batches_of(network, batches, batch_size, "batches")]
    if not inputs:
        raise InterventionError("no batches were given, so nothing is learned; pass an iterable of inputs.")
    with unchanged():
        first = _run(network, inputs[0], layers)
        check_one_width(layers, first)
        lens = new_lens(layers, first)
        optimizer = torch.optim.Adam(lens.parameters(), lr)
        draw = torch.Generator().manual_seed(seed)
        before = _mean_losses(lens, network, inputs, layers)
        for number in torch.randint(len(inputs), (steps,), generator=draw).tolist():
            done = _run(network, inputs[number], layers)
            with with_gradients():
                total = torch.stack([each.mean() for each in _divergences(lens, done, layers)]).sum()
                found = torch.autograd.grad(total, list(lens.parameters()), allow_unused=True)
            for parameter, gradient in zip(lens.parameters(), found, strict=True):
                parameter.grad = gradient
            optimizer.step()
        _keep_better(lens, before, _mean_losses(lens, network, inputs, layers))
    lens.zero_grad()
    return lens.requires_grad_(False)


def _run(model: Model, inputs: object, layers: tuple[Location, ...]) -> Run:
    with without_gradients():
        return run(model, inputs, layers)


def _divergences(lens: TunedLens, done: Run, layers: tuple[Location, ...]) -> Iterator[Tensor]:
    """Yield the KL [nats] of each translated layer at each real token of a run, `[n]`."""
    final = done.logits.detach()
    real = real_answers(done, layers[-1], final)
    for number in range(len(layers) - 1):
        yield divergence(logits_at(done, layers, number, lens), final)[real]


def _mean_losses(lens: TunedLens, model: Model, inputs: list, layers: tuple[Location, ...]) -> Tensor:
    """Return the mean KL of each layer over the real tokens of all batches, `[layers]`."""
    with without_gradients():
        each = [list(_divergences(lens, _run(model, batch, layers), layers)) for batch in inputs]
        return torch.stack([torch.cat(layer).double().mean() for layer in zip(*each, strict=True)])


def _keep_better(lens: TunedLens, before: Tensor, after: Tensor) -> None:
    """Return the translators to 0 of layers whose mean KL is not below that of the logit lens."""
    with torch.no_grad():
        for number in (~(after < before)).nonzero()[:, 0].tolist():
            for parameter in lens.translators[number].parameters():
                parameter.zero_()
