r"""The chapter about TLS: which servers may be named, then what may be said inside.

Names come from the ClientHello, so the first step decrypts nothing; the second ends TLS at the
proxy and begins it again. Source: Cilium's guide "Inspecting TLS Encrypted Connections".
"""

import re
from pathlib import Path

from lab.demo.archive import NAMES, PORT
from lab.demo.chapter import REQUEST, Chapter, Story, curl, request
from lab.demo.stage import Stage
from lab.laboratory import Lab

POLICIES = ("sni-names.yaml", "sni-inside.yaml")

CURL_NO_TLS = 35
"""curl(1): a problem occurred somewhere in the SSL/TLS handshake."""

_READY_S = 60.0


class _Story(Story):
    title = "TLS: names and what is said inside"

    def __init__(self, lab: Lab, stage: Stage, folder: Path) -> None:
        super().__init__(lab, stage, folder)
        self._mediabot = lab.host("mediabot")
        self._archive = lab.host("archive")
        self._files = lab.folder / "tls"
        self.steps = (self.step1, self.step2)

    def _asks(self, name: str, method: str, path: str, *, code: int = 0, output: str = "") -> None:
        options = [
            "--cacert", str(self._files / "trusted.pem"),
            "--resolve", f"{name}:{PORT}:{self._archive.address4}",
        ]  # fmt: skip
        argv = curl(method, f"https://{name}{path}", *options)
        self.stage.run(self._mediabot, argv, code=code, output=output)

    def step1(self) -> None:
        """Server names, without decryption."""
        self.stage.scene(
            1, "Names: the archive may be asked, the leaks may not",
            "One server, one address, two names. The name stands in clear text in the first "
            "message of TLS; the proxy reads it there, and resets what the rule does not name.",
        )  # fmt: skip
        self.stage.wait_until(
            (self._files / "trusted.pem").exists, "the archive has its certificates", _READY_S
        )
        allowed, refused = NAMES
        self.apply(POLICIES[0], r"sni created")
        self._asks(allowed, "GET", "/plans/ds-1", output=r"GET /plans/ds-1: done\nHTTP 200")
        self.stage.flow(
            "default/mediabot", REQUEST, rf"tls-request FORWARDED.* \(TLS {re.escape(allowed)}\)"
        )
        self._asks(refused, "GET", "/plans/ds-1", code=CURL_NO_TLS, output=r"^HTTP 000")
        self.stage.flow(
            "default/mediabot", REQUEST, rf"tls-request DROPPED.* \(TLS {re.escape(refused)} "
        )

    def step2(self) -> None:
        """Http rules inside TLS."""
        self.stage.scene(
            2, "Requests inside TLS: read the plans, but do not change them",
            "Now TLS ends at the proxy, which judges every request and begins TLS again with the "
            "archive. It verifies the archive's certificate; the droid sees the empire's.",
        )  # fmt: skip
        name = NAMES[0]
        self.apply(POLICIES[1], r"sni configured")
        self._asks(name, "GET", "/plans/ds-1", output=r"GET /plans/ds-1: done\nHTTP 200")
        url = rf"https://{re.escape(name)}/plans/ds-1"
        self.stage.flow(
            "default/mediabot", REQUEST, request("FORWARDED", f"GET {url}", "HTTP/(2|1.1)")
        )
        self._asks(name, "PUT", "/plans/ds-1", output=r"Access denied\r?\nHTTP 403")
        self.stage.flow(
            "default/mediabot", REQUEST, request("DROPPED", f"PUT {url}", "HTTP/(2|1.1)")
        )


CHAPTER = Chapter(
    name="sni",
    topology="sni.yaml",
    policies=POLICIES,
    story=_Story,
    servers={"archive": ("-m", "lab.demo.archive", "{folder}/tls")},
    config={"proxy": {"secrets_dir": "{folder}/tls/secrets"}},
)
