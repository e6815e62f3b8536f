"""The builds that are compared: pure Python, and the packet path compiled (`make compiled`)."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

PURE, COMPILED = "pure", "compiled"
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build/compiled"


def builds() -> tuple[str, ...]:
    """Return the builds that are there; a compiled one that is older than its source is not."""
    made = {file.relative_to(FOLDER): file.stat().st_mtime for file in FOLDER.rglob("*.so")}
    if not made:
        return (PURE,)
    sources = [ROOT / path.parent / f"{path.name.partition('.')[0]}.py" for path in made]
    changed = max(source.stat().st_mtime for source in sources if source.exists())
    if min(made.values()) < changed:
        print(f"{FOLDER} is older than its source: measuring without it", file=sys.stderr)
        return (PURE,)
    return PURE, COMPILED


def named(text: str, build: str) -> str:
    """Return the name of a figure that was taken on a build."""
    return text if build == PURE else f"{text}, {build}"


@contextlib.contextmanager
def using(build: str) -> Iterator[None]:
    """Have the Python programs that are started meanwhile import this build."""
    roots = [ROOT] if build == PURE else [FOLDER, ROOT]
    chosen = {"PYTHONPATH": os.pathsep.join(map(str, roots)), "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
