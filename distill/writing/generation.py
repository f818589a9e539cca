"""The text that a model writes after prompts: `generate` of transformers, with draws that are decided row by row.

A token is drawn by an exponential race, as `torch.multinomial` draws it: the next token is argmax p_k / e_k, where p is
the distribution after temperature, top-k, …, and the e_k are independent draws of the exponential distribution. Each
row has a generator of its own, so what is written after a prompt does not depend on the rows beside it, but for
rounding.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.errors import DistillError
from distill.models.inputs import evaluating, innermost
from distill.models.modes import as_itself
from distill.models.pad_tokens import pad_token_of
from distill.models.token_positions import parameters_of
from interventions import shown

WARPERS = {
    "temperature": ("TemperatureLogitsWarper", "temperature", 1.0),
    "top_h": ("TopHLogitsWarper", "top_h", None),
    "top_k": ("TopKLogitsWarper", "top_k", 0),
    "top_p": ("TopPLogitsWarper", "top_p", 1.0),
    "min_p": ("MinPLogitsWarper", "min_p", None),
    "typical_p": ("TypicalLogitsWarper", "mass", 1.0),
    "epsilon_cutoff": ("EpsilonLogitsWarper", "epsilon", 0.0),
    "eta_cutoff": ("EtaLogitsWarper", "epsilon", 0.0),
}
"""Settings of sampling, in the order of transformers: its class, the argument of that, and the value that is none."""
ENDS = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")
OTHERS = (
    "do_sample", "num_beams", "length_penalty", "early_stopping", "min_new_tokens", "repetition_penalty",
    "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "remove_invalid_values", "use_cache", *ENDS,
)  # fmt: skip
"""The other settings of transformers' `GenerationConfig` that may be set; what they return is one text a prompt."""


ROUNDING = 2e3
"""The largest change of an answer by padding that is taken for rounding, in steps of float32 at the largest answer."""
_IGNORES: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Generation:
    """The settings of a text that is written, by the names of transformers' `GenerationConfig`.

    Attributes:
        max_new_tokens: the most tokens that are written after a prompt.
        settings: the others.

    Raises:
        DistillError: an unknown setting, or one that cannot be.
    """

    max_new_tokens: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = (*WARPERS, *OTHERS)
        for name in self.settings:
            if name not in known:
                near = get_close_matches(str(name), known, n=1, cutoff=0.4)
                raise DistillError(
                    f"Written has no setting of generation {shown(name)}"
                    f"{f', did you mean {near[0]!r}?' if near else ';'} there are max_new_tokens, {', '.join(known)}."
                )
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise DistillError(
                f"Written(max_new_tokens={shown(self.max_new_tokens)}) writes nothing; use a whole number above 0, "
                "e.g. max_new_tokens=128."
            )
        beams = self.settings.get("num_beams", 1)
        if isinstance(beams, bool) or not isinstance(beams, int) or beams < 1:
            raise DistillError(
                f"num_beams={shown(beams)} searches nothing; use a whole number above 0, e.g. num_beams=4."
            )
        if self.samples and beams > 1:
            raise DistillError(
                f"Written draws its tokens, and num_beams={beams} searches for the most "
                "probable text; choose one: generation={'num_beams': 4, 'do_sample': False}."
            )
        try:
            self.warpers(torch.device("cpu"))
            self.config({}).validate()
        except (ValueError, TypeError) as error:
            raise DistillError(f"the settings of Written cannot be used: {' '.join(str(error).split())}") from error

    @property
    def samples(self) -> bool:
        """True if tokens are drawn; otherwise the most probable are taken, or beams searched."""
        return bool(self.settings.get("do_sample", True))

    def warpers(self, device: torch.device) -> list[Any]:
        """Return what changes the distribution before a token is drawn, as transformers orders it."""
        import transformers

        if not self.samples:
            return []
        given = {name: self.settings.get(name, off) for name, (_, _, off) in WARPERS.items()}
        return [
            getattr(transformers, kind)(
                **{argument: given[name]}, **({"device": device} if name == "eta_cutoff" else {})
            )
            for name, (kind, argument, off) in WARPERS.items()
            if given[name] is not None and given[name] != off
        ]

    def config(self, tokens: Mapping[str, Any]) -> Any:
        """Return the settings for `generate`, which draws nothing itself; `tokens` are those of the model."""
        from transformers import GenerationConfig

        rest = {name: each for name, each in self.settings.items() if name not in WARPERS and name != "do_sample"}
        return GenerationConfig(**{**tokens, **rest}, do_sample=False, max_new_tokens=self.max_new_tokens)


def refuse_unable(network: Any, role: str) -> None:
    """Raise DistillError for a model that cannot write text."""
    inner = innermost(network) if isinstance(network, nn.Module) else network
    able = getattr(inner, "can_generate", None)
    if network is None:
        raise DistillError(
            f"there is no {role} to write, as {role}=None; give one, or let the other one write: Written(…, "
            f"by={'student' if role == 'teacher' else 'teacher'!r})."
        )
    if not isinstance(inner, nn.Module) or not callable(able) or not able():
        raise DistillError(
            f"the {role} cannot write: {type(inner).__name__} has no generate() of transformers; let the other one "
            "write, or load it with its language head: AutoModelForCausalLM.from_pretrained(…)."
        )


def reads_by_encoder(network: nn.Module) -> bool:
    """Return whether an encoder reads the prompt, so that the text that is written is a row of its own."""
    return bool(getattr(getattr(innermost(network), "config", None), "is_encoder_decoder", False))


def end_tokens(network: nn.Module, generation: Generation) -> tuple[int, ...]:
    """Return the tokens that end a text: as set, else of the model; none if it has none."""
    found = _tokens_of(network, generation)["eos_token_id"]
    return () if found is None else tuple(found) if isinstance(found, list | tuple) else (int(found),)


def generate(
    network: nn.Module,
    prompts: Mapping[str, Tensor],
    generation: Generation,
    seeds: Sequence[int],
    known: int | None = None,
) -> list[Int[Tensor, " written"]]:
    """Return the tokens that a model writes after each prompt, up to and with the first that ends a text, on the host.

    The model is in eval mode meanwhile, computes no gradients, and is afterwards as it was. Models that read padding
    before a prompt as text write after prompts of one length at a time.

    Args:
        network: the model.
        prompts: the columns of the prompts, padded on the left where a decoder reads them.
        generation: the settings.
        seeds: what the draws of each row are decided by.
        known: the number of token ids that all models of the training know; others are not written. None for all.
    """
    mask = prompts["attention_mask"]
    with evaluating(network), as_itself(network), torch.no_grad():
        if reads_by_encoder(network) or bool(mask.all()) or _ignores_padding(innermost(network)):
            return _generate(network, prompts, generation, seeds, known)
        found: list[Tensor] = [torch.empty(0)] * len(mask)
        for length in mask.sum(1).unique().tolist():
            rows = (mask.sum(1) == length).nonzero()[:, 0]
            own = {name: column[rows] for name, column in prompts.items()}
            own |= {name: own[name][:, -length:] for name in ("input_ids", "attention_mask")}
            places = rows.tolist()
            texts = _generate(network, own, generation, [seeds[place] for place in places], known)
            for place, text in zip(places, texts, strict=True):
                found[place] = text
        return found


def _generate(
    network: nn.Module,
    prompts: Mapping[str, Tensor],
    generation: Generation,
    seeds: Sequence[int],
    known: int | None,
) -> list[Int[Tensor, " written"]]:
    """Return what a model in eval mode writes after prompts, in one call."""
    import transformers

    inner: Any = innermost(network)
    ids = prompts["input_ids"]
    processors = generation.warpers(ids.device)
    if known is not None:
        processors.insert(0, _Known(known))
    if generation.samples:
        processors.append(_Race([torch.Generator(ids.device).manual_seed(seed) for seed in seeds]))
    config = generation.config(_tokens_of(network, generation))
    named = {name: prompts[name] for name in parameters_of(inner) if name in prompts and name != "labels"}
    with _own_settings(inner, config):
        found = inner.generate(
            **named, generation_config=config, logits_processor=transformers.LogitsProcessorList(processors)
        )
    start = 1 if reads_by_encoder(network) else ids.shape[1]
    return _until_end(found[:, start:].cpu(), end_tokens(network, generation))


def _ignores_padding(inner: Any) -> bool:
    """Return whether a decoder in eval mode answers alike to a prompt with and without padding before it."""
    if inner not in _IGNORES:
        ids = torch.tensor([[3, 4, 5]], device=next(inner.parameters()).device)
        pad = torch.full_like(ids, pad_token_of(inner) or 0)
        settings = Generation(1).config({"pad_token_id": 0})
        settings.update(output_logits=True, return_dict_in_generate=True)
        answers = []
        for given in (ids, torch.cat([pad, ids], 1)):
            mask = torch.ones_like(given)
            mask[:, : -ids.shape[1]] = 0
            with _own_settings(inner, settings):
                found = inner.generate(input_ids=given, attention_mask=mask, generation_config=settings)
            answers.append(found.logits[0].float())
        one, other = answers
        step = max(torch.finfo(found.logits[0].dtype).eps, torch.finfo(inner.dtype).eps)
        _IGNORES[inner] = bool(
            (one - other).abs().max() <= max(ROUNDING * torch.finfo(torch.float32).eps, 4 * step) * one.abs().max()
        )
    return _IGNORES[inner]


def _tokens_of(network: nn.Module, generation: Generation) -> dict[str, Any]:
    """Return the special tokens by the names of settings: as set, else by the model's settings of generation."""
    inner: Any = innermost(network)
    sources = [getattr(inner, "generation_config", None), inner.config.get_text_config(), inner.config]
    found: dict[str, Any] = {}
    for name in ENDS:
        values = [generation.settings.get(name), *(getattr(each, name, None) for each in sources)]
        found[name] = next((each for each in values if each is not None), None)
    if found["pad_token_id"] is None:  # what is written after the end of a text is cut off, whatever it is
        found["pad_token_id"] = pad_token_of(inner) or 0
    return found


@contextmanager
def _own_settings(inner: Any, config: Any) -> Iterator[None]:
    """Let a model generate by these settings alone in a block: its own would take the place of those that are not set.

    A student that is tuned to be served, with a penalty for repetitions, is not the distribution that is trained.
    """
    before = inner.generation_config
    inner.generation_config = config
    try:
        yield
    finally:
        inner.generation_config = before


def _until_end(written: Int[Tensor, "batch token"], ends: Sequence[int]) -> list[Int[Tensor, " written"]]:
    """Return the tokens of each row up to and with its first end token."""
    is_end = torch.isin(written, torch.tensor(ends, dtype=written.dtype))
    past = is_end.long().cumsum(1) - is_end.long()  # how many ends stand before each token
    return [row[before == 0] for row, before in zip(written, past, strict=True)]


class _Race:
    """A processor of scores that draws a token for each row and leaves it alone with a score above the others."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, ids: Tensor, scores: Float[Tensor, "batch vocabulary"]) -> Float[Tensor, "batch vocabulary"]:
        """Return p_k / e_k, whose largest is the token that is drawn."""
        fine = scores.dtype if scores.device.type == "mps" else torch.float64
        uniform = torch.empty_like(scores, dtype=fine)
        for row, generator in zip(uniform, self.generators, strict=True):
            row.uniform_(generator=generator)
        arrivals = uniform.neg_().log1p_().neg_().clamp_(min=torch.finfo(fine).tiny)
        return scores.to(fine).softmax(-1) / arrivals


class _Known:
    """A processor of scores that leaves out the tokens that another model of the training does not know."""

    def __init__(self, known: int) -> None:
        self.known = known

    def __call__(self, ids: Tensor, scores: Float[Tensor, "batch vocabulary"]) -> Float[Tensor, "batch vocabulary"]:
        """Return the scores with −∞ at the other tokens."""
        if scores.shape[-1] <= self.known:
            return scores
        return scores.masked_fill(torch.arange(scores.shape[-1], device=scores.device) >= self.known, -torch.inf)
