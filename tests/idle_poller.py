"""A poller for descriptors that are none."""

import asyncio

from l7proxy.poller import Poller


class Watching(Poller):
    """Remembers what it would watch; to be made in a running loop."""

    def __init__(self):
        super().__init__()
        self.close()
        self.watched, self.changed = set(), asyncio.Event()

    def watch(self, descriptor, events, who):
        self.watched.add(descriptor)
        self.changed.set()

    def forget(self, descriptor):
        self.watched.discard(descriptor)
