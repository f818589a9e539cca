"""The writing of one training: whose turn a step is, what is drawn for it, and what the teacher has written before."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.data.rows import Rows
from distill.data.seeds import seed_from
from distill.errors import DistillError
from distill.models.inputs import TEACHERS, Serves, common_vocabulary, device_of, innermost, to_device
from distill.models.pad_tokens import longest_input
from distill.models.trials import tried
from distill.processes import gather_results, processes
from distill.writing.generation import end_tokens, generate, reads_by_encoder, refuse_unable
from distill.writing.prompts import as_prompts, completed, lengths, prompts_for, split
from distill.writing.written import Written

FILE = "written.safetensors"
CHUNK, CHECKED = 1024, 65_536
"""The numbers of rows that are checked at a time, and before a training; others are checked in their steps."""
SHARE, BY_STUDENT, BY_TEACHER = 2, 3, 4
"""What a seed is for; 0 and 1 are the generators of a step."""
Gathering = Callable[[nn.Module], AbstractContextManager[None]]
"""From a model to a block in which one process may call it, whichever the others call."""


def whole(model: nn.Module) -> AbstractContextManager[None]:
    """Return the block of a model whose weights are whole in each process: there is nothing to gather."""
    return nullcontext()


@dataclass(eq=False)
class Writing:
    """The writing of one training.

    Attributes:
        levels: who writes with which probability; the first that writes in a step decides.
        rows: the prompts, with the completions of the data if there are any.
        teacher: the teacher, if it is a network in this process, also one whose answers are kept; None otherwise.
        student: the student.
        seed: of the training.
        kept: what the teacher has written after the prompt of each row, by number of the row and level.
    """

    levels: tuple[Written, ...]
    rows: Rows
    teacher: nn.Module | None
    student: nn.Module
    seed: int
    kept: dict[tuple[int, int], Int[Tensor, " written"]] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Written, rows: Rows, teacher: Any, student: nn.Module, seed: int) -> "Writing":
        """Return the writing of a training, after a check of models and rows.

        Args:
            data: the rows as they were given.
            rows: the prompts.
            teacher: the teacher, of any kind.
            student: the student.
            seed: of the training.

        Raises:
            DistillError: a model that cannot write, prompts that are empty or too long, or no completions where the
                data is used too.
        """
        levels = tuple(data.levels())
        if any(name.startswith(TEACHERS) for name in rows.columns):
            raise DistillError(
                "Written completes one row of tokens, and the data has tokens of its own for the teacher "
                f"({', '.join(name for name in rows.columns if name.startswith(TEACHERS))}), which would not be "
                "completed; train on the completions of the data: data=rows."
            )
        served = getattr(teacher, "model", None) if isinstance(teacher, Serves) else None
        here = served if isinstance(served, nn.Module) else teacher if isinstance(teacher, nn.Module) else None
        for level in levels:
            refuse_unable(student if level.by == "student" else here or teacher, level.by)
        made = cls(
            levels,
            as_prompts(rows, levels[-1].prompt_tokens, by_encoder=reads_by_encoder(student)),
            here,
            student,
            seed,
        )
        made._check_prompts()
        return made

    @property
    def has_completions(self) -> bool:
        """True if rows of the data have completions; the first of them are read."""
        few = self.rows.batch(range(min(CHUNK, len(self.rows))))
        return bool(lengths(few, by_encoder=reads_by_encoder(self.student))[1].any())

    def write(
        self,
        batch: Mapping[str, Tensor],
        numbers: Int[Tensor, " batch"],
        step: int,
        progress: float,
        *,
        counts: bool = True,
        is_trial: bool = False,
        gathering: Gathering = whole,
    ) -> Mapping[str, Tensor]:
        """Return the batch of a step with completions that a model has written, if it is its turn; else the batch.

        All processes of a step call it, since one draw decides for all of them, and what the teacher writes is known to
        all of them afterwards.

        Args:
            batch: rows of the data, on the device of the step.
            numbers: the numbers of the rows.
            step: the number of the step.
            progress: the share of the training that is done.
            counts: whether the rows count, or stand for none.
            is_trial: whether a step is tried before the first: a model writes if it ever does, and nothing is kept.
            gathering: returns a block, which all processes enter, in which a model can be called by one of them alone.

        Raises:
            DistillError: an empty or too long prompt, no completion where the data is used, or a model that fails.
        """
        place = self._turn(step, progress, is_trial=is_trial)
        by_encoder = reads_by_encoder(self.student)
        self._check(batch, numbers, place, by_encoder=by_encoder)
        if place is None:
            return batch
        level, prompts = self.levels[place], split(batch, by_encoder=by_encoder)[0]
        rows = numbers.tolist()
        if level.by == "student":
            seeds = [seed_from(self.seed, step, row, BY_STUDENT) for row in rows]
            with gathering(self.student):
                written = self._generate(level, batch, prompts, seeds)
        else:
            written = self._taught(place, batch, prompts, rows, gathering, keeps=counts and not is_trial)
        writer = self._writer(level)
        made = completed(self.rows, batch, prompts, written, end_tokens(writer, level.settings), by_encoder=by_encoder)
        return to_device(made, next(iter(batch.values())).device)

    def is_fresh(self, step: int, progress: float, *, is_trial: bool = False) -> bool:
        """Return whether the student writes the completions of a step, or of a trial, which do not come back."""
        place = self._turn(step, progress, is_trial=is_trial)
        return place is not None and self.levels[place].by == "student"

    def save(self, folder: Path) -> None:
        """Write what the teacher has written into a folder."""
        if not self.kept:
            return
        places = torch.tensor(list(self.kept))
        lengths = torch.tensor([len(each) for each in self.kept.values()])
        tokens = torch.cat([each.int() for each in self.kept.values()])
        save_file({"rows and levels": places, "lengths": lengths, "tokens": tokens}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read what the teacher had written when a checkpoint was saved."""
        self.kept = {}
        if not (folder / FILE).is_file():
            return
        found = load_file(folder / FILE)
        texts = found["tokens"].long().split(found["lengths"].tolist())
        self.kept = {
            (int(row), int(level)): text for (row, level), text in zip(found["rows and levels"], texts, strict=True)
        }

    def _turn(self, step: int, progress: float, *, is_trial: bool) -> int | None:
        """Return the place of the level that writes in a step; None for the completions of the data."""
        for place, level in enumerate(self.levels):
            if is_trial:
                writes = callable(level.share) or level.share > 0
            else:
                draws = torch.Generator().manual_seed(seed_from(self.seed, step, place, SHARE))
                writes = float(torch.rand((), generator=draws, dtype=torch.float64)) < level.share_at(progress)
            if writes:
                return place
        return None

    def _writer(self, level: Written) -> nn.Module:
        """Return the model that writes at a level."""
        if level.by == "student":
            return self.student
        assert self.teacher is not None
        return self.teacher

    def _generate(
        self, level: Written, batch: Mapping[str, Tensor], prompts: Sequence[Tensor], seeds: Sequence[int]
    ) -> list[Tensor]:
        """Return what the model of a level writes after prompts."""
        writer = self._writer(level)
        by_encoder = reads_by_encoder(writer)
        columns = to_device(prompts_for(batch, prompts, self.rows.pad_id, by_encoder=by_encoder), device_of(writer))
        with tried(f"the {level.by}, writing,", writer, columns):
            known = common_vocabulary(*(each for each in (self.student, self.teacher) if each is not None))
            return generate(writer, columns, level.settings, seeds, known)

    def _taught(
        self,
        place: int,
        batch: Mapping[str, Tensor],
        prompts: Sequence[Tensor],
        rows: Sequence[int],
        gathering: Gathering,
        *,
        keeps: bool,
    ) -> list[Tensor]:
        """Return what the teacher has written after the prompts of these rows, or writes now, in all processes."""
        fresh = [number for number, row in enumerate(rows) if (row, place) not in self.kept]
        if not any(gather_results(lambda: bool(fresh))):
            return [self.kept[row, place] for row in rows]
        level, found = self.levels[place], dict[tuple[int, int], Tensor]()
        with gathering(self._writer(level)):
            if fresh:
                own = {name: column[torch.tensor(fresh, device=column.device)] for name, column in batch.items()}
                seeds = [seed_from(self.seed, rows[number], place, BY_TEACHER) for number in fresh]
                texts = self._generate(level, own, [prompts[number] for number in fresh], seeds)
                found = {(rows[number], place): text for number, text in zip(fresh, texts, strict=True)}
        known = self.kept | found
        if processes() > 1:
            for each in gather_results(lambda: found if keeps else {}):
                self.kept |= each
        elif keeps:
            self.kept = known
        return [known[row, place] for row in rows]

    def _check(self, batch: Mapping[str, Tensor], numbers: Tensor, place: int | None, *, by_encoder: bool) -> None:
        """Raise DistillError for a row without a prompt, or where the data is used without a completion."""
        prompts, completions = lengths(batch, by_encoder=by_encoder)
        if place is None:
            first = self.levels[-1].prompt_tokens
            if first is not None:
                _refuse_row(
                    completions == 0,
                    numbers,
                    f"has no token after its first {first} (prompt_tokens={first}, --prompt-tokens {first}), and a "
                    "share below 1 uses what follows them; take fewer tokens for a prompt, or leave short texts out",
                )
            _refuse_row(
                completions == 0,
                numbers,
                "has no completion, which a share below 1 uses; give it labels, "
                "its tokens after the prompt, or let a model write all: Written(prompts, share=1.0)",
            )
            return
        _refuse_row(
            (prompts == 0) & (completions > 0),
            numbers,
            "has no prompt, as its labels count from its first token on; take its first tokens, "
            "Written(…, prompt_tokens=16) (--prompt-tokens 16), set them to -100 at the prompt, or leave labels out "
            "where the whole row is one",
        )
        _refuse_row(
            prompts == 0,
            numbers,
            "has an empty prompt, after which nothing can be written; begin each text "
            "with a token, as that of its beginning (bos_token_id), or leave the row out",
        )
        most = int(prompts.max()) if len(prompts) else 0
        for role, network in (("student", self.student), ("teacher", self.teacher)):
            limit = None if network is None else positions_of(network)
            new = self.levels[place].max_new_tokens
            needed = max(most, new) if by_encoder else most + new
            if limit is None or needed <= limit:
                continue
            row = int(numbers[int(prompts.argmax())])
            if most >= limit:
                raise DistillError(
                    f"the prompt of row {row} has {most} tokens and the {role} {limit} positions; cut the prompts, "
                    "e.g. tokenizer(texts, truncation=True, max_length=…), or leave the row out."
                )
            raise DistillError(
                f"the prompt of row {row} has {most} tokens, and with max_new_tokens={new} the text has more than the "
                f"{limit} positions of the {role}; use max_new_tokens={limit - most}, or cut the prompts."
            )

    def _check_prompts(self) -> None:
        """Check rows before the training, for what may happen to them in it."""
        by_encoder = reads_by_encoder(self.student)
        places: list[int | None] = [place for place, level in enumerate(self.levels) if level.share != 0]
        if all(callable(level.share) or level.share < 1 for level in self.levels):
            places.insert(0, None)
        for numbers in torch.arange(min(len(self.rows), CHECKED)).split(CHUNK):
            batch = self.rows.batch(numbers)
            for place in places:
                self._check(batch, numbers, place, by_encoder=by_encoder)


def positions_of(network: nn.Module) -> int | None:
    """Return the number of tokens for which a model has positions; None if it states none."""
    inner = innermost(network)
    table = longest_input(inner)
    config: Any = inner.config
    config = config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    stated = getattr(config, "max_position_embeddings", None) if rotary else None
    return table if table is not None else stated


def _refuse_row(wrong: Tensor, numbers: Tensor, why: str) -> None:
    """Raise DistillError for the first row that is wrong."""
    if bool(wrong.any()):
        raise DistillError(f"row {int(numbers[int(wrong.int().argmax())])} of the prompts of Written {why}.")
