"""Things in the order in which they came, each of which can leave at once.

A doubly linked list whose links are in the things themselves: nothing is allocated to put one in,
nothing is searched to take one out, and nothing ever grows all at once, as a dictionary does. A
chain is a link, too, so that chains can stand in a chain.
"""


class Link:
    """What may stand in one chain at a time.

    Attributes:
        older: what came before it in its chain.
        newer: what came after it.
    """

    __slots__ = ("newer", "older")

    def __init__(self) -> None:
        self.older: Link | None = None
        self.newer: Link | None = None


class Chain(Link):
    """Links, oldest first.

    Attributes:
        oldest: the first to have come; None: the chain is empty.
        newest: the last.
        count: how many there are.
    """

    __slots__ = ("count", "newest", "oldest")

    def __init__(self) -> None:
        self.older = None
        self.newer = None
        self.oldest: Link | None = None
        self.newest: Link | None = None
        self.count = 0

    def append(self, link: Link) -> None:
        """Put a link, which is in no chain, behind all others."""
        last = self.newest
        if last is None:
            self.oldest = link
        else:
            last.newer = link
            link.older = last
        self.newest = link
        self.count += 1

    def take(self, link: Link) -> None:
        """Take out a link that is in this chain."""
        older, newer = link.older, link.newer
        if older is None:
            self.oldest = newer
        else:
            older.newer = newer
        if newer is None:
            self.newest = older
        else:
            newer.older = older
        link.older = link.newer = None
        self.count -= 1
