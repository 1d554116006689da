"""One dialect of docstrings: Google's, with ``Shape:`` where tensors go in or come out."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "d_emo"
FILES = sorted(PACKAGE.glob("**/*.py"))
TREES = {file: ast.parse(file.read_text()) for file in FILES}
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Shape|Examples?):", re.M)
SPHINX = re.compile(r":(param|type|returns?|rtype|raises?|class|func|meth|mod|data|attr)\b[^:\n`]*:")
SOURCE = re.compile(r"et al\.|papers?\b|arXiv|eq(uation)?s?\.? \d|DDPM|fvcore|timm|diffusers|released")
OURS = {"InputError", "RunError"}
files = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))


def is_special(name: str) -> bool:
    """What is described by the docstring of its class."""
    return name in ("__init__", "__post_init__", "__call__", "forward")


def bases(tree: ast.Module) -> set[str]:
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {ast.unparse(base).split(".")[-1] for node in classes for base in node.bases}


def described() -> set[str]:
    """Methods that a class of ours describes and others override; what they take and give is said there."""
    parents = set().union(*map(bases, TREES.values()))
    return {
        method.name
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and (node.name in parents or "Protocol" in map(ast.unparse, node.bases))
        for method in node.body
        if isinstance(method, ast.FunctionDef) and ast.get_docstring(method)
    } | {"state_dict", "load_state_dict", "backward"}  # and PyTorch's


DESCRIBED = described()


def definitions(file: Path):
    """(name, node, docstring, docstring of the class around it) of what is public."""
    for node in TREES[file].body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        yield node.name, node, ast.get_docstring(node) or "", ""
        for inner in node.body if isinstance(node, ast.ClassDef) else []:
            if not isinstance(inner, ast.FunctionDef) or "overload" in map(ast.unparse, inner.decorator_list):
                continue
            if is_special(inner.name) or not inner.name.startswith("_"):
                yield f"{node.name}.{inner.name}", inner, ast.get_docstring(inner) or "", ast.get_docstring(node) or ""


def handles_tensors(node: ast.FunctionDef) -> bool:
    """Whether a function takes or gives tensors: not only mappings of names to them, and not to answer a question."""
    if node.returns is not None and ast.unparse(node.returns) in ("bool", "str | None"):
        return False
    kinds = [each.annotation for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    texts = [ast.unparse(kind) for kind in [*kinds, node.returns] if kind]
    return any(re.search(r"\bTensor\b", re.sub(r"(dict|Mapping|Callable)\[.*\]", "", text)) for text in texts)


def raised(node: ast.AST) -> set[str]:
    """Names of our errors that a function raises itself, not through one inside it."""
    names, rest = set(), list(ast.iter_child_nodes(node))
    while rest:
        each = rest.pop()
        if isinstance(each, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(each, ast.Raise) and isinstance(each.exc, ast.Call) and isinstance(each.exc.func, ast.Name):
            names |= {each.exc.func.id} & OURS
        rest += ast.iter_child_nodes(each)
    return names


def sections(text: str) -> dict[str, str]:
    pieces = re.split(SECTION, text)
    return {"": pieces[0]} | dict(zip(pieces[1::2], pieces[2::2], strict=True))


def undescribed(name, node, text, around):
    method = name.rpartition(".")[2]
    if not text and not (around and (is_special(method) or method in DESCRIBED)):
        yield f"{name} has no docstring"


def shapeless(name, node, text, around):
    if isinstance(node, ast.FunctionDef) and handles_tensors(node) and "Shape:" not in text:
        method = name.rpartition(".")[2]
        known = method in DESCRIBED and not text
        if not known and not (is_special(method) and "Shape:" in around):
            yield f"{name} has no Shape:"


def unnamed_errors(name, node, text, around):
    if text or name.rpartition(".")[2] not in DESCRIBED:  # else said where it is described
        said = sections(text)[""] + sections(text).get("Raises", "") + sections(around).get("Raises", "")
        yield from (f"{name}: {error} is not among Raises" for error in raised(node) - set(re.findall(r"\w+", said)))


def foreign_arguments(name, node, text, around):
    if isinstance(node, ast.ClassDef):
        node = next((each for each in node.body if getattr(each, "name", "") == "__init__"), None)
    known = {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)} if node else set()
    for line in re.findall(r"^    (\w[\w, *]*):", sections(text).get("Args", ""), re.M) if node else ():
        yield from (f"{name} takes no {each}" for each in line.replace("*", "").split(", ") if each not in known)


@files
@pytest.mark.parametrize("problems", [undescribed, shapeless, unnamed_errors, foreign_arguments])
def test_what_is_public_is_described(file, problems):
    assert ast.get_docstring(TREES[file]), "the module has no docstring"
    wrong = [problem for definition in definitions(file) for problem in problems(*definition)]
    assert not wrong, "; ".join(wrong)


@files
def test_no_dialect_of_sphinx(file):
    assert not SPHINX.findall(file.read_text())


@pytest.mark.parametrize("file", sorted((PACKAGE / "models").glob("*.py")), ids=lambda file: file.stem)
def test_models_name_their_source(file):
    assert SOURCE.search(ast.get_docstring(TREES[file]) or ""), "say in the module's docstring where this comes from"
