"""The chapter on gRPC: a method is a path."""

from pathlib import Path

from lab.demo.chapter import REQUEST, Chapter, Story, request
from lab.demo.stage import Stage
from lab.laboratory import Lab

POLICIES = ("cloudcity-doors.yaml",)

_DOORS = "doors.default.svc.cluster.local"


class _Story(Story):
    title = "Cloud City"

    def __init__(self, lab: Lab, stage: Stage, folder: Path) -> None:
        super().__init__(lab, stage, folder)
        self.steps = (self.step1, self.step2)

    def _calls(self, method: str, door: int, said: str, code: int = 0) -> None:
        argv = ["python3", "-m", "lab.demo.doors", _DOORS, method, str(door)]
        self.stage.run(self.lab.host("terminal"), argv, code=code, output=said)

    def _flow(self, verdict: str, method: str) -> None:
        url = rf"POST http://{_DOORS.replace('.', '[.]')}:50051/cloudcity\.DoorManager/{method}"
        self.stage.flow("default/terminal", REQUEST, request(verdict, url, "HTTP/2"))

    def step1(self) -> None:
        """No policy."""
        self.stage.scene(
            1, "No policy: the public terminal sets an access code",
            "gRPC is HTTP/2: many calls on one connection, each a POST to /package.Service/Method. "
            "A port says nothing about any of them.",
        )  # fmt: skip
        self._calls("SetAccessCode", 2, r"grpc-status 0 \(OK\): door 2 has a new access code")

    def step2(self) -> None:
        """A rule for methods."""
        self.stage.scene(
            2, "A rule for methods: ask for a door's name, but do not set its code",
            "A refused call gets what a gRPC client understands: trailers with status 7, not an "
            "HTTP error. Other calls on the same connection go on.",
        )  # fmt: skip
        self.apply(POLICIES[0], r"doors.*created")
        self._calls("GetName", 1, r"grpc-status 0 \(OK\): Spaceport Door #1")
        self._flow("FORWARDED", "GetName")
        self._calls("SetAccessCode", 2, r"grpc-status 7 \(PERMISSION_DENIED\): Access denied", 1)
        self._flow("DROPPED", "SetAccessCode")


CHAPTER = Chapter(
    name="grpc",
    topology="cloudcity.yaml",
    policies=POLICIES,
    story=_Story,
    servers={"doors": ("-m", "lab.demo.doors", "serve")},
)
