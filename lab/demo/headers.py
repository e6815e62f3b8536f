"""The chapter on headers: a header that decides, and one that the proxy puts right."""

from pathlib import Path

from lab.demo.chapter import REQUEST, Chapter, Story, curl, request
from lab.demo.stage import Stage
from lab.laboratory import Lab

POLICIES = ("headers-squadron.yaml", "headers-code.yaml")

CODE = "THX-1138"
"""The secret."""

_URL = "hangar.default.svc.cluster.local/dock"
_LINE = rf"GET http://{_URL.replace('.', '[.]')}"


class _Story(Story):
    title = "Headers"

    def __init__(self, lab: Lab, stage: Stage, folder: Path) -> None:
        super().__init__(lab, stage, folder)
        secret = lab.folder / "secrets/default/docking-code"
        secret.parent.mkdir(parents=True)
        secret.write_text(f"{CODE}\n")
        self.steps = (self.step1, self.step2)

    def _docks(self, *fields: str, told: str) -> None:
        options = [word for field in fields for word in ("-H", field)]
        self.stage.run(self.lab.host("tiefighter"), curl("GET", _URL, *options), output=told)

    def step1(self) -> None:
        """A value that must be there, and alone."""
        self.stage.scene(
            1, "A header decides: only the black squadron enters",
            "The third request names two squadrons. Servers differ on which one counts, so all "
            "values together must be the one that the rule wants.",
        )  # fmt: skip
        self.apply(POLICIES[0], r"hangar.*created")
        self._docks(told=r"Access denied\r?\nHTTP 403")
        self._docks("X-Squadron: black", told=r"told X-Squadron: black\nHTTP 200")
        self._docks("X-Squadron: red", "X-Squadron: black", told=r"Access denied\r?\nHTTP 403")
        self.stage.flow("default/tiefighter", REQUEST, request("DROPPED", _LINE))

    def step2(self) -> None:
        """A value that the proxy puts there."""
        self.stage.scene(
            2, "A header is put right: the hangar is told the code in the secret",
            "The ship does not know it, and may say what it likes. The value is read from a file "
            "(proxy.secrets_dir); without that file the rule allows nothing.",
        )  # fmt: skip
        self.apply(POLICIES[1], r"hangar.*configured")
        self._docks("X-Docking-Code: please", told=rf"told x-docking-code: {CODE}\nHTTP 200")
        flow = self.stage.flow("default/tiefighter", REQUEST, request("FORWARDED", _LINE))
        if CODE in flow:
            self.stage.differs("the secret is in the flow")


CHAPTER = Chapter(
    name="headers",
    topology="headers.yaml",
    policies=POLICIES,
    story=_Story,
    servers={"hangar": ("-m", "lab.demo.hangar")},
    config={"proxy": {"secrets_dir": "{folder}/secrets"}},
)
