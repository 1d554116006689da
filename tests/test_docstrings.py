"""One dialect of docstrings: Google's, with a line ``Shape:`` where tensors go in or come out."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "d_emo"
FILES = sorted(PACKAGE.glob("**/*.py"))
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Shape|Examples?):", re.M)
SPHINX = re.compile(r":(param|type|returns?|rtype|raises?|class|func|meth|mod|data|attr)\b[^:\n`]*:")
SOURCE = re.compile(r"et al\.|[Pp]aper|arXiv|eq\. \d|EMOv[12]|DiT|SiT|fvcore|timm")
INHERITED = {"forward", "state_dict", "load_state_dict", "to", "backward", "setup_context"}
"""What the base class defines and its readers know; a shape is asked for all the same."""


def definitions(file: Path):
    """(qualified name, node, docstring, the class around it) of what is public in a file."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node, ast.get_docstring(node) or "", None
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and (not inner.name.startswith("_") or is_call(inner)):
                    yield f"{node.name}.{inner.name}", inner, ast.get_docstring(inner) or "", node
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node, ast.get_docstring(node) or "", None


def is_call(node: ast.FunctionDef) -> bool:
    return node.name in ("__init__", "__post_init__", "__call__")


def tensors(node: ast.FunctionDef) -> bool:
    """Whether a function takes or gives tensors."""
    kinds = [each.annotation for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return any(kind is not None and re.search(r"\bTensor\b", ast.unparse(kind)) for kind in [*kinds, node.returns])


def raised(node: ast.AST) -> set[str]:
    """Names of our errors that a function raises itself, not through a function inside it."""
    names, rest = set(), list(ast.iter_child_nodes(node))
    while rest:
        each = rest.pop()
        if isinstance(each, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(each, ast.Raise) and isinstance(each.exc, ast.Call) and isinstance(each.exc.func, ast.Name):
            names |= {each.exc.func.id} & {"InputError", "RunError"}
        rest += ast.iter_child_nodes(each)
    return names


def sections(text: str) -> dict[str, str]:
    """Text of each section by its title; the sentence in front under ""."""
    pieces = re.split(SECTION, text)
    return {"": pieces[0]} | dict(zip(pieces[1::2], pieces[2::2], strict=True))


def complaints(file: Path) -> list[str]:
    """What is wrong with a file's docstrings."""
    found = []
    for name, node, text, around in definitions(file):
        whole = text if around is None else text + "\n\n" + (ast.get_docstring(around) or "")
        parts, method = sections(text), name.rpartition(".")[2]
        if isinstance(node, ast.ClassDef):
            if not text:
                found.append(f"{name} has no docstring")
            continue
        if not text and not (around is not None and (method in INHERITED or is_call(node) or overrides(node))):
            found.append(f"{name} has no docstring")
        if tensors(node) and "Shape:" not in (whole if is_call(node) or method == "forward" else text):
            if not (around is not None and overrides(node)):
                found.append(f"{name} gives no Shape:")
        for error in raised(node):
            if error not in sections(whole if is_call(node) or method == "forward" else text).get("Raises", ""):
                if error not in sections(ast.get_docstring(around) or "" if around else "").get("Raises", ""):
                    found.append(f"{name} does not say that it raises {error}")
        known = {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)}
        for line in re.findall(r"^    (\w[\w, *]*):", parts.get("Args", ""), re.M):
            for argument in re.split(r", ", line.replace("*", "")):
                if argument not in known:
                    found.append(f"{name} describes an argument {argument!r} that it does not take")
    return found


def overrides(node: ast.FunctionDef) -> bool:
    return node.name in DOCUMENTED


DOCUMENTED = {
    inner.name
    for file in FILES
    for node in ast.parse(file.read_text()).body
    if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(b) or "ABC" in ast.unparse(b) for b in node.bases)
    for inner in node.body
    if isinstance(inner, ast.FunctionDef) and ast.get_docstring(inner)
}

if __name__ == "__main__":
    for file in FILES:
        for c in complaints(file):
            print(file.relative_to(PACKAGE), c)
        text = file.read_text()
        for m in SPHINX.finditer(text):
            print(file.relative_to(PACKAGE), "sphinx", m[0])
        if file.parent.name == "models" and not SOURCE.search(ast.get_docstring(ast.parse(text)) or ""):
            print(file.relative_to(PACKAGE), "no source")
        if not ast.get_docstring(ast.parse(text)):
            print(file.relative_to(PACKAGE), "no module docstring")
