"""The causal model of quantified sentences against the files of Geiger et al. and against sentences judged by hand."""

import gzip
import json
from itertools import product

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from distill.errors import DistillError
from distill.tasks.causal.mqnli import NODES, multiply_quantified, rows, vocabulary
from distill.tasks.causal.mqnli_files import DETERMINERS, INPUTS, SLOTS
from distill.tasks.causal.natural_logic import LABELS, RELATIONS

ROWS = [  # premise, hypothesis, label, and the relations of NODES in order, all by hand
    (
        "every small dog - loudly chases some - cat",
        "some small dog - - chases some - cat",
        "entailment",
        "entails, equivalence, equivalence, entails, entails, entails, entails, entails",
    ),
    (
        "every - dog - - chases no red cat",
        "some - dog - - chases some red cat",
        "contradiction",
        "equivalence, equivalence, equivalence, equivalence, contradiction, contradiction, contradiction, "
        "contradiction",
    ),
    (
        "notevery big wolf doesnot - sees every - mouse",
        "no big dog - slowly sees every - mouse",
        "neutral",
        "reverse entails, equivalence, independence, reverse entails, reverse entails, alternation, independence, "
        "independence",
    ),
]
JUDGED = [
    ("every - dog - - sees some - cat", "every - dog - - sees some - cat", "entailment"),
    ("every - dog doesnot - sees some - cat", "no - dog - - sees some - cat", "entailment"),
    ("every - dog - - sees every - cat", "some small dog - - sees some red cat", "entailment"),
    ("every - dog - - sees every - cat", "every small dog - - sees some red cat", "entailment"),
    ("no - dog - - sees some - cat", "every small dog doesnot loudly sees some red cat", "entailment"),
    ("every small dog - - sees some - cat", "every - dog - - sees some - cat", "neutral"),
    ("some - dog - - sees no - cat", "some - dog - - sees every - cat", "neutral"),
    ("every - dog - - sees no - cat", "some - dog - - sees every - cat", "contradiction"),
    ("some - dog - - sees every - cat", "every - dog - - sees no - cat", "contradiction"),
    ("notevery - dog doesnot - sees no - cat", "some - dog doesnot - sees some - cat", "entailment"),
    ("no - dog - - sees notevery - cat", "every - dog - - sees every - cat", "entailment"),
    ("some - dog - - sees some - cat", "some - wolf - - sees some - cat", "neutral"),
    ("some small dog - - sees some - cat", "some big dog - - sees some - cat", "neutral"),
    ("some small dog - - sees some - cat", "no - dog - - sees some - cat", "contradiction"),
    ("notevery - dog - - sees some - cat", "every - dog - loudly sees some - cat", "contradiction"),
]


def row(premise, hypothesis, answer, nodes):
    sentences = [sentence.replace("-", "emptystring") for sentence in (premise, hypothesis)]
    named = dict(zip(NODES.values(), nodes.split(", "), strict=True))
    return {"sentence1": sentences[0], "sentence2": sentences[1], "gold_label": answer, "nodes": named}


def write(path, table):
    path.write_text("\n".join(map(json.dumps, table)) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    table = [row(*each) for each in ROWS]
    write(tmp_path / "mqnli_train.jsonl", table)
    (tmp_path / "mqnli_test.jsonl.gz").write_bytes(gzip.compress(json.dumps(table[1]).encode()))
    return tmp_path


@pytest.fixture
def model(folder):
    return multiply_quantified(folder)


@pytest.fixture
def real(shared_data):
    if not (shared_data / "mqnli").is_dir():
        pytest.skip(f"no mqnli in {shared_data}")
    return shared_data / "mqnli"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def values_of(folder, pairs):
    numbers = {word: number for number, word in enumerate(vocabulary(folder))}
    words = [" ".join(pair).replace("-", "emptystring").split() for pair in pairs]
    return dict(zip(INPUTS, torch.tensor([[numbers[word] for word in each] for each in words]).T, strict=True))


def shares(run, node, answer):
    chosen = run[node][run["answer"] == answer]
    return torch.bincount(chosen, minlength=len(RELATIONS)) / len(chosen)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("vp", ("adverb", "verb", "- loudly slowly", "chases sees")),
        ("subject_np", ("subject_adjective", "subject_noun", "- small big", "dog wolf")),
    ],
)
def test_a_phrase_is_true_of_what_both_its_words_are_true_of(model, folder, node, words):
    modifier, head, modifiers, heads = words
    cases = list(product(modifiers.split(), heads.split(), modifiers.split(), heads.split()))
    values = values_of(folder, [ROWS[0][:2]] * len(cases))
    numbers = {word: number for number, word in enumerate(vocabulary(folder))} | {"-": 3}
    for i, name in enumerate([f"{side}_{slot}" for side in ("premise", "hypothesis") for slot in (modifier, head)]):
        values[name] = torch.tensor([numbers[case[i]] for case in cases])
    atoms = [word for word in (*modifiers.split(), *heads.split()) if word != "-"]
    for case, relation in zip(cases, model.run(values)[node].tolist(), strict=True):
        found = set()
        for truths in product((False, True), repeat=len(atoms)):
            holds = {"-": True, **dict(zip(atoms, truths, strict=True))}
            found.add((holds[case[0]] and holds[case[1]], holds[case[2]] and holds[case[3]]))
        assert list(RELATIONS.values())[relation] == found


# Sentences


def test_sentences_judged_by_hand(model, folder):
    answers = model.answers(values_of(folder, [pair[:2] for pair in JUDGED]))
    assert [LABELS[answer] for answer in answers] == [judged for *_, judged in JUDGED]


def test_rows_written_by_hand_are_computed(model, folder):
    table = rows(folder, "train")
    assert list(table) == [*INPUTS, *NODES, "answer"]
    assert table["answer"].tolist() == [0, 1, 2]
    assert table["negated_vp"].tolist() == [1, 3, 5]
    run = model.run({name: table[name] for name in INPUTS})
    assert all(torch.equal(run[name], table[name]) for name in table)


def test_every_row_of_the_files_agrees_on_every_node_and_label(real):
    model = multiply_quantified(real)
    for split, count in (("train", 20_000), ("dev", 2_000), ("test", 2_000)):
        table = rows(real, split)
        run = model.run({name: table[name] for name in INPUTS})
        assert len(table["answer"]) == count
        assert {name: int((run[name] != table[name]).sum()) for name in table} == dict.fromkeys(table, 0)


def test_draws_are_distributed_as_the_rows_of_the_files(real):
    model, table = multiply_quantified(real), rows(real, "train")
    drawn = model.run(model.sample(20_000, generator()))
    for node, answer in product(NODES, range(3)):
        assert (shares(drawn, node, answer) - shares(table, node, answer)).abs().sum() / 2 < 0.03
    for slot in SLOTS:
        same = [(each[f"premise_{slot}"] == each[f"hypothesis_{slot}"]).float().mean() for each in (drawn, table)]
        assert abs(same[0] - same[1]) < 0.02
        absent = [(each[f"premise_{slot}"] == 3).float().mean() for each in (drawn, table)]
        assert abs(absent[0] - absent[1]) < 0.02


def test_the_graph_of_nodes(model):
    assert model.parents["vp"] == ("premise_adverb", "hypothesis_adverb", "premise_verb", "hypothesis_verb")
    determiners = {
        name: (f"premise_{name}_determiner", f"hypothesis_{name}_determiner") for name in ("subject", "object")
    }
    assert model.parents["object_dp"] == (*determiners["object"], "object_np", "vp")
    assert model.parents["negated_object_dp"] == (*determiners["object"], "object_dp")
    assert model.parents["negated_vp"] == ("premise_negation", "hypothesis_negation", "negated_object_dp")
    assert model.parents["subject_dp"] == (*determiners["subject"], "subject_np", "negated_vp")
    assert model.parents["negated_subject_dp"] == (*determiners["subject"], "subject_dp")
    assert model.parents["answer"] == ("negated_subject_dp",)


def test_an_interchange_by_hand(model, folder):
    base = values_of(folder, [("every small dog - - sees some - cat", "every - dog - - sees some - cat")])
    source = values_of(folder, [("no big wolf - - chases no red mouse", "some big wolf - - chases no red mouse")])
    after = model.interchange(base, {"subject_np": source})
    assert [LABELS[model.answers(each)] for each in (base, source, after)] == ["neutral", "contradiction", "entailment"]


# What is drawn and fed


def test_a_third_of_the_draws_have_each_label(model):
    answers = model.answers(model.sample(3_000, generator()))
    assert torch.bincount(answers, minlength=3).div(3_000).sub(1 / 3).abs().max() < 0.03


def test_the_same_seed_draws_the_same_and_torch_s_own_generator_is_left_alone(model):
    before = torch.get_rng_state()
    once, again, other = (model.sample(50, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(once[name], again[name]) for name in INPUTS)
    assert not all(torch.equal(once[name], other[name]) for name in INPUTS)


@pytest.mark.parametrize("node", NODES)
def test_interchanges_of_each_node_change_answers_of_some_pairs(model, node):
    pairs = model.pairs(20, node, generator())
    assert int(pairs.effective.sum()) == 10


def test_the_vocabulary_begins_with_what_every_sentence_is_built_with(folder):
    words = vocabulary(folder)
    assert words[:9] == ("[PAD]", "[CLS]", "[SEP]", "emptystring", "doesnot", *DETERMINERS)
    assert words[9:] == tuple("big cat chases dog loudly mouse red sees slowly small wolf".split())


def test_both_sentences_are_fed_a_token_a_word_and_positions_find_them(model, folder):
    values = values_of(folder, [ROWS[0][:2], ROWS[2][:2]])
    encoded = model.encode(values)
    ids, words = encoded["input_ids"], vocabulary(folder)
    assert [words[i] for i in ids[0]] == (
        "[CLS] every small dog emptystring loudly chases some emptystring cat [SEP] "
        "some small dog emptystring emptystring chases some emptystring cat [SEP]"
    ).split()
    assert encoded["attention_mask"].tolist() == [[1] * 21] * 2
    for name in INPUTS:
        assert torch.equal(ids.gather(1, model.select(name, values))[:, 0], values[name])
    assert model.select("[CLS]", values).tolist() == [[0], [0]]


def test_a_small_bert_reads_it(model, folder):
    config = BertConfig(
        vocab_size=len(vocabulary(folder)), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=21, num_labels=len(LABELS),
    )  # fmt: skip
    values = model.sample(5, generator())
    logits = BertForSequenceClassification(config)(**model.encode(values)).logits
    assert model.decode(logits, values).shape == (5, 3)


# What is refused


def refused(call, match):
    with pytest.raises(DistillError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_folders_and_files_that_are_missing(tmp_path, folder):
    refused(
        lambda: multiply_quantified(tmp_path / "none"), r"none is not a folder; give that of mqnli_train.jsonl.gz, "
    )
    refused(lambda: rows(folder, "dev"), r"has no mqnli_dev.jsonl or mqnli_dev.jsonl.gz; put it there, or name another")
    refused(lambda: rows(folder, "valid"), r"there is no split 'valid'; give one of 'train', 'dev', 'test'\.")
    (folder / "mqnli_train.jsonl").unlink()
    for call in (multiply_quantified, vocabulary):
        refused(lambda call=call: call(folder), r"has no mqnli_train.jsonl or mqnli_train.jsonl.gz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sentence2": "every dog sees some cat"},
            r"row 2 of .*mqnli_train.jsonl has 5 words as sentence2, not 9: 'every dog sees some cat'; write "
            r"'every sad actor .*', with 'emptystring' for what is absent",
        ),
        ({"sentence1": None}, r"row 2 of .* has 0 words as sentence1, not 9: None; write "),
        (
            {"sentence1": ROWS[1][0].replace("every", "most").replace("-", "emptystring")},
            r"row 2 of .* has an unknown premise_subject_determiner: 'most'; correct it, to one of 'some', 'every', ",
        ),
        (
            {"sentence2": ROWS[1][1].replace("- - chases", "not - chases").replace("-", "emptystring")},
            r"unknown hypothesis_negation: 'not'; correct it, to one of 'emptystring', 'doesnot'\.",
        ),
        (
            {"sentence2": ROWS[1][1].replace("chases", "-").replace("-", "emptystring")},
            r"row 2 of .* has an unknown hypothesis_verb: 'emptystring'; correct it, to one of 'chases', 'sees'\.",
        ),
    ],
)
def test_rows_that_are_no_sentences(folder, change, message):
    table = [row(*each) for each in ROWS]
    write(folder / "mqnli_train.jsonl", [table[0], table[1] | change, table[2]])
    for call in (multiply_quantified, vocabulary, lambda folder: rows(folder, "train")):
        refused(lambda call=call: call(folder), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"gold_label": "entails"},
            r"row 1 of .*mqnli_dev.jsonl has an unknown gold_label: 'entails'; correct it, to one of 'entailment', ",
        ),
        ({"gold_label": ["neutral"]}, r"has an unknown gold_label: \['neutral'\]; "),
        ({"nodes": None}, r"row 1 of .* has an unknown VP: None; correct it, to one of 'equivalence', 'entails', "),
        ({"nodes": {"VP": "cover", "ObjNP": "same"}}, r"has an unknown ObjNP: 'same'; "),
        (
            {"sentence1": "every - lion - - sees some - cat".replace("-", "emptystring")},
            "unknown premise_subject_noun: 'l",
        ),
    ],
)
def test_rows_that_the_causal_model_does_not_know(folder, change, message):
    write(folder / "mqnli_dev.jsonl", [row(*ROWS[0]) | change])
    refused(lambda: rows(folder, "dev"), message)


def test_files_that_are_not_json_or_lack_modifiers(folder):
    (folder / "mqnli_dev.jsonl").write_text("{")
    refused(lambda: rows(folder, "dev"), "mqnli_dev.jsonl is not well-formed jsonl: .*; correct that row")
    write(folder / "mqnli_train.jsonl", [row(*each) | {"sentence1": row(*each)["sentence2"]} for each in ROWS[:2]])
    refused(lambda: multiply_quantified(folder), r"mqnli_train.jsonl has no adverb but 'emptystring'; add a row with")
