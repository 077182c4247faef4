"""Write `src/agent_gateway_store/sync.pyi` from the async classes: run this file after changing one of them.

The stub holds their public methods and properties with full signatures, less `async`, also of generators.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from agent_gateway_store import sync
from agent_gateway_store.approval import ApprovalManager
from agent_gateway_store.audit import AuditManager
from agent_gateway_store.delivery import NotificationManager
from agent_gateway_store.evidence.manager import EvidenceManager
from agent_gateway_store.keys import KeyManager
from agent_gateway_store.retention import RetentionManager
from agent_gateway_store.shipping import SinkManager
from agent_gateway_store.store import GatewayStore

STUB = Path(sync.__file__).with_suffix(".pyi")
_CLASSES = (
    *(AuditManager, ApprovalManager, KeyManager, NotificationManager, EvidenceManager, RetentionManager),
    *(SinkManager, GatewayStore),
)
TWINS = {cls.__name__: f"Sync{cls.__name__}" for cls in _CLASSES}

_ATTRIBUTES = {
    GatewayStore: (
        "    @property\n    def settings(self) -> StoreSettings:\n",
        '        """The settings in force."""\n\n',
    )
}
_WIDTH = 120
_RENAMED = TWINS | {"AsyncGenerator": "Generator", "__aenter__": "__enter__", "__aexit__": "__exit__"}
_DUNDERS = ("__init__", "__aenter__", "__aexit__")
_Method = ast.FunctionDef | ast.AsyncFunctionDef
_Imports = defaultdict[str, set[str]]


def generate() -> str:
    """Return the text of the stub."""
    imports: _Imports = defaultdict(set)
    classes = [_stub_of(cls, imports) for cls in _CLASSES]
    names = "".join(f'    "{name}",\n' for name in sorted(TWINS.values()))
    head = '"""Blocking twins of the async classes; made by `scripts/generate_sync_stub.py`, do not edit."""\n'
    return f"{head}\n{_import_lines(imports)}\n__all__ = [\n{names}]\n\n" + "\n".join(classes)


def _stub_of(cls: type, imports: _Imports) -> str:
    lines = [f"class {TWINS[cls.__name__]}:\n", *_ATTRIBUTES.get(cls, ())]
    for method, module in _members(cls):
        if method.name == "__init__" and cls is not GatewayStore:
            continue  # made by the store alone
        lines += _method(method, module, imports)
    return "".join(lines).rstrip() + "\n"


def _members(cls: type) -> Iterator[tuple[_Method, ast.Module]]:
    """Yield what a class and its bases define, each name once, with the module that it stands in."""
    seen: set[str] = set()
    for base in cls.__mro__[:-1]:
        module = ast.parse(Path(inspect.getfile(base)).read_text(encoding="utf-8"))
        definition = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == base.__name__)
        module.body.append(ast.Expr(ast.Constant(base.__module__)))
        for node in definition.body:
            if not isinstance(node, _Method) or node.name in seen or _marks(node) & {"classmethod", "staticmethod"}:
                continue
            seen.add(node.name)
            if not node.name.startswith("_") or node.name in _DUNDERS:
                yield node, module


def _marks(node: _Method) -> set[str]:
    return {ast.unparse(decorator) for decorator in node.decorator_list}


def _method(node: _Method, module: ast.Module, imports: _Imports) -> Iterator[str]:
    _shorten_defaults(node.args)
    if isinstance(node.returns, ast.Name) and node.returns.id == "RecordedCall":
        node.returns = ast.parse("AbstractContextManager[AuditEvent]", mode="eval").body
        module.body.insert(0, ast.parse("from contextlib import AbstractContextManager").body[0])
    for part in (*ast.walk(node.args), *ast.walk(node.returns or ast.Constant(None))):
        if isinstance(part, ast.Name):
            _note_import(part.id, module, imports)
    if "property" in _marks(node):
        yield "    @property\n"
    summary = _summary(node)
    body = f'\n        """{summary}"""\n\n' if summary else " ...\n"
    yield from _signature(
        _RENAMED.get(node.name, node.name), list(_arguments(node.args)), _returned(node.returns), body
    )


def _summary(node: _Method) -> str:
    """Return the first line of the docstring; of one that leaves no room for the quotes, the first sentence."""
    line = (ast.get_docstring(node) or "").partition("\n")[0]
    return line if len(line) <= _WIDTH - 14 else f"{line.partition('. ')[0].rstrip('.')}."


def _signature(name: str, arguments: list[str], returns: str, body: str) -> Iterator[str]:
    joined, inline = ", ".join(arguments), body.partition("\n")[0]
    if len(line := f"    def {name}({joined}) -> {returns}:{inline}") <= _WIDTH:
        yield line + body.removeprefix(inline)
        return
    yield f"    def {name}(\n"
    if len(line := f"        {joined}\n") <= _WIDTH + 1:
        yield line
    else:
        yield from (f"        {argument},\n" for argument in arguments)
    yield f"    ) -> {returns}:{body}"


def _shorten_defaults(arguments: ast.arguments) -> None:
    """Replace defaults that are computed by `...`."""

    def short(default: ast.expr | None) -> ast.expr | None:
        simple = ast.Constant | ast.Attribute | ast.UnaryOp
        return default if default is None or isinstance(default, simple) else ast.Constant(...)

    arguments.defaults = [short(default) or default for default in arguments.defaults]
    arguments.kw_defaults = [short(default) for default in arguments.kw_defaults]


def _arguments(arguments: ast.arguments) -> Iterator[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    missing = len(positional) - len(arguments.defaults)
    for index, argument in enumerate(positional):
        yield _argument(argument, arguments.defaults[index - missing] if index >= missing else None)
        if argument in arguments.posonlyargs[-1:]:
            yield "/"
    if arguments.vararg:
        yield f"*{ast.unparse(arguments.vararg)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _argument(argument, default)
    if arguments.kwarg:
        yield f"**{ast.unparse(arguments.kwarg)}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(argument).replace("'", '"')
    if default is None:
        return text
    value = ast.unparse(default).replace("'", '"')
    return f"{text} = {value}" if argument.annotation else f"{text}={value}"


def _returned(annotation: ast.expr | None) -> str:
    for node in ast.walk(annotation or ast.Constant(None)):
        if isinstance(node, ast.Name):
            node.id = _RENAMED.get(node.id, node.id)
    return ast.unparse(annotation or ast.Constant(None))


def _note_import(name: str, module: ast.Module, imports: _Imports) -> None:
    if name in TWINS or hasattr(builtins, name):
        return
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            imports[node.module or ""].add(_RENAMED.get(name, name))
            return
        if isinstance(node, ast.Import) and any((alias.asname or alias.name) == name for alias in node.names):
            imports[ast.unparse(node)] = set()
            return
    own = module.body[-1]
    assert isinstance(own, ast.Expr)
    imports[ast.literal_eval(own.value)].add(name)


def _import_lines(imports: _Imports) -> str:
    groups: list[list[str]] = [[], [], []]
    # Whole modules (`import x as y`, which bring no names) come first in their group.
    for module, names in sorted(imports.items(), key=lambda item: (bool(item[1]), item[0])):
        top = module.removeprefix("import ").partition(" ")[0].partition(".")[0]
        group = 0 if top in sys.stdlib_module_names else 2 if top == "agent_gateway_store" else 1
        groups[group].append(f"from {module} import {', '.join(sorted(names))}\n" if names else f"{module}\n")
    return "\n".join("".join(group) for group in groups if group)


if __name__ == "__main__":
    STUB.write_text(generate(), encoding="utf-8")
