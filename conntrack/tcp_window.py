"""What each side of a TCP flow has sent and may still send."""


class Window:
    """Sequence space of one sender."""

    __slots__ = ("end",)

    def __init__(self) -> None:
        self.end = 0
