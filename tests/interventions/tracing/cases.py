"""Which programs are asked of which models: the matrix."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from interventions import Add, Interpolate, Location, Mean, Mixup, Swap, Zero
from interventions.locations import HEAD_SITES, SITES
from tests.interventions.tiny_models import INNER, MODULES, WIDTH
from tests.interventions.tracing.programs import (
    OPERATORS,
    SUBSPACES,
    Between,
    Case,
    after_weights_changed,
    at_an_operation,
    averaged,
    by_a_block,
    by_default_generator,
    by_interchange,
    by_operator,
    called_nothing,
    doubled,
    drawn,
    encoded_before,
    every_site,
    fetched,
    generated,
    generated_at,
    generated_nested,
    generated_padded,
    generated_too_little,
    generated_twice,
    generated_with_source,
    graded_block,
    graded_interchange,
    graded_runs,
    graded_subspace,
    gradients,
    in_a_subspace,
    in_half_precision,
    in_place,
    in_train_mode,
    kept_of_it,
    narrower,
    nested,
    nested_away,
    noised,
    of_a_counterfactual,
    of_another_model,
    of_another_shape,
    of_runs,
    padding_named,
    patched,
    pooled_mean,
    read_at,
    recorded,
    recorded_nothing,
    run_there,
    several_sources,
    site,
    swept,
    swept_at_operations,
    twice,
    vector,
    verbs_inside,
    with_labels,
    with_nan,
    with_padding,
    without_gradients,
)
from tests.interventions.tracing.subjects import NAMES

TEXT = ("bert", "gpt2", "llama", "mixtral", "t5")  # those of issue 6, but for the plain module
HEADS = {
    "bert": 2,
    "gpt2": 2,
    "llama": 4,
    "mixtral": 4,
    "t5": 2,
    "opt": 4,
    "albert": 4,
    "gemma2": 4,
    "sdpa": 2,
    "own": 2,
}
WIDTHS = {"bert": 8, "gpt2": 8, "llama": 4, "mixtral": 4, "t5": 8}  # of a head
PATTERNS = ("attention_scores", "attention_pattern")
CROSS = "decoder.block.1.layer.1.EncDecAttention"
ABSENT = {  # where the place does not exist, and both say the same
    "bert": ("final_norm",),
    "albert": ("final_norm",),
    "mixtral": ("mlp_activation",),
    "mamba": (*HEAD_SITES, "attention_input", "attention_output", "mlp_input", "mlp_activation", "mlp_output"),
    "multihead": (*HEAD_SITES, "final_norm"),
    "sdpa": ("final_norm",),
    "own": ("query", "key", "value", "final_norm"),
}
BLOCKS = tuple(name for name in NAMES if name not in ("cnn", "recurrent"))


def no_tokens(name: str, at: Location) -> bool:
    """Whether what is there has one vector an example."""
    return name == "bert" and at.site == "logits"


def sites() -> Iterator[Case]:
    """Every site, read and swapped; both stacks of T5."""
    for name in BLOCKS:
        for stack in ("encoder", "decoder") if name == "t5" else (None,):
            stacked = [site(each, stack=None if each == "logits" else stack) for each in SITES]
            there = [at for at in stacked if at.site not in ABSENT.get(name, ())]
            label = "" if stack is None else f"{stack}/"
            places = tuple(there)
            yield Case(name, f"{label}every site in one run", partial(every_site, places=places), changes=False)
            yield Case(name, f"{label}every site recorded", partial(recorded, places=places), changes=False)
            yield Case(name, f"{label}every site of a run that stops", partial(run_there, places=places), changes=False)
            for at in stacked:
                if stack == "encoder" and at.site == "logits":
                    continue
                if at not in there:
                    program = partial(by_interchange, at=at)
                    yield Case(name, f"{at} swapped", program, fails="has no|cannot be|no feed-forward|several|not")
                    continue
                where = {} if no_tokens(name, at) else {"positions": 1}
                program = partial(by_interchange, at=at, keep=(at, Location(2)), **where)
                yield Case(name, f"{at} swapped", program)
                if not no_tokens(name, at) and name in (*TEXT, "own"):
                    yield Case(name, f"{at} zeroed in a block", partial(by_a_block, at={at: Zero()}, positions=[0, -1]))
                if not no_tokens(name, at):
                    yield Case(name, f"{at} doubled in a block", partial(by_a_block, at={at: doubled}))


def parts() -> Iterator[Case]:
    """Heads, dims, and dims of heads."""
    for name in TEXT:
        last = HEADS[name] - 1
        grouped = 1
        for each in ("query", "attention_heads", "attention_scores", "attention_pattern", "key", "value"):
            head = grouped if each in ("key", "value") else last
            at = site(each, heads=head)
            yield Case(name, f"{at} swapped", partial(by_interchange, at=at, positions=[1, 2], keep=(at,)))
        for at in (
            site("attention_heads", heads=[last, 0]),
            site("value", heads=grouped, dims=range(1, 3)),
            site("query", dims=[3, 0]),
            site("query", heads=range(2), dims=range(0, 4, 2)),
            Location(1, dims=range(3, 9)),
            Location(1, "mlp_output", dims=[7, 2, 11]),
            Location(1, "attention_output", dims=range(0, 16, 3)),
            Location(-1, "block_input", dims=5),
        ):
            yield Case(name, f"{at} swapped", partial(by_interchange, at=at, positions=-1, keep=(at,)))
            yield Case(name, f"{at} mixed in a block", partial(by_a_block, at={at: Mixup(0.5)}, seed=5))
        for at in (site("attention_heads", heads=last), Location(1, dims=range(3, 9))):
            for kind in SUBSPACES:
                width = 6 if at.heads is None else WIDTHS[name]
                if kind == "pca" and width < 6:
                    kind = "pca"
                program = partial(in_a_subspace, kind=kind, at=at, width=width, positions=[0, -1])
                yield Case(name, f"{at} in a {kind} subspace", program)


def operators() -> Iterator[Case]:
    """Every operator, by either verb, at a block, at a head and at entries."""
    for name in (*TEXT, "opt", "gemma2", "mamba"):
        places = [(Location(1, dims=range(2, 14)), 12)]
        if name in WIDTHS:
            places.append((site("attention_heads", heads=1), WIDTHS[name]))
        for at, width in places:
            for op in OPERATORS:
                for verb in ("interchange", "block") if name in TEXT and at.layer == 1 and at.dims else ("block",):
                    program = partial(by_operator, name=op, width=width, at=at, verb=verb)
                    yield Case(name, f"{op} at {at} by {verb}", program)
        yield Case(name, "draws from one generator", partial(drawn, at=Location(1)))
        yield Case(name, "draws from the default generator", partial(by_default_generator, at=Location(1)))
        if name in TEXT:
            yield Case(name, "twice in a block", partial(twice, at=Location(1)))
        yield Case(name, "in train mode", partial(in_train_mode, at=Location(1)))
        yield Case(name, "in half precision", partial(in_half_precision, at=Location(1, dims=range(7))))
        yield Case(name, "without gradients", partial(without_gradients, at=Location(1, dims=range(7))))


POSITIONS: dict[str, Any] = {
    "0": 0,
    "-1": -1,
    "slice(1, None)": slice(1, None),
    "slice(None, -1)": slice(None, -1),
    "[0, 2]": [0, 2],
    "[-1, 0]": [-1, 0],
    "lists": [[0, 1, 2], [1], [-1, 0]],
    "a tensor": torch.tensor([1, 2]),
    "a tensor of rows": torch.tensor([[0, 2], [1, 0], [-1, 1]]),
    "range": range(1, 3),
}
MASK = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]).bool()


def positions() -> Iterator[Case]:
    """Every form of positions, padded right and left."""
    for name in ("bert", "gpt2", "llama", "mixtral"):
        for side in ("right", "left") if name in ("bert", "gpt2") else ("left",):
            forms = POSITIONS | {"a mask": MASK if side == "right" else MASK.flip(1)}
            for form, chosen in forms.items():
                program = partial(with_padding, side=side, at=Location(1), positions=chosen)
                yield Case(name, f"{Location(1)} at {form}, padded {side}", program)
            for at in (site("query", heads=1), site("key", heads=1), site("attention_pattern")):
                for form in ("-1", "lists"):
                    program = partial(with_padding, side=side, at=at, positions=POSITIONS[form])
                    yield Case(name, f"{at} at {form}, padded {side}", program)
            for form, mine, its in (
                ("int", 0, -1),
                ("lists", [[0], [1, 2], [3]], [[4], [3, 1], [0]]),
                ("list", [0, 1], [3, 4]),
            ):
                program = partial(with_padding, side=side, at=Location(1), positions=mine, source_positions=its)
                yield Case(name, f"positions from others ({form}), padded {side}", program)
            pooled = partial(pooled_mean, side=side)
            yield Case(name, f"mean over real tokens, padded {side}", pooled)
    for at in (Location(1, stack="encoder"), Location(0, "key", heads=1, stack="encoder")):
        for form, chosen in POSITIONS.items():
            program = partial(with_padding, side="right", at=at, positions=chosen)
            yield Case("t5", f"{at} at {form}, padded right", program)
    for form, chosen in POSITIONS.items():
        yield Case("t5", f"decoder at {form}", partial(by_interchange, at=Location(1), positions=chosen))
        yield Case("sdpa", f"key at {form}", partial(by_interchange, at=site("key"), positions=chosen))
        last = form in ("-1", "slice(1, None)", "[-1, 0]", "lists", "a tensor of rows")  # which alone is read then
        program = partial(by_interchange, at=Location(module="lstm"), positions=chosen)
        yield Case("recurrent", f"states at {form}", program, changes=last)


SEVERAL: dict[str, dict[Location, Any]] = {
    "three operators": {
        Location(0): Interpolate(0.4),
        site("query", heads=1): Zero(),
        Location(2, "mlp_output"): Add(vector(WIDTH)),
    },
    "two in one attention": {
        site("query", heads=0): Swap(),
        site("value", heads=1): doubled,
        site("attention_pattern", heads=0): Interpolate(0.5),
        site("attention_heads", heads=1): Between(0.3),
    },
    "two writes at one place": {
        Location(1): doubled,
        Location(1, dims=range(4)): Swap(),
        Location(1, dims=range(2, 6)): Add(vector(4)),
    },
    "later ones first": {
        Location(2): Interpolate(0.5),
        Location(1, "mlp_output"): Zero(),
        Location(0, "attention_output"): Swap(),
    },
}


def several() -> Iterator[Case]:
    """Several locations at once, nested blocks, and all verbs."""
    everywhere = (
        Location(0),
        site("query"),
        site("attention_pattern"),
        Location(1, "mlp_output"),
        site("value", heads=1),
    )
    for name in TEXT:
        for kind in ("NNsight", *(("remote",) if name in ("gpt2", "t5") else ())):
            case = partial(Case, name, kind=kind)
            for label, pairs in SEVERAL.items():
                yield case(label, partial(by_interchange, at=pairs, positions=[0, -1], keep=tuple(pairs)))
                yield case(f"{label}, in a block", partial(by_a_block, at=pairs, source=True, positions=[0, -1]))
            yield case("several sources", several_sources)
            yield case("runs as base and source", partial(of_runs, at=[Location(1, dims=range(8)), site("query")]))
            yield case(
                "blocks nest",
                partial(nested, at=Location(1)) if kind == "NNsight" else partial(nested_away, at=Location(1)),
            )
            yield case("verbs inside a block", partial(verbs_inside, at=Location(0)))
            yield case("what was not asked for", partial(fetched, places=everywhere), changes=False)
            yield case("keep", kept_of_it, changes=False)
    rounding = 1e-6  # a sweep of a torch model stacks its counterfactuals in other batches
    yield Case("gpt2", "sweep", swept, "remote", within=rounding)
    for program, label in ((patched, "path patching"), (averaged, "means over batches")):
        yield Case("gpt2", label, program, "remote")
    for name in ("gpt2", "llama", "bert", "mixtral"):
        yield Case(name, "means over batches", averaged)
    for name in ("gpt2", "llama", "mixtral"):
        yield Case(name, "sweep", swept, within=rounding)
        yield Case(name, "path patching", patched)
    for kind in ("TransformersModel", "remote"):
        for name in TEXT:
            at, case = site("attention_heads", heads=1), partial(Case, name, kind=kind)
            yield case(f"{at} swapped", partial(by_interchange, at=at, positions=-1, keep=(at, Location(2))))
            yield case("draws from one generator", partial(drawn, at=Location(1)))
            yield case("some sites", partial(every_site, places=everywhere), changes=False)
        for each in ("rotation", "coder"):
            program = partial(in_a_subspace, kind=each, at=Location(1), width=WIDTH, positions=[0])
            yield Case("gpt2", f"a {each}", program, kind)
        yield Case("gpt2", "draws from the default generator", partial(by_default_generator, at=Location(1)), kind)
        for op in OPERATORS:
            program = partial(by_operator, name=op, width=WIDTH, at=Location(1), verb="block")
            yield Case("gpt2", f"{op} in a block", program, kind)


def modules() -> Iterator[Case]:
    """Places by path: outputs, inputs, states, and attention that is no site."""
    for path in MODULES["cnn"]:
        for io in ("output",) if path == "conv1" else ("output", "input"):
            at = Location(module=path, io=io)
            yield Case("cnn", f"{at} swapped", partial(by_interchange, at=at, keep=(at,)))
            yield Case("cnn", f"{at} zeroed in a block", partial(by_a_block, at={at: Zero()}))
    yield Case(
        "cnn",
        "pixels of channels",
        partial(by_interchange, at=Location(module="layer1", dims=[0, 3]), positions=[0, 5]),
    )
    yield Case("cnn", "every operator at once", partial(by_a_block, source=True, at={
        Location(module="conv1", dims=range(3)): Mixup(0.5), Location(module="layer1.0.bn1"): Interpolate(0.5),
        Location(module="layer2.1", io="input"): doubled, Location(module="fc"): Add(vector(3)),
    }))  # fmt: skip
    for at in (Location(1, dims=range(5)), site("key", heads=1), Location(module="vit.layers.2.mlp")):
        for form in ("[-1, 0]", "[0, 2]", "lists", "slice(None, -1)"):
            yield Case("vit", f"{at} at {form}", partial(by_interchange, at=at, positions=POSITIONS[form], keep=(at,)))
    for name in ("lstm", "lstm-time-first"):
        at = Location(module="lstm")
        yield Case(name, f"{at} at -1", partial(by_interchange, at=at, positions=-1, keep=(at,)))
        yield Case(name, f"{at} at others", partial(by_interchange, at=at, positions=-1, source_positions=[2]))
    for path in ("0", "1", "2", "4"):
        yield Case(
            "mlp", f"{path} swapped", partial(by_interchange, at=Location(module=path), keep=(Location(module="4"),))
        )
    for path in ("embed", "lstm", "head"):
        for io in ("output",) if path == "embed" else ("output", "input"):
            at = Location(module=path, io=io)
            yield Case("recurrent", f"{at} swapped", partial(by_interchange, at=at, keep=(at,)))
    for io in ("hidden_state", "cell_state"):
        at = Location(module="lstm", io=io)
        yield Case("recurrent", f"{at} swapped", partial(by_interchange, at=at, keep=(at,)), changes=io != "cell_state")
        yield Case("recurrent", f"{at} doubled", partial(by_a_block, at={at: doubled}), changes=io != "cell_state")
    for io in ("output", "input"):
        at = Location(module="layers.1.attn", io=io)
        yield Case("multihead", f"{at} swapped", partial(by_interchange, at=at, keep=(at,), positions=2))
    for io in (*HEAD_SITES, "output", "input"):
        at = Location(module=CROSS, io=io)
        yield Case("t5", f"{at} swapped", partial(by_interchange, at=at, keep=(at,), positions=1))
        yield Case("t5", f"{at} zeroed in a block", partial(by_a_block, at={at: Zero()}))
    for name in ("bert", "gpt2", "llama"):
        for path in INNER[name]:
            for io in ("output", "input"):
                at = Location(module=path, io=io)
                program = partial(by_interchange, at=at, keep=(at,), positions=-1)
                yield Case(name, f"{at} swapped", program, changes="intermediate" not in path)  # the first is asked for
    for layer in range(3):  # shared blocks: one module, in its turns
        at = Location(layer)
        yield Case("albert", f"{at} doubled", partial(by_a_block, at={at: doubled}))
        yield Case(
            "albert",
            f"{site('query', layer)} from a source",
            partial(by_interchange, at=site("query", layer), keep=(at,)),
        )
    turns = {Location(0): Interpolate(0.5), Location(1, "mlp_output"): doubled, Location(2, "key"): Swap()}
    yield Case("albert", "several turns", partial(by_interchange, at=turns, keep=tuple(turns)))


def graded() -> Iterator[Case]:
    for name in TEXT:
        places: dict[str, Any] = {
            "block": Location(1, dims=range(8)),
            "attention": {site("query", heads=1): Swap(), site("attention_pattern", heads=0): Interpolate(0.5)},
            "heads": {site("attention_heads", heads=0): Interpolate(0.3), Location(2, "mlp_output"): Swap()},
        }
        for label, at in places.items():
            for way in (graded_interchange, graded_block):
                write = partial(way, at=at, positions=[0, -1])
                yield Case(name, f"gradients at {label}, {way.__name__[7:]}", partial(gradients, write=write))
        yield Case(
            name,
            "gradients of runs",
            partial(gradients, write=partial(graded_runs, at=Location(1, dims=range(8)), resume=False)),
        )
        # A plain run resumes from the base, so what both share adds up in another order.
        resumed = partial(gradients, write=partial(graded_runs, at=Location(1, dims=range(8))))
        yield Case(name, "gradients of runs, resumed", resumed, within=2e-6)
        for kind in ("rotation", "boundless", "mask"):
            yield Case(name, f"gradients of a {kind} subspace", partial(graded_subspace, kind=kind))
        yield Case(name, "gradients with noise", partial(gradients, write=noised))


STEPS = {"all": None, "the prompt": 0, "two": [1, 2], "all generated": slice(1, None), "the last": 4}


def generations() -> Iterator[Case]:
    push = Add(vector(WIDTH), 3.0)
    for name in ("gpt2", "llama", "t5"):
        for kind in ("TransformersModel", "remote"):
            for cached in (True, False):
                settings = {"use_cache": cached}
                what = f"{'with' if cached else 'without'} a cache"
                case = partial(Case, name, kind=kind, changes=False)
                for label, steps in STEPS.items():
                    if kind == "remote" and label != "two":
                        continue
                    at = {Location(1): push}
                    yield case(
                        f"generates, steps: {label}, {what}", partial(generated, at=at, settings=settings, steps=steps)
                    )
                    if label != "all generated":
                        written = {"steps": steps, "positions": -1}
                        yield case(
                            f"generates, steps: {label}, at -1, {what}",
                            partial(generated, at=at, settings=settings, **written),
                        )
                for each in ("key", "value", "query", "attention_heads") if kind != "remote" or cached else ():
                    at = {site(each): Add(torch.tensor(1.5))}
                    for steps in (0, None):
                        program = partial(generated, at=at, settings=settings, steps=steps)
                        yield case(f"generates, {each} at steps {steps}, {what}", program)
                if name != "t5":
                    program = partial(generated_padded, at={Location(1): push, site("key"): doubled}, settings=settings)
                    yield case(f"generates from a padded batch, {what}", program)
                    program = partial(
                        generated_with_source, at=Location(1), settings=settings, steps=0, positions=[1, -1]
                    )
                    yield case(f"generates with the prompt swapped, {what}", program)
                else:
                    at = Location(1, stack="encoder")
                    program = partial(generated_with_source, at=at, settings=settings, positions=[1, -1])
                    yield case(f"generates with the encoder swapped, {what}", program)
                    cross = {Location(module=CROSS, io="key"): Add(torch.tensor(1.5))}
                    yield case(
                        f"generates, keys of cross attention, {what}", partial(generated, at=cross, settings=settings)
                    )
                yield case(
                    f"generates, mixed, {what}",
                    partial(generated, at={Location(1): Mixup(2.0)}, settings=settings, seed=5, steps=[0, 2]),
                )
                yield case(f"generates twice in a block, {what}", partial(generated_twice, settings=settings))
                yield case(f"generates, two blocks, {what}", partial(generated_nested, settings=settings))
            yield Case(
                name,
                "generates with beams",
                partial(generated, at={Location(1): push}, settings={"num_beams": 2}, positions=-1),
                kind,
                False,
            )


def inside(operation: str, **fields: Any) -> Location:
    """An operation in block 1, or in a module."""
    return Location(None if "module" in fields else 1, operation=operation, **fields)


PRODUCT = "torch_nn_functional_scaled_dot_product_attention_0"
OPERATIONS: dict[str, tuple[tuple[Location, Location], ...]] = {  # (of a plain model, of nnsight): the same numbers
    "gpt2": (
        (site("attention_heads"), inside("attn.attention_interface_1")),
        (site("attention_heads"), inside(f"attn.attention_interface_1.{PRODUCT}")),
        (site("query"), inside("attn.query_states_1")),
        (site("key"), inside("attn.key_states_2")),
        (site("value"), inside("attn.value_states_2")),
        (site("attention_input"), inside("self_attn_0", io="input")),
        (site("attention_output"), inside("attn.self_c_proj_0")),
        (site("mlp_input"), inside("self_mlp_0", io="input")),
        (site("mlp_activation"), inside("mlp.self_act_0")),
        (site("mlp_activation"), inside("self_c_proj_0", io="input", module="transformer.h.1.mlp")),
        (Location(1), inside("hidden_states_5")),
    ),
    "llama": (
        (site("attention_heads"), inside("self_attn.attention_interface_1")),
        (site("query"), inside("self_attn.apply_rotary_pos_emb_0")),
        (site("value"), inside("self_attn.value_states_0")),
        (site("mlp_activation"), inside("mlp.self_down_proj_0", io="input")),
        (site("mlp_output"), inside("mlp.down_proj_0")),
        (site("block_output"), inside("hidden_states_4")),
    ),
    "mixtral": (
        (site("attention_heads"), inside("self_attn.attention_interface_1")),
        (site("mlp_output"), inside("mlp.hidden_states_2")),
        (site("mlp_input"), inside("self_mlp_0", io="input")),
    ),
    "bert": (
        (site("attention_heads"), inside("attention.self.attention_interface_1")),
        (site("query"), inside("attention.self.query_layer_0")),
        (site("mlp_activation"), inside("intermediate.self_intermediate_act_fn_0")),
        (site("block_output"), inside("layer_output_0")),
    ),
    "t5": (
        (site("attention_heads"), inside("layer.0.SelfAttention.attention_interface_1")),
        (site("query"), inside("layer.0.SelfAttention.query_states_0")),
        (site("mlp_activation"), inside("self_act_0", module="decoder.block.1.layer.2.DenseReluDense")),
        (site("mlp_activation", stack="encoder"), inside("layer.1.DenseReluDense.self_act_0", stack="encoder")),
        (Location(module=CROSS, io="attention_heads"), inside("attention_interface_1", module=CROSS)),
    ),
    "opt": (
        (site("mlp_activation"), inside("self_activation_fn_0")),
        (site("mlp_output"), inside("self_fc2_0")),
        (site("mlp_input"), inside("self_fc1_0", io="input")),
    ),
    "sdpa": (
        (site("attention_heads"), inside("attention.functional_scaled_dot_product_attention_0")),
        (site("query"), inside("attention.functional_scaled_dot_product_attention_0", io="input")),
    ),
    "own": (
        (site("attention_pattern"), inside("attention.functional_softmax_0")),
        (site("attention_pattern"), inside("attention.pattern_0")),
        (site("attention_scores"), inside("attention.functional_softmax_0", io="input")),
        (site("attention_heads"), inside("attention.torch_matmul_1")),
    ),
    "cnn": (
        (Location(module="layer1.0"), inside("self_relu_1", module="layer1.0")),
        (Location(module="layer2.1.conv2"), inside("self_conv2_0", module="layer2.1")),
        (Location(module="layer2.1.conv2", io="input"), inside("self_conv2_0", module="layer2.1", io="input")),
    ),
}  # fmt: skip


def operations() -> Iterator[Case]:
    """Operations inside a forward, whole and in part, against the sites that they are."""
    for name, pairs in OPERATIONS.items():
        for named, operation in pairs:
            for kind in ("NNsight", *(("remote",) if name in ("gpt2", "t5") else ())):
                has_heads = named.site in HEAD_SITES and named.module is None
                choices: list[dict] = (
                    [{}] if kind == "remote" else [{}, *([] if "scores" in str(named) else [{"dims": range(1, 3)}])]
                )
                choices += [{"heads": (1,)}] if has_heads and kind != "remote" else []
                for parts in choices if name in ("gpt2", "t5", "own") else choices[:2]:
                    chosen = f" {parts}" if parts else ""
                    program = partial(at_an_operation, named=named, operation=operation, parts=parts, positions=[0, -1])
                    yield Case(name, f"{operation} is {named}{chosen}", program, kind)
            if name in ("gpt2", "t5") and "encoder/" not in str(named) and "module" not in str(named):
                for steps in (0, [1, 2], None):
                    program = partial(
                        generated_at, named=named, operation=operation, op=Mixup(1.0), seed=5, steps=steps
                    )
                    yield Case(
                        name, f"generates, {operation} is {named}, steps: {steps}", program, "TransformersModel", False
                    )
        if name in ("gpt2", "llama", "mixtral"):
            chosen = tuple({named: (named, operation) for named, operation in pairs}.values())[:3]  # each place once
            yield Case(name, "sweep, means and gradients of operations", partial(swept_at_operations, pairs=chosen))
    named, operation = OPERATIONS["gpt2"][0]
    program = partial(at_an_operation, named=named, operation=operation, parts={"heads": (1,)}, positions=1, tokens=2)
    yield Case("gpt2", "as many tokens as heads", program, changes=False)
    gate = inside("router_logits_0", module="model.layers.1.mlp.gate")
    program = partial(read_at, named=Location(module="model.layers.1.mlp.gate"), operation=gate)
    yield Case("mixtral", "router logits", program, changes=False)


def errors() -> Iterator[Case]:
    """What plain models refuse, in the same words."""
    places = (Location(1), site("query"), Location(1, "mlp_output", dims=range(3)), Location(module=INNER["gpt2"][0]))
    for at in places:
        yield Case(
            "gpt2", f"{at}: nothing ran", partial(called_nothing, at=at), fails="never ran inside this intervene"
        )
        yield Case("gpt2", f"{at}: nothing to record", partial(recorded_nothing, at=at), fails="never ran|did not run")
    for kind in ("NNsight", "remote"):
        gpt2, bert = (partial(Case, name, kind=kind) for name in ("gpt2", "bert"))
        for verb in ("block", "interchange"):
            yield bert(f"padding, {verb}", partial(padding_named, verb=verb), fails="names padding in 2 of 3|1 of 3")
            sources = (
                (2, 5, 0, "3 examples and the source"),
                (2, 5, None, "has shape"),
                (3, 4, None, "has shape"),
                (3, 4, 4, "no token|padding|selects"),
            )
            for rows, tokens, positions, why in sources:
                program = partial(of_another_shape, rows=rows, tokens=tokens, verb=verb, positions=positions)
                yield gpt2(f"a source of [{rows}, {tokens}] at {positions}, {verb}", program, fails=why)
            program = partial(of_another_shape, rows=3, tokens=5, verb=verb, positions=[0, 1], source_positions=[1])
            yield gpt2(f"fewer positions in the source, {verb}", program, fails="as many")
        for label, at, settings, why in (
            ("head", site("query", heads=5), {}, "names head 5 and there are 2 heads"),
            ("dim", Location(1, dims=range(20)), {}, "names dim 19 and the width there is 16"),
            ("layer", Location(9), {}, "out of range"),
            ("position", Location(1), {"positions": 9}, "no token"),
            ("rows of positions", Location(1), {"positions": [[0], [1]]}, "lists 2 examples"),
            ("mask of positions", Location(1), {"positions": MASK[:, :3]}, "is a mask of shape"),
            ("module", Location(module="transformer.h.1.nix"), {}, "nix"),
            ("positions of a mean", Location(1), {"op": Mean(torch.ones(3))}, "holds a tensor of shape"),
            ("operator, narrower", Location(1), {"op": narrower}, "returned"),
            ("operator, in place", Location(1), {"op": in_place}, "wrote into what it was given"),
        ):
            where = {"positions": 0} if "positions" not in settings and label != "operator, in place" else {}
            source = "op" not in settings
            program = partial(by_interchange, at=at, source=source, **where, **settings)
            yield gpt2(f"wrong {label}", program, fails=why)
            op = {"op": Zero(), **settings}
            if label != "mask of positions":  # there it may be that of a prompt
                yield gpt2(f"wrong {label}, in a block", partial(by_a_block, at=at, **where, **op), fails=why)
        missing = partial(by_interchange, at=Location(1), source=False)
        yield gpt2("no source", missing, fails="no operator was given")
        yield gpt2("no source, in a block", partial(by_a_block, at={Location(1): Swap()}), fails="none was given")
        yield gpt2("a counterfactual base", of_a_counterfactual, fails="itself a counterfactual")
        yield gpt2("a source with NaN", with_nan, fails="has NaN at block_output.1")
    for verb in ("block", "interchange", "run"):
        program = partial(encoded_before, at=Location(1, stack="encoder"), verb=verb)
        yield Case("t5", f"no encoder ran, {verb}", program, fails="never ran|did not run")
    yield Case("gpt2", "a run of another model", of_another_model, fails="a run of another model")
    for verb in ("fetch", "interchange"):
        program = partial(after_weights_changed, verb=verb)
        yield Case("gpt2", f"weights changed, {verb}", program, fails="changed|older|weights")
    yield Case("gpt2", "logits and labels", with_labels, fails="leave labels out")
    for name in ("gpt2", "t5"):
        for written in ({"steps": 9}, {"steps": [7, 8], "positions": -1}):
            program = partial(generated_too_little, at=Location(1), **written)
            yield Case(
                name, f"generates too little, {written}", program, "TransformersModel", fails="nothing was written"
            )
    program = partial(generated_too_little, at=Location(1), steps=-1)
    yield Case("gpt2", "generates, steps: -1", program, "TransformersModel", fails="steps")


def every_case() -> Iterator[Case]:
    for some in (sites, parts, operators, positions, several, modules, graded, generations, operations, errors):
        yield from some()


CASES = tuple(every_case())
