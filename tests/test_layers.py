"""The judge of the house: applies the rules of layers.py to every file, and shows that each rule catches what breaks it."""

from __future__ import annotations

import pathlib
import warnings

import pytest

from tests.layers import (
    PACKAGES,
    RULES,
    Rule,
    Source,
    find_banned_imports,
    find_budget_excesses,
    find_circles,
    find_environment_reads,
    find_floor_violations,
    find_hidden_jax,
    find_leftovers,
    find_mutable_globals,
    parse,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def house() -> list[Source]:
    """Every file of the packages."""
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return [parse(path.relative_to(ROOT).as_posix(), path.read_text("utf-8")) for path in paths]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_keeps_the_rule(house: list[Source], rule: Rule) -> None:
    assert house, "no source files found"
    assert not (found := rule(house)), "\n" + "\n".join(found)


def test_budgets_warn_when_exceeded(house: list[Source]) -> None:
    for excess in find_budget_excesses(house):
        warnings.warn(excess, stacklevel=1)


# Rule, the files that break it, what it must say; each a smallest case of one way to break the rule.
BROKEN: tuple[tuple[Rule, dict[str, str], str], ...] = (
    (find_floor_violations, {"jaxserve/models/rope.py": "import jaxserve.engine.engine"}, "not on a lower floor"),
    (find_floor_violations, {"jaxserve/models/rope.py": "from jaxserve.config import EngineConfig\nimport jaxserve.llm"}, ":2:"),
    (find_floor_violations, {"jaxserve/scheduler/pages.py": "def f():\n    from jaxserve.text import chat"}, ":2:"),
    (find_floor_violations, {"jaxserve/request.py": "from jaxserve import config", "jaxserve/config.py": ""}, "jaxserve.config is not"),
    (find_floor_violations, {"jaxserve/llm.py": "from jaxserve import SamplingParams"}, "jaxserve is not"),
    (find_floor_violations, {"pallas_kernels/tuning.py": "from jaxserve.errors import UserError"}, "jaxserve.errors is not"),
    (find_floor_violations, {"jaxserve/quant.py": "import pallas_kernels.dispatch"}, "pallas_kernels is not"),
    (find_floor_violations, {"jaxserve/models/rope.py": "from .spec import RopeSpec"}, "relative import"),
    (find_floor_violations, {"jaxserve/misc.py": ""}, "no floor"),
    (find_floor_violations, {"jaxserve/models/a.py": "import importlib\nimportlib.import_module('jaxserve.api.app')"}, ":2:"),
    (find_banned_imports, {"jaxserve/runner/step.py": "from flax import nnx"}, "flax"),
    (find_banned_imports, {"jaxserve/text/chat.py": "import transformers"}, "transformers"),
    (find_banned_imports, {"jaxserve/serve.py": "from starlette.applications import Starlette"}, "starlette"),
    (find_banned_imports, {"jaxserve/text/tools.py": "import llguidance"}, "llguidance"),
    (find_banned_imports, {"jaxserve/weights/torch_bin.py": "import torch"}, "torch"),
    (find_banned_imports, {"jaxserve/scheduler/pages.py": "import jax.numpy as jnp"}, "loads jax"),
    (find_banned_imports, {"jaxserve/config.py": "def f():\n    import jaxlib"}, "loads jax"),
    (find_hidden_jax, {"jaxserve/api/app.py": "import jaxserve.engine.a", "jaxserve/engine/a.py": "import jax"}, "jaxserve.engine.a"),
    (find_hidden_jax, {"jaxserve/text/a.py": "import jaxserve.media", "jaxserve/media.py": "import jax"}, "jaxserve.media"),
    (find_hidden_jax, {"jaxserve/api/a.py": "import jaxserve.engine.b", "jaxserve/engine/__init__.py": "import jax"}, "jaxserve.engine"),
    (find_hidden_jax, {"jaxserve/__init__.py": "from jaxserve.llm import LLM", "jaxserve/llm.py": "import jax"}, "jaxserve.llm"),
    (find_circles, {"jaxserve/text/a.py": "import jaxserve.text.b", "jaxserve/text/b.py": "from jaxserve.text.a import x"}, "circle"),
    (
        find_circles,
        {"jaxserve/text/a.py": "import jaxserve.text.b", "jaxserve/text/b.py": "def f():\n    import jaxserve.text.a"},
        "circle",
    ),
    (find_environment_reads, {"jaxserve/llm.py": "import os\nX = os.environ['HOME']"}, ":2:"),
    (find_environment_reads, {"pallas_kernels/tuning.py": "import os as o\n\ndef f():\n    return o.getenv('A')"}, ":4:"),
    (find_environment_reads, {"jaxserve/llm.py": "from os import environ"}, "environ"),
    (find_mutable_globals, {"jaxserve/llm.py": "_cache = {}"}, "_cache"),
    (find_mutable_globals, {"jaxserve/llm.py": "if True:\n    seen: set[int] = set()"}, "seen"),
    (find_mutable_globals, {"jaxserve/llm.py": "TABLE = {}\n\ndef f():\n    TABLE['a'] = 1"}, ":4:"),
    (find_mutable_globals, {"jaxserve/llm.py": "NAMES = []\n\ndef f():\n    NAMES.append('a')"}, ":4:"),
    (find_mutable_globals, {"jaxserve/llm.py": "NAMES = []\nNAMES += ['a']"}, ":2:"),
    (find_mutable_globals, {"jaxserve/llm.py": "count = 0\n\ndef f():\n    global count\n    count = 1"}, "global count"),
    (find_leftovers, {"jaxserve/llm.py": "x = 1  # TODO: later"}, "TODO"),
    (find_leftovers, {"jaxserve/llm.py": "# FIXME #3"}, "FIXME"),
    (find_leftovers, {"jaxserve/llm.py": "try:\n    x = 1\nexcept Exception:\n    pass"}, "swallowed"),
    (find_leftovers, {"jaxserve/llm.py": "try:\n    x = 1\nexcept (OSError, BaseException):\n    ..."}, "swallowed"),
    (find_leftovers, {"jaxserve/llm.py": "with contextlib.suppress(Exception):\n    f()"}, "suppress"),
    (find_budget_excesses, {"jaxserve/llm.py": "x = 1\n" * 401}, "401 lines"),
    (find_budget_excesses, {"pallas_kernels/tuning.py": "x = 1\n" * 701}, "701 lines"),
    (find_budget_excesses, {"jaxserve/llm.py": "def f():\n" + "    x = 1\n" * 45}, "f has 46 lines"),
)


@pytest.mark.parametrize(("rule", "files", "message"), BROKEN)
def test_rule_catches_a_source_that_breaks_it(rule: Rule, files: dict[str, str], message: str) -> None:
    found = rule([parse(path, text) for path, text in files.items()])
    assert found, "nothing found"
    assert message in found[0]


SOUND = {
    "jaxserve/__init__.py": "import importlib\n\ndef __getattr__(name):\n    return importlib.import_module('jaxserve.llm')",
    "jaxserve/api/app.py": "from starlette.routing import Route\nif TYPE_CHECKING:\n    from jaxserve.engine.engine import Engine",
    "jaxserve/config.py": "import os\nHOME = os.environ.get('HOME')\n__all__ = ['HOME']",
    "jaxserve/engine/engine.py": "import jax\nfrom jaxserve.config import HOME\nfrom jaxserve.engine.lora import Lora",
    "jaxserve/engine/lora.py": "if TYPE_CHECKING:\n    from jaxserve.engine.engine import Engine",
    "jaxserve/llm.py": "from jaxserve.engine.engine import Engine\nNAMES = {}  # TODO(#7): more\n_LOCK = Lock()\n\ndef f():\n    x = []",
    "jaxserve/models/names.py": "from flax import nnx\nfrom pallas_kernels import dispatch",
    "jaxserve/text/tokenizer.py": "import transformers\ntry:\n    x = 1\nexcept OSError:\n    pass",
    "pallas_kernels/dispatch.py": "import jax",
}


@pytest.mark.parametrize("rule", [*RULES, find_budget_excesses], ids=lambda rule: rule.__name__)
def test_rule_finds_nothing_in_sound_sources(rule: Rule) -> None:
    assert rule([parse(path, text) for path, text in SOUND.items()]) == []
