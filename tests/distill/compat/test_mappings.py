"""What flags become: weights, objectives, schedules, mappings, in numbers; and what does not go together."""

import json
from dataclasses import replace

import pytest
import torch

from distill import DIITO, KD, PKD, Cosine, DistillError, Labels, Shuffle, Span
from distill.compat import diito, xxs
from distill.compat.flags import parse
from distill.compat.neurons import neuron_pairs, places, read_entries
from distill.compat.terms import CountedMaskedLM, MaskedKD, Patience, Spliced, SquaredLogits
from distill.interchange.mapping import Entry
from distill.interchange.sources import Crossway
from distill.objectives.language import CausalLM
from interventions import Location
from tests.distill.compat import test_flags
from tests.distill.tiny_models import bert, masked_lm

README, LM = test_flags.xxs(), test_flags.diito()


# --- DIITO-XXS --------------------------------------------------------------------------------------------------------


def test_the_readme_of_xxs_in_numbers():
    assert xxs.weights_of(README) == pytest.approx({"kd": 0.7, "labels": 0.3, "kd_cf": 1.0})
    factual, labels, causal = xxs.objectives_of(README, 6, 12)
    assert isinstance(factual, KD)
    assert (factual.temperature, factual.reduction, factual.scale_t2) == (20.0, "mean", True)
    assert isinstance(labels, Labels)
    assert isinstance(causal, DIITO)
    assert causal.positions == Span(0.3, consecutive=False)
    assert [(each.temperature, each.reduction) for each in causal.match] == [(20.0, "mean")]
    schedule = xxs.schedule_of(replace(README, seed=3))
    assert (schedule.epochs, schedule.batch_size, schedule.accumulate, schedule.lr) == (5.0, 32, 1, 2e-5)
    assert (schedule.warmup, schedule.weight_decay, schedule.clip, schedule.seed) == (0.1, 0.01, 1.0, 3)


def test_a_step_sees_train_batch_size_rows_whatever_the_accumulation():
    schedule = xxs.schedule_of(replace(README, train_batch_size=32, gradient_accumulation_steps=4))
    assert (schedule.batch_size, schedule.accumulate) == (32, 4)


def test_patience():
    asked = replace(README, kd_model="kd.cls", beta=100.0, normalize_patience=True)
    assert xxs.weights_of(asked) == pytest.approx({"kd": 0.7, "labels": 0.3, "pkd": 100, "kd_cf": 1, "pkd_cf": 100})
    *_, patient, causal = xxs.objectives_of(asked, 6, 12)
    layers = {Location(1): Location(0), Location(3): Location(1), Location(5): Location(2),
              Location(7): Location(3), Location(9): Location(4)}  # fmt: skip
    assert isinstance(patient, PKD)
    assert patient.layers == layers
    assert [type(each) for each in causal.match] == [KD, PKD]
    *_, plain, _ = xxs.objectives_of(replace(asked, normalize_patience=False), 6, 12)
    assert isinstance(plain, Patience)
    assert plain.layers == layers


@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        ({"alpha": 0.0, "is_diito": False}, {"labels": 1.0}),
        ({"alpha": 1.0, "is_diito": False}, {"kd": 1.0}),
        ({"alpha": 0.0}, {"labels": 1.0, "kd_cf": 1.0}),
        ({"kd_model": "kd.cls", "beta": 0.0}, {"kd": 0.7, "labels": 0.3, "kd_cf": 1.0}),
    ],
)
def test_terms_without_a_weight_are_left_out(changes, weights):
    asked = replace(README, **changes)
    assert xxs.weights_of(asked) == pytest.approx(weights)
    made = {type(each) for each in xxs.objectives_of(asked, 6, 12)}
    assert made == {{"kd": KD, "labels": Labels, "kd_cf": DIITO}[name] for name in weights}


def test_data_augment_interchanges_tokens():
    causal = xxs.objectives_of(replace(README, data_augment=True, interchange_consecutive_only=True), 6, 12)[-1]
    assert isinstance(causal, DIITO)
    assert (causal.sources, causal.positions) == (Spliced(Span(0.3, consecutive=True)), None)


def test_the_name_of_a_run_is_that_of_the_original():
    assert xxs.run_name(README, 6) == (
        "kd_SST-2_nlayer.6_lr.2e-05_T.20.0_alpha.0.7_beta.0.0_bs.32_diito.True_nm.full_intprop.0.3_intmax.-1"
        "_intconsec.False_dtaug.False_dtpair.False_maxex.None"
    )


@pytest.mark.parametrize(
    ("metadata", "run", "expected"),
    [
        ("wuzhengx:DIITO-XXS", None, ("DIITO-XXS", "wuzhengx", "name")),
        ("films", "mine", ("films", None, "mine")),
        ("", None, ("DIITO-XXS", None, "name")),
    ],
)
def test_wandb_metadata(metadata, run, expected):
    tracking = xxs.tracking_of(replace(README, wandb_metadata=metadata, run_name=run), "name")
    assert tracking is not None
    assert (tracking.project, tracking.entity, tracking.run) == expected
    assert tracking.every == 10
    assert xxs.tracking_of(replace(README, is_wandb=False), "name") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_name": "SST2"}, r"--task_name SST2 is no classification task of GLUE; did you mean SST-2\? choose"),
        ({"task_name": "STS-B"}, "--task_name STS-B is no classification task of GLUE"),
        ({"task_name": None}, "--task_name None is no classification task"),
        ({"do_train": False}, "--do_train is missing"),
        ({"bert_model": None}, "--bert_model is missing"),
        ({"kd_model": "kd.full"}, "--kd_model kd.full does not exist; choose kd, or kd.cls"),
        ({"alpha": 1.5}, "--alpha 1.5 is the share of kd, .* use 0 to 1"),
        ({"beta": 10.0}, "--beta 10.0 weighs the patient terms, and --kd_model kd has none; use kd.cls"),
        ({"beta": 10.0, "kd_model": "kd.cls", "fc_layer_idx": None}, "name them: --fc_layer_idx 1,3,5,7,9"),
        ({"interchange_max_token": 0}, "--interchange_max_token 0 interchanges nothing; use 1 or more"),
    ],
)
def test_flags_of_xxs_that_do_not_go_together(changes, message):
    xxs.check(README)
    with pytest.raises(DistillError, match=message):
        xxs.check(replace(README, **changes))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("1,3,5", "names 3 teacher layers, and the student has 5 below its last; name one for each"),
        ("1,3,5,7,12", "--fc_layer_idx 1,3,5,7,12 does not name layers of this teacher, 0 to 11"),
        ("1,x", "does not name layers"),
    ],
)
def test_layers_of_patience_that_do_not_fit(layers, message):
    asked = replace(README, kd_model="kd.cls", beta=1.0, fc_layer_idx=layers)
    with pytest.raises(DistillError, match=message):
        xxs.objectives_of(asked, 6, 12)


# --- the language model trainer ---------------------------------------------------------------------------------------


def test_the_readme_of_causal_distill_in_numbers():
    assert diito.weights_of(LM) == {"kd": 0.25, "mlm": 0.25, "cosine": 0.25, "kd_cf": 0.25}
    factual, masked, cosine, causal = diito.objectives_of(LM, torch.ones(40), mask_id=3)
    assert isinstance(factual, KD)
    assert (factual.temperature, factual.reduction) == (2.0, "batchmean")
    assert isinstance(masked, CountedMaskedLM)
    assert (masked.share, masked.words, masked.mask_id, masked.every_row) == (0.15, (0.8, 0.1, 0.1), 3, False)
    assert isinstance(cosine, Cosine)
    assert isinstance(causal, DIITO)
    assert causal.positions == Span(0.3, consecutive=True)
    assert [type(each) for each in causal.match] == [KD]
    schedule = diito.schedule_of(LM)
    assert (schedule.batch_size, schedule.accumulate, schedule.epochs, schedule.lr) == (240, 6, 3, 5e-4)
    assert (schedule.warmup, schedule.weight_decay, schedule.clip, schedule.seed) == (0.05, 0.0, 5.0, 42)


def test_all_seven_weights():
    asked = replace(LM, alpha_mse=0.5, alpha_causal_ce=0.1, alpha_causal_cos=0.2, restrict_ce_to_mask=True)
    assert diito.weights_of(asked) == {
        "kd": 0.25, "mlm": 0.25, "mse": 0.5, "cosine": 0.25, "kd_cf": 0.1, "cosine_cf": 0.2,
    }  # fmt: skip
    made = diito.objectives_of(asked, torch.ones(40))
    assert [type(each) for each in made] == [MaskedKD, CountedMaskedLM, SquaredLogits, Cosine, DIITO]
    assert [type(each) for each in made[-1].match] == [MaskedKD, Cosine]
    causal = parse(diito.Trainer, ["--student_type", "gpt2", "--alpha_clm", "0.5", "--alpha_ce", "0"], "diito")
    assert [type(each) for each in diito.objectives_of(causal)] == [CausalLM]


def test_the_older_name_of_the_causal_weight():
    assert diito.weights_of(replace(LM, alpha_causal_ce=0.0, alpha_causal=0.4))["kd_cf"] == 0.4


def test_masked_tokens_only_are_all_masked_tokens():
    asked = replace(LM, interchange_masked_token_only=True, interchange_consecutive_only=False)
    _, masked, _, causal = diito.objectives_of(asked, torch.ones(40))
    assert causal.positions == Span(1.0, consecutive=False, among="labelled")
    assert masked.every_row
    consecutive = replace(asked, interchange_consecutive_only=True)  # wins in the original too
    assert diito.objectives_of(consecutive, torch.ones(40))[-1].positions == Span(0.3)


def test_crossway():
    causal = diito.objectives_of(replace(LM, include_crossway=True), torch.ones(40))[-1]
    assert (causal.sources, causal.positions) == (Crossway(), Span(0.3))
    assert diito.objectives_of(LM, torch.ones(40))[-1].sources == Shuffle()


def test_the_name_of_a_run_of_the_trainer_is_that_of_the_original():
    assert diito.run_name(LM) == (
        "s_distilbert_t_bert_data_wikitext-dataset_seed_42_mlm_True_ce_0.25_mlm_0.25_cos_0.25_causal-ce_0.25"
        "_causal-cos_0.0_nm_single_middle_layer_6_crossway_False_int-prop_0.3_consec-token_True_masked-token_False"
        "_max-int-token_-1_eff-bs_240"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_file": None}, "--data_file is missing; a pickled list"),
        ({"student_type": "bert"}, "--student_type bert does not exist; choose one of distilbert, roberta, gpt2"),
        ({"teacher_type": "gpt2"}, "--teacher_type gpt2 and --student_type distilbert do not go together"),
        ({"mlm": False}, "--student_type distilbert with --mlm False cannot be; add --mlm"),
        ({"alpha_mlm": 0.0}, "--alpha_mlm 0.0 and --alpha_clm 0.0: with --mlm the first must be above 0"),
        ({"alpha_clm": 0.5}, "--alpha_mlm 0.25 and --alpha_clm 0.5: with --mlm the first"),
        ({"alpha_cos": -1.0}, "--alpha_cos -1.0 is below 0"),
        ({"alpha_causal": 0.1}, "--alpha_causal is the older name of --alpha_causal_ce; give one"),
        ({"parallel_crossway": True}, "--parallel_crossway says how --include_crossway is computed; add that"),
        ({"include_crossway": True, "data_augment": True}, "has no activations to interchange both ways"),
        ({"interchange_max_token": 0}, "--interchange_max_token 0 interchanges nothing; use 1 or more"),
        ({"freeze_token_type_embds": True}, "--freeze_token_type_embds is for roberta"),
        (
            {"student_type": "gpt2", "teacher_type": "gpt2", "mlm": True},
            "--student_type gpt2 with --mlm True cannot be; leave --mlm out",
        ),
    ],
)
def test_flags_of_the_trainer_that_do_not_go_together(changes, message):
    diito.check(LM)
    with pytest.raises(DistillError, match=message):
        diito.check(replace(LM, **changes))


# --- neuron mappings --------------------------------------------------------------------------------------------------


def entries(*pairs):
    return {
        "interchange_variable_mappings": [
            {"teacher_variable_names": list(above), "student_variable_names": list(below)} for above, below in pairs
        ]
    }


def write(path, told):
    path.write_text(json.dumps(told))
    return str(path)


WHOLE = "$H:[0:2]$[0:8]"  # of models with two heads of 8 dims


def test_a_file_with_one_entry_is_one_pair(tmp_path):
    mapping = write(tmp_path / "single.nm", entries((["$L:2" + WHOLE], ["$L:1" + WHOLE])))
    assert neuron_pairs(mapping, bert(4), bert(2)) == (Entry((Location(2),), (Location(1),)),)


def test_layer_ranges_are_interchanged_together(tmp_path):
    told = entries((["$L:[0:2]" + WHOLE], ["$L:0" + WHOLE]), (["$L:[2:4]" + WHOLE], ["$L:1" + WHOLE]))
    pairs = neuron_pairs(write(tmp_path / "multi.nm", told), bert(4), bert(2))
    assert pairs == (
        Entry((Location(0), Location(1)), (Location(0),)),
        Entry((Location(2), Location(3)), (Location(1),)),
    )


def test_names_of_one_entry_are_drawn_and_entries_weigh_alike(tmp_path):
    told = entries((["$L:1" + WHOLE, "$L:2" + WHOLE], ["$L:0" + WHOLE]), (["$L:3" + WHOLE], ["$L:1" + WHOLE]))
    pairs = neuron_pairs(write(tmp_path / "uneven.nm", told), bert(4), bert(2))
    assert len(pairs) == 4
    assert pairs.count(Entry((Location(3),), (Location(1),))) == 2
    assert pairs.count(Entry((Location(1),), (Location(0),))) == 1


def test_the_oldest_form_of_the_file(tmp_path):
    told = {"teacher_variable_names": ["$L:1" + WHOLE], "student_variable_names": ["$L:0" + WHOLE]}
    old = write(tmp_path / "old.json", told)
    assert neuron_pairs(old, bert(4), bert(2)) == (Entry((Location(1),), (Location(0),)),)


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("$L:1$H:[0:2]$[0:8]", None),
        ("$L:1$H:[0:12]$[0:64]", None),  # as written for larger models
        ("$L:1$H:0$[0:8]", range(8)),
        ("$L:1$H:1$[2:4]", range(10, 12)),
        ("$L:1$H:[0:2]$[0:2]", (0, 1, 8, 9)),
    ],
)
def test_heads_and_dims(name, dims):
    (place,) = places(name, bert(4))
    assert place == Location(1, dims=dims)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("L1H2", "'L1H2' is not a variable name of a neuron mapping; write"),
        ("$L:1$H:[5:6]$[0:8]", "names nothing of this model of 4 layers with 2 heads of 8 dims"),
        ("$L:[2:2]$H:[0:2]$[0:8]", "names nothing of this model"),
    ],
)
def test_names_that_mean_nothing(name, message):
    with pytest.raises(DistillError, match=message):
        places(name, bert(4))


@pytest.mark.parametrize("kind", ["full", "mid", "middle", "late", "single"])
def test_kinds_of_mappings(kind):
    pairs = neuron_pairs(kind, bert(4), bert(2))
    expected = {"full": 2, "late": 1, "single": 1}.get(kind, 1)
    assert len(pairs) == expected
    assert kind != "mid" or pairs == (Entry((Location(2),), (Location(1),)),)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (None, "is no file, and no mapping: give one of full, middle"),
        ("{", "cannot be read: .* it must be JSON"),
        ("[]", "has no 'interchange_variable_mappings'"),
        ('{"interchange_variable_mappings": [{"teacher_variable_names": []}]}', "has no 'interchange_variable_map"),
    ],
)
def test_files_that_are_none(tmp_path, told, message):
    path = tmp_path / "x.nm"
    if told is not None:
        path.write_text(told)
    with pytest.raises(DistillError, match=message):
        read_entries(path)


def test_a_layer_that_does_not_exist(tmp_path):
    mapping = write(tmp_path / "x.nm", entries((["$L:9" + WHOLE], ["$L:1" + WHOLE])))
    with pytest.raises(Exception, match=r"Location\(layer=9\) is out of range: this 'bert' model has 4 layers"):
        neuron_pairs(mapping, masked_lm(4), masked_lm(2))
