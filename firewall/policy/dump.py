"""Plain values as YAML that kubectl, and our own reader, read back as they were."""

from typing import Any

import yaml

from firewall.policy.readers.document import not_text

_TEXT = "tag:yaml.org,2002:str"
_OTHER = "tag:yaml.org,2002:bool"  # any but the above: the emitter then writes quotes


class _Dumper(yaml.SafeDumper):
    """Quotes what would not be read as a string, and writes every value where it is used."""

    def ignore_aliases(self, data: object) -> bool:
        """Say that nothing is shared: an anchor would surprise an author who wrote none."""
        del data
        return True

    def resolve(self, kind: type[yaml.Node], value: str, implicit: tuple[bool, bool]) -> str:
        """Return the tag that a value without quotes would have for its readers."""
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        plain = kind is yaml.ScalarNode and implicit[0]
        return _OTHER if plain and tag == _TEXT and not_text(value) else tag


def dump(value: Any, *, flow: bool | None = False, width: float = 80) -> str:
    """Return a value as YAML, keys in their own order.

    Args:
        value: of plain types.
        flow: all in brackets, all in lines, or (None) only innermost collections in brackets.
        width: columns before it is folded.
    """
    text: str = yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=flow,
        sort_keys=False,
        allow_unicode=True,
        width=width,
    )
    return text
