"""The openai package for JavaScript, and Vercel's AI SDK with its strict schemas, where Node is present."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

import pytest

HERE = pathlib.Path(__file__).with_name("npm")
SCRIPT = (HERE / "client.mjs").read_text()
CHECKS = re.findall(r"^  async (\w+)\(\)", SCRIPT, re.MULTILINE)

pytestmark = pytest.mark.skipif(shutil.which("node") is None or shutil.which("npm") is None, reason="Node is not installed")


@pytest.fixture(scope="module")
def packages() -> pathlib.Path:
    """A directory with the packages of package.json, installed by the first run."""
    package = (HERE / "package.json").read_bytes()
    cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).with_name(f"npm-{hashlib.sha256(package).hexdigest()[:12]}")
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        fresh = pathlib.Path(tempfile.mkdtemp(prefix=cache.name, dir=cache.parent))
        (fresh / "package.json").write_bytes(package)
        command = ["npm", "install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        done = subprocess.run(command, cwd=fresh, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        try:
            fresh.rename(cache)
        except OSError:  # another worker was quicker
            shutil.rmtree(fresh)
    return cache


@pytest.fixture(scope="module")
def results(packages: pathlib.Path, witty: str) -> dict[str, str | None]:
    """What went wrong, by name of the check."""
    script = packages / "client.mjs"  # beside the packages, where Node looks for them
    script.write_text(SCRIPT)
    done = subprocess.run(["node", str(script), witty], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_in_node(results: dict[str, str | None], check: str) -> None:
    assert results[check] is None, results[check]
