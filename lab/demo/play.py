"""The play: one chapter after another, each in a fresh lab, all in one enclosure.

The exit code is 0 only if every answer, status, exit code and flow came as it should.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lab import daemon, enclosure, topology
from lab.commands import python_environment
from lab.demo import cloudcity, headers, names, sni, starwars
from lab.demo.chapter import Chapter
from lab.demo.stage import Stage
from lab.laboratory import Lab, LabError

CHAPTERS = {
    module.CHAPTER.name: module.CHAPTER for module in (starwars, headers, cloudcity, names, sni)
}
"""Every chapter in the order of the play, by name."""

FIRST = starwars.CHAPTER.name
"""What is played if nothing is asked for."""

ALL = "all"
"""The word for every chapter."""

_PROGRAMS = ("ip", "nsenter", "iptables", "ip6tables", "ipset", "curl", "openssl")
_HERE = Path(__file__).parent


def main(names: Sequence[str], step: int | None, folder: Path) -> int:
    """Play these chapters up to `step` (None = all) in an enclosure; policies go to `folder`.

    Returns:
        0, 1 if something differed, 2 if the folder cannot be written, 3 if this machine cannot.
    """
    lacking = daemon.missing_programs(_PROGRAMS)
    if lacking:
        print(f"the demo needs {', '.join(lacking)}: install them first", file=sys.stderr)
        return enclosure.CANNOT
    wanted = names or [FIRST]
    chapters = [CHAPTERS[name] for name in (CHAPTERS if ALL in wanted else wanted)]
    try:
        _write_policies(folder, chapters)
    except OSError as error:
        print(f"cannot write the policies to {folder}: {error.strerror}", file=sys.stderr)
        return 2
    if enclosure.mode() is not None:
        return _play(chapters, step, folder)
    inside = [sys.executable, "-m", "lab.demo.play", *wanted, "--folder", str(folder)]
    if step is not None:
        inside += ["--step", str(step)]
    argv = [sys.executable, "-m", "lab.enclosure", "--quiet", "--", *inside]
    # ^C is for what plays inside, which takes its lab away and then ends.
    signal.signal(signal.SIGINT, lambda *_: None)
    return subprocess.run(argv, check=False, env=python_environment()).returncode


def _write_policies(folder: Path, chapters: Sequence[Chapter]) -> None:
    """Put the policies there; what is there already may have been edited, and stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for chapter in chapters:
        for name in chapter.policies:
            if not (folder / name).exists():
                shutil.copyfile(_HERE / name, folder / name)


def _play(chapters: Sequence[Chapter], last: int | None, folder: Path) -> int:
    began = time.monotonic()
    differing: list[str] = []
    try:
        for number, chapter in enumerate(chapters):
            if number:
                print(flush=True)
            if not _perform(chapter, last, folder):
                differing.append(chapter.name)
    except LabError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if differing:
        return 1
    print(
        f"\nEverything came as it should, in {time.monotonic() - began:.0f} s; nothing is left on "
        f"this machine.\nThe policies are in {folder}/: change them and play again.",
        flush=True,
    )
    if left := [name for name in CHAPTERS if CHAPTERS[name] not in chapters]:
        print(f"More: bartizan demo {' '.join(left)}", flush=True)
    return 0


def _perform(chapter: Chapter, last: int | None, folder: Path) -> bool:
    """Play one chapter; say whether everything came as it should."""
    with Lab(topology.read(_HERE / chapter.topology)) as lab:
        for host, argv in chapter.servers.items():
            folder_of_lab = str(lab.folder)
            filled = [part.replace("{folder}", folder_of_lab) for part in argv]
            lab.host(host).start([sys.executable, *filled])
        firewall = daemon.start(lab, _filled(chapter.config, str(lab.folder)), endpoints=False)
        stage = Stage(lab, firewall)
        story = chapter.story(lab, stage, folder)
        story.prologue()
        for step in story.steps[:last]:
            # Each step stands on those before it: after a difference the rest says nothing.
            if not stage.differences:
                step()
        return stage.curtain()


def _filled(config: object, folder: str) -> dict[str, object]:
    """Put the lab's folder into a chapter's settings."""

    def fill(value: object) -> object:
        if isinstance(value, dict):
            return {key: fill(inner) for key, inner in value.items()}
        return value.replace("{folder}", folder) if isinstance(value, str) else value

    filled = fill(config)
    assert isinstance(filled, dict)
    return filled


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lab.demo.play", description=__doc__)
    parser.add_argument("chapters", nargs="*")
    parser.add_argument("--folder", type=Path, default=Path("bartizan-demo"))
    parser.add_argument("--step", type=int, help="the last step of each chapter")
    chosen = parser.parse_args()
    sys.exit(main(chosen.chapters, chosen.step, chosen.folder))
