"""The form of every message that a user can meet.

    flash_attn: <what is wrong>; received <what came>; rule: <what is accepted>

Where flash-attn 2.8 has a text for the case, <what is wrong> holds its words, because programs
match on them. The ``_check_*.py`` files hold the rules.
"""

from __future__ import annotations

from typing import NoReturn


def refuse(what: str, received: str, rule: str, error: type[Exception] = RuntimeError) -> NoReturn:
    raise error(f"flash_attn: {what}; received {received}; rule: {rule}")
