"""`python -m distill.compat.diito`: the command line of Causal-Distill (causal_train.py), mapped onto `fit`."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.compat.binarized import binarized_rows, token_probabilities
from distill.compat.flags import flag, ignored, notes_on_ignored, parse
from distill.compat.launch import Tracking, accelerator_of, formula, print_lines, send, start
from distill.compat.models import check_alike, freeze, load_language_model, load_weights, max_length_of, new_student
from distill.compat.neurons import neuron_pairs
from distill.compat.terms import AT_EMBEDDING, CountedMaskedLM, MaskedKD, Spliced, SquaredLogits
from distill.errors import DistillError
from distill.fit import fit
from distill.interchange.mapping import Entry, depth
from distill.interchange.positions import Span
from distill.interchange.sources import Crossway, Shuffle
from distill.models.pretrained import load_tokenizer
from distill.objectives import DIITO, KD, Cosine, Objective
from distill.objectives.language import CausalLM
from distill.training.progress import console_of
from distill.training.schedule import Schedule

PROGRAM = "distill.compat.diito"
PROJECT = "Causal-BERT-Distillation"
PARAMETERS = "parameters.json"
STUDENTS, TEACHERS = ("distilbert", "roberta", "gpt2"), ("bert", "roberta", "gpt2")
ACCELERATE = "accelerate places the models: accelerate launch -m distill.compat.diito"
NAMES = {
    "kd": "loss_ce",
    "mlm": "loss_mlm",
    "clm": "loss_clm",
    "mse": "loss_mse",
    "cosine": "loss_cos",
    "kd_cf": "loss_causal_ce",
    "cosine_cf": "loss_causal_cos",
}
DIFFERS = (
    "not reproduced of the original: it takes the input of a layer and writes it over the layer's output (b1948ce);",
    "  --seed does not reach what draws positions and layers, and it starts in a git repository alone (25ea621).",
    "  Scattered positions are real tokens here, and sources are drawn anew in each epoch. See docs/compat.md.",
)


@dataclass(frozen=True)
class Trainer:
    """Causal distillation of language models, by the flags of Causal-Distill."""

    force: bool = flag(False, "replaces the folder of an earlier run with the same settings")
    dump_path: str | None = flag(None, "the folder of runs; each has a folder of its own, named after its settings")
    data_file: str | None = flag(None, "a pickled list of token ids; only numbers are read from it")
    cache_dir: str = flag("./distill_cache/", "the folder of downloads from the hub")
    token_counts: str | None = flag(None, "a pickled list of counts: rare tokens are masked more often")

    student_type: str | None = flag(None, f"{', '.join(STUDENTS)}")
    student_config: str | None = flag(None, "the JSON of the student's configuration")
    student_pretrained_weights: str | None = flag(None, "a state dict that the student starts with")
    teacher_type: str | None = flag(None, f"{', '.join(TEACHERS)}")
    teacher_name: str | None = flag(None, "the teacher and its tokenizer: folder or name on the hub")

    temperature: float = flag(2.0, "the temperature of KD, × its square, in kd and kd_cf")
    alpha_ce: float = flag(0.5, "weight of kd")
    alpha_mlm: float = flag(0.0, "weight of mlm; needs --mlm")
    alpha_clm: float = flag(0.5, "weight of clm")
    alpha_mse: float = flag(0.0, "weight of mse: squared error of the logits")
    alpha_cos: float = flag(0.0, "weight of cosine, between the last hidden states")
    alpha_causal_ce: float = flag(0.0, "weight of kd_cf, that of DIITO()")
    alpha_causal: float = flag(0.0, "the older name of --alpha_causal_ce")
    alpha_causal_cos: float = flag(0.0, "weight of cosine_cf")
    mlm: bool = flag(False, "masked language models; causal ones without it")
    restrict_ce_to_mask: bool = flag(False, "kd and kd_cf at the masked tokens alone")

    mlm_mask_prop: float = flag(0.15, "the share of the tokens that is chosen for prediction")
    word_mask: float = flag(0.8, "the share of the chosen that is masked")
    word_keep: float = flag(0.1, "the share of the chosen that stays")
    word_rand: float = flag(0.1, "the share of the chosen that becomes a random token")
    mlm_smoothing: float = flag(0.7, "tokens are chosen in proportion to their counts to minus this power")

    neuron_mapping: str | None = flag(
        None, "a file of the original; or full, middle, late, single, or entries teacher~student. full without it"
    )
    interchange_prop: float = flag(0.3, "the share of the real tokens that is interchanged")
    interchange_max_token: int = flag(-1, "at most so many tokens; -1 is no limit")
    interchange_masked_token_only: bool = flag(False, "all masked tokens are interchanged, and no other")
    interchange_consecutive_only: bool = flag(False, "a span of tokens; scattered ones without it")
    interchange_mlm: bool = ignored(False, "an older flag; see --interchange_masked_token_only")
    data_augment: bool = flag(False, "tokens are interchanged in place of activations")
    include_crossway: bool = flag(False, "DIITO(Crossway()): each pair both ways, the mean of the two")
    parallel_crossway: bool = ignored(False, "both ways are computed together anyway")

    freeze_pos_embs: bool = flag(False, "roberta and gpt2 keep their position embeddings; does nothing for distilbert")
    freeze_token_type_embds: bool = flag(False, "roberta keeps its token type embeddings")

    n_epoch: int = flag(3, "epochs")
    batch_size: int = flag(5, "the rows of each part of a step")
    gradient_accumulation_steps: int = flag(50, "accumulate: the parts of a step, of batch_size rows each")
    group_by_size: bool = ignored(True, "rows are in a random order, and padded to the longest of their part")
    warmup_prop: float = flag(0.05, "warmup: the share of the steps over which the learning rate rises")
    weight_decay: float = flag(0.0, "weight_decay, of all parameters")
    learning_rate: float = flag(5e-4, "lr")
    adam_epsilon: float = ignored(1e-6, "AdamW keeps its 1e-8; its betas are .9 and .999, in the original .9 and .98")
    max_grad_norm: float = flag(5.0, "clip")
    initializer_range: float = ignored(0.02, "the configuration of the student says it")

    fp16: bool = flag(False, "mixed precision, by accelerate")
    fp16_opt_level: str = ignored("O1", "accelerate has one level")
    n_gpu: int = ignored(1, ACCELERATE)
    local_rank: int = ignored(-1, ACCELERATE)
    seed: int = flag(56, "seed of all draws")
    log_interval: int = flag(500, "steps between two reports to wandb; log.jsonl has every step")
    checkpoint_interval: int = ignored(4000, "the last states are saved every 200 steps")
    is_wandb: bool = flag(False, "figures are sent to wandb; without wandb a line says so, and the run continues")
    run_name: str | None = ignored(None, "the original replaces it by one made of the settings")


def main(arguments: Sequence[str]) -> None:
    """Train the student of a command line."""
    flags = parse(Trainer, arguments, PROGRAM)
    print_lines(*notes_on_ignored(flags))
    check(flags)
    run(flags)


def check(flags: Trainer) -> None:
    """Raise DistillError for flags that do not go together, before anything is loaded."""
    for name in ("dump_path", "data_file", "student_type", "student_config", "teacher_type", "teacher_name"):
        if getattr(flags, name) is None:
            raise DistillError(f"--{name} is missing; {Trainer.__dataclass_fields__[name].metadata['becomes']}.")
    for name, choices in (("student_type", STUDENTS), ("teacher_type", TEACHERS)):
        if getattr(flags, name) not in choices:
            raise DistillError(f"--{name} {getattr(flags, name)} does not exist; choose one of {', '.join(choices)}.")
    kinds = (flags.teacher_type, flags.student_type)
    if kinds[0] != kinds[1] and kinds != ("bert", "distilbert"):
        raise DistillError(
            f"--teacher_type {kinds[0]} and --student_type {kinds[1]} do not go together; use one for both."
        )
    if flags.mlm != (flags.student_type != "gpt2"):
        way = "add --mlm, with --alpha_clm 0" if not flags.mlm else "leave --mlm out, with --alpha_clm above 0"
        raise DistillError(f"--student_type {flags.student_type} with --mlm {flags.mlm} cannot be; {way}.")
    _check_weights(flags)
    if flags.parallel_crossway and not flags.include_crossway:
        raise DistillError("--parallel_crossway says how --include_crossway is computed; add that, or leave both out.")
    if flags.include_crossway and flags.data_augment:
        raise DistillError("--data_augment has no activations to interchange both ways; leave --include_crossway out.")
    if flags.interchange_max_token != -1 and flags.interchange_max_token < 1:
        raise DistillError(
            f"--interchange_max_token {flags.interchange_max_token} interchanges nothing; use 1 or more, or -1 for no "
            "limit."
        )
    if flags.interchange_masked_token_only and not flags.mlm:
        raise DistillError("--interchange_masked_token_only needs masked tokens; add --mlm.")
    if flags.freeze_token_type_embds and flags.student_type != "roberta":
        raise DistillError(
            f"--freeze_token_type_embds is for roberta, and the student is {flags.student_type}; leave it out."
        )


def weights_of(flags: Trainer) -> dict[str, float]:
    """Return the weight of each term that has one."""
    weights = {
        "kd": flags.alpha_ce,
        "mlm": flags.alpha_mlm,
        "clm": flags.alpha_clm,
        "mse": flags.alpha_mse,
        "cosine": flags.alpha_cos,
        "kd_cf": flags.alpha_causal_ce + flags.alpha_causal,
        "cosine_cf": flags.alpha_causal_cos,
    }
    return {name: weight for name, weight in weights.items() if weight}


def objectives_of(flags: Trainer, probabilities: Tensor | None = None, mask_id: int = 0) -> list[Objective]:
    """Return the objectives whose terms have a weight.

    Args:
        flags: the flags.
        probabilities: of each token to be masked, up to a factor; None for causal language models.
        mask_id: the id of the mask token.
    """
    weights = weights_of(flags)
    made: list[Objective] = [_kd(flags)] if "kd" in weights else []
    if probabilities is not None:
        made.append(
            CountedMaskedLM(
                probabilities,
                mask_id,
                share=flags.mlm_mask_prop,
                words=(flags.word_mask, flags.word_keep, flags.word_rand),
                every_row=flags.interchange_masked_token_only,
            )
        )
    made += [CausalLM()] if "clm" in weights else []
    made += [SquaredLogits()] if "mse" in weights else []
    made += [Cosine(tokens="all")] if "cosine" in weights else []
    match: list[Objective] = [_kd(flags)] if "kd_cf" in weights else []
    match += [Cosine(tokens="all")] if "cosine_cf" in weights else []
    return made + ([_interchange(flags, match)] if match else [])


def schedule_of(flags: Trainer) -> Schedule:
    """Return the schedule: a step of the optimizer has batch_size × gradient_accumulation_steps rows."""
    return Schedule(
        epochs=flags.n_epoch,
        batch_size=flags.batch_size * flags.gradient_accumulation_steps,
        accumulate=flags.gradient_accumulation_steps,
        lr=flags.learning_rate,
        warmup=flags.warmup_prop,
        weight_decay=flags.weight_decay,
        clip=flags.max_grad_norm,
        seed=flags.seed,
    )


def run_name(flags: Trainer) -> str:
    """Return the name of the run's folder, as the original makes it."""
    data = Path(str(flags.data_file)).resolve().parent.name
    mapping = Path(str(flags.neuron_mapping)).name.split(".")[0]
    return (
        f"s_{flags.student_type}_t_{flags.teacher_type}_data_{data}_seed_{flags.seed}_mlm_{flags.mlm}"
        f"_ce_{flags.alpha_ce}_mlm_{flags.alpha_mlm}_cos_{flags.alpha_cos}"
        f"_causal-ce_{flags.alpha_causal_ce + flags.alpha_causal}_causal-cos_{flags.alpha_causal_cos}"
        f"_nm_{mapping}_crossway_{flags.include_crossway}_int-prop_{flags.interchange_prop}"
        f"_consec-token_{flags.interchange_consecutive_only}_masked-token_{flags.interchange_masked_token_only}"
        f"_max-int-token_{flags.interchange_max_token}_eff-bs_{flags.batch_size * flags.gradient_accumulation_steps}"
    )


def run(flags: Trainer) -> None:
    """Load models and rows, train, and print where the student is."""
    folder = Path(str(flags.dump_path)) / run_name(flags)
    refuse_used(folder, force=flags.force)
    values = asdict(flags)
    tracking = Tracking(PROJECT, None, folder.name, flags.log_interval, NAMES, values) if flags.is_wandb else None
    accelerator = accelerator_of(flags.fp16, tracking)
    teacher = load_language_model(
        str(flags.teacher_name), str(flags.teacher_type), masked=flags.mlm, cache=flags.cache_dir
    )
    tokenizer = load_tokenizer(str(flags.teacher_name))
    student = new_student(Path(str(flags.student_config)), str(flags.student_type), masked=flags.mlm, seed=flags.seed)
    check_alike(teacher, student)
    if flags.student_pretrained_weights is not None:
        load_weights(student, Path(flags.student_pretrained_weights))
    freeze(student, positions=flags.freeze_pos_embs, token_types=flags.freeze_token_type_embds)
    rows = binarized_rows(
        Path(str(flags.data_file)), tokenizer, longest=max_length_of(teacher, tokenizer), masked=flags.mlm
    )
    objectives = objectives_of(flags, _probabilities(flags, tokenizer, teacher), tokenizer.mask_token_id or 0)
    weights = weights_of(flags)
    mapping = _mapping(flags, teacher, student) if any(name.endswith("_cf") for name in weights) else None
    print_lines(
        formula(weights),
        *(f"  {' '.join(repr(objective).split())}" for objective in objectives),
        *([] if mapping is None else [f"  interchanged: {', '.join(map(str, mapping))}"]),
        f"student of {depth(student)} layers, teacher of {depth(teacher)}, {len(rows)} texts",
        *DIFFERS,
    )
    if flags.force and folder.exists():
        shutil.rmtree(folder)
    result = fit(
        teacher,
        student,
        mapping,
        data=rows,
        objective=objectives,
        weights=weights,
        schedule=schedule_of(flags),
        output_dir=folder,
        console=console_of(),
        title="diito",
        accelerator=accelerator,
        tokenizer=tokenizer,
    )
    (folder / PARAMETERS).write_text(json.dumps(values, indent=1) + "\n")
    send(accelerator, tracking, result)
    print_lines(str(result).split("\n")[0], f"results: {folder}")


def refuse_used(folder: Path, *, force: bool) -> None:
    """Raise DistillError for a folder that may not be replaced: without `force`, or where it holds no run."""
    if not folder.exists():
        return
    if not force:
        raise DistillError(f"{folder} exists; replace it with --force, or choose another --dump_path.")
    if any(folder.iterdir()) and not (folder / "settings.json").exists():
        raise DistillError(f"{folder} holds something else than a run, which --force would delete; move it away.")


def _check_weights(flags: Trainer) -> None:
    """Raise DistillError for weights below 0, or for terms that the kind of model does not have."""
    negative = [name for name in vars(flags) if name.startswith("alpha_") and getattr(flags, name) < 0]
    if negative:
        raise DistillError(f"--{negative[0]} {getattr(flags, negative[0])} is below 0; weights are 0 or more.")
    needed, other = ("alpha_mlm", "alpha_clm") if flags.mlm else ("alpha_clm", "alpha_mlm")
    if not getattr(flags, needed) or getattr(flags, other):
        raise DistillError(
            f"--{needed} {getattr(flags, needed)} and --{other} {getattr(flags, other)}: "
            f"{'with' if flags.mlm else 'without'} --mlm the first must be above 0 and the second 0."
        )
    if flags.alpha_causal and flags.alpha_causal_ce:
        raise DistillError("--alpha_causal is the older name of --alpha_causal_ce; give one of them.")


def _kd(flags: Trainer) -> Objective:
    """Return the objective of the term `kd`, over all tokens or the masked ones."""
    if flags.restrict_ce_to_mask and flags.mlm:
        return MaskedKD(flags.temperature)
    return KD(flags.temperature, tokens="all")


def _interchange(flags: Trainer, match: Sequence[Objective]) -> DIITO:
    """Return the interchange objective, with what compares the counterfactual runs."""
    most = None if flags.interchange_max_token == -1 else flags.interchange_max_token
    span = Span(flags.interchange_prop, consecutive=flags.interchange_consecutive_only, most=most)
    if flags.interchange_masked_token_only and not flags.interchange_consecutive_only:
        span = Span(1.0, consecutive=False, among="labelled", most=most)
    if flags.data_augment:
        return DIITO(Spliced(span), positions=None, match=match, vacuous="keep")
    return DIITO(Crossway() if flags.include_crossway else Shuffle(), positions=span, match=match, vacuous="keep")


def _mapping(flags: Trainer, teacher: nn.Module, student: nn.Module) -> tuple[Entry, ...]:
    """Return the entries that are interchanged: those of the mapping, or the embeddings of `--data_augment`."""
    if flags.data_augment:
        return AT_EMBEDDING
    return neuron_pairs(flags.neuron_mapping or "full", teacher, student)


def _probabilities(flags: Trainer, tokenizer: Any, teacher: Any) -> Tensor | None:
    """Return the probability of each token to be masked, up to a factor; None for causal language models."""
    if not flags.mlm:
        return None
    size = teacher.config.vocab_size
    if flags.token_counts is not None:
        return token_probabilities(Path(flags.token_counts), tokenizer, size, flags.mlm_smoothing)
    print_lines("--token_counts is not given: all tokens are masked alike.")
    return torch.ones(size).scatter(0, torch.tensor(tokenizer.all_special_ids), 0.0)


if __name__ == "__main__":
    start(main, PROGRAM)
