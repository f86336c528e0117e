"""Imports point one way: a module uses only what lies below it, so each can be read without what is above."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "prefalign_jax"

# The parts of the package, from the ground up: a part imports only from floors below its own.
FLOORS = (
    "callable_module types intervals limits quiet torch_free",
    "exits",
    "files options processes tables",
    "callbacks early_stopping gguf trackers",
    "averages data logps losses metrics models optim progress sharding",
    "checkpoint config generation pages policy reference train_step",
    "experiment judges",
    "cli export load_data",
    "alike assemble library",
    "kept members",
    "analysis cost evaluation inspection",
    "train",
    "jobs together",
    "commands",
    "__main__",
)
LAYERS = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}


def imported(source: str, module: str, is_package: bool = False) -> set[str]:
    """Dotted names that a module imports, anywhere in its text; `from a import b` counts as a.b."""
    names, tree = set(), ast.parse(source)
    if module == PACKAGE:  # names for type checkers what it imports when it is asked for
        tree.body = [node for node in tree.body if not ast.unparse(node).startswith("if TYPE_CHECKING:")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *base.split(".")] if base else parents)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def part(name: str) -> str:
    """The first name below the package: prefalign_jax.losses.dpo -> losses."""
    return name.split(".")[1] if "." in name else ""


def faults(module: str, imports: set[str]) -> list[str]:
    """What is wrong with a module's imports, each in one sentence."""
    roots = {name.split(".")[0] for name in imports}
    found = [
        f"{module} imports {root}, which lies above the package" for root in roots & {"scripts", "experiments", "tests"}
    ]
    mine = sorted({name for name in imports if name.split(".")[0] == PACKAGE})
    if module == PACKAGE:  # runs before every other module
        others = [name for name in mine if part(name) not in ("callable_module", "quiet")]
        return found + [f"{PACKAGE}/__init__.py imports {name}; it is there before the package is" for name in others]
    here = part(module)
    if here not in LAYERS:
        return [f"{module} is unknown: give {here!r} its layer in LAYERS in {pathlib.Path(__file__).name}"]
    for name in mine:
        there = part(name)
        if there == here or there == "__version__":
            continue
        if there not in LAYERS:
            found.append(f"{module} imports {name}: give {there!r} its layer in LAYERS")
        elif LAYERS[there] > LAYERS[here]:
            found.append(f"{module} (layer {LAYERS[here]}) imports {name} from layer {LAYERS[there]} above it")
        elif LAYERS[there] == LAYERS[here]:
            found.append(f"{module} imports {name}, which is of the same layer")
    return found


def sources(folder: str) -> dict[str, tuple[str, bool]]:
    """Module name -> (text, whether it is a package) for every Python file in a folder."""
    out = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        names = path.relative_to(ROOT).with_suffix("").parts
        is_package = names[-1] == "__init__"
        out[".".join(names[:-1] if is_package else names)] = (path.read_text(encoding="utf-8"), is_package)
    return out


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of a directed graph as a list of its nodes, or [] if there is none."""
    done: set[str] = set()

    def visit(node, path):
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for after in sorted(graph.get(node, ())):
                if found := visit(after, [*path, node]):
                    return found
            done.add(node)
        return []

    return next(filter(None, (visit(node, []) for node in sorted(graph))), [])


def test_the_package_imports_downwards_only():
    found = [
        f
        for name, (text, is_package) in sources(PACKAGE).items()
        for f in faults(name, imported(text, name, is_package))
    ]
    assert not found, "\n".join(found)


def test_no_two_parts_import_each_other():
    graph = {}
    for name, (text, is_package) in sources(PACKAGE).items():
        parts = {part(i) for i in imported(text, name, is_package) if i.split(".")[0] == PACKAGE}
        graph.setdefault(part(name), set()).update(parts & set(LAYERS) - {part(name)})
    assert graph.keys() & LAYERS.keys(), "no module found: is the package still where this test looks?"
    assert not cycle(graph), " -> ".join(cycle(graph))


def test_experiments_are_configs_only():
    configs = {name: source for name, source in sources("experiments").items() if ".notebooks." not in name}
    for name, (text, is_package) in configs.items():
        others = {i for i in imported(text, name, is_package) if i.split(".")[0] in (PACKAGE, "scripts", "experiments")}
        others = {i for i in others if not f"{i}.".startswith(f"{PACKAGE}.config.")}
        assert not others, f"{name} imports {', '.join(sorted(others))}; an experiment imports only {PACKAGE}.config"


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("losses.new", "from prefalign_jax.models import decoder", "same layer"),
        ("logps", "import prefalign_jax.models.decoder", "same layer"),
        ("models.new", "def f():\n    from prefalign_jax import sharding", "same layer"),
        ("metrics", "from . import optim", "same layer"),
        ("data.new", "from ..losses import dpo", "same layer"),
        ("types", "from prefalign_jax.optim import make_schedule", "above it"),
        ("train_step", "from prefalign_jax import train", "above it"),
        ("train_step", "import scripts.train", "above the package"),
        ("newcomer", "", "give 'newcomer' its layer"),
        ("train", "from prefalign_jax import newcomer", "give 'newcomer' its layer"),
    ],
)
def test_a_planted_fault_is_found(module, source, says):
    name = f"{PACKAGE}.{module}"
    assert [says in fault for fault in faults(name, imported(source, name))] == [True]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("losses.new", "import numpy\nfrom prefalign_jax.losses import sft\nfrom prefalign_jax.types import PairLogps"),
        ("data.new", "from . import records\nfrom .packing import pack"),
        ("config", "from prefalign_jax.optim import SCHEDULES"),
        ("train", "from prefalign_jax import __version__, checkpoint, evaluation"),
    ],
)
def test_what_is_allowed_passes(module, source):
    name = f"{PACKAGE}.{module}"
    assert faults(name, imported(source, name)) == []


def test_a_package_may_not_import_from_its_front_door():
    assert faults(PACKAGE, imported("from .types import Pair", PACKAGE, is_package=True))
    assert not faults(PACKAGE, imported("from .quiet import silence", PACKAGE, is_package=True))


def test_a_cycle_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
