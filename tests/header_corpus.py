"""Rules for the part of the HTTP corpus that is about header and host rules."""

from firewall.policy.snapshot import HeaderMatchRow, HttpRuleRow

HEADER_RULES = (
    HttpRuleRow(
        method="GET",
        path="/public/.*",
        host=r"svc\.local",
        header_matches=(
            HeaderMatchRow(
                "X-Token",
                value=None,
                secret_namespace="default",
                secret_name="token",
            ),
            HeaderMatchRow("X-Env", mismatch="REPLACE", value="prod"),
        ),
    ),
)
"""Those rules of the header corpus that a CiliumNetworkPolicy can express."""

NOT_EXPRESSIBLE = {"hdr-role-user-plus-admin"}
"""It wants a rule that fails on a header's presence; `headerMatches` has no such item."""
