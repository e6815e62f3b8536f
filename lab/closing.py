"""What ends with the `with` that it was made for."""

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """Something that is closed when its `with` block ends, however that happens."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds; it may be called again."""
