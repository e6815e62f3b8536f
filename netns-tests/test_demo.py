"""The Star Wars demo: its deathstar, and the whole play as a user sees it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from traffic import curl, eventually

from lab import topology
from lab.demo import deathstar, starwars

ROOT = Path(__file__).resolve().parents[1]
PLAN = topology.hosts(deathstar="org=empire", ship="org=empire")
NAME = "http://deathstar.default.svc.cluster.local"


@pytest.fixture
def ship(lab):
    """A ship in sight of a deathstar, with nothing between them."""
    two = lab(PLAN)
    two.host("deathstar").start([sys.executable, "-m", "lab.demo.deathstar"])
    ship = two.host("ship")
    eventually(lambda: curl(ship, f"{NAME}/v1/")[0] == 0, "the deathstar is operational")
    ship.station = two.host("deathstar")
    return ship


@pytest.mark.needs("curl")
@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/v1/", "200", '"name": "Death Star"'),
        ("POST", "/v1/request-landing", "200", "Ship landed\n"),
        ("GET", "/v1/request-landing", "404", "no such thing"),
        ("PUT", "/v1/garbage-chute", "404", "no such thing"),
    ],
)
def test_the_deathstar_answers_what_it_offers_and_404_to_the_rest(ship, method, path, status, text):
    """As the image of Cilium's demo does."""
    code, answered, body = curl(ship, NAME + path, "-X", method)
    assert (code, answered) == (0, status)
    assert text in body


@pytest.mark.needs("curl")
def test_a_shot_is_answered_with_the_panic_and_two_seconds_later_the_process_is_another(ship):
    """The supervisor restarts it, and no landing is lost: the listening socket stays open."""
    code, status, body = curl(ship, f"{NAME}/v1/exhaust-port", "-X", "PUT")
    assert (code, status) == (0, "503")
    assert body == deathstar.PANIC
    eventually(lambda: ship.station.log().count("operational") == 2, "it was restarted")
    assert re.search(r"died with exit 2, restarting", ship.station.log())
    assert curl(ship, f"{NAME}/v1/request-landing", "-X", "POST")[1] == "200"


def _play(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lab.demo.play", "--folder", str(folder), *arguments],
        check=False, cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def _first_screen() -> str:
    """What README shows of the demo."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return readme.partition("It prints")[2].split("```")[1]


def _timeless(text: str) -> list[str]:
    """The lines of a play without what differs from one to the next, and without gaps."""
    for pattern, instead in (
        (r"\w{3} [ \d]\d \d\d:\d\d:\d\d\.\d{3}", "TIME"),
        (r":\d+ \(ID:", ":PORT (ID:"),
        (r"ID:\d+", "ID"),
        (r"[\w./-]+/(?=rule1-l\d\.yaml)", ""),
        (r"in \d+ s;", "in SOME s;"),
    ):
        text = re.sub(pattern, instead, text)
    return [line for line in text.splitlines() if line.strip() not in ("", "[…]")]


@pytest.mark.needs("curl", "nfqueue", "tproxy", "socket", "ipset")
def test_every_step_of_the_demo_comes_as_it_should(tmp_path):
    """Exit 0 means that each answer, status, exit code and flow was the expected one."""
    play = _play(tmp_path)
    assert play.returncode == 0, play.stdout + play.stderr
    for said in (
        "Ship landed",
        "exit 28",
        "Panic: deathstar exploded",
        "Access denied",
        "HTTP 403",
    ):
        assert said in play.stdout
    assert "\x1b[" not in play.stdout
    printed = iter(_timeless(play.stdout))
    missing = [line for line in _timeless(_first_screen()) if line not in printed]
    assert missing == [], "README shows what the demo does not print, or in another order"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(starwars.POLICIES)


@pytest.mark.needs("curl", "nfqueue", "tproxy", "socket", "ipset")
def test_the_chapters_about_headers_and_grpc_come_as_they_should(tmp_path):
    """One after the other in one play; the secret is told to the server only."""
    play = _play(tmp_path, "headers", "grpc")
    assert play.returncode == 0, play.stdout + play.stderr
    assert play.stdout.count("THX-1138") == 1
    assert "grpc-status 7 (PERMISSION_DENIED)" in play.stdout


@pytest.mark.needs("curl", "nfqueue", "tproxy", "socket", "ipset")
def test_the_chapter_about_tls_comes_as_it_should(tmp_path):
    """A name refused, a request inside TLS refused."""
    play = _play(tmp_path, "sni")
    assert play.returncode == 0, play.stdout + play.stderr
    assert "exit 35" in play.stdout
    assert "HTTP 403" in play.stdout


@pytest.mark.needs("curl", "nfqueue", "tproxy", "socket", "ipset")
def test_the_chapter_about_names_comes_as_it_should(tmp_path):
    """One name opens, another is only resolved, a third is never asked for."""
    play = _play(tmp_path, "names")
    assert play.returncode == 0, play.stdout + play.stderr
    assert "api.holonet.example is at 203.0.113.10" in play.stdout
    assert "exit 28" in play.stdout
    assert "exit 6" in play.stdout


@pytest.mark.needs("curl", "nfqueue", "tproxy", "socket", "ipset")
def test_a_policy_that_the_reader_changed_makes_the_demo_say_what_differs(tmp_path):
    """Edited files are used, not overwritten; the exit code is 1 and the step is named."""
    source = ROOT / "lab/demo" / starwars.POLICIES[0]
    edited = source.read_text().replace('port: "80"', 'port: "81"')
    assert edited != source.read_text()
    (tmp_path / starwars.POLICIES[0]).write_text(edited)
    play = _play(tmp_path, "--step", "2")
    assert play.returncode == 1
    assert "step 2:" in play.stdout
    assert (tmp_path / starwars.POLICIES[0]).read_text() == edited


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path):
    """No traceback; exit 2."""
    (tmp_path / "file").write_text("")
    play = _play(tmp_path / "file" / "folder")
    assert play.returncode == 2
    assert play.stderr.count("\n") == 1


def test_a_missing_program_is_named_with_exit_3(tmp_path):
    """curl is the one that people lack."""
    play = subprocess.run(
        [sys.executable, "-m", "lab.demo.play", "--folder", str(tmp_path)],
        check=False, cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PATH": str(tmp_path)},
    )  # fmt: skip
    assert play.returncode == 3
    assert "curl" in play.stderr
