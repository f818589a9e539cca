"""The public names of the packages: what a user sees under the tab key, and when each is imported."""

import ast
import pickle
import subprocess
import sys
from importlib import import_module, metadata
from itertools import permutations
from pathlib import Path
from types import ModuleType

import cloudpickle
import pytest

import distill
import interventions

REPOSITORY = Path(__file__).parents[1]
PACKAGES = {"distill": {"accuracy_under", "__version__"}, "interventions": {"exceptions", "__version__"}}
"""The packages, with the names that are imported when they are used and are on no list of public names."""


def run(program: str, folder: Path = REPOSITORY) -> str:
    """Run a program in a process of its own, and return what it prints."""
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", [distill, interventions])
def test_the_public_names_alone_are_listed(package):
    listed = dir(package)
    assert listed == sorted(package.__all__)
    assert not [name for name in listed if not hasattr(package, name)]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_lists_of_a_package_agree(package):
    """`__all__`, what is imported when it is used, and what a type checker reads name the same."""
    whole = import_module(package)
    tree = ast.parse(Path(whole.__file__).read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    door = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module.startswith(f"{package}.")]
    seen = {alias.name: node.module for node in (*door, *checked.body) for alias in node.names}
    used = {name: home for home, names in whole._NAMES.items() for name in names.split()}
    assert seen == used
    assert used.keys() - set(whole.__all__) == PACKAGES[package]
    assert set(whole.__all__) <= used.keys()
    assert len(used) == sum(len(names.split()) for names in whole._NAMES.values())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_is_what_its_file_defines(package):
    whole = import_module(package)
    for home, names in whole._NAMES.items():
        for name in names.split():
            found = import_module(f"{package}.{name}") if home == package else getattr(import_module(home), name)
            assert getattr(whole, name) is found
            assert isinstance(found, ModuleType) == (home == package)


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_imports_nothing_else(package):
    """Nothing of others at all: what a package costs at its import is Python's own and its door."""
    program = f"import sys, {package}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    others = set(run(program).split()) - set(run("import sys; print(*sys.modules)").split())
    assert {name for name in others if name not in sys.stdlib_module_names} <= {"distill", "interventions"}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_version_is_that_of_the_distribution(package):
    assert import_module(package).__version__ == metadata.version("causal-distillation")
    assert "metadata" not in run(f"import sys, {package}; print([each for each in sys.modules if 'metadata' in each])")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_star_imports_every_public_name(package):
    found: dict[str, object] = {}
    exec(f"from {package} import *", found)
    assert found.keys() - {"__builtins__"} == set(import_module(package).__all__)


IN_ITS_OWN_PROCESS = """
import sys, warnings
from interventions import steps
assert steps.__name__ == "interventions.steps"
assert "interventions.runs" not in sys.modules  # of that file alone, as it is written

import distill
assert distill.training.checkpoints.__name__ == "distill.training.checkpoints"  # as if all had been imported
assert distill.fit.__name__ == "fit"
assert not hasattr(distill, "cli") and not hasattr(distill, "nothing")

warnings.simplefilter("error")
warnings.filterwarnings("default", module="__main__")  # a name of before warns the line that uses it
assert distill.layers.__name__ == "layer_mapping"
"""


def test_files_and_names_of_before_in_a_new_process():
    run(IN_ITS_OWN_PROCESS)


@pytest.mark.parametrize("package", [distill, interventions])
def test_packages_are_pickled_by_name(package):
    """A user's function that is sent elsewhere may hold them."""
    assert pickle.loads(pickle.dumps(package)) is package
    assert cloudpickle.loads(cloudpickle.dumps(package)) is package
    assert pickle.loads(pickle.dumps([distill.fit, interventions.describe])) == [distill.fit, interventions.describe]


STATEMENTS = (
    "import shop.price",
    "from shop import price",
    "from shop.price import price",
    "import shop.price as price",
    "import importlib; importlib.import_module('shop.price')",
    "import shop; shop.price",
    "from shop import *",
    "import shop.till",
    "import shop; shop.till",
)
"""Ways to import a function from a file of its name, or beside it; whatever comes first, the name is the function."""


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A package whose function `price` is in `price.py`, whose public submodule is `goods`, and that has a `till`."""
    files = {
        "__init__": "from interventions import import_when_used\n"
        "__all__ = ['goods', 'price', 'pay']\n"
        "__getattr__ = import_when_used(__name__, {'shop': 'goods', 'shop.price': 'price', 'shop.till': 'pay'}, "
        "{'cost': 'shop.price'})",
        "goods": "apple = 2",
        "price": "from shop import goods\ndef price(): return goods.apple",
        "till": "from shop.price import price\nfrom shop import goods\ndef pay(): return price()",
        "shelf": "",
    }
    (tmp_path / "shop").mkdir()
    for name, text in files.items():
        (tmp_path / "shop" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    forget()


def forget() -> None:
    """Forget the package, as in a new process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


@pytest.mark.usefixtures("shop")
def test_a_function_is_in_the_place_of_the_file_of_its_name_in_every_order_of_imports():
    for statements in permutations(STATEMENTS, 3):
        forget()
        found: dict[str, object] = {}
        for statement in statements:
            exec(statement, found)
            shop = import_module("shop")
            assert vars(shop).get("price", shop.price) is sys.modules["shop.price"].price, statements
        assert shop.price() == 2
        assert shop.goods.apple == 2
        assert isinstance(shop.till, ModuleType)
        assert found.get("price", shop.price) is shop.price


@pytest.mark.usefixtures("shop")
def test_an_attribute_can_be_replaced(monkeypatch):
    shop = import_module("shop")
    before = shop.price
    with monkeypatch.context() as patch:
        patch.setattr("shop.price", lambda: 3)
        assert shop.price() == 3
        patch.setattr(shop, "goods", ModuleType("other"))
        assert shop.goods.__name__ == "other"
    assert shop.price is before
    assert shop.goods.__name__ == "shop.goods"


@pytest.mark.usefixtures("shop")
def test_names_that_are_none():
    shop = import_module("shop")
    with pytest.raises(AttributeError, match="module 'shop' has no attribute 'prices'"):
        _ = shop.prices
    with pytest.raises(AttributeError, match="module 'shop' has no attribute 'shelf'"):
        _ = shop.shelf
    with pytest.warns(DeprecationWarning, match=r"^shop\.cost is deprecated; use shop\.price\.$"):
        assert shop.cost is shop.price


@pytest.mark.parametrize("package", [distill, interventions])
@pytest.mark.parametrize("name", ["typo", "fit.x", "models.nope.x", "..", "x.", "", "a b", "_private"])
def test_what_is_no_name_is_no_attribute(package, name):
    assert not hasattr(package, name)
