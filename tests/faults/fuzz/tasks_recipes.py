"""Right calls of the public names of `distill.tasks` and `distill.networks`."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill import networks, tasks
from distill.causal.model import CausalModel
from distill.tasks import MinimalPairs, Prompts, Recipe, Rows, Task
from tests.distill.data.texts.tokenizers import tokenizer as reader
from tests.faults.fuzz import attack

WORDS = (
    "? The the dogs dog cats cat is was were big near Then When , and went to gave a it Mary John at library "
    "market book lamp Next Before stood good bad poor film . + = ( ) modulo"
).split()
NUMBERS = [str(number) for number in range(20)]
TABLE = "rows|nan table"
DATA = f"{TABLE}"
NAMES = "text|digits|control text"


@functools.cache
def tokenizer() -> Any:
    """Return a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, *NUMBERS])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?", model_max_length=32)


def table(labels: Any = None) -> dict[str, Tensor]:
    """Return rows of the network of linear layers, as columns."""
    return {"x": torch.ones(4, 4), "labels": torch.tensor([0, 1, 2, 3]) if labels is None else labels}


def rows() -> Rows:
    """Return rows of the network of linear layers."""
    return Rows(table())


def numbers(**columns: Any) -> dict[str, Tensor]:
    """Return two prompts."""
    return {"animal": torch.tensor([1, 0])} | columns


def prompts(templates: Any = ("The {animal} is",), fillers: Any = None, reader: Any = None) -> Prompts:
    """Return prompts of one template."""
    return Prompts(templates, fillers or {"animal": ("dog", "cat")}, reader or tokenizer())


def prompted(templates: Any, fillers: Any, tokenizer: Any) -> Any:
    """Tokenise prompts."""
    return Prompts(templates, fillers, tokenizer).encode(numbers())


def answered(model: CausalModel) -> Any:
    """Sample a causal model, encode and run it."""
    values = model.sample(3, torch.Generator().manual_seed(0))
    return model.encode(values), model.run(values)


def causal(make: Callable[..., CausalModel]) -> Callable[..., Any]:
    """Return a function that makes a causal model and runs it."""
    return lambda **settings: answered(make(**settings))


def is_right(value: Any) -> bool:
    """Return whether a value stands for what is written for the call."""
    return isinstance(value, str) and value == "right"


def lines(*found: Any) -> str:
    """Write a file of objects, one a line."""
    Path("pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found))
    return "pairs.jsonl"


def paired(path: Any = None, **settings: Any) -> Any:
    """Read minimal pairs."""
    written = lines({"good": "the dog is", "bad": "the dog were", "test": "number"},
                    {"good": "the cat is", "bad": "the cat were", "test": "number"})  # fmt: skip
    return tasks.minimal_pairs(written if is_right(path) else path, **settings)


def loaded(data: Any = None, **settings: Any) -> Any:
    """Read a task from a file."""
    body = "".join(f"the {'dog' if i % 2 else 'cat'} is {i},{'good' if i % 2 else 'bad'}\n" for i in range(10))
    Path("films.csv").write_text(f"text,label\n{body}")
    Path("test.csv").write_text("text,label\nthe dog is big,good\nthe cat is big,bad\n")
    return tasks.load(data="films.csv" if is_right(data) else data, **settings)


def mnist_folder() -> str:
    """Write a tiny MNIST."""
    images, digits = np.zeros((10, 28, 28), np.uint8), np.arange(10, dtype=np.uint8)
    np.savez("mnist.npz", x_train=images, y_train=digits, x_test=images, y_test=digits)
    return "."


def quantified(folder: Any) -> Any:
    """Run the causal model of a tiny file of quantified sentences."""
    sentences = ("every sad actor doesnot happily eat some sweet cake", "some emptystring actor emptystring "
                 "emptystring eat every emptystring cake")  # fmt: skip
    Path("mqnli_train.jsonl").write_text(json.dumps(dict(zip(("sentence1", "sentence2"), sentences, strict=True))))
    return answered(tasks.multiply_quantified("." if is_right(folder) else folder))


def of_mnist(read: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that reads a tiny MNIST."""
    return lambda folder, **settings: read(mnist_folder() if is_right(folder) else folder, **settings)


def taken(indices: Any) -> Any:
    """Take rows."""
    return rows().take(indices), rows().batch(indices)


def made(cls: type, feed: Callable[[], Any]) -> Callable[..., Any]:
    """Return a function that makes a network and runs it."""
    return lambda **settings: cls(**settings)(feed())


def ids() -> Tensor:
    """Return token ids."""
    return torch.tensor([[1, 2, 3], [4, 5, 6]])


def text_network(cls: type, **settings: Any) -> dict[str, Any]:
    """Return what makes a network for text."""
    return {"vocabulary": 8, "width": 4, "layers": 1, "dropout": 0.1, **settings}


SIZES = {"vocabulary": "7", "width": "", "layers": "1|numpy int|7", "dropout": "share"}
OF_NETWORKS = [
    attack.Recipe("networks.CNN", made(networks.CNN, lambda: torch.ones(2, 1, 8, 8)),
                  lambda: {"channels": [4, 4], "classes": 3, "dropout": 0.1, "colors": 1},
                  {"channels": "[1]|(1, 2, 3)|range", "classes": "count", "dropout": "share",
                   "colors": "1|numpy int"}),
    attack.Recipe("networks.MLP", made(networks.MLP, lambda: torch.ones(2, 8, 8)),
                  lambda: {"inputs": 64, "hidden": [4], "classes": 3, "dropout": 0.1},
                  {"inputs": "", "hidden": "[1]|(1, 2, 3)|range", "classes": "count", "dropout": "share"}),
    *(
        attack.Recipe(f"networks.{cls.__name__}", made(cls, ids), functools.partial(text_network, cls, **more),
                      SIZES | takes | {"width": width})
        for cls, more, takes, width in (
            (networks.LSTMClassifier, {"classes": 2}, {"classes": "count"}, "count"),
            (networks.LSTMLanguageModel, {}, {}, "count"),
            (networks.TransformerClassifier, {"classes": 2, "heads": 1, "longest": 4},
             {"classes": "count", "heads": "1|numpy int", "longest": "7"}, "count"),
            (networks.TransformerLanguageModel, {"heads": 1, "longest": 4},
             {"heads": "1|numpy int", "longest": "7"}, "count"),
        )
    ),
    *(
        attack.Recipe(f"networks.{cls.__name__} of inputs", cls(**text_network(cls, **more)).eval(),
                      lambda: {"input_ids": ids(), "attention_mask": torch.ones(2, 3)},
                      {"input_ids": "whole tensor|bytes tensor", "attention_mask": "None"})
        for cls, more in (
            (networks.LSTMClassifier, {"classes": 2}),
            (networks.LSTMLanguageModel, {}),
            (networks.TransformerClassifier, {"classes": 2, "heads": 1, "longest": 4}),
            (networks.TransformerLanguageModel, {"heads": 1, "longest": 4}),
        )
    ),
    attack.Recipe("networks.CNN of images", networks.CNN([2], 3).eval(),
                  lambda: {"pixel_values": torch.ones(2, 1, 4, 4)}, {"pixel_values": ""}),
    attack.Recipe("networks.MLP of images", networks.MLP(4, [2], 3).eval(),
                  lambda: {"pixel_values": torch.ones(2, 4)},
                  {"pixel_values": "floats|nan tensor|inf tensor|empty rows"}),
]  # fmt: skip
LANGUAGE = {"tokenizer": ""}
RECIPES = [
    *OF_NETWORKS,
    attack.Recipe("tasks.Rows", lambda **given: Rows(**given).batch([0, 1]),
                  lambda: {"table": table(), "pad_id": 0, "padding_side": "right", "pads": {}, "classes": None,
                           "source": None, "clusters": None},
                  {"table": "nan table", "pad_id": "whole", "padding_side": "", "pads": "{}|{text: 1}",
                   "classes": "None|()|[]|[text]", "source": "None", "clusters": "None"}),
    attack.Recipe("tasks.Rows.of", lambda **given: Rows.of(**given).batch([0, 1]),
                  lambda: {"data": table(), "pad_id": 0, "padding_side": "right", "classes": None, "clusters": None},
                  {"data": f"{DATA}", "pad_id": "whole", "padding_side": "", "classes": "None", "clusters": "None"}),
    attack.Recipe("tasks.Rows.take", taken, lambda: {"indices": [0, 1]},
                  {"indices": "[1]|(1, 2, 3)|range"}),
    attack.Recipe("tasks.Task", lambda **given: Task(**given).majority,
                  lambda: {"name": "t", "train": rows(), "test": rows(), "classes": ("a", "b", "c", "d"),
                           "network": None, "recipe": Recipe(), "student": None, "description": "", "show": None,
                           "tests": {}, "tokenizer": None, "clusters": ""},
                  {"name": "name", "train": "rows", "test": "rows", "classes": "()|[]|[text]",
                   "network": "None|function|"
                   "raising function|type|class of network|network|operator", "recipe": "", "student": "None",
                   "description": "text|digits|control text|empty text",
                   "show": "None|function|raising function|type|class of network|network|operator", "tests": "{}",
                   "tokenizer": "anything", "clusters": "text|digits|control text|empty text"}),
    attack.Recipe("tasks.Recipe", Recipe,
                  lambda: {"steps": 1, "batch_size": 1, "lr": 0.1, "warmup": 0.1, "weight_decay": 0.1},
                  {"steps": "count", "batch_size": "count", "lr": "positive", "warmup": "share",
                   "weight_decay": "not negative"}),
    attack.Recipe("tasks.load", tasks.load, lambda: {"name": "digits"},
                  {"name": ""}),
    attack.Recipe("tasks.load of a file", loaded,
                  lambda: {"data": "right", "eval_data": None, "tokenizer": tokenizer(), "fraction": 1.0, "seed": 0,
                           "text": None, "label": None, "classes": None, "max_length": None, "split_seed": 0,
                           "clusters": None},
                  {"data": "", "eval_data": "None", "tokenizer": "", "fraction": "share above 0", "seed": "seed",
                   "text": "None", "label": "None", "classes": "None", "max_length": "None|count",
                   "split_seed": "seed", "clusters": "None"}, own=("tokenizer",)),
    attack.Recipe("tasks.load of texts", tasks.load,
                  lambda: {"name": "text", "data": [{"text": f"the cat {number}"} for number in range(6)],
                           "tokenizer": reader(), "max_length": 16, "packing": "best-fit", "block_size": 8},
                  {"name": "None", "data": "", "tokenizer": "", "max_length": "None|count", "packing": "None",
                   "block_size": "None|count"}, own=("tokenizer", "data")),
    attack.Recipe("tasks.minimal_pairs", paired,
                  lambda: {"path": "right", "tokenizer": tokenizer(), "by": None, "limit": None, "seed": 0},
                  {"path": "", "tokenizer": "", "by": "None", "limit": "None|count", "seed": "seed"},
                  own=("tokenizer",)),
    attack.Recipe("tasks.MinimalPairs", MinimalPairs,
                  lambda: {"good": rows(), "bad": rows(), "groups": ("a",) * 4},
                  {"good": "rows", "bad": "rows", "groups": ""}),
    attack.Recipe("tasks.Prompts", prompted,
                  lambda: {"templates": ["The {animal} is"], "fillers": {"animal": ("dog", "cat")},
                           "tokenizer": tokenizer()},
                  {"templates": "[text]", "fillers": "", "tokenizer": ""}, own=("tokenizer",)),
    *(
        attack.Recipe(f"tasks.Prompts.{name}", lambda name=name, **given: getattr(prompts(), name)(**given),
                      lambda more=more: {"numbers": numbers(), **more},
                      {"numbers": "", **{name: "[text]" if name == "answers" else "" for name in more}})
        for name, more in (
            ("texts", {}), ("encode", {}), ("end", {}), ("first", {"slot": "animal"}), ("last", {"slot": "animal"}),
            ("answer_ids", {"answers": ["big", "bad"]}),
            ("read", {"answers": ["big", "bad"], "logits": torch.ones(2, 3, 80)}),
        )
    ),
    attack.Recipe("tasks.addition", causal(tasks.addition),
                  lambda: {"tokenizer": tokenizer(), "a": range(3), "b": range(4), "modulo": None, "template": None},
                  {"tokenizer": "", "a": "[1]|(1, 2, 3)|range", "b": "[1]|(1, 2, 3)|range", "modulo": "None|7",
                   "template": "None"}, own=("tokenizer",)),
    attack.Recipe("tasks.indirect_object", causal(tasks.indirect_object),
                  lambda: {"tokenizer": tokenizer(),
                           "templates": ["When {name_A} and {name_B} went , {name_C} gave a {object} to"],
                           "names": ["Mary", "John"], "places": ["library"], "objects": ["book", "lamp"]},
                  {"tokenizer": "", "templates": "", "names": "", "places": "[text]",
                   "objects": "[text]"}, own=("tokenizer",)),
    attack.Recipe("tasks.verb_number", causal(tasks.verb_number),
                  lambda: {"tokenizer": tokenizer(), "templates": ["Next to the {attractor} , the {subject}"],
                           "nouns": [("dog", "dogs"), ("cat", "cats")], "verbs": [("was", "were")]},
                  {"tokenizer": "", "templates": "", "nouns": "", "verbs": ""}, own=("tokenizer",)),
    attack.Recipe("tasks.boolean_tree", causal(tasks.boolean_tree),
                  lambda: {"depth": 2, "gates": ["and", "xor"], "seed": 0},
                  {"depth": "1|numpy int|7", "gates": "", "seed": "seed"}),
    attack.Recipe("tasks.hierarchical_equality", causal(tasks.hierarchical_equality),
                  lambda: {"entities": 20, "width": 4, "seed": 0},
                  {"entities": "None|count", "width": "count", "seed": "seed"}),
    attack.Recipe("tasks.pointer_values", causal(tasks.pointer_values),
                  lambda: {"images": torch.ones(30, 2, 2), "digits": torch.arange(30) % 10, "part": "train"},
                  {"images": "", "digits": "", "part": "None"}),
    attack.Recipe("tasks.multiply_quantified", quantified,
                  lambda: {"folder": "right"}, {"folder": ""}),
    attack.Recipe("tasks.mnist", of_mnist(tasks.mnist), lambda: {"folder": "right", "split": "train"},
                  {"folder": "", "split": ""}),
    attack.Recipe("tasks.mnist_digits", of_mnist(tasks.mnist_digits), lambda: {"folder": "right"}, {"folder": ""}),
    attack.Recipe("tasks.numbered_as", tasks.numbered_as, lambda: {"data": rows()}, {"data": "rows"}),
    attack.Recipe("tasks.numbered_as by names", tasks.numbered_as,
                  lambda: {"data": Rows.of({"x": [1, 2], "labels": ["a", "b"]}), "names": ["b", "a"]},
                  {"names": "None"}),
    attack.Recipe("tasks.digits", tasks.digits, dict, {}),
    attack.Recipe("tasks.names", tasks.names, dict, {}),
]  # fmt: skip
