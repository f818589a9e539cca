from contextlib import contextmanager

import pytest
import torch

import distill.writing.writing as room
from distill import DistillError, Ramp, Served, Written
from distill.writing.prompts import split
from distill.writing.writing import Writing, positions_of
from tests.distill.tiny_models import bert, gpt2_lm, llama, spread, t5
from tests.distill.writing.words import COMPLETIONS, WRITERS, pairs, prompts, taught

EVERY = torch.arange(4)


def writing(data, seed=0, make=lambda: gpt2_lm(2)):
    teacher, student = taught(make)
    return Writing.of(data, data.rows, teacher, student, seed)


def texts(made, step, numbers=EVERY, by_encoder=False, **settings):
    batch = made.write(made.rows.batch(numbers), numbers, step, 0.0, **settings)
    return [each.tolist() for each in split(batch, by_encoder=by_encoder)[1]]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_one_draw_a_step_decides_for_all_rows(share):
    made = writing(Written(pairs(), share=share, max_new_tokens=2))
    turns = [made._turn(step, 0.0, is_trial=False) == 0 for step in range(2000)]
    assert abs(sum(turns) / 2000 - share) <= 5 * (share * (1 - share) / 2000) ** 0.5
    for step in range(6):
        found = texts(made, step)
        assert (found == COMPLETIONS) == (not turns[step])
        assert turns[step] == all(one != other for one, other in zip(found, COMPLETIONS, strict=True))


def test_share_that_changes():
    made = writing(Written(pairs(), share=Ramp(0.0, 1.0), max_new_tokens=2))
    counts = [sum(made._turn(step, done, is_trial=False) == 0 for step in range(400)) for done in (0.0, 0.5, 1.0)]
    assert counts[0] == 0
    assert 150 < counts[1] < 250
    assert counts[2] == 400


@pytest.mark.parametrize("kind", WRITERS)
def test_draws_are_decided_by_seed_step_and_row(kind):
    """So two processes, each with some of the rows, write what one process does."""
    by_encoder = kind == "t5"
    data = Written(prompts(), max_new_tokens=6)
    teacher, student = WRITERS[kind](), spread(WRITERS[kind](), 1)
    made = Writing.of(data, data.rows, teacher, student, 0)
    whole = texts(made, 3, by_encoder=by_encoder)
    halves = [texts(made, 3, EVERY[part::2], by_encoder=by_encoder) for part in range(2)]
    assert [halves[row % 2][row // 2] for row in range(4)] == whole
    assert texts(made, 4, by_encoder=by_encoder) != whole
    assert texts(Writing.of(data, data.rows, teacher, student, 1), 3, by_encoder=by_encoder) != whole


def test_the_teacher_writes_once(monkeypatch, tmp_path):
    made, calls = writing(Written(prompts(), by="teacher", max_new_tokens=4)), []
    generate = room.generate
    monkeypatch.setattr(room, "generate", lambda network, columns, *rest: (
        calls.append((network, len(columns["input_ids"]))), generate(network, columns, *rest))[1])  # fmt: skip
    first = texts(made, 0, EVERY[:3])
    assert calls == [(made.teacher, 3)]
    second = texts(made, 1, EVERY[1:])
    assert calls[1:] == [(made.teacher, 1)]
    assert second[:2] == first[1:]
    assert texts(made, 2) == [*first, second[2]]
    assert len(calls) == 2
    made.save(tmp_path)
    again = writing(Written(prompts(), by="teacher", max_new_tokens=4))
    again.load(tmp_path)
    assert texts(again, 7) == [*first, second[2]]
    assert len(calls) == 2
    again.load(tmp_path / "none")
    assert texts(again, 7) == [*first, second[2]]
    assert len(calls) == 3


def test_trial_and_rows_that_stand_for_none_are_not_kept():
    made = writing(Written(pairs(), by="teacher", share=0.5, max_new_tokens=4))
    assert texts(made, -1, is_trial=True) != COMPLETIONS
    texts(made, next(step for step in range(9) if made._turn(step, 0.0, is_trial=False) == 0), counts=False)
    assert made.kept == {}


def test_student_teacher_and_data_are_mixed():
    made = writing(Written(Written(pairs(), by="teacher", share=0.5, max_new_tokens=3), share=0.5, max_new_tokens=2))
    turns = [made._turn(step, 0.0, is_trial=False) for step in range(1200)]
    shares = [turns.count(place) / 1200 for place in (0, 1, None)]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.06)
    sizes = {turn: {len(each) for each in texts(made, turns.index(turn))} for turn in (0, 1)}
    assert sizes == {0: {2}, 1: {3}}
    assert texts(made, turns.index(None)) == COMPLETIONS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Written(prompts(), share=0.5), "row 0 of the prompts of Written has no completion, which a share below 1"),
        (
            Written(prompts([[5, 6, 7], [5, 6]]), prompt_tokens=2, share=0.5),
            r"row 1 of the prompts of Written has no token after its first 2 \(prompt_tokens=2, --prompt-tokens 2\)",
        ),
        (Written(prompts([[5], []]), max_new_tokens=2), "row 1 of the prompts of Written has an empty prompt"),
        (
            Written({"input_ids": [[5, 6]], "labels": [[5, 6]], "attention_mask": [[1, 1]]}, max_new_tokens=2),
            "row 0 of the prompts of Written has no prompt, as its labels count from its first token",
        ),
        (
            Written(prompts([[5], [6] * 30]), max_new_tokens=5),
            "prompt of row 1 has 30 tokens and the student 24 positions; cut",
        ),
        (Written(prompts([[5], [6] * 20]), max_new_tokens=5), "20 tokens, and with max_new_tokens=5 the text has more"),
        (Written({**pairs().table, "teacher_input_ids": pairs().table["input_ids"]}), "tokens of its own for the teac"),
    ],
)
def test_prompts_that_cannot_be(data, message):
    with pytest.raises(DistillError, match=message) as error:
        writing(data)
    assert "\n" not in str(error.value)


def test_teachers_that_cannot_write():
    student, data = spread(gpt2_lm(2)), Written(prompts(), by="teacher")
    for teacher in (None, bert(2), object()):
        message = "there is no teacher to write, as teacher=None" if teacher is None else "the teacher cannot write"
        with pytest.raises(DistillError, match=message):
            Writing.of(data, data.rows, teacher, student, 0)
    with pytest.raises(DistillError, match="the student cannot write"):
        Writing.of(Written(prompts()), data.rows, student, bert(2), 0)


def test_a_teacher_whose_answers_are_kept_writes():
    teacher, student = taught()
    data = Written(prompts(), by="teacher", max_new_tokens=4)
    kept = Writing.of(data, data.rows, Served(teacher), student, 0)
    assert kept.teacher is teacher
    assert texts(kept, 0) == texts(Writing.of(data, data.rows, teacher, student, 0), 0)


@pytest.mark.parametrize("by", ["student", "teacher"])
def test_the_model_that_writes_is_gathered_while_it_writes(by):
    made, gathered = writing(Written(prompts(), by, max_new_tokens=2)), []

    @contextmanager
    def gathering(model):
        gathered.append(model)
        yield

    for step in range(3):
        made.write(made.rows.batch(EVERY), EVERY, step, 0.0, gathering=gathering)
    assert gathered == ([made.student] * 3 if by == "student" else [made.teacher])  # which writes once
    assert [made.is_fresh(step, 0.0) for step in range(3)] == [by == "student"] * 3


def test_positions_of_models():
    assert (positions_of(gpt2_lm(1)), positions_of(llama(1)), positions_of(t5(1))) == (24, 2048, None)
