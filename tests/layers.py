"""The rules of the house: floors, import bans, circles, mutable globals, leftovers and line budgets, read from the source alone.

1. Every file of the packages becomes a `Source`: its module name, its syntax tree, its imports.
2. Each rule is a function from all sources to a list of violations, "path:line: what is wrong". test_layers.py applies them.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import tokenize
from collections.abc import Callable, Iterator

PACKAGES = ("jaxserve", "pallas_kernels")

# Top to bottom: a file imports only from lower floors and from its own unit, which is a folder or a single file.
FLOORS = (
    ("jaxserve",),  # the package's own __init__.py, which exports lazily
    ("jaxserve.serve", "jaxserve.plan", "jaxserve.batch", "jaxserve.async_llm"),
    ("jaxserve.api", "jaxserve.llm"),
    ("jaxserve.engine", "jaxserve.outputs"),
    ("jaxserve.runner",),
    ("jaxserve.weights",),
    ("jaxserve.models",),
    ("jaxserve.scheduler", "jaxserve.text", "jaxserve.sharding", "jaxserve.command_line"),
    ("jaxserve.config", "jaxserve.request", "jaxserve.media", "jaxserve.pooling"),
    ("pallas_kernels", "jaxserve.errors", "jaxserve.metrics", "jaxserve.quant", "jaxserve.version", "jaxserve.vllm_options"),
)
FLOOR_OF = {unit: len(FLOORS) - index for index, units in enumerate(FLOORS) for unit in units}

# Who may import a library: modules, or folders with all in them.
ALLOWED_IN = {
    "flax": ("jaxserve.models",),
    "transformers": ("jaxserve.text.tokenizer", "jaxserve.media", "jaxserve.weights.hf_config"),
    "starlette": ("jaxserve.api",),
    "llguidance": ("jaxserve.text.grammar",),
    "numba": ("pallas_kernels",),
    "llvmlite": ("pallas_kernels.native",),
    "torch": (),
}
# Units that load no jax, neither by themselves nor by what they import; and the libraries that load it.
WITHOUT_JAX = (
    "jaxserve",
    "jaxserve.scheduler",
    "jaxserve.text",
    "jaxserve.api",
    "jaxserve.request",
    "jaxserve.config",
    "jaxserve.command_line",
    "jaxserve.pooling",
    "jaxserve.vllm_options",
)
LOADS_JAX = ("jax", "jaxlib", "flax", "orbax", "optax")
READS_ENVIRONMENT = ("jaxserve.config",)
ENVIRONMENT_NAMES = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")

FILE_LINES = {"jaxserve": 400, "pallas_kernels": 700}
FUNCTION_LINES = 45

MUTABLE_MAKERS = ("list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "deque", "Counter")
MUTATORS = (
    *("append", "appendleft", "extend", "insert", "add", "update", "setdefault", "pop", "popleft", "popitem"),
    *("clear", "remove", "discard", "sort", "reverse"),
)
TYPE_ONLY, LAZY, EAGER = "type_only", "lazy", "eager"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported module, named as far as the statement tells.

    Args:
      target: "jax.numpy"; for `from a.b import c` it is "a.b.c", which may be a name inside module a.b.
      level: leading dots of a relative import.
      when: TYPE_ONLY under TYPE_CHECKING, LAZY inside a function, else EAGER.
    """

    target: str
    line: int
    level: int
    when: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file: where it is, what module it makes, what it says."""

    path: str
    module: str
    text: str
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def unit(self) -> str:
        """The folder or single file that stands on a floor: "jaxserve.models", "jaxserve.llm", "pallas_kernels"."""
        parts = self.module.split(".")
        return ".".join(parts[:2]) if parts[0] == "jaxserve" else parts[0]

    def at(self, line: int, message: str) -> str:
        """A violation in the form that editors can jump to."""
        return f"{self.path}:{line}: {message}"


def parse(path: str, text: str) -> Source:
    """The source of one file, `path` relative to the root of the repository."""
    parts = path.removesuffix(".py").split("/")
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    tree = ast.parse(text, path)
    return Source(path=path, module=module, text=text, tree=tree, imports=tuple(_find_imports(tree, EAGER)))


def _find_imports(node: ast.AST, when: str) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(target=alias.name, line=node.lineno, level=0, when=when) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        prefix = f"{node.module}." if node.module else ""
        yield from (Import(target=prefix + alias.name, line=node.lineno, level=node.level, when=when) for alias in node.names)
    elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
        for argument in node.args[:1]:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield Import(target=argument.value, line=node.lineno, level=0, when=when)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and when == EAGER:
        when = LAZY
    guarded = node.body if isinstance(node, ast.If) and _last_name(node.test) == "TYPE_CHECKING" else []
    for child in ast.iter_child_nodes(node):
        yield from _find_imports(child, TYPE_ONLY if child in guarded else when)


def _last_name(node: ast.AST) -> str:
    """`c` of an expression `a.b.c` or `c`, else nothing."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


def _resolve(target: str, modules: dict[str, Source]) -> str | None:
    """The module of the house that an import names, or None for a library."""
    if target.split(".")[0] not in PACKAGES:
        return None
    while target not in modules and target not in FLOOR_OF:
        target = target.rpartition(".")[0]
    return target


def _by_module(sources: list[Source]) -> dict[str, Source]:
    return {source.module: source for source in sources}


def find_floor_violations(sources: list[Source]) -> list[str]:
    """Imports that go up or sideways, relative imports, and files that stand on no floor."""
    modules, found = _by_module(sources), []
    for source in sources:
        if source.unit not in FLOOR_OF:
            found.append(source.at(1, f"{source.unit} stands on no floor; give it one in FLOORS"))
            continue
        for item in source.imports:
            target = None if item.level else _resolve(item.target, modules)
            unit = modules[target].unit if target in modules else target
            if item.level:
                found.append(source.at(item.line, f"relative import of {item.target}; imports are absolute"))
            elif unit is not None and unit != source.unit and FLOOR_OF.get(unit, 99) >= FLOOR_OF[source.unit]:
                found.append(source.at(item.line, f"{source.unit} may not import {item.target}: {unit} is not on a lower floor"))
    return found


def find_banned_imports(sources: list[Source]) -> list[str]:
    """Libraries outside the few places that may import them, and direct imports of jax where there must be none."""
    found = []
    for source in sources:
        for item in source.imports:
            library = item.target.split(".")[0]
            if not _is_within(source.module, ALLOWED_IN.get(library, PACKAGES)):
                found.append(source.at(item.line, f"{library} may be imported only in {ALLOWED_IN[library] or 'tests'}"))
            if source.unit in WITHOUT_JAX and library in LOADS_JAX:
                found.append(source.at(item.line, f"{source.unit} may not import {item.target}, which loads jax"))
    return found


def _graph(sources: list[Source], kinds: tuple[str, ...], *, parents: bool) -> dict[str, list[str]]:
    """Module -> modules of the house it imports in one of `kinds`; with `parents`, also the packages that those imports run."""
    modules = _by_module(sources)
    graph: dict[str, list[str]] = {module: [] for module in modules}
    for source in sources:
        for item in source.imports:
            target = _resolve(item.target, modules) if item.when in kinds else None
            while target:
                if target in modules and target != source.module:
                    graph[source.module].append(target)
                target = target.rpartition(".")[0] if parents else ""
    return graph


def find_hidden_jax(sources: list[Source]) -> list[str]:
    """Modules that must not load jax and do by way of others; what only annotations need does not count, nor what __init__ does lazily."""
    modules = _by_module(sources)
    graph = _graph(sources, (EAGER, LAZY), parents=True)
    if "jaxserve" in graph:
        graph["jaxserve"] = _graph([modules["jaxserve"], *sources], (EAGER,), parents=True)["jaxserve"]
    loads = {s.module for s in sources if any(i.target.split(".")[0] in LOADS_JAX and i.when != TYPE_ONLY for i in s.imports)}
    found = []
    for source in sources:
        path = _find_path(graph, source.module, loads) if source.unit in WITHOUT_JAX else []
        if len(path) > 1:
            found.append(source.at(1, f"loads jax by way of {' -> '.join(path[1:])}"))
    return found


def _find_path(graph: dict[str, list[str]], start: str, goals: set[str]) -> list[str]:
    """A shortest path from `start` to one of `goals`, or nothing."""
    paths = {start: [start]}
    for module in (queue := [start]):
        if module in goals:
            return paths[module]
        for target in graph[module]:
            if target not in paths:
                paths[target] = [*paths[module], target]
                queue.append(target)
    return []


def find_circles(sources: list[Source]) -> list[str]:
    """Modules that reach themselves by imports, late ones in functions included, those for annotations alone not."""
    graph, found, reported = _graph(sources, (EAGER, LAZY), parents=False), [], set()
    for source in sources:
        for target in graph[source.module]:
            circle = _find_path(graph, target, {source.module})
            if circle and frozenset(circle) not in reported:
                reported.add(frozenset(circle))
                found.append(source.at(1, f"import circle {' -> '.join([source.module, *circle])}"))
    return found


def find_environment_reads(sources: list[Source]) -> list[str]:
    """Uses of the process environment outside the one file that reads it."""
    found = []
    for source in sources:
        if _is_within(source.module, READS_ENVIRONMENT):
            continue
        os_names = _os_names(source.tree)
        for node in ast.walk(source.tree):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and _last_name(node.value) in os_names:
                names = [node.attr]
            for name in set(names).intersection(ENVIRONMENT_NAMES):
                found.append(source.at(getattr(node, "lineno", 1), f"os.{name}: only config.py reads the environment"))
    return found


def _os_names(tree: ast.Module) -> set[str]:
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import))
    return {alias.asname or "os" for node in imports for alias in node.names if alias.name == "os"}


def find_mutable_globals(sources: list[Source]) -> list[str]:
    """Containers at module level that are not constants by name or are changed, and `global` statements."""
    found = []
    for source in sources:
        tables = dict(_module_containers(source.tree.body))
        for name, line in tables.items():
            if not re.fullmatch(r"_*[A-Z][A-Z0-9_]*|__\w+__", name):
                found.append(source.at(line, f"{name} is a mutable global; make it an UPPER_CASE constant or pass it along"))
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Global):
                found.append(source.at(node.lineno, f"global {', '.join(node.names)}"))
            elif (name := _changed_name(node)) in tables:
                found.append(source.at(getattr(node, "lineno", 1), f"{name} is a module-level container and is changed here"))
    return found


def _module_containers(body: list[ast.stmt]) -> Iterator[tuple[str, int]]:
    """Name and line of each container bound at module level, inside if, try, with and for as well."""
    for node in body:
        for field in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from _module_containers(getattr(node, field, []))
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _is_container(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((target.id, node.lineno) for target in targets if isinstance(target, ast.Name))


def _is_container(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return _last_name(node.func) in MUTABLE_MAKERS
    return isinstance(node, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def _changed_name(node: ast.AST) -> str:
    """The name whose container this node changes in place: x[i] = 1, del x[i], x += y, x.append(y)."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        return _last_name(node.value) if isinstance(node.value, ast.Name) else ""
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        return node.target.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
        return node.func.value.id if isinstance(node.func.value, ast.Name) else ""
    return ""


def find_leftovers(sources: list[Source]) -> list[str]:
    """Comments that promise work without an issue number, and handlers that swallow every exception."""
    found = []
    for source in sources:
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            if token.type == tokenize.COMMENT and re.search(r"\b(FIXME|XXX)\b|\bTODO\b(?!.*#\d)", token.string):
                found.append(source.at(token.start[0], f"leftover marker: {token.string}"))
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ExceptHandler) and _catches_all(node.type) and all(_is_empty(item) for item in node.body):
                found.append(source.at(node.lineno, "every exception is swallowed; catch the one that is meant, or handle it"))
            elif isinstance(node, ast.Call) and _last_name(node.func) == "suppress" and any(map(_catches_all, node.args)):
                found.append(source.at(node.lineno, "suppress() of every exception; name the one that is meant"))
    return found


def _catches_all(node: ast.expr | None) -> bool:
    if isinstance(node, ast.Tuple):
        return any(map(_catches_all, node.elts))
    return node is None or _last_name(node) in ("Exception", "BaseException")


def _is_empty(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass | ast.Continue) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def find_budget_excesses(sources: list[Source]) -> list[str]:
    """Files and functions longer than their budgets."""
    found = []
    for source in sources:
        lines, budget = len(source.text.splitlines()), FILE_LINES[source.module.split(".")[0]]
        if lines > budget:
            found.append(source.at(1, f"{lines} lines, budget {budget}"))
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    found.append(source.at(node.lineno, f"{node.name} has {length} lines, budget {FUNCTION_LINES}"))
    return found


Rule = Callable[[list[Source]], list[str]]
# All that fails a change; find_budget_excesses only warns.
RULES: tuple[Rule, ...] = (
    find_floor_violations,
    find_banned_imports,
    find_hidden_jax,
    find_circles,
    find_environment_reads,
    find_mutable_globals,
    find_leftovers,
)
